"""Products with quantised weights: int8 with one scale a column or a row, int4 in groups (`spec/quantization.md`).

An int8 number stands for value / scale, an int4 number for (value - zero) * scale: Keras' conventions, one the inverse of the
other. Scales are float32 whatever the policy. What is quantised while the model runs is quantised in float32, so that every
implementation gets the same integers.
"""

import math
from typing import Any

import numpy as np

from refmodels.numerics import exact, ulps
from refmodels.op import Array, Float, Int, op
from refmodels.ops.precision import narrow, numpy_dtype, wide, wide_dtype

EPSILON = np.float32(1e-7)  # Keras'; keeps the scale of a row of zeros finite
INT4 = (-8, 7)
_EXACT_TERMS = 1024  # products of two int8 numbers are at most 2**14: so many of them add up in float32 without rounding


@op(error=exact(), laws=("rowwise",), source="Keras 3.15, abs_max_quantize")
def row_scale(x: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """127 / (max |x| + 1e-7) of each row, every step in float32. NaN for a row that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(x.astype(np.float32)).max(-1, initial=0.0)
        return np.where(np.isfinite(largest), np.float32(127.0) / (largest + EPSILON), np.float32(np.nan))


@op(error=exact(), laws=("rowwise",), source="Keras 3.15, abs_max_quantize")
def quantize_rows(x: Float[Array, "*b k"], scale: Float[Array, "*b"]) -> Int[Array, "*b k"]:
    """x * scale of the row, in float32, rounded to the nearest integer, ties to even: int8. Where that is NaN, 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        levels = np.asarray(x.astype(np.float32) * scale.astype(np.float32)[..., None])
    np.rint(levels, out=levels)
    np.nan_to_num(levels, copy=False).clip(-127, 127, out=levels)
    return levels.astype(np.int8)


@op(laws=("rowwise",), source="Keras 3.15, Dense and EinsumDense in int8")
def linear_int8(
    values: Int[Array, "*b k"],
    scale: Float[Array, "*b"],
    kernel: Int[Array, "k n"],
    kernel_scale: Float[Array, "n"],
    bias: Float[Array, "n"] | None = None,
    *,
    dtype: str,
) -> Float[Array, "*b n"]:
    """(values @ kernel) / (scale * kernel_scale) + bias in `dtype`: int8 times int8, and the sum of the products is exact."""
    return _rescaled(_integer_product(values, kernel), scale, kernel_scale, bias, dtype)


@op(laws=("rowwise",), source="Keras 3.15, Dense in int8 without activation quantizer")
def linear_weight_int8(
    x: Float[Array, "*b k"],
    kernel: Int[Array, "k n"],
    kernel_scale: Float[Array, "n"],
    bias: Float[Array, "n"] | None = None,
    *,
    dtype: str | None = None,
) -> Float[Array, "*b n"]:
    """(x @ kernel) / kernel_scale + bias, in the type of x or, if given, `dtype`: only the weights are int8."""
    rows = wide(x).reshape(math.prod(x.shape[:-1]), len(kernel))
    y = rows @ kernel.astype(rows.dtype) / wide(kernel_scale)
    return _with_bias(y, x.shape[:-1], bias, dtype or x.dtype.name)


@op(error=exact(), source="Keras 3.15, pack_int4")
def pack_int4(values: Int[Array, "i j"], *, axis: int = -1) -> Int[Array, "a c"]:
    """Two numbers from -8 to 7 in one byte: along the axis, the even one in the low four bits, the odd one in the high four.

    The last byte of an odd number of them has 0 in its high bits.
    """
    front = np.moveaxis(values, axis, 0).astype(np.uint8) & 15
    front = np.concatenate([front, np.zeros((len(front) % 2, *front.shape[1:]), np.uint8)])
    return np.moveaxis(front[0::2] | front[1::2] << 4, 0, axis).view(np.int8)


@op(error=exact(), source="Keras 3.15, unpack_int4")
def unpack_int4(packed: Int[Array, "a c"], size: int, *, axis: int = -1) -> Int[Array, "i j"]:
    """The first `size` numbers along the axis of what `pack_int4` made: int8, from -8 to 7."""
    values = np.empty([length * (1 + (i == axis % 2)) for i, length in enumerate(packed.shape)], np.int8)
    front, halves = np.moveaxis(values, axis, 0), np.moveaxis(packed.astype(np.int8, copy=False), axis, 0)
    # Shifted up to the sign bit and down again, four bits keep their sign.
    front[0::2], front[1::2] = halves << 4 >> 4, halves >> 4
    return np.moveaxis(front[:size], 0, axis)


@op(laws=("rowwise",), source="Keras 3.15, Dense and EinsumDense in int4 with a block size")
def linear_int4(
    x: Float[Array, "*b k"],
    kernel: Int[Array, "a c"],
    kernel_scale: Float[Array, "g n"],
    kernel_zero: Array,
    g_idx: Float[Array, "k"],
    bias: Float[Array, "n"] | None = None,
    *,
    axis: int = -1,
    dtype: str | None = None,
) -> Float[Array, "*b n"]:
    """x @ w + bias with w[i, j] = (q[i, j] - zero[g, j]) * scale[g, j], where g is g_idx[i] and q the unpacked kernel.

    Two numbers of q share a byte along its `axis`; zero has the shape of scale. In the type of x or, if given, `dtype`.
    """
    rows = wide(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weights = dequantized_groups(kernel, kernel_scale, kernel_zero, g_idx, rows.dtype, axis=axis)
    return _with_bias(rows @ weights, x.shape[:-1], bias, dtype or x.dtype.name)


@op(error=ulps(1), laws=("rowwise",), source="Keras 3.15, Embedding in int8")
def embedding_int8(
    ids: Int[Array, "*b"], embeddings: Int[Array, "v n"], embeddings_scale: Float[Array, "v"], *, dtype: str
) -> Float[Array, "*b n"]:
    """Row ids[...] of the table, over the scale of the row, in `dtype`."""
    _check_ids(ids, embeddings)
    scale = embeddings_scale[ids][..., None].astype(wide_dtype(dtype))
    return narrow(embeddings[ids].astype(scale.dtype) / scale, numpy_dtype(dtype))


@op(error=ulps(1), laws=("rowwise",), source="Keras 3.15, Embedding in int4 with a block size")
def embedding_int4(
    ids: Int[Array, "*b"],
    embeddings: Int[Array, "v c"],
    embeddings_scale: Float[Array, "v g"],
    embeddings_zero: Int[Array, "v g"],
    g_idx: Float[Array, "n"],
    *,
    dtype: str,
) -> Float[Array, "*b n"]:
    """Row ids[...] of the table, (q[j] - zero[g]) * scale[g] with g = g_idx[j] and q the unpacked row, in `dtype`."""
    _check_ids(ids, embeddings)
    flat, shape = ids.reshape(-1), (*ids.shape, len(g_idx))
    parts = embeddings[flat], embeddings_scale[flat], embeddings_zero[flat]
    rows = dequantized_groups(*parts, g_idx, np.dtype(wide_dtype(dtype)), group_axis=1)
    return narrow(rows.reshape(shape), numpy_dtype(dtype))


@op(laws=("rowwise",), source="Keras 3.15, ReversibleEmbedding in int8")
def logits_int8(
    values: Int[Array, "*b n"],
    scale: Float[Array, "*b"],
    embeddings: Int[Array, "v n"],
    embeddings_scale: Float[Array, "v"],
    *,
    dtype: str,
) -> Float[Array, "*b v"]:
    """A tied head: `linear_int8` with the transposed table."""
    return _rescaled(_integer_product(values, embeddings.T), scale, embeddings_scale, None, dtype)


@op(laws=("rowwise",), source="Keras 3.15, ReversibleEmbedding in int8 without activation quantizer")
def logits_weight_int8(
    x: Float[Array, "*b n"], embeddings: Int[Array, "v n"], embeddings_scale: Float[Array, "v"]
) -> Float[Array, "*b v"]:
    """A tied head: `linear_weight_int8` with the transposed table."""
    rows = wide(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = rows @ embeddings.T.astype(rows.dtype) / wide(embeddings_scale)
    return _with_bias(y, x.shape[:-1], None, x.dtype.name)


@op(laws=("rowwise",), source="Keras 3.15, ReversibleEmbedding in int4 with a block size")
def logits_int4(
    x: Float[Array, "*b n"],
    embeddings: Int[Array, "v c"],
    embeddings_scale: Float[Array, "v g"],
    embeddings_zero: Int[Array, "v g"],
    g_idx: Float[Array, "n"],
) -> Float[Array, "*b v"]:
    """A tied head: `linear_int4` with the transposed table."""
    rows = wide(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    table = dequantized_groups(embeddings, embeddings_scale, embeddings_zero, g_idx, rows.dtype, group_axis=1)
    return _with_bias(rows @ table.T, x.shape[:-1], None, x.dtype.name)


def quantized_groups(kernel: Array, block_size: int) -> tuple[Array, Array, Array]:
    """int4 values (k, n) of a matrix, not yet packed, with the scale and the zero (g, n) of each `block_size` rows of a column.

    All in float32, as Keras 3.15's `abs_max_quantize_grouped_with_zero_point`: scale = (max - min + 1e-7) / 15, zero =
    round(-min / scale) - 8, value = round(x / scale) + zero, both clipped to -8 .. 7. A last group that is short is filled up
    with zeros, which count for min and max.
    """
    low, high = INT4
    size, columns = kernel.shape
    block_size = min(block_size, size + 1)  # of a longer block the rest are zeros, and one of them counts like many
    groups = -(-size // block_size)
    padded = np.zeros((groups * block_size, columns), np.float32)
    padded[:size] = kernel
    blocks = padded.reshape(groups, block_size, columns)
    smallest, largest = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    scale = (largest - smallest + EPSILON) / np.float32(high - low)
    zero = (np.rint(-smallest / scale) + low).clip(low, high)
    values = (np.rint(blocks / scale) + zero).clip(low, high).astype(np.int8)
    return values.reshape(padded.shape)[:size], scale[:, 0], zero[:, 0].astype(np.int8)


def dequantized_groups(
    packed: Array, scale: Array, zero: Array, g_idx: Array, dtype: np.dtype[Any], *, axis: int = -1, group_axis: int = 0
) -> Array:
    """The matrix of numbers that packed int4 values stand for. Along `group_axis` of scale and zero are groups, not numbers."""
    size = len(g_idx) if axis % 2 == group_axis else scale.shape[1 - group_axis]
    values: Array = unpack_int4.reference(packed, size, axis=axis).astype(dtype)
    inputs, scales, zeros = (np.moveaxis(array, group_axis, 0) for array in (values, scale, zero))
    ends = [*(np.flatnonzero(np.diff(g_idx)) + 1), len(g_idx)][: len(g_idx)]
    for start, end in zip([0, *ends], ends, strict=False):  # run by run, in place: no other matrix is made
        group = int(g_idx[start])
        inputs[start:end] -= zeros[group].astype(dtype)
        inputs[start:end] *= scales[group].astype(dtype)
    return values


def _integer_product(values: Array, kernel: Array) -> Array:
    """values @ kernel for int8 numbers, exactly, as floating-point numbers: the matrix product of integers has no fast routine.

    A float32 sum of `_EXACT_TERMS` products is below 2**24 at every step, so that no order of summation rounds; longer sums go
    on in float64, which is exact up to 2**53.
    """
    rows, size = values.reshape(math.prod(values.shape[:-1]), values.shape[-1]), len(kernel)
    total: Array = rows[:, :_EXACT_TERMS].astype(np.float32) @ kernel[:_EXACT_TERMS].astype(np.float32)
    for start in range(_EXACT_TERMS, size, _EXACT_TERMS):
        part = slice(start, start + _EXACT_TERMS)
        total = total.astype(np.float64, copy=False)
        total += rows[:, part].astype(np.float32) @ kernel[part].astype(np.float32)
    return total.reshape(*values.shape[:-1], kernel.shape[1])


def _rescaled(total: Array, scale: Array, kernel_scale: Array, bias: Array | None, dtype: str) -> Array:
    compute = np.dtype(wide_dtype(dtype))
    y = total.astype(compute, copy=False) / (scale.astype(compute)[..., None] * kernel_scale.astype(compute))
    return _with_bias(y, total.shape[:-1], bias, dtype)


def _with_bias(y: Array, leading: tuple[int, ...], bias: Array | None, dtype: str) -> Array:
    y = y.reshape(*leading, y.shape[-1])
    return narrow(y if bias is None else y + wide(bias), numpy_dtype(dtype))


def _check_ids(ids: Array, table: Array) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < len(table):
        raise ValueError(f"embedding: ids are {ids.min()} to {ids.max()}, wanted 0 to {len(table) - 1}")
