"""Element by element: one kernel for sums, products and activation functions, one pass each.

Arithmetic on float32 numbers is done here and not by array functions: CuPy compiles those with `-ftz=true`, so that a number
below the smallest normal one is 0. What only moves numbers, and float64, may be left to them.
"""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import elementwise as ops
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.source import form

THREADS = 256
COMBINATIONS = {"alone": 0, "add": 1, "multiply": 2, "penalise": 3}
ACTIVATIONS = {"linear": 0, "relu": 1, "gelu": 2, "gelu_approximate": 3, "silu": 4}

STORED = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Types that a kernel is told of when it is launched: `Stored` in device.cuh."""

FORMS = [
    *(("elementwise.cu", form("elementwise", x, other)) for x in STORED for other in STORED),
    ("elementwise.cu", "to_float64"),
]


def narrow_types(*arrays: Any, **named: Any) -> bool | str:
    """float32 and narrower"""
    for value in (*arrays, *named.values()):
        if value == "float64" if isinstance(value, str) else getattr(value, "dtype", None) == np.float64:
            return "float64: the reference's"
    return True


def elementwise(
    device: Device, x: Any, other: Any = None, *, combination: str = "alone", factor: float = 1.0, activation: str = "linear"
) -> Any:
    """activation(factor * x), or of another combination by its name in `COMBINATIONS`; in the type of x.

    "add" is x + other, "multiply" x * other, "penalise" x * other where x is negative and x / other elsewhere.
    x and other are alike in shape, not empty, contiguous, each of its own type: float32, float16 or bfloat16.
    """
    y = device.empty(x.shape, x.dtype)
    operation = (np.int32(COMBINATIONS[combination]), np.float32(factor), np.int32(ACTIVATIONS[activation]))
    types = form("elementwise", x.dtype.name, (x if other is None else other).dtype.name)
    arguments, blocks = (x, other, y, np.int64(x.size), *operation), (-(-x.size // THREADS), 1, 1)
    device.launch(Launch("elementwise.cu", types, blocks, (THREADS, 1, 1), arguments))
    return y


def each(device: Device, x: Any, other: Any = None, **how: Any) -> Any:
    """`elementwise` of arrays that may be empty and need not be contiguous; `other` is broadcast to the shape of x."""
    if not x.size:
        return device.empty(x.shape, x.dtype)
    xp = device.xp
    if other is not None:
        other = xp.ascontiguousarray(xp.broadcast_to(other, x.shape))
    return elementwise(device, xp.ascontiguousarray(x), other, **how)


def to_float64(device: Device, x: Any) -> Any:
    """x, of any float type, in float64, exactly."""
    if x.dtype == np.float64:
        return x
    y = device.empty(x.shape, np.float64)
    if y.size:
        arguments = (device.xp.ascontiguousarray(x), np.int32(STORED[x.dtype.name]), y, np.int64(x.size))
        device.launch(Launch("elementwise.cu", "to_float64", (-(-x.size // THREADS), 1, 1), (THREADS, 1, 1), arguments))
    return y


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.elementwise`."""

    @accelerator.kernel(ops.add, when=narrow_types)
    def add(x: Any, y: Any) -> Any:
        return each(device, x, y, combination="add")

    @accelerator.kernel(ops.multiply, when=narrow_types)
    def multiply(x: Any, y: Any) -> Any:
        return each(device, x, y, combination="multiply")

    @accelerator.kernel(ops.scaled, when=narrow_types)
    def scaled(x: Any, factor: float) -> Any:
        return each(device, x, factor=factor)

    @accelerator.kernel(ops.relu, when=narrow_types)
    def relu(x: Any) -> Any:
        return each(device, x, activation="relu")

    @accelerator.kernel(ops.gelu, when=narrow_types)
    def gelu(x: Any) -> Any:
        return each(device, x, activation="gelu")

    @accelerator.kernel(ops.gelu_approximate, when=narrow_types)
    def gelu_approximate(x: Any) -> Any:
        return each(device, x, activation="gelu_approximate")

    @accelerator.kernel(ops.silu, when=narrow_types)
    def silu(x: Any) -> Any:
        return each(device, x, activation="silu")

    @accelerator.kernel(ops.linear_activation)
    def linear_activation(x: Any) -> Any:
        return x.copy()

    @accelerator.kernel(ops.dropout, when=narrow_types)
    def dropout(x: Any, rate: float = 0.0, rng: Any = None) -> Any:
        if rng is None or rate == 0.0:
            return x[...]
        kept = device.to_device(rng.random(x.shape, np.float32) >= rate)  # the host's numbers, so that a seed gives the same
        scaled = each(device, x.astype(np.float32, copy=False), factor=1.0 / (1.0 - rate))
        return device.xp.where(kept, scaled, np.float32(0)).astype(x.dtype, copy=False)
