"""Between one wide vector and several heads. Head h owns the columns h*d to (h+1)*d."""

from refmodels.numerics import exact
from refmodels.op import Array, Float, op


@op(error=exact(), laws=("rowwise",))
def split_heads(x: Float[Array, "b t n"], num_heads: int) -> Float[Array, "b t h d"]:
    """Cut the last axis into `num_heads` heads."""
    if x.shape[-1] % num_heads:
        raise ValueError(f"split_heads: x[b t n] has n = {x.shape[-1]}, wanted a multiple of num_heads = {num_heads}")
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


@op(error=exact(), laws=("rowwise",))
def merge_heads(x: Float[Array, "b t h d"]) -> Float[Array, "b t n"]:
    """Lay the heads side by side again."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
