"""Fused kernels of T5: the three parts of a layer, both stacks, and the step of decoding, each one program.

The relative bias of a stack is a function of the distance alone, the same from REACH on: each head gets a table of it, so that
no matrix of biases is made.
"""

from typing import Any

import numpy as np

from refmodels import t5 as reference
from refmodels.op import Array, Params
from refmodels.ops.cache import cache_append
from refmodels.ops.dense import token_vectors
from refmodels.ops.position import relative_position_bias, relative_position_buckets, token_positions
from refmodels.ops.precision import compute_dtype
from refmodels.t5 import T5Config
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.blocks import Block, Call, cached_kind, program_of, refused, result
from refmodels_numba.cache import by_head
from refmodels_numba.layout import FLOAT32, GIVEN_BIAS, REACH, RELATIVE_BIAS, ROUND, STORED
from refmodels_numba.program import Program, Slot


def relative_table(block: Block, stack: Params, *, bidirectional: bool) -> int:
    """The address of the bias by distance, float32 [heads, 2 * REACH + 1]: entry REACH is that of the query's own position."""
    embeddings = stack["layers"][0]["self_attention"]["relative_attention_bias"]["embeddings"]
    middle = np.array([[REACH]])
    buckets = relative_position_buckets.reference(middle, 2 * REACH + 1, bidirectional=bidirectional)
    return block.vector(relative_position_bias.reference(buckets, np.asarray(embeddings))[0, :, 0])


class Layers:
    """The parts of a layer as instructions on x, in place."""

    def __init__(self, block: Block, config: T5Config) -> None:
        self.block, self.config = block, config
        self.inner = config.num_heads * config.head_dim
        self.x, self.h = block.slot("x"), block.buffer("h", "rows", config.hidden_dim)
        self.residual: dict[str, Any] = {
            "rounding": ROUND[config.residual_dtype],
            "residual_rounding": ROUND[config.residual_dtype],
        }

    def norm(self, p: Params, out: Slot) -> None:
        """The norm before each part."""
        self.block.norm(self.x, out, self.config.hidden_dim, p, self.config.layer_norm_epsilon)

    def self_attention(self, p: Params, i: int, kind: int | None, **attention: Any) -> None:
        """x + attention(norm(x)); with `kind` there is a cache of that type."""
        block, heads, size, own = self.block, self.config.num_heads, self.config.head_dim, p["self_attention"]
        self.norm(p["self_attention_layer_norm"], self.h)
        q, k, v = (block.buffer(name, "rows", self.inner) for name in "qkv")
        given = block.inputs(self.h, [own["query"]])
        for j, (name, out) in enumerate((("query", q), ("key", k), ("value", v))):
            block.dense(given, own[name], out, wait=j == 0)
        keys, values = k, v
        if kind is not None:
            keys, values = block.slot(f"key{i}"), block.slot(f"value{i}")
            block.write(k, keys, "key", heads, size, kind)
            block.write(v, values, "value", heads, size, kind, wait=False)
        self.attend(own, q, keys, values, "", FLOAT32 if kind is None else kind, **attention)

    def cross_attention(self, p: Params, i: int, kind: int) -> None:
        """x + attention(norm(x)) to the encoder's output."""
        block, own = self.block, p["cross_attention"]
        self.norm(p["cross_attention_layer_norm"], self.h)
        q = block.buffer("q", "rows", self.inner)
        block.dense(block.inputs(self.h, [own["query"]]), own["query"], q)
        self.attend(own, q, block.slot(f"cross_key{i}"), block.slot(f"cross_value{i}"), "cross_", kind)

    def attend(self, own: Params, q: Slot, keys: Slot, values: Slot, prefix: str, kind: int, **attention: Any) -> None:
        """The attention itself and its output's product."""
        block, context = self.block, self.block.buffer("context", "rows", self.inner)
        heads, size = self.config.num_heads, self.config.head_dim
        block.attend(q, keys, values, context, heads, size, prefix=prefix, kind=kind, scale=1.0, **attention)
        block.dense(block.inputs(context, [own["output"]]), own["output"], self.x, residual=self.x, **self.residual)

    def feedforward(self, p: Params) -> None:
        """x + Wo f(norm(x))."""
        block, config = self.block, self.config
        self.norm(p["layer_norm"], self.h)
        m = block.buffer("m", "rows", config.intermediate_dim)
        given, gate = block.inputs(self.h, [p["input_projector"]]), dict[str, Any]()
        if config.use_gated_activation:
            g = block.buffer("gate", "rows", config.intermediate_dim)
            block.dense(given, p["gate_projector"], g)
            gate = {"gate": g}
        activation = "none" if config.activation == "linear" else config.activation
        block.dense(given, p["input_projector"], m, activation=activation, **gate)
        block.dense(block.inputs(m, [p["output_projector"]]), p["output_projector"], self.x, residual=self.x, **self.residual)


def _relative(block: Block, stack: Params, *, bidirectional: bool) -> dict[str, Any]:
    return {
        "bias_kind": RELATIVE_BIAS,
        "bias": relative_table(block, stack, bidirectional=bidirectional),
        "bias_head": 4 * (2 * REACH + 1),
    }


def encoder(params: Params, config: T5Config) -> Program:
    """The encoder with its final norm."""
    block, p = Block(compute_dtype(config.dtype)), params["encoder"]
    layers, relative = Layers(block, config), _relative(block, p, bidirectional=True)
    for i, layer in enumerate(p["layers"]):
        layers.self_attention(layer, i, None, **relative)
        layers.feedforward(layer)
    layers.norm(p["layer_norm"], layers.h)
    return block


def decoder(params: Params, config: T5Config, kind: int | None, cross_kind: int, *, scores: bool) -> Program:
    """The decoder with its final norm, then the scores of the one token of each row, if asked for."""
    block, p = Block(compute_dtype(config.dtype)), params["decoder"]
    layers, relative = Layers(block, config), _relative(block, p, bidirectional=False)
    where = {"causal": 1, "positions": block.slot("positions"), "positions_batch": block.slot("positions_batch")}
    for i, layer in enumerate(p["layers"]):
        layers.self_attention(layer, i, kind, **relative, **where)
        layers.cross_attention(layer, i, cross_kind)
        layers.feedforward(layer)
    layers.norm(p["layer_norm"], layers.h)
    if scores:
        out = block.buffer("scores", "batch", config.vocabulary_size)
        block.scores(block.slot("batch"), layers.h, params["token_embedding"], out, scale=config.logits_scale)
    return block


def _vectors(token_ids: Array, params: Params, config: T5Config, embeddings: Array | None) -> Array:
    if embeddings is not None:
        return embeddings
    return token_vectors(token_ids, params["token_embedding"], dtype=config.residual_dtype)


def encoder_fits(
    token_ids: Any, padding_mask: Any, params: Any, config: Any, *, embeddings: Any = None, rng: Any = None
) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or program_of(params, (config, "encoder"), lambda: encoder(params, config))
    return built if isinstance(built, str) else True


@kernel(reference.t5_encoder, when=encoder_fits)
def t5_encoder(
    token_ids: Array,
    padding_mask: Array,
    params: Params,
    config: T5Config,
    *,
    embeddings: Array | None = None,
    rng: Any = None,
) -> Array:
    """The whole encoder as one program."""
    program = program_of(params, (config, "encoder"), lambda: encoder(params, config))
    call = Call(_vectors(token_ids, params, config, embeddings))
    call.own_keys_values(config.num_heads, config.head_dim)
    call.mask("", padding_mask[:, None, None, :])
    hidden = call.run(program, team())["h"]
    return result(hidden, (*token_ids.shape, config.hidden_dim), compute_dtype(config.dtype))


def _built(params: Params, config: T5Config, encoded: list[Params], cache: Params | None, *, scores: bool) -> Program | str:
    kind = None if cache is None else cached_kind(cache["layers"][0]["key"])
    cross_kind = cached_kind(encoded[0]["key"])
    key = config, "decoder", kind, cross_kind, scores
    return program_of(params, key, lambda: decoder(params, config, kind, cross_kind, scores=scores))


def _call(
    token_ids: Array,
    padding_mask: Array,
    encoded: list[Params],
    encoder_padding_mask: Array,
    params: Params,
    config: T5Config,
    embeddings: Array | None,
    cache: Params | None,
    start: Array | None,
) -> Call:
    call = Call(_vectors(token_ids, params, config, embeddings))
    call.positions(token_positions(token_ids, start))
    if cache is None:
        call.own_keys_values(config.num_heads, config.head_dim)
    else:
        padding_mask = cache_append(cache["padding_mask"], padding_mask, start)
        call.caches(cache["layers"], start, padding_mask.shape[1], cache)
    call.mask("", padding_mask[:, None, None, :])
    call.encoded(encoded, encoder_padding_mask, cache if cache is not None and cache.get("encoded") is encoded else None)
    return call


def decoder_fits(
    token_ids: Any,
    padding_mask: Any,
    encoded: Any,
    encoder_padding_mask: Any,
    params: Any,
    config: Any,
    *,
    cache: Any = None,
    rng: Any = None,
    **_: Any,
) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _built(params, config, encoded, cache, scores=False)
    return built if isinstance(built, str) else True


@kernel(reference.t5_decoder, when=decoder_fits)
def t5_decoder(
    token_ids: Array,
    padding_mask: Array,
    encoded: list[Params],
    encoder_padding_mask: Array,
    params: Params,
    config: T5Config,
    *,
    embeddings: Array | None = None,
    cache: Params | None = None,
    start: Array | None = None,
    rng: Any = None,
) -> Array:
    """The whole decoder as one program."""
    program = _built(params, config, encoded, cache, scores=False)
    call = _call(token_ids, padding_mask, encoded, encoder_padding_mask, params, config, embeddings, cache, start)
    hidden = call.run(program, team())["h"]
    return result(hidden, (*token_ids.shape, config.hidden_dim), compute_dtype(config.dtype))


def step_fits(token_ids: Any, padding_mask: Any, positions: Any, params: Any, cache: Any, config: Any) -> bool | str:
    """loaded parameters, no adapters, not float64"""
    built = refused(config, None) or _built(params, config, cache["encoded"], cache, scores=True)
    return built if isinstance(built, str) else True


@kernel(reference.t5_decode_step, when=step_fits)
def t5_decode_step(
    token_ids: Array, padding_mask: Array, positions: Array, params: Params, cache: Params, config: T5Config
) -> Array:
    """From a token to the scores of the next as one program."""
    encoded, mask = cache["encoded"], cache["encoder_padding_mask"]
    program = _built(params, config, encoded, cache, scores=True)
    call = _call(token_ids, padding_mask, encoded, mask, params, config, None, cache, positions)
    scores = call.run(program, team())["scores"]
    return result(scores, (len(token_ids), config.vocabulary_size), compute_dtype(config.dtype))


@kernel(reference.t5_keys_values)
def t5_keys_values(x: Array, p: Params, config: T5Config) -> Params:
    """Keys and values head by head, as decoding reads them."""
    made = reference.t5_keys_values.reference(x, p, config)
    batch, s, heads, size = made["key"].shape
    for name, array in made.items():
        made[name] = by_head(batch, s, heads, size, array.dtype.name)
        made[name][...] = array
    return made


def cross_keys_values(params: Params, config: T5Config) -> Program:
    """For each decoder layer the products with the encoder's output x, and both results into the arrays key{i}, value{i}."""
    block, heads, size = Block(compute_dtype(config.dtype)), config.num_heads, config.head_dim
    x, kind = block.slot("x"), STORED[compute_dtype(config.dtype)]
    k, v = (block.buffer(name, "rows", heads * size) for name in "kv")
    for i, layer in enumerate(params["decoder"]["layers"]):
        own = layer["cross_attention"]
        given = block.inputs(x, [own["key"]])
        block.dense(given, own["key"], k)
        block.dense(given, own["value"], v, wait=False)
        block.write(k, block.slot(f"key{i}"), "key", heads, size, kind)
        block.write(v, block.slot(f"value{i}"), "value", heads, size, kind, wait=False)
    return block


def _cross(params: Params, config: T5Config) -> Program | str:
    return program_of(params, (config, "cross"), lambda: cross_keys_values(params, config))


def cross_keys_values_fit(encoder_output: Any, params: Any, config: Any) -> bool | str:
    """loaded parameters, no adapters, not float64"""
    built = refused(config, None) or _cross(params, config)
    return built if isinstance(built, str) else True


@kernel(reference.t5_cross_keys_values, when=cross_keys_values_fit)
def t5_cross_keys_values(encoder_output: Array, params: Params, config: T5Config) -> list[Params]:
    """All layers' as one program, head by head in memory, as decoding reads them."""
    call, dtype = Call(encoder_output), compute_dtype(config.dtype)
    shape = call.batch, call.t, config.num_heads, config.head_dim
    made: list[Params] = [{name: by_head(*shape, dtype) for name in ("key", "value")} for _ in params["decoder"]["layers"]]
    call.caches(made, None, call.t)
    call.run(_cross(params, config), team())
    return made


def _part(p: Params, config: T5Config, name: str, build: Any) -> Program | str:
    def built() -> Program:
        block = Block(compute_dtype(config.dtype))
        build(Layers(block, config), block)
        return block

    return program_of(p, (config, name), built)


def _self_attention(p: Params, config: T5Config, cache: Params | None) -> Program | str:
    kind = None if cache is None else cached_kind(cache["key"])

    def build(layers: Layers, block: Block) -> None:
        bias = {name: block.slot(name) for name in ("bias", "bias_batch", "bias_head", "bias_query")}
        layers.self_attention(p, 0, kind, bias_kind=GIVEN_BIAS, **bias)

    return _part(p, config, f"self_attention {kind}", build)


def self_attention_fits(
    x: Any, p: Any, mask: Any, bias: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _self_attention(p, config, cache)
    return built if isinstance(built, str) else True


@kernel(reference.t5_self_attention, when=self_attention_fits)
def t5_self_attention(
    x: Array,
    p: Params,
    mask: Array,
    bias: Array,
    config: T5Config,
    *,
    cache: Params | None = None,
    start: Array | None = None,
    rng: Any = None,
) -> Array:
    """Norm, attention and residual as a program."""
    call = Call(x)
    if cache is None:
        call.own_keys_values(config.num_heads, config.head_dim)
    else:
        call.caches([cache], start, mask.shape[-1])
    call.mask("", mask)
    call.bias(bias)
    call.run(_self_attention(p, config, cache), team())
    return result(call.x, x.shape, x.dtype.name)


def _cross_attention(p: Params, config: T5Config, encoded: Params) -> Program | str:
    kind = cached_kind(encoded["key"])
    return _part(p, config, f"cross_attention {kind}", lambda layers, block: layers.cross_attention(p, 0, kind))


def cross_attention_fits(x: Any, p: Any, encoded: Any, mask: Any, config: Any, *, rng: Any = None) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _cross_attention(p, config, encoded)
    return built if isinstance(built, str) else True


@kernel(reference.t5_cross_attention, when=cross_attention_fits)
def t5_cross_attention(x: Array, p: Params, encoded: Params, mask: Array, config: T5Config, *, rng: Any = None) -> Array:
    """Norm, attention to the encoder's output and residual as a program."""
    call = Call(x)
    call.encoded([encoded], None)
    call.mask("cross_", mask)
    call.run(_cross_attention(p, config, encoded), team())
    return result(call.x, x.shape, x.dtype.name)


def _feedforward(p: Params, config: T5Config) -> Program | str:
    return _part(p, config, "feedforward", lambda layers, block: layers.feedforward(p))


def feedforward_fits(x: Any, p: Any, config: Any, *, rng: Any = None) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _feedforward(p, config)
    return built if isinstance(built, str) else True


@kernel(reference.t5_feedforward, when=feedforward_fits)
def t5_feedforward(x: Array, p: Params, config: T5Config, *, rng: Any = None) -> Array:
    """Norm, two or three products and residual as a program."""
    call = Call(x)
    call.run(_feedforward(p, config), team())
    return result(call.x, x.shape, x.dtype.name)
