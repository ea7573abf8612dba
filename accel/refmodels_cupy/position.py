"""Where a token stands, in array functions that CuPy has as NumPy does."""

import functools
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import position as ops
from refmodels_cupy.device import Device


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.position`."""
    xp = device.xp

    @accelerator.kernel(ops.token_positions)
    def token_positions(ids: Any, start: Any = None) -> Any:
        first = xp.zeros(1, np.int64) if start is None else start
        return first[:, None] + xp.arange(ids.shape[1])

    @functools.cache
    def bucket_table(keys: int, bidirectional: bool, num_buckets: int, max_distance: int) -> Any:
        """The bucket of every distance from the furthest key before a query to the furthest after it: row 0 of the op's."""
        query = np.array([[keys]], np.int64)
        table = ops.relative_position_buckets.reference(
            query, 2 * keys + 1, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )
        return device.to_device(table[0, 0])

    @accelerator.kernel(ops.relative_position_buckets)
    def relative_position_buckets(
        positions: Any, keys: int, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
    ) -> Any:
        # Behind the largest distance that has a bucket of its own nothing changes, so that one table serves every call.
        reach = max_distance + num_buckets
        table = bucket_table(reach, bidirectional, num_buckets, max_distance)
        relative = xp.arange(keys) - positions[:, :, None]
        return table[xp.clip(relative, -reach, reach) + reach]

    @accelerator.kernel(ops.relative_position_bias)
    def relative_position_bias(buckets: Any, embeddings: Any) -> Any:
        wide = embeddings if embeddings.dtype == np.float64 else embeddings.astype(np.float32, copy=False)
        return xp.moveaxis(wide[buckets], -1, 1)

    @accelerator.kernel(ops.alibi_slopes)
    def alibi_slopes(num_heads: int) -> Any:
        return device.to_device(ops.alibi_slopes.reference(num_heads))

    @accelerator.kernel(ops.alibi_bias)
    def alibi_bias(slopes: Any, positions: Any, keys: int, *, dtype: str = "float32") -> Any:
        relative = xp.arange(keys) - positions[:, :, None]
        return (slopes[:, None, None] * relative[:, None]).astype(dtype)
