"""The attention kernels of the CuPy accelerator, run on the CPU: every kind of bias and mask, long rows, and planted faults."""

import numpy as np
import pytest
from emulated import Emulated, EmulationError
from refmodels_cupy import attention
from refmodels_cupy.attention import Alibi, attend, plan, relative_table
from refmodels_cupy.recorder import Recorder, RecordingError
from refmodels_cupy.source import DIRECTORY

from refmodels.accelerator import Accelerator
from refmodels.conformance import check_accelerator, drawing
from refmodels.numerics import judge
from refmodels.ops import attention as ops
from refmodels.ops.mask import causal_mask
from refmodels.ops.position import (
    alibi_bias,
    alibi_slopes,
    relative_position_bias,
    relative_position_buckets,
)
from refmodels.ops.precision import numpy_dtype


@pytest.fixture
def device(compiled):
    return Emulated(compiled)


def example(device, dtype, size, t, s, *, bias="none", mask="given", batch=2, heads=2):
    """Queries, keys and values, how `attend` is called, and the mask and the bias that the op is given for the same."""
    rng = np.random.default_rng(7)
    arrays = [rng.standard_normal((batch, length, heads, size)).astype(numpy_dtype(dtype)) for length in (t, s, s)]
    positions = (s - t + np.arange(t))[None].astype(np.int32)
    how, wanted = {"scale": size**-0.5}, {"mask": np.ones((batch, 1, t, s), bool), "bias": None}
    if mask == "given":
        how["mask"] = wanted["mask"] = rng.random((batch, 1, t, s)) < 0.6
        wanted["mask"][0, 0, t // 2] = False  # a row that permits no key
    if mask == "causal":
        keys = np.arange(s) >= rng.integers(0, s - t + 4, (batch, 1))  # padded on the left
        keys[0, : s - t + 3] = False  # its first three queries are permitted none
        how |= {"causal": True, "key_mask": keys, "positions": positions}
        wanted["mask"] = causal_mask.reference(positions, keys)
    if bias == "alibi":
        slopes = alibi_slopes.reference(heads)
        how |= {"bias": Alibi(slopes.astype(np.float32)), "positions": positions}
        wanted["bias"] = alibi_bias.reference(slopes, positions, s)
    if bias in ("table", "causal table"):
        embeddings = rng.standard_normal((32, heads)).astype(np.float32)
        both = bias == "table"
        how |= {"bias": relative_table(device, embeddings, bidirectional=both), "positions": positions}
        buckets = relative_position_buckets.reference(positions, s, bidirectional=both)
        wanted["bias"] = relative_position_bias.reference(buckets, embeddings)
    if bias == "given":
        how["bias"] = wanted["bias"] = rng.standard_normal((1, heads, t, s)).astype(np.float32)
    return arrays, how, wanted


def verdict(device, arrays, how, wanted):
    got, launches = plan(device, *arrays, **how)
    for launch in launches * 2:  # as a captured step is played again
        got[...] = np.nan
        device.launch(launch)
    return judge(ops.attention, (*arrays, wanted["mask"], wanted["bias"]), {"scale": how["scale"]}, got)


CASES = [
    ("float16", 64, "none", "given"),
    ("bfloat16", 64, "alibi", "causal"),
    ("bfloat16", 64, "table", "given"),
    ("float16", 80, "causal table", "causal"),
    ("bfloat16", 80, "given", "all"),
    ("bfloat16", 96, "none", "causal"),
    ("float16", 96, "alibi", "all"),
    ("float16", 128, "given", "given"),
    ("bfloat16", 128, "alibi", "causal"),
    ("float16", 128, "table", "all"),
    ("float32", 64, "table", "causal"),
    ("float32", 80, "alibi", "given"),
    ("float32", 200, "none", "all"),
    ("bfloat16", 40, "causal table", "causal"),
    ("float16", 7, "given", "given"),
]


@pytest.mark.parametrize(("dtype", "size", "bias", "mask"), CASES)
@pytest.mark.parametrize("t", [70, 1])
def test_every_bias_and_mask(device, dtype, size, bias, mask, t):
    found = verdict(device, *example(device, dtype, size, t, 130 if t > 1 else 300, bias=bias, mask=mask))
    assert found, found.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("t", [70, 1])
def test_keys_that_a_bias_leaves_out(device, dtype, t):
    """A score of -inf weighs nothing, also where a whole tile or piece has no other."""
    arrays, how, wanted = example(device, dtype, 64, t, 300, bias="given", mask="all")
    wanted["bias"][..., :200] = -np.inf
    assert how["bias"] is wanted["bias"]
    found = verdict(device, arrays, how, wanted)
    assert found, found.reason


@pytest.mark.parametrize("t", [1, 40])
def test_what_cannot_be_counted_stays_with_its_key(device, t):
    """Neither infinity nor NaN goes to columns of a head, or to keys, that are not there."""
    for size, column in ((72, 71), (64, 63), (7, 0)):
        arrays, how, wanted = example(device, "float32", size, t, 130, mask="all")
        arrays[2][:, 129, 0, column], arrays[2][0, 0, 1, 0] = np.inf, np.nan
        arrays[0][..., column], arrays[1][0, 5, 0, column] = -1, np.inf  # a score of -inf
        found = verdict(device, arrays, how, wanted)
        assert found, (size, found.reason)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_keys(device, dtype):
    found = verdict(device, *example(device, dtype, 64, 200, 1025, bias="table", mask="causal", batch=1, heads=1))
    assert found, found.reason


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["attention_scores", "masked_softmax", "attention_context", "attention"])
def test_conformance(device, monkeypatch, name, dtype):
    monkeypatch.setattr(drawing, "ROOM", 2**10)  # a thread costs a microsecond here
    monkeypatch.setattr(drawing, "TILES", (8, 16, 32))
    accelerator = Accelerator("kernels", dtypes=(dtype,))
    attention.register(accelerator, device)
    (checked,) = check_accelerator(accelerator, ops=[name], examples=5)
    assert [str(failure) for failure in checked.failures] == []
    assert checked.taken


@pytest.mark.parametrize(("dtype", "size", "t"), [("bfloat16", 64, 70), ("float32", 64, 70), ("float16", 64, 1)])
def test_a_row_does_not_depend_on_the_batch(device, dtype, size, t):
    arrays, how, _ = example(device, dtype, size, t, 150, mask="none")
    whole = attend(device, *arrays, **how)
    alone = attend(device, *(array[1:] for array in arrays), **how)
    assert whole[1:].tobytes() == alone.tobytes()


def test_the_beginning_of_a_cache_is_read_where_it_lies(device):
    (query, key, value), how, wanted = example(device, "bfloat16", 64, 70, 130)
    places = [np.full((2, 200, *key.shape[2:]), np.nan, key.dtype) for _ in range(2)]
    for place, array in zip(places, (key, value), strict=True):
        place[:, :130] = array
    _, (launch,) = plan(device, query, places[0][:, :130], places[1][:, :130], **how)
    assert launch.arguments[2].array.base is places[0]
    found = verdict(device, [query, places[0][:, :130], places[1][:, :130]], how, wanted)
    assert found, found.reason


@pytest.mark.parametrize(("dtype", "size", "t"), [("bfloat16", 64, 70), ("float32", 64, 40), ("float16", 64, 1)])
def test_queries_keys_and_values_are_read_where_they_lie_side_by_side(device, dtype, size, t):
    arrays, how, wanted = example(device, dtype, size, t, t, bias="table", mask="causal")
    together = np.stack(arrays, 2)
    parts = [together[:, :, i] for i in range(3)]
    _, (launch,) = plan(device, *parts, **how)
    assert [launch.arguments[i].array.base is together for i in (0, 2, 3)] == [True] * 3
    found = verdict(device, parts, how, wanted)
    assert found, found.reason


def test_nothing_is_copied_while_launches_are_recorded(device):
    (query, key, value), how, _ = example(device, "bfloat16", 64, 1, 40, mask="none", bias="none")
    plan(Recorder(device), query, key, value, **how)
    aside = np.empty(key.size + 1, key.dtype)[1:].reshape(key.shape)
    with pytest.raises(RecordingError, match="not read where it lies"):
        plan(Recorder(device), query, aside, value, **how)


def test_a_captured_step_is_played_again_with_more_keys(device):
    (query, key, value), _how, _ = example(device, "bfloat16", 64, 1, 400, mask="none", bias="none")
    lengths, positions = np.zeros(2, np.int32), np.zeros((2, 1), np.int32)
    slopes = alibi_slopes.reference(2)
    context, launches = plan(
        device, query, key, value, lengths=lengths, positions=positions, bias=Alibi(slopes.astype(np.float32)), scale=0.125
    )
    play = device.captured(launches)
    for length in (1, 127, 128, 129, 400):
        lengths[:] = length, max(length - 1, 1)
        positions[:, 0] = lengths - 1
        play()
        for row, count in enumerate(lengths):
            one = [query[row : row + 1], key[row : row + 1, :count], value[row : row + 1, :count]]
            mask, bias = np.ones((1, 1, 1, count), bool), alibi_bias.reference(slopes, positions[row : row + 1], count)
            found = judge(ops.attention, (*one, mask, bias), {"scale": 0.125}, context[row : row + 1])
            assert found, (length, found.reason)


PREFILL, PLAIN, DECODE, SOFTMAX = "attention_prefill.cu", "attention_plain.cu", "attention_decode.cu", "softmax.cu"

FAULTS = {
    "no barrier before a tile is read": (PREFILL, "        __syncthreads();  // this tile is there", "//"),
    "copies that nobody awaits": (PREFILL, "        await_copies();\n", ""),
    "a last tile of one key is not copied": (PREFILL, "if (from + KEYS < end)", "if (from + KEYS + 1 < end)"),
    "rows of another lane": (PREFILL, "lane / 8 % 2 * 8);", "lane / 16 % 2 * 8);"),
    "a peak of half the lanes": (PREFILL, "__shfl_xor_sync(ALL_LANES, largest, 2)", "__shfl_xor_sync(ALL_LANES, largest, 4)"),
    "earlier sums keep their peak": (PREFILL, "o[n][i] *= lowered[i / 2]", "o[n][i] *= 1.0f"),
    "a mask that lowers": (PREFILL, "number < s ? FORBIDDEN", "number < s ? score - 9.0f"),
    "keys behind the last one count": (PREFILL, "number < s ? FORBIDDEN : nothing()", "FORBIDDEN"),
    "a query that may not look at itself": (PREFILL, "(!causal || relative <= 0)", "(!causal || relative < 0)"),
    "no mean for a row without keys": (PREFILL, "first < real ? s", "first < real - 9999 ? s"),
    "a bucket begins one too late": (PREFILL, "firsts[i] <= distance", "firsts[i] < distance"),
    "the last tile is left out": (PLAIN, "from < end; from += KEYS", "from + KEYS <= end; from += KEYS"),
    "no barrier after a tile is read": (PLAIN, "        __syncthreads();  // nobody reads the tile", "//"),
    "weights where others read keys": (PLAIN, "        __syncthreads();  // nobody reads the keys", "//"),
    "no barrier between lanes": (PLAIN, "        __syncwarp();\n", ""),
    "the last piece is left out": (DECODE, "(count + PIECE - 1) / PIECE", "count / PIECE"),
    "the counter of blocks is not cleared": (DECODE, "if (threadIdx.x == 0) *arrived = 0;", ""),
    "a block that is counted before it has written": (
        DECODE,
        "    __syncthreads();\n    if (threadIdx.x == 0) {",
        "    if (threadIdx.x == 0) {",
    ),
    "no barrier before it is known who is last": (
        DECODE,
        "    }\n    __syncthreads();\n    if (before[0]",
        "    }\n    if (before[0]",
    ),
    "no barrier before warps are added": (DECODE, "    __syncthreads();\n    partial +=", "    partial +="),
    "a group too few": (DECODE, "by < WARP_SIZE; by *= 2", "by < WARP_SIZE / 2; by *= 2"),
    "a mask after the softmax": (SOFTMAX, "if (mask[i]) sum +=", "sum +="),
    "the peak of one lane": (SOFTMAX, "peak = warp_max(peak);", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(compiled, fault):
    file, right, wrong = FAULTS[fault]
    source = (DIRECTORY / file).read_text()
    source = source.replace('#include "attention.cuh"', (DIRECTORY / "attention.cuh").read_text().replace("#pragma once", ""))
    assert source.count(right) == 1, f"{right!r} is there {source.count(right)} times"
    device = Emulated(compiled, sources={file: source.replace(right, wrong)})
    try:
        if file == SOFTMAX:
            accelerator = Accelerator("faulty")
            attention.register(accelerator, device)
            rng = np.random.default_rng(3)
            given = rng.standard_normal((2, 3, 5, 70)).astype(np.float32), rng.random((2, 1, 5, 70)) < 0.5
            found = [judge(ops.masked_softmax, given, {}, accelerator.run(ops.masked_softmax, given, {}))]
        else:
            dtype, t, s = {PREFILL: ("float16", 65, 129), PLAIN: ("float32", 40, 70), DECODE: ("bfloat16", 1, 300)}[file]
            found = [
                verdict(device, *example(device, dtype, 64, t, s, bias="table", mask=mask, heads=1))
                for mask in ("given", "causal")
            ]
    except EmulationError:
        return
    assert not all(found)
