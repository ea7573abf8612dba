"""Activation functions and rounding, value by value, so that LLVM makes vectors of the loops."""

import math

import numpy as np
from numba import njit

from refmodels_numba.kernels.vector import bits_of, double_of, float_of, floats, larger, multiply_add, nearest, smaller
from refmodels_numba.layout import ACTIVATIONS, ADD, BFLOAT16, FLOAT16, MULTIPLY

INLINE = {"error_model": "numpy", "nogil": True, "_nrt": False}
"""Options of every function here. No fast mathematics: infinities and NaN count, and no sum may be reordered."""

f32 = np.float32
i32 = np.int32
RELU, GELU, GELU_APPROXIMATE, SILU = (ACTIVATIONS[name] for name in ("relu", "gelu", "gelu_approximate", "silu"))
PIECE = 1024
"""Values of one piece of work."""


@njit(**INLINE)
def exp(x):
    """e**x in float32, within 1.5 spacings: 2**n times a polynomial of the rest, which is at most log(2)/2.

    0 below -104, infinity above 89; subnormal results are rounded once more. NaN gives NaN.
    """
    clamped = smaller(larger(x, f32(-104.0)), f32(89.0))
    n = nearest(clamped * f32(1.4426950408889634))
    rest = multiply_add(n, f32(-0.693145751953125), clamped)
    rest = multiply_add(n, f32(-1.428606765330187e-06), rest)
    y = f32(1.9875691500e-4)
    y = multiply_add(y, rest, f32(1.3981999507e-3))
    y = multiply_add(y, rest, f32(8.3334519073e-3))
    y = multiply_add(y, rest, f32(4.1665795894e-2))
    y = multiply_add(y, rest, f32(1.6666665459e-1))
    y = multiply_add(y, rest, f32(5.0000001201e-1))
    y = multiply_add(y, rest * rest, rest) + f32(1.0)
    whole = i32(n)
    half = whole >> i32(1)  # in two factors, either of which is a normal number
    first = float_of(i32((half + i32(127)) << i32(23)))
    second = float_of(i32((whole - half + i32(127)) << i32(23)))
    return y * first * second if x == x else x


@njit(**INLINE)
def erfc(z):
    """1 - erf(z) in float64, by the C library."""
    return math.erfc(z)


@njit(**INLINE)
def activated(x, activation):
    """The activation function of this code."""
    if activation == RELU:
        return x if x > f32(0.0) or x != x else f32(0.0)
    if activation == GELU:
        wide = np.float64(x)
        return f32(0.5 * wide * erfc(-wide * 0.7071067811865476))
    if activation == GELU_APPROXIMATE:
        inner = f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)
        return x / (f32(1.0) + exp(f32(-2.0) * inner))
    if activation == SILU:
        return x / (f32(1.0) + exp(-x))
    return x


@njit(**INLINE)
def activate(values, activation):
    """Apply the activation in place: one loop each, so that each can be a loop of vectors."""
    if activation == RELU:
        for i in range(len(values)):
            values[i] = activated(values[i], RELU)
    elif activation == GELU:
        for i in range(len(values)):
            values[i] = activated(values[i], GELU)
    elif activation == GELU_APPROXIMATE:
        for i in range(len(values)):
            values[i] = activated(values[i], GELU_APPROXIMATE)
    elif activation == SILU:
        for i in range(len(values)):
            values[i] = activated(values[i], SILU)


@njit(**INLINE)
def to_bfloat16(x):
    """x rounded to eight bits of mantissa, ties to even, as float32."""
    raw = bits_of(x)
    odd = (raw >> i32(16)) & i32(1)
    rounded = float_of(i32((raw + i32(0x7FFF) + odd) & i32(-65536)))
    return x if x != x else rounded


@njit(**INLINE)
def to_float16(x):
    """x rounded to eleven bits of mantissa, ties to even, as float32: subnormal below 2**-14, infinite from 65520 on."""
    raw = bits_of(x)
    size = raw & i32(0x7FFFFFFF)
    sign = raw & i32(-2147483648)
    odd = (size >> i32(13)) & i32(1)
    normal = i32((size + i32(0x0FFF) + odd) & i32(-8192))
    normal = i32(0x7F800000) if normal >= i32(0x47800000) else normal
    small = bits_of((float_of(size) + f32(0.5)) - f32(0.5))  # a spacing of 2**-24, float16's, stands at 0.5
    result = float_of(i32((small if size < i32(0x38800000) else normal) | sign))
    return x if x != x else result


@njit(**INLINE)
def rounded(values, rounding):
    """Round in place to the type of this code; 0 leaves them."""
    if rounding == BFLOAT16:
        for i in range(len(values)):
            values[i] = to_bfloat16(values[i])
    elif rounding == FLOAT16:
        for i in range(len(values)):
            values[i] = to_float16(values[i])


@njit(**INLINE)
def elementwise_chunks(count):
    """Pieces of work."""
    return (count + PIECE - 1) // PIECE


@njit(**INLINE)
def elementwise(chunk, scratch, count, x, other, combination, out, activation, factor, rounding):
    """out = round(activation(factor * x)), or that of x + other or x * other."""
    first = chunk * PIECE
    size = min(count - first, PIECE)
    given, result = floats(x + 4 * first, size), floats(out + 4 * first, size)
    if combination == ADD:
        second = floats(other + 4 * first, size)
        for i in range(size):
            result[i] = given[i] + second[i]
    elif combination == MULTIPLY:
        second = floats(other + 4 * first, size)
        for i in range(size):
            result[i] = given[i] * second[i]
    else:
        scale = f32(double_of(factor))
        for i in range(size):
            result[i] = given[i] * scale
    activate(result, activation)
    rounded(result, rounding)
