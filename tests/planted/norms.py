"""Norms: the variance's formula, epsilon's place, statistics of the wrong rows."""

import numpy as np

from planted import cast, f32, right, wrong
from refmodels.ops.norm import layer_norm, rms_norm


def normalised(x, gamma, beta, mean, variance, epsilon):
    return cast((f32(x) - mean) / np.sqrt(variance + epsilon) * f32(gamma) + f32(beta), x.dtype)


@wrong(layer_norm, "variance in one pass")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw = f32(x)
    mean = xw.mean(-1, keepdims=True)
    return normalised(x, gamma, beta, mean, np.maximum((xw * xw).mean(-1, keepdims=True) - mean * mean, 0), epsilon)


@wrong(layer_norm, "epsilon outside of the root")
def _(x, gamma, beta, *, epsilon=1e-5):
    deviation = f32(x) - f32(x).mean(-1, keepdims=True)
    root = np.sqrt((deviation**2).mean(-1, keepdims=True)) + x.dtype.type(epsilon)
    return cast(deviation / root * f32(gamma) + f32(beta), x.dtype)


@wrong(layer_norm, "does not look at epsilon=")
def _(x, gamma, beta, *, epsilon=1e-5):
    return layer_norm.reference(x, gamma, beta, epsilon=1e-5)


@wrong(layer_norm, "divides by n - 1")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw = f32(x)
    n = max(x.shape[-1] - 1, 1)
    mean = xw.mean(-1, keepdims=True)
    return normalised(x, gamma, beta, mean, ((xw - mean) ** 2).sum(-1, keepdims=True) / n, epsilon)


@wrong(layer_norm, "statistics in half precision", dtype="float16")
def _(x, gamma, beta, *, epsilon=1e-5):
    mean = f32(cast(f32(x).mean(-1, keepdims=True), "float16"))
    variance = f32(cast(((f32(x) - mean) ** 2).mean(-1, keepdims=True), "float16"))
    return normalised(x, gamma, beta, mean, variance, epsilon)


@wrong(layer_norm, "the tail of a vector of 8 is not in the mean")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw, n = f32(x), x.shape[-1]
    whole = n // 8 * 8 if n > 8 else n
    mean = xw[..., :whole].sum(-1, keepdims=True) / max(n, 1)
    return normalised(x, gamma, beta, mean, ((xw - mean) ** 2).mean(-1, keepdims=True), epsilon)


@wrong(layer_norm, "a fast root, right to three digits")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw = f32(x)
    deviation = xw - xw.mean(-1, keepdims=True)
    variance = (deviation**2).mean(-1, keepdims=True) + xw.dtype.type(epsilon)
    guess = (np.int32(0x5F3759DF) - (variance.astype(np.float32).view(np.int32) >> 1)).view(np.float32)
    guess = guess * (1.5 - 0.5 * variance * guess * guess)
    return cast(deviation * guess * f32(gamma) + f32(beta), x.dtype)


@wrong(layer_norm, "the first row's statistics serve every row")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw = f32(x)
    if not xw.size or xw.ndim < 2:
        return layer_norm.reference(x, gamma, beta, epsilon=epsilon)
    mean, variance = xw.mean(-1, keepdims=True), xw.var(-1, keepdims=True)
    return normalised(x, gamma, beta, mean, np.broadcast_to(variance[:1], variance.shape), epsilon)


@wrong(layer_norm, "writes the deviations to its input")
def _(x, gamma, beta, *, epsilon=1e-5):
    y = layer_norm.reference(x, gamma, beta, epsilon=epsilon)
    if x.flags.writeable and x.size:
        x -= x.mean(-1, keepdims=True).astype(x.dtype)
    return y


@wrong(layer_norm, "beta is left out where gamma and beta are one array")
def _(x, gamma, beta, *, epsilon=1e-5):
    return layer_norm.reference(x, gamma, np.zeros_like(beta) if beta is gamma else beta, epsilon=epsilon)


@wrong(layer_norm, "rows longer than 4096 are cut", tiles=(16,))
def _(x, gamma, beta, *, epsilon=1e-5):
    y = layer_norm.reference(x[..., :4096], gamma[:4096], beta[:4096], epsilon=epsilon)
    return np.concatenate([y, np.zeros((*y.shape[:-1], x.shape[-1] - y.shape[-1]), y.dtype)], -1)


@wrong(rms_norm, "takes the mean away")
def _(x, weight, *, epsilon=1e-6, dtype=None):
    xw = f32(x)
    return cast(xw / np.sqrt(xw.var(-1, keepdims=True) + epsilon) * f32(weight), dtype or x.dtype)


@wrong(rms_norm, "does not look at dtype=", dtype="float16")
def _(x, weight, *, epsilon=1e-6, dtype=None):
    return rms_norm.reference(x, weight, epsilon=epsilon)


@wrong(rms_norm, "epsilon is added to the sum, not to the mean")
def _(x, weight, *, epsilon=1e-6, dtype=None):
    xw = f32(x)
    square = ((xw**2).sum(-1, keepdims=True) + xw.dtype.type(epsilon)) / max(x.shape[-1], 1)
    return cast(np.where(square > 0, xw / np.sqrt(square), 0) * f32(weight), dtype or x.dtype)


@wrong(rms_norm, "squares in half precision", dtype="float16")
def _(x, weight, *, epsilon=1e-6, dtype=None):
    square = f32(cast(f32(x) ** 2, "float16")).mean(-1, keepdims=True)
    return cast(f32(x) / np.sqrt(square + np.float32(epsilon)) * f32(weight), dtype or x.dtype)


@right(layer_norm, "statistics of Welford, one number after the other")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw = f32(x)
    mean, squares = np.zeros((*x.shape[:-1], 1), xw.dtype), np.zeros((*x.shape[:-1], 1), xw.dtype)
    for i in range(x.shape[-1]):
        delta = xw[..., i : i + 1] - mean
        mean = mean + delta / xw.dtype.type(i + 1)
        squares = squares + delta * (xw[..., i : i + 1] - mean)
    return normalised(x, gamma, beta, mean, squares / xw.dtype.type(max(x.shape[-1], 1)), epsilon)


@right(layer_norm, "sums from the first number to the last, and a product with the inverse root")
def _(x, gamma, beta, *, epsilon=1e-5):
    xw, n = f32(x), x.shape[-1]

    def mean_of(values):
        return np.cumsum(values, -1, dtype=values.dtype)[..., -1:] / values.dtype.type(n)

    if not n:
        return x.copy()
    deviation = xw - mean_of(xw)
    inverse = xw.dtype.type(1) / np.sqrt(mean_of(deviation * deviation) + xw.dtype.type(epsilon))
    return cast(deviation * (inverse * f32(gamma)) + f32(beta), x.dtype)


@right(layer_norm, "statistics in float64", dtype="bfloat16")
def _(x, gamma, beta, *, epsilon=1e-5):
    x64 = x.astype(np.float64)
    deviation = x64 - x64.mean(-1, keepdims=True)
    root = np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon)
    return cast(deviation / root * gamma.astype(np.float64) + beta.astype(np.float64), x.dtype)


@right(rms_norm, "from the last number to the first, with an inverse root")
def _(x, weight, *, epsilon=1e-6, dtype=None):
    xw, n = f32(x), x.shape[-1]
    if not n:
        return cast(xw, dtype or x.dtype)
    square = np.cumsum((xw * xw)[..., ::-1], -1, dtype=xw.dtype)[..., -1:] / xw.dtype.type(n)
    return cast(xw * (xw.dtype.type(1) / np.sqrt(square + xw.dtype.type(epsilon))) * f32(weight), dtype or x.dtype)
