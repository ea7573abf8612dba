"""What `refmodels verify` takes in: Python functions and objects, processes, dumps; mapping files, and proposals for them."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from replayed import FAMILIES, inputs_of, run_of, small

from refmodels.files import CheckpointError
from refmodels.op import OPS
from refmodels.trace import Trace
from refmodels.verification import forms
from refmodels.verification.candidate import CandidateError
from refmodels.verification.forms import (
    DumpsForm,
    FunctionForm,
    ObjectForm,
    ProcessForm,
    model_inputs,
    python_form,
    read_inputs,
    sole_output,
)
from refmodels.verification.mapping import MappingError, NameMap, fused_part
from refmodels.verification.propose import proposed, telling_inputs
from refmodels.verification.replay import replay
from refmodels.verification.single_op import check_function, op_named
from refmodels.verification.verify import Case, verify

pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[1]


def never():
    raise AssertionError("nobody asked for the weights")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(source)`: a module of theirs in the current directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = []

    def write(source):
        name = f"theirs_{len(made)}_{os.getpid()}_{abs(hash(tmp_path))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def outputs(model, inputs):
    hidden = model(inputs)
    return model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)


# -- Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_that_gives_outputs(family):
    model, inputs = small(family), inputs_of(family, lengths=[7, 3])
    form = FunctionForm(lambda given: {"logits": outputs(model, given)}, "theirs", model)
    steps = form.run(inputs)
    assert list(steps) == [f"{family}_logits"]
    assert replay(model, inputs, steps).ok
    assert verify(form, model).status == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_array_alone_is_told_by_its_shape(family):
    model, inputs = small(family), inputs_of(family)
    assert list(FunctionForm(lambda given: outputs(model, given), "x", model).run(inputs)) == [f"{family}_logits"]
    hidden = FunctionForm(
        lambda given: run_of(model, given)[f"{family}_{'decoder' if family == 't5' else 'backbone'}"], "x", model
    )
    assert replay(model, inputs, hidden.run(inputs)).ok
    with pytest.raises(CandidateError, match=r"has shape \(2, 7\), wanted .*17\) \(logits\) or .*12\) \(hidden\)"):
        FunctionForm(lambda given: np.ones((2, 7)), "x", model).run(inputs)


def test_an_array_that_could_be_either_is_refused():
    model, inputs = small("opt", vocabulary_size=12), {"token_ids": np.ones((1, 3), int)}
    with pytest.raises(CandidateError, match="may be either: give a dictionary"):
        sole_output("x", np.ones((1, 3, 12)), inputs, model)


def test_steps_by_our_names_and_by_none():
    model, inputs = small("t5"), inputs_of("t5")
    steps = run_of(model, inputs)
    given = {
        "encoder_sequence_output": steps["t5_encoder"],
        "decoder.layers.0:add": steps["decoder.layers.0:add"],
        "mine": np.ones(2),
    }
    report = replay(model, inputs, FunctionForm(lambda _: given, "x", model).run(inputs))
    assert [step.name for step in report.steps] == ["t5_encoder", "decoder.layers.0:add"]
    assert report.unknown == ("mine",)


class Tensor:
    """As PyTorch's: NumPy cannot take one that wants a gradient or is bfloat16."""

    def __init__(self, values, dtype="torch.float32", free=False):
        self.values, self.dtype, self.free = values, dtype, free

    def detach(self):
        return Tensor(self.values, self.dtype, True)

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.values, "torch.float32", self.free)

    def __array__(self, dtype=None, copy=None):
        assert self.free
        assert self.dtype != "torch.bfloat16"
        return self.values


def test_tensors_of_others():
    values = np.array([1.5, -2], np.float32)
    assert forms.as_array("x", "y", Tensor(values)).tolist() == [1.5, -2]
    half = forms.as_array("x", "y", Tensor(values, "torch.bfloat16"))
    assert (half.dtype.name, half.astype(float).tolist()) == ("bfloat16", [1.5, -2])
    for wrong in (None, "text", object(), [[1], [1, 2]], np.ones(1, complex), {"a": 1}):
        with pytest.raises(CandidateError, match="x: y is "):
            forms.as_array("x", "y", wrong)


def test_a_function_cannot_change_our_inputs():
    model, inputs = small("opt"), inputs_of("opt")
    before = {name: array.copy() for name, array in inputs.items()}

    def spoil(given):
        result = outputs(model, given)
        for array in given.values():
            array[...] = 0
        return result

    assert replay(model, inputs, FunctionForm(spoil, "x", model).run(inputs)).ok
    assert all(np.array_equal(inputs[name], array) for name, array in before.items())


def test_build_with_our_weights(module, tmp_path):
    model, written = small("bloom", intermediate_dim=48), []
    name = module("""
        from refmodels import BloomBackbone
        def build(checkpoint):
            model = BloomBackbone.from_preset(checkpoint)
            return lambda inputs: {"logits": model.logits(model(inputs))}
    """)

    def checkpoint():
        written.append(1)
        model.save_to_hf(tmp_path / "weights")
        return tmp_path / "weights"

    form = python_form(f"{name}:build", model, checkpoint)
    assert (written, form.takes_checkpoint) == ([1], True)
    assert verify(form, model, [Case("x", inputs_of("bloom"))]).status == 0


@pytest.mark.parametrize(
    ("source", "attribute", "words"),
    [
        ("", "build", "has no 'build'"),
        ("def built(): pass", "build", "near are \\['built'"),
        ("import nothing_of_the_kind", "build", "ModuleNotFoundError.*nothing_of_the_kind.*line 1"),
        ("1 / 0", "build", "importing .* fails: ZeroDivisionError: division by zero \\(theirs_.*py, line 1\\)"),
        ("def build(): return 3", "build", "gives int, wanted a function or an object with run"),
        ("def build(size): return 3", "build", "takes size: wanted a function that gives the model, of nothing but"),
        ("def build():\n    return 1 / 0", "build", "fails: ZeroDivisionError: division by zero \\(.*, line 2\\)"),
        ("build = 7", "build", "gives int, wanted a function"),
        ("class A:\n    class B:\n        pass", "A.C", "has no 'A.C'"),
    ],
)
def test_what_cannot_be_built(module, source, attribute, words):
    with pytest.raises(CandidateError, match=words):
        python_form(f"{module(source)}:{attribute}", small("opt"), never)


def test_a_spec_that_names_nothing(module, tmp_path):
    for spec in ("mypkg", "mypkg:", ":build", ""):
        with pytest.raises(CandidateError, match="wanted MODULE:NAME"):
            python_form(spec, small("opt"), never)
    with pytest.raises(CandidateError, match="no module 'no_such', neither in"):
        python_form("no_such.module:build", small("opt"), never)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "fails on token_ids \\(2, 7\\), padding_mask \\(2, 7\\): ZeroDivisionError: .*line 4"),
        ("return None", "its result is NoneType of dtype object, wanted an array"),
        ("return {1: inputs['token_ids']}", "under 1, wanted names"),
        ("return {'logits': (1, 'a')}", "logits is tuple"),
    ],
)
def test_a_function_that_fails(module, body, words):
    model = small("opt")
    name = module(f"""
        def build():
            def f(inputs):
                {body}
            return f
    """)
    with pytest.raises(CandidateError, match=words):
        python_form(f"{name}:build", model, never).run(inputs_of("opt"))


class Hooked:
    """An object with hooks, as somebody may write it: no class of ours."""

    name = "hooked"
    injects = ("layers.0:opt_decoder_layer",)

    def __init__(self, model, change=None):
        self.model, self.change, self.closed = model, change, False

    def run(self, inputs, inject=None):
        own = {}

        def change(name, result):
            own[name] = result if self.change is None else self.change(name, result)
            return (inject or {}).get(name, own[name])

        run_of(self.model, inputs, change)
        return own

    def facts(self):
        return {"version": 3}

    def generate(self, inputs, count):
        return [[1] * count]

    def close(self):
        self.closed = True


def test_an_object_with_hooks():
    model = small("opt")
    held = Hooked(model, lambda name, result: result + 1 if name == "layers.0:opt_decoder_layer" else result)
    form = ObjectForm(held, "spec", model)
    assert (form.name, form.dtype, form.injects) == ("hooked", "float32", frozenset(Hooked.injects))
    verification = verify(form, model, [Case("x", inputs_of("opt"))])
    assert [step.name for step in verification.cases[0].report.wrong] == ["layers.0:opt_decoder_layer"]
    assert verification.facts == {"version": "3"}
    assert form.generate(inputs_of("opt"), 2).tolist() == [[1, 1]]
    assert form.chunked(inputs_of("opt"), [1]) is None
    form.close()
    assert held.closed
    sound = ObjectForm(Hooked(model), "spec", model)
    assert verify(sound, model, [Case("x", inputs_of("opt"))]).status == 0


def test_an_object_that_computes_in_another_type():
    held = Hooked(small("opt"))
    held.dtype = "float16"
    with pytest.raises(CandidateError, match="computes in float16, and the reference is in float32: --dtype float16"):
        ObjectForm(held, "spec", small("opt"))
    held = Hooked(small("opt"))
    held.run = lambda inputs, inject=None: np.ones(3)
    with pytest.raises(CandidateError, match=r"run\(\) gives ndarray, wanted a dictionary"):
        ObjectForm(held, "spec", small("opt")).run(inputs_of("opt"))


# -- processes ------------------------------------------------------------------------------------------------------------


def program(tmp_path, body):
    path = tmp_path / "program.py"
    path.write_text("import sys, os, time\n" + textwrap.dedent(body))
    return f"{sys.executable} {path}"


def test_a_process_that_copies_what_it_was_given(tmp_path):
    """It is given inputs and what is to be injected, and gives any names."""
    model, inputs = small("opt"), inputs_of("opt")
    ours = run_of(model, inputs)
    name = "layers.0:opt_decoder_layer"
    command = program(
        tmp_path,
        f"""
        sys.path.insert(0, {str(ROOT)!r})
        from refmodels.trace import Trace, open_trace
        with open_trace(sys.argv[1]) as given:
            assert given.facts == {{"family": "opt", "dtype": "float32"}}, given.facts
            assert sorted(given.inputs) == ["padding_mask", "token_ids"]
            Trace({{"{name}": given["inject.{name}"]}}, facts={{"engine": "a copy"}}).save(sys.argv[2])
        """,
    )
    form = ProcessForm(command, model, never, injects=frozenset([name]))
    steps = form.run(inputs, {name: ours[name]})
    assert np.array_equal(steps[name], ours[name])
    assert replay(model, inputs, {**steps}).ok
    places = {str(tensor.file.parent) for tensor in steps._raw._tensors.values()}
    assert all(Path(place).is_dir() for place in places)
    form.close()
    assert not any(Path(place).exists() for place in places)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('what I wanted to say', file=sys.stderr); sys.exit(3)", "gives exit status 3; it said: what I wanted to say"),
        ("print('x' * 100_000 + 'the end'); sys.exit(1)", "it said: x{293}the end$"),
        ("os.kill(os.getpid(), 9)", "was ended by signal 9; it said: nothing"),
        ("pass", "exit status 0 and writes no file output.safetensors"),
        ("open(sys.argv[2], 'w').write('nonsense')", "writes no sound output: .*not a sound safetensors file"),
        ("os.symlink('/etc/passwd', sys.argv[2])", "writes no file"),
        ("1 / 0", "exit status 1; it said: ZeroDivisionError: division by zero$"),
        ("print('\\x1b[31m'); sys.exit(1)", "it said: \\?\\[31m$"),
    ],
)
def test_a_process_that_fails(tmp_path, body, words):
    form = ProcessForm(program(tmp_path, body), small("opt"), never)
    with pytest.raises(CandidateError, match=f"(?s){words}") as caught:
        form.run(inputs_of("opt"))
    assert len(str(caught.value)) < 6000
    form.close()


def test_a_process_that_does_not_end_is_ended_with_all_that_it_started(tmp_path):
    command = program(
        tmp_path,
        f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
        print("waiting", flush=True)
        time.sleep(60)
        """,
    )
    form = ProcessForm(command, small("opt"), never, timeout=6)
    with pytest.raises(CandidateError, match="has not ended after 6 seconds; it said: waiting"):
        form.run(inputs_of("opt"))
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child of the process still runs")


def test_commands_that_are_none():
    for command, words in (
        ("", "is empty"),
        ("'a", "cannot be split"),
    ):
        with pytest.raises(CandidateError, match=words):
            ProcessForm(command, small("opt"), never)
    with pytest.raises(CandidateError, match="/no/such/program cannot be run: No such file"):
        ProcessForm("/no/such/program", small("opt"), never).run(inputs_of("opt"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(source)`: the program of C, for the example of the protocol."""
    compiler = shutil.which("cc")
    if compiler is None:
        assert os.environ.get("REFMODELS_CC") != "1", "there is to be a C compiler here"
        pytest.skip("there is no C compiler (cc)")
    place = tmp_path_factory.mktemp("c")

    def compile_(source):
        (place / "candidate.c").write_text(source)
        flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([compiler, *flags, "-o", place / "candidate", place / "candidate.c", "-lm"], check=True)
        return place / "candidate"

    return compile_


C_SOURCE = (ROOT / "spec" / "candidate.c").read_text()
C_FAULTS = {
    "": None,
    "#define EPSILON 1e-5f -> #define EPSILON 1e-3f": "layers.0.self_attention_layer_norm:layer_norm",
    "variance / n -> variance / (n - 1)": "layers.0.self_attention_layer_norm:layer_norm",
    "#define OFFSET 2 -> #define OFFSET 0": "position_embedding:embedding",
    "positions[i % t * n + j] -> positions[j]": "opt_backbone:add",
}


@pytest.mark.parametrize(("fault", "step"), list(C_FAULTS.items()))
def test_the_example_in_c(compiled, tmp_path, fault, step):
    model = small("opt")
    model.save_to_hf(tmp_path / "weights")
    old, _, new = fault.partition(" -> ")
    assert old in C_SOURCE
    form = ProcessForm(f"{compiled(C_SOURCE.replace(old, new))} {{checkpoint}}", model, lambda: tmp_path / "weights")
    report = verify(form, model, [Case("x", inputs_of("opt", lengths=[7, 4]))]).cases[0].report
    assert len(report.steps) == 4
    assert {found.name for found in report.wrong} == ({step} if step else set())
    form.close()


def test_the_example_in_c_says_what_it_cannot_do(compiled, tmp_path):
    model = small("opt", "bfloat16")
    model.save_to_hf(tmp_path / "weights")
    form = ProcessForm(f"{compiled(C_SOURCE)} {{checkpoint}}", model, lambda: tmp_path / "weights")
    with pytest.raises(
        CandidateError, match=r"exit status 1; it said: .*embed_tokens\.weight is BF16, and this program computes in F32"
    ):
        form.run(inputs_of("opt"))


# -- dumps ----------------------------------------------------------------------------------------------------------------


def test_dumps_in_many_forms(tmp_path):
    model, inputs = small("bloom"), inputs_of("bloom", lengths=[7, 2])
    steps = run_of(model, inputs)
    names = list(steps)
    Trace({name: steps[name] for name in names[:20]}, inputs).save(tmp_path / "first.safetensors")
    np.savez(tmp_path / "more.npz", **{name: steps[name] for name in names[20:-1]})
    np.save(tmp_path / f"{names[-1]}.npy", steps[names[-1]])
    form = DumpsForm(tmp_path, model)
    assert set(form.inputs) == set(inputs)
    report = replay(model, form.inputs, form.run(form.inputs))
    assert report.ok
    assert len(report.steps) == len(steps)
    with pytest.raises(CandidateError, match="not of one with other token_ids"):
        form.run(inputs_of("bloom", seed=2))
    form.close()


def test_dumps_of_one_file_with_inputs_elsewhere(tmp_path):
    model, inputs = small("t5"), inputs_of("t5")
    logits = {"logits": run_of(model, inputs)["t5_logits"]}
    np.savez(tmp_path / "out.npz", **logits)
    with pytest.raises(CandidateError, match="has no inputs"):
        DumpsForm(tmp_path / "out.npz", model)
    form = DumpsForm(tmp_path / "out.npz", model, inputs)
    assert replay(model, inputs, form.run(form.inputs)).ok
    form.close()


def test_inputs_by_the_names_of_others(tmp_path):
    model, inputs = small("t5"), inputs_of("t5", lengths=[7, 3])
    theirs = {
        "input_ids": inputs["encoder_token_ids"].tolist(),
        "attention_mask": inputs["encoder_padding_mask"].astype(int).tolist(),
        "decoder_input_ids": inputs["decoder_token_ids"].tolist(),
    }
    (tmp_path / "in.json").write_text(json.dumps(theirs))
    found = read_inputs(tmp_path / "in.json", model)
    assert all(np.array_equal(found[name], array) for name, array in inputs.items())
    np.savez(tmp_path / "in.npz", **{"in.token_ids": np.array([[1, 2]])})
    found = read_inputs(tmp_path / "in.npz", small("opt"))
    assert (found["token_ids"].tolist(), found["padding_mask"].tolist()) == ([[1, 2]], [[True, True]])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "missing input 'token_ids'"),
        ({"token_ids": [[1, 99]]}, "is 99, wanted 0 to 16"),
        ({"token_ids": [1, 2]}, "shape"),
        ({"token_ids": [[1.5]]}, "must hold integers"),
        ({"token_ids": [["a"]]}, "must hold integers"),
        ({"token_ids": [[1]], "padding_mask": [[1, 1]]}, "wanted \\(1, 1\\)"),
        ({"token_ids": [[1]], "padding_mask": [[7]]}, "wanted 0 \\(padding\\) or 1"),
        ({"token_ids": [[1]], "tokens": [[1]]}, "input 'tokens' is none of token_ids"),
        ({"token_ids": [[1]], "input_ids": [[1]]}, "is there twice"),
    ],
)
def test_inputs_that_are_wrong(found, words):
    with pytest.raises(CheckpointError, match=f"x.json: .*{words}"):
        model_inputs({name: np.asarray(value) for name, value in found.items()}, small("opt"), "x.json")


@pytest.mark.parametrize("text", ["[1]", "{", '{"token_ids": [[1], [1, 2]]}', "[" * 100_000])
def test_a_file_of_inputs_that_is_none(tmp_path, text):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"in\.json"):
        read_inputs(tmp_path / "in.json", small("opt"))


# -- mapping files --------------------------------------------------------------------------------------------------------


def mapped(text, raw, family="opt", shape=lambda step: None):
    return NameMap.parse(textwrap.dedent(text).encode(), "m.toml").applied(raw, family, shape)


def test_names_and_patterns():
    raw = {name: np.ones(1) for name in ("h.0.a", "h.1.a", "h.1.b", "hs.0", "hs.1", "hs.2", "logits", "rest")}
    found = mapped(
        """
        "h.{i}.a" = "layers.{i}:add"
        "h.1.b" = ["layers.1:relu", "layers.1:add.2"]
        "hs.{i}" = "layers.{i-1}:opt_decoder_layer"
        "hs.0" = "opt_backbone:add"
        """,
        raw,
    )
    assert list(found) == [
        "layers.0:add", "layers.1:add", "layers.1:relu", "layers.1:add.2", "opt_backbone:add",
        "layers.0:opt_decoder_layer", "layers.1:opt_decoder_layer", "opt_logits", "rest",
    ]  # fmt: skip
    assert "layers.0:add" in found
    assert "h.0.a" not in found


def test_patterns_that_a_name_does_not_fit():
    raw = dict.fromkeys(["hs.0", "hs.1", "a.1.b.1", "a.1.b.2", "h.01.x", "h.x.x"], np.ones(1))
    text = """
        "hs.{i}" = "layers.{i-1}:add"
        "a.{i}.b.{i}" = "layers.{i}:relu"
    """
    assert list(mapped(text, raw)) == ["hs.0", "layers.0:add", "layers.1:relu", "a.1.b.2", "h.01.x", "h.x.x"]
    with pytest.raises(MappingError, match="names nothing of theirs"):
        mapped('"h.{i}.x" = "layers.{i}:add"', raw)


def heads(array, count=3):
    return array.reshape(*array.shape[:-1], count, -1)


X = np.random.default_rng(0).standard_normal((2, 7, 12))
THREE = [np.random.default_rng(i).standard_normal((2, 7, 12)) for i in range(3)]

LAYOUTS = {
    "axes = [1, 0, 2]": X.transpose(1, 0, 2),
    "axes = [0, 2, 1, 3], reshape = [0, 0, -1]": heads(X).transpose(0, 2, 1, 3),
    "reshape = [0, 0, 12]": heads(X),
    'reshape = "step"': X.reshape(14, 1, 12),
    "scale = 0.5": X * 2,
    "shift = -2": X + 2,
    "scale = 0.5, shift = -1": 2 * X + 2,
    'part = "query", layout = "blocked"': np.concatenate([X, *THREE[1:]], -1),
    'part = "key", layout = "blocked", heads = 3': np.concatenate([THREE[0], X, THREE[2]], -1),
    'part = "value", layout = "interleaved", heads = 4': np.stack([heads(a, 4) for a in (*THREE[:2], X)], -2).reshape(2, 7, 36),
    'axes = [1, 0, 2], part = "query", layout = "blocked"': np.concatenate([X, *THREE[1:]], -1).transpose(1, 0, 2),
}


@pytest.mark.parametrize(("how", "theirs"), list(LAYOUTS.items()))
def test_layouts(how, theirs):
    found = mapped(f'"x" = {{ step = "ours", {how} }}', {"x": theirs}, shape={"ours": X.shape}.get)
    assert found["ours"].shape == X.shape
    assert np.allclose(found["ours"], X, rtol=1e-15)


def test_heads_are_split():
    found = mapped('"x" = { step = "ours", heads = 3, axes = [0, 2, 1, 3] }', {"x": X})
    assert np.array_equal(found["ours"], heads(X).transpose(0, 2, 1, 3))
    with pytest.raises(ValueError, match="not 3 x 5 heads long"):
        fused_part(X, "query", "interleaved", 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x =", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("x = " + "1" * 5000, "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
        ("x = 3", "entry 'x': wanted a step or a table, found 3"),
        ("h.0.a = 'b'", "entry 'h': says no `step` \\(a name with dots in it must be in quotes\\)"),
        ("x = { axes = [0] }", "entry 'x': says no `step`"),
        ("x = { step = 3 }", "entry 'x': step is '3'"),
        ("x = { step = 'a', axis = [0] }", "entry 'x': 'axis' is none of part, axes"),
        ("x = { step = 'a', axes = [0, 'b'] }", "axes is .*wanted a list of axes"),
        ("x = { step = 'a', axes = [0, -1] }", "axes is .*wanted a list of axes"),
        ("x = { step = 'a', reshape = [-1, -1] }", "reshape is .*one -1 takes the rest"),
        ("x = { step = 'a', reshape = 'ours' }", "reshape is ours"),
        ("x = { step = 'a', part = 'query' }", "`part` and `layout` go together"),
        ("x = { step = 'a', layout = 'blocked' }", "`part` and `layout` go together"),
        ("x = { step = 'a', part = 'q', layout = 'blocked' }", "part is q, wanted one of query, key, value"),
        ("x = { step = 'a', part = 'query', layout = 'woven' }", "layout is 'woven', wanted one of interleaved, blocked"),
        ("x = { step = 'a', part = 'query', layout = 'interleaved' }", "need `heads`"),
        ("x = { step = 'a', heads = 0 }", "heads is 0, wanted the number of heads"),
        ("x = { step = 'a', scale = nan }", "scale is nan, wanted a number"),
        ("x = { step = 'a', shift = true }", "shift is True, wanted a number"),
        ("'a{i}' = 'b{j}'", "step 'b{j}' has {j}, which is not in the name of theirs"),
        ("'a{i+1}' = 'b{i}'", "{i\\+1} cannot stand in a name of theirs"),
        ("'y' = 'a'", "entry 'y': names nothing of theirs; near are 'x'"),
        ("'y{i}' = 'a'", "entry 'y{i}': names nothing of theirs"),
        ("'x' = 'other'", "would both be step 'other'"),
        ("'x' = ['a', 'a']", "would both be step 'a'"),
        ("'x' = 'a'\n'other' = 'a'", "entry 'other': 'x' and 'other' of theirs would both be step 'a'"),
        ("'n{i}' = 'a{i}'\n'n{i}2' = 'b{i}'", "'n12' fits 'n{i}' and 'n{i}2'"),
    ],
)
def test_mapping_files_that_are_wrong(text, words):
    with pytest.raises(MappingError, match=f"m.toml: .*{words}"):
        NameMap.parse(text.encode("latin-1"), "m.toml").applied({"x": X, "other": X, "n12": X}, "opt", lambda step: None)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("axes = [0, 1]", "axes = \\[0, 1\\] is no order of its 3 axes"),
        ("axes = [0, 1, 1]", "is no order of its 3 axes"),
        ("reshape = [0, 5, -1]", "does not fill"),
        ("reshape = [0, 0, 0, 0]", "0 keeps an axis, and there are but 3"),
        ("heads = 5", "heads = 5 does not divide"),
        ("part = 'key', layout = 'interleaved', heads = 5", "not 3 x 5 heads long"),
        ("reshape = 'step'", "the model has no step 'ours'"),
    ],
)
def test_entries_that_do_not_fit_an_array(how, words):
    found = mapped(f"x = {{ step = 'ours', {how} }}", {"x": X})
    with pytest.raises(CandidateError, match=f"m.toml: entry 'x': .*{words}"):
        found["ours"]


def test_a_step_that_the_model_has_not():
    model, inputs = small("opt"), inputs_of("opt")
    steps = run_of(model, inputs)
    names = NameMap.parse(b"'x' = 'layers.0:addd'\n'y' = 'layers.0:add'", "m.toml")
    form = FunctionForm(lambda _: {"x": steps["layers.0:add"], "y": steps["layers.0:add"]}, "f", model, names=names)
    report = replay(model, inputs, form.run(inputs))
    with pytest.raises(MappingError, match=r"m.toml: entry 'x': the model has no step 'layers.0:addd'; near are layers.0:add"):
        form.check_names(report)


def test_a_mapping_file_that_is_missing_or_too_large(tmp_path):
    (tmp_path / "m.toml").write_text('"x" = "y"')
    assert NameMap.read(tmp_path / "m.toml").entries[0].label == "m.toml: entry 'x'"
    with pytest.raises(FileNotFoundError):
        NameMap.read(tmp_path / "n.toml")
    with (tmp_path / "m.toml").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(CheckpointError, match="wanted at most"):
        NameMap.read(tmp_path / "m.toml")
    (tmp_path / "link.toml").symlink_to(tmp_path / "nothing.toml")
    with pytest.raises(FileNotFoundError):
        NameMap.read(tmp_path / "link.toml")


# -- proposals ------------------------------------------------------------------------------------------------------------


def disguised(steps, family):
    """The steps of a run under other names and in other layouts, as an engine may have them."""
    found = {}
    for name, array in steps.items():
        op = name.rpartition(":")[2]
        if op in ("linear", "dense") and "self_attention." in name and "output" not in name:
            continue  # they are fused below
        theirs = f"{'dec' if name.startswith('decoder') else ''}{name.replace('layers.', 'h.').replace(':', '/')}"
        if op.startswith("split_heads") or op == "attention_context":
            array = array.transpose(0, 2, 1, 3)
        elif op == "attention_scores":
            array = array.reshape(-1, *array.shape[2:])
        elif op == "relu":
            array = array.transpose(1, 0, 2)
        found[theirs] = array
    for layer in (0, 1) if family != "t5" else ():
        parts = [steps[f"layers.{layer}.self_attention.{part}:linear"] for part in ("query", "key", "value")]
        woven = np.stack([heads(part) for part in parts], -2).reshape(*parts[0].shape[:2], -1)
        found[f"h.{layer}.qkv"] = woven if family == "bloom" else np.concatenate(parts, -1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proposal_finds_what_was_disguised(family):
    model, inputs = small(family), inputs_of(family)
    steps = run_of(model, inputs)
    raw = disguised(steps, family)
    raw |= {"noise": np.random.default_rng(9).standard_normal((2, 7, 12)), "odd": np.ones((5, 5, 5, 5, 5, 5))}
    text = proposed(raw, model, inputs, "an engine")
    names = NameMap.parse(text.encode(), "p.toml")
    found = names.applied(raw, family, {step: array.shape for step, array in steps.items()}.get)
    right = [step for step in found if step in steps]
    assert len(right) > 0.5 * len({array.tobytes() for array in steps.values()})
    for step in right:
        assert np.allclose(np.asarray(found[step], float), np.asarray(steps[step], float), atol=1e-5), step
    assert replay(model, inputs, found).ok
    assert '# no step has the shape of "odd"' in text
    assert '# "noise" (2, 7, 12) is near no step' in text
    if family != "t5":
        layout = "interleaved" if family == "bloom" else "blocked"
        assert f'{{ step = "layers.{{i}}.self_attention.query:linear", part = "query", layout = "{layout}"' in text
        assert '"h.{i}.qkv" = [' in text
    assert any("{i}" in line and "axes = [0, 2, 1, 3]" in line for line in text.splitlines())


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_that_tell(family):
    """No size is that of anything else, so that an array has one shape alone."""
    model = small(family)
    checked = model.checked(telling_inputs(model))
    sizes = [size for name in model.inputs for size in checked[name].shape]
    assert not {1, 3, 4, 12, 20, 17} & set(sizes)
    assert len(set(sizes)) == len(sizes) - (family == "t5")  # its two sides have the same rows
    assert all(checked[mask].all() for mask, *_ in model.inputs.values())
    short = small("opt", max_sequence_length=4)
    assert short.checked(telling_inputs(short))["token_ids"].shape == (2, 4)


def test_a_proposal_does_not_decide_what_cannot_be_told():
    """Noise of a rounding upon it makes neither of two steps that are nearly the same the better one."""
    model, inputs = small("opt"), inputs_of("opt")
    attention = model.params["layers"][0]["self_attention"]
    attention["key"] = {name: array * np.float32(1 + 1e-6) for name, array in attention["query"].items()}
    query = run_of(model, inputs)["layers.0.self_attention.query:linear"]
    text = proposed({"q": query * np.float32(1 + 5e-7)}, model, inputs, "x\ny = 'z'")
    assert NameMap.parse(text.encode(), "p.toml").entries == ()
    assert '# "q" (2, 7, 12) could be any of these' in text
    assert '# "q" = "layers.0.self_attention.key:linear"' in text
    relu = run_of(model, inputs)["layers.0:relu"]
    twice = proposed({"a": relu, "b": relu}, model, inputs, "x")
    assert [entry.theirs for entry in NameMap.parse(twice.encode(), "p.toml").entries] == ["a"]
    assert '# "b" is "layers.0:relu" as well, like "a"' in twice


def test_a_proposal_has_no_pattern_for_what_was_not_found():
    model, inputs = small("opt"), inputs_of("opt")
    steps = run_of(model, inputs)
    raw = {f"r.{i}": steps[f"layers.{i}:relu"] for i in (0, 1)}
    assert '"r.{i}" = "layers.{i}:relu"' in proposed(raw, model, inputs, "x")
    more = proposed({**raw, "r.2": steps["layers.1:relu"] + 1}, model, inputs, "x")
    assert "{i}" not in more
    assert [entry.theirs for entry in NameMap.parse(more.encode(), "p").entries] == ["r.0", "r.1"]


def test_a_proposal_is_text_that_is_given_back():
    """What it proposes for names that need quoting is what a mapping file says."""
    model, inputs = small("opt"), inputs_of("opt")
    steps = run_of(model, inputs)
    odd = 'a "b"\n\\c\x7f'
    text = proposed({odd: steps["layers.1:relu"]}, model, inputs, "x")
    assert [(entry.theirs, entry.step) for entry in NameMap.parse(text.encode(), "p").entries] == [(odd, "layers.1:relu")]


# -- single ops -----------------------------------------------------------------------------------------------------------


def softmax(scores, mask):
    scores = np.where(mask.any(-1, keepdims=True), np.where(mask, scores, -np.inf), 0)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(-1, keepdims=True)


def checked(op, function, examples=40, dtype="float32"):
    return check_function(op_named(op), function, "mine", dtype, examples=examples, seed=0, example=None)


def test_functions_that_are_right():
    assert checked("masked_softmax", softmax).verdict == "right"
    assert checked("masked_softmax", lambda a, b: softmax(a, b)).verdict == "right"  # by their order
    assert checked("relu", lambda x: np.maximum(x, 0)).verdict == "right"
    assert checked("masked_softmax", lambda scores, mask, axis=-1: Tensor(softmax(scores, mask))).verdict == "right"
    some = checked("linear", lambda x, kernel: x @ kernel)
    assert some.verdict == "right"
    assert 0 < some.taken < some.examples
    assert set(some.refused) >= {"it takes no bias"}


def test_functions_get_plain_arrays():
    """As PyTorch wants them; what they do to those that were plain is seen all the same."""

    def plain(scores, mask):
        assert scores.flags.c_contiguous
        assert min(scores.strides) >= 0
        assert mask.flags.writeable
        return softmax(scores, mask)

    assert checked("masked_softmax", plain, examples=100).verdict == "right"

    def writing(scores, mask):
        found = softmax(scores, mask)
        scores[...] = 0
        return found

    assert checked("masked_softmax", writing).failures[0].law == "inputs"


def test_functions_that_are_wrong():
    def one_less(scores, mask):
        return softmax(scores[..., :1] * 0 + scores, np.ones_like(mask))

    failure = checked("masked_softmax", one_less).failures[0]
    assert "refmodels verify-op masked_softmax mine --dtype float32 --example" in failure.reproduce
    again = check_function(op_named("masked_softmax"), one_less, "mine", "float32", examples=1, seed=5, example=failure.example)
    assert again.failures
    raising = checked("relu", lambda x: 1 / 0).failures[0]
    assert "ZeroDivisionError" in raising.reason


@pytest.mark.parametrize(
    ("op", "function", "words"),
    [
        ("masked_softmax", lambda scores: scores, "mine takes \\(scores\\), and masked_softmax has \\(scores, mask\\)"),
        ("masked_softmax", lambda scores, mask, more: scores, "takes \\(scores, mask, more\\)"),
        ("relu", lambda: 1, "takes \\(\\), and relu has \\(x\\)"),
    ],
)
def test_functions_that_cannot_be_called(op, function, words):
    with pytest.raises(CandidateError, match=words):
        checked(op, function)


def test_ops_by_name():
    assert op_named("attention") is OPS["attention"]
    with pytest.raises(ValueError, match="no op is named 'attentio'; near are attention"):
        op_named("attentio")
