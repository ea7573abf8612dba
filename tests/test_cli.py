"""The command line: what it prints where, its exit status, and that no error is more than one line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refmodels import accelerator, loading, presets, task
from refmodels.accelerator import Accelerator
from refmodels.backbone import Backbone
from refmodels.bloom import BloomBackbone
from refmodels.cli import main
from refmodels.cli.info import cache_values_per_token, layer_rows
from refmodels.cli.selection import fastest_accelerator
from refmodels.opt import OPTBackbone, OPTCausalLM
from refmodels.parameters import flatten
from refmodels.printing import progress
from refmodels.t5 import T5Backbone

h5py = pytest.importorskip("h5py")

ROOT = Path(__file__).parents[1]
TOKENIZER = Path(__file__).parent / "data" / "tokenizers" / "opt"
BUILT_IN = presets.preset_names()
SHIPPED = [name for name in BUILT_IN if (presets.data_directory() / name).is_dir()]
PROMPT = "The quick brown"
SMALL = {"vocabulary_size": 40, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}


def write_config(directory, class_name, **arguments):
    directory.mkdir(exist_ok=True)
    config = {"registered_name": f"keras_hub>{class_name}", "config": arguments}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The directory of a random OPT with 64 positions, as KerasHub saves one."""
    pytest.importorskip("tokenizers")
    from refmodels.tokenizers import OPTTokenizer

    directory = tmp_path_factory.mktemp("presets") / "tiny"
    tokenizer = OPTTokenizer(str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"))
    arguments = SMALL | {"vocabulary_size": tokenizer.vocabulary_size(), "max_sequence_length": 64}
    write_config(directory, "OPTBackbone", **arguments)
    tokenizer.save_to_preset(directory)
    backbone = OPTBackbone(**arguments, seed=3)
    # Larger weights than the initial ones: otherwise a model repeats its last token.
    arrays = {path: 8.0 * array if array.ndim == 2 else array for path, array in flatten(backbone.params)}
    with h5py.File(directory / "model.weights.h5", "w") as file:
        for parameter in backbone.parameters():
            file[parameter.keras] = arrays[parameter.path].reshape(parameter.keras_shape)
    return directory


@pytest.fixture
def run(capsys, preset):
    """`run("info", ...)` in this process: exit status, standard output, standard error. TINY stands for the preset."""

    def call(*arguments):
        capsys.readouterr()
        status = main([str(preset) if argument == "TINY" else argument for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def process(*arguments, **options):
    command = [sys.executable, "-m", "refmodels", *arguments]
    return subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120, check=False, **options)


def expected(preset, **options):
    task = OPTCausalLM.from_preset(str(preset))
    return task.generate(PROMPT, **{"max_new_tokens": 12} | options)


# -- generate -------------------------------------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_what_follows(run, preset):
    assert run("generate", "TINY", PROMPT, "--max-new-tokens", "12") == (0, expected(preset) + "\n", "")
    assert expected(preset).startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--strip-prompt"], {"strip_prompt": True}),
        (["--no-stream"], {}),
        (["--no-stream", "--strip-prompt"], {"strip_prompt": True}),
        (["--stop-token-ids", "none"], {"stop_token_ids": None}),
        (["--stop-token-ids", "2,7"], {"stop_token_ids": [2, 7]}),
        (["--max-length", "15"], {"max_length": 15}),
        (["--sampler", "top_k", "--top-k", "7", "--seed", "5"], {"sampler": "top_k", "top_k": 7, "seed": 5}),
        (["--temperature", "2.5", "--seed", "5"], {"temperature": 2.5, "seed": 5}),
        (["--top-p", "0.9", "--seed", "5"], {"top_p": 0.9, "seed": 5}),
        (["--num-beams", "3", "--length-penalty", "0.5"], {"num_beams": 3, "length_penalty": 0.5}),
        (["--sampler", "beam", "--strip-prompt"], {"sampler": "beam", "strip_prompt": True}),
        (["--min-p", "0.1", "--seed", "5"], {"min_p": 0.1, "seed": 5}),
        (["--repetition-penalty", "1.3"], {"repetition_penalty": 1.3}),
        (["--no-repeat-ngram-size", "2"], {"no_repeat_ngram_size": 2}),
        (["--sampler", "contrastive", "--penalty-alpha", "0.3"], {"sampler": "contrastive", "penalty_alpha": 0.3}),
        (["--stop", "e", "--stop", "\n"], {"stop": ["e", "\n"]}),
        (["--dtype", "float64"], {}),
    ],
    ids=" ".join,
)
def test_options_are_those_of_the_library(run, preset, options, arguments):
    status, out, err = run("generate", "TINY", PROMPT, "--max-new-tokens", "12", *options)
    assert (status, out, err) == (0, expected(preset, **arguments) + "\n", "")


def test_without_a_length_the_model_bounds_it(run, preset):
    assert (
        run("generate", "TINY", PROMPT, "--stop-token-ids", "none")[1]
        == expected(preset, max_new_tokens=None, stop_token_ids=None) + "\n"
    )
    full = run("generate", "TINY", PROMPT, "--stop-token-ids", "none", "--json")[1]
    assert json.loads(full)["prompt_tokens"] + json.loads(full)["new_tokens"] == 64


@pytest.mark.parametrize("typed", [PROMPT, PROMPT + "\n"])
@pytest.mark.parametrize("dash", [[], ["-"]])
def test_a_prompt_from_standard_input(run, preset, monkeypatch, typed, dash):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    assert run("generate", "TINY", *dash, "--max-new-tokens", "12") == (0, expected(preset) + "\n", "")


def test_only_one_newline_is_taken_from_the_prompt(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n\n".encode())))
    assert run("generate", "TINY", "--max-new-tokens", "1")[1].startswith("é\n")


def test_an_empty_prompt(run):
    status, out, err = run("generate", "TINY", "", "--max-new-tokens", "2")
    assert (status, err) == (0, "")
    assert out.endswith("\n")


class Recorder(io.StringIO):
    """A stream that remembers what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        if not self.flushed or self.flushed[-1] != self.getvalue():
            self.flushed.append(self.getvalue())


def test_text_appears_piece_by_piece(preset, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    assert main(["generate", str(preset), PROMPT, "--max-new-tokens", "12"]) == 0
    assert recorder.flushed[0] == PROMPT
    assert len(recorder.flushed) > 6
    assert recorder.flushed[-1] == expected(preset) + "\n"


def test_json(run, preset):
    status, out, err = run("generate", "TINY", PROMPT, "--max-new-tokens", "12", "--json", "--accelerator", "reference")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["prompt"], found["text"]) == (PROMPT, expected(preset))
    tokenizer = loading.load_preset_tokenizer(str(preset))
    assert tokenizer.detokenize(found["tokens"]) == found["text"].removeprefix(PROMPT)
    assert found["new_tokens"] == len(found["tokens"]) == 12
    assert found["prompt_tokens"] == 1 + len(tokenizer.tokenize(PROMPT))
    assert (found["accelerator"], found["dtype"]) == ("reference", "float32")
    assert 0 < found["first_token_seconds"] <= found["seconds"]
    assert found["decoding_tokens_per_second"] > 0
    assert found["load_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--num-beams", "3"], {"num_beams": 3}),
        (["--temperature", "2", "--seed", "4"], {"temperature": 2.0, "seed": 4}),
        (["--num-beams", "2", "--strip-prompt", "--stop", "e"], {"num_beams": 2, "strip_prompt": True, "stop": "e"}),
    ],
    ids=str,
)
def test_several_answers(run, preset, options, arguments):
    command = ["generate", "TINY", PROMPT, "--max-new-tokens", "12", "--num-return-sequences", "2", *options]
    wanted = expected(preset, num_return_sequences=2, **arguments)
    assert len(wanted) == 2
    assert run(*command) == (0, "\n\n".join(wanted) + "\n", "")
    found = json.loads(run(*command, "--json")[1])
    assert found["text"] == wanted
    assert found["new_tokens"] == sum(map(len, found["tokens"])) > 0
    assert len(found["tokens"]) == 2
    assert found["first_token_seconds"] is found["decoding_tokens_per_second"] is None


def test_json_of_a_beam_search_and_of_one_token(run):
    beam = json.loads(run("generate", "TINY", PROMPT, "--max-new-tokens", "5", "--num-beams", "2", "--json")[1])
    assert beam["first_token_seconds"] is None
    assert len(beam["tokens"]) == beam["new_tokens"] > 0
    one = json.loads(run("generate", "TINY", PROMPT, "--max-new-tokens", "1", "--json")[1])
    assert one["decoding_tokens_per_second"] is None
    assert one["first_token_seconds"] > 0


def test_stats_go_to_standard_error(run, preset):
    status, out, err = run("generate", "TINY", PROMPT, "--max-new-tokens", "12", "--stats", "--accelerator", "reference")
    assert (status, out) == (0, expected(preset) + "\n")
    rows = {line[:13].strip(): line[13:] for line in err.splitlines()}
    assert rows["accelerator"] == "reference"
    assert rows["new"].startswith("12 tokens")
    assert rows["decoding"].endswith("tokens/s")
    assert {"dtype", "load", "prompt", "first token"} <= rows.keys()
    if sys.platform != "win32":
        assert 10 < float(rows["peak memory"].removesuffix(" MB").replace(",", "")) < 1e5


# -- accelerators ---------------------------------------------------------------------------------------------------------


class Absent(Accelerator):
    def missing(self):
        return "no such machine"


def broken():
    raise RuntimeError("driver\nmismatch")


@pytest.mark.parametrize(
    ("plugins", "wanted"),
    [
        ({}, None),
        ({"numba": Accelerator, "cupy": Accelerator}, "cupy"),
        ({"numba": Accelerator, "cupy": Absent, "another": Accelerator}, "numba"),
        ({"zeta": Accelerator, "cupy": Absent, "beta": Accelerator}, "beta"),
        ({"cupy": Absent}, None),
    ],
)
def test_the_fastest_accelerator_that_can_run(run, install, plugins, wanted):
    install(**{name: lambda name=name, kind=kind: kind(name) for name, kind in plugins.items()})
    found = fastest_accelerator()
    assert (found and found.name) == wanted
    err = run("generate", "TINY", PROMPT, "--max-new-tokens", "2", "--stats")[2]
    assert err.startswith(f"accelerator  {wanted or 'reference'}\n")


def test_a_broken_accelerator_is_left_out_and_named(install, capsys):
    install(cupy=broken)
    assert fastest_accelerator() is None
    assert capsys.readouterr().err == (
        "refmodels: note: accelerator 'cupy' does not load and is left out: RuntimeError: driver mismatch\n"
    )


class Compiling(Accelerator):
    """Compiles before or when it is first used, and has threads."""

    def __init__(self, name, threads=None, fault=None):
        super().__init__(name)
        self.threads, self.fault, self.compiled = threads, fault, []

    def configured(self, **settings):
        return Compiling(self.name, **settings) if settings.keys() <= {"threads"} else super().configured(**settings)

    def compile(self, report):
        for i, kernel in enumerate(("linear", "attention"), start=1):
            report(f"compiling {i}/2: {kernel}")
            print("a compiler's chatter")
        if self.fault is not None:
            raise self.fault
        return "ready, 2 kernels in 0.1 s"

    def run(self, op, args, kwargs):
        if op.name in ("linear", "greedy_token") and op.name not in self.compiled:
            self.compiled.append(op.name)
            progress(f"compiling {op.name}")
        return super().run(op, args, kwargs)


@pytest.fixture
def compiling(install):
    """The one accelerator that is installed."""
    found = Compiling("numba")
    install(numba=lambda: found)
    return found


@pytest.mark.parametrize("arguments", [(), ("--accelerator", "numba")])
def test_compile(run, compiling, arguments):
    chatter = "a compiler's chatter\n"
    lines = ["refmodels: compiling 1/2: linear\n", chatter, "refmodels: compiling 2/2: attention\n", chatter]
    assert run("compile", *arguments) == (0, "numba: ready, 2 kernels in 0.1 s\n", "".join(lines))


@pytest.mark.parametrize(
    "fault", [RuntimeError("no such\ntarget"), accelerator.AcceleratorError("no compiler"), OSError("full")]
)
def test_compiling_fails(run, compiling, fault):
    compiling.fault = fault
    status, out, err = run("compile")
    assert (status, out) == (1, "")
    said = f"{type(fault).__name__}: {' '.join(str(fault).split())}"
    assert err.endswith(f"\nrefmodels: error: numba: compiling failed: {said}\n")


def test_nothing_to_compile(run, install):
    install()
    assert run("compile") == (0, "reference: nothing to compile\n", "")
    assert run("compile", "--accelerator", "reference") == (0, "reference: nothing to compile\n", "")
    install(cupy=lambda: Accelerator("cupy"))
    assert run("compile") == (0, "cupy: nothing to compile\n", "")
    install(cupy=lambda: Absent("cupy"))
    status, out, err = run("compile", "--accelerator", "cupy")
    assert (status, out) == (2, "")
    assert_one_line(err, "no such machine")


@pytest.mark.parametrize("command", [("generate", "--max-new-tokens", "3"), ("score",)])
def test_threads(run, compiling, monkeypatch, command):
    made = []
    monkeypatch.setattr(Compiling, "configured", lambda self, **settings: (made.append(settings), self)[1])
    name, *options = command
    wanted = run(name, "TINY", PROMPT, *options, "--accelerator", "reference")
    for which in ((), ("--accelerator", "numba")):
        made.clear()
        assert run(name, "TINY", PROMPT, *options, *which, "--threads", "2") == wanted
        assert {"threads": 2} in made


@pytest.mark.parametrize("command", ["generate", "score"])
@pytest.mark.parametrize("which", [(), ("--accelerator", "reference"), ("--accelerator", "plain")])
def test_threads_of_what_has_none(run, install, command, which):
    install(**({"plain": lambda: Accelerator("plain")} if which else {}))
    status, out, err = run(command, "TINY", PROMPT, "--threads", "2", *which)
    assert (status, out) == (2, "")
    assert_one_line(err, "'plain' has no" if "plain" in which else "the reference has no", "setting 'threads'")
    assert run(command, "TINY", PROMPT, "--threads", "0")[0] == 2


def test_what_a_terminal_is_told(run, compiling, monkeypatch, preset):
    """What was chosen, and what is compiled on the way: in lines of their own."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    text = expected(preset)
    status, out, err = run("generate", "TINY", PROMPT, "--max-new-tokens", "12")
    assert (status, out) == (0, text + "\n")
    assert err == (
        "refmodels: running on numba\n"
        "\nrefmodels: compiling linear\n"  # the prompt stands there, without an end of its line
        "refmodels: compiling greedy_token\n"
    )
    compiling.compiled.clear()
    err = run("generate", "TINY", PROMPT, "--max-new-tokens", "12", "--accelerator", "numba", "--no-stream")[2]
    assert err.startswith("refmodels: compiling linear\n")


def test_nothing_else_is_told_anything(run, compiling, preset):
    assert run("generate", "TINY", PROMPT, "--max-new-tokens", "12") == (0, expected(preset) + "\n", "")
    assert compiling.compiled


@pytest.mark.parametrize("stderr", [None, io.StringIO()])
def test_progress_never_fails(monkeypatch, stderr):
    if stderr is not None:
        stderr.isatty = lambda: True
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress("compiling attention")


# -- errors ---------------------------------------------------------------------------------------------------------------


def assert_one_line(err, *parts):
    assert err.startswith("refmodels: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND", "see refmodels --help"]),
        (["nothing"], ["nothing"]),
        (["generate"], ["PRESET", "see refmodels generate --help"]),
        (["generate", "opt_125m", "x"], ["opt_125m_en"]),
        (["info", "bloom_560m"], ["bloom_560m_multi"]),
        (["info", ""], ["unknown preset"]),
        (["info", "kaggle://keras"], ["kaggle://org/model/keras/variant"]),
        (["info", "opt_125m_en", "--dtype", "float8"], ["float8", "mixed_bfloat16"]),
        (["generate", "TINY", "x", "--dtype", "float8"], ["float8", "mixed_bfloat16"]),
        (["generate", "TINY", "x", "--temperature", "0"], ["temperature", "positive"]),
        (["generate", "TINY", "x", "--temperature", "nan"], ["temperature"]),
        (["generate", "TINY", "x", "--stop", ""], ["--stop", "not empty"]),
        (["generate", "TINY", "x", "--num-return-sequences", "2"], ["num_return_sequences 2", "draws or beams"]),
        (["generate", "TINY", "x", "--repetition-penalty", "0"], ["repetition_penalty", "0.001"]),
        (["generate", "TINY", "x", "--sampler", "contrastive", "--top-p", "0.5"], ["contrastive", "takes no top_p"]),
        (["generate", "TINY", "x", "--top-p", "2"], ["top_p", "[0, 1]"]),
        (["generate", "TINY", "x", "--top-k", "0"], ["--top-k"]),
        (["generate", "TINY", "x", "--sampler", "beam", "--top-k", "3"], ["beam", "takes no top_k"]),
        (["generate", "TINY", "x", "--sampler", "best"], ["best", "greedy"]),
        (["generate", "TINY", "x", "--max-length", "0"], ["--max-length", "'0'"]),
        (["generate", "TINY", "x", "--max-length", "65"], ["max_length 65", "64"]),
        (["generate", "TINY", "x", "--max-new-tokens", "some"], ["--max-new-tokens", "some"]),
        (["generate", "TINY", "x", "--max-new", "3"], ["--max-new"]),
        (["generate", "TINY", "x", "--seed", "-1"], ["--seed", "-1"]),
        (["generate", "TINY", "x", "--stop-token-ids", "end"], ["--stop-token-ids", "none"]),
        (["generate", "TINY", "x", "--stop-token-ids", "99999"], ["99999", "vocabulary"]),
        (["generate", "TINY", "x", "--accelerator", "abacus"], ["abacus", "reference"]),
        (["generate", "TINY", "x " * 200], ["tokens, more than max_length 64"]),
        (["generate", "TINY", "\udcff"], ["UTF-8"]),
    ],
    ids=lambda value: " ".join(value)[:60].encode("ascii", "replace").decode() if isinstance(value, list) else None,
)
def test_bad_requests(run, arguments, parts):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert_one_line(err, *parts)


def test_a_prompt_that_is_not_utf8(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok \xff")))
    status, out, err = run("generate", "TINY")
    assert (status, out) == (2, "")
    assert_one_line(err, "UTF-8, at character 3")


def test_no_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run("generate", "TINY")
    assert status == 2
    assert_one_line(err, "standard input")


def test_damaged_presets(run, preset, tmp_path):
    write_config(tmp_path / "bare", "OPTBackbone", **SMALL)
    status, out, err = run("generate", str(tmp_path / "bare"), "x")
    assert (status, out) == (2, "")
    assert_one_line(err, "model.weights.h5")
    (tmp_path / "bare" / "model.weights.h5").write_bytes(b"not HDF5")
    status, out, err = run("generate", str(tmp_path / "bare"), "x")
    assert (status, out) == (2, "")
    assert_one_line(err, "model.weights.h5")
    (tmp_path / "bare" / "config.json").write_text("{")
    status, out, err = run("info", str(tmp_path / "bare"))
    assert (status, out) == (2, "")
    assert_one_line(err, "config.json")


def test_a_preset_without_a_tokenizer(run, preset, tmp_path):
    for name in ("config.json", "model.weights.h5"):
        (tmp_path / name).write_bytes((preset / name).read_bytes())
    status, out, err = run("generate", str(tmp_path), "x")
    assert (status, out) == (2, "")
    assert_one_line(err, "tokenizer")


def test_a_missing_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    status, out, err = run("generate", "opt_125m_en", "x")
    assert (status, out) == (1, "")
    assert_one_line(err, "pip install kagglehub")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (MemoryError(), "not enough memory"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_a_failure_while_running(run, monkeypatch, error, wanted):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(task, "decode", fail)
    status, out, err = run("generate", "TINY", PROMPT)
    assert (status, out) == (1, f"{PROMPT}\n")
    assert err == f"refmodels: error: {wanted}\n"


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed(closed):
    for arguments, status in ((["presets"], 0), (["info", "nothing"], 2)):
        command = [sys.executable, "-m", "refmodels", *arguments]
        done = subprocess.run(command, preexec_fn=lambda: os.close(closed), capture_output=True, text=True)
        assert done.returncode == status
        assert bool(done.stdout) == (closed != 1 and status == 0)
        assert bool(done.stderr) == (closed != 2 and status == 2)


def test_an_interrupt_is_silent(run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "decode", interrupted)
    assert run("generate", "TINY", PROMPT) == (130, PROMPT, "")


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("REFMODELS_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown preset"):
        main(["info", "nothing"])


# -- score ----------------------------------------------------------------------------------------------------------------


def test_score_prints_each_token_and_the_sum(run, preset):
    task = OPTCausalLM.from_preset(str(preset))
    score = task.score(PROMPT)
    status, out, err = run("score", "TINY", PROMPT)
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", score.counts[0] + 1)
    for line, token, log_prob in zip(lines, score.token_ids[0], score.log_probs[0], strict=False):
        assert line.split(maxsplit=1) == [f"{log_prob:.4f}", task.tokenizer.id_to_token(token)]
    perplexity = f"perplexity {score.perplexity[0]:.4g}"
    assert lines[-1].split(maxsplit=1) == [f"{score.total[0]:.4f}", f"{score.counts[0]} tokens, {perplexity}"]


def test_score_as_json(run, preset):
    score = OPTCausalLM.from_preset(str(preset), dtype="float64").score(PROMPT, " fox")
    status, out, _ = run("score", "TINY", PROMPT, " fox", "--json", "--dtype", "float64")
    found = json.loads(out)
    assert (status, found["tokens"], found["log_probs"]) == (0, score.token_ids[0].tolist(), score.log_probs[0].tolist())
    assert (found["total"], found["perplexity"], found["target"]) == (score.total[0], score.perplexity[0], " fox")
    assert json.loads(run("score", "TINY", "", "--json")[1])["perplexity"] is None


def test_score_says_what_is_wrong(run):
    status, out, err = run("score", "t5_tiny_numbers", "spell: 7")
    assert (status, out) == (2, "")
    assert err == "refmodels: error: T5 answers a text: TARGET, the answer to score, is missing\n"
    assert run("score", "TINY", PROMPT, "--dtype", "float8")[0] == 2


# -- presets and info -----------------------------------------------------------------------------------------------------


def test_presets_table(run):
    status, out, err = run("presets")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert max(map(len, lines)) <= 120
    rows = [line for line in lines if not line.startswith(" ")]
    assert rows[0].split() == ["NAME", "CLASS", "PARAMETERS", "WEIGHTS", "WHERE"]
    names = [row.split()[0] for row in rows[1:]]
    assert sorted(names) == BUILT_IN
    assert names.index("t5_tiny_numbers") < names.index("bloom_560m_multi") < names.index("bloom_3b_multi")
    where = rows[0].index("WHERE")
    assert all(row[where - 2 : where] == "  " and row[where] != " " for row in rows)
    large = next(row for row in rows if row.startswith("opt_6.7b_en"))
    assert "  6,658,465,792   26.6 GB  float32  kaggle://keras/opt/keras/opt_6.7b_en/" in large


def test_presets_json(run):
    found = {entry["name"]: entry for entry in json.loads(run("presets", "--json")[1])}
    assert sorted(found) == BUILT_IN
    assert found["t5_1.1_xxl"]["parameter_count"] == 11_135_332_352
    assert found["t5_1.1_xxl"]["weights_bytes"] == 4 * 11_135_332_352
    assert all(entry["parameter_count"] > 0 for entry in found.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_info_of_every_preset(run, name):
    status, out, err = run("info", name)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 120
    backbone = Backbone.from_preset(name, load_weights=False)
    assert f"{name}: {type(backbone).__name__}, {backbone.count_params():,} parameters" in out
    for argument, value in backbone.get_config().items():
        assert [argument, str(value)] in [line.split() for line in out.splitlines()]
    rows = layer_rows(backbone.parameters())
    assert sum(row.each * row.times for row in rows) == backbone.count_params()
    assert len(rows) < 60  # repeated layers are folded


def test_info_of_a_directory(run, preset):
    status, out, err = run("info", "TINY", "--dtype", "mixed_float16")
    assert (status, err) == (0, "")
    count = OPTBackbone(**json.loads((preset / "config.json").read_text())["config"]).count_params()
    assert f"{count:,} parameters, {preset}" in out
    assert "layers.0..1.self_attention.query" in out
    last = out.splitlines()[-1].split()
    assert last[0] == "mixed_float16"
    assert out.endswith("64 bytes a token  this preset\n")  # 2 layers, 2 heads of 4, keys and values, 2 bytes


def test_info_json(run):
    found = json.loads(run("info", "opt_125m_en", "--json", "--dtype", "bfloat16")[1])
    assert found["class"] == "OPTBackbone"
    assert found["parameter_count"] == 125_237_760
    assert found["weights_bytes"] == 2 * 125_237_760
    assert found["config"]["dtype"] == "bfloat16"
    assert found["kv_cache_bytes_per_token"] == 2 * 12 * 768 * 2
    assert found["memory"]["float32"]["weights_bytes"] == 4 * 125_237_760
    assert sum(row["each"] * row["times"] for row in found["parameters"]) == 125_237_760


def test_layers_that_differ_are_not_folded():
    names = [row.name for row in layer_rows(T5Backbone(**SMALL | {"num_layers": 4}).parameters())]
    assert "encoder.layers.0.self_attention.relative_attention_bias" in names
    assert "encoder.layers.1..3.self_attention.query" in names
    assert "decoder.layers.1..3.cross_attention.query" in names
    assert "decoder.layer_norm" in names
    assert names == list(dict.fromkeys(names))


def test_cache_size_is_what_a_cache_takes():
    ids = np.zeros((1, 1), np.int64)
    for backbone, arguments in (
        (OPTBackbone(**SMALL), (1,)),
        (BloomBackbone(**SMALL), (1,)),
        (T5Backbone(**SMALL, key_value_dim=3), (ids, np.ones((1, 1), bool))),
    ):
        layers = backbone.new_cache(*arguments, 1)["layers"]
        assert sum(array.size for _, array in flatten(layers)) == cache_values_per_token(backbone)


def test_info_of_a_model_that_fits_no_machine(run, tmp_path):
    sizes = {"vocabulary_size": 250880, "num_layers": 70, "num_heads": 112, "hidden_dim": 14336, "intermediate_dim": 57344}
    write_config(tmp_path, "BloomBackbone", **sizes)
    status, out, err = run("info", str(tmp_path))
    assert (status, err) == (0, "")
    assert "BloomBackbone, 176,247,271,424 parameters" in out
    assert "705.0 GB" in out


# -- as a process ---------------------------------------------------------------------------------------------------------


def test_version_and_help_are_quick():
    code = "import sys; from refmodels.cli import main; main(['--version']); main(['generate', '--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.startswith("refmodels 0.")
    assert "--max-new-tokens" in out
    heavy = {"h5py", "tokenizers", "safetensors", "sentencepiece", "ml_dtypes", "refmodels.presets", "numba", "cupy", "torch"}
    assert not heavy & set(out.splitlines()[-1].split())


def test_info_takes_little_time_and_memory():
    resource = pytest.importorskip("resource")
    code = (
        "import resource, sys, time; from refmodels.cli import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); status = main(['info', 'opt_6.7b_en'])\n"
        "print(status, peak() - before, time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    status, growth, seconds = done.stderr.split()
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource
    assert "6,658,465,792" in done.stdout
    assert status == "0"
    assert int(growth) * unit < 200e6
    assert float(seconds) < 2  # of this process' own time: other processes do not count


def test_a_process_succeeds_and_fails(preset):
    done = process("generate", str(preset), "--max-new-tokens", "12", input=PROMPT.encode() + b"\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == expected(preset) + "\n"
    done = process("info", "opt_125m")
    assert (done.returncode, done.stdout) == (2, b"")
    assert_one_line(done.stderr.decode(), "opt_125m_en")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe otherwise")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["presets"], ["--help"], ["generate", "TINY", PROMPT]], ids=lambda value: value[0])
def test_a_closed_pipe_is_silent(preset, arguments, unbuffered):
    command = [sys.executable, "-m", "refmodels", *(str(preset) if part == "TINY" else part for part in arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_a_terminal_without_the_characters(preset):
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = process("generate", str(preset), "é", "--max-new-tokens", "1", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"\\xe9")


# -- the presets that ship ------------------------------------------------------------------------------------------------


@pytest.mark.skipif("t5_tiny_numbers" not in SHIPPED, reason="t5_tiny_numbers is not here")
def test_numbers_are_spelt():
    done = process("generate", "t5_tiny_numbers", "spell: 4207")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"four thousand two hundred seven\n", b"")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_presets_generate(run, name):
    prompt = "spell: 4207" if name.startswith("t5") else "def add(a, b):\n    "
    streamed = run("generate", name, prompt, "--max-new-tokens", "16")
    assert streamed == run("generate", name, prompt, "--max-new-tokens", "16", "--no-stream")
    assert (streamed[0], streamed[2]) == (0, "")
    assert streamed[1].startswith("" if name.startswith("t5") else prompt)
    assert streamed[1].strip()


@pytest.mark.parametrize(
    "order", [["PRESET", "--stats", "TEXT"], ["--seed", "1", "PRESET", "TEXT"], ["PRESET", "TEXT", "--stats"]]
)
def test_options_may_stand_anywhere(run, order):
    words = {"PRESET": "t5_tiny_numbers", "TEXT": "spell: 5"}
    status, out, _ = run("generate", *(words.get(word, word) for word in order))
    assert (status, out) == (0, "five\n")
