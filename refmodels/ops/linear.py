"""Products with a weight matrix: dense layers, embeddings, logits."""

import math

import numpy as np

from refmodels.numerics import exact, multilinear
from refmodels.op import Array, Float, Int, op
from refmodels.ops.precision import narrow, numpy_dtype, wide


@op(error=multilinear(), laws=("rowwise",))
def linear(
    x: Float[Array, "*b k"],
    kernel: Float[Array, "k n"],
    bias: Float[Array, "n"] | None = None,
    *,
    dtype: str | None = None,
) -> Float[Array, "*b n"]:
    """A dense layer: x @ kernel + bias, in the type of x or, if given, `dtype`."""
    rows = wide(x).reshape(math.prod(x.shape[:-1]), kernel.shape[0])  # one matrix product, however many leading axes
    y = (rows @ wide(kernel)).reshape(*x.shape[:-1], kernel.shape[1])
    if bias is not None:
        y = y + wide(bias)
    return narrow(y, numpy_dtype(dtype) if dtype else x.dtype)


@op(error=exact(), laws=("rowwise",))
def embedding(ids: Int[Array, "*b"], embeddings: Float[Array, "v n"], *, dtype: str | None = None) -> Float[Array, "*b n"]:
    """Row ids[...] of the table, in the table's type or, if given, `dtype`. Ids count from 0 and are below v."""
    if ids.size and not 0 <= ids.min() <= ids.max() < len(embeddings):
        raise ValueError(f"embedding: ids are {ids.min()} to {ids.max()}, wanted 0 to {len(embeddings) - 1}")
    return narrow(embeddings[ids], numpy_dtype(dtype) if dtype else embeddings.dtype)


@op(error=multilinear(), laws=("rowwise",))
def logits_from_embeddings(
    x: Float[Array, "*b n"], embeddings: Float[Array, "v n"], *, scale: float = 1.0
) -> Float[Array, "*b v"]:
    """A tied head: scale * (x @ transposed table), one score for each entry of the vocabulary."""
    rows = wide(x).reshape(math.prod(x.shape[:-1]), embeddings.shape[1])
    y = rows @ wide(embeddings).T * scale
    return narrow(y.reshape(*x.shape[:-1], embeddings.shape[0]), x.dtype)


@op(error=exact())
def last_rows(x: Float[Array, "b t n"], lengths: Int[Array, "b"] | None = None) -> Float[Array, "b n"]:
    """The last real position of every row, x[i, lengths[i] - 1]; without lengths the last position."""
    if lengths is None:
        return x[:, -1]
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= x.shape[1]:
        raise ValueError(f"last_rows: lengths are {lengths.min()} to {lengths.max()}, wanted 1 to {x.shape[1]}")
    return x[np.arange(len(x)), lengths - 1]


@op(laws=("rowwise",), source="Hu et al. 2021; Keras' EinsumDense for heads")
def lora_product(
    x: Float[Array, "*b k"],
    lora_kernel_a: Float[Array, "k g r"],
    lora_kernel_b: Float[Array, "r o"],
    lora_scale: Float[Array, ""],
    *,
    dtype: str | None = None,
) -> Float[Array, "*b n"]:
    """lora_scale * (x @ a @ b) for each of g groups of columns, which share b: n = g * o, and r is the rank.

    An adapter of a plain matrix has one group. Keras' adapter of a matrix that makes heads has one for each head.
    """
    size, groups, rank = lora_kernel_a.shape
    count = math.prod(x.shape[:-1])
    inner = wide(x).reshape(count, size) @ wide(lora_kernel_a).reshape(size, groups * rank)
    y = inner.reshape(count * groups, rank) @ wide(lora_kernel_b) * wide(lora_scale)
    return narrow(y.reshape(*x.shape[:-1], groups * lora_kernel_b.shape[1]), numpy_dtype(dtype) if dtype else x.dtype)


@op(source="Hu et al. 2021, section 4.1")
def lora_merged(
    kernel: Float[Array, "k n"],
    lora_kernel_a: Float[Array, "k g r"],
    lora_kernel_b: Float[Array, "r o"],
    lora_scale: Float[Array, ""],
) -> Float[Array, "k n"]:
    """kernel + lora_scale * (a @ b), the groups side by side: the kernel that needs no adapter. In the kernel's type."""
    size, groups, rank = lora_kernel_a.shape
    rows = wide(lora_kernel_a).reshape(size * groups, rank)
    change = wide(lora_scale) * (rows @ wide(lora_kernel_b))
    return narrow(wide(kernel) + change.reshape(kernel.shape), kernel.dtype)
