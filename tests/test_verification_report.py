"""What a verification says: the table, words, JSON, JUnit, what got worse since a baseline, and the page of HTML."""

import base64
import html
import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from verification_cases import Faulty, small_model, times

from refmodels.files import CheckpointError
from refmodels.numerics import Verdict
from refmodels.printing import printable
from refmodels.verification import evidence as looks
from refmodels.verification.evidence import gather
from refmodels.verification.html import page, write_html
from refmodels.verification.judgement import Step
from refmodels.verification.pictures import MAX_CELLS, Bar, chart, difference_picture, error_picture, png
from refmodels.verification.replay import Report, replay
from refmodels.verification.report import (
    ACCUMULATED,
    GROWTH,
    LAWS,
    as_json,
    excused_by,
    layer_name,
    number,
    read_baseline,
    table,
    worse_than,
    write_junit,
    write_report,
)
from refmodels.verification.signatures import Finding
from refmodels.verification.verify import (
    AGREES,
    DIVERGES,
    INCONCLUSIVE,
    Case,
    CaseResult,
    LawResult,
    Verification,
    cases,
    verify,
)

ROOT = Path(__file__).parent.parent
SCORES = "layers.1.self_attention:attention_scores"
HOSTILE = (
    "\x1b[31mred\x1b[0m\r\n\0\u202e</title></script><script>alert('1')</script><img src=http://x.test/a>&\ud800" + "long" * 500
)


@pytest.fixture(scope="module")
def model():
    return small_model("opt")


@pytest.fixture(scope="module")
def scaled(model):
    """Scores of layer 1 that are twice what they should be."""
    return verify(Faulty(model, times(SCORES, 2)), model, cases(model)[:3])


def step(name, ratio=0.5, through=0.25, *, largest=1.0):
    """A step whose bound is 1e-6, or with an infinite ratio one of the wrong shape."""

    def verdict(times_as_much):
        if times_as_much == math.inf:
            return Verdict(False, f"{name} has shape (1, 2), wanted (1, 3)")
        worst = f"{name}: error {times_as_much * 1e-6:.3g}, bound 1e-06 (multilinear) at (0, 1)"
        return Verdict(times_as_much <= 1, worst, times_as_much * 1e-6, 1e-6, (0, 1))

    accumulated = None if through is None else verdict(through)
    return Step(name, name.partition(":")[2].partition(".")[0], (1, 3), verdict(ratio), accumulated, largest, 3, 3)


def verification(*steps, laws=(), name="one row", **more):
    """One case with these steps."""
    report = Report(tuple(steps), **{key: more.pop(key) for key in ("absent", "unknown") if key in more})
    findings = more.pop("findings", ())
    case = CaseResult(Case(name, {"token_ids": np.array([[3, 4, 5]])}), report, findings)
    return replace(Verification("port", "opt_tiny", "float32", (case,), laws), **more)


# -- the table --------------------------------------------------------------------------------------------------------

STEPS = (
    step("token_embedding:embedding", 0.0, 0.0),
    step("layers.0.self_attention.query:linear", 0.004, 0.2),
    step("layers.0:add", 0.25, 0.3, largest=12.34),
    step("layers.1.self_attention.query:linear", 0.125, 0.3),
    step("layers.1.self_attention:attention_scores", 2500.0, 2000.0),
    step("layers.1:add", 0.5, None),
    step("opt_logits", 0.75, 45.0),
)

TABLE = """\
Case "one row": token_ids 1 x 3
  STEP                                 LOCAL  ACCUMULATED  LARGEST  VERDICT
  token_embedding:embedding             0.00         0.00        1  right
  layers.0 (2 steps)                    0.25         0.30     12.3  right
  layers.1 (3 steps)                 2.5e+03      2.0e+03        1  WRONG
    self_attention.query:linear         0.12         0.30        1  right
    self_attention:attention_scores  2.5e+03      2.0e+03        1  WRONG  <- first
    add                                 0.50                     1  right
  opt_logits                            0.75        45.00        1  right

port beside opt_tiny in float32: DIVERGES; 1 of 7 steps wrong in 1 case, 1 of 3 laws broken

First wrong step: layers.1.self_attention:attention_scores, in case "one row".
It is off by 0.0025 at (0, 1), where 1e-06 is allowed: 2.5e+03 times as much. The largest value of
  the step is 1.
Why: scores-scaled-twice: The scores are scaled by 1/d: scale them by 1/sqrt(d).
That fits too: other-fault.

Law broken: batch = singles: row 1 differs.
Laws kept: padding.
Law not tried: cache: it has none.

Not compared: 1 of ours that they do not give (opt_backbone).
Not compared: 4 of theirs that we have no step for (a, b, c ...).
With torch 2.13."""


def test_the_table_of_a_planted_fault():
    findings = (
        Finding("scores-scaled-twice", "The scores are scaled by 1/d: scale them by 1/sqrt(d).", SCORES, 0.1),
        Finding("other-fault", "Another.", SCORES, 0.9),
    )
    laws = (
        LawResult("batch = singles", Verdict(False, "row 1 differs")),
        LawResult("padding", Verdict(True, "fine")),
        LawResult("cache", None, "it has none"),
    )
    absent, unknown, facts = ("opt_backbone",), tuple("abcd"), {"torch": "2.13"}
    found = verification(*STEPS, laws=laws, findings=findings, absent=absent, unknown=unknown, facts=facts)
    assert table(found, width=100) == TABLE


def test_only_the_first_case_is_opened():
    one = verification(*STEPS).cases[0]
    found = replace(verification(*STEPS), cases=(one, replace(one, case=Case("two", one.case.inputs))))
    said = table(found, width=100)
    assert said.count("<- first") == 1
    assert said.count("WRONG at self_attention:attention_scores\n") == 1
    assert 'in cases "one row", "two".' in said
    everything = table(found, width=100, all_steps=True)
    assert everything.count("    self_attention.query:linear") == 4
    assert everything.count("<- first") == 2


def test_a_real_fault_in_words(scaled):
    said = table(scaled, width=100)
    assert re.search(r"\n    self_attention:attention_scores +\d\.\de\+0\d +\d\.\de\+0\d +[\d.]+  WRONG  <- first\n", said)
    assert "DIVERGES; 3 of 192 steps wrong in 3 cases" in said
    assert f'First wrong step: {SCORES}, in cases "one row", "padded on the\n  right", "padded on the left".' in said
    assert re.search(r"Where: in 48 of 56 values: every head, positions 1 to 6, every key\.", said)
    assert "scores-not-scaled: The scores are not divided by sqrt(d)" in said
    assert "port 1.0" in said


def test_a_coarse_candidate_is_told_what_to_give(model):
    keep = re.compile(r"layers\.\d+:opt_decoder_layer|opt_logits").fullmatch
    found = verify(Faulty(model, times(SCORES, 2), keep=keep), model, cases(model)[:1])
    said = " ".join(table(found, width=100).split())
    assert "First wrong step: layers.1:opt_decoder_layer" in said
    assert "give some of its 26: layers.1.self_attention_layer_norm:layer_norm," in said
    assert "Not compared: 61 of ours that they do not give" in said


def test_what_adds_up_is_said_to():
    found = verification(step("layers.0:add"), step("layers.0:relu", 0.5, 3.0), step("layers.1:add", 0.5, 4.0))
    said = " ".join(table(found, width=100, all_steps=True).split())
    assert found.status == INCONCLUSIVE
    assert "INCONCLUSIVE" in said
    assert "relu 0.50 3.00 1 unclear layers.1:add 0.50 4.00 1 unclear" in said
    assert "every step up to layers.0:relu is right by itself, and yet what has added up there is 3.00 times" in said


def test_after_a_wrong_step_nothing_is_unclear():
    found = verification(step("layers.0:add", 2.0, 2.0), step("layers.1:add", 0.5, 4.0))
    assert "unclear" not in table(found, width=100)


def test_a_wrong_shape_is_said_as_it_is():
    said = table(verification(step("layers.0:add", math.inf, None)), width=100)
    assert re.search(r"layers\.0:add +inf +1  WRONG  <- first", said)
    assert "layers.0:add has shape (1, 2), wanted (1, 3)." in said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0.00"), (0.001, "<0.01"), (0.994, "0.99"), (999.0, "999.00"), (12345.0, "1.2e+04"), (math.inf, "inf")],
)
def test_numbers(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.0:add", "layers.0"),
        ("encoder.layers.12.self_attention.query:linear", "encoder.layers.12"),
        ("layers.0:add.2", "layers.0"),
        ("token_embedding:embedding.2", "token_embedding:embedding.2"),
        ("opt_backbone", "opt_backbone"),
    ],
)
def test_layers(name, layer):
    assert layer_name(name) == layer


def test_the_table_keeps_to_its_width():
    name = f"encoder.layers.0.{'very_' * 40}long:linear"
    said = table(verification(step(name, 3.0), step("encoder.layers.0:add")), width=80)
    assert max(len(line) for line in said.split("\n\n")[0].splitlines()) <= 80
    assert "..." in said


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(scaled):
    record = json.loads(json.dumps(as_json(scaled), allow_nan=False))
    assert record == as_json(scaled)
    assert list(record) == [
        "format", "version", "candidate", "model", "arithmetic", "status", "outcome", "first", "cases", "laws", "facts",
    ]  # fmt: skip
    assert (record["status"], record["outcome"]) == (DIVERGES, "diverges")
    assert record["first"] == {"case": "one row", "step": SCORES}
    case = record["cases"][0]
    assert list(case) == [
        "name", "inputs", "ok", "first", "steps", "findings", "evidence", "absent", "unknown", "facts",
    ]  # fmt: skip
    assert case["inputs"] == {"token_ids": [1, 7], "padding_mask": [1, 7]}
    wrong = next(entry for entry in case["steps"] if not entry["local"]["ok"])
    assert list(wrong) == ["name", "op", "shape", "local", "accumulated", "largest", "judged", "size"]
    assert list(wrong["local"]) == ["ok", "ratio", "error", "bound", "index", "reason"]
    assert wrong["local"]["ratio"] == wrong["local"]["error"] / wrong["local"]["bound"] > 1e5
    assert list(case["evidence"]) == ["step", "wrong", "judged", "where", "worst"]
    documents = (ROOT / "spec").glob("verification*.md")
    documented = {key for document in documents for key in re.findall(r"\w+", document.read_text())}
    keys = {*record, *case, *wrong, *wrong["local"], *case["evidence"], *case["evidence"]["worst"][0]}
    assert keys - documented == set()


def test_json_is_null_where_a_number_is_not_finite():
    broken = replace(step("a:add"), local=Verdict(False, "NaN", math.nan, 1.0), largest=math.inf)
    record = as_json(verification(broken, step("b:add", math.inf)))
    json.dumps(record, allow_nan=False)
    first, second = record["cases"][0]["steps"]
    assert (first["local"]["ratio"], first["local"]["error"], first["largest"]) == (None, None, None)
    assert (second["local"]["ok"], second["local"]["ratio"]) == (False, None)


# -- JUnit ------------------------------------------------------------------------------------------------------------


def test_junit(tmp_path):
    laws = (LawResult("batch = singles", Verdict(False, "row 1 differs")), LawResult("cache", None, "it has none"))
    write_junit(verification(*STEPS, laws=laws), tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.attrib == {
        "name": "refmodels verify port", "tests": "10", "failures": "2", "errors": "0", "skipped": "1",
    }  # fmt: skip
    found = {(case.get("classname"), case.get("name")): [(c.tag, c.get("message")) for c in case] for case in suite}
    assert found["one row", SCORES] == [("failure", STEPS[4].local.reason)]
    assert found["one row", "layers.1:add"] == found["one row", ACCUMULATED] == []
    assert found[LAWS, "batch = singles"] == [("failure", "row 1 differs")]
    assert found[LAWS, "cache"] == [("skipped", "it has none")]
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]


def test_junit_is_in_error_where_it_is_not_clear(tmp_path):
    write_junit(verification(step("layers.0:add", 0.5, 3.0)), tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")


# -- baseline ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def since(tmp_path):
    """What got worse from one verification to another, by way of a file."""

    def compared(before, after):
        write_report(before, tmp_path / "baseline.json")
        return [(entry.case, entry.name) for entry in worse_than(after, read_baseline(tmp_path / "baseline.json"))]

    return compared


KEPT = LawResult("batch = singles", Verdict(True, "fine"))
BROKEN = LawResult("batch = singles", Verdict(False, "row 1 differs"))
UNTRIED = LawResult("batch = singles", None, "it takes one row")

SINCE = {
    "the same, right": ([step("a:add")], [step("a:add")], []),
    "the same, wrong": ([step("a:add", 9.0)], [step("a:add", 9.0)], []),
    "right and less exact": ([step("a:add", 0.001)], [step("a:add", 0.99)], []),
    "better": ([step("a:add", 9.0), step("b:add")], [step("a:add"), step("b:add")], []),
    "less wrong": ([step("a:add", 9.0)], [step("a:add", 5.0)], []),
    "wrong and was right": ([step("a:add"), step("b:add")], [step("a:add"), step("b:add", 1.1)], ["b:add"]),
    "wrong by a little more": ([step("a:add", 9.0)], [step("a:add", 9.0 * GROWTH)], []),
    "wrong by much more": ([step("a:add", 9.0)], [step("a:add", 9.1 * GROWTH)], ["a:add"]),
    "wrong and now without a number": ([step("a:add", 9.0)], [step("a:add", math.inf)], ["a:add"]),
    "without a number as before": ([step("a:add", math.inf)], [step("a:add", math.inf)], []),
    "another step is wrong": ([step("a:add", 9.0)], [step("a:add"), step("b:add", 2.0)], ["b:add"]),
    "new and right": ([step("a:add")], [step("a:add"), step("b:add")], []),
    "no longer compared": ([step("a:add"), step("b:add")], [step("a:add")], ["b:add"]),
    "no longer compared, and was wrong": ([step("a:add"), step("b:add", 9.0)], [step("a:add")], ["b:add"]),
    "adds up now": ([step("a:add")], [step("a:add", 0.5, 2.0)], [ACCUMULATED]),
    "adds up as before": ([step("a:add", 0.5, 2.0)], [step("a:add", 0.5, 3.0)], []),
    "wrong, so that it does not count what adds up": ([step("a:add")], [step("a:add", 2.0, 2.0)], ["a:add"]),
}


@pytest.mark.parametrize("name", SINCE)
def test_what_got_worse(since, name):
    before, after, worse = SINCE[name]
    assert since(verification(*before), verification(*after)) == [("one row", entry) for entry in worse]


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [(KEPT, KEPT, 0), (KEPT, BROKEN, 1), (BROKEN, BROKEN, 0), (BROKEN, KEPT, 0), (KEPT, UNTRIED, 1)],
)
def test_laws_that_got_worse(since, before, after, worse):
    steps = step("a:add")
    assert since(verification(steps, laws=(before,)), verification(steps, laws=(after,))) == [(LAWS, KEPT.name)] * worse


def test_what_a_wrong_step_hid_was_not_in_the_baseline(tmp_path):
    write_report(verification(step("a:add", 9.0, 9.0)), tmp_path / "baseline.json")
    worse = worse_than(verification(step("a:add", 0.5, 9.0)), read_baseline(tmp_path / "baseline.json"))
    assert [str(entry) for entry in worse] == ["one row: accumulated was not in the baseline, is wrong (inf)"]


def test_a_case_that_is_gone_is_worse(since):
    assert since(verification(step("a:add")), verification(step("a:add"), name="other")) == [("one row", "a:add")]


def test_a_real_run_is_no_worse_than_itself(since, scaled, model):
    assert since(scaled, scaled) == []
    right = verify(Faulty(model), model, cases(model)[:3])
    assert right.status == AGREES
    assert since(scaled, right) == []
    assert since(right, scaled) == [(case.case.name, SCORES) for case in scaled.cases]


def test_what_got_worse_in_words_and_what_is_excused(tmp_path):
    write_report(verification(step("a:add", 9.0), step("b:add")), tmp_path / "baseline.json")
    baseline = read_baseline(tmp_path / "baseline.json")
    now = verification(step("a:add", 9.0), step("b:add", 2.0))
    worse = worse_than(now, baseline)
    assert [str(entry) for entry in worse] == ["one row: b:add was right (0.50), is wrong (2.00)"]
    write_junit(now, tmp_path / "junit.xml", excused=excused_by(baseline, worse))
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [(case.get("name"), case[0].tag) for case in suite if len(case)] == [("a:add", "skipped"), ("b:add", "failure")]


def test_a_baseline_of_something_else_is_refused(since):
    with pytest.raises(CheckpointError, match=r"its model is 'other', wanted 'opt_tiny'"):
        since(verification(step("a:add"), model="other"), verification(step("a:add")))
    with pytest.raises(CheckpointError, match=r"its arithmetic is 'bfloat16', wanted 'float32'"):
        since(verification(step("a:add"), arithmetic="bfloat16"), verification(step("a:add")))


DAMAGE = {
    "no JSON": lambda record: "{",
    "a list": lambda record: [],
    "another format": lambda record: record | {"format": "other"},
    "a later version": lambda record: record | {"version": 2},
    "no cases": lambda record: {key: value for key, value in record.items() if key != "cases"},
    "cases that are none": lambda record: record | {"cases": [1]},
    "a model that is no name": lambda record: record | {"model": None},
    "a ratio that is no number": lambda record: _with(record, "ratio", "1"),
    "a ratio below 0": lambda record: _with(record, "ratio", -1.0),
    "a ratio that is NaN": lambda record: _with(record, "ratio", math.nan),
    "an ok that is no truth value": lambda record: _with(record, "ok", 1),
    "a law without a verdict": lambda record: record | {"laws": [{"name": "x"}]},
}


def _with(record, key, value):
    record["cases"][0]["steps"][0]["local"][key] = value
    return record


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_baseline_is_refused(tmp_path, name):
    path = tmp_path / "baseline.json"
    found = DAMAGE[name](as_json(verification(step("a:add"))))
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_baseline(path)


def test_a_missing_baseline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_baseline(tmp_path / "nothing.json")


# -- what a fault looks like ------------------------------------------------------------------------------------------


def looked_at(model, change, case=1, keep=lambda name: True):
    inputs = cases(model)[case].inputs
    theirs = Faulty(model, change, keep=keep).run(inputs)
    report = replay(model, inputs, theirs)
    return inputs, report, gather(model, inputs, theirs, report)


def test_the_evidence_says_where_and_shows_the_worst_place(model):
    def one_head(op, name, result):
        if name == SCORES:
            result = result.copy()
            result[1, 1, 2:4] *= 2
        return result

    _, report, found = looked_at(model, one_head)
    assert (found.step, found.error.at, found.error.axes) == (SCORES, "row 1, head 1", ("position", "key"))
    assert found.where.startswith("row 1, head 1, positions 2 to 3, keys ")
    assert found.error.error.max() >= report.first.local.error
    assert not (found.error.error[:2] > found.bound).any()
    assert found.error.error[~found.error.judged].max() == 0
    assert 0 < found.wrong <= 7
    assert found.attention.step == "layers.1.self_attention:masked_softmax"
    assert found.attention.at == "row 1, head 1"
    wrong_rows = (found.attention.error > 1e-3).any(-1)
    assert wrong_rows[2:4].any()
    assert not wrong_rows[[0, 1, *range(4, 12)]].any()
    assert found.worst[0].index[:2] == (1, 1)


def test_heads_stand_side_by_side(model):
    context = "layers.0.self_attention:attention_context"
    _, _, found = looked_at(model, times(context, 2))
    assert found.error.axes == ("position", "channel")
    assert found.error.theirs.shape == (12, 8)
    np.testing.assert_allclose(found.error.theirs[0], 2 * found.error.ours[0], rtol=1e-5)
    assert found.attention is None  # the weights are right


def test_a_wrong_mask_shows_whom_it_lets_see(model):
    _, _, found = looked_at(model, lambda op, name, x: np.ones_like(x) if op.name == "causal_mask" else x, case=0)
    assert found.where == "positions 0 to 5, keys 1 to 6"
    assert found.wrong == 21
    assert found.attention.step == "layers.0.self_attention:masked_softmax"
    assert np.triu(found.attention.theirs, 1).max() > 0.01
    assert np.triu(found.attention.ours, 1).max() == 0


@pytest.mark.parametrize(
    "name", ["layers.0:relu", "layers.0.self_attention.value:linear", "layers.0.self_attention.output:linear"]
)
def test_what_does_not_spoil_the_weights_shows_none(model, name):
    assert looked_at(model, times(name, 2))[2].attention is None


def test_values_that_are_not_numbers_are_the_worst(model):
    def nan(op, name, result):
        if name == "layers.0:relu":
            result = result.copy()
            result[0, 3, 5] = np.nan
        return result

    _, _, found = looked_at(model, nan, case=0)
    assert (found.wrong, found.worst[0].index, found.where) == (1, (0, 3, 5), "position 3, channel 5")


def test_a_wrong_shape_is_not_drawn(model):
    _, report, found = looked_at(model, lambda op, name, x: x[:, :-1] if name == "opt_logits" else x, case=0)
    assert report.first.name == "opt_logits"
    assert found is None


def test_no_more_than_a_part_is_kept(model, monkeypatch):
    monkeypatch.setattr(looks, "MAX_ROWS", 4)
    monkeypatch.setattr(looks, "MAX_COLUMNS", 3)
    _, report, found = looked_at(model, times("layers.0:add", 1.5))
    assert found.error.theirs.shape == (4, 3)
    _, t, n = found.worst[0].index
    (row, column), error = found.error.start, found.error.error
    assert row <= t < row + 4
    assert column <= n < column + 3
    assert error[t - row, n - column] == error.max()
    assert f"positions {row} to {row + 3} down, channels {column} to {column + 2} across" in page_of(report, found)


@pytest.mark.parametrize("family", ["opt", "t5", "bloom"])
def test_every_step_can_be_shown(family):
    """One run in which every step is wrong, each looked at as if it were the first."""
    model = small_model(family)
    change = lambda op, name, x: ~x if x.dtype == bool else x + 1 if x.dtype.kind in "iu" else x * x.dtype.type(1.5)  # noqa: E731
    inputs = cases(model)[1].inputs
    theirs = Faulty(model, change).run(inputs)
    report = replay(model, inputs, theirs)
    shown = set()
    for wrong in report.wrong:
        if wrong.op not in shown:
            alone = Report((wrong,))
            found = gather(model, inputs, theirs, alone)
            drawn = Page(page_of(alone, found))
            pictures = 4 if wrong.op in ("attention_scores", "masked_softmax") else 1
            assert (found.step, drawn.problems, drawn.tags.count("img")) == (wrong.name, [], pictures)
            assert 0 < found.wrong <= found.judged == wrong.judged
            assert not re.search(r"(?i)(?<![a-z])s \d|, ,|\. \.", drawn.text)
            shown.add(wrong.op)
    assert len(shown) > 15


def page_of(report, evidence):
    case = CaseResult(Case("x", {"token_ids": np.array([[1]])}), report, (), evidence)
    return page(Verification("port", "opt_tiny", "float32", (case,)))


# -- pictures ---------------------------------------------------------------------------------------------------------


def decoded(uri):
    """The pixels of a PNG that `png` wrote, chunk by chunk with its checksums."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        assert struct.unpack(">I", content[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + data)
        chunks[kind], place = data, place + 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 6, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 4 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 4)


def test_a_png_holds_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.uint8)
    np.testing.assert_array_equal(decoded(png(pixels)), pixels)


def test_an_error_is_as_opaque_as_it_is_large():
    error = np.array([[0.0, 0.9, 2.0, 100.0, math.inf, 5.0]])
    pixels = decoded(error_picture(error, 1.0, np.array([[True] * 5 + [False]])))
    alpha = pixels[0, :, 3].tolist()
    assert alpha[:2] == [0, 0]
    assert 60 < alpha[2] < alpha[3] == alpha[4] == 255
    assert pixels[0, 5].tolist() == [128, 128, 128, 70]


def test_a_difference_has_two_colours():
    pixels = decoded(difference_picture(np.array([[1.0, -2.0, 0.0]]), np.ones((1, 3), bool)))
    assert pixels[0, 0, 0] > 200 > pixels[0, 1, 0]
    assert pixels[0, :, 3].tolist() == [128, 255, 0]


def test_a_large_picture_keeps_its_extremes():
    error = np.zeros((1000, 3001))
    error[777, 3000] = 10.0
    pixels = decoded(error_picture(error, 1.0, np.ones(error.shape, bool)))
    assert pixels.shape[0] <= MAX_CELLS[0]
    assert pixels.shape[1] <= MAX_CELLS[1]
    assert pixels[777 // 4, 3000 // 6, 3] == 255
    assert (pixels[..., 3] > 0).sum() == 1


def test_the_chart_holds_every_number():
    bars = [Bar("a", 0.0, None, True), Bar("b", 1e9, 1e-30, False), Bar("<c>", math.inf, math.inf, False)]
    drawn = ElementTree.fromstring(chart(bars, "label & more"))
    places = [float(shape.get(key)) for shape in drawn.iter() for key in ("y", "cy", "y1", "height") if shape.get(key)]
    assert all(0 <= place <= float(drawn.get("height")) for place in places)
    assert [bar.get("class") for bar in drawn.iter("rect")] == ["right", "wrong", "wrong"]
    assert "\u221e" in "".join(drawn.itertext())


# -- HTML -------------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "wbr", "line", "rect", "circle"}


class Page(HTMLParser):
    """What is wrong with a page as a file that stands alone; its text."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.problems, self.words, self.tags = [], [], [], []
        self.feed(source)
        self.close()
        self.problems += [f"{tag} is left open" for tag in self.open]
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("script", "link", "iframe", "object", "base", "form"):
            self.problems.append(f"a {tag}")
        for name, value in attributes:
            if name.startswith("on") or (
                name in ("src", "href", "action", "srcset") and not value.startswith("data:image/png")
            ):
                self.problems.append(f"{tag} has {name}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            if "url(" in data or "@import" in data:
                self.problems.append("a style that loads")
        else:
            self.words.append(data)


@pytest.mark.parametrize(
    "source",
    ["<p>", "<p></b>", "<script></script>", "<img src='http://x'>", "<p onclick=x></p>", "<style>a{b:url(c)}</style>"],
)
def test_a_bad_page_is_found(source):
    assert Page(source).problems


def test_the_page_of_a_fault(scaled, tmp_path):
    write_html(scaled, tmp_path / "report.html", command="refmodels verify port:build --like opt")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.problems == []
    for words in (
        "diverges port beside opt_backbone in float32 3 of 192 steps wrong in 3 cases.",
        f"First wrong step: {SCORES}, in cases",
        "Where: in 48 of 56 values",
        "The attention of the failing head Weights of layers.1.self_attention:masked_softmax, row 0, head 1.",
        "Theirs less ours",
        'Case "padded on the left": token_ids 3 x 12',
        "Facts packageport 1.0",
        "refmodels verify port:build --like opt",
        "'token_ids': np.array([[",
    ):
        assert words in found.text
    assert found.tags.count("img") == 4
    assert found.tags.count("svg") == 3


def test_the_page_where_all_is_right():
    found = Page(page(verification(step("layers.0:add"), laws=(KEPT, UNTRIED))))
    assert found.problems == []
    assert "agrees port beside opt_tiny" in found.text
    assert "What is wrong" not in found.text
    assert "not triedit takes one row" in found.text


def hostile():
    bad = step(f"{HOSTILE}:add", 3.0)
    inputs = {HOSTILE: np.array([[3]])}
    laws = (LawResult(HOSTILE, Verdict(False, HOSTILE)), LawResult(HOSTILE, None, HOSTILE))
    report = Report(
        (bad, step(f"layers.0.{HOSTILE}:add"), step("layers.0:add")), (HOSTILE,), (HOSTILE,), facts={HOSTILE: HOSTILE}
    )
    case = CaseResult(Case(HOSTILE, inputs), report, (Finding(HOSTILE, HOSTILE, HOSTILE, 0.5),))
    return Verification(HOSTILE, HOSTILE, "float32", (case,), laws, {HOSTILE: HOSTILE})


def test_hostile_names_do_nothing_on_a_terminal():
    said = table(hostile(), width=100, all_steps=True)
    assert all(character.isprintable() or character == "\n" for character in said)
    assert max(map(len, said.splitlines())) < 1000


def test_hostile_names_do_nothing_on_a_page(tmp_path):
    write_html(hostile(), tmp_path / "report.html", command=HOSTILE)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Page(source)
    assert found.problems == []
    assert "<script>alert('1')" in found.text  # as words
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\ud800-\udfff]", source)


def test_hostile_names_stay_in_their_files(tmp_path):
    write_junit(hostile(), tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("failures") == "2"
    write_report(hostile(), tmp_path / "baseline.json")
    assert worse_than(hostile(), read_baseline(tmp_path / "baseline.json")) == []


@pytest.mark.parametrize(
    ("text", "most", "said"),
    [
        ("plain", 5, "plain"),
        ("a\x1bb\n", 20, r"a\x1bb\n"),
        ("\u202e\ud800", 20, r"\u202e\ud800"),
        ("abcdefghij", 7, "ab...ij"),
        ("\0" * 10**6, 20, r"\x00\x00\...\x00\x00"),
    ],
)
def test_printable(text, most, said):
    found = printable(text, most)
    assert len(found) <= most
    assert found == said


# -- a real browser ---------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)

FRAMES = """<!doctype html><body>{}<script>
onload = () => {{
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
    const view = frame.contentWindow, root = view.document.documentElement, images = [...view.document.images];
    view.document.querySelectorAll("details").forEach(part => part.open = true);
    return [root.scrollWidth, view.innerWidth, root.scrollHeight, images.filter(image => image.naturalWidth > 0).length];
  }}));
}}
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_nothing_runs_over_in_a_browser(scaled, tmp_path):
    pages = [
        page(scaled),
        page(hostile(), command=HOSTILE),
        page(verification(*STEPS)).replace("<h2>", '<h2 style="width:2000px">'),
    ]
    frames = [
        f'<iframe srcdoc="{html.escape(source)}" width="{width}" height="900" style="border:0"></iframe>'
        for source in pages
        for width in (390, 1280)
    ]
    (tmp_path / "frames.html").write_text(FRAMES.format("".join(frames)), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,900",
    ]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"{BROWSER} does not run here: {done.stderr[-300:]}")
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    for (_, inner, height, _), width in zip(found, [390, 1280] * 3, strict=True):
        assert inner == width
        assert height > 900
    assert [scrolled <= inner for scrolled, inner, _, _ in found] == [True] * 4 + [False] * 2  # the last is made to run over
    assert [images for *_, images in found] == [4, 4, 0, 0, 0, 0]
