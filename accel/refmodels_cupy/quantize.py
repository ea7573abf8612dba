"""Products with int8 and int4 weights, look-ups in quantised tables, and rows of activations made int8."""

import math
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import quantize as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_cupy import weights
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.elementwise import STORED, narrow_types
from refmodels_cupy.linear import MOST, Products
from refmodels_cupy.source import form
from refmodels_cupy.weights import Matrix

THREADS = (256, 1, 1)

FORMS = [
    *(("quantize.cu", form(kernel, x)) for kernel in ("row_scale", "quantize_rows", "rows_to_int8") for x in STORED),
]

LONGEST = (2**31 - 1) // 128**2
"""Products of int8 numbers that add up in int32."""


def fits_int32(values: Any, *arrays: Any, dtype: str, **named: Any) -> bool | str:
    """sums that fit into int32"""
    size = values.shape[-1]
    return (
        narrow_types(*arrays, dtype=dtype, **named) if size <= LONGEST else f"rows of {size}: sums that may not fit into int32"
    )


def rows_to_int8(device: Device, x: Any, scale: Any, values: Any) -> None:
    """`ops.row_scale` and `ops.quantize_rows` of x [rows, k] in one launch: into scale [rows], and values [rows, pitch] with
    zeros from k on."""
    (rows, k), pitch = x.shape, values.shape[1]
    launched = form("rows_to_int8", x.dtype.name)
    device.launch(Launch("quantize.cu", launched, (rows, 1, 1), THREADS, (x, scale, values, np.int32(k), np.int32(pitch))))


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.quantize`."""
    xp, product = device.xp, Products(device)

    @accelerator.kernel(ops.row_scale, when=narrow_types)
    def row_scale(x: Any) -> Any:
        scale, rows, k = device.empty(x.shape[:-1], np.float32), math.prod(x.shape[:-1]), x.shape[-1]
        if rows:
            launched = form("row_scale", x.dtype.name)
            device.launch(Launch("quantize.cu", launched, (rows, 1, 1), THREADS, (product.flat(x), scale, np.int32(k))))
        return scale

    @accelerator.kernel(ops.quantize_rows, when=narrow_types)
    def quantize_rows(x: Any, scale: Any) -> Any:
        values, rows, k = device.empty(x.shape, np.int8), math.prod(x.shape[:-1]), x.shape[-1]
        if values.size:
            arguments = (product.flat(x), product.flat(scale.astype(np.float32, copy=False)), values, np.int32(k))
            device.launch(Launch("quantize.cu", form("quantize_rows", x.dtype.name), (rows, 1, 1), THREADS, arguments))
        return values

    def integer_product(values: Any, row_scale: Any, w: Matrix, scale: Any, bias: Any, dtype: str) -> Any:
        rows, y = math.prod(values.shape[:-1]), device.empty((*values.shape[:-1], w.n), numpy_dtype(dtype))
        if y.size == 0:
            return y
        flat, bias = product.flat(values).reshape(rows, w.k), product.flat(bias)
        scales = [product.flat(part.astype(np.float32, copy=False)) for part in (row_scale, scale)]
        if rows > MOST:
            product.finish(product.sums(flat, w.rows), y, bias=bias, row_scale=scales[0], scale=scales[1])
        else:
            product.fused(product.filled(flat, w.pitch), w, y, row_scale=scales[0], scale=scales[1], bias=bias)
        return y

    @accelerator.kernel(ops.linear_int8, when=fits_int32)
    def linear_int8(values: Any, scale: Any, kernel: Any, kernel_scale: Any, bias: Any = None, *, dtype: str) -> Any:
        return integer_product(values, scale, product.matrix(kernel), kernel_scale, bias, dtype)

    @accelerator.kernel(ops.logits_int8, when=fits_int32)
    def logits_int8(values: Any, scale: Any, embeddings: Any, embeddings_scale: Any, *, dtype: str) -> Any:
        return integer_product(values, scale, product.matrix(embeddings, by_rows=True), embeddings_scale, None, dtype)

    @accelerator.kernel(ops.linear_weight_int8, when=narrow_types)
    def linear_weight_int8(x: Any, kernel: Any, kernel_scale: Any, bias: Any = None, *, dtype: str | None = None) -> Any:
        return product(x, product.matrix(kernel), dtype, bias=bias, scale=kernel_scale)

    @accelerator.kernel(ops.logits_weight_int8, when=narrow_types)
    def logits_weight_int8(x: Any, embeddings: Any, embeddings_scale: Any) -> Any:
        return product(x, product.matrix(embeddings, by_rows=True), None, scale=embeddings_scale)

    def int4(leaf: Any, *others: Any, by_rows: bool, axis: int) -> Matrix:
        if isinstance(leaf, Matrix):
            return leaf
        return weights.int4_matrix(device, *(device.to_host(part) for part in (leaf, *others)), by_rows=by_rows, axis=axis)

    @accelerator.kernel(ops.linear_int4, when=narrow_types)
    def linear_int4(
        x: Any,
        kernel: Any,
        kernel_scale: Any,
        kernel_zero: Any,
        g_idx: Any,
        bias: Any = None,
        *,
        axis: int = -1,
        dtype: str | None = None,
    ) -> Any:
        return product(x, int4(kernel, kernel_scale, kernel_zero, g_idx, by_rows=False, axis=axis), dtype, bias=bias)

    @accelerator.kernel(ops.logits_int4, when=narrow_types)
    def logits_int4(x: Any, embeddings: Any, embeddings_scale: Any, embeddings_zero: Any, g_idx: Any) -> Any:
        return product(x, int4(embeddings, embeddings_scale, embeddings_zero, g_idx, by_rows=True, axis=-1), None)

    @accelerator.kernel(ops.embedding_int8, when=narrow_types)
    def embedding_int8(ids: Any, embeddings: Any, embeddings_scale: Any, *, dtype: str) -> Any:
        return product.rows(ids, product.matrix(embeddings, by_rows=True), dtype, scale=embeddings_scale)

    @accelerator.kernel(ops.embedding_int4, when=narrow_types)
    def embedding_int4(
        ids: Any, embeddings: Any, embeddings_scale: Any, embeddings_zero: Any, g_idx: Any, *, dtype: str
    ) -> Any:
        table = int4(embeddings, embeddings_scale, embeddings_zero, g_idx, by_rows=True, axis=-1)
        return product.rows(ids, table, dtype)

    @accelerator.kernel(ops.pack_int4)
    def pack_int4(values: Any, *, axis: int = -1) -> Any:
        return weights.packed_halves(values.astype(np.int8), axis)

    @accelerator.kernel(ops.unpack_int4)
    def unpack_int4(packed: Any, size: int, *, axis: int = -1) -> Any:
        bytes_ = packed.astype(np.int8, copy=False)
        numbers = weights.halves(bytes_, size) if axis % 2 else weights.halves(bytes_.T, size).T
        return xp.ascontiguousarray(numbers)
