"""Normalisation, a few rows a piece."""

import math

import numpy as np
from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, f32, rounded
from refmodels_numba.kernels.vector import bits_of, double_of, floats, sum_of, sum_of_squares

ROWS = 8


@njit(**INLINE)
def norm_chunks(rows):
    """Pieces of work."""
    return (rows + ROWS - 1) // ROWS


@njit(**INLINE)
def norm(chunk, scratch, rows, x, n, gamma, beta, epsilon, out, rounding):
    """layer_norm, or rms_norm where there is no beta (address 0)."""
    for row in range(chunk * ROWS, min(rows, (chunk + 1) * ROWS)):
        start = x + 4 * row * n
        mean = f32(0.0)
        if beta != 0:
            mean = sum_of(start, n, 0) / f32(n)
        variance = sum_of_squares(start, n, np.int64(bits_of(mean))) / f32(n)
        deviation = f32(math.sqrt(variance + f32(double_of(epsilon))))
        given, result, scale = floats(start, n), floats(out + 4 * row * n, n), floats(gamma, n)
        if beta != 0:
            shift = floats(beta, n)
            for i in range(n):
                result[i] = (given[i] - mean) / deviation * scale[i] + shift[i]
        else:
            for i in range(n):
                result[i] = given[i] / deviation * scale[i]
        rounded(result, rounding)
