"""Faults of heads: how many, and where one vector becomes several and back."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.verification.signatures.fault import Change, Fault, Variant, changing, fault, replaced


def _with_heads(count: int) -> Change:
    return replaced(config=lambda a: replace(a["config"], num_heads=count))


def _head_counts(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    """The other numbers of heads that fit, down to a quarter and up to four times the right one."""
    right, width = model.config.num_heads, model.config.hidden_dim
    for count in range(-(-right // 4), min(4 * right, width) + 1):
        if width % count == 0 and count != right:
            yield Variant(changing(_CONFIGURED, _with_heads(count)), f"{count} in place of {right}")


_CONFIGURED = [f"{model}_{part}" for model in ("opt", "bloom") for part in ("attention", "decoder_layer", "backbone")]


def _split_by_size(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    x, heads = arguments["x"], arguments["num_heads"]
    return np.swapaxes(x.reshape(*x.shape[:2], x.shape[2] // heads, heads), -1, -2)


def _merged_by_size(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    return run(np.swapaxes(arguments["x"], -1, -2))


def _split_without_transposing(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    x, heads = arguments["x"], arguments["num_heads"]
    return x.reshape(len(x), heads, x.shape[1], x.shape[2] // heads).transpose(0, 2, 1, 3)


def _merged_without_transposing(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    x = arguments["x"]
    return x.transpose(0, 2, 1, 3).reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def _both(split: Any, merge: Any) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    return lambda arguments, run: (split if "num_heads" in arguments else merge)(arguments, run)


def _only(split: Any, merge: Any) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    def untouched(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        return run(**arguments)

    return _both(split or untouched, merge or untouched)


FAULTS: list[Fault] = [
    Fault(
        "head-count-wrong",
        "The number of heads is wrong.",
        ("opt", "bloom"),
        frozenset({"split_heads", "attention_scores", "alibi_slopes"}),
        _head_counts,
    ),
    fault(
        "head-order",
        "Columns are dealt out to heads one by one: head h owns the columns h*d to (h+1)*d.",
        "split_heads merge_heads",
        ("where heads are split", _only(_split_by_size, None)),
        ("where heads are merged", _only(None, _merged_by_size)),
        ("where heads are split and merged", _both(_split_by_size, _merged_by_size)),
    ),
    fault(
        "heads-not-transposed",
        "A reshape between (b, t, h, d) and (b, h, t, d) stands where a transpose belongs: positions and heads are mixed.",
        "split_heads merge_heads",
        ("where heads are split", _only(_split_without_transposing, None)),
        ("where heads are merged", _only(None, _merged_without_transposing)),
        ("where heads are split and merged", _both(_split_without_transposing, _merged_without_transposing)),
    ),
]
