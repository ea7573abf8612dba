"""Norms with the residual sum before them, on a device that is this CPU: as by the ops one after the other, and planted faults.

The norms alone are held to their ops in test_cupy_linear.py.
"""

import numpy as np
import pytest
from emulated import DoesNotCompile, Emulated, EmulationError
from refmodels_cupy.norm import norm, residual_norm
from refmodels_cupy.source import DIRECTORY

from refmodels.numerics import judge
from refmodels.ops.elementwise import add
from refmodels.ops.norm import layer_norm, rms_norm
from refmodels.ops.precision import numpy_dtype


def rows(seed, *shape, dtype="float32"):
    return (np.random.default_rng(seed).standard_normal(shape) * 2).astype(numpy_dtype(dtype))


def leaves(kind, n, dtype="float32"):
    if kind == "rms_norm":
        return {"weight": rows(3, n, dtype=dtype)}
    return {"gamma": rows(3, n, dtype=dtype), "beta": rows(4, n, dtype=dtype)}


def is_right(device, kind, n, *, count=3, stream="float32", sums="float32", dtype="float32", bias=True, far=0.0):
    """Whether total is the rounded sum bit for bit, and y its norm within the bound of the op."""
    x, delta, p = (
        rows(1, count, n, dtype=stream) + numpy_dtype(stream).type(far),
        rows(2, count, n, dtype=sums),
        leaves(kind, n),
    )
    added = rows(5, n, dtype="bfloat16") if bias else None
    total, y = device.empty(x.shape, x.dtype), device.empty(x.shape, numpy_dtype(dtype))
    try:
        residual_norm(device, x, delta, total, p, y, epsilon=1e-6, bias=added)
    except DoesNotCompile:
        raise
    except EmulationError:
        return False
    inner = delta.astype(np.float32) if added is None else delta.astype(np.float32) + added.astype(np.float32)
    if total.tobytes() != add.reference(x.astype(np.float32), inner).astype(x.dtype).tobytes():
        return False
    given = {"dtype": dtype} if kind == "rms_norm" else {}
    return bool(judge(layer_norm if kind == "layer_norm" else rms_norm, (total,), {**p, "epsilon": 1e-6, **given}, y))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("n", [1, 7, 64, 300, 2048, 2056, 4100])
def test_a_residual_sum_and_its_norm(compiled, kind, n):
    device = Emulated(compiled)
    for stream in ("float32", "bfloat16", "float16"):
        for sums in ("float32", stream):
            for bias in (True, False):
                assert is_right(device, kind, n, stream=stream, sums=sums, dtype=stream, bias=bias)


def test_a_wide_stream_gives_narrow_activations(compiled):
    assert is_right(Emulated(compiled), "rms_norm", 520, stream="float32", sums="float16", dtype="float16", bias=False)


@pytest.mark.parametrize("offset", [1, 4])
def test_rows_at_any_address_have_the_same_bits(compiled, offset):
    """Read one by one where 16 bytes at once cannot be, and added up in the same order."""
    device, n, p = Emulated(compiled), 1024, leaves("layer_norm", 1024)
    x = rows(1, 3, n)
    memory = np.zeros(x.size + offset, np.float32)
    moved = memory[offset:].reshape(x.shape)
    moved[...] = x
    there, elsewhere, alone = (device.empty(x.shape, np.float32) for _ in range(3))
    norm(device, x, p, there, epsilon=1e-5)
    norm(device, moved, p, elsewhere, epsilon=1e-5)
    for i in range(3):
        norm(device, x[i : i + 1], p, alone[i : i + 1], epsilon=1e-5)
    assert there.tobytes() == elsewhere.tobytes() == alone.tobytes()


def test_the_sum_may_take_the_place_of_the_stream(compiled):
    device, x, delta = Emulated(compiled), rows(1, 2, 96), rows(2, 2, 96)
    total, y = x.copy(), device.empty(x.shape, np.float32)
    residual_norm(device, total, delta, total, leaves("rms_norm", 96), y, epsilon=1e-6)
    assert total.tobytes() == (x + delta).tobytes()
    assert judge(rms_norm, (total, *leaves("rms_norm", 96).values()), {"epsilon": 1e-6}, y)


FAULTS = {
    "no bias": ("added[e] += more[e]", "added[e] += 0.0f", {}),
    "a sum that is not rounded": ("rounded(x_type, values[e] + added[e])", "values[e] + added[e]",
        {"kind": "rms_norm", "stream": "bfloat16"}),
    "the stream's norm": ("        store_eight(row + i, values);", "        if (!delta) store_eight(row + i, values);", {}),
    "another row's sums": ("delta_type, begin + i", "delta_type, i", {}),
    "the first 2048 values": ("for (int i = 8 * threadIdx.x; i < n; i += 8 * THREADS)\n        for",
        "for (int i = 8 * threadIdx.x; i < min(n, 2048); i += 8 * THREADS)\n        for", {"n": 4096}),
    "what lies behind the row": ("e < min(8, n - i); ++e) squares", "e < 8; ++e) squares", {"n": 301, "far": 100.0}),
    "squares without the mean": ("(row[i + e] - mean) * (row[i + e] - mean)", "row[i + e] * row[i + e]", {"far": 3.0}),
    "no mean": ("(values[e] - mean) * scale", "values[e] * scale", {"far": 3.0}),
    "no epsilon": ("/ n + epsilon", "/ n + 1.0f", {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(compiled, fault):
    right, wrong, example = FAULTS[fault]
    example = {"kind": "layer_norm", "n": 304, **example}
    source = (DIRECTORY / "norm.cu").read_text()
    assert source.count(right) == 1
    assert is_right(Emulated(compiled), **example)
    assert not is_right(Emulated(compiled, sources={"norm.cu": source.replace(right, wrong)}), **example)
