"""Below the test run: how many planted faults were rejected, and right kernels accepted; and what several files need."""

import importlib.metadata
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from hypothesis import settings
from refmodels_cupy import compiler
from refmodels_cupy.device import Gpu
from stand_in import StandIn

# The same examples in every run: what fails fails again, and for everybody. On a busy machine any of them may take long.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

COUNTED = {
    "planted faults": ("::test_mutant_is_rejected[", "rejected"),
    "planted kernels, wrong": ("::test_wrong_kernel_is_rejected[", "rejected"),
    "planted kernels, right": ("::test_right_kernel_is_accepted[", "accepted"),
}


def pytest_terminal_summary(terminalreporter):
    for label, (test, said) in COUNTED.items():
        ran = {
            outcome: sum(test in report.nodeid for report in terminalreporter.getreports(outcome))
            for outcome in ("passed", "failed", "error")
        }
        if total := sum(ran.values()):
            terminalreporter.write_line(f"{label}: {ran['passed']} of {total} {said}")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plug-in as pip would have installed it: a module, and its entry points."""

    def install(source, entries):
        (tmp_path / "plugged_in.py").write_text(source)
        info = tmp_path / "plugged_in-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
        lines = "".join(f"{name} = plugged_in:{attribute}\n" for name, attribute in entries.items())
        (info / "entry_points.txt").write_text(f"[refmodels.accelerators]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("plugged_in", None)


@pytest.fixture
def install(monkeypatch):
    """`install(numba=load)`: these plug-ins, and no others, are installed; `load()` gives the accelerator."""

    def call(**loads):
        entries = [SimpleNamespace(name=name, load=load) for name, load in loads.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)

    return call


@pytest.fixture(scope="session")
def compiled(pytestconfig):
    """Where the kernels of refmodels_cupy, compiled for this CPU, are kept for all tests and runs, by what they are made of.
    `pytest --cache-clear` removes them."""
    if not shutil.which("g++") and not os.environ.get("REFMODELS_CC"):
        pytest.skip("the emulated device needs g++")
    return pytestconfig.cache.mkdir("cupy_kernels")


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
