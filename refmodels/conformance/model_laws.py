"""Laws of whole models: two ways to the same numbers, one of which the reference takes as well.

    chunks     any chunks of a prompt, with the cache, give what one pass gives
    padding    padding appended changes nothing, and what stands in it is not seen
    future     later tokens change nothing before them
    batch      a batch gives what its rows give alone
    decode     ragged prompts, then token after token with the cache, give the scores of the whole sequences
    heads      permuted heads give the same (OPT, T5)
    ahead      tokens that are chosen ahead are those that step after step leads to (accelerators that choose ahead)

The accelerator takes the second way; truth is the reference's first way in float64. An accelerator that claims that a row's
result does not depend on its batch, padding and chunks is held to the same bits in its own two ways.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.conformance.case import Case, Environment, Inputs, Script
from refmodels.conformance.cases import finish
from refmodels.conformance.drawing import Draw, Source
from refmodels.conformance.models import draw_model
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.op import OPS, Array, executing
from refmodels.ops.cache import key_value_cache
from refmodels.ops.precision import compute_dtype
from refmodels.ops.sampling import sample_token

Make = Callable[[Source, str, tuple[int, ...]], Case]


# -- running a model ----------------------------------------------------------------------------------------------------------


class Running:
    """A model inside a script: its inputs, its loaded tree, and where it runs."""

    def __init__(self, inputs: Inputs, env: Environment) -> None:
        self.inputs, self.env, self.config = inputs, env, inputs["config"]
        self.family = inputs["family"].name
        self.params = env.load(inputs["params"])

    def op(self, kind: str) -> Any:
        """`opt_backbone` for `backbone`."""
        return OPS[f"{self.family}_{kind}"]

    def whole(self, ids: Array, real: Array, rows: slice = slice(None), source: Array | None = None) -> Any:
        """Hidden states (b, t, n) in one pass, on the host."""
        put, env = self.env.array, self.env
        if self.family != "t5":
            return env.host(env.call(self.op("backbone"), put(ids[rows]), put(real[rows]), self.params, self.config))
        source_ids, source_real = self.source(rows, source)
        both = env.call(self.op("backbone"), source_ids, source_real, put(ids[rows]), put(real[rows]), self.params, self.config)
        return env.host(both)["decoder_sequence_output"]

    def source(self, rows: slice = slice(None), source: Array | None = None) -> tuple[Any, Any]:
        """The encoder's ids and mask, with padding behind them if `source` is longer."""
        ids = self.inputs["source"] if source is None else source
        real = np.pad(self.inputs["source_real"], ((0, 0), (0, ids.shape[1] - self.inputs["source"].shape[1])))
        return self.env.array(ids[rows]), self.env.array(real[rows])

    def cache(self, capacity: int) -> Any:
        """A new cache for all rows."""
        config = self.config
        if self.family == "t5":
            return self.op("cache")(*self.source(), capacity, self.params, config)
        return key_value_cache(
            len(self.inputs["ids"]), capacity, layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim,
            dtype=compute_dtype(config.dtype),
        )  # fmt: skip

    def step(self, ids: Array, real: Array, cache: Any, start: Array) -> Any:
        """Hidden states of some more tokens, with the cache; on the host."""
        put = self.env.array
        before = (cache["encoded"], cache["encoder_padding_mask"]) if self.family == "t5" else ()
        op = self.op("decoder" if self.family == "t5" else "backbone")
        arguments = {"cache": cache, "start": put(start)}
        return self.env.host(self.env.call(op, put(ids), put(real), *before, self.params, self.config, **arguments))

    def scores(self, hidden: Array) -> Any:
        """Scores of hidden states."""
        config = (self.config,) if self.family == "t5" else ()
        return self.env.host(self.op("logits")(self.env.array(hidden), self.params, *config))


class Family:
    """The name of a family, which is no name of a type."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def whole(inputs: Inputs, env: Environment) -> Any:
    """The first way of most laws: one pass, at the real tokens."""
    return Running(inputs, env).whole(inputs["ids"], inputs["real"])[inputs["real"]]


# -- the second ways ----------------------------------------------------------------------------------------------------------


def chunks(inputs: Inputs, env: Environment) -> Any:
    """With the cache, cut anywhere."""
    model, (b, t) = Running(inputs, env), inputs["ids"].shape
    cache, parts = model.cache(t + inputs["room"]), []
    for begin, end in zip([0, *inputs["cuts"]], [*inputs["cuts"], t], strict=True):
        columns = slice(begin, end)
        parts.append(model.step(inputs["ids"][:, columns], inputs["real"][:, columns], cache, np.full(b, begin)))
    return np.concatenate(parts, 1)[inputs["real"]]


def padding(inputs: Inputs, env: Environment) -> Any:
    """More padding, with other tokens in it."""
    model, real, more = Running(inputs, env), inputs["real"], inputs["room"] + 1
    filler = inputs["filler"]
    ids = np.concatenate([np.where(real, inputs["ids"], filler[:, : real.shape[1]]), filler[:, -more:]], 1)
    wider = np.pad(real, ((0, 0), (0, more)))
    source = None
    if model.family == "t5":
        source = np.concatenate([inputs["source"], filler[:, :more]], 1)
    return model.whole(ids, wider, source=source)[:, : real.shape[1]][real]


def future(inputs: Inputs, env: Environment) -> Any:
    """Other tokens from some place on: what is before stays."""
    ids = inputs["ids"].copy()
    ids[:, inputs["place"] :] = inputs["filler"][:, inputs["place"] : ids.shape[1]]
    return Running(inputs, env).whole(ids, np.ones_like(inputs["real"]))[:, : inputs["place"]]


def before(inputs: Inputs, env: Environment) -> Any:
    """The first way of `future`."""
    return Running(inputs, env).whole(inputs["ids"], np.ones_like(inputs["real"]))[:, : inputs["place"]]


def batch(inputs: Inputs, env: Environment) -> Any:
    """Row by row."""
    model = Running(inputs, env)
    rows = [model.whole(inputs["ids"], inputs["real"], slice(i, i + 1)) for i in range(len(inputs["ids"]))]
    return np.concatenate(rows)[inputs["real"]]


def decode(inputs: Inputs, env: Environment) -> Any:
    """Prefill, then one token a step, each row at its own position: scores (b, steps + 1, v)."""
    model, lengths, more = Running(inputs, env), inputs["real"].sum(1), inputs["more"]
    put, call, (b, t) = env.array, env.call, inputs["ids"].shape
    cache = model.cache(t + more.shape[1])
    first = call(
        model.op("prefill"), put(inputs["ids"]), put(inputs["real"]), put(lengths), model.params, cache, model.config,
        start=put(np.zeros(b, np.int64)),
    )  # fmt: skip
    scores = [env.host(first)]
    for i in range(more.shape[1]):
        token, one = put(more[:, i : i + 1]), put(np.ones((b, 1), bool))
        scores.append(env.host(call(model.op("decode_step"), token, one, put(lengths + i), model.params, cache, model.config)))
    return np.stack(scores, 1)


def sequences(inputs: Inputs, env: Environment) -> Any:
    """The first way of `decode`: every row's whole sequence alone."""
    model, found = Running(inputs, env), []
    for row, length in enumerate(inputs["real"].sum(1)):
        ids = np.concatenate([inputs["ids"][row, :length], inputs["more"][row]])
        all_rows = np.repeat(ids[None], len(inputs["ids"]), 0)
        hidden = model.whole(all_rows, np.ones(all_rows.shape, bool), slice(row, row + 1))
        found.append(model.scores(hidden[:, length - 1 :])[0])
    return np.stack(found)


def ahead(inputs: Inputs, env: Environment) -> Any:
    """Tokens chosen ahead in two goes, and for each whether the accelerator's own steps lead to it: (b, count)."""
    model, lengths, left, goes = Running(inputs, env), inputs["real"].sum(1), inputs["remaining"], inputs["goes"]
    put, accelerator, uniform = env.array, env.accelerator, inputs["uniform"]
    assert accelerator is not None
    cache = _prompted(model)
    tokens, places, found = inputs["filler"][:, 0], lengths, [inputs["filler"][:, :1]]
    for begin, end in zip([0, *goes], goes, strict=False):
        choice = {} if uniform is None else {"uniform": put(uniform[begin:end]), "temperature": put(inputs["temperature"])}
        got = accelerator.decode_tokens(
            model.op("decode_step"), put(tokens), put(places), put(np.maximum(left - begin, 0)), model.params, cache,
            model.config, count=end - begin, **choice,
        )  # fmt: skip
        if got is None:
            return every_token(inputs, env)
        env.kernel_calls += 1
        found.append(env.host(got))
        tokens, places = found[-1][:, -1], lengths + np.minimum(end, left)
    cache, chosen, right = _prompted(model), np.concatenate(found, 1), every_token(inputs, env)
    for i in range(goes[-1]):
        token, one = put(chosen[:, i : i + 1]), put(np.ones((len(chosen), 1), bool))
        places = put(lengths + np.minimum(i, left))
        scores = env.host(model.op("decode_step")(token, one, places, model.params, cache, model.config))
        draws = None if uniform is None else uniform[i]
        right[:, i] = (i >= left) | _may_follow(scores, chosen[:, i + 1], draws, inputs["temperature"])
    return right


def _prompted(model: Running) -> Any:
    """A cache that holds the prompts, with room for what each row has left."""
    inputs, put, lengths = model.inputs, model.env.array, model.inputs["real"].sum(1)
    cache = model.cache(max(inputs["ids"].shape[1], int((lengths + inputs["remaining"]).max()) + 1))
    prompt = put(inputs["ids"]), put(inputs["real"]), put(lengths)
    model.op("prefill")(*prompt, model.params, cache, model.config, start=put(np.zeros(len(lengths), np.int64)))
    return cache


def _may_follow(scores: Array, tokens: Array, uniform: Array | None, temperature: Array) -> Array:
    """Whether each token is what its row's scores lead to, if they may be off by some roundings: two kernels made them."""
    wide = scores.astype(np.float64)
    off = 32 * UNIT_ROUNDOFF[scores.dtype.name] * (1.0 + np.abs(wide).max(-1))
    if uniform is None:
        return np.asarray(wide.max(-1) - wide[np.arange(len(tokens)), tokens] <= off)
    near = off / temperature
    moved = (np.clip(uniform + by * near, 0.0, 1.0 - 2.0**-53) for by in (-1, 0, 1))
    with executing(None):
        return np.any([sample_token(wide, u, temperature=temperature) == tokens for u in moved], 0)


def every_token(inputs: Inputs, _: Environment) -> Any:
    """The first way of `ahead`: (b, count) of true."""
    return np.ones((len(inputs["ids"]), inputs["goes"][-1]), bool)


def heads(inputs: Inputs, env: Environment) -> Any:
    """The heads of every layer in another order."""
    config = inputs["config"]
    columns = np.arange(config.num_heads * config.head_dim).reshape(config.num_heads, -1)[inputs["order"]].reshape(-1)
    changed = {**inputs, "params": _permuted(inputs["params"], columns, inputs["order"])}
    return Running(changed, env).whole(inputs["ids"], inputs["real"])[inputs["real"]]


def _permuted(tree: Any, columns: Array, order: Array) -> Any:
    if isinstance(tree, list):
        return [_permuted(child, columns, order) for child in tree]
    if not isinstance(tree, dict):
        return tree
    tree = {key: _permuted(child, columns, order) for key, child in tree.items()}
    if "query" in tree:
        for part in ("query", "key", "value"):
            tree[part] = {name: leaf[..., columns] for name, leaf in tree[part].items()}
        tree["output"] = {**tree["output"], "kernel": tree["output"]["kernel"][columns]}
    if "relative_attention_bias" in tree:
        tree["relative_attention_bias"] = {"embeddings": tree["relative_attention_bias"]["embeddings"][:, order]}
    return tree


# -- their examples -----------------------------------------------------------------------------------------------------------


def _inputs(draw: Draw, family: str, *, plain: bool) -> Inputs:
    draw.plain_models = plain
    model = draw_model(draw, family)
    v, b, t = model.config.vocabulary_size, draw.size("b", high=5), draw.size("t", high=20)
    real = np.arange(t) < draw.rng.integers(1, t + 1, b)[:, None]
    cuts = sorted({draw.below(t - 1) + 1 for _ in range(draw.below(3))}) if t > 1 else []
    s = draw.size("source", high=9)
    return {
        "params": model.params,
        "config": model.config,
        "family": Family(family),
        "ids": draw.ints(b, t, high=v),
        "real": real,
        "filler": draw.rng.integers(0, v, (b, t + 20)),
        "more": draw.rng.integers(0, v, (b, draw.below(4))),
        "cuts": cuts,
        "room": draw.below(4),
        "place": draw.below(t),
        "order": draw.rng.permutation(model.config.num_heads),
        "source": draw.ints(b, s, high=v),
        "source_real": np.arange(s) < draw.rng.integers(1, s + 1, b)[:, None],
        "goes": (goes := [draw.below(4) + 1, draw.below(4) + 5]),
        "remaining": draw.rng.integers(1, goes[-1] + 1, b),
        "uniform": draw.rng.random((goes[-1], b)) if draw.below(2) else None,
        "temperature": draw.rng.uniform(0.5, 2.0, b),
    }


def _law(family: str, way: Script, first: Script, *, plain: bool = False) -> Make:
    def make(source: Source, dtype: str, tiles: tuple[int, ...]) -> Case:
        draw = Draw(source, dtype, tiles)
        inputs = _inputs(draw, family, plain=plain)
        kind = {"decode": "decode_step", "ahead": "decode_step"}.get(way.__name__, "backbone")
        case = Case(OPS[f"{family}_{kind}"], inputs, way, dtype, other_way=first, reordered=way is heads)
        finish(case, draw)
        case.thorough = case.threaded = False
        return case

    return make


WAYS: dict[str, tuple[Script, Script]] = {
    "chunks": (chunks, whole),
    "padding": (padding, whole),
    "future": (future, before),
    "batch": (batch, whole),
    "decode": (decode, sequences),
    "heads": (heads, whole),
    "ahead": (ahead, every_token),
}

LAWS: dict[str, Make] = {
    f"{family}/{name}": _law(family, way, first, plain=name == "heads")
    for family in ("opt", "bloom", "t5")
    for name, (way, first) in WAYS.items()
    if not (family == "bloom" and name == "heads")  # ALiBi gives heads an order
}
"""`opt/chunks` -> how its examples are made."""
