"""`pytest -m gpu`: what every test on the GPU needs, and in one line why none ran."""

import pytest
from refmodels_cupy.accelerator import cupy as accelerator

REASON = pytest.StashKey[str]()


@pytest.fixture(scope="session", autouse=True)
def kernels(request):
    """Every kernel, compiled before any test so that each can be timed."""
    reason = accelerator.missing()
    if reason is not None:
        request.config.stash[REASON] = reason
        pytest.skip(reason)
    accelerator.compile(lambda line: None)


@pytest.fixture(scope="session")
def cupy():
    """The accelerator, which is not to leave anything to the host unseen."""
    return accelerator


def pytest_terminal_summary(terminalreporter, config):
    if REASON in config.stash:
        terminalreporter.write_line(f"gpu: nothing ran: {config.stash[REASON]}")
