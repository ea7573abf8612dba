"""Layers with weights, whatever form the weights have: plain, quantised, with a low-rank adapter beside them.

A layer's part of the parameter tree says which: `dense(x, **p["query"])` takes the product that its leaves ask for. The plain
products are in `linear`, the quantised ones in `quantize`.

    kernel                                          plain
    kernel, kernel_scale                            int8; the inputs are quantised too, row by row
    kernel, kernel_weight_only_scale                int8, for the weights alone
    kernel, kernel_scale, kernel_zero, g_idx        int4 in groups

and the same for the tables `embeddings` and `reverse_embeddings`.
"""

from refmodels.op import Array, Float, Int, Params, op
from refmodels.ops.elementwise import add, scaled
from refmodels.ops.linear import embedding, linear, logits_from_embeddings, lora_product
from refmodels.ops.quantize import (
    embedding_int4,
    embedding_int8,
    linear_int4,
    linear_int8,
    linear_weight_int8,
    logits_int4,
    logits_int8,
    logits_weight_int8,
    quantize_rows,
    row_scale,
)


@op(composite=True)
def dense(
    x: Float[Array, "*b k"],
    kernel: Array,
    bias: Float[Array, "n"] | None = None,
    lora_kernel_a: Float[Array, "k g r"] | None = None,
    lora_kernel_b: Float[Array, "r o"] | None = None,
    lora_scale: Float[Array, ""] | None = None,
    kernel_scale: Array | None = None,
    kernel_weight_only_scale: Float[Array, "n"] | None = None,
    kernel_zero: Array | None = None,
    g_idx: Float[Array, "k"] | None = None,
    *,
    dtype: str | None = None,
) -> Float[Array, "*b n"]:
    """x @ kernel + bias, and with an adapter (Hu et al. 2021) lora_scale * (x @ a @ b) more, in the type of x or `dtype`.

    Which product that is, the leaves say: see the top of this file.
    """
    if kernel_weight_only_scale is not None:
        y = linear_weight_int8(x, kernel, kernel_weight_only_scale, bias, dtype=dtype)
    elif kernel_scale is None:
        y = linear(x, kernel, bias, dtype=dtype)
    elif kernel_zero is not None and g_idx is not None:
        y = linear_int4(x, kernel, kernel_scale, kernel_zero, g_idx, bias, dtype=dtype)
    else:
        scale = row_scale(x)
        y = linear_int8(quantize_rows(x, scale), scale, kernel, kernel_scale, bias, dtype=dtype or x.dtype.name)
    if lora_kernel_a is None or lora_kernel_b is None or lora_scale is None:
        return y
    return add(y, lora_product(x, lora_kernel_a, lora_kernel_b, lora_scale, dtype=dtype))


@op(composite=True)
def token_vectors(token_ids: Int[Array, "*b"], p: Params, *, dtype: str) -> Float[Array, "*b n"]:
    """Each token's row of the table `embeddings`, in `dtype`."""
    if "embeddings_zero" in p:
        table, scale, zero = p["embeddings"], p["embeddings_scale"], p["embeddings_zero"]
        return embedding_int4(token_ids, table, scale, zero, p["g_idx"], dtype=dtype)
    if "embeddings_scale" in p:
        return embedding_int8(token_ids, p["embeddings"], p["embeddings_scale"], dtype=dtype)
    if "embeddings_weight_only_scale" in p:
        return embedding_int8(token_ids, p["embeddings"], p["embeddings_weight_only_scale"], dtype=dtype)
    return embedding(token_ids, p["embeddings"], dtype=dtype)


@op(composite=True)
def token_scores(x: Float[Array, "*b n"], p: Params, *, scale: float = 1.0) -> Float[Array, "*b v"]:
    """scale * (x @ transposed table `embeddings`), one score for each token; `reverse_embeddings`, if there, replaces it."""
    if "reverse_embeddings_zero" in p:
        table, table_scale, zero = p["reverse_embeddings"], p["reverse_embeddings_scale"], p["reverse_embeddings_zero"]
        return linear_int4(scaled(x, scale), table, table_scale, zero, p["g_idx"], axis=0)
    if "reverse_embeddings_scale" in p:
        return dense(scaled(x, scale), p["reverse_embeddings"], kernel_scale=p["reverse_embeddings_scale"])
    if "reverse_embeddings_weight_only_scale" in p:
        return linear_weight_int8(scaled(x, scale), p["reverse_embeddings"], p["reverse_embeddings_weight_only_scale"])
    if "reverse_embeddings" in p:
        return dense(scaled(x, scale), p["reverse_embeddings"])
    if "embeddings_zero" in p:
        table, table_scale, zero = p["embeddings"], p["embeddings_scale"], p["embeddings_zero"]
        return logits_int4(scaled(x, scale), table, table_scale, zero, p["g_idx"])
    if "embeddings_scale" in p:
        h = scaled(x, scale)
        rows = row_scale(h)
        return logits_int8(quantize_rows(h, rows), rows, p["embeddings"], p["embeddings_scale"], dtype=h.dtype.name)
    if "embeddings_weight_only_scale" in p:
        return logits_weight_int8(scaled(x, scale), p["embeddings"], p["embeddings_weight_only_scale"])
    return logits_from_embeddings(x, p["embeddings"], scale=scale)
