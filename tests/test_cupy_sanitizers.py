"""Every kernel under AddressSanitizer and UBSan: nothing beside its arrays or its shared memory is read or written."""

import re

import numpy as np
import pytest
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.attention import attend, relative_table
from refmodels_cupy.device import Launch
from refmodels_cupy.linear import Products
from refmodels_cupy.source import DIRECTORY, kernels
from sanitized import Keeping, run, written_down

from refmodels import BloomCausalLM, OPTCausalLM, T5Seq2SeqLM
from refmodels.conformance import check_accelerator, drawing
from refmodels.op import OPS
from refmodels.ops.precision import numpy_dtype

MODELS = [
    (OPTCausalLM, "opt_tiny_stdlib", "bfloat16", None),
    (BloomCausalLM, "bloom_tiny_stdlib", "float32", "int8"),
    (T5Seq2SeqLM, "t5_tiny_numbers", "float16", None),
]


@pytest.fixture
def kept(compiled, monkeypatch):
    """Launches of every kernel: of all ops, of the models, of attention in other head sizes, and behind large products."""
    monkeypatch.setattr(drawing, "ROOM", 2**9)
    device = Keeping(compiled)
    cupy = Cupy(device)
    ops = [name for name, op in OPS.items() if not op.composite]
    assert not any(checked.failures for checked in check_accelerator(cupy, ops=ops, examples=1))
    for cls, preset, dtype, mode in MODELS:
        model = cls.from_preset(preset, dtype=dtype, accelerator=cupy)
        if mode:
            model.quantize(mode)
        model.generate("spell: 42", max_new_tokens=4)
    for dtype, size in (("bfloat16", 128), ("float16", 80)):
        query, key, value = (np.ones((1, count, 1, size), numpy_dtype(dtype)) for count in (33, 97, 97))
        table = relative_table(device, np.ones((32, 1), np.float32), bidirectional=True)
        attend(device, query, key, value, bias=table, positions=np.arange(64, 97, dtype=np.int32)[None], causal=True)
    for dtype in ("float32", "int32"):  # the products that these are for have many rows
        Products(device).finish(np.ones((3, 2100), dtype), np.zeros((3, 2100), np.float16), bias=np.ones(2100, np.float32))
    return [launch for forms in device.kept.values() for launch in forms.values()]


def test_no_kernel_leaves_its_memory(compiled, kept, tmp_path):
    launched = {launch.form.partition("<")[0] for launch in kept}
    assert launched == {name for path in DIRECTORY.glob("*.cu") for name in kernels(path.read_text())}
    done = run(kept, compiled, tmp_path)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-4000:]
    assert done.stdout.split("\n")[:-1] == [launch.form for launch in kept]


# -- planted faults -----------------------------------------------------------------------------------------------------------

PLANTED = """#include "device.cuh"
template <class T>
__global__ void planted(const T* x, T* y, int n) {
    SHARED(float, kept, [32]);
    DYNAMIC_SHARED(float, dynamic);
    int i = threadIdx.x;
    kept[i] = i < n ? x[i] : 0.0f;
    dynamic[i] = float(n * 4);
    __syncthreads();
    if (i < n) y[i] = kept[31 - i] + dynamic[i];
}
"""

FAULTS = {
    "a read behind an array": ("x[i] :", "x[i + 1] :", "heap-buffer-overflow.*READ of size 4"),
    "a read before an array": ("x[i] :", "x[i - 1] :", "heap-buffer-overflow.*READ of size 4"),
    "a write behind an array": ("if (i < n)", "if (i <= n)", "heap-buffer-overflow.*WRITE of size 4"),
    "a write behind shared memory": ("kept[i] =", "kept[i + 1] =", "index 32 out of bounds"),
    "a write behind dynamic shared memory": ("dynamic[i] =", "dynamic[i + 1] =", "heap-buffer-overflow.*WRITE of size 4"),
    "shared memory read before it is written": ("kept[i] =", "if (i < 31) kept[i] =", "what shared memory held before"),
    "an overflow": ("n * 4", "n * 0x20000000", "signed integer overflow"),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_seen(compiled, tmp_path, fault):
    right, wrong, said = FAULTS[fault] if fault else ("", "", "")
    assert PLANTED.count(right) == 1 or not fault
    arguments = np.ones(31, np.float32), np.zeros(31, np.float32), np.int32(31)
    launch = written_down(Launch("planted.cu", "planted<float>", (1, 1, 1), (32, 1, 1), arguments, 4 * 32))
    done = run([launch], compiled, tmp_path, sources={"planted.cu": PLANTED.replace(right, wrong)})
    assert (done.returncode == 0) == (fault is None), done.stderr[-2000:]
    assert re.search(said, done.stderr, re.DOTALL), done.stderr[-2000:]
