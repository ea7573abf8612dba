"""Element by element: sums, products, activation functions, dropout."""

import math

import numpy as np

from refmodels.numerics import exact, ulps
from refmodels.op import Array, Float, op
from refmodels.ops.precision import narrow, wide

_erfc = np.vectorize(math.erfc, otypes=[np.float64])  # NumPy has no error function; this is the C library's


@op(error=ulps(1), laws=("elementwise",))
def add(x: Float[Array, "*b n"], y: Float[Array, "*#b n"]) -> Float[Array, "*b n"]:
    """The residual sum: x + y, in the type of x."""
    return narrow(wide(x) + wide(y), x.dtype)


@op(error=ulps(1), laws=("elementwise",))
def multiply(x: Float[Array, "*b n"], y: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """The gate of a gated feed-forward layer: x * y, in the type of x."""
    return narrow(wide(x) * wide(y), x.dtype)


@op(error=ulps(1), laws=("elementwise",))
def scaled(x: Float[Array, "*b n"], factor: float) -> Float[Array, "*b n"]:
    """factor * x, in the type of x."""
    return narrow(wide(x) * factor, x.dtype)


@op(error=exact(), laws=("elementwise",))
def relu(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """max(x, 0)."""
    return np.maximum(x, x.dtype.type(0))


@op(laws=("elementwise",), source="Hendrycks and Gimpel 2016, eq. 1")
def gelu(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """x times the normal distribution function: x/2 (1 + erf(x / sqrt 2)). Computed in float64, then rounded.

    1 + erf(z) is taken as erfc(-z), the same number without the cancellation for negative z.
    """
    x64 = x.astype(np.float64)
    return narrow(0.5 * x64 * _erfc(-x64 / math.sqrt(2.0)), x.dtype)


@op(laws=("elementwise",), source="Hendrycks and Gimpel 2016, section 2; BLOOM's own gelu")
def gelu_approximate(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """The tanh form: x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x**3).

    (1 + tanh(u))/2 is taken as 1 / (1 + exp(-2u)), the same number without the cancellation for negative u.
    """
    xw = wide(x)
    with np.errstate(over="ignore"):
        u = math.sqrt(2.0 / math.pi) * (xw + 0.044715 * xw * xw * xw)
        y = xw / (1.0 + np.exp(-2.0 * u))
    return narrow(y, x.dtype)


@op(laws=("elementwise",), source="Elfwing et al. 2017, eq. 1")
def silu(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """x times the logistic function: x / (1 + exp(-x))."""
    xw = wide(x)
    with np.errstate(over="ignore"):
        return narrow(xw / (1.0 + np.exp(-xw)), x.dtype)


@op(error=exact(), laws=("elementwise",))
def linear_activation(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """No activation: x itself, as a new array."""
    return x.copy()


@op(error=ulps(2), laws=("elementwise",), source="Srivastava et al. 2014; scaled while training, as every original does")
def dropout(x: Float[Array, "*b n"], rate: float = 0.0, rng: np.random.Generator | None = None) -> Float[Array, "*b n"]:
    """Set each value to zero with probability `rate` and divide the others by 1 - rate. Without a generator: x."""
    if rng is None or rate == 0.0:
        return x[...]
    kept = rng.random(x.shape, np.float32) >= rate
    return narrow(np.where(kept, wide(x) / (1.0 - rate), 0.0), x.dtype)
