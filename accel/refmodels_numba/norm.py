"""Normalisation over the last axis."""

from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops import norm as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.layout import ROUND
from refmodels_numba.linear import narrow_types
from refmodels_numba.packing import address
from refmodels_numba.program import Program


@kernel(ops.layer_norm, when=narrow_types)
def layer_norm(x: Array, gamma: Array, beta: Array, *, epsilon: float = 1e-5) -> Array:
    """Two passes over each row, in the first cache."""
    return _normalised(x, gamma, beta, epsilon, x.dtype.name)


@kernel(ops.rms_norm, when=narrow_types)
def rms_norm(x: Array, weight: Array, *, epsilon: float = 1e-6, dtype: str | None = None) -> Array:
    """One pass for the sum of squares, one for the result."""
    return _normalised(x, weight, None, epsilon, dtype or x.dtype.name)


def _normalised(x: Array, gamma: Array, beta: Any, epsilon: float, dtype: str) -> Array:
    program, given = Program(), np.ascontiguousarray(x, np.float32)
    n = x.shape[-1]
    program.add(
        "norm",
        rows=program.slot("rows"),
        x=program.slot("x"),
        n=n,
        gamma=program.vector(gamma),
        beta=0 if beta is None else program.vector(beta),
        epsilon=float(epsilon),
        out=program.buffer("y", "rows", n),
        rounding=ROUND[dtype],
    )
    y = program.run(team(), {"rows": int(np.prod(x.shape[:-1]))}, {"x": address(given)})["y"]
    return y.reshape(x.shape).astype(numpy_dtype(dtype), copy=False)
