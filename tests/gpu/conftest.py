"""`pytest -m gpu`: what every test on the GPU needs, and in one line why none ran."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from refmodels_cupy.accelerator import FAMILIES
from refmodels_cupy.accelerator import cupy as accelerator
from refmodels_cupy.source import all_forms

REASON = pytest.StashKey[str]()


@pytest.fixture(scope="session", autouse=True)
def kernels(request):
    """Every kernel, compiled before any test so that each can be timed: by all cores, since NVRTC takes one for each."""
    reason = accelerator.missing()
    if reason is not None:
        request.config.stash[REASON] = reason
        pytest.skip(reason)
    forms = [{file: [form]} for file, forms in all_forms(FAMILIES).items() for form in forms]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: accelerator.device.compile(one, lambda line: None), forms))


@pytest.fixture(scope="session")
def cupy():
    """The accelerator, which is not to leave anything to the host unseen."""
    return accelerator


def pytest_terminal_summary(terminalreporter, config):
    if REASON in config.stash:
        terminalreporter.write_line(f"gpu: nothing ran: {config.stash[REASON]}")
