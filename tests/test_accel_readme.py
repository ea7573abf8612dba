"""The plug-in of accel/README.md: copied out of the document, installed by pip, and run as the document says."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_readme import commands, printed

import refmodels
from refmodels.accelerator import find
from refmodels.numerics import judge
from refmodels.ops.linear import linear

pytest.importorskip("hatchling")
pytest.importorskip("pip")

DOCUMENT = Path(__file__).parents[1] / "accel" / "README.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
FILE = re.compile(r"`(?P<path>refmodels_twenty/\S+)`:\n\n```\w+\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def installed_plugin(tmp_path_factory):
    """The directory that it is installed in."""
    root = tmp_path_factory.mktemp("plugin")
    for found in FILE.finditer(TEXT):
        path = root / found["path"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(found["body"], encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    target = ["--no-build-isolation", "--target", str(root / "site"), str(root / "refmodels_twenty")]
    done = subprocess.run([*pip, *target], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "site"


@pytest.fixture
def twenty(installed_plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(installed_plugin))
    yield find("twenty")
    sys.modules.pop("refmodels_twenty", None)


COMMANDS = [(command, shown) for command, shown, _ in commands(TEXT)]


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_command(command, shown, installed_plugin, tmp_path, monkeypatch):
    paths = [str(installed_plugin), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    assert printed(command, tmp_path) == shown


def test_there_are_commands():
    assert {command.split()[1] for command, _ in COMMANDS} == {"accelerators", "check", "generate", "ops"}


def test_it_is_as_short_as_it_says():
    bodies = {found["path"].rpartition("/")[2]: found["body"] for found in FILE.finditer(TEXT)}
    code = [line for line in bodies["refmodels_twenty.py"].splitlines() if line and '"""' not in line]
    assert len(code) <= 25
    assert len(bodies["pyproject.toml"].splitlines()) <= 12


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "mixed_bfloat16", "float64"])
def test_it_gives_the_same_bits(twenty, dtype):
    """One text at a time: NumPy may sum in another order for a batch."""
    one, other = (
        refmodels.OPTCausalLM.from_preset("opt_tiny_stdlib", dtype=dtype, accelerator=accelerator)
        for accelerator in (None, twenty)
    )
    ids = {"token_ids": [[2, 57, 301, 8]]}
    assert other.backbone(ids).tobytes() == one.backbone(ids).tobytes()
    assert other.generate("import", max_new_tokens=12) == one.generate("import", max_new_tokens=12)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 5), (5,), (2, 0)])
def test_its_kernel_is_right(twenty, shape):
    draw = np.random.default_rng(1).standard_normal
    x, kernel, bias = (draw(size, np.float32) for size in (shape, (shape[-1], 4), 4))
    with refmodels.use(twenty):
        assert judge(linear, (x, kernel, bias), {}, linear(x, kernel, bias)).ok
    reason = "kernel is float64, wanted float32"
    assert twenty.reasons(linear, (x, kernel.astype("float64")), {}) == [reason]


def test_its_load_leaves_the_tree_alone(twenty):
    model = refmodels.OPTBackbone(9, 1, 1, 4, 4, dtype="float16", seed=1, accelerator=twenty)
    assert model.device_params["token_embedding"]["embeddings"].dtype == np.float32
    assert model.params["token_embedding"]["embeddings"].dtype == np.float16


def test_python_examples():
    results = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert results.attempted >= 30
    assert results.failed == 0


def test_files_that_it_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    assert [link for link in links if not (DOCUMENT.parent / link).exists()] == []
