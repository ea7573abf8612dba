"""`refmodels convert`: the same model and tokenizer in the other form, or nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refmodels import Backbone, OPTBackbone
from refmodels.cli import main
from refmodels.cli.convert import Stopper
from refmodels.convert import convert, stored_policy
from refmodels.parameters import flatten
from refmodels.task import Task

GOLDENS = Path(__file__).parent / "data" / "goldens"
SHIPPED = ["t5_tiny_numbers", "opt_tiny_stdlib", "bloom_tiny_stdlib"]
SIZES = {"vocabulary_size": 13, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 32}


def run(*arguments):
    """Exit status of the command."""
    return main(["convert", *map(str, arguments)])


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_there_and_back(tmp_path, capsys, name):
    """Through both forms: the same parameters, bit for bit, and the same text."""
    assert run(name, tmp_path / "hf", "--to", "hf") == 0
    assert run(tmp_path / "hf", tmp_path / "keras", "--to", "keras", "--max-shard-size", "0.001") == 0
    task, other = Task.from_preset(name), Task.from_preset(tmp_path / "keras")
    for (path, wanted), (found_path, found) in zip(flatten(task.backbone.params), flatten(other.backbone.params), strict=True):
        assert path == found_path
        assert np.array_equal(wanted, found), path
    assert other.generate("roman: 14", max_length=20) == task.generate("roman: 14", max_length=20)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "hf"), "roman: 14", "--max-new-tokens", "8"]) == 0
    first = capsys.readouterr().out
    assert main(["generate", name, "roman: 14", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == first


def test_one_line_says_what_was_done(tmp_path, capsys):
    assert run("opt_tiny_stdlib", tmp_path / "hf", "--to", "hf") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'hf'}: hf, float16, 68 tensors, 3.0 MB\n"
    assert captured.err == ""
    assert run(tmp_path / "hf", tmp_path / "keras", "--to", "keras", "--dtype", "float32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "source": str(tmp_path / "hf"),
        "directory": str(tmp_path / "keras"),
        "format": "keras",
        "dtype": "float32",
        "tensors": 68,
        "bytes": 4 * Backbone.from_preset(tmp_path / "keras").count_params(),
    }


def test_progress_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("opt_tiny_stdlib", tmp_path / "keras", "--to", "keras") == 0
    lines = capsys.readouterr().err.split("\r")
    assert len(lines) == 70
    assert lines[1] == "     0 B of 3.0 MB written"
    assert lines[-1] == "  3.0 MB of 3.0 MB written\n"


# -- the type of the weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["keras", "hf"])
def test_the_type_of_the_file_is_kept(tmp_path, dtype, form):
    model = OPTBackbone(**SIZES, dtype=dtype, seed=0)
    (model.save_to_preset if form == "keras" else model.save_to_hf)(tmp_path / "source")
    assert stored_policy(tmp_path / "source") == dtype
    for to in ("keras", "hf"):
        assert convert(tmp_path / "source", tmp_path / to, to).dtype == dtype
        other = Backbone.from_preset(tmp_path / to, dtype=dtype)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(flatten(model.params), flatten(other.params), strict=True))


def test_a_policy_is_kept_where_it_fits_the_file(tmp_path):
    OPTBackbone(**SIZES, dtype="mixed_bfloat16", seed=0).save_to_preset(tmp_path / "mixed")
    assert stored_policy(tmp_path / "mixed") == "mixed_bfloat16"
    assert stored_policy(GOLDENS / "keras_hub_0.17" / "bloom_f16") == "float16"


def test_float16_weights_behind_a_config_that_does_not_say_so(tmp_path):
    """As the published BLOOM presets are."""
    OPTBackbone(**SIZES, dtype="float16", seed=0).save_to_preset(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["config"]["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Backbone.from_preset(tmp_path).config.dtype == "float32"
    assert stored_policy(tmp_path) == "float16"


def test_quantised_weights_stay_as_they_are(tmp_path):
    model = OPTBackbone(**SIZES, seed=0)
    model.quantize("int8")
    model.save_to_preset(tmp_path / "int8")
    convert(tmp_path / "int8", tmp_path / "again", "keras")
    again = Backbone.from_preset(tmp_path / "again")
    assert again.get_config() == model.get_config()
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(flatten(model.params), flatten(again.params), strict=True))
    with pytest.raises(ValueError, match=r"token_embedding.embeddings is quantised.*dequantize\(\)"):
        convert(tmp_path / "int8", tmp_path / "hf", "hf")
    assert names(tmp_path) == ["again", "int8"]


def test_quantised_weights_can_become_plain_ones(tmp_path):
    model = OPTBackbone(**SIZES, seed=0)
    model.quantize("int8")
    model.save_to_preset(tmp_path / "int8")
    assert run(tmp_path / "int8", tmp_path / "hf", "--to", "hf", "--dequantize") == 0
    plain = Backbone.from_preset(tmp_path / "hf")
    model.dequantize()
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(flatten(model.params), flatten(plain.params), strict=True))


# -- what is refused, and that nothing is left of it ----------------------------------------------------------------------


def refused(capsys, *arguments, status=2):
    assert run(*arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("refmodels: error: ")


def test_a_target_with_files_in_it(tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    assert run("opt_tiny_stdlib", target, "--to", "hf") == 0  # it was empty
    capsys.readouterr()
    before = (target / "model.safetensors").read_bytes()
    message = refused(capsys, "t5_tiny_numbers", target, "--to", "hf")
    assert message == f"{target} is there and has files in it: --force replaces it"
    assert (target / "model.safetensors").read_bytes() == before
    (target / "mine.txt").write_text("mine")
    assert run("t5_tiny_numbers", target, "--to", "keras", "--force") == 0
    found = names(target)
    assert {"config.json", "metadata.json", "model.weights.h5", "tokenizer.json"} <= set(found)
    assert {"mine.txt", "model.safetensors", "generation_config.json"}.isdisjoint(found)
    assert names(tmp_path) == ["target"]
    capsys.readouterr()
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.txt").write_text("mine")
    message = refused(capsys, "t5_tiny_numbers", home, "--to", "keras", "--force")
    assert message == f"{home} is there and is no preset (it has no config.json): even --force does not replace it"
    assert names(home) == ["mine.txt"]
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "inside" / "it"):
        message = refused(capsys, "opt_tiny_stdlib", target, "--to", "hf", "--force")
        assert message == f"{tmp_path / 'file'} is there and is no directory"


def test_an_empty_name_is_not_the_directory_we_are_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    assert refused(capsys, "t5_tiny_numbers", "", "--to", "hf", "--force") == "the directory to write to is '', wanted a name"
    with pytest.raises(ValueError, match="wanted a name"):
        OPTBackbone(**SIZES).save_to_preset("")
    assert names(tmp_path) == ["mine.txt"]


def test_source_and_target_lie_apart(tmp_path, capsys):
    OPTBackbone(**SIZES, seed=0).save_to_preset(tmp_path / "a" / "source")
    source = tmp_path / "a" / "source"
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "inside", tmp_path / "a", tmp_path / "link", tmp_path / "link" / "inside"):
        assert refused(capsys, source, target, "--to", "hf", "--force").endswith("must lie apart")
    assert Backbone.from_preset(source).count_params()
    assert "inside" not in names(source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_preset", "DST", "--to", "hf"), "unknown preset 'no_such_preset'"),
        (("opt_tiny_stdlib", "DST", "--to", "onnx"), "invalid choice: 'onnx'"),
        (("opt_tiny_stdlib", "DST"), "--to"),
        (
            ("opt_tiny_stdlib", "DST", "--to", "hf", "--dtype", "int8"),
            "dtype must be one of float32, float16, bfloat16, got 'int8'",
        ),
        (("opt_tiny_stdlib", "DST", "--to", "hf", "--max-shard-size", "0"), "max_shard_size must be a positive number of GiB"),
        (
            ("opt_tiny_stdlib", "DST", "--to", "hf", "--max-shard-size", "nan"),
            "max_shard_size must be a positive number of GiB",
        ),
    ],
)
def test_bad_requests(tmp_path, capsys, arguments, words):
    filled = [str(tmp_path / "target") if argument == "DST" else argument for argument in arguments]
    assert words in refused(capsys, *filled)
    assert names(tmp_path) == []


def test_a_damaged_source(tmp_path, capsys):
    OPTBackbone(**SIZES, seed=0).save_to_hf(tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in refused(capsys, tmp_path / "source", tmp_path / "new" / "target", "--to", "keras")
    assert names(tmp_path) == ["source"]


def test_a_model_that_transformers_cannot_hold(tmp_path, capsys):
    from refmodels import BloomBackbone

    BloomBackbone(**SIZES | {"intermediate_dim": 9}, seed=0).save_to_preset(tmp_path / "source")
    message = refused(capsys, tmp_path / "source", tmp_path / "target", "--to", "hf")
    assert message.startswith("intermediate_dim=9: BloomForCausalLM always has 4 * hidden_dim, 32")
    assert names(tmp_path) == ["source"]


# -- interrupted ----------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from refmodels.weights import keras_h5
write = keras_h5.write_tensors
def slow(directory, tensors, limit, written):
    def wait(tensor):
        print("writing", flush=True)
        time.sleep(0.5)
        written(tensor)
    write(directory, tensors, limit, wait)
keras_h5.write_tensors = slow
from refmodels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def interrupted(target, number, *options):
    """Begin to convert, and send the signal while weights are written."""
    command = [sys.executable, "-c", SLOW, "convert", "opt_tiny_stdlib", str(target), "--to", "keras", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_leaves_nothing(tmp_path, number, status):
    assert interrupted(tmp_path / "target", number) == status
    assert names(tmp_path) == []
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("mine")
    assert interrupted(tmp_path / "target", number, "--force") == status
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["config.json"]


IN_A_CALLBACK = """
import os, signal, sys, weakref
from refmodels.weights import keras_h5
write = keras_h5.write_tensors
class Thing: pass
def interrupted(directory, tensors, limit, written):
    def during(tensor):
        thing = Thing()
        there = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
        del thing  # what is raised in this callback is printed, and lost
        print("wrote", flush=True)
        written(tensor)
    write(directory, tensors, limit, during)
keras_h5.write_tensors = interrupted
from refmodels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_is_not_lost_in_a_callback(tmp_path):
    command = [sys.executable, "-c", IN_A_CALLBACK, "convert", "opt_tiny_stdlib", str(tmp_path / "target"), "--to", "keras"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "wrote\n")
    assert names(tmp_path) == []


def test_a_second_interrupt_is_obeyed_at_once():
    stopper = Stopper()
    with stopper.listening():
        stopper.between_tensors(True)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper().listening():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_killed_run_leaves_the_next_one_removes(tmp_path):
    assert interrupted(tmp_path / "target", signal.SIGKILL) == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".target.partial-")
    assert run("opt_tiny_stdlib", tmp_path / "target", "--to", "keras") == 0
    assert names(tmp_path) == ["target"]


def test_what_a_run_for_the_working_directory_leaves_is_not_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert interrupted(".", signal.SIGKILL) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    assert run("opt_tiny_stdlib", ".", "--to", "hf") == 0
    assert "config.json" in names(tmp_path)
    assert not any("partial" in name for name in names(tmp_path))


def test_a_target_that_comes_while_it_is_written_is_not_replaced(tmp_path):
    target = tmp_path / "target"

    def progress(done, total):
        target.mkdir(exist_ok=True)
        (target / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="--force replaces it"):
        convert("opt_tiny_stdlib", target, "hf", progress=progress)
    assert names(tmp_path) == ["target"]
    assert names(target) == ["mine.txt"]


@pytest.mark.parametrize("limit", [100_000, 300_000, 403_000])  # where HDF5 finds it out at the end, it ends the process
@pytest.mark.parametrize("form", ["keras", "hf"])
def test_a_disk_that_fills_up(tmp_path, form, limit):
    """A limit on the size of files stands for it: the system refuses a write in the middle of the weights."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "refmodels", "convert", "t5_tiny_numbers", str(tmp_path / "target"), "--to", form]
    done = subprocess.run(
        command, preexec_fn=limited, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("refmodels: error: ")
    assert "File too large" in line
    assert str(tmp_path / "target") in line or f"{tmp_path}/.target.partial-" in line
    assert names(tmp_path) == []
