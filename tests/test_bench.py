"""`refmodels bench`: what it counts, and that it says what spec/bench.md lists. No time is held to anything."""

import json
import re
from pathlib import Path

import pytest

from refmodels import machine
from refmodels.accelerator import Accelerator
from refmodels.backbone import Backbone
from refmodels.bench import Plan, bytes_per_step, fresh_process, generation_seconds, measure, prefill_flops
from refmodels.bloom import BloomBackbone
from refmodels.cli import main
from refmodels.op import watching
from refmodels.opt import OPTBackbone
from refmodels.t5 import T5Backbone

DOCUMENT = (Path(__file__).parents[1] / "spec" / "bench.md").read_text(encoding="utf-8")
QUICK = ["--repeats", "1", "--prompt-length", "16", "--new-tokens", "4"]
V, N, M = 40, 8, 12
SMALL = {"vocabulary_size": V, "num_layers": 2, "num_heads": 2, "hidden_dim": N, "intermediate_dim": M, "seed": 1}
LAYER = 4 * N * N + 2 * N * M
"""Weights in the kernels of a layer of OPT or BLOOM."""

BIASES = 4 * N + M + N
NORM = 2 * N


@pytest.fixture
def run(capsys):
    """`run("opt_tiny_stdlib", ...)`: exit status, standard output, standard error."""

    def call(*arguments):
        status = main(["bench", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# -- counting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [OPTBackbone, BloomBackbone])
def test_what_a_step_of_a_decoder_reads(model):
    norms = 2 * 2 * NORM + NORM * (1 if model is OPTBackbone else 2)
    values = V * N + 2 * (LAYER + BIASES) + norms
    assert bytes_per_step(model(**SMALL)) == 4 * values
    assert bytes_per_step(model(**SMALL, dtype="bfloat16")) == 2 * values
    assert bytes_per_step(model(**SMALL, dtype="mixed_float16")) == 4 * values
    assert bytes_per_step(model(**SMALL, tie_embedding_weights=False)) == 4 * values  # the head in place of the table


def test_what_a_step_of_t5_reads():
    backbone = T5Backbone(**SMALL, key_value_dim=3)
    inner = 2 * 3
    layer = 4 * N * inner + 2 * N * inner + 3 * N * M + 3 * N  # self; query and output of cross; gated; three norms
    assert bytes_per_step(backbone) == 4 * (V * N + 2 * layer + N)


def test_what_a_step_reads_of_integers():
    backbone = OPTBackbone(**SMALL)
    backbone.quantize("int8")
    scales = V + 2 * (4 * N + M + N)
    assert bytes_per_step(backbone) == V * N + 2 * LAYER + 4 * (scales + 2 * BIASES + 5 * NORM)
    backbone = OPTBackbone(**SMALL)
    backbone.quantize("int4", block_size=4)
    assert bytes_per_step(backbone) < 4 * (V * N + 2 * (LAYER + BIASES) + 5 * NORM)


@pytest.mark.parametrize("model", [OPTBackbone, BloomBackbone])
def test_the_operations_of_a_prompt(model):
    t = 5
    pairs = t * (t + 1) // 2
    assert prefill_flops(model(**SMALL), t) == 2 * t * 2 * LAYER + 2 * V * N + 2 * 4 * N * pairs
    quantised = model(**SMALL)
    quantised.quantize("int8")
    assert prefill_flops(quantised, t) == prefill_flops(model(**SMALL), t)


def test_the_operations_of_an_encoded_prompt():
    t = 5
    square = N * N
    encoder, keys_values = 4 * square + 3 * N * M, 2 * square
    decoder = 6 * square + 3 * N * M
    attention = 4 * N * (t * t + 1 + t)
    wanted = 2 * (2 * t * (encoder + keys_values) + 2 * decoder + attention) + 2 * V * N
    assert prefill_flops(T5Backbone(**SMALL), t) == wanted


@pytest.mark.parametrize("model", [OPTBackbone, BloomBackbone, T5Backbone])
def test_the_steps_that_are_timed(model):
    calls = []

    def observer(op, args, kwargs, proceed):
        if op.name.endswith(("_prefill", "_decode_step", "_encoder")):
            calls.append((op.name.partition("_")[2], args[0].shape))
        return proceed()

    with watching(observer):
        seconds = generation_seconds(model(**SMALL), 3, 7, 4)
    assert min(seconds) > 0
    t5 = model is T5Backbone
    assert calls == [*[("encoder", (3, 7))] * t5, ("prefill", (3, 1 if t5 else 7)), *[("decode_step", (3, 1))] * 3]


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["opt_tiny_stdlib", "t5_tiny_numbers"])
def test_the_json_object_is_the_documented_one(run, preset):
    pytest.importorskip("h5py")
    status, out, err = run(preset, *QUICK, "--json", "--accelerator", "reference")
    assert (status, err) == (0, "")
    found = json.loads(out)
    table = DOCUMENT.partition("## The JSON object")[2].partition("\n## ")[0].splitlines()[4:]
    rows = [line.split("|")[1:3] for line in table if line.startswith("|")]
    assert set(found) == {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    explained = {re.findall(r"`(\w+)`", names)[0]: set(re.findall(r"`(\w+)`", values)) for names, values in rows}
    assert set(found["machine"]) == explained["machine"]
    assert set(found["limits"]) == explained["limits"]
    assert set(found["fresh_process"]) == explained["fresh_process"] - {"left_out"}
    assert all(set(figure) == explained["figures"] - {"prefill", "decode"} for figure in found["figures"])
    assert [(figure["figure"], figure["batch"]) for figure in found["figures"]] == [
        ("prefill", 1), ("prefill", 8), ("decode", 1), ("decode", 8),
    ]  # fmt: skip
    assert all(0 < limit < float("inf") for limit in found["limits"].values())
    for figure in found["figures"]:
        assert 0 < figure["least"] <= figure["tokens_per_second"] <= figure["most"]
        assert figure["fraction_of_limit"] == figure["tokens_per_second"] / figure["limit_tokens_per_second"]
    one, eight = (figure["limit_tokens_per_second"] for figure in found["figures"][2:])
    assert one == pytest.approx(found["limits"]["bytes_per_second"] / found["bytes_per_step"])
    assert eight == pytest.approx(8 * one)
    assert found["bytes_per_step"] == bytes_per_step(Backbone.from_preset(preset, load_weights=False))
    assert not found["random_weights"]
    assert found["hardware"] is None
    memory = found["fresh_process"]
    assert memory["load_seconds"] > 0
    assert memory["peak_memory_bytes"] is None or memory["peak_memory_bytes"] > memory["memory_before_bytes"]


def test_the_table(run):
    pytest.importorskip("h5py")
    status, out, err = run("bloom_tiny_stdlib", *QUICK, "--random", "--batch", "2", "--quantize", "int8", "--weight-only")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 128
    first = out.splitlines()[0]
    assert first.startswith("model ")
    assert first.endswith(" parameters, int8 from float32, weights alone, random weights")
    assert re.search(r"^limits +\d+ threads read [\d.]+ GB/s and multiply float32 matrices at \d+ GFLOP/s$", out, re.MULTILINE)
    for name in ("prefill, batch 2", "decode, batch 2"):
        assert re.search(rf"^{name} +([\d,.]+ +){{4}}\d+%$", out, re.MULTILINE)


def test_an_accelerator_with_hardware_of_its_own_says_what_that_can_do():
    class Elsewhere(Accelerator):
        def hardware(self):
            return {"device": "an abacus"}

        def limits(self):
            return 1e6, 1e9

    backbone = OPTBackbone(**SMALL, max_sequence_length=64, accelerator=Elsewhere("elsewhere"))
    found = measure(backbone, Plan(8, 2, (1,), 1), None, {}, lambda line: None)
    assert found["hardware"] == {"device": "an abacus"}
    assert found["limits"] == {"bytes_per_second": 1e6, "flops_per_second": 1e9}
    assert found["fresh_process"].keys() == {"left_out"}  # which looks for it among those that are installed


@pytest.mark.parametrize(
    ("hardware", "wanted"),
    [
        ({"device": "an abacus"}, "an abacus"),
        ({"device": "a GPU", "memory": "80 GB", "cores": "132"}, "a GPU; memory 80 GB, cores 132"),
    ],
)
def test_hardware_in_the_report(plugin, capsys, hardware, wanted):
    plugin(
        f"""
from refmodels.accelerator import Accelerator
class Elsewhere(Accelerator):
    def hardware(self):
        return {hardware}
    def limits(self):
        return 1e6, 1e9
elsewhere = Elsewhere("elsewhere")
""",
        {"elsewhere": "elsewhere"},
    )
    assert main(["bench", "opt_tiny_stdlib", "--accelerator", "elsewhere", *QUICK]) == 0
    assert re.search(rf"^device +{wanted}$", capsys.readouterr().out, re.MULTILINE)


def test_a_new_process_that_fails_is_left_out_with_the_reason(tmp_path):
    backbone = OPTBackbone(**SMALL)
    found = fresh_process(backbone, Plan(8, 2), tmp_path / "nowhere", {})
    assert list(found) == ["left_out"]
    assert "nowhere" in found["left_out"]
    backbone = OPTBackbone(**SMALL, accelerator=Accelerator("unheard-of"))
    assert "unheard-of" in fresh_process(backbone, Plan(8, 2), tmp_path, {})["left_out"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["opt_125m"], ["unknown preset", "opt_125m_en"]),
        (["opt_tiny_stdlib", "--accelerator", "abacus"], ["abacus", "reference"]),
        (["opt_tiny_stdlib", "--dtype", "float8"], ["float8", "mixed_bfloat16"]),
        (["opt_tiny_stdlib", "--prompt-length", "513"], ["prompt_length is 513", "512"]),
        (["opt_tiny_stdlib", "--new-tokens", "481"], ["new_tokens is 513", "512"]),
        (["opt_tiny_stdlib", "--new-tokens", "1"], ["new_tokens must be at least 2"]),
        (["opt_tiny_stdlib", "--batch", "1,0"], ["--batch", "'0'"]),
        (["opt_tiny_stdlib", "--batch", "1;8"], ["--batch"]),
        (["opt_tiny_stdlib", "--repeats", "0"], ["--repeats"]),
        (["opt_tiny_stdlib", "--quantize", "int3"], ["int3"]),
        (["opt_tiny_stdlib", "--weight-only"], ["--weight-only", "--quantize"]),
        (["opt_tiny_stdlib", "--accelerator", "reference", "--threads", "1"], ["reference", "threads"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_requests(run, arguments, parts):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("refmodels: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


# -- the machine ------------------------------------------------------------------------------------------------------------


def test_the_limits_are_measured():
    limits = machine.measured_limits(1)
    assert all(0 < value < float("inf") for value in limits)


def test_limits_that_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(machine.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not be measured"):
        machine.measured_limits(1)


def test_the_threads_are_those_of_numpy(monkeypatch):
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert machine.default_threads() == machine.cores() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.default_threads() == 3
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert machine.default_threads() == 2
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "many")
    assert machine.default_threads() == 3


def test_the_machine_in_words():
    assert set(machine.description()) == {"processor", "cores", "features", "system"}
    assert machine.peak_memory() is None or machine.peak_memory() > 10**6
