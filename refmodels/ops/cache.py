"""The key/value cache: storage of fixed capacity that a model fills from position 0 on."""

import numpy as np

from refmodels.numerics import exact
from refmodels.op import Array, Int, Params, ShapeError, op
from refmodels.ops.precision import numpy_dtype


@op(error=exact())
def cache_allocate(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros for `shape`: rows of the batch first, then positions."""
    return np.zeros(shape, numpy_dtype(dtype))


@op(composite=True)
def key_value_cache(batch: int, capacity: int, *, layers: int, heads: int, head_dim: int, dtype: str) -> Params:
    """An empty cache for `batch` rows of `capacity` positions: keys and values of every layer, and the padding mask."""
    shape = (batch, capacity, heads, head_dim)
    return {
        "padding_mask": cache_allocate((batch, capacity), "bool"),
        "layers": [{"key": cache_allocate(shape, dtype), "value": cache_allocate(shape, dtype)} for _ in range(layers)],
    }


@op(error=exact(), mutates=("cache",))
def cache_append(cache: Array, new: Array, start: Int[Array, "b"] | None = None) -> Array:
    """Write row i of `new` at the positions start[i], start[i] + 1, ... of row i; gives the cache up to the last one written.

    Both have shape [b, positions, ...]; without `start` every row begins at 0. What a shorter row holds behind its own end is
    for the mask to exclude.
    """
    length = new.shape[1]
    if start is None:
        start = np.zeros(len(cache), np.int64)
    if (len(new), *new.shape[2:]) != (len(cache), *cache.shape[2:]) or len(start) != len(cache):
        shapes = f"cache {cache.shape}, new {new.shape}, start {start.shape}"
        raise ShapeError(f"cache_append: {shapes}; only the positions, axis 1, may differ")
    end = int(start.max(initial=0)) + length
    if start.min(initial=0) < 0 or end > cache.shape[1]:  # a slice past the end is no error to NumPy
        outside = end - 1 if end > cache.shape[1] else start.min()
        raise ValueError(f"cache_append: position {outside} is outside the cache's {cache.shape[1]}")
    for row, first in enumerate(start):
        cache[row, first : first + length] = new[row]
    return cache[:, :end]


@op(error=exact())
def cache_select(cache: Array, rows: Int[Array, "b"]) -> Array:
    """Rows of a cache, repeated or reordered: what a beam search needs when hypotheses change places."""
    return cache[rows]
