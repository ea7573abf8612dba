"""Attention without the matrix of all scores."""

from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops import attention as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.blocks import Block, Call
from refmodels_numba.layout import GIVEN_BIAS, STORED
from refmodels_numba.linear import narrow_types


def narrow_and_sure(
    query: Any, key: Any, value: Any, *_: Any, dropout_rate: float = 0.0, rng: Any = None, **__: Any
) -> bool | str:
    """float32, float16 and bfloat16, without dropout"""
    if any(part.dtype.name not in STORED for part in (query, key, value)):
        return "float64: the reference's"
    return "dropout draws: op by op" if rng is not None and dropout_rate > 0 else True


def _readable(array: Array) -> Array:
    """Keys or values in a form that kernels read: the numbers of one head side by side."""
    return array if array.shape[-1] < 2 or array.strides[-1] == array.itemsize else array.copy()


def _biased(block: Block, bias: Array | None) -> dict[str, Any]:
    if bias is None:
        return {}
    return {"bias_kind": GIVEN_BIAS, **_slots(block, "bias", "bias_batch", "bias_head", "bias_query")}


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
    """QUERIES of one head at a time, block of keys by block of keys."""
    batch, t, heads, size = query.shape
    if key.dtype != value.dtype:
        key, value = (part.astype(np.float32) for part in (key, value))
    dtype = value.dtype.name
    key, value = _readable(key), _readable(value)
    block = Block(dtype)
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
        **_biased(block, bias),
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


@kernel(ops.attention_scores, when=narrow_types)
def attention_scores(query: Array, key: Array, bias: Array | None = None, *, scale: float = 1.0) -> Array:
    """One query of one head at a time."""
    batch, t, heads, size = query.shape
    key = _readable(key)
    block, call = Block("float32"), Call(query.reshape(batch, t, heads * size))
    s = key.shape[1]
    block.add(
        "scores",
        **_slots(block, "batch", "t", "s", "heads"),
        size=size,
        query=block.slot("x"),
        keys=block.slot("key0"),
        kind=STORED[key.dtype.name],
        scale=float(scale),
        out=block.buffer("scores", "rows", heads * s),
        **_slots(block, "key_batch", "key_position", "key_head"),
        **_biased(block, bias),
    )
    call.sizes["heads"] = heads
    call.array("key0", key)
    call.keys_values("", key, key, s)
    if bias is not None:
        call.bias(bias)
    return call.run(block, team())["scores"].reshape(batch, heads, t, s).copy()


@kernel(ops.masked_softmax, when=narrow_types)
def masked_softmax(scores: Array, mask: Array) -> Array:
    """One query of one head at a time."""
    batch, heads, t, s = scores.shape
    block, call = Block("float32"), Call(np.empty((batch, t, 0), np.float32))
    masks = _slots(block, "mask", "mask_batch", "mask_query")
    out = block.buffer("weights", "rows", heads * s)
    block.add("softmax", **_slots(block, "batch", "t", "s", "heads"), scores=block.slot("scores"), out=out, **masks)
    call.sizes |= {"heads": heads, "s": s}
    call.array("scores", np.ascontiguousarray(scores, np.float32))
    call.mask("", mask)
    return call.run(block, team())["weights"].reshape(scores.shape).copy()


@kernel(ops.attention_context, when=narrow_types)
def attention_context(weights: Array, value: Array) -> Array:
    """One query of one head at a time."""
    batch, heads, t, s = weights.shape
    value, size = _readable(value), value.shape[-1]
    block, call = Block(value.dtype.name), Call(np.empty((batch, t, 0), np.float32))
    block.add(
        "context",
        **_slots(block, "batch", "t", "s", "heads"),
        size=size,
        weights=block.slot("weights"),
        values=block.slot("value0"),
        kind=STORED[value.dtype.name],
        out=block.buffer("context", "rows", heads * size),
        rounding=block.rounding,
        **_slots(block, "value_batch", "value_position", "value_head"),
    )
    call.sizes["heads"] = heads
    call.array("weights", np.ascontiguousarray(weights, np.float32))
    call.array("value0", value)
    call.keys_values("", value, value, s)
    return call.run(block, team())["context"].reshape(batch, t, heads, size).astype(value.dtype)


def _slots(block: Block, *names: str) -> dict[str, Any]:
    return {name: block.slot(name) for name in names}
