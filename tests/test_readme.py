"""The README's examples run, and give what it shows.

Python blocks are doctests, or files for the commands below them if the line above names one (`port.py`:). In `console` blocks
each `$ refmodels ...` must print the lines below it; in a block marked `timings` or `figures` the figures may differ. `pip
install` is left to `.ci/run`, which does it on a clean machine.
"""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILE = re.compile(r"`(?P<name>\w+\.py)`:\n\n```python\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```console(?P<mark> timings| figures)?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text):
    """(command, what it prints, whether its figures may differ) for every command of the console blocks."""
    for block in FENCE.finditer(text):
        for part in re.split(r"^\$ ", block["body"], flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            command = command.removeprefix("pip install . && ")
            if not command.startswith("pip install"):
                yield command, shown, bool(block["mark"])


def printed(command, cwd):
    """Both streams, as a terminal shows them."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    done = subprocess.run(
        command, shell=True, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120
    )
    return done.stdout


def figures_aside(text):
    return re.sub(r"\d[\d,.]*", "#", text)


EXAMPLES = list(commands(README))


@pytest.mark.parametrize(("command", "shown", "timings"), EXAMPLES, ids=[command for command, *_ in EXAMPLES])
def test_command(command, shown, timings, tmp_path):
    assert shutil.which("refmodels", path=str(Path(sys.executable).parent)), (
        "install the project first: pip install -e '.[test]'"
    )
    for file in FILE.finditer(README):
        (tmp_path / file["name"]).write_text(file["body"], encoding="utf-8")
    found = printed(command, tmp_path)
    assert (figures_aside(found) == figures_aside(shown)) if timings else (found == shown)


def test_there_are_commands():
    assert len(EXAMPLES) >= 6
    assert sum(timings for *_, timings in EXAMPLES) == 2


def test_python_examples():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 15
    assert results.failed == 0


def linked(document):
    """The files that a document links to."""
    return [document.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("folder", [".", "accel", "accel/refmodels_numba", "accel/refmodels_cupy"])
def test_files_that_a_readme_links_to_exist(folder):
    links = linked(ROOT / folder / "README.md")
    assert len(links) >= 5
    assert [link for link in links if not link.exists()] == []


def test_the_cupy_accelerators_readme_has_every_file():
    package = ROOT / "accel" / "refmodels_cupy"
    files = {path for pattern in ("*.py", "kernels/*") for path in package.glob(pattern)}
    assert files - set(linked(package / "README.md")) == set()
