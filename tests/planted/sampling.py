"""The choice of the next token: borders, ties, penalties."""

import numpy as np

from planted import f32, right, wrong
from refmodels.ops.sampling import (
    allow_tokens,
    beam_candidates,
    forbid_ngrams,
    greedy_token,
    has_choice,
    likeliest_tokens,
    penalise_repetition,
    sample_token,
)


@wrong(sample_token, "top_k keeps one more")
def _(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    top_k = None if top_k is None else top_k + 1
    return sample_token.reference(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@wrong(sample_token, "top_p leaves out the token that passes p")
def _(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    if top_p is None:
        return sample_token.reference(logits, uniform, temperature=temperature, top_k=top_k, min_p=min_p)
    scaled = f32(logits).astype(np.float64) / (1 if temperature is None else temperature[:, None])
    order = np.argsort(-scaled, -1, kind="stable")
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), order, -1)
    count = np.maximum((np.cumsum(p, -1) <= top_p[:, None]).sum(-1), 1)
    count = count if top_k is None else np.minimum(count, top_k)
    return sample_token.reference(logits, uniform, temperature=temperature, top_k=count, min_p=min_p)


@wrong(sample_token, "the temperature multiplies")
def _(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    temperature = None if temperature is None else 1 / temperature
    return sample_token.reference(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@wrong(sample_token, "the first row's settings serve every row")
def _(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    first = [None if a is None else np.broadcast_to(a[:1], a.shape) for a in (temperature, top_k, top_p, min_p)]
    return sample_token.reference(logits, uniform, temperature=first[0], top_k=first[1], top_p=first[2], min_p=first[3])


@wrong(sample_token, "tokens stay in the order of their ids")
def _(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    if top_k is not None or top_p is not None or min_p is not None:
        return sample_token.reference(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p = np.exp((f32(logits) - f32(logits).max(-1, keepdims=True)) / (1 if temperature is None else temperature[:, None]))
    cumulative = np.cumsum(p, -1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1).clip(0, logits.shape[1] - 1)


@wrong(greedy_token, "of equal scores the last")
def _(logits):
    return logits.shape[1] - 1 - logits[:, ::-1].argmax(-1)


@wrong(greedy_token, "the search begins at 0, which -inf and negative scores never pass")
def _(logits):
    return np.where(f32(logits).max(-1) > 0, logits.argmax(-1), 0)


@wrong(greedy_token, "gives 32-bit places of a vocabulary cut to 4096")
def _(logits):
    return logits[:, :4096].argmax(-1)


@wrong(penalise_repetition, "once for each time that a token is there")
def _(logits, token_ids, mask, penalty):
    scores = np.array(f32(logits))
    for i in range(len(scores)):
        for token in token_ids[i, mask[i]]:
            scores[i, token] *= penalty[i] if scores[i, token] < 0 else 1 / penalty[i]
    return scores


@wrong(penalise_repetition, "negative scores are divided too")
def _(logits, token_ids, mask, penalty):
    held = np.zeros(logits.shape, bool)
    rows, places = np.nonzero(mask)
    held[rows, token_ids[rows, places]] = True
    scores = f32(logits)
    return (scores / np.where(held, penalty[:, None], 1.0)).astype(scores.dtype)


@wrong(penalise_repetition, "padding counts")
def _(logits, token_ids, mask, penalty):
    return penalise_repetition.reference(logits, token_ids, np.ones_like(mask), penalty)


@wrong(forbid_ngrams, "padding counts")
def _(logits, token_ids, mask, size):
    return forbid_ngrams.reference(logits, token_ids, np.ones_like(mask), size)


@wrong(forbid_ngrams, "size 1 forbids nothing")
def _(logits, token_ids, mask, size):
    return forbid_ngrams.reference(logits, token_ids, mask, np.where(size == 1, 0, size))


@wrong(allow_tokens, "-1e9 for what is not allowed")
def _(logits, allowed):
    return np.where(allowed, f32(logits), -1e9).astype(f32(logits).dtype)


@wrong(has_choice, "a score of 0 counts as none")
def _(logits):
    return ((f32(logits) > -np.inf) & (logits != 0)).any(-1)


@wrong(likeliest_tokens, "probabilities without the temperature")
def _(logits, count, *, temperature=1.0):
    return likeliest_tokens.reference(logits, count)


@wrong(beam_candidates, "beams and tokens change places")
def _(log_probabilities, scores, count):
    total, beams, tokens = beam_candidates.reference(log_probabilities, scores, count)
    return total, tokens, beams


@right(greedy_token, "in blocks of 16", tiles=(16,))
def _(logits):
    best, place = np.full(len(logits), -np.inf), np.zeros(len(logits), np.int64)
    for start in range(0, logits.shape[1], 16):
        block = f32(logits[:, start : start + 16])
        higher = block.max(-1) > best
        best, place = np.where(higher, block.max(-1), best), np.where(higher, start + block.argmax(-1), place)
    return place
