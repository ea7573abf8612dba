"""Fused kernels of BLOOM: a layer, the stack, and the step of decoding, each one program."""

from typing import Any

from refmodels import bloom as reference
from refmodels.bloom import BloomConfig
from refmodels.op import Array, Params
from refmodels.ops.cache import cache_append
from refmodels.ops.dense import token_vectors
from refmodels.ops.position import alibi_slopes, token_positions
from refmodels.ops.precision import compute_dtype
from refmodels_numba.accelerator import kernel, team
from refmodels_numba.blocks import Block, Call, cached_kind, program_of, refused, result
from refmodels_numba.layout import ALIBI, FLOAT32, GIVEN_BIAS
from refmodels_numba.packing import address
from refmodels_numba.program import Program


def layer(block: Block, p: Params, config: BloomConfig, i: int, kind: int | None, **attention: Any) -> None:
    """One layer on x, in place. With `kind` there is a cache of that type, whose keys and values of layer i are slots."""
    n, heads, size, epsilon = config.hidden_dim, config.num_heads, config.head_dim, config.layer_norm_epsilon
    x, h, m = block.slot("x"), block.buffer("h", "rows", n), block.buffer("m", "rows", config.intermediate_dim)
    q, k, v = (block.buffer(name, "rows", n) for name in "qkv")
    own = p["self_attention"]
    block.norm(x, h, n, p["pre_attention_layernorm"], epsilon)
    given = block.inputs(h, [own["query"]])
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
    block.norm(x, h, n, p["post_attention_layernorm"], epsilon)
    block.dense(block.inputs(h, [p["mlp_intermediate_dense"]]), p["mlp_intermediate_dense"], m, activation="gelu_approximate")
    block.dense(block.inputs(m, [p["mlp_output_dense"]]), p["mlp_output_dense"], x, residual=x)


def stack(params: Params, config: BloomConfig, kind: int | None, *, scores: bool) -> Program:
    """All layers, then the scores of the one token of each row, if asked for."""
    block = Block(compute_dtype(config.dtype))
    x, n, epsilon = block.slot("x"), config.hidden_dim, config.layer_norm_epsilon
    slopes = alibi_slopes.reference(config.num_heads)
    block.keep(slopes)
    where = {
        "causal": 1,
        "positions": block.slot("positions"),
        "positions_batch": block.slot("positions_batch"),
        "bias_kind": ALIBI,
        "bias": address(slopes),
    }
    block.norm(x, x, n, params["embedding_layernorm"], epsilon)
    for i, p in enumerate(params["layers"]):
        layer(block, p, config, i, kind, **where)
    block.norm(x, x, n, params["final_layernorm"], epsilon)
    if scores:
        out = block.buffer("scores", "batch", config.vocabulary_size)
        block.scores(block.slot("batch"), x, params["token_embedding"], out)
    return block


def _built(params: Params, config: BloomConfig, cache: Params | None, *, scores: bool) -> Program | str:
    kind = None if cache is None else cached_kind(cache["layers"][0]["key"])
    return program_of(params, (config, kind, scores), lambda: stack(params, config, kind, scores=scores))


def _call(
    token_ids: Array,
    padding_mask: Array,
    params: Params,
    config: BloomConfig,
    embeddings: Array | None,
    cache: Params | None,
    start: Array | None,
) -> Call:
    dtype = compute_dtype(config.dtype)
    call = Call(token_vectors(token_ids, params["token_embedding"], dtype=dtype) if embeddings is None else embeddings)
    call.positions(token_positions(token_ids, start))
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


@kernel(reference.bloom_backbone, when=backbone_fits)
def bloom_backbone(
    token_ids: Array,
    padding_mask: Array,
    params: Params,
    config: BloomConfig,
    *,
    embeddings: Array | None = None,
    cache: Params | None = None,
    start: Array | None = None,
    rng: Any = None,
) -> Array:
    """The whole stack as one program."""
    program = _built(params, config, cache, scores=False)
    call = _call(token_ids, padding_mask, params, config, embeddings, cache, start)
    call.run(program, team())
    return result(call.x, (*token_ids.shape, config.hidden_dim), compute_dtype(config.dtype))


def step_fits(token_ids: Any, padding_mask: Any, positions: Any, params: Any, cache: Any, config: Any) -> bool | str:
    """loaded parameters, no adapters, not float64"""
    built = refused(config, None) or _built(params, config, cache, scores=True)
    return built if isinstance(built, str) else True


@kernel(reference.bloom_decode_step, when=step_fits)
def bloom_decode_step(
    token_ids: Array, padding_mask: Array, positions: Array, params: Params, cache: Params, config: BloomConfig
) -> Array:
    """From a token to the scores of the next as one program."""
    program = _built(params, config, cache, scores=True)
    call = _call(token_ids, padding_mask, params, config, None, cache, positions)
    scores = call.run(program, team())["scores"]
    return result(scores, (len(token_ids), config.vocabulary_size), compute_dtype(config.dtype))


def _built_layer(p: Params, config: BloomConfig, cache: Params | None) -> Program | str:
    def build() -> Program:
        block = Block(compute_dtype(config.dtype))
        bias = {name: block.slot(name) for name in ("bias", "bias_batch", "bias_head", "bias_query")}
        layer(block, p, config, 0, kind, bias_kind=GIVEN_BIAS, **bias)
        return block

    kind = None if cache is None else cached_kind(cache["key"])
    return program_of(p, (config, kind), build)


def layer_fits(
    x: Any, p: Any, mask: Any, alibi: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
) -> bool | str:
    """loaded parameters, no adapters, no dropout, not float64"""
    built = refused(config, rng) or _built_layer(p, config, cache)
    return built if isinstance(built, str) else True


@kernel(reference.bloom_decoder_layer, when=layer_fits)
def bloom_decoder_layer(
    x: Array,
    p: Params,
    mask: Array,
    alibi: Array,
    config: BloomConfig,
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
    call.bias(alibi)
    call.run(_built_layer(p, config, cache), team())
    return result(call.x, x.shape, x.dtype.name)
