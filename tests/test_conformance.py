"""The conformance suite is itself tested: planted kernels, the features that it must not miss, its command.

python tests/test_conformance.py --examples 10000       every right kernel with so many examples; prints how many are rejected
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from ahead import FLAWS, FourAhead
from hypothesis import HealthCheck, given, settings
from planted import RIGHT, WRONG

sys.path.insert(0, str(Path(__file__).parent))

from loopback import Loopback

import refmodels
from refmodels.accelerator import Accelerator, AcceleratorError
from refmodels.cli import main
from refmodels.conformance import cases, check_accelerator, check_op, examine, reproduce
from refmodels.conformance.cases import draw_case, is_known
from refmodels.conformance.drawing import LAYOUTS, Unsuitable, encoded, of_kind, random_source, replayed
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.op import OPS
from refmodels.opdoc import table
from refmodels.ops.elementwise import relu
from refmodels.ops.linear import linear
from refmodels.ops.norm import layer_norm
from refmodels.opt import opt_decode_step

OURS = [op for op in table() if op.__module__.startswith("refmodels.")]


def check(planted, **options):
    return check_op(
        planted.op,
        planted.make(),
        planted.dtype,
        tiles=planted.tiles,
        when=planted.when,
        invariant=planted.invariant,
        **options,
    )


# -- planted kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", WRONG, ids=lambda planted: planted.name)
def test_wrong_kernel_is_rejected(planted):
    with pytest.raises(AssertionError) as caught:
        check(planted, shrink=False)
    assert "took none" not in str(caught.value)


@pytest.mark.parametrize("planted", RIGHT, ids=lambda planted: planted.name)
def test_right_kernel_is_accepted(planted):
    assert check(planted).taken > 20


def test_there_are_enough_of_them():
    assert len(WRONG) >= 60
    assert len(RIGHT) >= 15
    for entries in (WRONG, RIGHT):
        assert len({planted.name for planted in entries}) == len(entries)
    assert len({planted.op for planted in WRONG}) >= 50


# -- nothing is right for want of examples ------------------------------------------------------------------------------------


def drawn(op, kind, count, dtype="float32"):
    source, found = random_source(len(op.name)), []
    for _ in range(5 * count):
        try:
            found.append(draw_case(op, of_kind(kind, source), dtype))
        except Unsuitable:
            continue
        if len(found) == count:
            break
    return found


def features(op, kind="usual", count=60):
    return Counter(feature for case in drawn(op, kind, count) for feature in case.features)


@pytest.mark.parametrize("op", OURS, ids=lambda op: op.name)
def test_every_op_has_examples_of_every_kind(op):
    assert is_known(op)
    usual = drawn(op, "usual", 20)
    assert len(usual) == 20
    if op.name == "alibi_slopes":  # a number alone
        return
    assert all("empty" in case.features for case in drawn(op, "empty", 3))
    assert all("long" in case.features for case in drawn(op, "long", 2))


@pytest.mark.parametrize("name", ["linear", "layer_norm", "attention", "masked_softmax", "add", "quantize_rows", "linear_int4"])
def test_layouts_and_numbers(name):
    found = features(OPS[name])
    assert set(LAYOUTS) <= found.keys()
    assert found["tile"] > 10
    if name not in ("linear_int4", "quantize_rows"):
        assert found["subnormal"] > 5 or name == "masked_softmax"


@pytest.mark.parametrize(
    "name", ["attention", "masked_softmax", "t5_encoder", "t5_cross_attention", "opt_backbone", "t5_decoder"]
)
def test_masks(name):
    found = features(OPS[name])
    assert found["ragged"] > 5
    assert found["fully masked"] > 3


@pytest.mark.parametrize("name", ["opt_decoder_layer", "opt_decode_step", "bloom_backbone", "t5_prefill"])
def test_models_of_every_form(name):
    found = features(OPS[name], count=80)
    assert min(found[form] for form in ("int8", "weight_int8", "int4", "adapter")) > 3
    assert found["cache"] > 20


@pytest.mark.parametrize("name", ["relu", "add", "embedding", "masked_softmax", "penalise_repetition", "cache_append"])
def test_infinities_and_nan_where_they_are_allowed(name):
    assert features(OPS[name])["not finite"] > 3 or name == "embedding"


def test_an_example_is_its_code():
    for op in OURS:
        for case in drawn(op, "usual", 3):
            again = draw_case(op, replayed(case.code), "float32")
            assert again.code == case.code
            one, other = (np.concatenate([np.zeros(1), *leaves(c.inputs)]) for c in (case, again))
            np.testing.assert_array_equal(one, other)


def leaves(value):
    if isinstance(value, dict | list | tuple):
        return [leaf for child in (value.values() if isinstance(value, dict) else value) for leaf in leaves(child)]
    return [value.astype(np.float64).ravel()] if isinstance(value, np.ndarray) else []


def test_codes():
    assert encoded([0, 3, 10, 0, 0]) == "0.3.10"
    assert encoded([0, 0]) == "0"
    source = replayed("2.5")
    assert [source(9), source(3), source(7)] == [2, 2, 0]
    with pytest.raises(ValueError, match=r"got 'x\.1'"):
        replayed("x.1")


# -- one kernel ---------------------------------------------------------------------------------------------------------------


def misses_the_tail(x, kernel, bias=None, *, dtype=None):
    y = linear.reference(x, kernel, bias, dtype=dtype).copy()
    if y.shape[-1] > 16:
        y[..., 16:] = 0
    return y


def test_a_failure_is_small_and_can_be_seen_again():
    with pytest.raises(AssertionError) as caught:
        check_op(linear, misses_the_tail, "float32")
    text = str(caught.value)
    assert "kernel = float32 (1, 17)" in text
    assert "16): got 0.0, wanted" in text
    code = text.rpartition("example='")[2].partition("'")[0]
    with pytest.raises(AssertionError, match=r"kernel = float32 \(1, 17\)"):
        check_op(linear, misses_the_tail, "float32", example=code)
    check_op(linear, linear.reference, "float32", example=code)


def test_the_same_examples_every_time():
    texts = []
    for _ in range(2):
        with pytest.raises(AssertionError) as caught:
            check_op(linear, misses_the_tail, "float32", shrink=False)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_kernel_that_takes_nothing_is_not_right():
    with pytest.raises(AssertionError, match=r"relu: the kernel took none of 100 calls: too slow"):
        check_op(relu, relu.reference, when=lambda x: "too slow")


@given(case=cases(layer_norm, "bfloat16"))
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_the_strategy_in_somebodys_own_test(case):
    assert examine(case, Accelerator("nothing")).kernel_calls == 0
    assert case.inputs["x"].dtype.name == "bfloat16"


def test_an_accelerator_that_claims_the_same_bits_is_held_to_it():
    def depends_on_the_batch(x, kernel, bias=None, *, dtype=None):
        y = linear.reference(x, kernel, bias, dtype=dtype)
        rows = y.size // max(y.shape[-1], 1)
        return np.nextafter(y, np.float32(np.inf)) if rows == 1 and y.dtype == np.float32 else y

    check_op(linear, depends_on_the_batch, "float32")
    with pytest.raises(AssertionError, match="alone gives other bits"):
        check_op(linear, depends_on_the_batch, "float32", invariant=True)


# -- whole accelerators -------------------------------------------------------------------------------------------------------


def test_opaque_arrays_pass():
    names = [
        "linear",
        "attention",
        "cache_*",
        "dense",
        "sample_token",
        "opt_decode_step",
        "t5_decoder",
        "bloom/decode",
        "t5/chunks",
    ]
    report = check_accelerator(Loopback(), ops=names, dtypes=["float32", "bfloat16"], examples=12)
    assert [(entry.name, entry.failures) for entry in report if entry.verdict != "right"] == []
    assert len(report) == 11


def test_laws_of_models_find_what_no_op_shows():
    """A step that is right at every place but the third: no example of the law of chunks passes."""
    accelerator = Accelerator("forgets", dtypes=("float32",))

    @accelerator.kernel(opt_decode_step)
    def forgets(token_ids, padding_mask, positions, params, cache, config):
        scores = opt_decode_step.reference(token_ids, padding_mask, positions, params, cache, config)
        return scores * scores.dtype.type(1.01) if (np.asarray(positions) > 3).any() else scores

    (entry,) = check_accelerator(accelerator, ops=["opt/decode"], examples=30)
    assert entry.verdict == "WRONG"
    assert "--op opt/decode --dtype float32 --example" in entry.failures[0].reproduce
    code = entry.failures[0].example
    with pytest.raises(AssertionError, match="opt/decode"):
        reproduce(accelerator, "opt/decode", "float32", code)


def test_bits_of_models_are_held_to_the_claim():
    report = check_accelerator(Accelerator("claims", invariant=True, dtypes=("float32",)), ops=["opt/batch"], examples=200)
    assert "other" in report[0].failures[0].reason or "not the same bits" in report[0].failures[0].reason


@pytest.mark.parametrize("family", ["opt", "bloom", "t5"])
def test_tokens_ahead_are_held_to_the_steps(family):
    name = f"{family}/ahead"
    (entry,) = check_accelerator(FourAhead(), ops=[name], examples=30)
    assert (entry.failures, entry.taken) == ([], entry.examples)
    for flaw in FLAWS:
        (entry,) = check_accelerator(FourAhead(flaw=flaw), ops=[name], examples=30, shrink=False)
        assert entry.verdict == "WRONG", flaw


def test_the_law_of_tokens_ahead_is_for_those_that_choose_some():
    with pytest.raises(ValueError, match="no op or law is named 'opt/ahead'"):
        check_accelerator(Accelerator("one by one"), ops=["opt/ahead"])


def test_what_is_asked_for_must_be_there():
    accelerator = Accelerator("half", dtypes=("float16",))
    with pytest.raises(ValueError, match="no op or law is named 'nope'"):
        check_accelerator(accelerator, ops=["nope"])
    with pytest.raises(ValueError, match="'float64' is not one that half claims: float16"):
        check_accelerator(accelerator, dtypes=["float64"])
    with pytest.raises(ValueError, match="an example is that of one op"):
        check_accelerator(accelerator, ops=["relu", "gelu"], example="0")
    with pytest.raises(ValueError, match="no op or law is named"):
        reproduce(accelerator, "nope", "float16", "0")
    assert check_accelerator(accelerator, ops=["relu"], examples=5)[0].dtypes == ["float16"]


def test_a_strict_accelerator_without_the_kernel_is_not_wrong():
    class Foreign(Accelerator):
        def asarray(self, x):
            return type("Device", (), {"values": x, "shape": x.shape, "dtype": x.dtype})()

        def asnumpy(self, x):
            return getattr(x, "values", x)

    (entry,) = check_accelerator(Foreign("device", strict=True), ops=["relu"], examples=5)
    assert entry.verdict == "skipped"
    assert "no kernel for relu" in entry.skipped


# -- the command --------------------------------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np
from refmodels import Accelerator
from refmodels.ops.elementwise import relu, silu

right = Accelerator("right", dtypes=("float32",))
wrong = Accelerator("wrong", dtypes=("float32",))
absent = Accelerator("absent")
absent.missing = lambda: "no device"


@right.kernel(relu)
def whole(x):
    return np.maximum(x, 0)


@wrong.kernel(relu)
def leaky(x):
    return np.where(x > 0, x, x.dtype.type(0.01) * x)
"""
ENTRIES = {"right": "right", "wrong": "wrong", "absent": "absent"}


def test_right_is_0(plugin, capsys):
    plugin(PLUGIN, ENTRIES)
    assert main(["check", "--accelerator", "right", "--op", "relu", "--op", "sil*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "RUNS", "TYPES", "EXAMPLES", "BY", "KERNEL", "VERDICT"]
    assert lines[1].split()[:4] == ["relu", "own", "kernel", "float32"]
    assert lines[1].endswith("100        100  right")
    assert lines[2].split() == ["silu", "reference", "float32", "10", "right"]
    assert lines[3] == "right: 2 right, 0 wrong; 110 examples"


def test_wrong_is_1_and_the_line_to_paste_shows_it_again(plugin, capsys, tmp_path):
    plugin(PLUGIN, ENTRIES)
    assert main(["check", "--accelerator", "wrong", "--op", "relu"]) == 1
    shown = capsys.readouterr().out
    line = next(line.strip() for line in shown.splitlines() if line.strip().startswith("refmodels check --accelerator"))
    assert "relu, float32: relu: " in shown
    done = subprocess.run(
        [sys.executable, "-m", *line.split()],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(tmp_path),
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert shown.splitlines()[3] in done.stdout


def environment(directory):
    import os

    root = str(Path(refmodels.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), root])}


def test_json(plugin, capsys):
    plugin(PLUGIN, ENTRIES)
    assert main(["check", "--accelerator", "wrong", "--op", "relu", "--dtype", "float32", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert (record["accelerator"], record["right"]) == ("wrong", False)
    (entry,) = record["checked"]
    assert (entry["verdict"], entry["runs"], entry["dtypes"]) == ("WRONG", "own kernel", ["float32"])
    assert entry["failures"][0]["law"] == "values"
    assert entry["failures"][0]["reproduce"].endswith(entry["failures"][0]["example"])


def test_junit(plugin, capsys, tmp_path):
    plugin(PLUGIN, ENTRIES)
    path = tmp_path / "report.xml"
    assert main(["check", "--accelerator", "wrong", "--op", "relu", "--op", "silu", "--junit", str(path)]) == 1
    suite = ElementTree.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "1", "0")
    (failed,) = suite.findall("testcase/failure")
    assert "refmodels check --accelerator wrong --op relu" in failed.text
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".report")] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--accelerator", "nope"], "no accelerator 'nope' is installed"),
        (["--accelerator", "absent"], "accelerator 'absent' cannot run here: no device"),
        (["--accelerator", "right", "--op", "nope"], "no op or law is named 'nope'"),
        (["--accelerator", "right", "--dtype", "float64"], "dtype 'float64' is not one that right claims"),
        (["--accelerator", "right", "--op", "relu", "--example", "x"], "example must be numbers with dots"),
        (["--op", "relu"], "required: --accelerator"),
    ],
)
def test_what_cannot_be_checked_is_2(plugin, capsys, arguments, said):
    plugin(PLUGIN, ENTRIES)
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_checking_the_reference_finds_nothing():
    names = ["layer_norm", "dense", "bloom_decoder_layer", "t5_logits", "opt/padding"]
    report = check_accelerator("reference", ops=names, examples=20)
    assert all(entry.verdict == "right" and set(entry.dtypes) == set(UNIT_ROUNDOFF) for entry in report)
    with pytest.raises(AcceleratorError):
        check_accelerator("nope")


def command(argv=None):
    """Try every right kernel with many examples: none may be rejected."""
    parser = argparse.ArgumentParser(description=command.__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--kernel", default="", help="those alone whose names have this in them")
    arguments = parser.parse_args(argv)
    chosen, rejected = [planted for planted in RIGHT if arguments.kernel in planted.name], 0
    for planted in chosen:
        begun = time.monotonic()
        try:
            verdict = f"{check(planted, examples=arguments.examples).taken} calls, none rejected"
        except AssertionError as error:
            rejected, verdict = rejected + 1, f"REJECTED\n{error}"
        print(f"{planted.name} ({planted.dtype}): {verdict}, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"right kernels: {rejected} of {len(chosen)} rejected in {arguments.examples} examples each")
    return int(rejected > 0)


if __name__ == "__main__":
    sys.exit(command())
