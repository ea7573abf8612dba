"""Attention: scores, softmax over the permitted keys, weighted mean of the values."""

import numpy as np

from refmodels.numerics import multilinear
from refmodels.op import Array, Bool, Float, op
from refmodels.ops.elementwise import dropout
from refmodels.ops.precision import narrow, wide


@op(error=multilinear())
def attention_scores(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    bias: Float[Array, "#b h t s"] | None = None,
    *,
    scale: float = 1.0,
) -> Float[Array, "b h t s"]:
    """scale * query . key for every pair and head, plus a position bias. The result stays float32 or wider."""
    scores = wide(query).transpose(0, 2, 1, 3) @ wide(key).transpose(0, 2, 3, 1) * scale
    return scores if bias is None else scores + wide(bias)


@op(laws=("shift invariant",))
def masked_softmax(scores: Float[Array, "b h t s"], mask: Bool[Array, "#b 1 #t s"]) -> Float[Array, "b h t s"]:
    """exp(score) / sum of exp(score) over the permitted keys, in float32 or wider; 0 for the others.

    Masking is by exclusion. A row that permits no key gives every key the same weight: so does adding -1e9 in float32.
    """
    some = mask.any(-1, keepdims=True)  # T5-C10, OPT-C7, BLOOM-C7
    permitted = np.where(some, np.where(mask, wide(scores), -np.inf), 0.0)
    peak = permitted.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(permitted - peak)
    return weights / weights.sum(-1, keepdims=True)


@op(error=multilinear())
def attention_context(weights: Float[Array, "b h t s"], value: Float[Array, "b s h d"]) -> Float[Array, "b t h d"]:
    """The mean of the values by these weights, in the type of the values."""
    context = weights @ wide(value).transpose(0, 2, 1, 3)
    return narrow(context.transpose(0, 2, 1, 3), value.dtype)


@op(composite=True, source="Vaswani et al. 2017, eq. 1")
def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    mask: Bool[Array, "#b 1 #t s"],
    bias: Float[Array, "#b h t s"] | None = None,
    *,
    scale: float = 1.0,
    dropout_rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Float[Array, "b t h d"]:
    """softmax(scale * query . key + bias, over the permitted keys) . value, head by head."""
    weights = masked_softmax(attention_scores(query, key, bias, scale=scale), mask)
    return attention_context(dropout(weights, dropout_rate, rng), value)
