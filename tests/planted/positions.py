"""Positions, T5's buckets, ALiBi."""

import math

import numpy as np

from planted import right, wrong
from refmodels.ops.position import (
    alibi_bias,
    alibi_slopes,
    relative_position_bias,
    relative_position_buckets,
    token_positions,
)


@wrong(token_positions, "the first row's start serves every row")
def _(ids, start=None):
    return token_positions.reference(ids, start if start is None else np.broadcast_to(start[:1], start.shape))


@wrong(token_positions, "counts from 1")
def _(ids, start=None):
    return token_positions.reference(ids, start) + 1


def by_logarithm(relative, side, max_distance, *, kind=np.float32):
    exact = side // 2
    distance = np.maximum(relative, 1).astype(kind)
    large = exact + (np.log(distance / exact) / kind(math.log(max_distance / exact)) * (side - exact)).astype(np.int64)
    return np.where(relative < exact, relative, np.minimum(large, side - 1))


@wrong(relative_position_buckets, "the border of the exact buckets is one too far")
def _(positions, keys, *, bidirectional, num_buckets=32, max_distance=128):
    relative = np.arange(keys) - positions[:, :, None]
    side = num_buckets // 2 if bidirectional else num_buckets
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    bucket = by_logarithm(np.maximum(distance - (distance > side // 2), 0), side, max_distance)
    return bucket + side * (relative > 0) if bidirectional else bucket


@wrong(relative_position_buckets, "always bidirectional")
def _(positions, keys, *, bidirectional, num_buckets=32, max_distance=128):
    return relative_position_buckets.reference(
        positions, keys, bidirectional=True, num_buckets=num_buckets, max_distance=max_distance
    )


@wrong(relative_position_buckets, "the sign of the distance")
def _(positions, keys, *, bidirectional, num_buckets=32, max_distance=128):
    side = num_buckets // 2
    bucket = relative_position_buckets.reference(
        positions, keys, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    return np.where(bucket >= side, bucket - side, bucket + side * (bucket > 0)) if bidirectional else bucket


@wrong(relative_position_buckets, "the largest distance is always 128")
def _(positions, keys, *, bidirectional, num_buckets=32, max_distance=128):
    return relative_position_buckets.reference(positions, keys, bidirectional=bidirectional, num_buckets=num_buckets)


@wrong(relative_position_bias, "rows and heads change places where there are as many")
def _(buckets, embeddings):
    bias = relative_position_bias.reference(buckets, embeddings)
    return bias.swapaxes(2, 3).copy() if bias.shape[2] == bias.shape[3] > 1 else bias


@wrong(relative_position_bias, "of the type of the table", dtype="float16")
def _(buckets, embeddings):
    return relative_position_bias.reference(buckets, embeddings).astype(embeddings.dtype)


@wrong(alibi_slopes, "a geometric series whatever the number of heads")
def _(num_heads):
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


@wrong(alibi_slopes, "the slopes between come in order")
def _(num_heads):
    return np.sort(alibi_slopes.reference(num_heads))[::-1].copy()


@wrong(alibi_bias, "the distance without its sign")
def _(slopes, positions, keys, *, dtype="float32"):
    return np.abs(alibi_bias.reference(slopes, positions, keys, dtype=dtype))


@wrong(alibi_bias, "the key's place alone")
def _(slopes, positions, keys, *, dtype="float32"):
    return alibi_bias.reference(slopes, np.zeros_like(positions), keys, dtype=dtype)


@wrong(alibi_bias, "slopes rounded to half precision")
def _(slopes, positions, keys, *, dtype="float32"):
    return alibi_bias.reference(slopes.astype(np.float16).astype(np.float64), positions, keys, dtype=dtype)


@right(alibi_bias, "slopes of float32")
def _(slopes, positions, keys, *, dtype="float32"):
    relative = np.arange(keys) - positions[:, :, None]
    kind = np.dtype(dtype).type
    return slopes.astype(kind)[:, None, None] * relative[:, None].astype(kind)


@right(relative_position_buckets, "counts the borders that a distance has passed")
def _(positions, keys, *, bidirectional, num_buckets=32, max_distance=128):
    relative = np.arange(keys) - positions[:, :, None]
    side = num_buckets // 2 if bidirectional else num_buckets
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact, rest = side // 2, side - side // 2
    passed = [distance**rest >= max_distance**i * exact ** (rest - i) for i in range(1, rest)] if side <= 8 else None
    if passed is None:
        return relative_position_buckets.reference(
            positions, keys, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )
    bucket = np.where(distance < exact, distance, exact + sum(p.astype(np.int64) for p in passed))
    return bucket + side * (relative > 0) if bidirectional else bucket
