"""Launches on a stand-in for CuPy: how their kernels are compiled and kept, and how they are recorded."""

import gc
import os
import threading
import weakref

import numpy as np
import pytest
from refmodels_cupy import compiler
from refmodels_cupy.accelerator import FAMILIES, Cupy
from refmodels_cupy.device import Gpu, Strided
from refmodels_cupy.source import DIRECTORY, all_forms
from stand_in import NORM, rms_norm

from refmodels.accelerator import CompileError

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
