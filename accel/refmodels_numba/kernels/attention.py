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
    make_weighted_sum,
    sum_of,
    words,
)
from refmodels_numba.layout import ALIBI, BFLOAT16, FLOAT16, FLOAT32, GIVEN_BIAS, KEYS, LANES, QUERIES, REACH, RELATIVE_BIAS

FOUR = 4 * LANES
dots_float32, dots_bfloat16, dots_float16 = (make_dots(kind) for kind in (FLOAT32, BFLOAT16, FLOAT16))
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
                four_float32(weights, rows + i * width, stride, count, out + 4 * i)
            elif kind == BFLOAT16:
                four_bfloat16(weights, rows + i * width, stride, count, out + 4 * i)
            else:
                four_float16(weights, rows + i * width, stride, count, out + 4 * i)
        elif i + LANES <= size:
            step = LANES
            if kind == FLOAT32:
                vector_float32(weights, rows + i * width, stride, count, out + 4 * i)
            elif kind == BFLOAT16:
                vector_bfloat16(weights, rows + i * width, stride, count, out + 4 * i)
            else:
                vector_float16(weights, rows + i * width, stride, count, out + 4 * i)
        else:
            step = 1
            if kind == FLOAT32:
                one_float32(weights, rows + i * width, stride, count, out + 4 * i)
            elif kind == BFLOAT16:
                one_bfloat16(weights, rows + i * width, stride, count, out + 4 * i)
            else:
                one_float16(weights, rows + i * width, stride, count, out + 4 * i)
        i += step


@njit(**INLINE)
def add_bias(scores, bias_kind, bias, row, head, query, position, bias_batch, bias_head, bias_query):
    """Add the position bias of one query to its scores."""
    count = len(scores)
    if bias_kind == GIVEN_BIAS:
        given = floats(bias + row * bias_batch + head * bias_head + query * bias_query, count)
        for j in range(count):
            scores[j] = scores[j] + given[j]
    elif bias_kind == RELATIVE_BIAS:
        table = floats(bias + head * bias_head, 2 * REACH + 1)
        near, far = min(max(position - REACH, 0), count), min(max(position + REACH, 0), count)
        for j in range(near):
            scores[j] = scores[j] + table[0]
        for j in range(near, far):
            scores[j] = scores[j] + table[j - position + REACH]
        for j in range(far, count):
            scores[j] = scores[j] + table[2 * REACH]
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
    scores = scratch + 8 * QUERIES
    longest = 0
    for i in range(count):
        end = s
        if causal != 0:
            end = min(end, words(positions + row * positions_batch, t)[first + i] + 1)
        ends[i] = permitted_end(mask + row * mask_batch + (first + i) * mask_query, max(end, 0))
        longest = max(longest, ends[i])
    for j in range(0, longest, KEYS):
        for i in range(count):
            here = min(KEYS, ends[i] - j)
            if here > 0:
                given, result = query + 4 * ((row * t + first + i) * heads + head) * size, scores + 4 * (i * s + j)
                products(kind, given, key_row + j * key_position, key_position, here, size, result)
    for i in range(count):
        if ends[i] == 0:  # no key is permitted: all weigh the same
            floats(scores + 4 * i * s, s)[:] = f32(1.0)
            ends[i] = longest = s
            continue
        seen, factor = floats(scores + 4 * i * s, ends[i]), f32(double_of(scale))
        for j in range(len(seen)):
            seen[j] = seen[j] * factor
        position = first + i
        if positions != 0:
            position = words(positions + row * positions_batch, t)[first + i]
        add_bias(seen, bias_kind, bias, row, head, first + i, position, bias_batch, bias_head, bias_query)
        exponentials(scores + 4 * i * s, ends[i], mask + row * mask_batch + (first + i) * mask_query)
    for i in range(count):
        floats(out + 4 * ((row * t + first + i) * heads + head) * size, size)[:] = f32(0.0)
    for j in range(0, longest, KEYS):
        for i in range(count):
            here = min(KEYS, ends[i] - j)
            if here > 0:
                place = out + 4 * ((row * t + first + i) * heads + head) * size
                add_rows(kind, scores + 4 * (i * s + j), value_row + j * value_position, value_position, here, size, place)
    for i in range(count):
        if ends[i] == 0:  # there are no keys at all
            continue
        total = sum_of(scores + 4 * i * s, ends[i], 0)
        result = floats(out + 4 * ((row * t + first + i) * heads + head) * size, size)
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
