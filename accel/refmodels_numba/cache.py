"""Caches in which the positions of one head follow one another, as decoding reads them. To everyone else they are arrays."""

import numpy as np

from refmodels.op import Array, Params
from refmodels.ops import cache as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_numba.accelerator import kernel


def by_head(batch: int, capacity: int, heads: int, size: int, dtype: str) -> Array:
    """Zeros (batch, capacity, heads, size) that lie in memory as (batch, heads, capacity, size)."""
    return np.zeros((batch, heads, capacity, size), numpy_dtype(dtype)).transpose(0, 2, 1, 3)


@kernel(ops.key_value_cache)
def key_value_cache(batch: int, capacity: int, *, layers: int, heads: int, head_dim: int, dtype: str) -> Params:
    """Keys and values head by head."""
    names = ("key", "value")
    return {
        "padding_mask": np.zeros((batch, capacity), bool),
        "layers": [{name: by_head(batch, capacity, heads, head_dim, dtype) for name in names} for _ in range(layers)],
    }


@kernel(ops.cache_select)
def cache_select(cache: Array, rows: Array) -> Array:
    """Rows in the same order of memory."""
    return cache.transpose(0, 2, 1, 3)[rows].transpose(0, 2, 1, 3) if cache.ndim == 4 else cache[rows]
