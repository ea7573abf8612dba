"""Attention without the matrix of all scores."""

from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops import attention as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.blocks import Block, Call
from refmodels_numba.layout import GIVEN_BIAS, NO_BIAS, STORED


def narrow_and_sure(
    query: Any, key: Any, value: Any, *_: Any, dropout_rate: float = 0.0, rng: Any = None, **__: Any
) -> bool | str:
    """float32, float16 and bfloat16, without dropout"""
    if any(part.dtype.name not in STORED for part in (query, key, value)):
        return "float64: the reference's"
    return "dropout draws: op by op" if rng is not None and dropout_rate > 0 else True


@kernel(ops.attention, when=narrow_and_sure)
def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    *,
    scale: float = 1.0,
    dropout_rate: float = 0.0,
    rng: Any = None,
) -> Array:
    """Eight queries of one head at a time, block of keys by block of keys."""
    batch, t, heads, size = query.shape
    if key.dtype != value.dtype:
        key, value = (part.astype(np.float32) for part in (key, value))
    dtype = value.dtype.name
    key, value = (part if part.shape[-1] < 2 or part.strides[-1] == part.itemsize else part.copy() for part in (key, value))
    block = Block(dtype)
    biased = {} if bias is None else {name: block.slot(name) for name in ("bias", "bias_batch", "bias_head", "bias_query")}
    block.attend(
        block.slot("x"),
        block.slot("key0"),
        block.slot("value0"),
        block.buffer("context", "rows", heads * size),
        heads,
        size,
        prefix="",
        kind=STORED[dtype],
        scale=float(scale),
        bias_kind=NO_BIAS if bias is None else GIVEN_BIAS,
        **biased,
    )
    call = Call(query.reshape(batch, t, heads * size))
    call.array("key0", key)
    call.array("value0", value)
    call.keys_values("", key, value, key.shape[1])
    call.mask("", mask)
    if bias is not None:
        call.bias(bias)
    context = call.run(block, team())["context"]
    return context.reshape(query.shape).astype(numpy_dtype(dtype))
