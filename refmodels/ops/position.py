"""Where a token stands: positions, T5's relative buckets, ALiBi."""

import functools
import math

import numpy as np

from refmodels.numerics import exact, ulps
from refmodels.op import Array, Float, Int, op
from refmodels.ops.precision import wide


@op(error=exact())
def token_positions(ids: Int[Array, "b t"], start: Int[Array, "b"] | None = None) -> Int[Array, "#b t"]:
    """Positions start, start + 1, ... of each row's tokens; without `start` they count from 0, in one row for all."""
    first = np.zeros(1, np.int64) if start is None else start
    return first[:, None] + np.arange(ids.shape[1])


@functools.cache
def _first_distances(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of every bucket. Half of them hold one distance each; the rest grow by a constant ratio.

    The original puts distance d >= e (e exact buckets of n in all) into bucket e + floor(log(d/e) / log(max/e) * (n - e)), so
    bucket e + i begins at the smallest integer d with (d/e)**(n-e) >= (max/e)**i: integers alone decide, nothing is rounded.
    """
    exact_buckets = buckets // 2
    logarithmic = buckets - exact_buckets
    firsts = list(range(exact_buckets))
    distance = exact_buckets
    for i in range(logarithmic):
        while distance**logarithmic < max_distance**i * exact_buckets ** (logarithmic - i):  # T5-C11
            distance += 1
        firsts.append(distance)
    return tuple(firsts)


@op(error=exact(), source="Raffel et al. 2020, section 2.1; mesh_tensorflow's _relative_position_bucket")
def relative_position_buckets(
    positions: Int[Array, "#b t"], keys: int, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "#b t s"]:
    """The bucket of every (query, key) pair, from the distance key - query; key number s is at position s.

    Bidirectional: buckets 0..15 for keys not after the query, 16..31 for keys after it. Otherwise a key after the query counts
    as distance 0. Beyond `max_distance` all distances share the last bucket.
    """
    relative = np.arange(keys) - positions[:, :, None]
    side = num_buckets // 2 if bidirectional else num_buckets
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    bucket = np.searchsorted(_first_distances(side, max_distance), distance, side="right") - 1
    return bucket + side * (relative > 0) if bidirectional else bucket


@op(error=exact(), source="Raffel et al. 2020, section 2.1")
def relative_position_bias(buckets: Int[Array, "#b t s"], embeddings: Float[Array, "r h"]) -> Float[Array, "#b h t s"]:
    """Look the buckets up: one learned number for each head and bucket, added to the scores. float32 or wider."""
    return np.moveaxis(wide(embeddings)[buckets], -1, 1)


@op(error=ulps(2), source="Press et al. 2022, section 3, and its reference code for head counts that are no power of two")
def alibi_slopes(num_heads: int) -> Float[Array, "h"]:
    """Slope of each head: 2**(-8/p), its square, its cube, ... for the largest power of two p <= num_heads.

    The other heads take every second slope of the sequence for 2p, from its first. float64, so that nothing is lost here.
    """
    p = 2 ** math.floor(math.log2(num_heads))  # BLOOM-C8
    slopes = [2.0 ** (-8.0 * i / p) for i in range(1, p + 1)]
    slopes += [2.0 ** (-4.0 * i / p) for i in range(1, 2 * (num_heads - p) + 1, 2)]
    return np.array(slopes)


@op(error=ulps(2), source="Press et al. 2022, eq. in section 3")
def alibi_bias(
    slopes: Float[Array, "h"], positions: Int[Array, "#b t"], keys: int, *, dtype: str = "float32"
) -> Float[Array, "#b h t s"]:
    """slope * (key - query): 0 for the query's own position, more negative the further back a key is. Never below float32."""
    relative = np.arange(keys) - positions[:, :, None]
    return (slopes[:, None, None] * relative[:, None]).astype(dtype)  # BLOOM-C2, BLOOM-C9
