"""`refmodels verify`, `trace` and `verify-op`: what they print where, what they write, and their exit statuses."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from replayed import inputs_of, run_of, small

from refmodels.cli import main
from refmodels.numerics import Verdict
from refmodels.trace import Trace, open_trace
from refmodels.verification.mapping import NameMap
from refmodels.verification.replay import step_names
from refmodels.verification.verify import cases

pytest.importorskip("h5py")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[1]
AGREES, DIVERGES, CANNOT_RUN, INCONCLUSIVE = range(4)

THEIRS = """
import numpy as np
from refmodels import OPTBackbone
from refmodels.op import watching
from refmodels.trace import Namer, trace


def model_of(checkpoint):
    return OPTBackbone.from_preset(checkpoint)


def right(checkpoint):
    model = model_of(checkpoint)
    print("a line on standard output")
    return lambda inputs: model.logits(model(inputs))


def steps(checkpoint, change=None, keep=lambda name: True, names=lambda name: name):
    model = model_of(checkpoint)

    def f(inputs):
        namer = Namer(model.params)

        def planted(op, args, kwargs, proceed):
            with namer.call(op, args, kwargs) as name:
                result = proceed()
            return change(name, result) if change is not None and isinstance(result, np.ndarray) else result

        with trace(model, only=keep) as steps, watching(planted):
            model.logits(model(inputs))
        return {names(name): array for name, array in steps.items()}

    return f


def wrong(checkpoint):
    return steps(checkpoint, lambda name, x: x * np.float32(1.01) if name == "layers.1.self_attention.value:linear" else x)


def renamed(checkpoint):
    return steps(checkpoint, names=lambda name: name.replace("layers.", "block_").replace(":", "/"))


def layers(checkpoint):
    return steps(checkpoint, keep=lambda name: name.endswith(":opt_decoder_layer"))


def unstable(checkpoint):
    model = model_of(checkpoint)

    def f(inputs):
        if inputs["token_ids"].shape[0] == 1:
            raise RuntimeError("I take no single rows")
        return model.logits(model(inputs))

    return f


def nothing():
    return lambda inputs: {"mystery": np.ones(3)}


def crash():
    return lambda inputs: 1 / 0


def of_ours(model):
    return lambda inputs: {"logits": 1.01 * model.logits(model(inputs))}


class Held:
    def run(self, inputs, inject=None):
        return {"logits": np.ones((*inputs["token_ids"].shape, 17), np.float32)}


held = Held()


def ends():
    def f(inputs):
        raise SystemExit(0)

    return f


def ends_at_once():
    raise SystemExit


class Ends:
    def run(self, inputs, inject=None):
        return {"logits": np.ones(3)}

    def facts(self):
        raise SystemExit(0)


def unreadable():
    return lambda inputs: {"\x1b[31m" + "x" * 10_000: np.ones(3)}


def my_softmax(scores, mask):
    scores = np.where(mask.any(-1, keepdims=True), np.where(mask, scores, -np.inf), 0)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(-1, keepdims=True)


def my_loud_softmax(scores, mask):
    raise ValueError("\x1b[31m" + "x" * 10_000)


def my_wrong_softmax(scores, mask):
    weights = np.exp(np.where(mask, scores, -1e4))
    return weights / weights.sum(-1, keepdims=True)


number = 3
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a preset, and a module of theirs."""
    directory = tmp_path_factory.mktemp("verify")
    model = small("opt")
    model.save_to_preset(directory / "preset")
    (directory / "theirs_cli.py").write_text(THEIRS)
    return directory


@pytest.fixture
def run(here, monkeypatch, capsys):
    """`run("verify", ...)` in this process, in that directory: exit status, standard output, standard error."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield call
    sys.modules.pop("theirs_cli", None)


def verified(run, target, *more, laws=False):
    arguments = [] if target is None else [f"theirs_cli:{target}"]
    return run("verify", *arguments, "--like", "preset", *([] if laws else ["--no-laws"]), *more)


# -- verify ---------------------------------------------------------------------------------------------------------------


def test_what_is_right_agrees(run):
    status, out, err = verified(run, "right")
    assert status == AGREES
    assert "a line on standard output" in err
    assert "a line on standard output" not in out
    assert "AGREES" in out
    for case in ("one row", "padded on the right", "padded on the left", "long"):
        assert case in out


def test_what_is_wrong_diverges_where_it_is_wrong(run):
    status, out, err = verified(run, "wrong")
    assert status == DIVERGES
    assert "DIVERGES" in out
    assert "layers.1.self_attention.value:linear" in out
    assert err == ""


def test_every_layer_step_by_step(run):
    short, long = (verified(run, "wrong", "--case", "one row", *more)[1] for more in ((), ("--all-steps",)))
    names = [
        "  self_attention.value:linear",
        "  feedforward_layer_norm:layer_norm",
    ]  # in layer 1, which is wrong, and in layer 0
    assert [sum(name in line for line in short.splitlines()) for name in names] == [1, 1]
    assert [sum(name in line for line in long.splitlines()) for name in names] == [2, 2]


def test_json(run):
    status, out, _ = verified(run, "wrong", "--json", "--case", "one row")
    found = json.loads(out)
    assert (status, found["status"], found["candidate"]) == (DIVERGES, DIVERGES, "theirs_cli:wrong")
    assert found["first"] == {"case": "one row", "step": "layers.1.self_attention.value:linear"}
    assert [case["name"] for case in found["cases"]] == ["one row"]
    steps = found["cases"][0]["steps"]
    assert len(steps) == len(step_names(small("opt"), cases(small("opt"))[0].inputs))
    assert [step["name"] for step in steps if not step["local"]["ok"]] == ["layers.1.self_attention.value:linear"]
    assert verified(run, "right", "--json", "--case", "one row")[0] == AGREES


def test_what_only_adds_up_is_inconclusive(run, monkeypatch):
    """Every step within its bound, and yet the last of them far from our own run."""
    import refmodels.cli.verify

    def verify(*arguments, **options):
        found = refmodels.verification.verify.verify(*arguments, **options)
        *steps, last = found.cases[0].report.steps
        steps.append(replace(last, through=Verdict(False, "opt_logits: planted", 3.0, 1.0, (0, 0, 0))))
        return replace(found, cases=(replace(found.cases[0], report=replace(found.cases[0].report, steps=tuple(steps))),))

    monkeypatch.setattr(refmodels.cli.verify, "verify", verify)
    status, out, _ = verified(run, "right", "--case", "one row")
    assert status == INCONCLUSIVE
    assert "INCONCLUSIVE" in out


def test_a_type(run):
    status, out, _ = verified(run, "right", "--dtype", "bfloat16", "--case", "one row", "--json")
    assert (status, json.loads(out)["arithmetic"]) == (AGREES, "bfloat16")
    status, out, _ = verified(run, "right", "--products", "tf32", "--case", "one row", "--json")
    assert (status, json.loads(out)["arithmetic"]) == (AGREES, "float32 with products in tf32")


def test_cases_and_seeds(run, here):
    outs = [json.loads(verified(run, "layers", "--json", "--case", "long", "--seed", seed)[1]) for seed in (0, 0, 1)]
    assert outs[0] == outs[1] != outs[2]
    several = json.loads(verified(run, "layers", "--json", "--case", "long", "--case", "one row")[1])
    assert [case["name"] for case in several["cases"]] == ["one row", "long"]
    (here / "in.json").write_text('{"token_ids": [[2, 5, 7], [1, 1, 0]], "padding_mask": [[1, 1, 1], [1, 1, 0]]}')
    given = json.loads(verified(run, "layers", "--json", "--inputs", "in.json")[1])
    assert [case["name"] for case in given["cases"]] == ["in.json"]
    assert given["cases"][0]["steps"][0]["shape"] == [2, 3, 12]


def test_laws(run):
    status, out, _ = verified(run, "right", "--case", "one row", "--json", laws=True)
    laws = json.loads(out)["laws"]
    assert status == AGREES
    assert any(law["verdict"] is not None for law in laws)
    assert all(law["verdict"] is None or law["verdict"]["ok"] for law in laws)


def test_files(run, tmp_path):
    status, _, _ = verified(run, "wrong", "--junit", tmp_path / "j.xml", "--html", tmp_path / "p.html", "--case", "one row")
    assert status == DIVERGES
    assert "layers.1.self_attention.value:linear" in (tmp_path / "j.xml").read_text()
    page = (tmp_path / "p.html").read_text()
    assert "layers.1.self_attention.value" in page


def test_a_baseline_excuses_what_was_as_wrong(run, tmp_path):
    _, out, _ = verified(run, "wrong", "--json", "--case", "one row")
    (tmp_path / "before.json").write_text(out)
    assert verified(run, "wrong", "--case", "one row", "--baseline", tmp_path / "before.json")[0] == AGREES
    status, out, _ = verified(run, "wrong", "--baseline", tmp_path / "before.json", "--json")
    assert status == DIVERGES
    assert any("long" in line for line in json.loads(out)["worse"])
    status, _, err = verified(run, "wrong", "--baseline", tmp_path / "nothing.json")
    assert (status, err.count("\n")) == (CANNOT_RUN, 1)


def test_a_reproduction_fails_when_run(run, here, tmp_path):
    status, _, err = verified(run, "wrong", "--case", "padded on the right", "--reproduce", tmp_path / "small")
    assert status == DIVERGES
    script = tmp_path / "small" / "reproduce.py"
    assert f"{script}: run this to see it again" in err
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    done = subprocess.run([sys.executable, script], capture_output=True, cwd=here, env=environment, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["of_ours", "held"])
def test_a_reproduction_of_what_no_script_can_build_has_the_step_alone(run, here, tmp_path, target):
    status, _, _ = verified(run, target, "--case", "one row", "--reproduce", tmp_path / "small")
    assert status == DIVERGES
    script = tmp_path / "small" / "reproduce.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    done = subprocess.run([sys.executable, script], capture_output=True, cwd=here, env=environment, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "This script has the step alone" in script.read_text()


def test_a_reproduction_runs_what_a_mapping_only_renames(run, here, tmp_path):
    """So it shows when the implementation is right again."""
    (here / "renamed.py").write_text(
        "import os, theirs_cli\n\n\ndef build(checkpoint):\n"
        "    wrong, right = theirs_cli.wrong(checkpoint), theirs_cli.steps(checkpoint)\n"
        "    f = right if os.environ.get('RIGHT') else wrong\n"
        "    return lambda inputs: {name.replace('layers.', 'block_'): a for name, a in f(inputs).items()}\n"
    )
    pattern = "self_attention.value:linear"
    (tmp_path / "names.toml").write_text(f'"block_{{i}}.{pattern}" = "layers.{{i}}.{pattern}"\n')
    options = ["--no-laws", "--case", "one row", "--mapping", tmp_path / "names.toml", "--reproduce", tmp_path / "small"]
    status, _, _ = run("verify", "renamed:build", "--like", "preset", *options)
    assert status == DIVERGES
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    for right, wanted in ((), 1), ((("RIGHT", "1"),), 0):
        done = subprocess.run(
            [sys.executable, tmp_path / "small" / "reproduce.py"],
            capture_output=True, cwd=here, env=environment | dict(right), text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == wanted, done.stdout + done.stderr


def test_nothing_to_reproduce(run, tmp_path):
    status, _, _ = verified(run, "right", "--case", "one row", "--reproduce", tmp_path / "small")
    assert status == AGREES
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["theirs_cli:nothing", "--like", "preset"], "no step to compare: theirs are mystery"),
        (["theirs_cli:crash", "--like", "preset"], "theirs_cli:crash fails on token_ids (1, 7), padding_mask (1, 7): Zero"),
        (["theirs_cli:unstable", "--like", "preset"], "RuntimeError: I take no single rows (theirs_cli.py, line"),
        (
            ["theirs_cli:ends", "--like", "preset"],
            "theirs_cli:ends fails on token_ids (1, 7), padding_mask (1, 7): SystemExit: 0",
        ),
        (["theirs_cli:ends_at_once", "--like", "preset"], "theirs_cli:ends_at_once fails: SystemExit"),
        (["theirs_cli:Ends", "--like", "preset"], "the implementation ends Python with 0"),
        (["theirs_cli:unreadable", "--like", "preset"], "theirs are \\x1b[31mxxx"),
        (["theirs_cli:crash", "--like", "preset", "--junit", "nowhere/x.xml"], "nowhere/x.xml: nowhere is no directory"),
        (["theirs_cli:crash", "--like", "preset", "--html", "preset"], "preset: a directory, wanted the file to write"),
        (
            ["theirs_cli:crash", "--like", "preset", "--reproduce", "theirs_cli.py"],
            "theirs_cli.py: a file, wanted the directory",
        ),
        (["theirs_cli:crash", "--like", "preset", "--baseline", "theirs_cli.py"], "theirs_cli.py: not valid JSON"),
        (["theirs_cli:crash", "--like", "preset", "--propose", "theirs_cli.py"], "theirs_cli.py is there already"),
        (["theirs_cli:number", "--like", "preset"], "gives int, wanted a function"),
        (["theirs_cli:none", "--like", "preset"], "theirs_cli has no 'none'"),
        (["no_such_module:build", "--like", "preset"], "no module 'no_such_module'"),
        (["theirs_cli:right", "--like", "nowhere"], "nowhere"),
        (["theirs_cli:right", "--like", "preset", "--dtype", "float8"], "float8"),
        (["--like", "preset"], "wanted one of TARGET, --exec and --dumps"),
        (["theirs_cli:right", "--exec", "true", "--like", "preset"], "wanted one of TARGET, --exec and --dumps"),
        (["theirs_cli:right", "--like", "preset", "--case", "short"], "no case is named 'short': they are 'one row'"),
        (["theirs_cli:right", "--like", "preset", "--inputs", "none.npz"], "none.npz"),
        (["theirs_cli:right", "--like", "preset", "--mapping", "none.toml"], "none.toml"),
        (["theirs_cli:right", "--like", "preset", "--inject", "*"], "--inject is for --exec"),
        (["--exec", "true", "--like", "preset", "--inject", "nothing*"], "--inject nothing*: no step has such a name"),
        (["--exec", "false", "--like", "preset"], "false gives exit status 1; it said: nothing"),
        (["--exec", "no-such-program", "--like", "preset"], "no-such-program cannot be run"),
        (["--dumps", "nowhere", "--like", "preset"], "nowhere"),
    ],
)
def test_what_cannot_be_run(run, arguments, words):
    """One line, and the exit status 2: that of 1 is for what diverges."""
    status, out, err = run("verify", *arguments, "--no-laws")
    *_, line = err.splitlines()
    assert (status, out) == (CANNOT_RUN, "")
    assert line.startswith("refmodels: error: ")
    assert words in line
    assert line.isprintable()
    assert len(line) < 1000


def test_an_interface_that_nobody_expected_is_no_divergence(run, monkeypatch):
    """What is a defect of ours, or of a package that it uses, has the exit status 2 too."""
    import refmodels.cli.verify

    def broken(*arguments, **options):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(refmodels.cli.verify, "verify", broken)
    status, _, err = verified(run, "right")
    assert (status, err.splitlines()[-1]) == (CANNOT_RUN, "refmodels: error: KeyError: 'nobody thought of this'")


def test_nothing_but_padding_is_an_error(run, here):
    np.savez(
        here / "padding.npz",
        **{
            "in.token_ids": np.ones((1, 2), int),
            "in.padding_mask": np.zeros((1, 2), bool),
            "opt_logits": np.ones((1, 2, 17), np.float32),
        },
    )
    status, _, err = verified(run, None, "--dumps", "padding.npz")
    assert status == CANNOT_RUN
    assert "nothing was judged: everything in it is padding" in err


# -- processes, dumps, mapping files --------------------------------------------------------------------------------------


def test_a_process(run, here):
    (here / "engine.py").write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            from refmodels import OPTBackbone
            from refmodels.trace import Trace, open_trace
            checkpoint, given, output = sys.argv[1:]
            model = OPTBackbone.from_preset(checkpoint)
            with open_trace(given) as found:
                inputs, injected = found.inputs, sorted(found)
            Trace({{"logits": model.logits(model(inputs))}}, facts={{"injected": " ".join(injected)}}).save(output)
        """)
    )
    command = f"{sys.executable} engine.py {{checkpoint}}"
    status, out, _ = verified(run, None, "--exec", command, "--case", "one row", "--json")
    assert status == AGREES
    assert json.loads(out)["facts"] == {"injected": ""}  # what it says of itself is shown


def test_a_process_that_takes_our_values(run, here):
    (here / "echo.py").write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            from refmodels.trace import Trace, open_trace
            with open_trace(sys.argv[1]) as found:
                Trace({{name.removeprefix("inject."): found[name] for name in found}}).save(sys.argv[2])
        """)
    )
    options = ["--exec", f"{sys.executable} echo.py", "--case", "one row"]
    status, out, _ = verified(run, None, *options, "--inject", "layers.*:opt_decoder_layer", "--json")
    assert status == AGREES
    names = [step["name"] for step in json.loads(out)["cases"][0]["steps"]]
    assert names == ["layers.0:opt_decoder_layer", "layers.1:opt_decoder_layer"]
    assert verified(run, None, *options)[0] == CANNOT_RUN


def test_what_a_process_said_is_shown(run, here):
    (here / "failing.py").write_text("import sys\nprint('first', file=sys.stderr)\nprint('second')\nsys.exit(4)\n")
    status, out, err = verified(run, None, "--exec", f"{sys.executable} failing.py")
    assert (status, out) == (CANNOT_RUN, "")
    *said, line = err.splitlines()
    assert sorted(said) == ["  | first", "  | second"]
    assert line.startswith(f"refmodels: error: {sys.executable} ")
    assert "gives exit status 4; it said: " in line


def test_dumps(run, tmp_path):
    model, inputs = small("opt"), inputs_of("opt", lengths=[7, 3])
    steps = run_of(model, inputs)
    Trace(steps, inputs).save(tmp_path / "run.safetensors")
    assert verified(run, None, "--dumps", tmp_path)[0] == AGREES
    wrong = {**steps, "layers.0:relu": steps["layers.0:relu"] + np.float32(1e-3)}
    Trace(wrong, inputs).save(tmp_path / "run.safetensors")
    status, out, _ = verified(run, None, "--dumps", tmp_path / "run.safetensors")
    assert status == DIVERGES
    assert "layers.0:relu" in out
    Trace(steps).save(tmp_path / "run.safetensors")
    assert verified(run, None, "--dumps", tmp_path)[0] == CANNOT_RUN
    np.savez(tmp_path.parent / "in.npz", **inputs)
    assert verified(run, None, "--dumps", tmp_path, "--inputs", tmp_path.parent / "in.npz")[0] == AGREES


def test_a_mapping_is_proposed_and_then_given(run, tmp_path):
    path = tmp_path / "mapping.toml"
    assert verified(run, "renamed", "--case", "one row")[0] == AGREES  # by the names that happen to be ours: opt_logits
    status, out, _ = verified(run, "renamed", "--propose", path)
    assert (status, out) == (AGREES, f"{path}: read it, correct it, then give it as --mapping\n")
    text = path.read_text()
    assert '"block_{i}.feedforward_layer_norm/layer_norm" = "layers.{i}.feedforward_layer_norm:layer_norm"' in text
    entries = NameMap.read(path).entries
    status, out, _ = verified(run, "renamed", "--mapping", path, "--json", "--case", "padded on the right")
    assert status == AGREES
    names = {step["name"] for step in json.loads(out)["cases"][0]["steps"]}
    assert {"layers.0.self_attention:attention_scores", "layers.1:relu"} <= names
    assert len(names) >= len(entries)
    status, _, err = verified(run, "renamed", "--propose", path)
    assert (status, "is there already" in err) == (CANNOT_RUN, True)
    assert path.read_text() == text
    path.write_text(text + '"no.such" = "layers.0:add"\n')
    status, _, err = verified(run, "renamed", "--mapping", path)
    assert (status, "mapping.toml: entry 'no.such': names nothing of theirs" in err) == (CANNOT_RUN, True)
    path.write_text('"block_0/add" = "layers.0:adding"\n')
    status, _, err = verified(run, "renamed", "--mapping", path)
    assert (status, "the model has no step 'layers.0:adding'; near are layers.0:add" in err) == (CANNOT_RUN, True)


# -- trace ----------------------------------------------------------------------------------------------------------------


def test_trace(run, tmp_path):
    path = tmp_path / "run.safetensors"
    status, out, err = run("trace", "preset", "-o", path)
    model = small("opt")
    names = step_names(model, cases(model)[0].inputs)
    assert (status, out, err) == (0, f"{path}: {len(names)} steps\n", "")
    with open_trace(path) as stored:
        assert list(stored) == list(names)
        assert stored.inputs.keys() == {"token_ids", "padding_mask"}
        assert stored.facts | {"source": "refmodels", "family": "opt", "dtype": "float32", "preset": "preset"} == stored.facts
    assert verified(run, None, "--dumps", path)[0] == AGREES


def test_trace_of_some_steps_and_inputs(run, here, tmp_path):
    (here / "in.json").write_text('{"token_ids": [[2, 5, 7]]}')
    path = tmp_path / "run.safetensors"
    assert run("trace", "preset", "-o", path, "--only", "layers.1:*", "--only", "opt_logits", "--inputs", "in.json")[0] == 0
    with open_trace(path) as stored:
        assert list(stored) == ["layers.1:add", "layers.1:relu", "layers.1:add.2", "layers.1:opt_decoder_layer", "opt_logits"]
        assert stored.inputs["token_ids"].tolist() == [[2, 5, 7]]
    for arguments, words in (
        (["--only", "nothing*"], "--only nothing*: no step has such a name"),
        (["--inputs", "in.json", "--text", "x"], "two ways to say one thing"),
        (["--target", "x"], "--target is what T5"),
        (["--text", "x"], "no such file"),
    ):
        status, _, err = run("trace", "preset", "-o", path, *arguments)
        assert status != 0
        assert words in err


def test_trace_of_a_text(run, tmp_path):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "run.safetensors"
    options = ["--text", "spell: 4207", "--target", "four", "--only", "t5_logits"]
    assert run("trace", "t5_tiny_numbers", "-o", path, *options)[0] == 0
    with open_trace(path) as stored:
        inputs, (logits,) = stored.inputs, stored.values()
    assert inputs["encoder_padding_mask"].all()
    assert inputs["decoder_token_ids"][0, 0] == 0
    assert logits.shape[:2] == inputs["decoder_token_ids"].shape
    assert logits.shape[1] > 1


# -- verify-op ------------------------------------------------------------------------------------------------------------


def test_verify_op(run):
    status, out, err = run("verify-op", "masked_softmax", "theirs_cli:my_softmax", "--examples", 30, "--dtype", "float32",
                           "--dtype", "float64")  # fmt: skip
    assert (status, err) == (AGREES, "")
    assert [line.split()[-1] for line in out.splitlines()] == ["VERDICT", "right", "right"]


def test_verify_op_prints_no_control_characters_of_theirs(run):
    status, out, _ = run("verify-op", "masked_softmax", "theirs_cli:my_loud_softmax", "--examples", "1")
    assert status == DIVERGES
    assert "raises ValueError: \\x1b[31mxxx" in out
    assert all(line.isprintable() and len(line) <= 2000 for line in out.splitlines())


def test_verify_op_of_a_wrong_one(run):
    status, out, _ = run("verify-op", "masked_softmax", "theirs_cli:my_wrong_softmax", "--examples", 30)
    assert status == DIVERGES
    line = next(line for line in out.splitlines() if "refmodels verify-op" in line).split()[1:]
    assert run(*line)[0] == DIVERGES
    status, out, _ = run(*line, "--json")
    found = json.loads(out)
    assert status == DIVERGES
    assert (found["right"], found["checked"][0]["examples"]) == (False, 1)
    assert found["checked"][0]["failures"][0]["op"] == "masked_softmax"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_op", "theirs_cli:my_softmax"], "no op is named 'no_op'"),
        (["relu", "theirs_cli:my_softmax"], "takes (scores, mask), and relu has (x)"),
        (["relu", "theirs_cli:number"], "is int, wanted a function"),
        (["relu", "theirs_cli"], "wanted MODULE:NAME"),
        (["masked_softmax", "theirs_cli:my_softmax", "--dtype", "float8"], "dtype must be one of"),
        (["masked_softmax", "theirs_cli:my_softmax", "--example", "x"], "x"),
    ],
)
def test_verify_op_that_cannot_be_run(run, arguments, words):
    status, out, err = run("verify-op", *arguments)
    assert (status, out, err.count("\n")) == (CANNOT_RUN, "", 1)
    assert words in err


def test_exit_statuses_of_a_process(here):
    """As a shell sees them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "accel")])}
    for op, wanted in (("masked_softmax", AGREES), ("relu", CANNOT_RUN)):
        command = [sys.executable, "-m", "refmodels", "verify-op", op, "theirs_cli:my_softmax", "--examples", "5"]
        assert subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=120).returncode == wanted


def test_what_a_candidate_prints_below_python_is_no_result(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import os\n"
        "from refmodels import OPTBackbone\n"
        "def build():\n"
        "    model = OPTBackbone.from_preset('opt_tiny_stdlib')\n"
        "    def run(inputs):\n"
        "        os.write(1, b'from below')\n"
        "        return model.logits(model(inputs))\n"
        "    return run\n"
    )
    command = [sys.executable, "-m", "refmodels", "verify", "loud:build", "--like", "opt_tiny_stdlib", "--json", "--no-laws"]
    done = subprocess.run([*command, "--case", "one row"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert json.loads(done.stdout)["outcome"] == "agrees"
    assert "from below" in done.stderr


CHOOSING = """
from refmodels import OPTBackbone
from refmodels.verification.adaptors.own import OwnCandidate
class Wrong(OwnCandidate):
    def generate(self, inputs, count):
        return super().generate(inputs, count) * 0 + 7
def right():
    return OwnCandidate(OPTBackbone.from_preset("opt_tiny_stdlib"))
def wrong():
    return Wrong(OPTBackbone.from_preset("opt_tiny_stdlib"))
"""


@pytest.mark.parametrize(
    ("build", "count", "status", "said"),
    [
        ("right", "3", 0, "generation of 3 tokens: 3 tokens: 0 ties, 0 defects"),
        ("wrong", "3", 1, "generation of 3 tokens"),
        ("right", "5000", 2, "more than the model's max_sequence_length"),
    ],
)
def test_a_generation_is_judged(tmp_path, monkeypatch, capsys, build, count, status, said):
    (tmp_path / "choosing.py").write_text(CHOOSING)
    monkeypatch.chdir(tmp_path)
    command = [
        "verify",
        f"choosing:{build}",
        "--like",
        "opt_tiny_stdlib",
        "--case",
        "one row",
        "--no-laws",
        "--generate",
        count,
    ]
    assert main(command) == status
    assert said in "".join(capsys.readouterr())
