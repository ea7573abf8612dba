"""Faults of masks and of the softmax."""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops.precision import wide
from refmodels.verification.signatures.fault import Change, Fault, fault, replaced
from refmodels.verification.signatures.fault import rounded as rounded_to

HALVES = ("bfloat16", "float16")


def _everything_permitted(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    positions, keys = arguments["positions"], arguments["key_mask"]
    return np.broadcast_to(keys[:, None, None, :], (len(keys), 1, positions.shape[1], keys.shape[1])).copy()


def _real_are(make: Callable[[Array], Array]) -> Change:
    """The mask of the real keys, by whichever name the op has it, made from the right one."""

    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        key = "key_mask" if "key_mask" in arguments else "padding_mask"
        return run(**{**arguments, key: make(arguments[key])})

    return change


def _if_padding_mask(change: Change) -> Change:
    return lambda arguments, run: change(arguments, run) if "padding_mask" in arguments else run(**arguments)


def _is_cross_mask(name: str) -> bool:
    return name.startswith("t5_decoder") and "key_mask" in name


def _added(constant: float) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        scores, mask = wide(arguments["scores"]), arguments["mask"]
        return run(scores + np.where(mask, 0.0, constant).astype(scores.dtype), np.ones_like(mask))

    return change


def _in_place(constant: float) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        scores, mask = wide(arguments["scores"]), arguments["mask"]
        return run(np.where(mask, scores, scores.dtype.type(constant)), np.ones_like(mask))

    return change


def _masked_afterwards(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    return run(arguments["scores"], np.ones_like(arguments["mask"])) * arguments["mask"]


def _along(axis: int) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        scores = wide(arguments["scores"])
        permitted = np.where(arguments["mask"], scores, np.finfo(np.float32).min)
        weights = np.exp(permitted - permitted.max(axis, keepdims=True))
        return weights / weights.sum(axis, keepdims=True)

    return change


def _soft_in(dtype: str) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        return rounded_to(run(rounded_to(wide(arguments["scores"]), dtype), arguments["mask"]), dtype)

    return change


FAULTS: list[Fault] = [
    fault(
        "causal-mask-missing",
        "Queries see the keys after them: permit key s to query t only if s <= t.",
        "causal_mask",
        _everything_permitted,
    ),
    fault(
        "causal-mask-off-by-one",
        "The causal mask is off by one: permit key s to query t if s <= t.",
        "causal_mask",
        ("a query sees the key after it", replaced(positions=lambda a: a["positions"] + 1)),
        ("a query does not see its own key", replaced(positions=lambda a: a["positions"] - 1)),
    ),
    fault(
        "padding-leaks",
        "Padding is attended to: exclude the keys of padding from every softmax.",
        "causal_mask key_mask",
        _real_are(np.ones_like),
        where=lambda name: not _is_cross_mask(name),
    ),
    fault(
        "encoder-mask-ignored-in-cross-attention",
        "Cross-attention sees the encoder's padding: give it the encoder's padding mask.",
        "key_mask",
        _real_are(np.ones_like),
        families="t5",
        where=_is_cross_mask,
    ),
    fault(
        "mask-inverted",
        "The padding mask is taken the wrong way round: 1 is a real token and 0 padding.",
        "causal_mask key_mask",
        ("in every attention", _real_are(np.logical_not)),
        ("the encoder's", _if_padding_mask(_real_are(np.logical_not))),
    ),
    fault(
        "mask-additive-weak",
        "Forbidden keys keep some weight, as too small a number is put on their scores: exclude them.",
        "masked_softmax",
        *[(f"{constant:g} is added", _added(constant)) for constant in (-1.0, -10.0, -100.0, -1e3, -1e4)],
        *[(f"{constant:g} stands in their place", _in_place(constant)) for constant in (0.0, -10.0, -100.0, -1e3, -1e4)],
    ),
    fault(
        "mask-after-softmax",
        "Weights are set to zero after the softmax, so that they no longer add up to 1: mask the scores.",
        "masked_softmax",
        _masked_afterwards,
    ),
    fault(
        "softmax-wrong-axis",
        "The softmax runs along the wrong axis: weights add up to 1 over the keys.",
        "masked_softmax",
        ("over the queries", _along(-2)),
        ("over the heads", _along(-3)),
    ),
    fault(
        "softmax-in-half-precision",
        "The softmax runs in half precision: compute it in float32.",
        "masked_softmax",
        *[(dtype, _soft_in(dtype)) for dtype in HALVES],
    ),
]
