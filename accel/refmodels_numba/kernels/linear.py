"""Products with a packed matrix, and what follows them: bias, activation, gate, residual."""

from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, activate, f32, rounded
from refmodels_numba.kernels.vector import (
    double_of,
    floats,
    integers,
    make_int4_tile,
    make_integer_tile,
    make_tile,
    make_widening,
    make_widening_int4,
)
from refmodels_numba.layout import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, INTEGER, LANES, ROW_BLOCK, TEMPORARY, tile_rows

ROWS = tile_rows()
tall, tile_4, tile_2, tile_1 = (make_tile(rows, 1, FLOAT32) for rows in (ROWS, 4, 2, 1))
wide_float32, wide_bfloat16, wide_float16, wide_int8 = (make_tile(1, 4, kind) for kind in (FLOAT32, BFLOAT16, FLOAT16, INT8))
one_bfloat16, one_float16, one_int8 = (make_tile(1, 1, kind) for kind in (BFLOAT16, FLOAT16, INT8))
wide_int4, one_int4 = make_int4_tile(2), make_int4_tile(1)
integer_4, integer_1, wide_integer = make_integer_tile(4, 1), make_integer_tile(1, 1), make_integer_tile(1, 4)
widen_bfloat16, widen_float16, widen_int8 = (make_widening(kind) for kind in (BFLOAT16, FLOAT16, INT8))
widen_int4 = make_widening_int4()


@njit(**INLINE)
def panel_bytes(kind, k):
    """The size of one panel of a matrix with k rows."""
    if kind == FLOAT32:
        return 64 * k
    if kind == BFLOAT16 or kind == FLOAT16:
        return 32 * k
    if kind == INT8:
        return 16 * k
    if kind == INT4:
        return 16 * ((k + 1) // 2)
    return 32 * ((k + 1) // 2)


@njit(**INLINE)
def panels_together(k):
    """Panels of one piece of work: about 2048 rows of them, so that small matrices are not cut into crumbs."""
    return 4 * max(1, 512 // max(k, 1))


@njit(**INLINE)
def linear_chunks(rows, x, k, n):
    """Pieces of work."""
    together = panels_together(k)
    groups = ((n + LANES - 1) // LANES + together - 1) // together
    return groups * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)


@njit(**INLINE)
def finish(
    temporary, kind, first, rows, panel, panels, n, scales, bias, factor, row_scales, activation, gate, residual, out, rounding,
    residual_rounding,
):  # fmt: skip
    """From the sums of a tile to results: one pass for each thing that is to be done, over values in the first cache."""
    column = panel * LANES
    size = min(panels * LANES, n - column)
    for i in range(rows):
        row, start = first + i, temporary + 4 * i * panels * LANES
        sums, result = floats(start, size), floats(out + 4 * ((first + i) * n + column), size)
        if kind == INTEGER:
            counts, columns = integers(start, size), floats(scales + 4 * column, size)
            scale = floats(row_scales, row + 1)[row]
            for j in range(size):
                sums[j] = f32(counts[j]) / (scale * columns[j])
        elif kind == INT8:
            columns = floats(scales + 4 * column, size)
            for j in range(size):
                sums[j] = sums[j] / columns[j]
        if factor != f32(1.0):
            for j in range(size):
                sums[j] = sums[j] * factor
        if bias != 0:
            shift = floats(bias + 4 * column, size)
            for j in range(size):
                sums[j] = sums[j] + shift[j]
        rounded(sums, rounding)
        if activation != 0:
            activate(sums, activation)
            rounded(sums, rounding)
        if gate != 0:
            other = floats(gate + 4 * (row * n + column), size)
            for j in range(size):
                sums[j] = sums[j] * other[j]
            rounded(sums, rounding)
        if residual != 0:
            before = floats(residual + 4 * (row * n + column), size)
            for j in range(size):
                sums[j] = before[j] + sums[j]
            rounded(sums, residual_rounding)
        for j in range(size):
            result[j] = sums[j]


@njit(**INLINE)
def widen(kind, source, target, k, scales, zeros, block):
    """One panel as float32, the very numbers that the tiles for one row make in registers."""
    if kind == BFLOAT16:
        widen_bfloat16(source, target, k)
    elif kind == FLOAT16:
        widen_float16(source, target, k)
    elif kind == INT8:
        widen_int8(source, target, k)
    elif kind == INT4:
        widen_int4(source, target, scales, zeros, block, k)


@njit(**INLINE)
def linear(
    chunk, scratch, rows, x, k, n, weights, kind, scales, zeros, block, bias, factor, row_scales, activation, gate, residual, out,
    rounding, residual_rounding,
):  # fmt: skip
    """residual + gate * activation(factor * x @ weights + bias), all but the product optional (address or code 0)."""
    together, all_panels = panels_together(k), (n + LANES - 1) // LANES
    groups = (all_panels + together - 1) // together
    panel = (chunk % groups) * together
    end = min(panel + together, all_panels)
    row = (chunk // groups) * ROW_BLOCK
    last = min(row + ROW_BLOCK, rows)
    size, scale = panel_bytes(kind, k), f32(double_of(factor))
    group_bytes = 64 * ((k + block - 1) // block) if kind == INT4 else 0
    one_row = last - row == 1
    while panel < end:
        at = weights + panel * size
        scales_at, zeros_at = scales + panel * group_bytes, zeros + panel * group_bytes
        r = row
        count = 1
        if one_row:
            given = x + 4 * r * k
            if kind == INT4:
                if panel + 2 <= end:
                    count = 2
                    wide_int4(given, at, size, scales_at, zeros_at, group_bytes, block, scratch, k)
                else:
                    one_int4(given, at, size, scales_at, zeros_at, group_bytes, block, scratch, k)
            elif panel + 4 <= end:
                count = 4
                if kind == FLOAT32:
                    wide_float32(given, 0, at, size, scratch, k)
                elif kind == BFLOAT16:
                    wide_bfloat16(given, 0, at, size, scratch, k)
                elif kind == FLOAT16:
                    wide_float16(given, 0, at, size, scratch, k)
                elif kind == INT8:
                    wide_int8(given, 0, at, size, scratch, k)
                else:
                    wide_integer(x + r * (k + k % 2), 0, at, size, scratch, (k + 1) // 2)
            elif kind == FLOAT32:
                tile_1(given, 0, at, size, scratch, k)
            elif kind == BFLOAT16:
                one_bfloat16(given, 0, at, size, scratch, k)
            elif kind == FLOAT16:
                one_float16(given, 0, at, size, scratch, k)
            elif kind == INT8:
                one_int8(given, 0, at, size, scratch, k)
            else:
                integer_1(x + r * (k + k % 2), 0, at, size, scratch, (k + 1) // 2)
            finish(
                scratch, kind, r, 1, panel, count, n, scales, bias, scale, row_scales, activation, gate, residual, out,
                rounding, residual_rounding,
            )  # fmt: skip
            panel += count
            continue
        if kind != FLOAT32 and kind != INTEGER:
            widen(kind, at, scratch + TEMPORARY, k, scales_at, zeros_at, block)
            at = scratch + TEMPORARY
        while r < last:
            left = last - r
            if kind == INTEGER:
                stride = k + k % 2
                count = 4 if left >= 4 else 1
                if count == 4:
                    integer_4(x + r * stride, stride, at, size, scratch, (k + 1) // 2)
                else:
                    integer_1(x + r * stride, stride, at, size, scratch, (k + 1) // 2)
            else:
                given = x + 4 * r * k
                if left >= ROWS:
                    count = ROWS
                    tall(given, 4 * k, at, size, scratch, k)
                elif left >= 4:
                    count = 4
                    tile_4(given, 4 * k, at, size, scratch, k)
                elif left >= 2:
                    count = 2
                    tile_2(given, 4 * k, at, size, scratch, k)
                else:
                    count = 1
                    tile_1(given, 4 * k, at, size, scratch, k)
            finish(
                scratch, kind, r, count, panel, 1, n, scales, bias, scale, row_scales, activation, gate, residual, out,
                rounding, residual_rounding,
            )  # fmt: skip
            r += count
        panel += 1
