"""`refmodels ops` and `refmodels accelerators`: what they say is so."""

import json
import sys

import numpy as np
import pytest

from refmodels import BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM
from refmodels.accelerator import Accelerator
from refmodels.cli import main
from refmodels.coverage import COMPOSITE, OWN, REFERENCE, coverage, inner_ops
from refmodels.op import OPS, watching
from refmodels.opdoc import modules, table
from refmodels.ops.attention import attention, masked_softmax
from refmodels.ops.dense import dense
from refmodels.ops.elementwise import add, gelu, relu
from refmodels.ops.linear import linear
from refmodels.ops.norm import layer_norm
from refmodels.opt import opt_decode_step, opt_decoder_layer
from refmodels.t5 import ACTIVATIONS, t5_feedforward

SMALL = {"vocabulary_size": 11, "num_layers": 2, "num_heads": 2, "hidden_dim": 4, "intermediate_dim": 6, "seed": 1}


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = main(arguments)
        return status, *capsys.readouterr()

    return run


# -- which ops are inside which -----------------------------------------------------------------------------------------


def calls_seen():
    """(composite, op called directly in its body) for every such call while all models run, generate and are quantised."""
    seen, stack = set(), []

    def observer(op, args, kwargs, proceed):
        if stack:
            seen.add((stack[-1], op.name))
        stack.append(op.name)
        try:
            return proceed()
        finally:
            stack.pop()

    tokens = {"token_ids": [[1, 2, 3]]}
    both = {"encoder_token_ids": [[1, 2, 3]], "decoder_token_ids": [[1, 2]]}
    with watching(observer):
        for tied in (True, False):
            for quantised in (None, "int8", "int4"):
                tasks = [
                    (OPTCausalLM(OPTBackbone(**SMALL, word_embed_proj_dim=8, tie_embedding_weights=tied)), tokens),
                    (BloomCausalLM(BloomBackbone(**SMALL, tie_embedding_weights=tied)), tokens),
                    (T5Seq2SeqLM(T5Backbone(**SMALL, tie_embedding_weights=tied, activation="gelu")), both),
                ]
                for task, inputs in tasks:
                    if quantised:
                        task.backbone.quantize(quantised)
                    task.backbone.enable_lora(2)
                    task.backbone(inputs)
                    text = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
                    task.generate(text, max_new_tokens=2, stop_token_ids=None)
    return seen


def test_every_call_that_is_seen_is_known_beforehand():
    known = {(op.name, inner.name) for op in OPS.values() for inner in inner_ops(op)}
    seen = {(outer, inner) for outer, inner in calls_seen() if OPS[outer].composite}
    assert seen - known == set()
    never = known - seen  # what no model here took: other activations, weights for int8 alone
    assert len(seen) > 90
    assert len(never) < 15, never


def test_inner_ops():
    assert inner_ops(linear) == []
    assert {op.name for op in inner_ops(attention)} == {"attention_scores", "masked_softmax", "dropout", "attention_context"}
    assert set(ACTIVATIONS.values()) < set(inner_ops(t5_feedforward))  # through the table
    assert dense in inner_ops(OPS["t5_keys_values"])  # in a comprehension


# -- what runs where ----------------------------------------------------------------------------------------------------


def found(accelerator):
    return {entry.op: entry for entry in coverage(accelerator)}


def test_an_accelerator_with_nothing():
    entries = found(Accelerator("nothing"))
    assert list(entries) == table()
    assert {entry.runs for entry in entries.values()} == {REFERENCE}
    assert entries[add].why == "no kernel"
    assert entries[attention].why == "no kernel, nor for any of the 4 ops inside"


def only_floats(x):
    """Floats alone.

    More of it.
    """
    return True


def undocumented(x):
    return True


def test_own_kernels_and_what_stands_above_them():
    accelerator = Accelerator("some")

    @accelerator.kernel(masked_softmax)
    def softmax(scores, mask):
        pass

    @accelerator.kernel(relu, when="no such unit")
    @accelerator.kernel(relu, when=only_floats)
    @accelerator.kernel(relu, when=undocumented)
    def my_relu(x):
        pass

    @accelerator.kernel(gelu, when="no such unit")
    def my_gelu(x):
        pass

    @accelerator.kernel(opt_decode_step, when="not yet")
    def step(token_ids, padding_mask, positions, params, cache, config):
        pass

    entries = found(accelerator)
    assert (entries[masked_softmax].runs, entries[masked_softmax].why) == (OWN, "softmax")
    assert entries[relu].runs == OWN
    assert entries[relu].why == (
        "my_relu may decline at run time; my_relu may decline at run time: Floats alone; my_relu declines: no such unit"
    )
    assert (entries[gelu].runs, entries[gelu].why) == (REFERENCE, "my_gelu declines: no such unit")
    assert (entries[attention].runs, entries[attention].kernels) == (COMPOSITE, ("masked_softmax",))
    assert set(entries[attention].reference) == {"attention_scores", "dropout", "attention_context"}
    assert entries[attention].why == "1 of 4 ops inside: masked_softmax"
    assert entries[opt_decode_step].runs == COMPOSITE
    assert entries[opt_decode_step].why.startswith("step declines: not yet; 2 of ")
    assert set(entries[opt_decode_step].kernels) == {"masked_softmax", "relu"}
    assert entries[layer_norm].runs == REFERENCE
    assert entries[t5_feedforward].kernels == ("relu",)
    assert "gelu" in entries[t5_feedforward].reference


def test_a_kernel_of_a_composite_hides_what_is_inside():
    accelerator = Accelerator("layers")
    accelerator.kernel(add)(lambda x, y: x)

    @accelerator.kernel(opt_decoder_layer)
    def layer(x, p, mask, config, *, cache=None, start=None, rng=None):
        pass

    entries = found(accelerator)
    assert "opt_decoder_layer" in entries[opt_decode_step].kernels
    assert "relu" not in entries[opt_decode_step].reference
    assert "layer_norm" in entries[opt_decode_step].reference  # the last one is outside of the layers


def test_what_it_says_is_what_runs():
    """Every op of the reference column runs without a kernel, and every op with a kernel runs on it."""
    accelerator, ran = Accelerator("logging"), []

    def log(op):
        def when(*_, **__):
            ran.append(op.name)
            return False

        return when

    for op in (relu, layer_norm, dense):
        accelerator.kernel(op, when=log(op))(op.reference)
    OPTBackbone(**SMALL, accelerator=accelerator)({"token_ids": [[1, 2]]})
    assert set(ran) == set(found(accelerator)[OPS["opt_backbone"]].kernels)


# -- the commands -------------------------------------------------------------------------------------------------------


def test_the_op_table(run):
    status, out, err = run("ops")
    assert (status, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["NAME", "KIND", "ERROR", "MODEL", "SHAPES"]
    assert [row.split()[0] for row in rows] == [op.name for op in table()]
    assert {op.name for op in OPS.values() if op.__module__ in modules()} <= {row.split()[0] for row in rows}
    assert "linear                     primitive  multilinear    x[*b k] kernel[k n] bias[n]? -> [*b n]" in rows


def test_the_op_table_as_json(run):
    status, out, _ = run("ops", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert status == 0
    assert list(records) == [op.name for op in table()]
    assert records["cache_append"]["mutates"] == ["cache"]
    assert records["linear"] == {
        "name": "linear",
        "module": "refmodels.ops.linear",
        "kind": "primitive",
        "signature": "linear(x: float[*b k], kernel: float[k n], bias: float[n] | None = None, *, dtype: str | None = None)"
        " -> float[*b n]",
        "shapes": {"x": "float[*b k]", "kernel": "float[k n]", "bias": "float[n] | None"},
        "result": "float[*b n]",
        "error_model": "multilinear",
        "laws": ["rowwise"],
        "mutates": [],
        "source": "",
        "calls": [],
    }
    assert records["token_vectors"]["calls"] == ["embedding_int4", "embedding_int8", "embedding"]


PLUGIN = """
from refmodels import Accelerator
from refmodels.ops.elementwise import add
print("hello from a plug-in")

class Absent(Accelerator):
    def missing(self):
        return "no such\\ndevice"

class Confused(Accelerator):
    def missing(self):
        raise OSError("driver")

here, absent, confused, number = Accelerator("here"), Absent("absent"), Confused("confused"), 7

@here.kernel(add)
@absent.kernel(add)
def plugged_add(x, y):
    return x
"""
ENTRIES = {"here": "here", "absent": "absent", "confused": "confused", "number": "number", "gone": "gone"}
PROBLEMS = {
    "absent": "cannot run here: no such device",
    "confused": "cannot say whether it can run here: OSError: driver",
    "gone": "cannot be imported: AttributeError: module 'plugged_in' has no attribute 'gone'",
    "here": None,
    "number": "entry point 'number' is a int, wanted an Accelerator",
}


def test_the_accelerators(run, plugin):
    plugin(PLUGIN, ENTRIES)
    status, out, err = run("accelerators")
    assert (status, err) == (0, "hello from a plug-in\n")
    head, *rows = out.splitlines()
    assert head.split() == ["NAME", "PACKAGE", "HERE"]
    ours = [row.split(maxsplit=3) for row in rows if "plugged-in 1.0" in row]
    assert {name: here for name, _, _, here in ours} == {name: problem or "can run" for name, problem in PROBLEMS.items()}
    assert rows[-1].startswith("reference ")
    assert rows[-1].endswith("  can run")


def test_the_accelerators_as_json(run, plugin):
    plugin(PLUGIN, ENTRIES)
    status, out, _ = run("accelerators", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert status == 0
    assert {name: records[name]["problem"] for name in ENTRIES} == PROBLEMS
    assert {name: records[name]["can_run"] for name in ENTRIES} == {name: why is None for name, why in PROBLEMS.items()}
    assert [record["default"] for record in records.values()].count(True) == 1
    assert not records["absent"]["default"]
    assert (records["here"]["package"], records["here"]["entry_point"]) == ("plugged-in 1.0", "plugged_in:here")
    assert records["reference"]["entry_point"] is None


def test_a_plugin_that_raises_is_no_trouble_to_the_others(run, plugin):
    plugin("import sys; sys.exit(7)", {"leaving": "here"})
    status, out, _ = run("accelerators")
    assert status == 0
    assert "cannot be imported: SystemExit: 7" in out
    assert out.splitlines()[-1].startswith("reference ")


def test_what_runs_on_an_accelerator(run, plugin):
    plugin(PLUGIN, ENTRIES)
    status, out, err = run("ops", "--accelerator", "here")
    assert (status, err) == (0, "hello from a plug-in\n")
    head, *rows, last = out.splitlines()
    assert head.split() == ["NAME", "KIND", "RUNS", "WHY"]
    assert [row.split()[0] for row in rows] == [op.name for op in table()]
    (row,) = (row for row in rows if row.startswith("add "))
    assert row.split() == ["add", "primitive", "own", "kernel", "plugged_add"]
    counts = [sum(f"  {runs}  " in row for row in rows) for runs in (OWN, COMPOSITE, REFERENCE)]
    assert last == f"{len(rows)} ops: {counts[0]} own kernel, {counts[1]} composite of kernels, {counts[2]} reference"
    assert counts[0] == 1
    assert counts[1] > 10


def test_what_would_run_on_one_that_cannot_run_here(run, plugin):
    plugin(PLUGIN, ENTRIES)
    status, out, err = run("ops", "--accelerator", "absent")
    assert status == 0
    assert "plugged_add" in out
    assert err.endswith("refmodels: note: accelerator 'absent' cannot run here: no such device\n")
    report = json.loads(run("ops", "--accelerator", "absent", "--json")[1])
    assert (report["accelerator"], report["can_run"]) == ("absent", False)
    assert report["problem"] == PROBLEMS["absent"]
    ops = {entry["name"]: entry for entry in report["ops"]}
    assert ops["add"] == {
        "name": "add", "kind": "primitive", "runs": OWN, "why": "plugged_add", "kernels": [], "reference": []
    }  # fmt: skip
    assert ops["dense"]["kernels"] == ["add"]
    assert "linear" in ops["dense"]["reference"]


def test_what_runs_on_the_reference(run):
    status, out, err = run("ops", "--accelerator", "reference")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"{len(table())} ops: 0 own kernel, 0 composite of kernels, ")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ops", "--accelerator", "nonesuch"], "no accelerator 'nonesuch' is installed; here: reference"),
        (["ops", "--accelerator", "gone"], "accelerator 'gone' cannot be imported: AttributeError"),
        (["ops", "--accelerator", "number"], "entry point 'number' is a int, wanted an Accelerator"),
        (["ops", "norm"], "norm"),
        (["accelerators", "here"], "here"),
    ],
)
def test_bad_requests(run, plugin, arguments, part):
    plugin(PLUGIN, ENTRIES)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("refmodels: error: ")
    assert part in error
    assert "Traceback" not in err


def test_the_table_needs_no_weights_and_no_plugin(run, plugin):
    plugin(PLUGIN, ENTRIES)
    run("ops")
    assert "plugged_in" not in sys.modules
    assert np.__name__ in sys.modules
