"""Fused kernels of OPT: a layer, the stack, and the step of decoding, each one program."""

from typing import Any

from refmodels import opt as reference
from refmodels.op import Array, Params
from refmodels.ops.cache import cache_append
from refmodels.ops.dense import dense, token_vectors
from refmodels.ops.elementwise import add
from refmodels.ops.linear import embedding
from refmodels.ops.position import token_positions
from refmodels.ops.precision import compute_dtype
from refmodels.opt import EPSILON, OPTConfig
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.blocks import Block, Call, cached_kind, program_of, refused, result
from refmodels_numba.layout import FLOAT32
from refmodels_numba.program import Program, Slot


def layer(block: Block, p: Params, config: OPTConfig, i: int, kind: int | None, **attention: Any) -> None:
    """One layer on x, in place. With `kind` there is a cache of that type, whose keys and values of layer i are slots."""
    n, heads, size = config.hidden_dim, config.num_heads, config.head_dim
    x, before = block.slot("x"), config.do_layer_norm_before
    h, m = block.buffer("h", "rows", n), block.buffer("m", "rows", config.intermediate_dim)
    q, k, v = (block.buffer(name, "rows", n) for name in "qkv")

    def normed(name: str, source: Slot) -> Slot:
        block.norm(source, h if before else x, n, p[name], EPSILON)
        return h if before else x

    own = p["self_attention"]
    given = block.inputs(normed("self_attention_layer_norm", x) if before else x, [own["query"]])
    for j, (name, out) in enumerate((("query", q), ("key", k), ("value", v))):
        block.dense(given, own[name], out, wait=j == 0)
    keys, values = k, v
    if kind is not None:
        keys, values = block.slot(f"key{i}"), block.slot(f"value{i}")
        block.write(k, keys, "key", heads, size, kind)
        block.write(v, values, "value", heads, size, kind, wait=False)
    stored = FLOAT32 if kind is None else kind
    block.attend(q, keys, values, h, heads, size, prefix="", kind=stored, scale=size**-0.5, **attention)
    block.dense(block.inputs(h, [own["output"]]), own["output"], x, residual=x)
    if not before:
        normed("self_attention_layer_norm", x)
    given = block.inputs(normed("feedforward_layer_norm", x) if before else x, [p["feedforward_intermediate_dense"]])
    block.dense(given, p["feedforward_intermediate_dense"], m, activation="relu")
    block.dense(block.inputs(m, [p["feedforward_output_dense"]]), p["feedforward_output_dense"], x, residual=x)
    if not before:
        normed("feedforward_layer_norm", x)


def stack(params: Params, config: OPTConfig, kind: int | None, *, scores: bool) -> Program:
    """All layers, then the scores of the one token of each row, if asked for."""
    block = Block(compute_dtype(config.dtype))
    x, n = block.slot("x"), config.hidden_dim
    where = {"causal": 1, "positions": block.slot("positions"), "positions_batch": block.slot("positions_batch")}
    for i, p in enumerate(params["layers"]):
        layer(block, p, config, i, kind, **where)
    if config.has_final_layer_norm:
        block.norm(x, x, n, params["layer_norm"], EPSILON)
    hidden = x
    if config.has_projections:
        p = params["project_out"]
        given = block.inputs(x, [p])
        hidden = block.buffer("projected", "rows", p["kernel"].n)
        block.dense(given, p, hidden)
    if scores:
        out = block.buffer("scores", "batch", config.vocabulary_size)
        block.scores(block.slot("batch"), hidden, params["token_embedding"], out)
    return block


def _built(params: Params, config: OPTConfig, cache: Params | None, *, scores: bool) -> Program | str:
    def build() -> Program:
        return stack(params, config, kind, scores=scores)

    kind = None if cache is None else cached_kind(cache["layers"][0]["key"])
    return program_of(params, (config, kind, scores), build)


def _call(
    token_ids: Array,
    padding_mask: Array,
    params: Params,
    config: OPTConfig,
    position_ids: Array | None,
    embeddings: Array | None,
    cache: Params | None,
    start: Array | None,
) -> Call:
    positions, dtype = token_positions(token_ids, start), compute_dtype(config.dtype)
    token = token_vectors(token_ids, params["token_embedding"], dtype=dtype) if embeddings is None else embeddings
    if config.has_projections:
        token = dense(token, **params["project_in"])
    places = positions if position_ids is None else position_ids
    call = Call(add.reference(token, embedding(places, **params["position_embedding"], dtype=dtype)))  # too few for threads
    call.positions(positions)
    if cache is None:
        call.own_keys_values(config.num_heads, config.head_dim)
    else:
        padding_mask = cache_append(cache["padding_mask"], padding_mask, start)
        call.caches(cache["layers"], start, padding_mask.shape[1], cache)
    call.mask("", padding_mask[:, None, None, :])
    return call


def backbone_fits(
    token_ids: Any, padding_mask: Any, params: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _built(params, config, cache, scores=False)
    return built if isinstance(built, str) else True


@kernel(reference.opt_backbone, when=backbone_fits)
def opt_backbone(
    token_ids: Array,
    padding_mask: Array,
    params: Params,
    config: OPTConfig,
    *,
    position_ids: Array | None = None,
    embeddings: Array | None = None,
    cache: Params | None = None,
    start: Array | None = None,
    rng: Any = None,
) -> Array:
    """The whole stack as one program."""
    program = _built(params, config, cache, scores=False)
    call = _call(token_ids, padding_mask, params, config, position_ids, embeddings, cache, start)
    buffers = call.run(program, team())
    width = config.word_embed_proj_dim or config.hidden_dim
    hidden = buffers["projected"] if config.has_projections else call.x
    return result(hidden, (*token_ids.shape, width), compute_dtype(config.dtype))


def step_fits(token_ids: Any, padding_mask: Any, positions: Any, params: Any, cache: Any, config: Any) -> bool | str:
    """loaded parameters, no adapters, not float64"""
    built = refused(config, None) or _built(params, config, cache, scores=True)
    return built if isinstance(built, str) else True


@kernel(reference.opt_decode_step, when=step_fits)
def opt_decode_step(
    token_ids: Array, padding_mask: Array, positions: Array, params: Params, cache: Params, config: OPTConfig
) -> Array:
    """From a token to the scores of the next as one program."""
    program = _built(params, config, cache, scores=True)
    call = _call(token_ids, padding_mask, params, config, None, None, cache, positions)
    scores = call.run(program, team())["scores"]
    return result(scores, (len(token_ids), config.vocabulary_size), compute_dtype(config.dtype))


def layer_fits(x: Any, p: Any, mask: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _built_layer(p, config, cache)
    return built if isinstance(built, str) else True


def _built_layer(p: Params, config: OPTConfig, cache: Params | None) -> Program | str:
    def build() -> Program:
        block = Block(compute_dtype(config.dtype))
        layer(block, p, config, 0, kind)
        return block

    kind = None if cache is None else cached_kind(cache["key"])
    return program_of(p, (config, kind), build)


@kernel(reference.opt_decoder_layer, when=layer_fits)
def opt_decoder_layer(
    x: Array,
    p: Params,
    mask: Array,
    config: OPTConfig,
    *,
    cache: Params | None = None,
    start: Array | None = None,
    rng: Any = None,
) -> Array:
    """One layer as a program."""
    call = Call(x)
    if cache is None:
        call.own_keys_values(config.num_heads, config.head_dim)
    else:
        call.caches([cache], start, mask.shape[-1])
    call.mask("", mask)
    call.run(_built_layer(p, config, cache), team())
    return result(call.x, x.shape, x.dtype.name)
