"""Sums, products and activation functions, in one pass."""

import numpy as np

from refmodels.op import Array
from refmodels.ops import elementwise as ops
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.layout import ACTIVATIONS, ADD, MULTIPLY, ROUND
from refmodels_numba.linear import narrow_types
from refmodels_numba.packing import address
from refmodels_numba.program import Program

FEW = 1 << 15
"""Values that one thread is done with before another would have woken."""


def _each(
    x: Array, *, activation: str = "none", factor: float = 1.0, other: Array | None = None, combination: int = 0
) -> Array:
    program, arguments = Program(), {"x": np.ascontiguousarray(x, np.float32)}
    if other is not None:
        arguments["other"] = np.ascontiguousarray(np.broadcast_to(other, x.shape), np.float32)
    program.add(
        "elementwise",
        count=program.slot("count"),
        x=program.slot("x"),
        other=0 if other is None else program.slot("other"),
        combination=combination,
        out=program.buffer("y", "count", 1),
        activation=ACTIVATIONS[activation],
        factor=float(factor),
        rounding=ROUND[x.dtype.name],
    )
    addresses = {name: address(array) for name, array in arguments.items()}
    y = program.run(team(), {"count": x.size}, addresses, alone=x.size < FEW)["y"]
    return y.reshape(x.shape).astype(x.dtype, copy=False)


@kernel(ops.add, when=narrow_types)
def add(x: Array, y: Array) -> Array:
    """Part of the product before it in a fused kernel."""
    return _each(x, other=y, combination=ADD)


@kernel(ops.multiply, when=narrow_types)
def multiply(x: Array, y: Array) -> Array:
    """Part of the product before it in a fused kernel."""
    return _each(x, other=y, combination=MULTIPLY)


@kernel(ops.scaled, when=narrow_types)
def scaled(x: Array, factor: float) -> Array:
    """In one pass."""
    return _each(x, factor=factor)


@kernel(ops.relu, when=narrow_types)
def relu(x: Array) -> Array:
    """Part of the product before it in a fused kernel."""
    return _each(x, activation="relu")


@kernel(ops.gelu, when=narrow_types)
def gelu(x: Array) -> Array:
    """By the C library's erfc."""
    return _each(x, activation="gelu")


@kernel(ops.gelu_approximate, when=narrow_types)
def gelu_approximate(x: Array) -> Array:
    """In one pass."""
    return _each(x, activation="gelu_approximate")


@kernel(ops.silu, when=narrow_types)
def silu(x: Array) -> Array:
    """In one pass."""
    return _each(x, activation="silu")
