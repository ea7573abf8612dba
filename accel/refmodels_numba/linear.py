"""Products with matrices, packed or plain: a plain one is packed for the call."""

from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops import linear as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_numba import packing
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.layout import INTEGER, ROUND
from refmodels_numba.packing import Packed
from refmodels_numba.program import Program


def narrow_types(*arguments: Any, dtype: str | None = None, **others: Any) -> bool | str:
    """float32, float16 and bfloat16"""
    given = (part.dtype for part in (*arguments, *others.values()) if hasattr(part, "dtype"))
    return "float64: the reference's" if dtype == "float64" or np.float64 in given else True


def product(
    x: Array,
    weights: Packed,
    dtype: str,
    *,
    row_scales: Array | None = None,
    column_scale: Array | None = None,
    bias: Array | None = None,
    factor: float = 1.0,
) -> Array:
    """factor * (x @ weights) / scales + bias in `dtype`, as a program of one instruction."""
    count = int(np.prod(x.shape[:-1]))
    if weights.kind == INTEGER:
        given = np.zeros((count, weights.k + weights.k % 2), np.int16)
        given[:, : weights.k] = x.reshape(count, weights.k)
    else:
        given = np.ascontiguousarray(x, np.float32)
    program = Program()
    arguments = {"x": packing.address(given)}
    if row_scales is not None:
        row_scales = np.ascontiguousarray(row_scales, np.float32)
        arguments["row_scales"] = packing.address(row_scales)
    program.linear(
        program.slot("rows"),
        program.slot("x"),
        weights,
        program.buffer("y", "rows", weights.n),
        row_scales=0 if row_scales is None else program.slot("row_scales"),
        column_scale=column_scale,
        bias=bias,
        factor=factor,
        rounding=ROUND[dtype],
    )
    y = program.run(team(), {"rows": count}, arguments)["y"]
    return y.reshape(*x.shape[:-1], weights.n).astype(numpy_dtype(dtype), copy=False)


@kernel(ops.linear, when=narrow_types)
def linear(x: Array, kernel: Any, bias: Array | None = None, *, dtype: str | None = None) -> Array:
    """Of packed panels."""
    weights = kernel if isinstance(kernel, Packed) else packing.packed(kernel)
    return product(x, weights, dtype or x.dtype.name, bias=bias)


@kernel(ops.logits_from_embeddings, when=narrow_types)
def logits_from_embeddings(x: Array, embeddings: Any, *, scale: float = 1.0) -> Array:
    """Of panels of sixteen tokens."""
    weights = embeddings if isinstance(embeddings, Packed) else packing.packed(embeddings, by_rows=True)
    return product(x, weights, x.dtype.name, factor=scale)


def packed_table(ids: Any, embeddings: Any, *_: Any, **__: Any) -> bool | str:
    """packed tables"""
    return True if isinstance(embeddings, Packed) else "a plain table: NumPy looks up as fast"


@kernel(ops.embedding, when=packed_table)
def embedding(ids: Array, embeddings: Packed, *, dtype: str | None = None) -> Array:
    """Rows of a packed table."""
    check_ids(ids, embeddings)
    rows = embeddings.rows(ids.reshape(-1))
    return rows.reshape(*ids.shape, embeddings.k).astype(numpy_dtype(dtype) if dtype else embeddings.dtype)


def check_ids(ids: Array, table: Packed) -> None:
    """ValueError for ids that the table has no rows for."""
    if ids.size and not 0 <= ids.min() <= ids.max() < table.n:
        raise ValueError(f"embedding: ids are {ids.min()} to {ids.max()}, wanted 0 to {table.n - 1}")


@kernel(ops.lora_product, when=narrow_types)
def lora_product(x: Array, lora_kernel_a: Any, lora_kernel_b: Any, lora_scale: Array, *, dtype: str | None = None) -> Array:
    """Two products with packed panels."""
    _, groups, rank = lora_kernel_a.shape
    a = lora_kernel_a if isinstance(lora_kernel_a, Packed) else packing.packed(lora_kernel_a)
    b = lora_kernel_b if isinstance(lora_kernel_b, Packed) else packing.packed(lora_kernel_b)
    inner = product(x.astype(np.float32, copy=False), a, "float32")
    y = product(inner.reshape(*x.shape[:-1], groups, rank), b, "float32", factor=float(lora_scale))
    return y.reshape(*x.shape[:-1], groups * b.n).astype(numpy_dtype(dtype) if dtype else x.dtype)
