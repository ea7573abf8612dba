"""Activation functions that NumPy computes in several passes, or value by value."""

import numpy as np

from refmodels.op import Array
from refmodels.ops import elementwise as ops
from refmodels_numba.accelerator import kernel, numba, team
from refmodels_numba.layout import ACTIVATIONS, ROUND
from refmodels_numba.linear import narrow_types
from refmodels_numba.packing import address
from refmodels_numba.program import Program


def _activated(x: Array, activation: str) -> Array:
    program, given = Program(), np.ascontiguousarray(x, np.float32)
    program.add(
        "elementwise",
        count=program.slot("count"),
        x=program.slot("x"),
        out=program.buffer("y", "count", 1),
        activation=ACTIVATIONS[activation],
        factor=1.0,
        rounding=ROUND[x.dtype.name],
    )
    y = program.run(team(), {"count": x.size, "rows": x.size // 256 + 1}, {"x": address(given)})["y"]
    return y.reshape(x.shape).astype(x.dtype, copy=False)


@kernel(ops.gelu, when=narrow_types)
def gelu(x: Array) -> Array:
    """By the C library's erfc."""
    return _activated(x, "gelu")


@kernel(ops.gelu_approximate, when=narrow_types)
def gelu_approximate(x: Array) -> Array:
    """In one pass."""
    return _activated(x, "gelu_approximate")


@kernel(ops.silu, when=narrow_types)
def silu(x: Array) -> Array:
    """In one pass."""
    return _activated(x, "silu")


for op in (ops.add, ops.multiply, ops.scaled, ops.relu, ops.linear_activation):
    # In a fused kernel these are part of the product before them; alone they are one pass in NumPy as well.
    numba.kernel(op, when="one pass in NumPy too")(op.reference)
