"""The choice of tokens by the CuPy accelerator, on a device that is this CPU: the reference's tokens, and planted faults."""

import numpy as np
import pytest
from emulated import DoesNotCompile, Emulated, EmulationError
from refmodels_cupy import sampling
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.source import DIRECTORY

from refmodels import use
from refmodels.conformance import check_accelerator
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.sampling import greedy_token, sample_token

FLOATS = ("float32", "float16", "bfloat16")
VOCABULARIES = (1, 2, 255, 257, 2048, 2049, 5000)
"""About the sizes of a histogram's share and of a part."""


@pytest.fixture
def cupy(compiled):
    return Cupy(Emulated(compiled))


@pytest.mark.parametrize("name", ["greedy_token", "sample_token"])
def test_conformance(cupy, name):
    [checked] = check_accelerator(cupy, ops=[name], examples=4)
    assert [str(failure) for failure in checked.failures] == []
    assert checked.taken == checked.examples > 0
    assert not cupy.crossings


def test_more_rows_than_a_grid_has_are_declined(cupy):
    logits = np.zeros((65536, 2), np.float32)
    assert cupy.reasons(greedy_token, (logits,), {}) == cupy.reasons(sample_token, (logits, logits[:, 0]), {}) == ["65536 rows"]


# -- the reference's tokens ---------------------------------------------------------------------------------------------------


def scores(generator, b, v, dtype):
    """Rows of many kinds: with ties, with tokens that are forbidden, with one left, all equal, with zeros of both signs."""
    x = generator.standard_normal((b, v)) * generator.choice([0.01, 1.0, 3.0, 100.0], (b, 1))
    kinds = generator.integers(6, size=b)
    x[kinds == 1] = np.round(x[kinds == 1])
    x[kinds == 2] = np.where((generator.random((b, v)) < 0.4) & (np.arange(v) > 0), -np.inf, x)[kinds == 2]
    x[kinds == 3] = np.where(np.arange(v) == v // 2, 1.0, -np.inf)
    x[kinds == 4] = generator.choice([0.0, -0.0, 7.5])
    x[kinds == 5] = np.where(generator.random((b, v)) < 0.5, -0.0, np.minimum(x, 0))[kinds == 5]
    return x.astype(numpy_dtype(dtype))


def settings(generator, b):
    """Some of the settings of `sample_token`, other ones for each row."""
    values = {
        "temperature": generator.choice([1e-30, 0.01, 0.7, 1.0, 5.0, 1e6], b),
        "top_k": generator.choice([1, 2, 3, 50, 300, 10**9], b),
        "top_p": generator.choice([0.0, 0.3, 0.77, 0.99, 1.0, np.inf], b),
        "min_p": generator.choice([0.0, 0.001, 0.2, 0.5, 1.0], b),
    }
    return {name: value for name, value in values.items() if generator.random() < 0.6}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_tokens_are_the_references(cupy, v, dtype):
    generator = np.random.default_rng(v)
    for _ in range(8):
        logits, given = scores(generator, 5, v, dtype), settings(generator, 5)
        uniform = np.where(generator.random(5) < 0.2, 0.0, generator.random(5))
        with use(cupy):
            assert sample_token(logits, uniform, **given).tolist() == sample_token.reference(logits, uniform, **given).tolist()
            assert greedy_token(logits).tolist() == greedy_token.reference(logits).tolist()


@pytest.mark.parametrize("v", [50_272, 250_880])
def test_large_vocabularies(compiled, v):
    cupy, generator = Cupy(Emulated(compiled, orders=(2,))), np.random.default_rng(v)
    for spread, given in ((3, {}), (0.01, {}), (2, {"top_k": [1000], "top_p": [0.8], "min_p": [0.01]}), (1, {"top_p": [0.9]})):
        logits, uniform = (generator.standard_normal((1, v)) * spread).astype(np.float32), generator.random(1)
        given = {name: np.array(value) for name, value in given.items()}
        with use(cupy):
            assert sample_token(logits, uniform, **given) == sample_token.reference(logits, uniform, **given)
            assert greedy_token(logits) == greedy_token.reference(logits)


def test_points_between_equal_tokens(cupy):
    """A token begins where the one before it ends, and that point is its own."""
    v = 4096
    logits, uniform = np.zeros((64, v), np.float32), np.arange(64) / 64
    with use(cupy):
        assert sample_token(logits, uniform).tolist() == (uniform * v).tolist()
        kept = sample_token(logits, np.full(64, 1 - 2.0**-53), top_p=uniform)
    assert kept.tolist() == (uniform * v).tolist()  # the last of those before which there is no more than that


def test_a_row_has_the_same_token_in_every_batch(cupy):
    generator = np.random.default_rng(1)
    logits, uniform, given = scores(generator, 6, 3000, "float32"), generator.random(6), {"top_p": np.full(6, 0.9)}
    with use(cupy):
        together = sample_token(logits, uniform, **given)
        alone = [sample_token(logits[i : i + 1], uniform[i : i + 1], top_p=given["top_p"][:1])[0] for i in range(6)]
    assert together.tolist() == alone


def test_not_a_number(cupy):
    """Highest for `greedy_token`, as NumPy's; never drawn."""
    logits = np.array([[1, np.nan, 3, np.nan], [2, 0, 1, 5]], np.float32)
    with use(cupy):
        assert greedy_token(logits).tolist() == [1, 3]
        assert sample_token(logits, np.array([0.999, 0.0])).tolist() == [0, 3]


def test_a_row_is_given_its_best_token_where_no_other_weighs_anything(cupy):
    """Temperature 0, infinities, and a row in which every token is forbidden: its first."""
    logits = np.array([[1, 3, 3], [-np.inf, np.inf, np.inf], [-np.inf] * 3], np.float32)
    with use(cupy):
        assert sample_token(logits, np.full(3, 0.9), temperature=np.zeros(3)).tolist() == [1, 1, 0]
        assert sample_token(logits[1:], np.full(2, 0.9)).tolist() == [1, 0]


def test_the_launches_of_a_step_serve_all_steps(compiled):
    """What is recorded once draws anew each time, by the counter on the device, out of memory that is not cleared between."""
    device, generator, b, v = Emulated(compiled), np.random.default_rng(5), 3, 2500
    logits, uniform = generator.standard_normal((b, v)).astype(numpy_dtype("bfloat16")), generator.random((4, b))
    temperature, top_k, top_p, min_p = np.array([0.0, 0.7, 2.0]), np.array([9, 40, 10**6]), np.full(b, 0.9), np.full(b, 0.01)
    step, tokens, memory = np.zeros(1, np.int32), np.zeros(b, np.int64), sampling.scratch(device, b, v)
    recorded = []
    recorder = Emulated(compiled)
    recorder.launch = recorded.append
    sampling.sample(recorder, logits, uniform, step, temperature, top_k, top_p, min_p, tokens, memory)
    play, found, wanted = device.captured(recorded), [], []
    for step[0] in range(4):
        play()
        found.append(tokens.tolist())
        divisor = np.where(temperature == 0, 1e-30, temperature)
        given = {"temperature": divisor, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        wanted.append(sample_token.reference(logits, uniform[step[0]], **given).tolist())
    assert found == wanted
    assert len({row[2] for row in found}) > 1


# -- planted faults -----------------------------------------------------------------------------------------------------------


def drawn(v, dtype="float32", *, b=6, spread=1.0, rounded=False, **given):
    """An example for the draw: scores, points, settings."""
    generator = np.random.default_rng(v)
    logits = generator.standard_normal((b, v)) * spread
    logits = (np.round(logits) if rounded else logits).astype(numpy_dtype(dtype))
    return logits, generator.random(b), {name: np.full(b, value) for name, value in given.items()}


def equal_tokens(v=4096):
    return np.zeros((8, v), np.float32), np.arange(8) / 8, {}


def signed_zeros():
    return np.array([[-0.0, 0.0, -1.0]], np.float32), np.array([0.1]), {}


FAULTS = {
    "the higher id first": ("<< id_bits | uint64_t(id)", "<< id_bits | (((uint64_t(1) << id_bits) - 1) ^ uint64_t(id))",
        drawn(300, rounded=True)),
    "-0 behind 0": ("x == 0.0f ? 0u : ", "", signed_zeros()),
    "negative scores the wrong way": ("bits >> 31 ? bits : bits ^", "bits >> 31 ? ~bits : bits ^", drawn(300)),
    "half precision's last bits": ("SCORE_BITS<f16> = 19", "SCORE_BITS<f16> = 16", drawn(3000, "float16")),
    "the next bin": ("threadIdx.x * EACH + i), search.goal - before", "threadIdx.x * EACH + i + 1), search.goal - before",
        drawn(300)),
    "the goal of the whole search": ("search.goal - before, search.last", "search.goal, search.last", drawn(300)),
    "points that belong to the token before": ("before <= search.goal && search.goal < before + mine[i]",
        "before < search.goal && search.goal <= before + mine[i]", equal_tokens()),
    "one more than top_k": ("double(count - 1)", "double(count)", drawn(300, spread=0.01, top_k=1)),
    "the share of one row": ("uniform[int64_t(step ? *step : 0) * gridDim.y + row]", "uniform[0]", drawn(300)),
    "one row's top_p": ("top_p[row]", "top_p[0]", (*drawn(300)[:2], {"top_p": np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])})),
    "no min_p": ("least = choice == DRAW && min_p ?", "least = false ?", drawn(300, min_p=0.7)),
    "min_p before top_p": ("least = choice == DRAW && min_p ?", "least = min_p ?", drawn(300, top_p=0.5, min_p=0.4)),
    "no temperature": (" / divisor", "", drawn(300, temperature=0.3)),
    "what is not kept": ("place > now.last || ", "", drawn(300, top_k=3)),
    "the first choice alone": ("now = {0, 0, now.found}", "now = {0, 0, turn == levels ? now.found : now.last}",
        drawn(300, spread=0.01, top_k=200, top_p=0.1)),
    "digits of another token": ("place >> (DIGIT * (levels - level)) != now.found", "false", drawn(300)),
    "the sums of the launch before": ("if (blockIdx.x == 0) scratch.sums[(turn + 1) % 3][i] = 0;", "", drawn(300)),
    "the first sums": ("scratch.sums[0][i] = 0", "scratch.sums[1][i] = 0", drawn(300)),
    "no carry": (" + (before + lower < before ? 1u : 0u)", "", drawn(50_272, b=1, spread=0.5)),
    "sums of 32 bits": ("uint64_t(high[i]) << 32 | low[i]", "uint64_t(low[i])", drawn(300)),
    "the last token": ("if (id >= v) continue;", "if (id >= v - 1) continue;", drawn(2, spread=0.1)),
    "one part": ("blockIdx.x * PART + t * THREADS + threadIdx.x;\n        if (id >= v)",
        "t * THREADS + threadIdx.x;\n        if (id >= v)", drawn(5000, spread=0.1)),
    "the best of the first part": ("i < parts_of(v); i", "i < 1; i", drawn(5000, spread=100.0)),
    "the best of the first warp": ("i < WARPS; ++i) x = min", "i < 1; ++i) x = min", drawn(5000, spread=100.0)),
    "a lane that counts itself twice": ("lane >= by", "lane >= by - 1", drawn(300)),
    "warps that are not added up": ("if (i < warp) before += partial[i];", "", drawn(300)),
    "no barrier between the warps' sums": ("partial[warp] = through;\n    __syncthreads();", "partial[warp] = through;",
        drawn(300)),
    "no barrier before the digit": ("__syncthreads();\n    search = next[0];", "search = next[0];", drawn(300)),
    "no barrier between the warps' best": ("] = x;\n    __syncthreads();", "] = x;", drawn(5000, spread=3.0)),
    "no barrier behind the sums": ("    __syncthreads();\n    for (int i = threadIdx.x; i < BINS; i += THREADS)\n        if",
        "    for (int i = threadIdx.x; i < BINS; i += THREADS)\n        if", drawn(300)),
    "additions that lose one another": ("before = atomicAdd(low, lower);", "before = *low; *low = lower;", drawn(300)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(compiled, fault):
    right, wrong, example = FAULTS[fault]
    source = (DIRECTORY / "sampling.cu").read_text()
    assert source.count(right) == 1
    assert chooses_right(compiled, {}, *example)
    assert not chooses_right(compiled, {"sampling.cu": source.replace(right, wrong)}, *example)


def chooses_right(compiled, sources, logits, uniform, given):
    """Whether a device with these sources draws the reference's tokens, whatever its memory holds at first."""
    device, memory = Emulated(compiled, sources=sources), sampling.scratch(Emulated(compiled), *logits.shape)
    memory[...] = np.random.default_rng(0).integers(2**50, size=memory.shape)
    tokens = np.zeros(len(logits), np.int64)
    filters = [given.get(name) for name in ("temperature", "top_k", "top_p", "min_p")]
    try:
        sampling.sample(device, logits, uniform, None, *filters, tokens, memory)
    except DoesNotCompile:
        raise
    except EmulationError:
        return False
    return tokens.tolist() == sample_token.reference(logits, uniform, **given).tolist()
