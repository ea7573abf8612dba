"""Normalisation over the last axis."""

import numpy as np

from refmodels.op import Array, Float, op
from refmodels.ops.precision import narrow, numpy_dtype, wide


@op(laws=("rowwise",), source="Ba et al. 2016, eq. 4")
def layer_norm(
    x: Float[Array, "*b n"], gamma: Float[Array, "n"], beta: Float[Array, "n"], *, epsilon: float = 1e-5
) -> Float[Array, "*b n"]:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift.

    gamma (x - mean) / sqrt(variance + epsilon) + beta; the variance is the mean squared deviation, formed in two passes.
    """
    xw = wide(x)
    deviation = xw - xw.mean(-1, keepdims=True)
    variance = np.square(deviation).mean(-1, keepdims=True)
    return narrow(deviation / np.sqrt(variance + epsilon) * wide(gamma) + wide(beta), x.dtype)


@op(laws=("rowwise",), source="Zhang and Sennrich 2019, eq. 4")
def rms_norm(
    x: Float[Array, "*b n"], weight: Float[Array, "n"], *, epsilon: float = 1e-6, dtype: str | None = None
) -> Float[Array, "*b n"]:
    """Divide by the root mean square, then scale: no mean is taken away and nothing is added.

    weight x / sqrt(mean(x**2) + epsilon), in the type of x or, if given, `dtype`.
    """
    xw = wide(x)
    mean_square = np.square(xw).mean(-1, keepdims=True)  # T5-C12
    y = xw / np.sqrt(mean_square + epsilon) * wide(weight)
    return narrow(y, numpy_dtype(dtype) if dtype else x.dtype)
