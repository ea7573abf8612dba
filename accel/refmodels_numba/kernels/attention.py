"""Attention of a few queries of one head: scores, softmax, weighted mean of the values, without the matrix of all scores."""

import numpy as np
from numba import njit

from refmodels_numba.kernels.elementwise import INLINE, exp, f32, rounded
from refmodels_numba.kernels.vector import (
    bytes_,
    double_of,
    doubles,
    floats,
    largest_of,
    make_dots,
    make_dots_tile,
    make_turning,
    make_weighted_sum,
    sum_of,
    words,
)
from refmodels_numba.layout import (
    ALIBI,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GIVEN_BIAS,
    KEYS,
    LANES,
    QUERIES,
    REACH,
    RELATIVE_BIAS,
    tile_rows,
)

FOUR = 4 * LANES
TOGETHER = tile_rows()
"""Queries that share the loads of values, where there are so many: as many as the registers hold sums for."""
HALF = TOGETHER // 2
"""Queries that share the loads of keys: the sums of other levels of the tree want registers, too."""
turn_float32, turn_bfloat16, turn_float16 = (make_turning(kind) for kind in (FLOAT32, BFLOAT16, FLOAT16))
several_dots = make_dots_tile(HALF)
dots_float32, dots_bfloat16, dots_float16 = (make_dots(kind) for kind in (FLOAT32, BFLOAT16, FLOAT16))
several_float32, several_bfloat16, several_float16 = (
    make_weighted_sum(kind, LANES, TOGETHER) for kind in (FLOAT32, BFLOAT16, FLOAT16)
)
four_float32, four_bfloat16, four_float16 = (make_weighted_sum(kind, FOUR) for kind in (FLOAT32, BFLOAT16, FLOAT16))
vector_float32, vector_bfloat16, vector_float16 = (make_weighted_sum(kind, LANES) for kind in (FLOAT32, BFLOAT16, FLOAT16))
one_float32, one_bfloat16, one_float16 = (make_weighted_sum(kind, 1) for kind in (FLOAT32, BFLOAT16, FLOAT16))


@njit(**INLINE)
def add_rows(kind, weights, rows, stride, count, size, out):
    """out[:size] += weights[j] * row j for j below `count`, in this order."""
    width = 4 if kind == FLOAT32 else 2
    i = 0
    while i < size:
        if i + FOUR <= size:
            step = FOUR
            if kind == FLOAT32:
                four_float32(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
            elif kind == BFLOAT16:
                four_bfloat16(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
            else:
                four_float16(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
        elif i + LANES <= size:
            step = LANES
            if kind == FLOAT32:
                vector_float32(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
            elif kind == BFLOAT16:
                vector_bfloat16(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
            else:
                vector_float16(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
        else:
            step = 1
            if kind == FLOAT32:
                one_float32(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
            elif kind == BFLOAT16:
                one_bfloat16(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
            else:
                one_float16(weights, 0, rows + i * width, stride, count, out + 4 * i, 0)
        i += step


@njit(**INLINE)
def add_rows_together(kind, weights, weight_stride, rows, stride, count, size, out, out_stride):
    """`add_rows` for TOGETHER queries: the same sums in the same order, with every load of a row shared."""
    width = 4 if kind == FLOAT32 else 2
    whole = size - size % LANES
    for i in range(0, whole, LANES):
        if kind == FLOAT32:
            several_float32(weights, weight_stride, rows + i * width, stride, count, out + 4 * i, out_stride)
        elif kind == BFLOAT16:
            several_bfloat16(weights, weight_stride, rows + i * width, stride, count, out + 4 * i, out_stride)
        else:
            several_float16(weights, weight_stride, rows + i * width, stride, count, out + 4 * i, out_stride)
    if whole < size:
        for q in range(TOGETHER):
            given, place = weights + q * weight_stride, out + q * out_stride + 4 * whole
            add_rows(kind, given, rows + whole * width, stride, count, size - whole, place)


@njit(**INLINE)
def add_bias(scores, bias_kind, bias, row, head, query, position, bias_batch, bias_head, bias_query):
    """Add the position bias of one query to its scores."""
    count = len(scores)
    if bias_kind == GIVEN_BIAS:
        given = floats(bias + row * bias_batch + head * bias_head + query * bias_query, count)
        for j in range(count):
            scores[j] = scores[j] + given[j]
    elif bias_kind == RELATIVE_BIAS:
        table = bias + head * bias_head
        near, far = min(max(position - REACH, 0), count), min(max(position + REACH, 0), count)
        lowest, highest = floats(table, 1)[0], floats(table, 2 * REACH + 1)[2 * REACH]
        for j in range(near):
            scores[j] = scores[j] + lowest
        middle, between = scores[near:far], floats(table + 4 * (near - position + REACH), far - near)
        for j in range(len(middle)):  # from 0, so that it can be a loop of vectors
            middle[j] = middle[j] + between[j]
        beyond = scores[far:]
        for j in range(len(beyond)):
            beyond[j] = beyond[j] + highest
    elif bias_kind == ALIBI:
        slope = doubles(bias, head + 1)[head]
        for j in range(count):
            scores[j] = scores[j] + f32(slope * np.float64(j - position))


@njit(**INLINE)
def products(kind, query, rows, stride, count, size, out):
    """out[j] = query . row j for j below `count`."""
    if kind == FLOAT32:
        dots_float32(query, rows, stride, count, size, out)
    elif kind == BFLOAT16:
        dots_bfloat16(query, rows, stride, count, size, out)
    else:
        dots_float16(query, rows, stride, count, size, out)


@njit(**INLINE)
def products_together(kind, query, query_stride, queries, rows, stride, count, size, panels, out, out_stride):
    """`products` for HALF or more queries: out[q, j]; up to the next multiple of 16 of `count` there stands nonsense.

    The rows are turned into panels at `panels`, sixteen rows [size, 16] each, which costs little beside so many products: so
    the loads are shared, and nothing is added across a vector.
    """
    for j in range(0, count, LANES):
        panel, here = panels + 4 * j * size, min(LANES, count - j)
        if kind == FLOAT32:
            turn_float32(rows + j * stride, stride, here, size, panel)
        elif kind == BFLOAT16:
            turn_bfloat16(rows + j * stride, stride, here, size, panel)
        else:
            turn_float16(rows + j * stride, stride, here, size, panel)
    q = 0
    while q < queries:
        q = min(q, queries - HALF)  # the last ones go back to queries that are done, and find the same again
        for j in range(0, count, LANES):
            given, place = query + q * query_stride, out + q * out_stride + 4 * j
            several_dots(given, query_stride, panels + 4 * j * size, place, out_stride, size)
        q += HALF


@njit(**INLINE)
def permitted_end(mask, s):
    """One more than the last permitted key; 0 if there is none."""
    permitted = bytes_(mask, s)
    end = s
    while end > 0 and permitted[end - 1] == 0:
        end -= 1
    return end


@njit(**INLINE)
def exponentials(scores, count, mask):
    """exp(score - largest) in place, over the permitted keys; 0 for the others."""
    seen, permitted = floats(scores, count), bytes_(mask, count)
    for j in range(count):
        seen[j] = seen[j] if permitted[j] else f32(-np.inf)
    peak = largest_of(scores, count, 0)
    for j in range(count):
        seen[j] = exp(seen[j] - peak)


@njit(**INLINE)
def attention_chunks(batch, t, s, heads):
    """Pieces of work."""
    return batch * heads * ((t + QUERIES - 1) // QUERIES)


@njit(**INLINE)
def attention(
    chunk, scratch, batch, t, s, heads, size, query, keys, values, kind, key_batch, key_position, key_head, value_batch,
    value_position, value_head, scale, mask, mask_batch, mask_query, causal, positions, positions_batch, bias_kind, bias,
    bias_batch, bias_head, bias_query, out, rounding,
):  # fmt: skip
    """softmax(scale * query . key + bias, over the permitted keys) . value for QUERIES queries of one row and head.

    Keys behind the last permitted one are not looked at, so that padding and a longer cache change no bit.
    """
    blocks = (t + QUERIES - 1) // QUERIES
    row, head, first = chunk // (blocks * heads), (chunk // blocks) % heads, (chunk % blocks) * QUERIES
    count = min(QUERIES, t - first)
    key_row = keys + row * key_batch + head * key_head
    value_row = values + row * value_batch + head * value_head
    ends = words(scratch, QUERIES)  # keys that each query looks at; 0 if none is permitted
    length = (s + LANES - 1) // LANES * LANES  # `padded` in layout.py
    scores = scratch + 8 * QUERIES
    panels, row_bytes = scores + 4 * QUERIES * length, 4 * length
    longest = 0
    for i in range(count):
        end = s
        if causal != 0:
            end = min(end, words(positions + row * positions_batch, t)[first + i] + 1)
        ends[i] = permitted_end(mask + row * mask_batch + (first + i) * mask_query, max(end, 0))
        longest = max(longest, ends[i])
    stride = 4 * heads * size  # from query to query, and from result to result
    queries, results = query + (row * t + first) * stride + 4 * head * size, out + (row * t + first) * stride + 4 * head * size
    for j in range(0, longest, KEYS):
        block = key_row + j * key_position
        if count >= TOGETHER:  # what queries with a shorter end get too much stands where nobody looks
            here = min(KEYS, longest - j)
            products_together(
                kind, queries, stride, count, block, key_position, here, size, panels, scores + 4 * j, row_bytes
            )  # fmt: skip
            continue
        for i in range(count):
            here = min(KEYS, ends[i] - j)
            if here > 0:
                products(kind, queries + i * stride, block, key_position, here, size, scores + i * row_bytes + 4 * j)
    for i in range(count):
        if ends[i] == 0:  # no key is permitted: all weigh the same
            floats(scores + i * row_bytes, s)[:] = f32(1.0)
            ends[i] = longest = s
            continue
        seen, factor = floats(scores + i * row_bytes, ends[i]), f32(double_of(scale))
        if factor != f32(1.0):
            for j in range(len(seen)):
                seen[j] = seen[j] * factor
        position = first + i
        if positions != 0:
            position = words(positions + row * positions_batch, t)[first + i]
        add_bias(seen, bias_kind, bias, row, head, first + i, position, bias_batch, bias_head, bias_query)
        exponentials(scores + i * row_bytes, ends[i], mask + row * mask_batch + (first + i) * mask_query)
    for i in range(count):
        floats(results + i * stride, size)[:] = f32(0.0)
    for j in range(0, longest, KEYS):
        for i in range(0, count, TOGETHER):
            group, common = min(TOGETHER, count - i), 0
            if group == TOGETHER:  # first the keys that all of them look at
                common = KEYS
                for q in range(i, i + group):
                    common = max(min(common, ends[q] - j), 0)
                given, block = scores + i * row_bytes + 4 * j, value_row + j * value_position
                add_rows_together(kind, given, row_bytes, block, value_position, common, size, results + i * stride, stride)
            block = value_row + (j + common) * value_position
            for q in range(i, i + group):
                here = min(KEYS, ends[q] - j) - common
                if here > 0:
                    given = scores + q * row_bytes + 4 * (j + common)
                    add_rows(kind, given, block, value_position, here, size, results + q * stride)
    for i in range(count):
        if ends[i] == 0:  # there are no keys at all
            continue
        total = sum_of(scores + i * row_bytes, ends[i], 0)
        result = floats(results + i * stride, size)
        for j in range(size):
            result[j] = result[j] / total
        rounded(result, rounding)


# The three steps one by one, for whoever needs what lies between them. A piece of work is one query of one head.


@njit(**INLINE)
def scores_chunks(batch, t, s, heads):
    """Pieces of work."""
    return batch * heads * t


@njit(**INLINE)
def scores(
    chunk, scratch, batch, t, s, heads, size, query, keys, kind, key_batch, key_position, key_head, scale, bias_kind, bias,
    bias_batch, bias_head, bias_query, out,
):  # fmt: skip
    """scale * query . key + bias of one query."""
    row, head, i = chunk // (t * heads), (chunk // t) % heads, chunk % t
    place, factor = out + 4 * chunk * s, f32(double_of(scale))
    given = query + 4 * ((row * t + i) * heads + head) * size
    products(kind, given, keys + row * key_batch + head * key_head, key_position, s, size, place)
    result = floats(place, s)
    for j in range(s):
        result[j] = result[j] * factor
    add_bias(result, bias_kind, bias, row, head, i, i, bias_batch, bias_head, bias_query)


@njit(**INLINE)
def softmax_chunks(batch, t, s, heads):
    """Pieces of work."""
    return batch * heads * t


@njit(**INLINE)
def softmax(chunk, scratch, batch, t, s, heads, scores, mask, mask_batch, mask_query, out):
    """exp(score) / sum of exp(score) over the permitted keys of one query; 0 for the others."""
    row, i, place = chunk // (t * heads), chunk % t, out + 4 * chunk * s
    here = mask + row * mask_batch + i * mask_query
    given, result, end = floats(scores + 4 * chunk * s, s), floats(place, s), permitted_end(here, s)
    if end == 0:
        result[:] = f32(1.0) / f32(s)
        return
    for j in range(s):
        result[j] = given[j] if j < end else f32(0.0)
    exponentials(place, end, here)
    total = sum_of(place, end, 0)
    for j in range(end):
        result[j] = result[j] / total


@njit(**INLINE)
def context_chunks(batch, t, s, heads):
    """Pieces of work."""
    return batch * heads * t


@njit(**INLINE)
def context(
    chunk, scratch, batch, t, s, heads, size, weights, values, kind, value_batch, value_position, value_head, out, rounding
):  # fmt: skip
    """The mean of the values by the weights of one query."""
    row, head, i = chunk // (t * heads), (chunk // t) % heads, chunk % t
    place = out + 4 * ((row * t + i) * heads + head) * size
    result = floats(place, size)
    result[:] = f32(0.0)
    start = values + row * value_batch + head * value_head
    add_rows(kind, weights + 4 * chunk * s, start, value_position, s, size, place)
    rounded(result, rounding)
