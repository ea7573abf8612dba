"""The example of spec/verification.md with the real Transformers, and functions of PyTorch held to our ops."""

import json
import re
import sys
from pathlib import Path

import pytest

from refmodels import OPTBackbone
from refmodels.cli import main
from refmodels.parameters import flatten

SPEC = Path(__file__).parents[2] / "spec" / "verification.md"
PORT = "peer_port"

OPS = """
import torch


def softmax(scores, mask):
    scores, mask = torch.from_numpy(scores), torch.from_numpy(mask)
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return scores.softmax(-1)


def norm(x, gamma, beta, epsilon=1e-5):
    x, gamma, beta = map(torch.from_numpy, (x, gamma, beta))
    return torch.nn.functional.layer_norm(x, gamma.shape, gamma, beta, epsilon)


def norm_of_a_sample(x, gamma, beta, epsilon=1e-5):
    x, gamma, beta = map(torch.from_numpy, (x, gamma, beta))
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + epsilon) * gamma + beta
"""


@pytest.fixture
def run(transformers, tmp_path, monkeypatch, capsys):
    """`run("verify", ...)` in a directory with a preset and the module of the example; TARGET is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = OPTBackbone(31, 2, 2, 16, 24, max_sequence_length=40, seed=1)
    for path, values in flatten(model.params):
        values *= 15 if path.endswith(("kernel", "embeddings")) else 1
        values += 0.25 if path.endswith(("bias", "beta")) else 0
    model.save_to_preset("preset")
    example = re.search(r"```python\n(import torch.*?)```", SPEC.read_text(), re.DOTALL)
    (tmp_path / f"{PORT}.py").write_text(example[1])
    (tmp_path / f"{PORT}_ops.py").write_text(OPS)

    def call(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr().out

    yield call
    sys.modules.pop(PORT, None)
    sys.modules.pop(f"{PORT}_ops", None)


def test_the_example_agrees_and_its_names_are_proposed(run, tmp_path):
    target = [f"{PORT}:build", "--like", "preset"]
    assert run("verify", *target)[0] == 0
    assert run("verify", *target, "--propose", "names.toml")[0] == 0
    text = (tmp_path / "names.toml").read_text()
    assert '"hidden_states.0" = "opt_backbone:add"' in text
    assert '"hidden_states.1" = "layers.0:add.2"' in text
    assert '"hidden_states.2" = "layer_norm"' in text
    status, out = run("verify", *target, "--mapping", "names.toml", "--no-laws", "--json")
    assert status == 0
    assert [len(case["steps"]) for case in json.loads(out)["cases"]] == [4] * 4


def test_positions_that_padding_shifts_are_found_at_their_step(run, tmp_path):
    """What Transformers does by itself: it counts from the first real token."""
    source = (tmp_path / f"{PORT}.py").read_text()
    assert "position_ids=positions, " in source
    (tmp_path / f"{PORT}.py").write_text(source.replace("position_ids=positions, ", ""))
    (tmp_path / "names.toml").write_text(
        '"hidden_states.0" = "opt_backbone:add"\n"hidden_states.1" = "layers.0:opt_decoder_layer"\n'
    )
    options = ["--mapping", "names.toml", "--no-laws", "--json"]
    status, out = run("verify", f"{PORT}:build", "--like", "preset", *options)
    assert status == 1
    wrong = {
        case["name"]: [step["name"] for step in case["steps"] if not step["local"]["ok"]] for case in json.loads(out)["cases"]
    }
    assert wrong == {"one row": [], "padded on the right": [], "padded on the left": ["opt_backbone:add"], "long": []}


def test_functions_of_pytorch(run):
    for op, function, wanted in (
        ("masked_softmax", "softmax", 0),
        ("layer_norm", "norm", 0),
        ("layer_norm", "norm_of_a_sample", 1),
    ):
        status, out = run("verify-op", op, f"{PORT}_ops:{function}", "--examples", 40)
        assert status == wanted, out
