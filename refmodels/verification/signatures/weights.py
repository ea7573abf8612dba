"""Faults of weights: the right numbers in the wrong place, and products of the wrong precision."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array, Op
from refmodels.ops.precision import wide
from refmodels.verification.run import Edit
from refmodels.verification.signatures.fault import (
    Change,
    Fault,
    Variant,
    changing,
    fault,
    layer_of,
    leaves,
    place_of,
    places,
    replaced,
    rounded,
)

PARTS = ("query", "key", "value")


def _from_elsewhere(model: Backbone, elsewhere: Callable[[str], str]) -> Edit:
    """Every op that has weights takes them from another place of the same shapes, where there is one."""

    def edit(op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        if op.name not in WEIGHTED:
            return run(**arguments)
        here, there = leaves(model, place_of(name)), leaves(model, elsewhere(place_of(name)))
        if here is None or there is None:
            return run(**arguments)
        other = {
            key: there[key].astype(value.dtype)
            for key, value in arguments.items()
            if key in here and isinstance(value, np.ndarray) and key in there and there[key].shape == value.shape
        }
        return run(**{**arguments, **other})

    return edit


WEIGHTED = frozenset({"linear", "layer_norm", "rms_norm"})


def _exchanging(model: Backbone, order: Mapping[str, str]) -> Edit:
    """`order`: part of an attention -> the part whose weights it has."""

    def elsewhere(place: str) -> str:
        before, _, part = place.rpartition(".")
        return f"{before}.{order[part]}" if part in order and before.endswith("attention") else place

    return _from_elsewhere(model, elsewhere)


def swapped_scores(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    """key . query in place of query . key."""
    return run(**{**arguments, "query": arguments["key"], "key": arguments["query"]})


def swapped_context(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    """Attention that compares the values and averages the keys."""
    return run(**{**arguments, "key": arguments["value"], "value": arguments["key"]})


def _query_key(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    yield Variant(_exchanging(model, {"query": "key", "key": "query"}), "each has the other's weights")
    yield Variant(changing(["attention_scores"], swapped_scores), "the scores are transposed")


def _key_value(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    yield Variant(_exchanging(model, {"key": "value", "value": "key"}), "each has the other's weights")
    yield Variant(changing(["attention"], swapped_context), "where attention is called")


def _qkv_order(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    for order in (("value", "key", "query"), ("key", "value", "query"), ("value", "query", "key")):
        exchanged = dict(zip(PARTS, order, strict=True))
        yield Variant(_exchanging(model, exchanged), f"query, key, value have the weights of {', '.join(order)}")


def _interleaved(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    """One matrix of queries, keys and values, read in another order of its columns than it was written in."""
    heads = model.config.num_heads

    def blocked(parts: list[Array], number: int) -> Array:
        *rows, width = parts[0].shape
        fused = np.stack([part.reshape(*rows, heads, width // heads) for part in parts], -2)  # (..., h, 3, d)
        return fused.reshape(*rows, 3, width)[..., number, :]

    def interleaved(parts: list[Array], number: int) -> Array:
        *rows, width = parts[0].shape
        fused = np.stack(parts, -2).reshape(*rows, heads, 3, width // heads)
        return fused[..., number, :].reshape(*rows, width)

    def misread(read: Callable[[list[Array], int], Array]) -> Edit:
        def edit(op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
            before, _, part = place_of(name).rpartition(".")
            if op.name != "linear" or part not in PARTS or not before.endswith("self_attention"):
                return run(**arguments)
            found = [leaves(model, f"{before}.{each}") or {} for each in PARTS]
            other = {
                key: read([leaf[key].astype(arguments[key].dtype) for leaf in found], PARTS.index(part))
                for key in ("kernel", "bias")
                if isinstance(arguments.get(key), np.ndarray)
            }
            return run(**{**arguments, **other})

        return edit

    yield Variant(misread(blocked), "written head by head, read as three blocks")
    yield Variant(misread(interleaved), "written as three blocks, read head by head")


def _of_another_layer(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    count = model.config.num_layers
    maps: dict[str, Callable[[int], int]] = {
        "the layer after": lambda i: min(i + 1, count - 1),
        "the layer before": lambda i: max(i - 1, 0),
        "layer 0": lambda i: 0,
        f"layer {count - 1}": lambda i: count - 1,
        "the layers in reverse order": lambda i: count - 1 - i,
    }
    seen = set()
    for detail, other in maps.items():
        order = tuple(other(i) for i in range(count))
        if order in seen or order == tuple(range(count)):
            continue
        seen.add(order)

        def elsewhere(place: str, order: tuple[int, ...] = order) -> str:
            number = layer_of(place)
            return place if number is None else re.sub(r"\blayers\.\d+\b", f"layers.{order[number]}", place)

        yield Variant(_from_elsewhere(model, elsewhere), f"those of {detail}")


def _named_parts(model: Backbone, wanted: Callable[[Mapping[str, Array]], bool]) -> list[str]:
    """Names of the dense layers whose leaves are as wanted: `query`, `output`, ..."""
    found = {place.rpartition(".")[2]: None for place, part in places(model.params) if "kernel" in part and wanted(part)}
    return list(found)


def _is_part(part: str) -> Callable[[str], bool]:
    return lambda name: place_of(name).rpartition(".")[2] == part


def _each(op_name: str, change: Change, names: list[str]) -> Iterator[Variant]:
    """The change in every dense layer, then in those of one name alone."""
    if names:
        yield Variant(changing([op_name], change), "every dense layer")
    for part in names if len(names) > 1 else ():
        yield Variant(changing([op_name], change, _is_part(part)), part)


def _transposed(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    kernel = arguments["kernel"]
    return run(**{**arguments, "kernel": kernel.T}) if kernel.shape[0] == kernel.shape[1] else run(**arguments)


def _reshaped(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    """A kernel of (out, in) read as one of (in, out) without turning it."""
    kernel = arguments["kernel"]
    return run(**{**arguments, "kernel": kernel.T.reshape(kernel.shape)})


def _products_in(dtype: str) -> Change:
    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        keep = _tf32 if dtype == "tf32" else lambda array: rounded(array, dtype)
        return run(**{**arguments, "x": keep(wide(arguments["x"])), "kernel": keep(wide(arguments["kernel"]))})

    return change


def _tf32(array: Array) -> Array:
    """Rounded to 10 bits behind the leading one."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.rint(mantissa * 2.0**11) / 2.0**11, exponent).astype(array.dtype)


LONGEST_SUM = 1024
"""Longer sums are not formed term by term."""


def _summed_in(dtype: str) -> Change:
    """Products and sums rounded one after the other."""

    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        x, kernel, bias = wide(arguments["x"]), wide(arguments["kernel"]), arguments.get("bias")
        if len(kernel) > LONGEST_SUM:
            raise ValueError(f"sums of {len(kernel)} terms take too long one by one")
        total = np.zeros((*x.shape[:-1], kernel.shape[1]), x.dtype)
        with np.errstate(all="ignore"):
            for k in range(kernel.shape[0]):
                total = rounded(total + rounded(x[..., k, None] * kernel[k], dtype), dtype)
            if bias is not None:
                total = rounded(total + wide(bias), dtype)
        return total.astype(arguments["x"].dtype)

    return change


FAULTS: list[Fault] = [
    Fault(
        "kernel-transposed",
        "A kernel is transposed: a stored weight of (out, in) must be turned into (in, out) once.",
        ops=frozenset({"linear"}),
        variants=lambda model, inputs: [
            *_each("linear", _transposed, _named_parts(model, lambda p: p["kernel"].shape[0] == p["kernel"].shape[1])),
            Variant(changing(["linear"], _reshaped), "every weight reshaped where it should be transposed"),
        ],
    ),
    Fault(
        "query-key-swapped",
        "Query and key are exchanged.",
        ops=frozenset({"linear", "attention_scores"}),
        variants=_query_key,
    ),
    Fault(
        "key-value-swapped",
        "Key and value are exchanged.",
        ops=frozenset({"linear", "attention"}),
        variants=_key_value,
    ),
    Fault(
        "qkv-order",
        "The parts of a fused matrix of queries, keys and values are taken in the wrong order.",
        ops=frozenset({"linear"}),
        variants=_qkv_order,
    ),
    Fault(
        "qkv-interleaved",
        "A fused matrix of queries, keys and values is read in the wrong layout: BLOOM's rows go head by head, in each head "
        "query, key, value.",
        ops=frozenset({"linear"}),
        variants=_interleaved,
    ),
    Fault(
        "dense-bias-missing",
        "A dense layer's bias is not added.",
        ("opt", "bloom"),
        frozenset({"linear"}),
        lambda model, inputs: _each(
            "linear", lambda a, run: run(**{**a, "bias": None}), _named_parts(model, lambda p: p.get("bias") is not None)
        ),
    ),
    fault(
        "dense-bias-twice",
        "Every dense layer's bias is added twice.",
        "linear",
        replaced(bias=lambda a: None if a.get("bias") is None else 2 * a["bias"]),
        families="opt bloom",
    ),
    Fault(
        "weights-of-another-layer",
        "A layer has the weights of another one.",
        ops=WEIGHTED,
        variants=_of_another_layer,
    ),
    fault(
        "half-precision-products",
        "The inputs of matrix products are rounded to a shorter type than declared (as with TF32 or autocast switched on).",
        "linear",
        *[(dtype, _products_in(dtype)) for dtype in ("tf32", "bfloat16", "float16")],
    ),
    fault(
        "half-precision-accumulation",
        "Matrix products are summed in half precision: accumulate in float32.",
        "linear",
        *[(dtype, _summed_in(dtype)) for dtype in ("bfloat16", "float16")],
    ),
]
