"""The smallest case, and the scripts that are written of it: run here with the fault in and with the fault out."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_verification_laws import tiny

from refmodels.verification.adaptors.own import OwnCandidate
from refmodels.verification.candidate import Candidate, CandidateError
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.laws import law_inputs
from refmodels.verification.replay import replay
from refmodels.verification.shrink import place_of, reproduce, shrink, with_layers
from refmodels.verification.signatures import Finding
from refmodels.verification.verify import Case, CaseResult, Verification

ROOT = Path(__file__).parent.parent


def case_of(model):
    return Case("ragged", law_inputs(model))


def found_by(candidate, model, case=None):
    """A verification of one case, without a search for the name of the fault."""
    case = case or case_of(model)
    arithmetic = Arithmetic(candidate.dtype)
    report = replay(model, case.inputs, candidate.run(case.inputs), arithmetic=arithmetic, through=False)
    return Verification(candidate.name, model.name, str(arithmetic), (CaseResult(case, report),))


def scaled_where(wrong):
    """layer_norm and rms_norm are off by 10 % where `wrong(arguments)` says so."""

    def observer(op, args, kwargs, proceed):
        y = proceed()
        return y * y.dtype.type(1.1) if op.name in ("layer_norm", "rms_norm") and wrong(y, kwargs) else y

    return observer


# -- shrinking --------------------------------------------------------------------------------------------------------------


def test_wrong_everywhere_is_one_token():
    model = tiny("opt", layers=3)
    fault = scaled_where(lambda y, kwargs: True)
    said = []
    found = shrink(
        OwnCandidate(model, observer=fault),
        model,
        case_of(model),
        rebuild=lambda smaller: OwnCandidate(smaller, observer=fault),
        progress=said.append,
    )
    np.testing.assert_array_equal(found.inputs["token_ids"], [[3]])
    np.testing.assert_array_equal(found.inputs["padding_mask"], [[True]])
    assert found.model.config.num_layers == 1
    assert found.step.name == "layers.0.self_attention_layer_norm:layer_norm"
    assert not found.step.ok
    assert found.runs < 30
    assert any("1 of 3 rows" in line for line in said)
    assert any("1 of 3 layers" in line for line in said)


@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_wrong_for_lengths_above_5(family):
    model = tiny(family)
    found = shrink(OwnCandidate(model, observer=scaled_where(lambda y, kwargs: y.shape[1] > 5)), model, case_of(model))
    side = "encoder_" if family == "t5" else ""
    np.testing.assert_array_equal(found.inputs[f"{side}token_ids"], [[3] * 6])
    assert found.inputs[f"{side}padding_mask"].all()
    if family == "t5":
        assert found.inputs["decoder_token_ids"].shape == (1, 1)


def test_wrong_for_batches_of_two_and_more():
    model = tiny("opt")
    found = shrink(OwnCandidate(model, observer=scaled_where(lambda y, kwargs: len(y) > 1)), model, case_of(model))
    np.testing.assert_array_equal(found.inputs["token_ids"], [[3], [3]])


def test_wrong_in_the_second_layer_alone():
    """By its number: two layers are needed."""
    model = tiny("opt", layers=4)

    def made(model):
        norms = [id(layer["self_attention_layer_norm"]["gamma"]) for layer in model.device_params["layers"]]
        fault = scaled_where(lambda y, kwargs: len(norms) > 1 and id(kwargs["gamma"]) == norms[1])
        return OwnCandidate(model, observer=fault)

    found = shrink(made(model), model, case_of(model), rebuild=made)
    assert found.model.config.num_layers == 2
    assert found.step.name == "layers.1.self_attention_layer_norm:layer_norm"


def test_wrong_in_any_layer_but_the_first():
    """By its weights: one layer is enough, with another number."""
    model = tiny("bloom", layers=3)
    wrong = model.device_params["layers"][2]["post_attention_layernorm"]["gamma"]

    def made(model):
        return OwnCandidate(model, observer=scaled_where(lambda y, kwargs: np.array_equal(kwargs["gamma"], wrong)))

    found = shrink(made(model), model, case_of(model), rebuild=made)
    assert found.model.config.num_layers == 1
    assert found.step.name == "layers.0.post_attention_layernorm:layer_norm"


def test_wrong_for_one_token():
    model = tiny("opt")
    inputs = law_inputs(model)
    inputs["token_ids"][:] = 30
    inputs["token_ids"][0, 4] = 17

    def fault(op, args, kwargs, proceed):
        y = proceed()
        return np.where(args[0][..., None] == 17, y + 1, y) if op.name == "embedding" and "embeddings" not in kwargs else y

    found = shrink(OwnCandidate(model, observer=fault), model, Case("one token", inputs))
    np.testing.assert_array_equal(found.inputs["token_ids"], [[17]])


def test_wrong_from_a_token_on():
    """The smallest id that still fails is found by bisection, and the others become the smallest there is."""
    model = tiny("bloom")

    def fault(op, args, kwargs, proceed):
        y = proceed()
        wrong = op.name == "embedding" and args[0].max() >= 21 and args[0].shape[1] >= 3
        return y + 1 if wrong else y

    found = shrink(OwnCandidate(model, observer=fault), model, case_of(model))
    assert sorted(found.inputs["token_ids"][0]) == [3, 3, 21]


def test_wrong_with_padding_alone():
    model = tiny("opt")

    def fault(op, args, kwargs, proceed):
        y = proceed()
        return y + 1 if op.name == "embedding" and "embeddings" in kwargs and padded[0] else y

    padded = [False]

    class Padded(OwnCandidate):
        def run(self, inputs, inject=None):
            padded[0] = not inputs["padding_mask"].all()
            return super().run(inputs, inject)

    found = shrink(Padded(model, observer=fault), model, case_of(model))
    mask = found.inputs["padding_mask"]
    assert mask.shape == (1, 2)
    assert mask.sum() == 1


def test_the_same_step_and_no_other():
    """Shorter inputs are wrong elsewhere: that is another fault."""
    model = tiny("opt", layers=1)

    def fault(op, args, kwargs, proceed):
        y = proceed()
        if op.name == "relu" and y.shape[1] > 3:
            return y + y.dtype.type(1)
        return y + y.dtype.type(1) if op.name == "attention_context" and y.shape[1] <= 3 else y

    found = shrink(OwnCandidate(model, observer=fault), model, case_of(model))
    assert found.step.name == "layers.0:relu"
    assert found.inputs["token_ids"].shape == (1, 4)


def test_a_shape_is_another_fault_than_a_value():
    """What gives the same arrays whatever it is asked has the wrong shape for every smaller case."""
    model = tiny("opt")
    case = case_of(model)
    steps = OwnCandidate(model, observer=scaled_where(lambda y, kwargs: True)).run(case.inputs)

    class Dump(Candidate):
        name, dtype = "dump", "float32"

        def run(self, inputs, inject=None):
            return steps

    found = shrink(Dump(), model, case)
    assert found.inputs["token_ids"].shape == case.inputs["token_ids"].shape


def test_the_number_of_runs_is_bounded():
    model = tiny("opt")
    runs = []

    class Counted(OwnCandidate):
        def run(self, inputs, inject=None):
            runs.append(inputs)
            return super().run(inputs, inject)

    candidate = Counted(model, observer=scaled_where(lambda y, kwargs: y.shape[1] > 2))
    found = shrink(candidate, model, case_of(model), runs=4)
    assert len(runs) == found.runs == 4
    assert any(step.name == found.step.name for step in found_by(candidate, model, found).cases[0].report.wrong)


def test_a_candidate_that_fails_on_small_inputs():
    model = tiny("opt")

    class Picky(OwnCandidate):
        def run(self, inputs, inject=None):
            if inputs["token_ids"].shape[1] % 4:
                raise CandidateError("the length must be a multiple of 4")
            return super().run(inputs, inject)

    found = shrink(Picky(model, observer=scaled_where(lambda y, kwargs: True)), model, case_of(model))
    assert found.inputs["token_ids"].shape[1] % 4 == 0


def test_nothing_to_shrink():
    model = tiny("opt")
    with pytest.raises(ValueError, match="no step is wrong"):
        shrink(OwnCandidate(model), model, case_of(model))
    fault = scaled_where(lambda y, kwargs: True)
    with pytest.raises(ValueError, match=r"'layers\.0:relu' is not wrong"):
        shrink(OwnCandidate(model, observer=fault), model, case_of(model), step="layers.0:relu")


@pytest.mark.parametrize("family", ["opt", "bloom", "t5"])
def test_a_model_with_fewer_layers(family):
    model = tiny(family, layers=3)
    same = with_layers(model, [0, 1, 2])
    inputs = law_inputs(model)
    name = f"{family}_logits"
    np.testing.assert_array_equal(OwnCandidate(same).run(inputs)[name], OwnCandidate(model).run(inputs)[name])
    last = with_layers(model, [2])
    assert last.config.num_layers == 1
    stacks = [(model.params[stack], last.params[stack]) for stack in ("encoder", "decoder")] if family == "t5" else []
    for before, after in stacks or [(model.params, last.params)]:
        (layer,) = after["layers"]
        assert layer["self_attention"]["query"] is before["layers"][2]["self_attention"]["query"]
        if family == "t5":  # the table is layer 0's
            table = layer["self_attention"]["relative_attention_bias"]
            assert table is before["layers"][0]["self_attention"]["relative_attention_bias"]
    OwnCandidate(last).run(inputs)


def test_a_quantised_model_keeps_its_layers():
    model = tiny("opt", layers=2)
    model.quantize("int8", weight_only=True)
    assert with_layers(model, [0]) is None


def test_places():
    assert place_of("decoder.layers.11.self_attention.query:linear") == "decoder.layers.*.self_attention.query:linear"
    assert place_of("opt_logits") == "opt_logits"


# -- scripts ----------------------------------------------------------------------------------------------------------------

MODULE = '''
"""Somebody's OPT, as far as its first sum: with positions that are not shifted by two, unless somebody has corrected it."""
import numpy as np
from pathlib import Path

HERE = Path(__file__).parent

def build():
    weights = np.load(HERE / "weights.npz")
    shift = 0 if (HERE / "corrected").exists() else 1

    def run(inputs):
        ids = inputs["token_ids"]
        positions = np.minimum(np.arange(ids.shape[1]) + shift, len(weights["positions"]) - 1)
        vectors = weights["tokens"][ids]
        return {"token_embedding:embedding": vectors, "opt_backbone:add": vectors + weights["positions"][positions]}

    return run
'''


class Called(Candidate):
    """What the module gives, in this process."""

    dtype = "float32"

    def __init__(self, directory):
        self.name = "theirs:build"
        self.directory = directory

    def run(self, inputs, inject=None):
        namespace = {"__file__": str(self.directory / "theirs.py")}
        exec((self.directory / "theirs.py").read_text(), namespace)
        return namespace["build"]()(inputs)


BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("refmodels", "ml_dtypes"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(script, directory, *, alone=False, env=None):
    command = [sys.executable, *(["-c", BLOCKED] if alone else []), str(script)]
    path = "" if alone else str(ROOT)
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": path, **(env or {})}
    )
    return done.returncode, done.stdout + done.stderr


def run_here(script, capsys):
    """The same in this process, which is quicker."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code, capsys.readouterr().out


def test_a_script_that_calls_the_implementation(tmp_path):
    """It needs NumPy and the implementation alone, says what is wrong, and passes when that is corrected."""
    model = tiny("opt")
    (tmp_path / "theirs.py").write_text(MODULE)
    weights = {"tokens": model.array("token_embedding.embeddings"), "positions": model.array("position_embedding.embeddings")}
    np.savez(tmp_path / "weights.npz", **weights)
    candidate = Called(tmp_path)
    verification = found_by(candidate, model)
    script = reproduce(candidate, model, verification, tmp_path / "out", spec="theirs:build")
    assert sorted(path.name for path in script.parent.iterdir()) == ["reproduce.npz", "reproduce.py"]
    with np.load(script.with_suffix(".npz")) as arrays:
        assert arrays["in.token_ids"].shape == (1, 1)
    code, said = run_script(script, tmp_path, alone=True)
    assert code == 1, said
    assert said.startswith("wrong: opt_backbone:add is ")
    assert "bound" in said
    (tmp_path / "corrected").touch()
    code, said = run_script(script, tmp_path, alone=True)
    assert (code, said.partition(":")[0]) == (0, "right"), said
    (tmp_path / "theirs.py").write_text("def build(): raise OSError('no weights')")
    assert run_script(script, tmp_path, alone=True) == (2, "cannot run theirs:build: OSError: no weights\n")


def test_a_script_reads_well(tmp_path):
    model = tiny("opt")
    candidate = OwnCandidate(model, observer=scaled_where(lambda y, kwargs: True))
    verification = found_by(candidate, model)
    result = verification.cases[0]
    finding = Finding("norm-scaled", "the norm is off by 10 %", result.report.first.name, 0.1)
    told = Verification(
        'evil """ name\n\\',
        model.name,
        "float32",
        (CaseResult(result.case, result.report, (finding,)),),
        facts={"torch": "2.13"},
    )
    text = reproduce(candidate, model, told, tmp_path).read_text()
    document = ast.get_docstring(ast.parse(text))
    assert "evil ''' name" in document
    assert "norm-scaled: the norm is off by 10 %" in document
    assert "torch" in document
    assert "layer_norm" in document
    assert len(text.splitlines()) < 90
    assert max(map(len, text.splitlines())) < 160


ALONE = [
    ("opt", "bfloat16", "linear"),
    ("bloom", "float32", "attention_scores"),
    ("t5", "float16", "masked_softmax"),
    ("opt", "float32", "causal_mask"),
]


@pytest.mark.parametrize(("family", "dtype", "op_name"), ALONE)
def test_a_script_with_the_step_alone(tmp_path, capsys, family, dtype, op_name):
    model = tiny(family, dtype)

    def fault(op, args, kwargs, proceed):
        y = proceed()
        if op.name != op_name:
            return y
        return ~y if y.dtype == bool else y + np.linspace(0, 2, y.shape[-1]).astype(y.dtype)

    candidate = OwnCandidate(model, observer=fault)
    script = reproduce(candidate, model, found_by(candidate, model), tmp_path)
    code, said = run_script(script, tmp_path)
    assert code == 1, said
    assert said.startswith("wrong: ")
    assert op_name in said
    # With a right step in the place of what they gave it passes.
    right = f"return OPS[{op_name!r}].reference(**ARGUMENTS)"
    if op_name == "attention_scores":  # what all keys of a query have in common does not count
        right += " + 1"
    script.write_text(script.read_text().replace('return array("theirs")', right))
    code, said = run_here(script, capsys)
    assert (code, said.partition(":")[0]) == (0, "right"), said


@pytest.mark.parametrize(("family", "only"), [("opt", "opt_decoder_layer"), ("t5", "t5_logits")])
def test_a_script_with_a_whole_layer_of_a_dump(tmp_path, capsys, family, only):
    """Outputs of layers alone, which cannot be run again: the step is the layer, with its parameters and its config."""
    model = tiny(family, "bfloat16")
    case = case_of(model)

    def fault(op, args, kwargs, proceed):
        y = proceed()
        return -y if op.name == only else y

    kept = ("opt_decoder_layer", "add", "opt_backbone", "causal_mask", "t5_logits", "t5_decoder")
    steps = {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        for name, array in OwnCandidate(model, observer=fault).run(case.inputs).items()
        if name.rpartition(":")[2] in kept and not name.startswith("layers.0:add")
    }

    class Dump(Candidate):
        name, dtype = "dump", "bfloat16"

        def run(self, inputs, inject=None):
            if any(not np.array_equal(array, case.inputs[name]) for name, array in inputs.items()):
                raise CandidateError("a dump cannot be run on other inputs")
            return steps

    verification = found_by(Dump(), model, case)
    assert verification.first[1].op == only
    script = reproduce(Dump(), model, verification, tmp_path)
    code, said = run_script(script, tmp_path)
    assert code == 1, said
    script.write_text(script.read_text().replace('return array("theirs")', f"return OPS[{only!r}].reference(**ARGUMENTS)"))
    code, said = run_here(script, capsys)
    assert (code, said.partition(":")[0]) == (0, "right"), said


BUILDER = """
from pathlib import Path
import numpy as np
from refmodels.opt import OPTBackbone
from refmodels.verification.adaptors.own import OwnCandidate

def fault(op, args, kwargs, proceed):
    y = proceed()
    return y * np.float32(1.1) if op.name == "relu" and not Path(__file__).with_name("corrected").exists() else y

def build(checkpoint):
    return OwnCandidate(OPTBackbone.from_preset(checkpoint), observer=fault)
"""


def test_a_script_with_a_checkpoint_of_fewer_layers(tmp_path, monkeypatch):
    model = tiny("opt", layers=3)
    (tmp_path / "built.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import built

    def rebuild(smaller):
        return OwnCandidate(smaller, observer=built.fault)

    candidate = rebuild(model)
    script = reproduce(candidate, model, found_by(candidate, model), tmp_path / "out", spec="built:build", rebuild=rebuild)
    assert (script.parent / "reproduce.checkpoint" / "config.json").exists()
    code, said = run_script(script, tmp_path)
    assert code == 1, said
    assert "layers.0:relu" in said
    (tmp_path / "corrected").touch()
    code, said = run_script(script, tmp_path)
    assert code == 0, said
    del sys.modules["built"]


def test_an_error_that_only_its_own_element_shows(tmp_path, capsys):
    """Tiny beside the largest value, large beside its own: the script judges that element."""
    model = tiny("opt")
    case = Case("one row", {name: array[:1] for name, array in law_inputs(model).items()})
    tree = model.params
    tree["layers"][0]["self_attention"]["query"]["kernel"][:, 3] = 0
    tree["layers"][0]["self_attention"]["query"]["bias"][3] = 1e-6
    tree["layers"][0]["self_attention"]["query"]["bias"][0] = 100
    model.params = tree
    kernel = model.device_params["layers"][0]["self_attention"]["query"]["kernel"]

    def fault(op, args, kwargs, proceed):
        y = proceed()
        if op.name == "linear" and args[1] is kernel:
            y[..., 3] *= np.float32(1.01)
        return y

    candidate = OwnCandidate(model, observer=fault)
    verification = found_by(candidate, model, case)
    assert verification.first[1].local.index[-1] == 3
    script = reproduce(candidate, model, verification, tmp_path)
    code, said = run_here(script, capsys)
    assert code == 1, said
    assert ", 3), expected" in said


def test_nan_and_shapes_in_a_script(tmp_path, capsys):
    model = tiny("opt")
    for number, change in enumerate((lambda y: y * np.float32("nan"), lambda y: y[:, :, :-1])):
        steps = dict(OwnCandidate(model).run(law_inputs(model)))
        steps["layers.0:relu"] = change(steps["layers.0:relu"])

        class Dump(Candidate):
            name, dtype, given = "dump", "float32", steps

            def run(self, inputs, inject=None):
                return self.given

        verification = found_by(Dump(), model)
        assert verification.first[1].name == "layers.0:relu"
        script = reproduce(Dump(), model, verification, tmp_path / str(number))
        code, said = run_here(script, capsys)
        assert code == 1, said
        assert said.startswith("wrong: layers.0:relu"), said


def test_nothing_to_reproduce(tmp_path):
    model = tiny("opt")
    candidate = OwnCandidate(model)
    with pytest.raises(ValueError, match="nothing to reproduce"):
        reproduce(candidate, model, found_by(candidate, model), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_failed_write_leaves_nothing_half(tmp_path, monkeypatch):
    model = tiny("opt")
    candidate = OwnCandidate(model, observer=scaled_where(lambda y, kwargs: True))
    verification = found_by(candidate, model)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        reproduce(candidate, model, verification, tmp_path)
    assert list(tmp_path.iterdir()) == []
