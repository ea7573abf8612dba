"""Writing keys and values into a cache, in its stored type."""

from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, f32
from refmodels_numba.kernels.vector import bits_of, floats, halves, words
from refmodels_numba.layout import BFLOAT16, FLOAT32

ROWS = 16


@njit(**INLINE)
def half_bits(x, kind):
    """The sixteen bits of a value that is one of this type."""
    raw = bits_of(x)
    if kind == BFLOAT16:
        return (raw >> 16) & 0xFFFF
    size, sign = raw & 0x7FFFFFFF, (raw >> 16) & 0x8000
    if size >= 0x7F800000:
        return sign | 0x7C00 | ((size >> 13) & 0x3FF)
    if size < 0x38800000:
        return sign | int(abs(x) * f32(16777216.0))  # a multiple of 2**-24
    return sign | ((size >> 13) - (112 << 10))


@njit(**INLINE)
def write_chunks(rows):
    """Pieces of work."""
    return (rows + ROWS - 1) // ROWS


@njit(**INLINE)
def write(chunk, scratch, rows, t, heads, size, x, out, kind, batch_stride, position_stride, head_stride, start):
    """Write row i of x, [rows, heads * size] with rows = batch * t, at position start[batch] + i; start 0 begins at 0."""
    for row in range(chunk * ROWS, min(rows, (chunk + 1) * ROWS)):
        batch, position = row // t, row % t
        if start != 0:
            position += words(start, batch + 1)[batch]
        place = out + batch * batch_stride + position * position_stride
        for head in range(heads):
            given = floats(x + 4 * (row * heads + head) * size, size)
            if kind == FLOAT32:
                result = floats(place + head * head_stride, size)
                for i in range(size):
                    result[i] = given[i]
            else:
                bits = halves(place + head * head_stride, size)
                for i in range(size):
                    bits[i] = half_bits(given[i], kind)
