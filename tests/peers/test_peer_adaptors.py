"""The ready adaptors for KerasHub, CTranslate2 and ONNX Runtime, with the real packages: right models agree, step by step, and
a fault planted in them is found where it is."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refmodels import Backbone
from refmodels.convert import convert
from refmodels.parameters import flatten
from refmodels.verification.candidate import CandidateError
from refmodels.verification.vectors import small_inputs, small_model
from refmodels.verification.verify import AGREES, DIVERGES, Case, cases, verify

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent.parent


def few(model):
    """One case with padding on either side; and for OPT none on the left, which not all count as we do."""
    inputs = small_inputs(model)
    if model.family == "opt":
        inputs["padding_mask"] = np.array([[True] * 6, [True] * 5 + [False], [True] * 3 + [False] * 3])
    return [Case("padded", inputs)]


def changed(model, path, by=1.03):
    """The same model with one parameter a little off."""
    tree = dict(flatten(model.params))
    tree[path][...] = (tree[path].astype(np.float32) * by).astype(tree[path].dtype)
    return model


# -- KerasHub -----------------------------------------------------------------------------------------------------------------

INSIDE = {
    "opt": "layers.1.self_attention:attention_context",
    "bloom": "layers.1.self_attention:attention_scores",
    "t5": "decoder.layers.1.cross_attention:masked_softmax",
    "t5_relu_tied": "encoder.layers.0:relu",
}


def keras_candidate(keras_hub, name, directory, dtype):
    from refmodels.verification.adaptors.keras_hub import KerasHubCandidate

    small_model(name).save_to_preset(directory)
    model = Backbone.from_preset(directory, dtype=dtype)
    return KerasHubCandidate(keras_hub.models.Backbone.from_preset(str(directory), dtype=dtype), model), model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", INSIDE)
def test_keras_hub_agrees_at_every_step(keras_hub_new, tmp_path, name, dtype):
    candidate, model = keras_candidate(keras_hub_new, name, tmp_path, dtype)
    result = verify(candidate, model, [Case("padded", small_inputs(model))])
    report = result.cases[0].report
    assert result.status == AGREES, report.first
    assert report.unknown == ()
    assert {INSIDE[name], *candidate.injects, f"{model.family}_logits"} <= {step.name for step in report.steps}
    assert len(report.steps) >= 33
    assert result.facts["keras-hub"] == keras_hub_new.__version__


@pytest.mark.parametrize(
    ("name", "path", "step"),
    [
        ("opt", "layers.1.self_attention.key.bias", "layers.1.self_attention.key:linear"),
        ("bloom", "layers.0.mlp_output_dense.kernel", "layers.0.mlp_output_dense:linear"),
        ("t5", "decoder.layers.1.cross_attention.value.kernel", "decoder.layers.1.cross_attention.value:linear"),
        (
            "t5",
            "encoder.layers.0.self_attention.relative_attention_bias.embeddings",
            "encoder.layers.0.self_attention:masked_softmax",
        ),
    ],
)
def test_a_fault_in_keras_hub_is_found_where_it_is(keras_hub_new, tmp_path, name, path, step):
    candidate, model = keras_candidate(keras_hub_new, name, tmp_path, "float32")
    result = verify(candidate, changed(model, path, 1.5), few(model))
    assert result.status == DIVERGES
    wrong = {found.name for found in result.cases[0].report.wrong}
    # The table of relative biases serves every layer of its stack.
    assert wrong == {step, step.replace("layers.0", "layers.1")} if "relative" in path else wrong == {step}


def test_keras_hub_is_left_as_it_was(keras_hub_new, tmp_path):
    candidate, model = keras_candidate(keras_hub_new, "bloom", tmp_path, "float32")
    candidate.run(small_inputs(model))
    layer = candidate.backbone.transformer_layers[0]
    assert "call" not in vars(layer)
    assert "call" not in vars(layer._self_attention_layer._softmax)


def test_keras_hub_of_another_family_is_refused(keras_hub_new, tmp_path):
    from refmodels.verification.adaptors.keras_hub import KerasHubCandidate

    candidate, _ = keras_candidate(keras_hub_new, "opt", tmp_path, "float32")
    with pytest.raises(CandidateError, match="wanted a BloomBackbone"):
        KerasHubCandidate(candidate.backbone, small_model("bloom"))
    with pytest.raises(CandidateError, match="ids and masks alone, got token_ids, embeddings"):
        candidate.run({"token_ids": np.ones((1, 2), int), "embeddings": np.ones((1, 2, 6))})


ON_ANOTHER_BACKEND = """
import sys
import keras_hub
from refmodels import Backbone
from refmodels.verification.adaptors.keras_hub import KerasHubCandidate
from refmodels.verification.vectors import small_inputs
from refmodels.verification.verify import Case, verify
model = Backbone.from_preset(sys.argv[1])
candidate = KerasHubCandidate(keras_hub.models.Backbone.from_preset(sys.argv[1]), model)
result = verify(candidate, model, [Case("padded", small_inputs(model))])
print(result.status, len(result.cases[0].report.steps), result.facts["backend"])
"""


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_keras_hub_on_another_backend(keras_hub_new, tmp_path, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"needs {backend}")
    small_model("opt").save_to_preset(tmp_path)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "accel"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_BACKEND, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == f"0 34 {backend}"


# -- CTranslate2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["opt_tiny_stdlib", "bloom_tiny_stdlib", "t5_tiny_numbers"])
def test_ctranslate2_agrees(ctranslate2, tmp_path, preset):
    from refmodels.verification.adaptors.ctranslate2 import CTranslate2Candidate

    family = preset.split("_")[0]
    convert(preset, tmp_path / "hf", "hf")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "converted"))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "converted").iterdir())
    model = Backbone.from_preset(tmp_path / "hf")
    candidate = CTranslate2Candidate(tmp_path / "converted", family)
    tried = [case for case in cases(model)[:3] if not (family == "opt" and "left" in case.name)]
    result = verify(candidate, model, tried)
    assert result.status == AGREES, result.first
    assert [step.name for step in result.cases[0].report.steps] == [f"{family}_logits"]
    if family == "opt":
        with pytest.raises(CandidateError, match="no padding on the left"):
            candidate.run(cases(model)[2].inputs)
    last = "decoder.layers.1.layer_norm.weight" if family == "t5" else None
    last = last or next(path for path, _ in flatten(model.params) if path.endswith("gamma"))
    assert verify(candidate, changed(model, last), tried[:1]).status == DIVERGES
    candidate.close()
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "converted").iterdir())


def test_ctranslate2_says_what_it_cannot_load(ctranslate2, tmp_path):
    from refmodels.verification.adaptors.ctranslate2 import CTranslate2Candidate

    with pytest.raises(CandidateError, match="CTranslate2 cannot load it"):
        CTranslate2Candidate(tmp_path, "opt")
    with pytest.raises(CandidateError, match="got 'gpt2'"):
        CTranslate2Candidate(tmp_path, "gpt2")


# -- ONNX Runtime -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["opt", "opt by the old exporter"])
def exported(request, onnxruntime, transformers, tmp_path_factory):
    """(file, model) of an exported model of Transformers."""
    import torch

    directory, name = tmp_path_factory.mktemp("exported"), request.param.split()[0]
    model = small_model(name)
    model.save_to_hf(directory)
    kind = {"opt": "OPTForCausalLM", "t5": "T5ForConditionalGeneration"}[name]
    network = getattr(transformers, kind).from_pretrained(directory, attn_implementation="eager").eval()
    ids = torch.tensor([[4, 5, 6, 7], [5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
    path = directory / "model.onnx"
    options = {"input_names": list(inputs), "output_names": ["logits"], "f": str(path)}
    if "old" in request.param:

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = network

            def forward(self, input_ids, attention_mask):
                return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

        axes = {key: {0: "batch", 1: "length"} for key in inputs}
        torch.onnx.export(Logits(), tuple(inputs.values()), dynamo=False, dynamic_axes=axes, **options)
    else:
        shapes = {key: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for key in inputs} | {"use_cache": None}
        inputs["use_cache"] = False
        torch.onnx.export(network, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, external_data=False, **options)
    return path, model


def test_onnx_runtime_agrees_inside_too(exported):
    from refmodels.verification.adaptors.onnxruntime import OnnxRuntimeCandidate

    path, model = exported
    candidate = OnnxRuntimeCandidate(path, model)
    result = verify(candidate, model, few(model))
    report = result.cases[0].report
    assert result.status == AGREES, report.first
    assert report.unknown == ()
    assert len(report.steps) >= (49 if model.family == "t5" else 18)
    assert {step.name for step in report.steps} >= {
        "opt": {"layers.1.feedforward_output_dense:linear", "layers.0.self_attention.query:linear", "opt_logits"},
        "t5": {"decoder.layers.1.cross_attention.output:linear", "encoder.layers.0.layer_norm:rms_norm", "t5_logits"},
    }[model.family]


def test_a_fault_in_onnx_runtime_is_found_where_it_is(exported):
    from refmodels.verification.adaptors.onnxruntime import OnnxRuntimeCandidate

    path, model = exported
    place = {"opt": "layers.1.self_attention.value", "t5": "decoder.layers.0.input_projector"}[model.family]
    wrong = small_model(model.name.removesuffix("_backbone") if model.name in ("opt", "t5") else model.family)
    result = verify(OnnxRuntimeCandidate(path, model), changed(wrong, f"{place}.kernel"), few(model))
    assert [step.name for step in result.cases[0].report.wrong] == [f"{place}:linear"]


def test_onnx_runtime_names_what_it_is_told(exported):
    from refmodels.verification.adaptors.onnxruntime import OnnxRuntimeCandidate

    path, model = exported
    candidate = OnnxRuntimeCandidate(path, model, inner=False)
    assert list(candidate.names.values()) == [f"{model.family}_logits"]
    with pytest.raises(CandidateError, match="no tensor 'none'"):
        OnnxRuntimeCandidate(path, model, names={"none": "layers.0:add"})
    with pytest.raises(CandidateError, match="cannot load it"):
        OnnxRuntimeCandidate(shutil.copy(__file__, path.parent / "no.onnx"), model)
    if model.family == "opt":
        with pytest.raises(CandidateError, match="no padding on the left"):
            candidate.run(small_inputs(model))
