"""What the device can do, measured: how fast it reads its memory, how fast it multiplies bfloat16 matrices.

Work on the device goes on while Python does, so that a measurement is a burst of equal work between two moments at which all of
it is done. The best burst counts: what is sought is the hardware's limit.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.ops.precision import numpy_dtype
from refmodels_cupy.device import Device

BYTES = 2**31
"""Read or copied at once: far more than any cache on the device holds."""

MATRIX = 8192
"""Rows and columns of the matrices that are multiplied."""

BURSTS, BURST = 3, 8


def measured(device: Device, *, size: int = BYTES, matrix: int = MATRIX) -> tuple[float, float]:
    """(bytes a second of the device's memory, operations a second of a product of bfloat16 matrices)."""
    with device.working():
        return bandwidth(device, size), matrix_rate(device, matrix)


def bandwidth(device: Device, size: int) -> float:
    """Bytes a second: the better of a sum, which only reads, and of a copy, which reads as much as it writes."""
    source = device.xp.ones(size // 4, np.float32)
    target = device.xp.empty_like(source)
    reading = size / seconds(device, source.sum)
    copying = 2 * size / seconds(device, lambda: device.xp.copyto(target, source))
    return max(reading, copying)


def matrix_rate(device: Device, n: int) -> float:
    """Operations a second of the vendor's product of two square matrices.

    The matrices hold noise: a GPU lowers its clock for numbers that cost power, and multiplies zeros faster than a model.
    """
    noise = np.random.default_rng(0).standard_normal((min(n, 256), n), np.float32)
    a = device.to_device(np.resize(noise, (n, n)).astype(numpy_dtype("bfloat16")))
    return 2 * n**3 / seconds(device, lambda: device.product(a, a, transposed=True))


def seconds(device: Device, work: Callable[[], Any]) -> float:
    """Of one piece of work, in the best of some bursts."""
    mark, best = device.xp.zeros(1, np.float32), np.inf
    for _ in range(1 + BURSTS):  # the first makes ready
        device.to_host(mark)
        began = time.perf_counter()
        for _ in range(BURST):
            work()
        device.to_host(mark)
        best = min(best, (time.perf_counter() - began) / BURST)
    return best
