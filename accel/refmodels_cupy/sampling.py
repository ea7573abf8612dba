"""From scores to the next token, in array functions that CuPy has as NumPy does: the scores stay on the device."""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import sampling as ops
from refmodels_cupy.device import Device


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.sampling`."""
    xp = device.xp

    def wide(x: Any) -> Any:
        return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)

    def best_first(scores: Any) -> Any:
        return xp.argsort(-scores, axis=-1, kind="stable")

    @accelerator.kernel(ops.log_softmax)
    def log_softmax(logits: Any, temperature: float = 1.0) -> Any:
        scores = wide(logits)
        shifted = (scores - scores.max(-1, keepdims=True)) / scores.dtype.type(temperature)
        return shifted - xp.log(xp.exp(shifted).sum(-1, keepdims=True))

    @accelerator.kernel(ops.penalise_repetition)
    def penalise_repetition(logits: Any, token_ids: Any, mask: Any, penalty: Any) -> Any:
        scores, (b, v) = wide(logits), logits.shape
        held = xp.zeros((b, v + 1), bool)  # the last column is for what is no token of the row's
        held[xp.arange(b)[:, None], xp.where(mask, token_ids, v)] = True
        factor = xp.where(held[:, :v], penalty[:, None], penalty.dtype.type(1)).astype(scores.dtype)
        return xp.where(scores < 0, scores * factor, scores / factor)

    @accelerator.kernel(ops.forbid_ngrams)
    def forbid_ngrams(logits: Any, token_ids: Any, mask: Any, size: Any) -> Any:
        """The tokens are looked through on the host, which has few of them; the scores stay where they are."""
        scores = xp.array(wide(logits))
        forbidden = ops.forbid_ngrams.reference(
            np.zeros(logits.shape, np.float32), *(device.to_host(part) for part in (token_ids, mask, size))
        )
        rows, tokens = np.nonzero(forbidden)
        scores[device.to_device(rows), device.to_device(tokens)] = -np.inf
        return scores

    @accelerator.kernel(ops.allow_tokens)
    def allow_tokens(logits: Any, allowed: Any) -> Any:
        scores = wide(logits)
        return xp.where(allowed, scores, scores.dtype.type(-np.inf))

    @accelerator.kernel(ops.has_choice)
    def has_choice(logits: Any) -> Any:
        return xp.asarray((wide(logits) > -np.inf).any(-1))

    @accelerator.kernel(ops.token_log_probs)
    def token_log_probs(logits: Any, token_ids: Any) -> Any:
        return xp.take_along_axis(log_softmax(logits), token_ids[..., None], -1)[..., 0]

    @accelerator.kernel(ops.greedy_token)
    def greedy_token(logits: Any) -> Any:
        return wide(logits).argmax(-1)

    @accelerator.kernel(ops.sample_token)
    def sample_token(
        logits: Any, uniform: Any, *, temperature: Any = None, top_k: Any = None, top_p: Any = None, min_p: Any = None
    ) -> Any:
        order = best_first(wide(logits))
        ranked = xp.take_along_axis(wide(logits), order, -1)
        below = (ranked - ranked[:, :1]).astype(np.float64)
        relative = xp.exp(below if temperature is None else below / temperature[:, None])
        kept = relative  # nothing is cut off the row, so that its sums are the same bits whatever other rows ask for
        if top_k is not None:
            kept = xp.where(xp.arange(kept.shape[1]) < top_k[:, None], kept, np.float64(0))
        if top_p is not None:
            probability = kept / kept.sum(-1, keepdims=True)
            before = xp.cumsum(probability, -1) - probability
            kept = xp.where(before <= top_p[:, None], kept, np.float64(0))
        if min_p is not None:
            kept = xp.where(relative >= min_p[:, None], kept, np.float64(0))
        cumulative = xp.cumsum(kept, -1)
        place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
        last = (kept > 0).sum(-1) - 1  # rounding may put the point behind the last kept token
        return xp.take_along_axis(order, xp.minimum(place, last)[:, None], -1)[:, 0]

    @accelerator.kernel(ops.beam_candidates)
    def beam_candidates(log_probabilities: Any, scores: Any, count: int) -> tuple[Any, Any, Any]:
        total = scores[:, None] + log_probabilities
        best = best_first(total.reshape(-1))[:count]
        beams, tokens = best // total.shape[1], best % total.shape[1]
        return total[beams, tokens], beams, tokens

    @accelerator.kernel(ops.likeliest_tokens)
    def likeliest_tokens(logits: Any, count: int, *, temperature: float = 1.0) -> tuple[Any, Any]:
        tokens = best_first(wide(logits))[:, :count]
        return xp.take_along_axis(xp.exp(log_softmax(logits, temperature)), tokens, -1), tokens

    @accelerator.kernel(ops.contrastive_choice)
    def contrastive_choice(probabilities: Any, hidden: Any, earlier: Any, *, alpha: float) -> Any:
        candidates, past = hidden.astype(np.float64), earlier[0].astype(np.float64)
        lengths = xp.sqrt((candidates**2).sum(-1))[:, None] * xp.sqrt((past**2).sum(-1))
        cosine = device.product(candidates, past, transposed=True) / xp.where(lengths > 0, lengths, np.float64(1))
        score = (1.0 - alpha) * probabilities - alpha * cosine.max(-1)
        return xp.where(probabilities > 0, score, -np.inf).argmax(-1)
