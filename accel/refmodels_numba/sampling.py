"""The choice of a token without sorting the vocabulary: only what can be chosen is put in order."""

from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops import sampling as ops
from refmodels.ops.precision import wide
from refmodels_numba.accelerator import kernel

FEW = 64
"""Tokens that are put in order. NumPy adds up so many in the same order with zeros behind them and without: the same bits."""


def best(values: Array, count: int) -> Array:
    """The places of the `count` largest of `values`, a vector without NaN, the largest first; of equal ones the first first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= threshold)  # in order, so that a stable sort keeps the first of equal ones first
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def few_are_kept(logits: Any, uniform: Any, *, top_k: Any = None, **_: Any) -> bool | str:
    """top_k up to 64"""
    if logits.shape[-1] < 16 * FEW:
        return "a small vocabulary: NumPy sorts it as fast"
    if top_k is None or int(top_k.max(initial=0)) > FEW:
        return "every token may be chosen: the reference sorts them"
    return not np.isnan(logits).any() or "NaN among the scores"


@kernel(ops.sample_token, when=few_are_kept)
def sample_token(
    logits: Array,
    uniform: Array,
    *,
    temperature: Array | None = None,
    top_k: Array | None = None,
    top_p: Array | None = None,
    min_p: Array | None = None,
) -> Array:
    """The reference, of the best 64 tokens alone."""
    scores = wide(logits)
    order = np.array([best(row, FEW) for row in scores], np.int64).reshape(len(scores), FEW)
    ranked = np.take_along_axis(scores, order, -1)
    place = ops.sample_token.reference(ranked, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return np.take_along_axis(order, place[:, None], -1)[:, 0]


@kernel(ops.beam_candidates, when=lambda log_probabilities, scores, count: not np.isnan(log_probabilities).any() or "NaN")
def beam_candidates(log_probabilities: Array, scores: Array, count: int) -> tuple[Array, Array, Array]:
    """The best `count` alone."""
    total = scores[:, None] + log_probabilities
    places = best(total.reshape(-1), count)
    beams, tokens = np.divmod(places, log_probabilities.shape[1])
    return total[beams, tokens], beams, tokens


@kernel(ops.likeliest_tokens, when=lambda logits, count, *, temperature=1.0: not np.isnan(logits).any() or "NaN")
def likeliest_tokens(logits: Array, count: int, *, temperature: float = 1.0) -> tuple[Array, Array]:
    """The best `count` alone."""
    scores = wide(logits)
    width = min(count, scores.shape[-1])
    tokens = np.array([best(row, width) for row in scores], np.int64).reshape(len(scores), width)
    return np.take_along_axis(np.exp(ops.log_softmax.reference(logits, temperature)), tokens, -1), tokens
