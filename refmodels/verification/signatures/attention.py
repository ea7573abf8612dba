"""Faults of attention: scores, position biases, masks, softmax, heads."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import OPS, Array, Op
from refmodels.ops.precision import wide
from refmodels.verification.signatures.fault import (
    Fault,
    Variant,
    changing,
    fault,
    instead,
    layer_of,
    leaves,
    place_of,
    replaced,
)
from refmodels.verification.signatures.fault import rounded as rounded_to

HALVES = ("bfloat16", "float16")

SCORES = "attention_scores"


def _head_size(arguments: dict[str, Any]) -> int:
    return int(arguments["query"].shape[-1])


def _scale(arguments: dict[str, Any]) -> float:
    return float(arguments.get("scale", 1.0))


SCORE_FAULTS = [
    fault(
        "scores-not-scaled",
        "The scores are not divided by sqrt(d): multiply query . key by head_dim**-0.5.",
        SCORES,
        instead(scale=1.0),
        families="opt bloom",
    ),
    fault(
        "scores-scaled",
        "The scores are divided by sqrt(d), which T5 does not do: leave the scale out.",
        SCORES,
        replaced(scale=lambda a: _head_size(a) ** -0.5),
        families="t5",
    ),
    fault(
        "scale-applied-twice",
        "The scores are divided by d: 1/sqrt(d) is applied twice, perhaps to the query and again to the product.",
        SCORES,
        replaced(scale=lambda a: _scale(a) ** 2),
        families="opt bloom",
    ),
    fault(
        "scale-of-hidden-size",
        "The scores are divided by the root of the hidden size: take that of one head's size.",
        SCORES,
        replaced(scale=lambda a: (a["query"].shape[-1] * a["query"].shape[-2]) ** -0.5),
    ),
    fault(
        "bias-scaled-too",
        "The position bias is multiplied by 1/sqrt(d) with the scores: add it after scaling, as it is.",
        SCORES,
        replaced(
            scale=lambda a: _head_size(a) ** -0.5,
            bias=lambda a: None if a.get("bias") is None else a["bias"] * _head_size(a) ** -0.5,
        ),
        families="t5 bloom",
    ),
]

# -- position biases --------------------------------------------------------------------------------------------------------


def _with_distances(change: Callable[[Array, dict[str, Any]], Array]) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    """Buckets of changed distances: `change` is given key - query."""

    def changed(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        relative = np.arange(arguments["keys"]) - arguments["positions"][:, :, None]
        relative = change(relative, arguments)
        low, high = int(relative.min(initial=0)), int(relative.max(initial=0))
        one_row = run(
            **{**arguments, "positions": np.array([[-low]]), "keys": high - low + 1}
        )  # distance low, low + 1, ... high
        return one_row[0, 0][relative - low]

    return changed


def _rounding_up(relative: Array, arguments: dict[str, Any]) -> Array:
    """Past the exact buckets a distance that begins a bucket is put into the one before."""
    side = 16 if arguments["bidirectional"] else 32
    distance = np.abs(relative)
    return np.where(distance > side // 2, np.sign(relative) * (distance - 1), relative)


def _cross_bias(bidirectional: bool) -> Callable[[Backbone, Mapping[str, Any]], Variant]:
    def made(model: Backbone, inputs: Mapping[str, Any]) -> Variant:
        table = model.params["decoder"]["layers"][0]["self_attention"]["relative_attention_bias"]["embeddings"]

        def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
            query, keys = arguments["query"], arguments["key"].shape[1]
            buckets = OPS["relative_position_buckets"].reference(
                np.arange(query.shape[1])[None], keys, bidirectional=bidirectional
            )
            bias = OPS["relative_position_bias"].reference(buckets, table.astype(wide(query).dtype))
            return run(**{**arguments, "bias": bias})

        detail = "with bidirectional buckets" if bidirectional else "with causal buckets"
        return Variant(changing([SCORES], change, lambda name: "cross_attention" in name), detail)

    return made


def _other_table(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    def edit(op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        if op.name != "relative_position_bias":
            return run(**arguments)
        mine, _, rest = place_of(name).partition(".")
        other = leaves(model, f"{'decoder' if mine == 'encoder' else 'encoder'}.{rest}")
        table = arguments["embeddings"]
        return run(**{**arguments, "embeddings": other["embeddings"].astype(table.dtype) if other else table})

    yield Variant(edit)


def _slopes(number: int, first: float = 1.0) -> Array:
    return np.asarray(2.0 ** (-8.0 * (np.arange(number) + first) / number))


def _reversed_slopes(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    return run(**arguments)[::-1].copy()


def _next_power(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    return _slopes(2 ** math.ceil(math.log2(arguments["num_heads"])))[: arguments["num_heads"]]


def _rounded_alibi(dtype: str, from_end: str, *, slopes_too: bool) -> Callable[[dict[str, Any], Callable[..., Any]], Any]:
    """The bias as it is often formed: in half precision, all of it or its result alone, and from one end of the keys."""

    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        positions, keys = arguments["positions"], arguments["keys"]
        origin = {"first": 0, "last": keys - 1, "query": positions[:, :, None]}[from_end]
        relative = np.broadcast_to(np.arange(keys) - origin, (*positions.shape, keys)).astype(np.float64)
        slopes = arguments["slopes"].astype(np.float64)
        if slopes_too:
            relative, slopes = rounded_to(relative, dtype), rounded_to(slopes, dtype)
        bias = rounded_to(slopes[:, None, None] * relative[:, None], dtype)
        return bias.astype(arguments.get("dtype", "float32"))

    return change


BIAS_FAULTS = [
    fault(
        "causal-buckets-in-encoder",
        "The encoder's relative positions use the decoder's buckets: they must be bidirectional.",
        "relative_position_buckets",
        replaced(bidirectional=lambda a: False),
        families="t5",
        where=lambda name: name.startswith("t5_encoder"),
    ),
    fault(
        "bidirectional-buckets-in-decoder",
        "The decoder's relative positions use the encoder's buckets: they must not be bidirectional.",
        "relative_position_buckets",
        replaced(bidirectional=lambda a: True),
        families="t5",
        where=lambda name: not name.startswith("t5_encoder"),
    ),
    fault(
        "bucket-off-by-one",
        "Relative positions fall into a bucket beside their own.",
        "relative_position_buckets",
        ("every distance is taken one larger", _with_distances(lambda relative, a: relative - 1)),
        ("every distance is taken one smaller", _with_distances(lambda relative, a: relative + 1)),
        ("a distance that begins a logarithmic bucket is put into the one before", _with_distances(_rounding_up)),
        families="t5",
    ),
    fault(
        "relative-position-sign",
        "Relative positions have the wrong sign: they are key - query.",
        "relative_position_buckets",
        _with_distances(lambda relative, a: -relative),
        families="t5",
    ),
    fault(
        "bucket-distance-wrong",
        "The logarithmic buckets end at another distance: the largest is 128 for every published T5.",
        "relative_position_buckets",
        *[(f"{distance}", instead(max_distance=distance)) for distance in (20, 32, 64, 256, 512)],
        families="t5",
    ),
    fault(
        "bias-missing",
        "The position bias is not added to the scores.",
        SCORES,
        instead(bias=None),
        families="t5 bloom",
    ),
    fault(
        "bias-in-first-layer-only",
        "The position bias is added in the first layer only: its table serves every layer.",
        SCORES,
        instead(bias=None),
        families="t5 bloom",
        where=lambda name: layer_of(name) != 0,
    ),
    Fault(
        "bias-in-cross-attention",
        "Cross-attention has a position bias: T5 adds none there.",
        ("t5",),
        frozenset({SCORES}),
        lambda model, inputs: [_cross_bias(False)(model, inputs), _cross_bias(True)(model, inputs)],
    ),
    Fault(
        "bias-of-other-stack",
        "The position bias is looked up in the other stack's table: encoder and decoder have one each.",
        ("t5",),
        frozenset({"relative_position_bias"}),
        _other_table,
    ),
    fault(
        "slopes-reversed",
        "ALiBi's slopes stand in the wrong order: the first head has the steepest.",
        "alibi_slopes",
        _reversed_slopes,
        families="bloom",
    ),
    fault(
        "slopes-for-power-of-two-only",
        "ALiBi's slopes are those of a power of two of heads, which this model has not: take those of the largest power of two "
        "below, then every second one of the next.",
        "alibi_slopes",
        ("2**(-8 i/h) for h heads", lambda a, run: _slopes(a["num_heads"])),
        ("the first of the next power of two's", _next_power),
        families="bloom",
    ),
    fault(
        "slopes-off-by-one",
        "ALiBi's slopes begin one power too early: the first is 2**(-8/h), not 1.",
        "alibi_slopes",
        ("", lambda a, run: _slopes(a["num_heads"], 0.0)),
        families="bloom",
    ),
    fault(
        "alibi-sign",
        "ALiBi is added with the wrong sign: keys further back score lower.",
        "alibi_bias",
        lambda a, run: -run(**a),
        families="bloom",
    ),
    fault(
        "alibi-in-half-precision",
        "ALiBi is formed in half precision, where distant keys share a bias: form it in float32, relative to the query.",
        "alibi_bias",
        *[
            (
                f"in {dtype}, counted from the {end}{' key' * (end != 'query')}",
                _rounded_alibi(dtype, end, slopes_too=slopes_too),
            )
            for dtype in HALVES
            for end in ("first", "last", "query")
            for slopes_too in (True, False)
        ],
        families="bloom",
    ),
]

FAULTS: list[Fault] = [*SCORE_FAULTS, *BIAS_FAULTS]
