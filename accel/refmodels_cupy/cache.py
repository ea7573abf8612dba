"""The key/value cache on the device: written by a kernel for composites, by array functions that NumPy has too for ops."""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import cache as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_cupy.device import Device, Launch, Strided
from refmodels_cupy.elementwise import STORED
from refmodels_cupy.source import form

THREADS = (128, 1, 1)

FORMS = [("cache.cu", form("append", x)) for x in (*STORED, "int8")] + [("cache.cu", "enter")]


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


def append(device: Device, pairs: Any, start: Any, t: int, width: int) -> None:
    """Rows of `width` values to their places: x (b, t, ...) to start[b], start[b] + 1, ... of each row of (b, capacity, ...).

    `pairs` are one or two (x, where), alike. start: int32 (b,), read when the launch runs; None is 0. The values of a row lie
    side by side; rows of x have one stride.
    """
    (x, where), (second, second_where) = pairs[0], (pairs[1] if len(pairs) > 1 else (None, None))
    stride, capacity = x.strides[1 if x.ndim > 2 and t > 1 else 0] // x.itemsize, where.shape[1]
    sizes = (np.int32(size) for size in (t, width, stride, where.size // (len(where) * capacity), capacity))
    grid = (x.size // width, len(pairs), 1)
    arguments = (Strided(x), where, None if second is None else Strided(second), second_where, start, *sizes)
    device.launch(Launch("cache.cu", form("append", x.dtype.name), grid, THREADS, arguments))


def enter(device: Device, real: Any, positions: Any, mask: Any, lengths: Any) -> None:
    """One token of each row comes in: mask (b, capacity) at its position is real[b], lengths[b] is how many keys it looks at.

    real (b,) booleans; None: all are. positions and lengths int32 (b,). Up to any number of rows, in one block.
    """
    sizes = (np.int32(number) for number in mask.shape)
    device.launch(Launch("cache.cu", "enter", (1, 1, 1), THREADS, (real, positions, mask, lengths, *sizes)))


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
