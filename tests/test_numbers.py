"""Facts about numbers and positions that one op alone does not show, each the fault of some implementation in the field."""

import numpy as np
import pytest

from refmodels import BloomBackbone, OPTBackbone, T5Backbone
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.ops.attention import attention
from refmodels.ops.precision import numpy_dtype

SIZES = {"vocabulary_size": 19, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16, "seed": 1}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_does_not_round_its_scores_to_half(dtype):
    """Two keys with the scores 256 and 256.125, which are one number in half precision."""
    query = np.array([16.0, 0.125]).reshape(1, 1, 1, 2).astype(numpy_dtype(dtype))
    key = np.array([[16.0, 0.0], [16.0, 1.0]]).reshape(1, 2, 1, 2).astype(numpy_dtype(dtype))
    value = np.array([[0.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2).astype(numpy_dtype(dtype))
    context = attention(query, key, value, np.ones((1, 1, 1, 2), bool))
    assert context.dtype == numpy_dtype(dtype)
    assert abs(float(context[0, 0, 0, 0]) - 1 / (1 + np.exp(-0.125))) <= 2 * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_the_residual_stream_of_t5_does_not_overflow(dtype):
    """The published weights give sums of 1e5 and more behind a feed-forward layer, beyond float16's 65504."""
    ids = {"encoder_token_ids": [[3, 1, 4, 1]], "decoder_token_ids": [[0, 2, 7]]}
    model, exact = (T5Backbone(**SIZES, use_gated_activation=False, dtype=policy) for policy in (dtype, "float64"))
    for backbone in (model, exact):
        for stack in ("encoder", "decoder"):
            for layer in backbone.params[stack]["layers"]:
                for name in ("input_projector", "output_projector"):
                    layer[name]["kernel"] *= 400
    largest = []
    for name, wanted in exact(ids).items():
        got = model(ids)[name]
        assert got.dtype == np.float16
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got.astype(np.float64), wanted, atol=0.02 * np.abs(wanted).max())
        largest.append(np.abs(wanted).max())
    assert max(largest) < 100  # the norm behind the stream brings it back into range


@pytest.mark.parametrize("model", [OPTBackbone, BloomBackbone, T5Backbone])
def test_without_a_mask_every_token_is_real(model):
    """Token 0 as well, which is the padding of T5 and a plain token elsewhere."""
    ids, ones = np.array([[5, 0, 7, 0], [0, 0, 3, 2]]), np.ones((2, 4), int)
    backbone = model(**SIZES)
    given = dict.fromkeys(model.inputs, ids)
    masks = {others[0]: ones for others in model.inputs.values()}
    without, with_masks = backbone(given), backbone(given | masks)
    if model is not T5Backbone:
        without, with_masks = {"outputs": without}, {"outputs": with_masks}
    for name, wanted in with_masks.items():
        np.testing.assert_array_equal(without[name], wanted)
