"""Products with a packed matrix, and what follows them: bias, activation, gate, residual."""

from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, RELU, activate, f32, rounded
from refmodels_numba.kernels.vector import (
    double_of,
    finish_vectors,
    floats,
    integers,
    make_int4_tile,
    make_integer_tile,
    make_tile,
    make_widening,
    make_widening_int4,
    multiply_add,
)
from refmodels_numba.layout import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, INTEGER, LANES, ROW_BLOCK, TEMPORARY, tile_rows

ROWS = tile_rows()
tall, tall_first, four_float32 = (
    make_tile(rows, 1, FLOAT32, fetch_next=next) for rows, next in ((ROWS, False), (ROWS, True), (4, True))
)
four_bfloat16, four_float16, four_int8 = (make_tile(4, 1, kind, fetch_next=True) for kind in (BFLOAT16, FLOAT16, INT8))
wide_float32, wide_bfloat16, wide_float16, wide_int8 = (make_tile(1, 4, kind) for kind in (FLOAT32, BFLOAT16, FLOAT16, INT8))
one_float32, one_bfloat16, one_float16, one_int8 = (make_tile(1, 1, kind) for kind in (FLOAT32, BFLOAT16, FLOAT16, INT8))
wide_int4, one_int4 = make_int4_tile(2), make_int4_tile(1)
tall_integer, four_integer, one_integer, wide_integer = (
    make_integer_tile(rows, panels) for rows, panels in ((ROWS, 1), (4, 1), (1, 1), (1, 4))
)
widen_bfloat16, widen_float16, widen_int8 = (make_widening(kind) for kind in (BFLOAT16, FLOAT16, INT8))
widen_int4 = make_widening_int4()


@njit(**INLINE)
def panel_bytes(kind, k):
    """The size of one panel of a matrix with k rows."""
    if kind == FLOAT32:
        return 64 * k
    if kind in (BFLOAT16, FLOAT16):
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
    plain = kind != INTEGER and kind != INT8 and factor == f32(1.0) and rounding == 0 and residual_rounding == 0 and gate == 0
    if plain and size % LANES == 0 and (activation == 0 or activation == RELU):
        for i in range(rows):
            place = 4 * ((first + i) * n + column)
            finish_vectors(
                temporary + 4 * i * panels * LANES, size, bias + 4 * column if bias != 0 else 0, activation,
                residual + place if residual != 0 else 0, out + place,
            )  # fmt: skip
        return
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
def widen(kind, source, target, k, zeros, block):
    """One panel as float32, the very numbers that the tiles for one row make in registers."""
    if kind == BFLOAT16:
        widen_bfloat16(source, target, k)
    elif kind == FLOAT16:
        widen_float16(source, target, k)
    elif kind == INT8:
        widen_int8(source, target, k)
    elif kind == INT4:
        widen_int4(source, target, zeros, block, k)


@njit(**INLINE)
def one_row(kind, x, k, weights, size, panels, scales, zeros, groups, block, scratch):
    """The sums of one row and up to `panels` panels: how many of them were done."""
    if kind == INT4:
        if panels >= 2:
            wide_int4(x, weights, size, scales, zeros, groups, block, scratch, k)
            return 2
        one_int4(x, weights, size, scales, zeros, groups, block, scratch, k)
    elif panels >= 4:
        if kind == FLOAT32:
            wide_float32(x, 0, weights, size, scratch, k)
        elif kind == BFLOAT16:
            wide_bfloat16(x, 0, weights, size, scratch, k)
        elif kind == FLOAT16:
            wide_float16(x, 0, weights, size, scratch, k)
        elif kind == INT8:
            wide_int8(x, 0, weights, size, scratch, k)
        else:
            wide_integer(x, 0, weights, size, scratch, (k + 1) // 2)
        return 4
    elif kind == FLOAT32:
        one_float32(x, 0, weights, size, scratch, k)
    elif kind == BFLOAT16:
        one_bfloat16(x, 0, weights, size, scratch, k)
    elif kind == FLOAT16:
        one_float16(x, 0, weights, size, scratch, k)
    elif kind == INT8:
        one_int8(x, 0, weights, size, scratch, k)
    else:
        one_integer(x, 0, weights, size, scratch, (k + 1) // 2)
    return 1


@njit(**INLINE)
def sum_groups(height, x, stride, panel, k, scales, groups, block, scratch):
    """The sums of a tile of rows by a widened panel of int4 numbers: each group's is scaled as a whole."""
    totals, part = floats(scratch, 16 * height), scratch + TEMPORARY // 2
    totals[:] = f32(0.0)
    for group in range(groups):
        first = group * block
        length = min(block, k - first)
        if height == 4:
            four_float32(x + 4 * first, stride, panel + 64 * first, 0, part, length)
        else:
            tall(x + 4 * first, stride, panel + 64 * first, 0, part, length)
        sums, scale = floats(part, 16 * height), floats(scales + 64 * group, 16)
        for row in range(height):
            for lane in range(16):
                place = 16 * row + lane
                totals[place] = multiply_add(scale[lane], sums[place], totals[place])


@njit(**INLINE)
def rows_together(kind, rows):
    """Rows of the tiles for so many rows: one, four, or as many as there are registers for."""
    if rows < 4:
        return 1
    if rows < ROWS or (rows <= 8 and kind in (BFLOAT16, FLOAT16, INT8)):
        return 4
    return ROWS


@njit(**INLINE)
def linear(
    chunk, scratch, rows, x, k, n, weights, kind, scales, zeros, block, bias, factor, row_scales, activation, gate, residual,
    out, rounding, residual_rounding,
):  # fmt: skip
    """residual + gate * activation(factor * x @ weights + bias), all but the product optional (address or code 0)."""
    together, all_panels = panels_together(k), (n + LANES - 1) // LANES
    groups = (all_panels + together - 1) // together
    panel = (chunk % groups) * together
    end = min(panel + together, all_panels)
    first = (chunk // groups) * ROW_BLOCK
    last = min(first + ROW_BLOCK, rows)
    size, scale = panel_bytes(kind, k), f32(double_of(factor))
    stride = 2 * (k + k % 2) if kind == INTEGER else 4 * k
    parts = (k + block - 1) // block if kind == INT4 else 1  # groups that are summed by themselves and then scaled
    height = rows_together(kind, last - first)
    while panel < end:
        at = weights + panel * size
        scales_at, zeros_at = scales + 64 * panel * parts, zeros + 16 * panel * parts
        panels = 1
        if height == 1:
            for row in range(first, last):
                panels = one_row(kind, x + row * stride, k, at, size, end - panel, scales_at, zeros_at, parts, block, scratch)
                finish(
                    scratch, kind, row, 1, panel, panels, n, scales, bias, scale, row_scales, activation, gate, residual, out,
                    rounding, residual_rounding,
                )  # fmt: skip
            panel += panels
            continue
        direct = kind in (FLOAT32, INTEGER) or (height == 4 and kind != INT4)
        if not direct:
            widen(kind, at, scratch + TEMPORARY, k, zeros_at, block)
            at = scratch + TEMPORARY
        row = first
        while row < last:
            # The last tile goes back to rows that are done, rather than be smaller; of these nothing is written again.
            done = max(row + height - last, 0)
            given = x + (row - done) * stride
            if kind == INT4:
                sum_groups(height, given, stride, at, k, scales_at, parts, block, scratch)
            elif height == 4:
                if kind == INTEGER:
                    four_integer(given, stride, at, size, scratch, (k + 1) // 2)
                elif kind == BFLOAT16:
                    four_bfloat16(given, stride, at, size, scratch, k)
                elif kind == FLOAT16:
                    four_float16(given, stride, at, size, scratch, k)
                elif kind == INT8:
                    four_int8(given, stride, at, size, scratch, k)
                else:
                    four_float32(given, stride, at, size, scratch, k)
            elif kind == INTEGER:
                tall_integer(given, stride, at, size, scratch, (k + 1) // 2)
            elif row == first and direct:
                tall_first(given, stride, at, size, scratch, k)
            else:
                tall(given, stride, at, size, scratch, k)
            finish(
                scratch + 64 * done, kind, row, height - done, panel, 1, n, scales, bias, scale, row_scales, activation, gate,
                residual, out, rounding, residual_rounding,
            )  # fmt: skip
            row += height - done
        panel += 1
