"""Inputs of integer products: int8 numbers and a scale for each row."""

import numpy as np
from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, f32
from refmodels_numba.kernels.vector import floats, largest_magnitude_of, nearest, signed_bytes, sum_of

ROWS = 8


@njit(**INLINE)
def quantize_chunks(rows):
    """Pieces of work."""
    return (rows + ROWS - 1) // ROWS


@njit(**INLINE)
def quantize(chunk, scratch, rows, x, k, out, row_scales):
    """row_scale and quantize_rows, into rows of even length: a row of odd k gets a zero behind."""
    even = k + k % 2
    scales = floats(row_scales, rows)
    for row in range(chunk * ROWS, min(rows, (chunk + 1) * ROWS)):
        given, result = floats(x + 4 * row * k, k), signed_bytes(out + row * even, even)
        largest = largest_magnitude_of(x + 4 * row * k, k, 0)
        # Infinity minus itself is NaN, and a NaN in the row makes one of its sum.
        scale = f32(127.0) / (largest + f32(1e-7)) + (largest - largest)
        total = sum_of(x + 4 * row * k, k, 0)
        if total != total:
            for i in range(k):
                if given[i] != given[i]:
                    scale = f32(np.nan)
        scales[row] = scale
        if scale != scale:
            result[:] = 0
            continue
        for i in range(k):
            level = nearest(given[i] * scale)
            level = min(max(level, f32(-127.0)), f32(127.0))
            result[i] = np.int8(np.int32(level))
        if even > k:
            result[k] = 0
