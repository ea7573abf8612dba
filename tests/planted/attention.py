"""Softmax and attention: peaks, masks, blocks of keys, rows that permit no key."""

import numpy as np

from planted import cast, f32, right, wrong
from refmodels.ops.attention import attention, attention_context, attention_scores, masked_softmax
from refmodels.ops.mask import causal_mask
from refmodels.ops.sampling import log_softmax, token_log_probs

BLOCK = 16


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    return e / e.sum(-1, keepdims=True)


@wrong(masked_softmax, "the peak is not taken away")
def _(scores, mask):
    some = mask.any(-1, keepdims=True)
    e = np.where(some, np.where(mask, np.exp(f32(scores)), 0), 1).astype(f32(scores).dtype)
    return e / e.sum(-1, keepdims=True)


@wrong(masked_softmax, "the peak is that of the masked keys too")
def _(scores, mask):
    some = mask.any(-1, keepdims=True)
    e = np.exp(np.where(some, f32(scores), 0) - np.where(some, f32(scores), 0).max(-1, keepdims=True, initial=-np.inf))
    e = np.where(mask | ~some, e, 0)
    return e / e.sum(-1, keepdims=True)


@wrong(masked_softmax, "NaN for a row that permits no key")
def _(scores, mask):
    return softmax(np.where(mask, f32(scores), -np.inf))


@wrong(masked_softmax, "zeros for a row that permits no key")
def _(scores, mask):
    return np.where(mask.any(-1, keepdims=True), masked_softmax.reference(scores, mask), f32(scores).dtype.type(0))


@wrong(masked_softmax, "a row that permits no key forgets the mask")
def _(scores, mask):
    return softmax(np.where(mask | ~mask.any(-1, keepdims=True), f32(scores), -np.inf))


@wrong(masked_softmax, "adds -1e9 to masked scores")
def _(scores, mask):
    return softmax(f32(scores) + np.where(mask, 0, -1e9).astype(f32(scores).dtype))


@wrong(masked_softmax, "adds -1e4 to masked scores")
def _(scores, mask):
    some = mask.any(-1, keepdims=True)
    return softmax(np.where(some, f32(scores), 0) + np.where(mask, 0, -1e4).astype(f32(scores).dtype))


@wrong(masked_softmax, "the mask comes after the softmax")
def _(scores, mask):
    some = mask.any(-1, keepdims=True)
    weights = softmax(np.where(some, f32(scores), 0))
    return np.where(mask | ~some, weights, 0).astype(weights.dtype)


@wrong(masked_softmax, "the first row's mask serves every row of the batch")
def _(scores, mask):
    return masked_softmax.reference(scores, mask[:1])


@wrong(masked_softmax, "the first query's mask serves every query")
def _(scores, mask):
    return masked_softmax.reference(scores, mask[:, :, :1])


@wrong(masked_softmax, "the last key of an odd number is not in the sum")
def _(scores, mask):
    weights = masked_softmax.reference(scores, mask)
    s = scores.shape[-1]
    if s > 1 and s % 2:
        weights = np.concatenate([weights[..., :-1] / weights[..., :-1].sum(-1, keepdims=True), weights[..., -1:]], -1)
    return weights


@wrong(masked_softmax, "weights of half precision", dtype="float16")
def _(scores, mask):
    return cast(masked_softmax.reference(scores, mask), "float16")


@wrong(masked_softmax, "weights rounded to half precision on the way", dtype="bfloat16")
def _(scores, mask):
    return f32(cast(masked_softmax.reference(scores, mask), "bfloat16"))


@wrong(masked_softmax, "an exponential right to three digits")
def _(scores, mask):
    weights = masked_softmax.reference(scores, mask)
    bent = weights * (1 + 1e-3 * np.sin(1e3 * weights)).astype(weights.dtype)
    return bent


@wrong(attention_scores, "the scale reaches the bias")
def _(query, key, bias=None, *, scale=1.0):
    scores = attention_scores.reference(query, key, bias)
    return scores * scores.dtype.type(scale)


@wrong(attention_scores, "the first row's bias serves every row of the batch")
def _(query, key, bias=None, *, scale=1.0):
    return attention_scores.reference(query, key, None if bias is None else bias[:1], scale=scale)


@wrong(attention_scores, "rounded to the type of the query", dtype="bfloat16")
def _(query, key, bias=None, *, scale=1.0):
    return f32(cast(attention_scores.reference(query, key, bias, scale=scale), "bfloat16"))


@wrong(attention_scores, "the last of a head's numbers, not a multiple of 8, are left out")
def _(query, key, bias=None, *, scale=1.0):
    d = query.shape[-1] // 8 * 8 if query.shape[-1] > 8 else query.shape[-1]
    return attention_scores.reference(query[..., :d], key[..., :d], bias, scale=scale)


@wrong(attention_context, "heads and positions change places where there are as many")
def _(weights, value):
    y = attention_context.reference(weights, value)
    return y.swapaxes(1, 2).copy() if y.shape[1] == y.shape[2] else y


@wrong(attention_context, "the result stays float32", dtype="float16")
def _(weights, value):
    return f32(attention_context.reference(weights, f32(value)))


@wrong(log_softmax, "the peak is not taken away")
def _(logits, temperature=1.0):
    y = f32(logits) / f32(logits).dtype.type(temperature)
    return y - np.log(np.exp(y).sum(-1, keepdims=True))


@wrong(log_softmax, "the logarithm of the softmax, and so -inf for small ones")
def _(logits, temperature=1.0):
    y = (f32(logits) - f32(logits).max(-1, keepdims=True)) / f32(logits).dtype.type(temperature)
    return np.log(softmax(y))


@wrong(token_log_probs, "the token's neighbour")
def _(logits, token_ids):
    return token_log_probs.reference(logits, np.maximum(token_ids - 1, 0))


# -- all of attention, over blocks of keys ----------------------------------------------------------------------------------


def online(query, key, value, mask, bias, scale, *, rescale=True, tail=True, order=None, fully=True):
    """Softmax on the fly: a peak, a sum and a context that are carried from block to block of keys."""
    q, k, v = (f32(a).transpose(0, 2, 1, 3) for a in (query, key, value))
    (b, h, t, _), s = q.shape, k.shape[2]
    mask = np.broadcast_to(mask, (b, 1, t, s))
    some = mask.any(-1, keepdims=True)
    peak, total = np.full((b, h, t, 1), -np.inf, q.dtype), np.zeros((b, h, t, 1), q.dtype)
    context = np.zeros((b, h, t, v.shape[-1]), q.dtype)
    blocks = range(0, s if tail or s < BLOCK else s // BLOCK * BLOCK, BLOCK)
    for start in order(blocks) if order else blocks:
        part = slice(start, start + BLOCK)
        scores = q @ k[:, :, part].swapaxes(2, 3) * q.dtype.type(scale)
        if bias is not None:
            scores = scores + f32(bias)[..., part]
        scores = np.where(some, np.where(mask[..., part], scores, -np.inf), 0 if fully else -np.inf)
        new = np.maximum(peak, scores.max(-1, keepdims=True, initial=-np.inf))
        safe = np.where(np.isinf(new), 0, new).astype(q.dtype)
        e = np.exp(scores - safe)
        old = np.exp(np.where(np.isinf(peak), -np.inf, peak - safe)) if rescale else np.ones_like(peak)
        total, context, peak = total * old + e.sum(-1, keepdims=True), context * old + e @ v[:, :, part], new
    return cast((context / np.where(total > 0, total, 1 if fully else 0)).transpose(0, 2, 1, 3), value.dtype)


def plainly(kernel):
    """Without dropout: that is for the reference."""

    def call(query, key, value, mask, bias=None, *, scale=1.0, dropout_rate=0.0, rng=None):
        if rng is not None and dropout_rate:
            return attention.reference(query, key, value, mask, bias, scale=scale, dropout_rate=dropout_rate, rng=rng)
        return kernel(query, key, value, mask, bias, scale)

    return call


wrong(attention, "what was added up is not rescaled when the peak rises")(plainly(lambda *args: online(*args, rescale=False)))
wrong(attention, "the last block of keys, not full, is left out")(plainly(lambda *args: online(*args, tail=False)))
wrong(attention, "NaN where a row permits no key")(plainly(lambda *args: online(*args, fully=False)))


@wrong(attention, "does not drop out")
def _(query, key, value, mask, bias=None, *, scale=1.0, dropout_rate=0.0, rng=None):
    return attention.reference(query, key, value, mask, bias, scale=scale)


@wrong(attention, "1/sqrt(d) in place of the given scale")
def _(query, key, value, mask, bias=None, *, scale=1.0, dropout_rate=0.0, rng=None):
    scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    return attention.reference(query, key, value, mask, bias, scale=scale, dropout_rate=dropout_rate, rng=rng)


@wrong(attention, "scores in half precision", dtype="bfloat16")
@plainly
def _(query, key, value, mask, bias, scale):
    scores = f32(cast(attention_scores.reference(query, key, bias, scale=scale), "bfloat16"))
    return attention_context.reference(masked_softmax.reference(scores, mask), value)


@wrong(causal_mask, "a query does not see itself")
def _(positions, key_mask):
    return ((np.arange(key_mask.shape[1]) < positions[:, :, None]) & key_mask[:, None, :])[:, None]


@wrong(causal_mask, "a single query sees padding")
def _(positions, key_mask):
    return causal_mask.reference(positions, np.ones_like(key_mask) if positions.shape[1] == 1 else key_mask)


@wrong(causal_mask, "every row has the first row's positions")
def _(positions, key_mask):
    return causal_mask.reference(np.broadcast_to(positions[:1], positions.shape), key_mask)


right(attention, "over blocks of keys, with a peak that is carried along", tiles=(16,))(plainly(online))
right(attention, "the same from the last block to the first", tiles=(16,))(
    plainly(lambda *args: online(*args, order=lambda blocks: reversed(list(blocks))))
)
right(attention, "over blocks of keys, in bfloat16", tiles=(16,), dtype="bfloat16")(plainly(online))


@right(attention, "keys in two halves, joined by their peaks and sums", tiles=(16,))
@plainly
def _(query, key, value, mask, bias, scale):
    scores = attention_scores.reference(query, key, bias, scale=scale)
    some = mask.any(-1, keepdims=True)
    scores = np.where(some, np.where(mask, scores, -np.inf), 0).astype(scores.dtype)
    half = scores.shape[-1] // 2
    parts = []
    for part in (slice(0, half), slice(half, None)):
        peak = scores[..., part].max(-1, keepdims=True, initial=-np.inf)
        e = np.exp(scores[..., part] - np.where(np.isinf(peak), 0, peak))
        parts.append((peak, e.sum(-1, keepdims=True), e @ f32(value).transpose(0, 2, 1, 3)[:, :, part]))
    peak = np.maximum(parts[0][0], parts[1][0])
    factors = [np.exp(np.where(np.isinf(own), -np.inf, own - np.where(np.isinf(peak), 0, peak))) for own, _, _ in parts]
    total = sum(f * own for f, (_, own, _) in zip(factors, parts, strict=True))
    context = sum(f * own for f, (_, _, own) in zip(factors, parts, strict=True)) / np.where(total > 0, total, 1)
    return cast(context.transpose(0, 2, 1, 3), value.dtype)


@right(masked_softmax, "powers of two, and a product with the inverse of the sum")
def _(scores, mask):
    wide = f32(scores)
    some = mask.any(-1, keepdims=True)
    wide = np.where(some, np.where(mask, wide, -np.inf), 0).astype(wide.dtype)
    below = wide - wide.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp2(below * wide.dtype.type(np.log2(np.e)))
    return e * (wide.dtype.type(1) / e.sum(-1, keepdims=True))


@right(masked_softmax, "the sum from the first key to the last")
def _(scores, mask):
    wide = f32(scores)
    some = mask.any(-1, keepdims=True)
    wide = np.where(some, np.where(mask, wide, -np.inf), 0).astype(wide.dtype)
    e = np.exp(wide - wide.max(-1, keepdims=True, initial=-np.inf))
    return e / np.cumsum(e, -1, dtype=e.dtype)[..., -1:] if e.shape[-1] else e
