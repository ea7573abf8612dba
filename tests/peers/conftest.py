"""Live tests: what we write is read by the real packages, and the other way round.

One file for each subject (`test_peer_saving.py`, `test_peer_tokenizers.py`, ...; the names begin with `test_peer_`, as no two
test files may have one name). Each test runs in whatever environment it is started in: with the extra `peers` (new KerasHub,
Transformers, PEFT) or with `peers-old` (KerasHub 0.17), which cannot be installed together. It takes the packages it needs as
fixtures: `keras_hub` (of either version), `keras_hub_new`, `transformers`, `peft`, `ctranslate2`, `onnxruntime`. A package that
is not there skips the test.
With REFMODELS_PEERS=1 in the environment that is a failure, unless the version of KerasHub that is installed rules it out.

    pip install -e '.[test,peers]' && REFMODELS_PEERS=1 pytest tests/peers
"""

import importlib
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from refmodels.numerics import calibrated, compare


def keras_hub_version():
    try:
        return tuple(int(part) for part in version("keras-hub").split(".")[:2])
    except PackageNotFoundError:
        return None


OLD = keras_hub_version() == (0, 17)


def package(name, *, with_old):
    """The package; skips or fails without it. `with_old`: whether it belongs to the environment of KerasHub 0.17."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow" if OLD else "torch")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if OLD and not with_old:
        pytest.skip(f"{name}: this is the environment of keras-hub 0.17, without it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("REFMODELS_PEERS") == "1":
            pytest.fail(f"REFMODELS_PEERS=1, but {name} cannot be imported: {error}")
        pytest.skip(f"needs {name}: pip install -e '.[peers]' or '.[peers-old]'")


@pytest.fixture(scope="session")
def keras_hub():
    """KerasHub, 0.17 or the current one."""
    return package("keras_hub", with_old=True)


@pytest.fixture(scope="session")
def keras_hub_new():
    """KerasHub, the current one only."""
    return package("keras_hub", with_old=False)


@pytest.fixture(scope="session")
def transformers():
    package("torch", with_old=False)
    return package("transformers", with_old=False)


@pytest.fixture(scope="session")
def peft():
    package("torch", with_old=False)
    return package("peft", with_old=False)


@pytest.fixture(scope="session")
def ctranslate2():
    package("transformers", with_old=False)  # its converter reads with it
    return package("ctranslate2", with_old=False)


@pytest.fixture(scope="session")
def onnxruntime():
    """ONNX Runtime, with what exports and what changes its files."""
    for name in ("torch", "transformers", "onnxscript", "onnx"):
        package(name, with_old=False)
    return package("onnxruntime", with_old=False)


@pytest.fixture(autouse=True)
def seeded():
    """What a peer draws, adapters for one, is the same in every run of a test: it agrees each time, or never."""
    if "keras" in sys.modules:  # imported before, as the packages are fixtures of the session
        sys.modules["keras"].utils.set_random_seed(0)
    elif "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def agree():
    """agree(peer, truth, own, name): the peer's array against our float64 run, with our run in the peer's type as the
    measure of what that type costs."""

    def check(peer, truth, own, name=""):
        candidate = np.asarray(peer).astype(own.dtype)
        verdict = compare(candidate, truth, calibrated(4), wanted=own, name=name)
        assert verdict, verdict

    return check
