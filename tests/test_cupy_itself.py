"""CuPy itself, where it can be imported: it has all that is used here, and compiles a kernel."""

import ast
import importlib.util
from pathlib import Path

import pytest
from refmodels_cupy import compiler
from refmodels_cupy.accelerator import FAMILIES
from refmodels_cupy.device import OUT_OF_MEMORY
from refmodels_cupy.source import all_forms
from stand_in import StandIn

from refmodels.accelerator import CompileError

PACKAGE = Path(__file__).parent.parent / "accel" / "refmodels_cupy"

cupy_itself = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="CuPy cannot be imported here: its signatures are not looked at"
)


def names_asked_of(variable):
    """`xp.zeros` -> zeros, of all modules of the package."""
    attributes = (
        node
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    )
    return {
        node.attr for node in attributes if variable in (getattr(node.value, "id", None), getattr(node.value, "attr", None))
    }


def test_names_are_found():
    assert {"zeros", "empty", "cuda"} <= names_asked_of("xp")


@cupy_itself
@pytest.mark.parametrize("name", sorted(names_asked_of("xp")))
def test_cupy_has_each_array_function(name):
    import cupy

    assert hasattr(cupy, name)


@cupy_itself
def test_cupy_has_what_the_gpu_uses():
    import inspect

    import cupy

    cuda = cupy.cuda
    stand_in = StandIn().module.cuda
    for owner in ("driver", "runtime", "nvrtc"):
        for name in vars(getattr(stand_in, owner)):
            assert hasattr(getattr(cuda, owner), name), f"cupy.cuda.{owner}.{name}"
    for owner, names in {
        "Device": "compute_capability attributes cublas_handle __enter__",
        "Stream": "begin_capture end_capture synchronize __enter__",
        "Event": "record synchronize",
        "MemoryPool": "malloc free_bytes free_all_blocks total_bytes",
        "Module": "load get_function",
        "Graph": "launch upload",
        "MemoryPointer": "ptr copy_from_host_async __add__",
        "Function": "__call__",
    }.items():
        for name in names.split():
            assert hasattr(getattr(cuda, owner), name), f"cupy.cuda.{owner}.{name}"
    for owner in ("runtime", "driver"):
        for name, value in vars(getattr(stand_in, owner)).items():
            assert not isinstance(value, int) or value == getattr(getattr(cuda, owner), name), name
    assert "non_blocking" in inspect.signature(cuda.Stream.__init__).parameters
    assert "disable_timing" in inspect.signature(cuda.Event.__init__).parameters
    assert "mode" in inspect.signature(cuda.Stream.begin_capture).parameters
    assert "stream" in inspect.signature(cupy.asnumpy).parameters
    assert "kind" in inspect.signature(cupy.argsort).parameters
    errors = {cuda.memory.OutOfMemoryError, cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError}
    assert {error.__name__ for error in errors} | {"CUBLASError"} == {name for name, _ in OUT_OF_MEMORY}
    assert int(cupy.cuda.Device(3)) == 3


@cupy_itself
def test_cupy_has_the_products_that_the_gpu_uses():
    import cupy

    try:
        cublas = cupy.cuda.cublas
    except ImportError:
        pytest.skip("cuBLAS cannot be found here")
    for name, value in vars(StandIn().cublas()).items():
        assert getattr(cublas, name) == value or callable(value), name
    assert cublas.CUBLASError.__name__ in dict(OUT_OF_MEMORY)


@cupy_itself
def test_cupy_compiles_a_kernel(monkeypatch, tmp_path):
    import cupy

    try:
        cupy.cuda.nvrtc.getVersion()
    except RuntimeError:
        pytest.skip("NVRTC cannot be found here")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    form = all_forms(FAMILIES)["norm.cu"][0]
    binary, symbol = compiler.kept(cupy.cuda.nvrtc, "norm.cu", form, 90)
    assert binary.startswith(b"\x7fELF")
    assert "norm" in symbol
    assert compiler.kept(cupy.cuda.nvrtc, "norm.cu", form, 90) == (binary, symbol)
    with pytest.raises(CompileError, match="nothing"):
        compiler.compiled(cupy.cuda.nvrtc, "norm.cu", "nothing<int>", "sm_90")
