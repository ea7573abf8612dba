"""The defects of spec/defects/ are still found in the packages as they are released, at the step that the page says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from defects_keras_hub import DEFECTS, said

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent.parent
PAGES = {
    "t5_1_1_gelu": ("keras-hub-t5-1.1-gelu", "torch"),
    "t5_float16": ("keras-hub-t5-float16", "tensorflow"),
    "alibi_bfloat16": ("keras-hub-alibi-bfloat16", "torch"),
}


def page(name):
    return (ROOT / "spec" / "defects" / f"{PAGES[name][0]}.md").read_text()


def summary(name):
    """The last line that the page shows: how many steps are wrong, and which is the first."""
    (block,) = re.findall(r"```\n(.*?)```", page(name), re.DOTALL)
    return block.splitlines()[-1]


@pytest.mark.parametrize("name", [name for name, (_, backend) in PAGES.items() if backend == "torch"])
def test_a_defect_of_keras_hub_is_found(keras_hub_new, tmp_path, name):
    if os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("Keras runs on another backend here")
    assert said(DEFECTS[name](tmp_path))[-1] == summary(name)


def test_t5_in_float16_is_found_where_the_backend_shows_it(keras_hub_new):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs tensorflow")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "accel"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "peers" / "defects_keras_hub.py"), "t5_float16"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == summary("t5_float16")


def test_t5_in_float16_is_right_on_torch(keras_hub_new, tmp_path):
    if os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("Keras runs on another backend here")
    assert said(DEFECTS["t5_float16"](tmp_path))[-1].startswith("0 of 83 steps are wrong")


def test_every_defect_has_a_page_and_every_page_a_defect():
    assert PAGES.keys() == DEFECTS.keys()
    linked = set(re.findall(r"\]\(([\w.-]+)\.md\)", (ROOT / "spec" / "defects" / "README.md").read_text()))
    assert linked == {file for file, _ in PAGES.values()}
    assert linked | {"README"} == {path.stem for path in (ROOT / "spec" / "defects").glob("*.md")}
    for name, (_, backend) in PAGES.items():
        assert f"$ KERAS_BACKEND={backend} python tests/peers/defects_keras_hub.py {name}" in page(name)
