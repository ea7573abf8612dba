"""The GPU of the CuPy accelerator without one: every call that `Gpu` makes, on a stand-in for CuPy; what is missing where it
cannot run; weights on their way to it. Where CuPy itself can be imported, that it has all that is used here."""

import ast
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import weakref
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from apart import EmulatedApart, MixedError
from emulated import Emulated
from packing import Packing
from refmodels_cupy import compiler, installation
from refmodels_cupy.accelerator import FAMILIES, Cupy
from refmodels_cupy.device import Gpu, Launch, Staging, Strided
from refmodels_cupy.source import DIRECTORY, all_forms
from stand_in import StandIn

from refmodels import OPTCausalLM, T5Seq2SeqLM, accelerator, use
from refmodels.accelerator import AcceleratorError, CompileError, Room, find
from refmodels.backbone import Backbone
from refmodels.cli import fastest_accelerator
from refmodels.ops.elementwise import relu
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import Unread, flatten, stored_bytes
from refmodels.samplers import TopPSampler

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "accel" / "refmodels_cupy"
NORM = "rms_norm<float, float, float>"


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """In the place of CuPy, with nothing compiled yet."""
    found = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", found.module)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_functions", {})
    return found


@pytest.fixture
def gpu(stand_in):
    return Gpu(1)


def rms_norm(gpu, rows=3, **changes):
    x, weight = (gpu.to_device(np.ones(shape, np.float32)) for shape in ((rows, 8), (8,)))
    y = gpu.empty((rows, 8), np.float32)
    arguments = (x, weight, y, np.int32(8), np.float32(1e-6))
    return Launch("norm.cu", NORM, (rows, 1, 1), (256, 1, 1), arguments)._replace(**changes)


# -- arrays -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4), (Staging.LEAST,), (5, Staging.PIECE // 4 + 1)])
def test_arrays_go_and_come_back(gpu, dtype, shape):
    array = np.random.default_rng(1).integers(0, 2, shape).astype(numpy_dtype(dtype))
    wanted = np.array(array)
    held = gpu.to_device(array)
    array[...] = 1 - array  # it is the caller's again
    back = gpu.to_host(held)
    assert type(back) is np.ndarray
    assert back.dtype == wanted.dtype
    assert back.shape == shape
    assert back.tobytes() == wanted.tobytes()


def test_an_array_that_is_not_contiguous(gpu):
    array = np.arange(2 * Staging.LEAST, dtype=np.float32).reshape(2, -1)[:, ::2]
    assert (gpu.to_host(gpu.to_device(array)) == array).all()


def test_uploads_from_several_threads(gpu):
    arrays = [np.full(3 * Staging.PIECE // 2, i, np.int8) for i in range(3)]
    held = [None] * 3

    def upload(i):
        held[i] = gpu.to_device(arrays[i])

    together = [threading.Thread(target=upload, args=(i,)) for i in range(3)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert [np.unique(gpu.to_host(each)).tolist() for each in held] == [[0], [1], [2]]


def test_threads_that_begin_together_have_one_stream(stand_in, gpu, monkeypatch):
    made, together, found = stand_in.module.cuda.Stream, threading.Barrier(2), []

    def slowly(**how):
        with suppress(threading.BrokenBarrierError):  # Python 3.11 lets one in at a time
            together.wait(0.2)
        return made(**how)

    monkeypatch.setattr(stand_in.module.cuda, "Stream", slowly)
    threads = [threading.Thread(target=lambda: found.append(gpu._stream)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [gpu._stream] * 2


def test_working_is_entered_once(stand_in, gpu):
    with gpu.working():
        [stream] = stand_in.streams
        for _ in range(3):
            with gpu.working():
                gpu.empty((2,), np.float32)
        assert stream.entered == 1
        assert (stand_in.device, stand_in.stream) == (1, stream)
        with Gpu(0).working():
            assert (stand_in.device, stand_in.stream) == (0, stand_in.streams[1])
            with gpu.working():
                assert (stand_in.device, stand_in.stream) == (1, stream)
            assert stand_in.device == 0
        with gpu.working():
            assert (stand_in.device, stand_in.stream) == (1, stream)
        assert stream.entered == 2
    assert (stand_in.device, stand_in.stream, stand_in.allocator) == (0, None, None)


def test_working_ends_with_an_error(stand_in, gpu):
    with pytest.raises(KeyError), gpu.working():
        raise KeyError
    assert (stand_in.device, stand_in.stream, stand_in.allocator) == (0, None, None)
    gpu.empty((2,), np.float32)


def test_memory_that_does_not_suffice(stand_in, gpu):
    stand_in.memory = 10**6
    gpu.empty((10**5,), np.float32)
    with pytest.raises(AcceleratorError) as caught:
        gpu.empty((10**6,), np.float32)
    assert str(caught.value) == (
        "NVIDIA Stand-in has 600.0 kB of 1.0 MB free, which do not suffice: Out of memory allocating 4,000,000 bytes; fewer "
        "rows at once, shorter texts and weights of fewer bytes need less"
    )
    gpu.empty((10**5,), np.float32)
    stand_in.kept = 7
    assert gpu.room() == (200_007, 1_000_000)


def test_what_the_device_is(gpu):
    assert (gpu.name, gpu.multiprocessors) == ("NVIDIA Stand-in", 132)


# -- products -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8"])
def test_products(gpu, dtype, transposed):
    if dtype == "int8" and not transposed:
        pytest.skip("weights have one output after the other")
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-9, 9, shape).astype(numpy_dtype(dtype)) for shape in ((3, 8), (12, 8) if transposed else (8, 12)))
    wide = {"float64": np.float64, "int8": np.int32}.get(dtype, np.float32)
    c = gpu.to_host(gpu.product(gpu.to_device(a), gpu.to_device(b), transposed=transposed))
    assert c.dtype == wide
    assert (c == a.astype(wide) @ (b.T if transposed else b).astype(wide)).all()


def test_sums_are_not_added_up_in_half_precision(gpu, stand_in):
    """cuBLAS is told so for each product, and CuPy's own find its handle as they left it."""
    a = gpu.to_device(np.ones((4, 4), np.float16))
    gpu.product(a, a, out=gpu.empty((4, 4), np.float16))
    assert set(stand_in.math_modes.values()) == {0}


@pytest.mark.parametrize("n", [1, 6, 7])
def test_int8_weights_of_any_number_of_outputs(gpu, n):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-127, 127, shape).astype(np.int8) for shape in ((5, 16), (n, 16)))
    c = gpu.product(gpu.to_device(a), gpu.to_device(b), transposed=True)
    assert c.flags.c_contiguous
    assert (gpu.to_host(c) == a.astype(np.int32) @ b.astype(np.int32).T).all()


def test_a_product_of_parts_and_one_of_nothing(gpu):
    a, b = gpu.to_device(np.arange(48.0).reshape(6, 8)), gpu.to_device(np.arange(40.0).reshape(5, 8))
    assert (gpu.to_host(gpu.product(a[::2, ::2], b[:, 4:].T)) == a[::2, ::2] @ b[:, 4:].T).all()
    assert (gpu.to_host(gpu.product(a[:, :0], b[:, :0], transposed=True)) == np.zeros((6, 5))).all()
    assert gpu.product(a[:0], b, transposed=True).shape == (0, 5)


def test_float32_is_rounded_if_that_was_asked_for(stand_in):
    a = np.ones((4, 4), np.float32)
    for tf32, wanted in ((False, 68), (True, 77)):
        gpu = Gpu(tf32=tf32)
        gpu.product(gpu.to_device(a), gpu.to_device(a))
        gpu.product(gpu.to_device(a.astype(np.float16)), gpu.to_device(a.astype(np.float16)))
        assert stand_in.products[-2:] == [wanted, 68]


# -- kernels ------------------------------------------------------------------------------------------------------------------


def test_a_launch(stand_in, gpu):
    launch = rms_norm(gpu, shared=100_000)
    strided = Strided(launch.arguments[0][:, ::2])
    launch = launch._replace(arguments=(strided, None, *launch.arguments[2:]))
    gpu.launch(launch)
    gpu.launch(launch)
    assert stand_in.launched == []
    gpu.to_host(launch.arguments[2])
    [(symbol, grid, block, arguments, shared), again] = stand_in.launched
    assert (symbol, grid, block, shared) == (f"_Z{NORM}", (3, 1, 1), (256, 1, 1), 100_000)
    assert arguments[0] is strided.array
    assert arguments[1] is None
    assert again[0] == symbol
    assert len(stand_in.compiled) == 1


def test_how_a_kernel_is_compiled(stand_in, gpu):
    gpu.launch(rms_norm(gpu))
    [(file, form, options)] = stand_in.compiled
    assert (file, form) == ("norm.cu", NORM)
    assert {"--std=c++17", "--gpu-architecture=sm_90", f"-I{DIRECTORY}"} <= set(options)
    assert not any("ftz" in option or "fast" in option for option in options)


def test_kernels_are_shared_and_kept(stand_in, monkeypatch, tmp_path):
    first, second = Gpu(0), Gpu(0)
    for gpu in (first, second, Gpu(1)):
        gpu.launch(rms_norm(gpu))
    assert len(stand_in.compiled) == 1
    assert {index for index, _, _ in compiler._functions} == {0, 1}
    [path] = tmp_path.iterdir()
    monkeypatch.setattr(compiler, "_functions", {})  # another process
    third = Gpu(0)
    third.launch(rms_norm(third))
    assert len(stand_in.compiled) == 1
    monkeypatch.setattr(compiler, "_functions", {})
    path.write_bytes(path.read_bytes()[:-1])  # damaged
    fourth = Gpu(0)
    fourth.launch(rms_norm(fourth))
    assert len(stand_in.compiled) == 2


def test_each_form_is_kept(stand_in, monkeypatch, gpu):
    forms = [NORM, NORM.replace("float", "bf16")]
    for _ in range(2):
        for form in forms:
            launch = rms_norm(gpu, form=form)
            gpu.launch(launch)
            gpu.to_host(launch.arguments[2])
        monkeypatch.setattr(compiler, "_functions", {})
        gpu._functions.clear()
    assert [launched[0] for launched in stand_in.launched] == 2 * [f"_Z{form}" for form in forms]
    assert len(stand_in.compiled) == 2


def test_a_changed_header_is_seen(stand_in, monkeypatch, gpu):
    gpu.launch(rms_norm(gpu))
    monkeypatch.setattr(compiler, "_functions", {})
    monkeypatch.setattr(compiler, "_sources", lambda file: "changed")
    other = Gpu(1)
    other.launch(rms_norm(other))
    assert len(stand_in.compiled) == 2


def test_where_nothing_can_be_kept(stand_in, monkeypatch, tmp_path, gpu):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "inside"))
    gpu.launch(rms_norm(gpu))
    assert len(stand_in.compiled) == 1


def test_a_gpu_newer_than_the_compiler(stand_in, gpu):
    stand_in.capability = "120"
    gpu.launch(rms_norm(gpu))
    assert "--gpu-architecture=compute_100" in stand_in.compiled[0][2]


def test_a_kernel_that_cannot_be_compiled(gpu):
    with pytest.raises(CompileError, match=r"norm.cu, nothing<int>, for sm_90: norm.cu\(7\): error: nothing"):
        gpu.launch(rms_norm(gpu, form="nothing<int>"))


def test_compiling_ahead_takes_all_cores(stand_in, monkeypatch, gpu):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    together, lines = threading.Barrier(3, timeout=10), []
    compile_program = compiler.compiled

    def compiled(*program):
        together.wait()  # until three compile at once
        return compile_program(*program)

    monkeypatch.setattr(compiler, "compiled", compiled)
    forms = all_forms(FAMILIES)["elementwise.cu"][:9]
    assert gpu.compile({"elementwise.cu": forms}, lines.append) == 9
    assert lines == [f"compiling {i}/9: elementwise.cu {form}" for i, form in enumerate(forms, start=1)]
    assert sorted(form for _, form, _ in stand_in.compiled) == sorted(forms)


def test_compiling_ahead_ends_with_an_error(stand_in, gpu):
    forms = ["nothing<int>", *all_forms(FAMILIES)["elementwise.cu"]]
    with pytest.raises(CompileError, match="nothing"):
        gpu.compile({"elementwise.cu": forms}, lambda line: None)


def test_compiling_ahead(stand_in, tmp_path):
    lines = []
    done = Cupy(Gpu()).compile(lines.append)
    forms = all_forms(FAMILIES)
    count = sum(map(len, forms.values()))
    assert len(stand_in.compiled) == len(lines) == count
    assert lines[0].startswith(f"compiling 1/{count}: ")
    assert done.startswith(f"ready, {count} kernels in ")
    assert done.endswith(str(tmp_path))
    assert {form for _, form, _ in stand_in.compiled} == {form for texts in forms.values() for form in texts}


# -- recordings ---------------------------------------------------------------------------------------------------------------


def test_a_recording(stand_in, gpu):
    launches = [rms_norm(gpu), rms_norm(gpu, rows=2)]
    play = gpu.captured(launches)
    gpu.to_host(launches[0].arguments[2])
    assert stand_in.launched == []  # recorded, not run
    play()
    play()
    gpu.to_host(launches[0].arguments[2])
    assert [launched[1][0] for launched in stand_in.launched] == [3, 2, 3, 2]
    assert play._graph.uploaded


def test_what_other_threads_do_is_no_part_of_a_recording(stand_in, gpu):
    mine, theirs = rms_norm(gpu), rms_norm(gpu, rows=2)
    launch, other = gpu.launch, []

    def launch_and_let_another(each):
        launch(each)
        if not other:
            other.append(threading.Thread(target=lambda: (gpu.empty((3,), np.float32), launch(theirs))))
            other[0].start()
            other[0].join()

    gpu.launch = launch_and_let_another
    play = gpu.captured([mine])
    gpu.to_host(mine.arguments[2])
    assert [launched[1][0] for launched in stand_in.launched] == [2]
    play()
    gpu.to_host(mine.arguments[2])
    assert [launched[1][0] for launched in stand_in.launched] == [2, 3]


def test_a_recording_holds_its_arrays(gpu):
    launch = rms_norm(gpu)
    array = weakref.ref(launch.arguments[2])
    play = gpu.captured([launch])
    del launch
    gc.collect()
    assert array() is not None
    play.close()
    gc.collect()
    assert array() is None


def test_a_recording_of_what_cannot_be_launched(stand_in, gpu):
    with pytest.raises(AssertionError):
        gpu.captured([rms_norm(gpu, arguments=("no argument",))])
    assert all(stream.graph is None for stream in stand_in.streams)
    gpu.launch(rms_norm(gpu))


# -- the end ------------------------------------------------------------------------------------------------------------------


def test_close(stand_in, gpu):
    play = gpu.captured([rms_norm(gpu)])
    array = gpu.to_device(np.ones(3, np.float32))
    gpu.close()
    with pytest.raises(AcceleratorError, match="closed"):
        play()
    assert gpu.to_host(array).tolist() == [1, 1, 1]  # on a new stream
    gpu.close()
    gpu.close()


def test_close_of_what_was_never_used(stand_in):
    Gpu().close()
    assert stand_in.streams == []


def test_an_accelerator_that_is_collected_is_closed(stand_in):
    mine = Cupy(Gpu())
    play = mine.device.captured([rms_norm(mine.device)])
    stream, pool = (weakref.ref(part) for part in (mine.device._stream, mine.device._pool))
    stand_in.streams.clear()
    del mine
    gc.collect()
    with pytest.raises(AcceleratorError, match="closed"):
        play()
    del play
    gc.collect()
    assert stream() is None
    assert pool() is None


# -- settings, and what is missing --------------------------------------------------------------------------------------------


@pytest.fixture
def complete(stand_in, monkeypatch):
    """As on a machine with a GPU and one CuPy."""
    monkeypatch.setattr(installation, "is_installed", lambda: True)
    monkeypatch.setattr(installation, "_packages", lambda: {"cupy-cuda12x": "14.2.0"})
    monkeypatch.setitem(sys.modules, "cuda", type(sys)("cuda"))
    pathfinder = type(sys)("cuda.pathfinder")
    pathfinder.find_nvidia_header_directory = lambda name: stand_in.headers
    stand_in.headers = "/usr/include"
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    return stand_in


def test_nothing_is_missing(complete):
    assert Cupy(Gpu()).missing() is None
    assert Cupy(Gpu()).intended()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"driver": 0}, "no NVIDIA driver is installed: an NVIDIA GPU needs one for CUDA 12 or newer"),
        (
            {"driver": 12040, "built": 13000},
            "this CuPy is made for CUDA 13, and the driver is of CUDA 12: install a newer driver, or pip uninstall "
            "cupy-cuda13x, then pip install 'refmodels[cupy]'",
        ),
        ({"devices": 0}, "no NVIDIA GPU is here"),
        ({"error": (100, "cudaErrorNoDevice")}, "no NVIDIA GPU is here, or CUDA_VISIBLE_DEVICES hides it"),
        ({"error": (35, "cudaErrorInsufficientDriver")}, "NVIDIA's driver is too old for this CuPy: install a newer driver"),
        ({"error": (999, "cudaErrorUnknown: unknown")}, "NVIDIA's driver does not answer: cudaErrorUnknown: unknown"),
        (
            {"capability": "75", "device_name": b"Tesla T4"},
            "Tesla T4 has compute capability 7.5, wanted 8.0 or newer (Ampere)",
        ),
        ({"libraries": {"cublas"}}, "NVRTC cannot be found: pip install 'cupy-cuda12x[ctk]'"),
        ({"libraries": set()}, "NVRTC and cuBLAS cannot be found: pip install 'cupy-cuda12x[ctk]'"),
        ({"headers": None}, "CUDA's headers cannot be found: pip install 'cupy-cuda12x[ctk]'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_machine_lacks(complete, changes, wanted):
    for name, value in changes.items():
        setattr(complete, name, value)
    assert installation.missing() == wanted


@pytest.mark.parametrize(
    ("packages", "wanted"),
    [
        (
            {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"},
            "several CuPy packages are installed, cupy-cuda12x and cupy-cuda13x: uninstall all of them, then install one",
        ),
        ({"cupy-cuda12x": "13.6.0"}, "cupy-cuda12x 13.6.0 is installed, wanted 14.2 or newer: pip install -U cupy-cuda12x"),
        ({"cupy": "15.0.0rc1"}, None),
        ({}, None),  # of another origin
    ],
)
def test_the_packages(complete, monkeypatch, packages, wanted):
    monkeypatch.setattr(installation, "_packages", lambda: packages)
    assert installation.missing() == wanted


def test_an_old_numpy(complete, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.0.2")
    assert installation.missing() == "NumPy 2.0.2 is installed, and CuPy has bfloat16 from 2.1.2 on: pip install -U numpy"


def test_no_cupy(monkeypatch):
    monkeypatch.setattr(installation, "is_installed", lambda: False)
    assert installation.missing().startswith("CuPy is not installed: pip install 'refmodels[cupy]'")


def test_a_cupy_that_cannot_be_imported(complete, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise ImportError("\n====\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libcudart.so.12\n====\n")

    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert installation.missing() == "cupy-cuda12x cannot be imported: ImportError: libcudart.so.12"


def test_settings(complete):
    mine = Cupy(Gpu())
    second = mine.configured(device=1)
    assert (second.device.index, second.device.tf32) == (1, False)
    rounded = second.configured(tf32=True)
    assert (rounded.device.index, rounded.device.tf32) == (1, True)
    assert rounded.device is not second.device
    assert find(mine, device=0) is not mine  # with a stream of its own


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": 2}, "cannot run here: no GPU 2 is here: there are 2, 0 to 1"),
        ({"device": -1}, "device must be an integer from 0 on, got -1"),
        ({"device": True}, "device must be an integer from 0 on, got True"),
        ({"device": "0"}, "device must be an integer from 0 on, got '0'"),
        ({"tf32": 1}, "tf32 must be true or false, got 1"),
        ({"threads": 2}, "has no setting 'threads'"),
    ],
)
def test_settings_that_are_refused(complete, settings, said):
    with pytest.raises(AcceleratorError) as caught:
        Cupy(Gpu()).configured(**settings)
    assert said in str(caught.value)


def test_one_gpu(complete):
    complete.devices = 1
    assert installation.missing(1) == "no GPU 1 is here: there is one, 0"


def test_the_command_line_says_why_another_runs(complete, monkeypatch, capsys):
    entries = {name: type("Entry", (), {"load": lambda self, found=found: found})() for name, found in (
        ("cupy", Cupy(Gpu())), ("numba", accelerator.Accelerator("numba")))}  # fmt: skip
    monkeypatch.setattr(accelerator, "installed", lambda: entries)
    assert fastest_accelerator().name == "cupy"
    assert capsys.readouterr().err == ""
    complete.driver = 0
    assert fastest_accelerator().name == "numba"
    assert capsys.readouterr().err == (
        "refmodels: note: accelerator 'cupy' cannot run here: no NVIDIA driver is installed: an NVIDIA GPU needs one "
        "for CUDA 12 or newer; running on numba\n"
    )
    monkeypatch.setattr(installation, "is_installed", lambda: False)  # a machine that nobody meant to have a GPU
    assert fastest_accelerator().name == "numba"
    assert capsys.readouterr().err == ""


# -- an op, and the package ---------------------------------------------------------------------------------------------------


def test_an_op_on_the_stand_in(stand_in):
    mine = Cupy(Gpu())
    with use(mine):
        y = relu(mine.asarray(np.array([-1.0, 2.0], np.float32)))
    assert mine.asnumpy(y).shape == (2,)
    assert [launched[0] for launched in stand_in.launched] == ["_Zelementwise<float, float>"]


def test_cupy_is_imported_when_it_is_used():
    code = "import sys, refmodels_cupy; print([name for name in sys.modules if name.split('.')[0] in ('cupy', 'cuda')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_wheel_has_the_kernels(tmp_path):
    wheels = pytest.importorskip("hatchling.builders.wheel")
    [wheel] = wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        [points] = [content.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert {f"refmodels_cupy/kernels/{path.name}" for path in DIRECTORY.iterdir()} <= set(names)
    assert "cupy = refmodels_cupy:cupy" in points


# -- weights on their way -----------------------------------------------------------------------------------------------------


def test_an_unread_dictionary():
    made = []

    def leaf(name):
        made.append(name)
        return np.ones(2)

    def fresh():
        made.clear()
        return Unread({name: partial(leaf, name) for name in "abc"} | {"inner": Unread({"d": partial(leaf, "d")})})

    tree = fresh()
    assert list(tree) == ["a", "b", "c", "inner"]
    assert len(tree) == 4
    assert "z" not in tree
    assert tree.get("z") is None
    assert tree.pop("z", 7) == 7
    del tree["c"]
    assert made == []
    assert tree["a"] is tree["a"]
    assert tree.pop("b").tolist() == [1, 1]
    assert made == ["a", "b"]


@pytest.mark.parametrize(
    "everything",
    [dict, lambda tree: {**tree}, lambda tree: dict(tree.items()), lambda tree: dict(zip(tree, tree.values(), strict=True))],
)
def test_a_copy_of_an_unread_dictionary_is_read(everything):
    tree = Unread({"a": partial(np.ones, 2), "inner": Unread({"b": partial(pytest.fail, "read")})})
    copy = everything(tree)
    assert copy["a"] is tree["a"]
    assert copy["inner"] is tree["inner"]


@pytest.fixture
def preset(tmp_path):
    """As opt-125m in little: its table is by far the largest of its matrices."""
    model = OPTCausalLM.from_preset("opt_tiny_stdlib")
    model.save_to_preset(tmp_path / "preset")
    return tmp_path / "preset"


def watched(monkeypatch):
    """Host arrays that are read, and the most bytes of them that were alive at once."""
    alive, seen = [], {"read": 0, "most": 0}
    read = Backbone.read

    def watching(self, leaf):
        def noted(parameter):
            array = leaf(parameter)
            alive.append(weakref.ref(array))
            seen["read"] += 1
            seen["most"] = max(seen["most"], sum(ref().nbytes for ref in alive if ref() is not None))
            return array

        return read(self, noted)

    monkeypatch.setattr(Backbone, "read", watching)
    return seen


@pytest.mark.parametrize("form", ["plain", "int8", "int4"])
def test_weights_are_read_as_they_are_taken(monkeypatch, tmp_path, preset, form):
    model = OPTCausalLM.from_preset(preset)
    if form != "plain":
        model.quantize(form)
        model.save_to_preset(tmp_path / form)
        preset = tmp_path / form
    leaves = dict(flatten(OPTCausalLM.from_preset(preset).backbone.params))
    largest, everything = max(leaf.nbytes for leaf in leaves.values()), sum(leaf.nbytes for leaf in leaves.values())
    seen = watched(monkeypatch)
    loaded = OPTCausalLM.from_preset(preset, accelerator=Cupy(Emulated(tmp_path)))
    assert seen["read"] == len(leaves)
    assert seen["most"] <= largest + 0.1 * everything
    assert largest < 0.6 * everything
    with loaded.backbone.leaves() as back:
        assert all(back[path].tobytes() == leaf.tobytes() for path, leaf in leaves.items())


def test_an_accelerator_that_does_not_take_gets_what_was_read(preset):
    class Refusing(Packing):
        def take(self, params):
            return None

    refusing = Refusing()
    model = OPTCausalLM.from_preset(preset, accelerator=refusing)
    assert type(model.backbone.placement._state.host) is dict
    assert model.generate("import", max_new_tokens=2) == OPTCausalLM.from_preset(preset).generate("import", max_new_tokens=2)
    assert refusing.loaded == 1


def test_the_tree_of_an_accelerator_is_of_plain_dictionaries(preset):
    model = OPTCausalLM.from_preset(preset, accelerator=Packing())

    def types(node):
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return {type(node)}.union(*map(types, children)) if children else {type(node)}

    assert Unread not in types(model.backbone.placement._state.device)


class Small(Packing):
    """Has room for so many bytes."""

    free = 0

    def room(self):
        return Room("a small device", self.free, 10**7)


def test_a_model_that_does_not_fit(preset):
    small = Small()
    model = OPTCausalLM.from_preset(preset, accelerator=small)
    backbone = model.backbone
    held = stored_bytes(backbone.parameters(), "float32")
    with pytest.raises(AcceleratorError) as caught:
        model.generate("import", max_new_tokens=2)
    said = str(caught.value)
    assert said.startswith(f"accelerator 'packing': the weights of {backbone.name} are ")
    assert "and a small device has 0 B of 10.0 MB free; they would be " in said
    for how in ('in bfloat16 (dtype="bfloat16")', 'in int8 (quantize("int8"))', 'in int4 (quantize("int4"))'):
        assert how in said
    assert (small.taken, small.loaded) == (0, 0)
    small.free = held // 2
    model.quantize("int8")
    assert len(model.generate("import", max_new_tokens=2)) > 0
    assert small.taken == 1


# -- arrays of the device and of the host -------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated device needs g++")
@pytest.mark.parametrize("sampler", ["greedy", "top_p", "beam"])
@pytest.mark.parametrize(
    ("task", "preset", "prompt"), [(OPTCausalLM, "opt_tiny_stdlib", "import"), (T5Seq2SeqLM, "t5_tiny_numbers", "spell: 42")]
)
def test_models_do_not_mix_arrays(compiled, task, preset, prompt, sampler):
    mine = Cupy(EmulatedApart(compiled, orders=(2,)))
    model, wanted = task.from_preset(preset, accelerator=mine), task.from_preset(preset)
    for each in (model, wanted):
        each.compile(sampler=TopPSampler(p=0.5, seed=1) if sampler == "top_p" else sampler)
    assert model.generate(prompt, max_new_tokens=3) == wanted.generate(prompt, max_new_tokens=3)
    assert not mine.crossings


def test_what_is_mixed_is_found(tmp_path):
    device = EmulatedApart(tmp_path)
    held, host = device.to_device(np.ones(2)), np.ones(2)
    for mixed in (
        lambda: held + host,
        lambda: host * held,
        lambda: held.__setitem__(slice(None), host),
        lambda: device.xp.where(held > 0, held, host),
        lambda: device.product(held[None], host[None]),
        lambda: device.launch(Launch("norm.cu", NORM, (1, 1, 1), (1, 1, 1), (host,))),
    ):
        with pytest.raises(MixedError):
            mixed()


# -- CuPy itself --------------------------------------------------------------------------------------------------------------

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
        "MemoryPool": "malloc free_bytes free_all_blocks",
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
    assert issubclass(cuda.memory.OutOfMemoryError, MemoryError)
    assert int(cupy.cuda.Device(3)) == 3


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
