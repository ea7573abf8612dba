"""Inputs of integer products: int8 numbers, kept in int16 as the products want them, and a scale for each row."""

import numpy as np
from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, f32
from refmodels_numba.kernels.vector import floats, largest_magnitude_of, nearest, shorts, sum_of

ROWS = 8


@njit(**INLINE)
def quantize_chunks(rows):
    """Pieces of work."""
    return (rows + ROWS - 1) // ROWS


@njit(**INLINE)
def quantize(chunk, scratch, rows, x, k, out, row_scales, given):
    """row_scale, unless the scales are `given`, and quantize_rows, into rows of even length: odd k gets a zero behind."""
    even = k + k % 2
    scales = floats(row_scales, rows)
    for row in range(chunk * ROWS, min(rows, (chunk + 1) * ROWS)):
        values, result = floats(x + 4 * row * k, k), shorts(out + 2 * row * even, even)
        scale = scales[row]
        if given == 0:
            largest = largest_magnitude_of(x + 4 * row * k, k, 0)
            # Infinity minus itself is NaN, and a NaN in the row makes one of its sum.
            scale = f32(127.0) / (largest + f32(1e-7)) + (largest - largest)
            total = sum_of(x + 4 * row * k, k, 0)
            if total != total:
                for i in range(k):
                    if values[i] != values[i]:
                        scale = f32(np.nan)
            scales[row] = scale
        for i in range(k):
            level = nearest(values[i] * scale)
            level = min(max(level, f32(-127.0)), f32(127.0)) if level == level else f32(0.0)
            result[i] = np.int16(np.int32(level))
        if even > k:
            result[k] = 0
