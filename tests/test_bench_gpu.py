"""`refmodels bench --peers` without a GPU: who is divided by whom, sides that fail, our side, the limits, the document.

The other side, Transformers, runs where it is installed: `tests/peers/test_peer_bench.py`.
"""

import json
import os
import re
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from emulated import Emulated
from refmodels_cupy import limits
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.source import DIRECTORY

from refmodels.backbone import Backbone
from refmodels.bench import bytes_per_step, prefill_flops
from refmodels.bench_peers import (
    AIMED,
    AIMS,
    COMPILED,
    EAGER,
    INTEGERS,
    LIMIT,
    OURS,
    Figure,
    Measured,
    Plan,
    Side,
    measure,
    measure_shape,
    ratio,
    result_of,
)
from refmodels.bench_worker import Job, Refmodels, Work, drawn_quickly
from refmodels.cli import bench_peers, main
from refmodels.opt import OPTBackbone
from refmodels.parameters import flatten
from refmodels.t5 import T5Backbone

SPEC = (Path(__file__).parents[1] / "spec" / "bench.md").read_text(encoding="utf-8")
SMALL = {"vocabulary_size": 40, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
PLAN = Plan(repeats=2, decode_after=4, fewer=2, more=4, prefill=16, encode=(2, 8), batch=3, most_seconds=60)
READS, MULTIPLIES = 1e6, 1e9


def quiet(line):
    pass


# -- who is divided by whom --------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds_in_which_both_were_measured():
    speeds = {("a", "x"): [10.0, None, 30.0, 80.0], ("b", "x"): [5.0, 1.0, 10.0, 20.0]}
    assert ratio(speeds, ("a", "x"), ("b", "x")) == 3.0  # of 2, 3 and 4
    assert ratio(speeds, ("b", "x"), ("a", "x")) == pytest.approx(1 / 3)
    assert ratio(speeds, ("a", "x"), ("nobody", "x")) is None


def test_each_aim_is_the_ratio_that_it_names():
    speeds = {
        (OURS, "decode 1"): [100.0], (OURS, "decode 32"): [2400.0], (OURS, "prefill"): [700.0], (OURS, "encode"): [90.0],
        (INTEGERS, "decode 1"): [170.0], (EAGER, "decode 1"): [25.0], (COMPILED, "decode 1"): [80.0], (EAGER, "encode"): [50.0],
        (LIMIT, "decode 1"): [125.0], (LIMIT, "prefill"): [1000.0],
    }  # fmt: skip
    result = result_of([Measured("a shape", [], speeds)], Plan(), 1.0, AIMS)
    reached = [(aim["wanted"], aim["reached"], aim["met"]) for aim in result["aims"]]
    assert reached == [
        (0.8, 0.8, True), (3.0, 4.0, True), (1.3, 1.25, False), (1.6, 1.7, True), (0.7, 0.7, True), (1.5, 1.8, True),
        (20.0, 24.0, True),
    ]  # fmt: skip
    nothing = result_of([], Plan(), 1.0, AIMS)["aims"]
    assert [(aim["reached"], aim["met"]) for aim in nothing] == [(None, False)] * len(AIMS)


def test_the_shapes_with_aims_have_every_figure_that_an_aim_names():
    series = {LIMIT: {"decode 1", "prefill"}}
    for preset in AIMED:
        shape = Backbone.from_preset(preset, load_weights=False)
        for side in Plan().sides(shape, preset, "cupy", "cuda"):
            series.setdefault(side.name, set()).update(side.wanted)
    assert all(figure in series[system] for aim in AIMS for system, figure in (aim.over, aim.under))


def test_a_step_is_the_difference_of_two_generations():
    shape = OPTBackbone(**SMALL, max_sequence_length=12)
    figures = PLAN.figures(shape)
    assert figures["decode 3"] == Figure(Work("generate", 3, 4, 6), 12, without=Work("generate", 3, 4, 2))
    assert figures["prefill"] == Figure(Work("generate", 1, 12, 1), 12)  # it has no more positions
    assert PLAN.figures(T5Backbone(**SMALL)) == {"encode": Figure(Work("encode", 2, 8), 16)}


# -- sides, in processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandIn(Job):
    """A system that says how long it took, and fails where it is told to."""

    rate: float = 1.0
    fails: str = ""

    def made(self):
        if self.fails == "start":
            raise ImportError("No module named 'torch'")
        return self

    def seconds(self, work):
        if self.fails == "prefill" and work.new_tokens == 1:
            raise MemoryError("of the device")
        if self.fails == "dies":
            os._exit(3)
        if self.fails == "hangs":
            time.sleep(600)
        tokens = work.batch * (work.new_tokens if work.new_tokens > 1 else work.length)
        return 100 * (work.new_tokens > 1) + tokens / self.rate

    def limits(self):
        return READS, MULTIPLIES

    def about(self):
        return {"torch": "9.9", "device": "a stand-in"} if self.system == "refmodels" else {"torch": "9.9"}


@pytest.fixture
def stand_ins(monkeypatch):
    """`stand_ins({OURS: {"rate": 8.0}, EAGER: {"fails": "start"}})`: these in place of the systems."""

    def replaced(options):
        real = Plan.sides

        def sides(plan, shape, preset, accelerator, device):
            found = real(plan, shape, preset, accelerator, device)
            jobs = [StandIn(*astuple(side.job), **options[side.name]) for side in found if side.name in options]
            names = [side for side in found if side.name in options]
            return [replace(side, job=job) for side, job in zip(names, jobs, strict=True)]

        monkeypatch.setattr(Plan, "sides", sides)

    return replaced


def test_one_that_fails_does_not_spoil_the_rest(stand_ins):
    stand_ins(
        {
            OURS: {"rate": 8.0, "fails": "prefill"},
            EAGER: {"rate": 2.0},
            INTEGERS: {"fails": "dies"},
            COMPILED: {"fails": "start"},
        }
    )
    shape = Backbone.from_preset("opt_tiny_stdlib", load_weights=False, dtype="bfloat16")
    found = measure_shape("opt_tiny_stdlib", PLAN, "cupy", "cuda", time.monotonic() + 60, quiet)
    result = result_of([found], PLAN, 1.0, ())
    speeds = {(figure["system"], figure["figure"]): figure["tokens_per_second"] for figure in result["figures"]}
    assert speeds[OURS, "decode 1"] == pytest.approx(8.0)
    assert speeds[OURS, "decode 3"] == pytest.approx(8.0)
    assert speeds[EAGER, "prefill"] == pytest.approx(2.0)
    assert speeds[OURS, "prefill"] is speeds[INTEGERS, "decode 1"] is speeds[COMPILED, "decode 1"] is None
    assert speeds[LIMIT, "decode 3"] == pytest.approx(3 * READS / bytes_per_step(shape))
    assert speeds[LIMIT, "prefill"] == pytest.approx(16 * MULTIPLIES / prefill_flops(shape, 16))
    beside = {(figure["system"], figure["figure"]): figure["ours_over_this"] for figure in result["figures"]}
    assert beside[EAGER, "decode 1"] == pytest.approx(4.0)
    assert [(gap["system"], gap["figures"], gap["reason"]) for gap in result["left_out"]] == [
        (OURS, ["prefill"], "MemoryError: of the device"),
        (INTEGERS, ["decode 1"], "its process ended with status 3"),
        (COMPILED, ["decode 1"], "ImportError: No module named 'torch'"),
    ]
    assert result["hardware"] == {"device": "a stand-in"}
    assert result["versions"] == {"torch": "9.9"}


def test_one_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr("refmodels.bench_peers.GRACE", 0.1)
    side = Side("hanging", StandIn("refmodels", "", "bfloat16", "", fails="hangs"), ("prefill",))
    worker = side.started(time.monotonic() + 60)
    assert side.about["device"] == "a stand-in"
    worker.ask("seconds", Work("generate", 1, 5, 1))
    with pytest.raises(RuntimeError, match="not done when the time was up"):
        worker.answer(time.monotonic() + 0.2)
    side.fail(["prefill"], "it hangs")
    assert (side.left, side.worker) == ([], None)
    worker.ask("limits")
    with pytest.raises(RuntimeError, match="its process ended"):
        worker.answer(time.monotonic() + 1)


def test_a_run_without_time_ends_at_once(stand_ins):
    stand_ins({OURS: {}, EAGER: {}})
    began = time.monotonic()
    result = measure(["t5_tiny_numbers"], replace(PLAN, most_seconds=0), "cupy", "cuda", quiet)
    assert time.monotonic() - began < 30
    assert [(gap["system"], gap["reason"]) for gap in result["left_out"]] == [
        (OURS, "not done when the time was up"),
        (EAGER, "not done when the time was up"),
    ]


# -- our side ----------------------------------------------------------------------------------------------------------------


def test_our_side_on_the_emulated_device(tmp_path):
    sources = {file.name: file.read_text() for file in DIRECTORY.glob("*.cu")}  # compiled are then the few forms that run
    accelerator = Cupy(Emulated(tmp_path, orders=(0,), sources=sources))
    ours = Refmodels(T5Backbone(**SMALL, dtype="bfloat16"), accelerator)
    assert ours.seconds(Work("encode", 2, 8)) > 0
    assert accelerator.crossings == {}
    assert ours.about()["device"] == "emulation"


def test_our_side_generates():
    ours = Refmodels(OPTBackbone(**SMALL, dtype="bfloat16"), None)
    assert ours.seconds(Work("generate", 2, 5, 3)) > 0
    assert set(ours.about()) == {"refmodels", "numpy"}
    with pytest.raises(RuntimeError, match="no hardware of its own"):
        ours.limits()


def test_the_limits_of_a_device(monkeypatch):
    took = iter((0.25, 1.0, 0.5))  # for a sum, a copy, a product
    monkeypatch.setattr(limits, "seconds", lambda device, work: next(took))
    assert limits.measured(Emulated(None), size=2**12, matrix=64) == (2**14, 2 * 64**3 / 0.5)
    took = iter((1.0, 0.25, 0.5))
    assert limits.measured(Emulated(None), size=2**12, matrix=64)[0] == 2**15
    monkeypatch.undo()
    assert all(0 < limit < np.inf for limit in limits.measured(Emulated(None), size=2**12, matrix=64))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8_from_bfloat16"])
@pytest.mark.parametrize("model", [OPTBackbone, T5Backbone])
def test_weights_that_are_drawn_quickly_make_a_model(model, dtype):
    shape = model(**SMALL, dtype=dtype)
    tree = drawn_quickly(shape)
    assert not any(leaf.flags.writeable and leaf.ndim == 2 for _, leaf in flatten(tree))  # as layers share them
    backbone = model(**SMALL, dtype=dtype)
    backbone.adopt(tree)
    ids = np.arange(6)[None]
    inputs = {"token_ids": ids} if model is OPTBackbone else {"encoder_token_ids": ids, "decoder_token_ids": ids}
    found = backbone(inputs)
    hidden = found if model is OPTBackbone else found["decoder_sequence_output"]
    assert np.isfinite(hidden.astype(np.float32)).all()
    assert hidden.astype(np.float32).std() > 0.01


# -- the command -------------------------------------------------------------------------------------------------------------

PLUGIN = """
from refmodels.accelerator import Accelerator
class OnDevice(Accelerator):
    def hardware(self):
        return {"device": "a stand-in", "memory": "1.0 GB"}
class Absent(OnDevice):
    def missing(self):
        return "no NVIDIA driver is installed here"
here, absent = OnDevice("here"), Absent("absent")
"""


@pytest.fixture
def run(capsys, plugin, monkeypatch):
    """`run("--peers", ...)`: exit status and both streams; `measure` is not to be called unless it is replaced."""
    plugin(PLUGIN, {"here": "here", "absent": "absent"})
    monkeypatch.setattr(bench_peers, "measure", lambda *_: pytest.fail("work was begun"))

    def call(*arguments):
        status = main(["bench", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "--accelerator", "absent"], "'absent' cannot run here: no NVIDIA driver is installed here"),
        (["--peers", "--accelerator", "reference"], "measures on a GPU, and reference runs on the processor"),
        (["--peers", "--accelerator", "here", "--batch", "4"], "leave out --batch"),
        (["--peers", "--accelerator", "here", "--dtype", "float16"], "leave out --dtype"),
        (["--peers", "--accelerator", "here", "--write", "nowhere/gpu.md"], "nowhere is no directory"),
        (["opt_tiny_stdlib", "--accelerator", "reference", "--write", "gpu.md"], "--write goes with --peers"),
    ],
)
def test_a_refusal_is_one_line_before_any_work(run, arguments, said):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("refmodels: error: ")
    assert said in err


@pytest.fixture
def result():
    """A run that went well, but for one peer."""
    speeds = {(OURS, "decode 1"): [100.0, 110.0], (EAGER, "decode 1"): [25.0, 25.0], (COMPILED, "decode 1"): [None, None]}
    sides = [Side(OURS, None, (), about={"device": "a stand-in", "refmodels": "0.1"})]
    sides.append(Side(COMPILED, None, (), problems={"decode 1": "ImportError: no torch"}))
    return result_of([Measured("opt_6.7b_en", sides, speeds, [(4e12, 7e14), (4.2e12, 7e14)])], Plan(), 123.0, AIMS)


def test_the_json_object_is_the_documented_one(run, result, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_peers, "measure", lambda presets, *_: result)
    path = tmp_path / "gpu.md"
    status, out, err = run("--peers", "--accelerator", "here", "--json", "--write", str(path))
    assert (status, err) == (0, f"refmodels: written to {path}\n")
    found = json.loads(out)
    table = SPEC.partition("### The JSON object of a run beside the peers")[2].splitlines()
    rows = [line.split("|")[1:3] for line in table if line.startswith("| `")]
    assert set(found) == {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    explained = {re.findall(r"`(\w+)`", names)[0]: set(re.findall(r"`(\w+)`", values)) for names, values in rows}
    for name in ("aims", "figures", "left_out", "limits"):
        assert all(set(entry) == explained[name] for entry in found[name]), name


def test_the_run_of_the_aims_is_written_where_it_is_kept(run, result, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench_peers, "measure", lambda presets, plan, name, *_: asked.append((presets, name)) or result)
    monkeypatch.setattr(bench_peers, "DOCUMENT", tmp_path / "gpu.md")
    status, out, _ = run("--peers", "--accelerator", "here")
    assert (status, asked) == (0, [(AIMED, "here")])
    assert re.search(r"^decode, batch 1, beside Transformers, eager +3\.00 +4\.20 +met$", out, re.MULTILINE)
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith(bench_peers.HEADER)
    assert "No run has been made" not in text
    assert "- device: a stand-in\n" in text
    assert (
        "- its limits, from round to round: memory 4,000 to 4,200 GB/s, products of bfloat16 matrices 700 to 700 TFLOP/s"
        in text
    )
    assert "| decode, batch 1, beside Transformers, eager | 3.00 | 4.20 | met |\n" in text
    assert "| T5's encoder, beside Transformers, eager | 1.50 |  | not measured |\n" in text
    assert "| opt_6.7b_en | refmodels | decode 1 | 105.0 | 100.0 | 110.0 |  |\n" in text
    assert "| opt_6.7b_en | transformers | decode 1 | 25.0 | 25.0 | 25.0 | 4.20 |\n" in text
    assert text.endswith("Left out:\n\n- opt_6.7b_en, transformers, compiled: decode 1: ImportError: no torch\n")
    (tmp_path / "gpu.md").unlink()
    assert run("opt_tiny_stdlib", "--peers", "--accelerator", "here")[0] == 0
    assert asked[-1] == (("opt_tiny_stdlib",), "here")
    assert not (tmp_path / "gpu.md").exists()


def test_the_kept_document_says_whether_there_has_been_a_run():
    text = bench_peers.DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(bench_peers.HEADER)
    assert text == bench_peers.document(None) or "- device: " in text
