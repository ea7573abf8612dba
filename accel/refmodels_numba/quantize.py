"""Products with int8 and int4 weights, and look-ups in quantised tables."""

import math
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops import quantize as ops
from refmodels_numba import packing
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.layout import INT8, INTEGER
from refmodels_numba.linear import check_ids, narrow_types, product
from refmodels_numba.packing import Packed
from refmodels_numba.program import Program

LONGEST = (2**31 - 1) // 127**2
"""Products of int8 numbers that add up in int32."""


def fits_int32(values: Any, *_: Any, dtype: str, **__: Any) -> bool | str:
    """sums that fit into int32"""
    if dtype == "float64":
        return "float64: the reference's"
    return values.shape[-1] <= LONGEST or f"rows of {values.shape[-1]}: sums that may not fit into int32"


def _int8(leaf: Any, *, by_rows: bool = False, integer: bool) -> Packed:
    if isinstance(leaf, Packed) and leaf.kind == (INTEGER if integer else INT8):
        return leaf
    host = leaf.unpacked() if isinstance(leaf, Packed) else leaf
    return packing.packed_int8(host, by_rows=by_rows, integer=integer)


@kernel(ops.linear_int8, when=fits_int32)
def linear_int8(
    values: Array, scale: Array, kernel: Any, kernel_scale: Array, bias: Array | None = None, *, dtype: str
) -> Array:
    """Exact sums in int32."""
    weights = _int8(kernel, integer=True)
    return product(values, weights, dtype, row_scales=scale, column_scale=kernel_scale, bias=bias)


@kernel(ops.logits_int8, when=fits_int32)
def logits_int8(values: Array, scale: Array, embeddings: Any, embeddings_scale: Array, *, dtype: str) -> Array:
    """Exact sums in int32."""
    weights = _int8(embeddings, by_rows=True, integer=True)
    return product(values, weights, dtype, row_scales=scale, column_scale=embeddings_scale)


@kernel(ops.linear_weight_int8, when=narrow_types)
def linear_weight_int8(
    x: Array, kernel: Any, kernel_scale: Array, bias: Array | None = None, *, dtype: str | None = None
) -> Array:
    """Weights are widened in registers."""
    return product(x, _int8(kernel, integer=False), dtype or x.dtype.name, column_scale=kernel_scale, bias=bias)


@kernel(ops.logits_weight_int8, when=narrow_types)
def logits_weight_int8(x: Array, embeddings: Any, embeddings_scale: Array) -> Array:
    """Weights are widened in registers."""
    return product(x, _int8(embeddings, by_rows=True, integer=False), x.dtype.name, column_scale=embeddings_scale)


@kernel(ops.linear_int4, when=narrow_types)
def linear_int4(
    x: Array,
    kernel: Any,
    kernel_scale: Array,
    kernel_zero: Array,
    g_idx: Array,
    bias: Array | None = None,
    *,
    axis: int = -1,
    dtype: str | None = None,
) -> Array:
    """Weights are made in registers."""
    if not isinstance(kernel, Packed):
        kernel = packing.packed_int4(kernel, kernel_scale, kernel_zero, g_idx, by_rows=False, axis=axis)
    return product(x, kernel, dtype or x.dtype.name, bias=bias)


@kernel(ops.logits_int4, when=narrow_types)
def logits_int4(x: Array, embeddings: Any, embeddings_scale: Array, embeddings_zero: Array, g_idx: Array) -> Array:
    """Weights are made in registers."""
    if not isinstance(embeddings, Packed):
        embeddings = packing.packed_int4(embeddings, embeddings_scale, embeddings_zero, g_idx, by_rows=True, axis=-1)
    return product(x, embeddings, x.dtype.name)


def packed_table(ids: Any, embeddings: Any, *_: Any, **__: Any) -> bool | str:
    """packed tables"""
    return True if isinstance(embeddings, Packed) else "a plain table: NumPy looks up as fast"


@kernel(ops.embedding_int8, when=packed_table)
def embedding_int8(ids: Array, embeddings: Packed, embeddings_scale: Array, *, dtype: str) -> Array:
    """Rows of a packed table."""
    check_ids(ids, embeddings)
    flat = ids.reshape(-1)
    rows, places = embeddings.rows(flat), np.arange(len(flat)).reshape(ids.shape)
    return ops.embedding_int8.reference(places, rows, embeddings_scale[flat], dtype=dtype)


@kernel(ops.embedding_int4, when=packed_table)
def embedding_int4(
    ids: Array, embeddings: Packed, embeddings_scale: Array, embeddings_zero: Array, g_idx: Array, *, dtype: str
) -> Array:
    """Rows of a packed table."""
    check_ids(ids, embeddings)
    if embeddings.host is not None:
        return ops.embedding_int4.reference(ids, embeddings.host, embeddings_scale, embeddings_zero, g_idx, dtype=dtype)
    flat = ids.reshape(-1)
    rows, places = ops.pack_int4.reference(embeddings.rows(flat)), np.arange(len(flat)).reshape(ids.shape)
    parts = rows, embeddings_scale[flat], embeddings_zero[flat]
    return ops.embedding_int4.reference(places, *parts, g_idx, dtype=dtype)


def _quantized(x: Array, scale: Array | None) -> tuple[Array, Array]:
    """int8 numbers and the scale of each row, which is made if it is not given."""
    k, shape = x.shape[-1], x.shape[:-1]
    rows = math.prod(shape)
    scales = np.empty(rows, np.float32) if scale is None else np.array(scale, np.float32).reshape(rows)
    values, given = np.empty((rows, k + k % 2), np.int16), np.ascontiguousarray(x, np.float32)
    program = Program()
    slots: dict[str, Any] = {name: program.slot(name) for name in ("rows", "x", "out", "row_scales")}
    program.add("quantize", **slots, k=k, given=int(scale is not None))
    arrays = {"x": given, "out": values, "row_scales": scales}
    program.run(team(), {"rows": rows}, {name: packing.address(array) for name, array in arrays.items()}, alone=True)
    return values[:, :k].reshape(x.shape).astype(np.int8), scales.reshape(shape)


@kernel(ops.row_scale, when=narrow_types)
def row_scale(x: Array) -> Array:
    """Part of the fused kernels of quantised models."""
    return _quantized(x, None)[1]


@kernel(ops.quantize_rows, when=narrow_types)
def quantize_rows(x: Array, scale: Array) -> Array:
    """Part of the fused kernels of quantised models."""
    return _quantized(x, scale)[0]
