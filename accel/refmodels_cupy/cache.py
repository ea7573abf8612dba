"""The key/value cache on the device, in array functions that CuPy has as NumPy does."""

from typing import Any

from refmodels.accelerator import Accelerator
from refmodels.ops import cache as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_cupy.device import Device


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.cache`."""
    xp = device.xp

    @accelerator.kernel(ops.cache_allocate)
    def cache_allocate(shape: tuple[int, ...], dtype: str) -> Any:
        return xp.zeros(shape, numpy_dtype(dtype))

    @accelerator.kernel(ops.cache_append)
    def cache_append(cache: Any, new: Any, start: Any = None) -> Any:
        length = new.shape[1]
        end = filled(device, start, length, cache.shape[1])
        if start is None:
            cache[:, :length] = new
        else:
            cache[xp.arange(len(cache))[:, None], start[:, None] + xp.arange(length)] = new
        return cache[:, :end]

    @accelerator.kernel(ops.cache_select)
    def cache_select(cache: Any, rows: Any) -> Any:
        return cache[rows]


def filled(device: Device, start: Any, length: int, capacity: int) -> int:
    """How far a cache is filled when `length` positions from start[i] on have been written to. ValueError for one outside.

    With `start`, on the device, the host has to wait for the answer.
    """
    first, end = 0, length
    if start is not None:
        on_host = device.to_host(start)
        first, end = int(on_host.min(initial=0)), int(on_host.max(initial=0)) + length
    if first < 0 or end > capacity:
        outside = end - 1 if end > capacity else first
        raise ValueError(f"cache_append: position {outside} is outside the cache's {capacity}")
    return end
