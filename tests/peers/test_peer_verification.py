"""Verification of a foreign implementation: Transformers as it is, with faults planted in it, and in other right ways."""

import importlib
import types

import numpy as np
import pytest
from foreign_faults import FAULTS, LEFT, RIGHT_ONES, tf32
from foreign_models import VARIANTS, copied, foreign_model

from refmodels import Backbone
from refmodels.parameters import flatten
from refmodels.verification import signatures
from refmodels.verification.adaptors.transformers import TransformersCandidate, backbone_of
from refmodels.verification.candidate import CandidateError
from refmodels.verification.replay import step_names
from refmodels.verification.verify import AGREES, DIVERGES, Case, cases, verify

NAMED = 35  # of the planted faults at least so many must be given their right name


@pytest.fixture(autouse=True)
def _packages(transformers):
    """None of this file can run without them."""


@pytest.fixture
def outcomes():
    return importlib.import_module("foreign_outcomes")


def titles(entries):
    return [f"{entry.variant}: {entry.name}" for entry in entries]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def case_of(ours, name=LEFT):
    return next(case for case in cases(ours) if case.name == name)


# -- planted faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=titles(FAULTS))
def test_planted_foreign_fault_is_located(outcomes, fault):
    step, _ = outcomes.outcome(fault)
    assert step == fault.step


@pytest.mark.parametrize("right", RIGHT_ONES, ids=titles(RIGHT_ONES))
def test_right_foreign_variant_is_not_reported(outcomes, right):
    found = outcomes.verified_right(right)
    assert found.status == AGREES, found.first or [
        s for c in found.cases for s in c.report.steps if s.through and not s.through.ok
    ]
    assert all(step.judged for result in found.cases for step in result.report.steps)


def test_there_are_enough_of_both():
    assert len(FAULTS) >= 40
    assert {fault.variant.partition("_")[0] for fault in FAULTS} == {"opt", "bloom", "t5"}
    assert len(RIGHT_ONES) >= 10
    assert len(set(titles(FAULTS))) == len(FAULTS)


@pytest.mark.skipif(not signatures.FAULTS, reason="no signatures")
def test_most_are_named(outcomes):
    known = {fault.name for fault in signatures.FAULTS}
    assert {fault.signature for fault in FAULTS if fault.signature} <= known
    missed = [f"{fault.variant}: {fault.name}: {outcomes.outcome(fault)[1]}" for fault in FAULTS if not outcomes.named(fault)]
    assert len(FAULTS) - len(missed) >= NAMED, missed


def test_the_page_is_what_is_found(outcomes):
    assert outcomes.PAGE.read_text() == outcomes.page(), "run: python tests/peers/foreign_outcomes.py"


def is_layer(name):
    return name.endswith(("_decoder_layer", ":t5_self_attention", ":t5_cross_attention", ":t5_feedforward", "_logits"))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("opt: unbiased variance", "layers.0:opt_decoder_layer"),
        ("bloom: erf gelu for tanh", "layers.0:bloom_decoder_layer"),
        ("t5: position bias in the first layer only", "encoder.layers.1:t5_self_attention"),
        ("t5: position bias in cross-attention", "decoder.layers.0:t5_cross_attention"),
        ("t5_gated: gate missing", "encoder.layers.0:t5_feedforward"),
        ("t5: logits not scaled", "t5_logits"),
    ],
)
def test_of_layers_alone_the_layer_is_located(outcomes, name, layer):
    fault = FAULTS[titles(FAULTS).index(name)]
    assert outcomes.verified(fault, is_layer).first[1].name == layer


# -- defects of Transformers itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "layer", "step"),
    [("self_attention", "dense", "layers.0:add"), ("mlp", "dense_4h_to_h", "layers.0:add.2")],
)
def test_bloom_in_exact_slices_lacks_a_bias(outcomes, part, layer, step):
    """`slow_but_exact` takes a product in slices, and adds no bias: right only where that is zero."""
    theirs, ours = outcomes.pair("bloom")
    model = copied(theirs)
    for block in model.transformer.h:
        sliced = getattr(block, part)
        sliced.pretraining_tp, sliced.slow_but_exact = 2, True
    assert verify(TransformersCandidate(model), ours, [case_of(ours)]).first[1].name == step
    for block in model.transformer.h:
        getattr(getattr(block, part), layer).bias.data.zero_()
    assert verify(TransformersCandidate(model), backbone_of(model), [case_of(ours)]).status == AGREES


@pytest.mark.parametrize(
    ("variant", "dtype", "step"),
    [
        ("bloom_12_heads", "bfloat16", "bloom_backbone:alibi_bias"),
        ("opt", "float64", "layers.0.self_attention:masked_softmax"),
        ("t5", "float64", "encoder.layers.0.self_attention_layer_norm:rms_norm"),
    ],
    ids=["ALiBi in bfloat16", "float64 with a float32 softmax", "float64 with a float32 norm"],
)
def test_lost_precision_is_found(outcomes, variant, dtype, step):
    theirs, ours = outcomes.pair(variant, dtype)
    long = cases(ours)[-1]  # what ALiBi loses grows with the length
    assert verify(TransformersCandidate(theirs), ours, [long]).first[1].name == step


def large_scores(model):
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)


@pytest.mark.parametrize(("dtype", "prepare"), [("float64", None), ("float16", large_scores)])
def test_opt_gives_nan_beside_padding_on_the_left(outcomes, dtype, prepare):
    """The mask is the type's least number. The softmax is taken in float32, where float64's is minus infinity, and so is
    float16's with a score of -16 added. A row that permits no key becomes NaN, and with it, one layer on, every row."""
    theirs, ours = outcomes.pair("opt", dtype, "eager", prepare)
    case = case_of(ours)
    steps = TransformersCandidate(theirs).run(case.inputs)
    assert np.isnan(steps["opt_logits"][-1].astype(np.float64)).all()
    wrong = verify(TransformersCandidate(theirs), ours, [case]).cases[0].report.wrong
    assert any(step.name == "layers.1.self_attention:masked_softmax" and not np.isfinite(step.local.error) for step in wrong)
    fused, _ = outcomes.pair("opt", dtype, "sdpa", prepare)
    assert np.isfinite(TransformersCandidate(fused).run(case.inputs)["opt_logits"].astype(np.float64)).all()


# -- the adaptor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_inside_is_seen(outcomes, variant):
    theirs, ours = outcomes.pair(variant)
    inputs = case_of(ours).inputs
    found = TransformersCandidate(theirs).run(inputs)
    wanted = step_names(ours, inputs)
    assert set(found) <= set(wanted)
    composites = (":dense", ":attention", ":token_vectors", ":token_vectors.2", ":token_scores", "_attention", "_slopes")
    absent = [name for name in wanted if name not in found and not name.endswith(composites)]
    if variant.startswith("opt"):  # queries are scaled before they are split
        assert absent == [f"layers.{i}.self_attention:split_heads" for i in range(2)] + ["token_embedding:scaled"] * (
            variant == "opt_untied"
        )
    elif variant.startswith("bloom"):  # one module makes all three
        assert {name.partition(":")[2].partition(".")[0] for name in absent} == {"split_heads"}
    else:
        assert absent == []
    assert all(found[name].shape == shape for name, shape in wanted.items() if name in found)


def test_fused_attention_shows_no_scores(outcomes):
    theirs, ours = outcomes.pair("opt", attention="sdpa")
    found = TransformersCandidate(theirs).run(case_of(ours).inputs)
    assert "layers.0.self_attention:attention_context" in found
    assert "layers.0.self_attention:attention_scores" not in found


@pytest.mark.parametrize("variant", ["opt_350m", "bloom", "t5_gated"])
def test_the_model_is_left_as_it_was(outcomes, variant):
    theirs, ours = outcomes.pair(variant)
    model = copied(theirs).train()
    candidate, inputs = TransformersCandidate(model), dict(case_of(ours).inputs)
    layer = next(iter(sorted(candidate.injects)))
    candidate.run(inputs, {layer: np.ones(step_names(ours, inputs)[layer], np.float32)})
    ids = next(name for name in inputs if name.endswith("token_ids"))
    with pytest.raises(CandidateError, match="fails: IndexError"):
        candidate.run(inputs | {ids: np.full_like(inputs[ids], 64)})
    assert model.training
    assert hooks(model) == hooks(theirs) == 0


@pytest.mark.parametrize("variant", ["opt", "opt_350m", "bloom", "t5"])
def test_what_is_injected_is_what_goes_on(outcomes, variant):
    theirs, ours = outcomes.pair(variant)
    candidate, case = TransformersCandidate(theirs), case_of(ours)
    plain = candidate.run(case.inputs)
    layer = next(name for name in plain if name in candidate.injects)
    given = np.asarray(plain[layer]) + np.arange(32, dtype=np.float32)  # a norm would not see a constant
    found = candidate.run(case.inputs, {layer: given})
    np.testing.assert_array_equal(found[layer], plain[layer])
    following = list(plain)[list(plain).index(layer) + 1]
    assert np.abs(found[following] - plain[following]).max() > 1e-3
    report = verify(candidate, ours, [case], inject=True)
    assert report.status == AGREES


@pytest.mark.parametrize("variant", ["opt_350m", "bloom", "t5_gated"])
def test_our_model_has_their_weights(outcomes, tmp_path, variant):
    """The same as by way of files, bit for bit."""
    theirs, ours = outcomes.pair(variant)
    theirs.save_pretrained(tmp_path)
    for (path, wanted), (other, found) in zip(
        flatten(Backbone.from_preset(tmp_path).params), flatten(ours.params), strict=True
    ):
        assert path == other
        assert wanted.tobytes() == found.tobytes(), path


def test_products_in_tf32_must_be_declared(outcomes):
    theirs, ours = outcomes.pair("opt")
    with tf32(theirs):
        found = verify(TransformersCandidate(theirs), ours, [case_of(ours)])
    assert found.first[1].name == "layers.0.self_attention.query:linear"


def test_positions_are_told_where_the_inputs_mean_others(outcomes):
    """Positions that skip the padding on the left are Transformers' own rule (OPT-C1): it is left to it, and can be wrong."""
    theirs, ours = outcomes.pair("opt")
    inputs = case_of(ours).inputs
    skipping = inputs | {"position_ids": np.maximum(inputs["padding_mask"].cumsum(1) - 1, 0)}
    model = copied(theirs)
    assert verify(TransformersCandidate(model), ours, [Case("own rule", skipping)]).status == AGREES
    place = model.model.decoder.embed_positions
    plain = place.forward

    def by_index(self, mask, past=0, position_ids=None):
        import torch

        return plain(mask, past, position_ids=torch.arange(mask.shape[1]).expand_as(mask))

    place.forward = types.MethodType(by_index, place)
    found = verify(TransformersCandidate(model), ours, [Case("wrong rule", skipping)])
    assert (found.status, found.first[1].name) == (DIVERGES, "position_embedding:embedding")


@pytest.mark.parametrize("variant", ["opt", "bloom", "t5_gated"])
def test_it_generates_what_ours_does(outcomes, variant):
    theirs, ours = outcomes.pair(variant)
    inputs = dict(case_of(ours, "padded on the right").inputs)
    found = TransformersCandidate(theirs).generate(inputs, 4)
    prefix = "decoder_" if ours.family == "t5" else ""
    for row in range(3):
        one = {name: array[row : row + 1] for name, array in inputs.items()}
        real = one[f"{prefix}padding_mask"][0]
        tokens = list(one[f"{prefix}token_ids"][0][real])
        for token in found[row]:
            given = {f"{prefix}token_ids": np.array([tokens]), f"{prefix}padding_mask": np.ones((1, len(tokens)), bool)}
            hidden = ours(one | given)
            hidden = hidden["decoder_sequence_output"] if ours.family == "t5" else hidden
            assert token == ours.logits(hidden)[0, -1].argmax()
            tokens.append(int(token))


def test_facts_say_what_ran(outcomes):
    theirs, _ = outcomes.pair("opt", "bfloat16", "sdpa")
    facts = TransformersCandidate(theirs).facts()
    assert facts["attention"] == "sdpa"
    assert facts["dtype"] == "bfloat16"
    assert facts["transformers"]


def test_what_is_no_candidate_is_refused(outcomes):
    import torch

    with pytest.raises(CandidateError, match="a Linear is no candidate: wanted one of OPTForCausalLM"):
        TransformersCandidate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="cache must be one of dynamic, static, got 'paged'"):
        TransformersCandidate(foreign_model("opt"), cache="paged")
    theirs, ours = outcomes.pair("opt")
    with pytest.raises(ValueError, match="chunks of"):
        TransformersCandidate(theirs).chunked(case_of(ours).inputs, [1, 2])
