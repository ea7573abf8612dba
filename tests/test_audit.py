"""The audit of a low type: planted overflows and losses are found where they are, and what is to be kept is enough."""

import json

import numpy as np
import pytest

from refmodels.cli import main
from refmodels.verification.audit import RoundedRun, audit, kind_of
from refmodels.verification.vectors import small_inputs, small_model


def test_a_model_that_needs_nothing_is_told_so():
    model = small_model("opt")
    found = audit(model, small_inputs(model), "float16")
    assert found.keep == ()
    assert found.first_overflow is None
    assert found.plain == found.kept <= found.target
    assert found.agreement == (1.0, 1.0)
    assert all(0 < layer.plain < 0.01 for layer in found.layers)
    assert len(found.layers) == 2


@pytest.fixture(scope="module")
def large_output():
    """A T5 whose second encoder layer has a feed-forward output that float16 cannot hold."""
    model = small_model("t5_relu_tied")
    kernel = model.params["encoder"]["layers"][1]["output_projector"]["kernel"]
    kernel *= 3e4
    return model


def test_an_overflow_is_found_at_its_step(large_output):
    found = audit(large_output, small_inputs(large_output), "float16")
    assert found.first_overflow.name == "encoder.layers.1.output_projector:linear"
    assert {step.name for step in found.steps if step.overflows} == {
        "encoder.layers.1.output_projector:linear",
        "encoder.layers.1:add.2",
    }
    assert np.isinf(found.plain)
    assert found.agreement[0] < 0.5
    assert next(layer.name for layer in found.layers if np.isinf(layer.plain)) == "encoder.layers.1:t5_feedforward"
    (first, second), rest = found.shares[:2], found.shares[2:]
    assert {first.kind, second.kind} == {"encoder.layers.*.output_projector:linear", "encoder.layers.*:add.2"}
    assert (first.overflowing, first.steps) == (1, 2)
    assert all(np.isfinite(share.error) for share in rest)


def test_what_is_to_be_kept_removes_the_overflow_and_nothing_less_does(large_output):
    inputs = small_inputs(large_output)
    found = audit(large_output, inputs, "float16")
    assert set(found.keep) == {"encoder.layers.*.output_projector:linear", "encoder.layers.*:add.2"}
    assert found.reached
    assert found.agreement[1] == 1.0

    def logits(keep):
        return RoundedRun(large_output, "float16", rounds=lambda kind: kind not in keep)(inputs)

    real = inputs["decoder_padding_mask"]
    truth = RoundedRun(large_output, "float16", rounds=lambda kind: False)(inputs)[real]
    assert np.abs(logits(found.keep)[real] - truth).max() <= found.target * np.abs(truth).max()
    for kind in found.keep:
        assert not np.isfinite(logits(set(found.keep) - {kind})[real]).all()


def test_bfloat16_holds_it_but_is_coarser(large_output):
    inputs = small_inputs(large_output)
    found = audit(large_output, inputs, "bfloat16")
    assert found.first_overflow is None
    assert np.isfinite(found.plain)
    assert found.plain > audit(small_model("t5_relu_tied"), inputs, "float16").plain


def test_a_loss_of_precision_is_found():
    """Large numbers that a residual stream carries beside small ones that count: bfloat16 has no digits for those."""
    model = small_model("opt")
    model.params["layers"][0]["feedforward_output_dense"]["bias"][:] += 4000.0
    found = audit(model, small_inputs(model), "bfloat16", target=0.03)
    assert {share.kind for share in found.shares[:2]} <= {
        "layers.*:add.2",
        "layers.*:add",
        "layers.*.feedforward_output_dense:linear",
    }
    assert "layers.*:add.2" in found.keep
    assert found.reached
    assert found.kept < found.plain / 4


def test_what_nothing_helps_is_said():
    model = small_model("bloom")
    found = audit(model, small_inputs(model), "bfloat16", target=1e-30)
    assert found.kept == 0.0
    exact = {"bloom_backbone:alibi_slopes", "bloom_backbone:alibi_bias"}  # of three heads, and this near
    assert set(found.keep) == {share.kind for share in found.shares} - exact
    assert {share.kind for share in found.shares if share.error == 0.0} == exact
    model.params["final_layernorm"]["gamma"][:] = 1e6
    lost = audit(model, small_inputs(model), "float16")  # a parameter that float16 cannot hold: no step helps
    assert not lost.reached


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_either_wide_type_gives_the_same(dtype):
    model = small_model("bloom", dtype)
    found = audit(model, small_inputs(model), "float16")
    assert found.weights == pytest.approx(audit(small_model("bloom"), small_inputs(model), "float16").weights, rel=1e-3)


def test_what_cannot_be_audited_is_refused():
    model = small_model("opt")
    with pytest.raises(ValueError, match="one of float16, bfloat16, got 'float32'"):
        audit(model, small_inputs(model), "float32")
    with pytest.raises(ValueError, match="above 0, got -1"):
        audit(model, small_inputs(model), "float16", target=-1)
    with pytest.raises(ValueError, match="a model in float16 cannot be audited"):
        audit(small_model("opt", "float16"), small_inputs(model), "float16")


def test_a_kind_has_a_star_for_its_layer():
    assert kind_of("decoder.layers.11.cross_attention.query:linear") == "decoder.layers.*.cross_attention.query:linear"
    assert kind_of("token_embedding:scaled") == "token_embedding:scaled"


def test_the_command_prints_a_table(capsys, tmp_path, large_output):
    large_output.save_to_preset(tmp_path)
    assert main(["audit", str(tmp_path), "--tokens", "9"]) == 0
    printed = capsys.readouterr().out
    assert "overflows first at encoder.layers.1.output_projector:linear" in printed
    assert "keep in float32: encoder.layers.*.output_projector:linear, encoder.layers.*:add.2" in printed
    assert main(["audit", str(tmp_path), "--tokens", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["keep"] == ["encoder.layers.*.output_projector:linear", "encoder.layers.*:add.2"]
    assert found["error"]["plain"] is None
    assert found["first_overflow"] == "encoder.layers.1.output_projector:linear"


def test_the_command_takes_a_text(capsys, tmp_path):
    (tmp_path / "text").write_text("spell: 4207")
    assert main(["audit", "t5_tiny_numbers", "--dtype", "bfloat16", "--text", str(tmp_path / "text"), "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["tokens"] == 6
    assert main(["audit", "t5_tiny_numbers", "--text", str(tmp_path / "none")]) == 2
    assert main(["audit", "t5_tiny_numbers", "--dtype", "int8"]) == 2
    (tmp_path / "text").write_bytes(b"\xff")
    assert main(["audit", "t5_tiny_numbers", "--text", str(tmp_path / "text")]) == 2
    assert "not valid UTF-8" in capsys.readouterr().err
