"""What an op may be given beyond its shapes: one small table. Everything that is not in it comes from the annotations.

Examples of a primitive (and of the composites that take arrays alone) have each argument by its entry here, or by the name of
the argument, or else by its annotation: floating-point numbers, integers from 0 to 8, booleans.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.conformance.case import Inputs
from refmodels.conformance.drawing import Draw, Unsuitable
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.op import OPS, Array, Op, executing
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.quantize import row_scale
from refmodels.quantization import quantization, quantized_tree

Rule = Callable[[Draw, tuple[int, ...]], Any]
"""Makes an argument; it is given the shape of the annotation."""

OMITTED = object()
"""An argument that is left out of the call."""


def LATER(draw: Draw, shape: tuple[int, ...]) -> Any:  # noqa: N802 -- reads as the mark that it is
    """An argument that `THEN` makes, when the others are there."""
    raise AssertionError("made by THEN")


INFINITE, ANYTHING = (np.inf, -np.inf), (np.inf, -np.inf, np.nan)


def floats(**how: Any) -> Rule:
    """Floating-point numbers within a limit, with spikes, in another type: see `Draw.floats`."""
    return lambda draw, shape: draw.floats(*shape, **how)


def wide(**how: Any) -> Rule:
    """The same in float32, or for float64 in that."""
    return lambda draw, shape: draw.floats(*shape, dtype=wide_dtype(draw), **how)


def weights(limit: float = 1e3) -> Rule:
    """Parameters: of the type of the activations, or float32 as the mixed policies have it."""
    return lambda draw, shape: draw.floats(*shape, limit=limit, dtype=parameter_dtype(draw), centred=True)


def below(letter: str) -> Rule:
    """Integers below the size of a letter."""
    return lambda draw, shape: draw.ints(*shape, high=draw.size(letter))


def ints(low: int, high: int) -> Rule:
    """Integers from `low` on and below `high`."""
    return lambda draw, shape: draw.ints(*shape, low=low, high=high)


def int8s(low: int = -128, high: int = 128) -> Rule:
    """Quantised values."""
    return lambda draw, shape: draw.int8s(*shape, low=low, high=high)


def pick(*values: Any) -> Rule:
    """One of these."""
    return lambda draw, shape: draw.pick(*values)


def sized(letter: str, high: int | None = None) -> Rule:
    """The size of a letter as a number."""
    return lambda draw, shape: draw.size(letter, high=high)


def scales(dtype: str = "float32") -> Rule:
    """Positive numbers over several powers of ten."""
    return lambda draw, shape: draw.laid_out(np.asarray(10.0 ** draw.rng.uniform(-1, 3, shape), dtype))


def rows_from(*values: float) -> Rule:
    """One of these for each row, or left out."""
    return lambda draw, shape: draw.laid_out(draw.rng.choice(np.asarray(values), shape)) if draw.below(2) else OMITTED


def wide_dtype(draw: Draw) -> str:
    """The type of scores and biases."""
    return "float64" if draw.dtype == "float64" else "float32"


def parameter_dtype(draw: Draw) -> str:
    """The type of the parameters: that of the activations, or float32 as the mixed policies have it."""
    if draw.dtype in ("float32", "float64"):
        return draw.dtype
    return "float32" if draw.mixed_types else draw.dtype


# -- arguments that need more than a line -----------------------------------------------------------------------------------


def result_dtype(draw: Draw, shape: tuple[int, ...]) -> Any:
    """`dtype=` where it may be left out."""
    return draw.pick(OMITTED, draw.dtype, *(() if draw.dtype == "float64" else ("float32",)))


def attention_mask(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Booleans (b or 1, 1, t or 1, s): all, ragged, causal and ragged, or any; some with rows that permit no key."""
    b, _, t, s = shape
    kind = draw.pick("all", "ragged", "causal", "any")
    mask = np.ones(shape, bool)
    keys = np.arange(s)
    if kind == "any":
        mask = draw.rng.random(shape) < draw.pick(0.5, 0.1, 0.9)
    if kind in ("ragged", "causal"):
        draw.features.add("ragged")
        mask &= keys < draw.rng.integers(min(1, s), s + 1, (b, 1, 1, 1))
    if kind == "causal":
        mask &= keys <= np.arange(t)[:, None] + max(s - t, 0)
    if draw.chance(4) and mask.size:
        mask[draw.rng.integers(b), :, draw.rng.integers(t)] = False
    if mask.size and not mask.any(-1).all():
        draw.features.add("fully masked")
    return draw.laid_out(mask)


def softmax_scores(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Scores with a few -inf among them; `masked_softmax` is repaired by `permitted_peaks`."""
    scores = np.array(draw.floats(*shape, limit=1e30))
    if draw.chance(3) and scores.size:
        draw.features.add("not finite")
        scores[draw.rng.random(shape) < 0.3] = -np.inf
    return scores


def permitted_peaks(draw: Draw, arguments: Inputs) -> None:
    """-inf is allowed anywhere but for the highest permitted score of a row."""
    scores, mask = arguments["scores"], arguments["mask"]
    permitted = np.broadcast_to(mask, scores.shape) & (scores > -np.inf)
    broken = np.broadcast_to(mask.any(-1, keepdims=True), permitted.shape) & ~permitted.any(-1, keepdims=True)
    scores[np.broadcast_to(broken, scores.shape)] = 0
    arguments["scores"] = draw.laid_out(scores)


def its_own_scale(draw: Draw, arguments: Inputs) -> None:
    """Nearly always the scale is that of the rows; and sometimes everything lies half way between two integers."""
    kind, x = draw.pick("own", "own", "given", "ties"), arguments["x"]
    if kind == "own":
        arguments["scale"] = row_scale.reference(x)
    if kind == "ties":
        arguments["x"] = draw.laid_out((draw.rng.integers(-9, 9, x.shape) / 2).astype(x.dtype))
        arguments["scale"] = np.ones(x.shape[:-1], np.float32)


def sometimes_not_finite(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Rows that may hold an infinity or NaN."""
    return draw.floats(*shape, spikes=ANYTHING if draw.chance(3) else ())


def generator(draw: Draw, shape: tuple[int, ...]) -> Any:
    """A generator of random numbers, sometimes."""
    return np.random.default_rng(7) if draw.chance(6) else OMITTED


def near_scores(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Scores of which several have a share worth drawing from; some are equal, and a few far away."""
    scores = draw.rng.standard_normal(shape) * draw.pick(1.0, 0.1, 3.0)
    if draw.spiky:
        for spike in (1.5, -50.0, -np.inf):
            scores[draw.rng.random(shape) < 0.15] = spike
        scores[:, :1] = np.where(np.isfinite(scores[:, :1]), scores[:, :1], 0.0)
    return draw.laid_out(scores.astype(numpy_dtype(draw.dtype)))


def modest(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Numbers of which several products stay within half precision's range, as they do in a model."""
    return draw.laid_out(np.asarray(draw.rng.standard_normal(shape) * min(draw.scale, 2.0), numpy_dtype(draw.dtype)))


def group_numbers(draw: Draw, shape: tuple[int, ...]) -> Array:
    """g_idx: the group of each input. The number of groups is the letter g."""
    block = draw.pick(3, 1, 2, 4, 8, 128)
    size = shape[0]
    draw.sizes["g"] = -(-size // block)
    return draw.laid_out((np.arange(size) // block).astype(np.float32))


def tied(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Scores; sometimes with equal ones."""
    logits = draw.floats(*shape, limit=1e4, spikes=(-np.inf,))
    return draw.laid_out(np.round(logits.astype(np.float64)).astype(logits.dtype)) if draw.chance(3) else logits


def token_history(draw: Draw, shape: tuple[int, ...]) -> Array:
    """Few different tokens, so that runs come twice."""
    return draw.ints(*shape, high=min(draw.size("v"), 3))


def packed_four_bits(draw: Draw, arguments: Inputs) -> None:
    """The packed kernel's rows or columns are half of k or n, by its axis."""
    k, n, axis = arguments["x"].shape[-1], draw.size("n"), arguments["axis"]
    rows, columns = (-(-k // 2), n) if axis == 0 else (k, -(-n // 2))
    arguments["kernel"] = draw.int8s(rows, columns)
    arguments["kernel_scale"] = scales()(draw, (draw.sizes["g"], n))
    zero = draw.int8s(draw.sizes["g"], n, low=-8, high=8)
    arguments["kernel_zero"] = zero.astype(np.float32) if draw.below(2) else zero


def packed_rows(draw: Draw, arguments: Inputs) -> None:
    """A packed table: half as many bytes as columns."""
    n = len(arguments["g_idx"])
    arguments["embeddings"] = draw.int8s(draw.size("v"), -(-n // 2))


def unpacked_size(draw: Draw, arguments: Inputs) -> None:
    """Of the last byte one number may be filling."""
    length = arguments["packed"].shape[arguments["axis"]]
    arguments["size"] = max(2 * length - draw.below(2), 0)


def heads_of(draw: Draw, arguments: Inputs) -> None:
    """The last axis is a multiple of the heads."""
    b, t, h, d = (draw.size(letter) for letter in "bthd")
    arguments["x"], arguments["num_heads"] = draw.floats(b, t, h * d, spikes=ANYTHING), max(h, 1)


def adapter_groups(draw: Draw, arguments: Inputs) -> None:
    """kernel (k, g * o) beside a (k, g, r) and b (r, o); adapters are float32 or wider."""
    (k, g, _), (_, o) = arguments["lora_kernel_a"].shape, arguments["lora_kernel_b"].shape
    arguments["kernel"] = draw.floats(k, g * o, limit=1e3, centred=True)


def some_dense_form(draw: Draw, arguments: Inputs) -> None:
    """The leaves of a dense layer: plain or quantised, with an adapter or without."""
    x, n = arguments["x"], draw.size("n")
    k, plain = x.shape[-1], np.array(modest(draw, (x.shape[-1], n)), np.float32)
    arguments |= dict.fromkeys(("kernel_scale", "kernel_weight_only_scale", "kernel_zero", "g_idx"), OMITTED)
    arguments |= quantised_leaves(draw, "kernel", plain, parameter_dtype(draw))
    arguments |= dict.fromkeys(("lora_kernel_a", "lora_kernel_b", "lora_scale"), OMITTED)
    if draw.chance(3):
        draw.features.add("adapter")
        groups = draw.pick(*(g for g in (1, 2, 3) if g <= max(n, 1) and n % g == 0))
        arguments |= adapter(draw, k, groups, draw.pick(1, 2, 5), n // groups)


def adapter(draw: Draw, k: int, groups: int, rank: int, columns: int) -> Inputs:
    """The leaves of an adapter."""
    shapes = (k, groups, rank), (rank, columns)
    a, b = (modest(draw, shape).astype(wide_dtype(draw)) for shape in shapes)
    return {"lora_kernel_a": a, "lora_kernel_b": b, "lora_scale": np.asarray(draw.pick(1.0, 0.5, -3.7), wide_dtype(draw))}


def quantised_leaves(draw: Draw, name: str, plain: Array, dtype: str) -> Inputs:
    """The leaves of a matrix, by their names: plain in this type, int8, int8 for the weights alone, int4 in groups."""
    form = draw.pick("plain", "plain", "int8", "weight_int8", "int4") if plain.size else "plain"
    if form == "plain":
        return {name: draw.laid_out(plain.astype(numpy_dtype(dtype)))}
    draw.features.add(form)
    how = quantization("int4", draw.pick(3, 8, 128)) if form == "int4" else quantization("int8", None, form != "int8")
    layer = "token_embedding" if "embeddings" in name else "layer"
    leaves = quantized_tree({f"{layer}.{name}": np.nan_to_num(plain, posinf=1e3, neginf=-1e3)}, how)[layer]
    return {key: draw.laid_out(leaf) for key, leaf in leaves.items()}


def some_table(draw: Draw, arguments: Inputs) -> None:
    """A table of token embeddings as a part of a tree, with a table of its own for the head or without."""
    v, n = draw.size("v"), draw.size("n")
    plain = draw.rng.standard_normal((v, n)).astype(np.float32) * draw.scale
    leaves = quantised_leaves(draw, "embeddings", plain, parameter_dtype(draw))
    if draw.chance(3):
        draw.features.add("untied")
        form = {"embeddings_scale": "int8", "embeddings_weight_only_scale": "int8", "embeddings_zero": "int4"}
        mode = next((mode for leaf, mode in form.items() if leaf in leaves), None)
        reverse = draw.rng.standard_normal((n, v)).astype(np.float32)
        if mode is None:
            leaves["reverse_embeddings"] = draw.laid_out(reverse.astype(leaves["embeddings"].dtype))
        else:
            groups = int(np.sum(leaves["g_idx"] == 0)) if mode == "int4" else None
            how = quantization(mode, groups, "embeddings_weight_only_scale" in leaves or mode == "int4")
            leaves |= quantized_tree({"token_embedding.reverse_embeddings": reverse}, how)["token_embedding"]
    arguments["p"] = leaves


# -- examples whose right answer does not hang on a rounding ------------------------------------------------------------------


def no_draw_at_a_border(draw: Draw, arguments: Inputs) -> None:
    """A point, a share or a border moved by a rounding chooses the same token."""
    logits = arguments["logits"].astype(np.float64)
    finite = np.abs(logits[np.isfinite(logits)]).max(initial=0.0)
    near = 64 * UNIT_ROUNDOFF[wide_dtype(draw)] * (1.0 + finite / 0.3)
    if near > 0.01:
        raise Unsuitable
    op, base = OPS["sample_token"], {k: v for k, v in arguments.items() if v is not OMITTED}
    for sign in (-1, 1):
        for name, relative in (("uniform", False), ("top_p", False), ("min_p", True)):
            if base.get(name) is not None:
                moved = base[name] * (1 + sign * near) if relative else base[name] + sign * near
                moved = np.clip(moved, 0.0, None if name == "top_p" else 1.0)
                _steady(op, base, base | {name: moved})


def no_close_call(name: str, *moved: str) -> Callable[[Draw, Inputs], None]:
    """Whatever is chosen stays chosen when these arguments move by a few roundings."""

    def check(draw: Draw, arguments: Inputs) -> None:
        op, base = OPS[name], {k: v for k, v in arguments.items() if v is not OMITTED}
        for _ in range(3):
            signs = {name: draw.rng.choice([-1.0, 1.0], base[name].shape) for name in moved}
            near = 256 * UNIT_ROUNDOFF[wide_dtype(draw)]
            changes = {name: base[name] * (1 + near * sign) for name, sign in signs.items()}
            _steady(op, base, base | changes)

    return check


def _steady(op: Op[..., Any], base: Inputs, moved: Inputs) -> None:
    with executing(None), np.errstate(all="ignore"):
        one, other = op.reference(**base), op.reference(**moved)
    parts = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    for a, b in parts:
        if np.asarray(a).dtype.kind in "iu" and not np.array_equal(a, b):
            raise Unsuitable


# -- the table ----------------------------------------------------------------------------------------------------------------

Then = Callable[[Draw, Inputs], None]

PRODUCT = floats(limit=1e12)
NAMED: dict[str, Rule] = {
    "epsilon": pick(1e-5, 1e-3, 1.0),
    "scale": pick(1.0, 0.3, 5**-0.5),
    "dtype": result_dtype,
    "dropout_rate": pick(0.0, 0.3),
    "rng": generator,
    "mask": attention_mask,
    "start": ints(0, 9),
    "lora_kernel_a": wide(limit=1e3, centred=True),
    "lora_kernel_b": wide(limit=1e3, centred=True),
    "lora_scale": lambda draw, shape: np.asarray(draw.pick(1.0, 0.5, -3.7), wide_dtype(draw)),
    "kernel_scale": scales(),
    "embeddings_scale": scales(),
    "g_idx": group_numbers,
}
"""By the name of an argument, whatever the op."""

DOMAINS: dict[str, dict[str, Rule]] = {
    "add": {"x": floats(spikes=INFINITE), "y": lambda d, s: d.floats(*s, dtype=parameter_dtype(d), spikes=INFINITE)},
    "multiply": {"x": floats(spikes=INFINITE), "y": floats(spikes=INFINITE)},
    "scaled": {"x": floats(spikes=INFINITE), "factor": pick(1.0, 0.37, 5**-0.5, 2.0)},
    "relu": {"x": floats(spikes=ANYTHING)},
    "linear_activation": {"x": floats(spikes=ANYTHING)},
    "gelu": {"x": floats(spikes=(np.inf,))},
    "gelu_approximate": {"x": floats(limit=1e12, spikes=(np.inf,))},
    "silu": {"x": floats(spikes=(np.inf, -89.5, -95.0, -104.0))},
    "dropout": {"rate": pick(0.0, 0.1, 0.5), "rng": lambda d, s: np.random.default_rng(3) if d.below(2) else OMITTED},
    "split_heads": {"x": LATER, "num_heads": LATER},
    "merge_heads": {"x": floats(spikes=ANYTHING)},
    "linear": {"x": PRODUCT, "kernel": weights(1e12), "bias": weights(1e12)},
    "logits_from_embeddings": {"x": PRODUCT, "embeddings": weights(1e12)},
    "lora_product": {"x": floats(limit=1e4)},
    "embedding": {"ids": below("v"), "embeddings": weights(5e4)},
    "last_rows": {"x": floats(spikes=ANYTHING), "lengths": lambda d, s: d.ints(*s, low=1, high=d.size("t") + 1)},
    "layer_norm": {"x": floats(limit=1e8), "gamma": weights(), "beta": weights()},
    "rms_norm": {"x": floats(limit=1e15), "weight": weights(), "epsilon": pick(1e-6, 1e-3)},
    "causal_mask": {"positions": ints(0, 12)},
    "token_positions": {"start": ints(0, 50)},
    "relative_position_buckets": {
        "positions": lambda d, s: d.ints(*s, high=d.pick(9, 300)),
        "keys": sized("s"),
        "bidirectional": pick(False, True),
        "num_buckets": pick(OMITTED, 8, 16),
        "max_distance": pick(OMITTED, 20, 200),
    },
    "relative_position_bias": {"buckets": below("r")},
    "alibi_slopes": {"num_heads": lambda d, s: d.pick(*range(1, 41), 112, 128)},
    "alibi_bias": {
        "slopes": scales("float64"),
        "positions": lambda d, s: d.ints(*s, high=d.pick(9, 100_000)),
        "keys": sized("s"),
        "dtype": lambda d, s: wide_dtype(d) if d.below(2) or wide_dtype(d) == "float64" else OMITTED,
    },
    "attention_scores": {"query": PRODUCT, "key": PRODUCT, "bias": wide()},
    "masked_softmax": {"scores": softmax_scores},
    "attention_context": {"weights": wide(limit=1.0, positive=True, centred=True), "value": PRODUCT},
    "attention": {
        "query": floats(limit=30.0, centred=True), "key": floats(limit=30.0, centred=True), "value": PRODUCT,
        "bias": wide(limit=1e4),
    },
    "cache_select": {"rows": below("beams")},
    "row_scale": {"x": sometimes_not_finite},
    "quantize_rows": {"x": sometimes_not_finite, "scale": scales()},
    "linear_int8": {
        "values": int8s(), "kernel": int8s(), "scale": scales(), "bias": floats(limit=1e4), "dtype": lambda d, s: d.dtype,
    },
    "linear_weight_int8": {
        "x": floats(limit=1e4), "kernel": int8s(), "bias": floats(limit=1e4),
    },
    "pack_int4": {"values": int8s(-8, 8), "axis": pick(-1, 0, 1)},
    "unpack_int4": {"packed": int8s(), "size": LATER, "axis": pick(-1, 0, 1)},
    "linear_int4": {
        "x": floats(limit=1e4), "kernel": LATER, "kernel_scale": LATER,
        "kernel_zero": LATER, "bias": floats(limit=1e4), "axis": pick(-1, 0, 1),
    },
    "embedding_int8": {"ids": below("v"), "embeddings": int8s(), "dtype": lambda d, s: d.dtype},
    "embedding_int4": {
        "ids": below("v"), "embeddings": LATER, "embeddings_zero": int8s(-8, 8), "dtype": lambda d, s: d.dtype,
    },
    "logits_int8": {"values": int8s(), "scale": scales(), "embeddings": int8s(), "dtype": lambda d, s: d.dtype},
    "logits_weight_int8": {"x": floats(limit=1e4), "embeddings": int8s()},
    "logits_int4": {"x": floats(limit=1e4), "embeddings": LATER, "embeddings_zero": int8s(-8, 8)},
    "log_softmax": {"logits": floats(limit=1e30), "temperature": pick(1.0, 0.5, 3.0)},
    "token_log_probs": {"logits": floats(limit=1e30), "token_ids": below("v")},
    "penalise_repetition": {
        "logits": floats(spikes=INFINITE), "token_ids": token_history, "mask": lambda d, s: d.bools(*s),
        "penalty": lambda d, s: d.laid_out(d.rng.choice([1.0, 1.3, 0.7, 5.0], s)),
    },
    "forbid_ngrams": {
        "logits": floats(spikes=(-np.inf,)), "token_ids": token_history, "mask": lambda d, s: d.bools(*s), "size": ints(0, 5),
    },
    "allow_tokens": {"logits": floats(spikes=INFINITE)},
    "has_choice": {"logits": lambda d, s: np.where(d.bools(*s), d.floats(*s), -np.inf).astype(d.floats(0).dtype)},
    "greedy_token": {"logits": tied},
    "sample_token": {
        "logits": near_scores,
        "uniform": lambda d, s: d.laid_out(d.rng.random(s)),
        "temperature": rows_from(1.0, 0.3, 3.0), "top_k": rows_from(1, 2, 3, 50),
        "top_p": rows_from(0.3, 0.77, 0.0, 1.0, np.inf), "min_p": rows_from(0.2, 0.0, 0.5),
    },
    "beam_candidates": {
        "log_probabilities": wide(limit=10.0, centred=True), "scores": lambda d, s: d.laid_out(d.rng.standard_normal(s)),
        "count": sized("count"),
    },
    "likeliest_tokens": {"logits": wide(limit=10.0), "count": sized("count"), "temperature": pick(1.0, 0.5)},
    "contrastive_choice": {
        "probabilities": wide(positive=True, limit=1.0, centred=True),
        "hidden": floats(limit=10.0), "earlier": floats(limit=10.0), "alpha": pick(0.6, 0.0, 1.0),
    },
    "dense": {"kernel": LATER, "bias": modest, "x": modest},
    "token_vectors": {"p": LATER, "token_ids": below("v"), "dtype": lambda d, s: d.dtype},
    "token_scores": {"p": LATER, "x": modest},
}  # fmt: skip
"""Op -> argument -> how it is drawn."""

THEN: dict[str, tuple[Then, ...]] = {
    "masked_softmax": (permitted_peaks,),
    "quantize_rows": (its_own_scale,),
    "split_heads": (heads_of,),
    "unpack_int4": (unpacked_size,),
    "linear_int4": (packed_four_bits,),
    "embedding_int4": (packed_rows,),
    "logits_int4": (packed_rows,),
    "lora_merged": (adapter_groups,),
    "dense": (some_dense_form,),
    "token_vectors": (some_table,),
    "token_scores": (some_table,),
    "sample_token": (no_draw_at_a_border,),
    "beam_candidates": (no_close_call("beam_candidates", "log_probabilities", "scores"),),
    "contrastive_choice": (no_close_call("contrastive_choice", "probabilities", "hidden", "earlier"),),
}
"""What depends on several arguments: done when all of them are drawn."""

NEVER_EMPTY: dict[str, str] = {
    "embedding": "v", "embedding_int8": "v", "embedding_int4": "v", "token_vectors": "v", "relative_position_bias": "r",
    "last_rows": "t", "split_heads": "h", "log_softmax": "v", "token_log_probs": "v", "greedy_token": "v", "sample_token": "v",
    "beam_candidates": "bv", "likeliest_tokens": "v", "contrastive_choice": "bsn", "penalise_repetition": "v",
    "forbid_ngrams": "v",
    "layer_norm": "", "has_choice": "v", "lora_product": "gr", "lora_merged": "gr", "alibi_slopes": "h", "dense": "kn",
    "token_scores": "vn", "allow_tokens": "v",
}  # fmt: skip
"""Letters that are at least 1."""

LETTERS: dict[str, tuple[str, ...]] = {
    "split_heads": ("b", "t", "d"),
    "linear_int4": ("*b", "k", "n"),
    "embedding_int4": ("*b", "v", "n"),
    "logits_int4": ("*b", "v", "n"),
    "dense": ("*b", "k", "n"),
}
"""Of an op whose arguments `THEN` makes: the letters that there are."""

NEVER_LONG = frozenset({"h", "g", "r", "#b", "d"})
"""Letters that are never thousands."""
