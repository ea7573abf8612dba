"""Element by element: one kernel for sums, products and activation functions, one pass each."""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import elementwise as ops
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.linear import ACTIVATIONS, STORED, narrow_types
from refmodels_cupy.source import form

THREADS = 256
COMBINATIONS = {"alone": 0, "add": 1, "multiply": 2}

FORMS = [("elementwise.cu", form("elementwise", x, other)) for x in STORED for other in STORED]


def elementwise(
    device: Device, x: Any, other: Any = None, *, combination: str = "alone", factor: float = 1.0, activation: str = "linear"
) -> Any:
    """activation(factor * x), or of x + other or x * other, by the names in `COMBINATIONS`; in the type of x.

    x and other are alike in shape, not empty, contiguous, each of its own type: float32, float16 or bfloat16.
    """
    y = device.empty(x.shape, x.dtype)
    operation = (np.int32(COMBINATIONS[combination]), np.float32(factor), np.int32(ACTIVATIONS[activation]))
    types = form("elementwise", x.dtype.name, (x if other is None else other).dtype.name)
    arguments, blocks = (x, other, y, np.int64(x.size), *operation), (-(-x.size // THREADS), 1, 1)
    device.launch(Launch("elementwise.cu", types, blocks, (THREADS, 1, 1), arguments))
    return y


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.elementwise`."""
    xp = device.xp

    def each(x: Any, other: Any = None, **how: Any) -> Any:
        if not x.size:
            return device.empty(x.shape, x.dtype)
        if other is not None:
            other = xp.ascontiguousarray(xp.broadcast_to(other, x.shape))
        return elementwise(device, xp.ascontiguousarray(x), other, **how)

    @accelerator.kernel(ops.add, when=narrow_types)
    def add(x: Any, y: Any) -> Any:
        return each(x, y, combination="add")

    @accelerator.kernel(ops.multiply, when=narrow_types)
    def multiply(x: Any, y: Any) -> Any:
        return each(x, y, combination="multiply")

    @accelerator.kernel(ops.scaled, when=narrow_types)
    def scaled(x: Any, factor: float) -> Any:
        return each(x, factor=factor)

    @accelerator.kernel(ops.relu, when=narrow_types)
    def relu(x: Any) -> Any:
        return each(x, activation="relu")

    @accelerator.kernel(ops.gelu, when=narrow_types)
    def gelu(x: Any) -> Any:
        return each(x, activation="gelu")

    @accelerator.kernel(ops.gelu_approximate, when=narrow_types)
    def gelu_approximate(x: Any) -> Any:
        return each(x, activation="gelu_approximate")

    @accelerator.kernel(ops.silu, when=narrow_types)
    def silu(x: Any) -> Any:
        return each(x, activation="silu")

    @accelerator.kernel(ops.linear_activation)
    def linear_activation(x: Any) -> Any:
        return x.copy()

    @accelerator.kernel(ops.dropout)
    def dropout(x: Any, rate: float = 0.0, rng: Any = None) -> Any:
        if rng is None or rate == 0.0:
            return x[...]
        kept = device.to_device(rng.random(x.shape, np.float32) >= rate)  # the host's numbers, so that a seed gives the same
        wide = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
        return xp.where(kept, wide / wide.dtype.type(1.0 - rate), wide.dtype.type(0)).astype(x.dtype, copy=False)
