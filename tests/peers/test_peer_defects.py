"""The defects of spec/defects/ are still found in the packages as they are released: by the command that the page shows, at the
step and by the name that it says."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from defects_presets import PRESETS

from refmodels.backbone import Backbone
from refmodels.cli.parser import command_line
from refmodels.cli.verify import form_of, tried_cases
from refmodels.trace import traced
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import replay
from refmodels.verification.signatures import FAULTS, diagnose

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parent
PAGES = HERE.parent.parent / "spec" / "defects"
NAMES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "README")


def command(name):
    """The environment and the arguments of the page's first command: `refmodels verify`."""
    line = re.search(r"^\$ (.*)python -m refmodels (verify .*)$", (PAGES / f"{name}.md").read_text(), re.MULTILINE)
    return line[1].strip(), shlex.split(line[2])


def promised(name):
    """What the page shows: how many steps are wrong, the first, and what the fault is called, if it is named."""
    text = (PAGES / f"{name}.md").read_text()
    counts = re.search(r"DIVERGES; (\d+ of \d+) steps wrong", text)[1]
    fault = re.search(r"^Why: ([\w.-]+):", text, re.MULTILINE)
    return counts, re.search(r"^First wrong step: ([\w.:]+), in case", text, re.MULTILINE)[1], fault and fault[1]


def found(words, place, fault=None):
    """The same of a run of this command, which tries no fault but this one. What the page puts in /tmp is put in `place`."""
    for preset in PRESETS:
        if f"/tmp/{preset}" in words:
            PRESETS[preset]().save_to_preset(place / preset)
    arguments = command_line().parse_args([word.replace("/tmp/", f"{place}/") for word in words])
    with ExitStack() as stack:
        model = Backbone.from_preset(arguments.like, dtype=arguments.dtype)
        form = form_of(arguments, model, stack)
        (case,) = tried_cases(arguments, model, form)
        substitutes = traced(model, case.inputs, form.injects.__contains__)
        theirs = form.run(case.inputs, substitutes or None)
        options = {"arithmetic": Arithmetic(form.dtype, form.products), "substitutes": substitutes}
        report = replay(model, case.inputs, theirs, **options)
        counts = f"{len(report.wrong)} of {len(report.steps)}"
        if report.first is None or fault is None:
            return counts, report.first and report.first.name, None
        tried = [known for known in FAULTS if known.name == fault]
        findings = diagnose(model, case.inputs, theirs, report.first.name, faults=tried, **options)
        return counts, report.first.name, findings[0].name if findings else None


ELSEWHERE = {"keras-hub-t5-float16", "transformers-t5-encoder-from-head"}
"""Not to be seen with the releases and the backend that the other tests run with."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_a_defect_is_found(request, tmp_path, name):
    environment, words = command(name)
    request.getfixturevalue("keras_hub_new" if name.startswith("keras-hub") else "transformers")
    if environment and environment != f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}":
        pytest.skip("Keras runs on another backend here")
    assert found(words, tmp_path, promised(name)[2]) == promised(name)


def test_t5_in_float16_is_found_where_the_backend_shows_it(keras_hub_new, tmp_path):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs tensorflow")
    name = "keras-hub-t5-float16"
    setting, words = command(name)
    root = HERE.parent.parent
    paths = os.pathsep.join([str(HERE), str(root), str(root / "accel"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths} | dict([setting.split("=")])
    code = f"from pathlib import Path; from test_peer_defects import found; print(found({words!r}, Path({str(tmp_path)!r})))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str(promised(name))


def test_t5_in_float16_is_right_on_torch(keras_hub_new, tmp_path):
    if os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("Keras runs on another backend here")
    assert found(command("keras-hub-t5-float16")[1], tmp_path)[0].startswith("0 of")


def test_opt_is_right_with_fused_attention(transformers, tmp_path):
    words = command("transformers-opt-left-padding")[1]
    words[1] = "defects_transformers:opt_sdpa"
    assert found(words, tmp_path)[0].startswith("0 of")


@pytest.mark.parametrize("order", ["as it is now", "as it was to 5.17"])
def test_t5_embeds_with_the_head_where_that_is_the_first_of_the_tied(transformers, monkeypatch, tmp_path, order):
    name = "transformers-t5-encoder-from-head"
    words = command(name)[1]
    if order == "as it is now":
        assert found(words, tmp_path)[0].startswith("0 of")
    else:
        tied = transformers.T5ForConditionalGeneration._tied_weights_keys
        head = {"lm_head.weight": tied["lm_head.weight"]}
        monkeypatch.setattr(transformers.T5ForConditionalGeneration, "_tied_weights_keys", head | tied)
        assert found(words, tmp_path, promised(name)[2]) == promised(name)


def test_every_page_is_in_the_table():
    assert set(re.findall(r"^\| \[([\w.-]+)\.md\]", (PAGES / "README.md").read_text(), re.MULTILINE)) == set(NAMES)
    assert set(NAMES) >= ELSEWHERE
