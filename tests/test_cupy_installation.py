"""What is missing where the CuPy accelerator cannot run, and what it can be set to, on a stand-in for CuPy; the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from refmodels_cupy import installation
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.device import Gpu
from refmodels_cupy.source import DIRECTORY

from refmodels.accelerator import Accelerator, AcceleratorError, find
from refmodels.cli.selection import fastest_accelerator

ROOT = Path(__file__).parent.parent


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


def test_the_command_line_says_why_another_runs(complete, install, monkeypatch, capsys):
    cupy, numba = Cupy(Gpu()), Accelerator("numba")
    install(cupy=lambda: cupy, numba=lambda: numba)
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


# -- the package ---------------------------------------------------------------------------------------------------------------


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
