"""Activations, sums, gates: other formulas, overflow, types, subnormal numbers."""

import math

import numpy as np

from planted import cast, f32, right, wrong
from refmodels.ops.elementwise import add, dropout, gelu, gelu_approximate, multiply, relu, scaled, silu

ROOT = math.sqrt(2 / math.pi)
erfc = np.vectorize(math.erfc, otypes=[np.float64])


@wrong(gelu, "the tanh form for the erf form")
def _(x):
    return gelu_approximate.reference(x)


@wrong(gelu_approximate, "the erf form for the tanh form")
def _(x):
    return gelu.reference(x)


@wrong(gelu_approximate, "tanh by exponentials that overflow")
def _(x):
    u = ROOT * (f32(x) + 0.044715 * f32(x) ** 3)
    e = np.exp(2 * u)
    return cast(0.5 * f32(x) * (1 + (e - 1) / (e + 1)), x.dtype)


@wrong(gelu, "the sigmoid form")
def _(x):
    return cast(f32(x) / (1 + np.exp(-1.702 * f32(x))), x.dtype)


@wrong(silu, "exponentials in half precision", dtype="float16")
def _(x):
    e = f32(cast(np.exp(f32(x)), "float16"))
    return cast(f32(x) * e / (1 + e), x.dtype)


@wrong(silu, "NaN for an infinity")
def _(x):
    e = np.exp(f32(x))
    return cast(f32(x) * (e / (1 + e)), x.dtype)


@wrong(relu, "a product with the sign, and so NaN for -inf")
def _(x):
    return x * (x > 0)


@wrong(relu, "NaN becomes 0")
def _(x):
    return np.where(x > 0, x, x.dtype.type(0))


@wrong(add, "flushes subnormal numbers to zero")
def _(x, y):
    total = add.reference(x, y)
    return np.where(np.abs(f32(total)) < 1.1754944e-38, total.dtype.type(0), total)


@wrong(add, "the type of the wider branch", dtype="bfloat16")
def _(x, y):
    return f32(x) + f32(y)


@wrong(add, "a y of one row is taken for all rows even when it has more")
def _(x, y):
    return add.reference(x, y if y.ndim < 2 or y.size == 0 else np.broadcast_to(y[:1], y.shape))


@wrong(add, "the sum is written to x, which is given back")
def _(x, y):
    if x.flags.writeable and x.dtype == y.dtype:
        x += y
        return x
    return add.reference(x, y)


@wrong(multiply, "both are rounded to half precision first")
def _(x, y):
    return cast(f32(cast(x, "bfloat16")) * f32(y), x.dtype)


@wrong(multiply, "the last vector of 8, not full, is skipped")
def _(x, y):
    z = multiply.reference(x, y).copy()
    flat = z.reshape(-1)
    if flat.size > 8 and flat.size % 8:
        flat[flat.size // 8 * 8 :] = 0
    return flat.reshape(z.shape)


@wrong(scaled, "the factor is rounded to half precision", dtype="bfloat16")
def _(x, factor):
    return cast(f32(x) * f32(cast(np.float32(factor), "bfloat16")), x.dtype)


@wrong(dropout, "what is kept is not scaled")
def _(x, rate=0.0, rng=None):
    if rng is None or rate == 0:
        return x.copy()
    return np.where(rng.random(x.shape, np.float32) >= rate, x, x.dtype.type(0))


@wrong(dropout, "drops without a generator")
def _(x, rate=0.0, rng=None):
    return dropout.reference(x, rate, np.random.default_rng(0) if rng is None and rate else rng)


@wrong(dropout, "random numbers of its own, others each time")
def _(x, rate=0.0, rng=None):
    return dropout.reference(x, rate, None if rng is None else np.random.default_rng())


def sigmoid(u):
    """From the exponential that does not overflow, whatever the sign."""
    e = np.exp(-np.abs(u))
    return np.where(u < 0, e, 1) / (1 + e)


@right(gelu, "erfc in float64, the product in float32")
def _(x):
    return cast(f32(x) * (0.5 * erfc(-x.astype(np.float64) / math.sqrt(2))).astype(f32(x).dtype), x.dtype)


@right(gelu_approximate, "by an exponential that does not overflow")
def _(x):
    xw = f32(x)
    with np.errstate(over="ignore"):
        u = 2 * xw.dtype.type(ROOT) * xw * (1 + xw.dtype.type(0.044715) * (xw * xw))
    return cast(xw * sigmoid(u), x.dtype)


@right(silu, "by an exponential that does not overflow")
def _(x):
    return cast(f32(x) * sigmoid(f32(x)), x.dtype)
