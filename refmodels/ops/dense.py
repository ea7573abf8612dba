"""Layers with weights, whatever form the weights have: plain, quantised, with a low-rank adapter beside them.

A layer's part of the parameter tree says which: `dense(x, **p["query"])` takes the product that its leaves ask for. The plain
products are in `linear`.
"""

from refmodels.op import Array, Float, Int, Params, op
from refmodels.ops.elementwise import add, scaled
from refmodels.ops.linear import embedding, linear, logits_from_embeddings, lora_product


@op(composite=True)
def dense(
    x: Float[Array, "*b k"],
    kernel: Float[Array, "k n"],
    bias: Float[Array, "n"] | None = None,
    lora_kernel_a: Float[Array, "k g r"] | None = None,
    lora_kernel_b: Float[Array, "r o"] | None = None,
    lora_scale: Float[Array, ""] | None = None,
    *,
    dtype: str | None = None,
) -> Float[Array, "*b n"]:
    """x @ kernel + bias, and with an adapter (Hu et al. 2021) lora_scale * (x @ a @ b) more, in the type of x or `dtype`."""
    y = linear(x, kernel, bias, dtype=dtype)
    if lora_kernel_a is None or lora_kernel_b is None or lora_scale is None:
        return y
    return add(y, lora_product(x, lora_kernel_a, lora_kernel_b, lora_scale, dtype=dtype))


@op(composite=True)
def token_vectors(token_ids: Int[Array, "*b"], p: Params, *, dtype: str) -> Float[Array, "*b n"]:
    """Each token's row of the table `embeddings`, in `dtype`."""
    return embedding(token_ids, p["embeddings"], dtype=dtype)


@op(composite=True)
def token_scores(x: Float[Array, "*b n"], p: Params, *, scale: float = 1.0) -> Float[Array, "*b v"]:
    """scale * (x @ transposed table `embeddings`), one score for each token; `reverse_embeddings`, if there, replaces it."""
    if "reverse_embeddings" in p:
        return dense(scaled(x, scale), p["reverse_embeddings"])
    return logits_from_embeddings(x, p["embeddings"], scale=scale)
