"""Examples of what models are made of: layers, stacks, caches and steps of small random models of the three families.

An example has a model (its tree goes through `load`, as a model would do it) and a plan of calls: token ids or hidden states,
masks and starts, first a chunk and then some more with the cache. Caches are made by the accelerator's own kernels.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.bloom import BloomBackbone
from refmodels.conformance.case import Case, Environment, Inputs
from refmodels.conformance.drawing import EMPTY, LONG_ROW, Draw
from refmodels.conformance.plans import Plan, draw_plan
from refmodels.op import OPS, Array, Op, Params
from refmodels.ops.cache import cache_append, key_value_cache
from refmodels.ops.position import alibi_bias, alibi_slopes
from refmodels.ops.precision import compute_dtype, numpy_dtype, wide_dtype
from refmodels.opt import OPTBackbone
from refmodels.parameters import build_tree, flatten
from refmodels.t5 import ACTIVATIONS, T5Backbone, t5_cache, t5_keys_values

BACKBONES: dict[str, type[Backbone]] = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
QUANTISED = {"int8": ("int8", None, False), "weight_int8": ("int8", None, True), "int4": ("int4", 4, True)}


# -- random models ------------------------------------------------------------------------------------------------------------


def draw_model(draw: Draw, family: str, *, longest: int = 80) -> Backbone:
    """A small model whose every parameter matters: no bias is zero, no norm is 1."""
    heads, head_dim = draw.pick(2, 1, 3, 4), draw.size("d", high=33)
    config: dict[str, Any] = {
        "vocabulary_size": max(draw.size("v", high=None if draw.special == "v" else 70), 2),
        "num_layers": draw.pick(1, 2),
        "num_heads": heads,
        "hidden_dim": heads * head_dim,
        "intermediate_dim": max(draw.size("m", high=None if draw.special == "m" else 70), 1),
        "dropout": 0.3,
    }
    if family == "opt":
        config |= {
            "max_sequence_length": longest + 40,
            "word_embed_proj_dim": draw.pick(None, None, 3),
            "do_layer_norm_before": draw.pick(True, True, False),
            "remove_final_layer_norm": draw.pick(False, True),
        }
    if family == "t5":
        config |= {
            "key_value_dim": draw.pick(None, 3),
            "use_gated_activation": draw.pick(True, False),
            "activation": draw.pick("relu", *[name for name in ACTIVATIONS if name != "relu"]),
        }
    else:
        config["dropout"] = 0.3
    config["tie_embedding_weights"] = draw.pick(True, False)
    policy = f"mixed_{draw.dtype}" if draw.dtype in ("float16", "bfloat16") and draw.mixed_types else draw.dtype
    backbone = BACKBONES[family](**config, dtype=policy, seed=1)
    rng = draw.rng

    def leaf(parameter: Any) -> Array:
        shape, name = parameter.shape, parameter.path
        values = rng.standard_normal(shape) / np.sqrt(shape[0] if name.endswith("kernel") else 4)
        if name.endswith(("gamma", "weight")):
            values += 1.0
        return np.asarray(values * (2.0 if "embeddings" in name else 1.0), numpy_dtype(backbone.variable_dtype))

    backbone.params = build_tree(backbone.plain_parameters(), leaf)
    if draw.plain_models:
        return backbone
    form = draw.pick("plain", "plain", "plain", *QUANTISED)
    if form != "plain":
        draw.features.add(form)
        mode, block, weight_only = QUANTISED[form]
        backbone.quantize(mode, block_size=block, weight_only=weight_only)
    if draw.chance(5):
        draw.features.add("adapter")
        backbone.enable_lora(draw.pick(1, 2))
        for path, values in flatten(backbone.params):
            if path.endswith("lora_kernel_b"):
                values[...] = rng.standard_normal(values.shape) / 2
    return backbone


def subtree(tree: Any, path: str) -> Any:
    """What stands at `decoder.layers.0` of a tree."""
    for key in filter(None, path.split(".")):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


# -- inside of scripts -------------------------------------------------------------------------------------------------------


def vectors(draw: Draw, *shape: int, dtype: str) -> Array:
    """Hidden states: normal numbers of about 1."""
    return draw.laid_out(draw.rng.standard_normal(shape).astype(numpy_dtype(dtype)))


def token_ids(draw: Draw, model: Backbone, shape: tuple[int, int]) -> Array:
    """Ids below the vocabulary."""
    return draw.ints(*shape, high=model.config.vocabulary_size)


def fresh(value: Any) -> Any:
    """A generator as it was, so that every run makes the same draws."""
    return copy.deepcopy(value)


def contents(env: Environment, cache: Any, written: Array) -> list[Any] | None:
    """Keys and values at the positions that were written to, layer by layer; None for a cache that nobody may look into."""
    layers = cache.get("layers", [cache]) if isinstance(cache, dict) else None
    if layers is None or not all(isinstance(layer, dict) and {"key", "value"} <= layer.keys() for layer in layers):
        return None
    found = []
    for layer in layers:
        for name in ("key", "value"):
            leaf = env.host(layer[name])
            if not isinstance(leaf, np.ndarray) or leaf.shape[:2] != written.shape:
                return None
            found.append(np.where(written[:, :, None, None], leaf, np.zeros((), leaf.dtype)))
    return found


def results(calls: list[Any], cache: list[Any] | None) -> dict[str, Any]:
    """Every call's result; what the cache holds only where it may be looked at."""
    found: dict[str, Any] = {f"call {i + 1}": call for i, call in enumerate(calls)}
    return found if cache is None else found | {"cache": cache}


def empty_cache(inputs: Inputs, env: Environment, plan: Plan, *, layers: int) -> Any:
    """A cache by the accelerator's own kernels, its first positions filled."""
    config = inputs["config"]
    cache = key_value_cache(
        plan.rows,
        plan.capacity,
        layers=layers,
        heads=config.num_heads,
        head_dim=config.head_dim,
        dtype=compute_dtype(config.dtype),
    )
    fill(cache, inputs, env)
    return cache


def fill(cache: Any, inputs: Inputs, env: Environment) -> None:
    """Write what was there before, if there is to be anything."""
    if inputs.get("earlier") is None:
        return
    for layer in cache["layers"]:
        for name in ("key", "value"):
            cache_append(layer[name], env.array(inputs["earlier"][name]))
    real = np.ones(inputs["earlier"]["key"].shape[:2], bool)
    cache_append(cache["padding_mask"], env.array(real))


def earlier(draw: Draw, plan: Plan, config: Any) -> Params | None:
    """Keys and values of the positions that are filled beforehand."""
    if not plan.filled:
        return None
    shape, dtype = (plan.rows, plan.filled, config.num_heads, config.head_dim), compute_dtype(config.dtype)
    return {name: vectors(draw, *shape, dtype=dtype) for name in ("key", "value")}


# -- layers -------------------------------------------------------------------------------------------------------------------


def self_attention_case(op: Op[..., Any], draw: Draw) -> Case:
    """`*_attention` and `*_decoder_layer` on hidden states, with a cache over several calls or without."""
    family = op.name.split("_")[0]
    model = draw_model(draw, family, longest=LONG_ROW if draw.special == "s" else 80)
    config = model.config
    encoder = family == "t5" and draw.below(2) == 1
    cached = not encoder and (draw.special == "s" or draw.below(3) > 0)
    plan = draw_plan(draw, cached=cached, steps=3)
    dtype = config.residual_dtype if family == "t5" else model.compute_dtype
    masks = plan.masks() if not encoder else [plan.keys[0][:, None, None, :]]
    chunks = []
    for chunk, mask in zip(plan.chunks, masks, strict=True):
        entry = {
            "x": vectors(draw, *chunk.shape, config.hidden_dim, dtype=dtype),
            "mask": draw.laid_out(mask),
            "start": chunk.start,
        }
        if family == "bloom":
            slopes = alibi_slopes.reference(config.num_heads)
            entry["alibi"] = alibi_bias.reference(slopes, chunk.positions, chunk.end, dtype=wide_dtype(config.dtype))
        if family == "t5":
            rows = draw.pick(1, plan.rows) if plan.rows else 0
            shape = (rows, config.num_heads, chunk.shape[1], mask.shape[-1])
            entry["bias"] = vectors(draw, *shape, dtype=wide_dtype(config.dtype))
        chunks.append(entry)
    stack = {"opt": "layers", "bloom": "layers", "t5": f"{'en' if encoder else 'de'}coder.layers"}[family]
    part = ".self_attention" if op.name in ("opt_attention", "bloom_attention") else ""
    number = draw.below(config.num_layers)
    inputs = {
        "params": model.params,
        "config": config,
        "path": f"{stack}.{number}{part}",
        "chunks": chunks,
        "earlier": earlier(draw, plan, config),
        "rng": None if cached or not draw.chance(8) else np.random.default_rng(5),
    }

    def script(inputs: Inputs, env: Environment) -> Any:
        p = subtree(env.load(inputs["params"]), inputs["path"])
        cache = empty_cache(inputs, env, plan, layers=1) if cached else None
        if cached and not isinstance(cache, dict):
            return results([], None)
        layer = cache["layers"][0] if cache else None
        calls = []
        for chunk in inputs["chunks"]:
            given = {name: env.array(value) for name, value in chunk.items() if value is not None and name != "x"}
            start = given.pop("start", None)
            options = {"cache": layer, "start": start} if cached else {}
            if inputs["rng"] is not None:
                options["rng"] = fresh(inputs["rng"])
            places = [given[name] for name in ("mask", "alibi", "bias") if name in given]
            calls.append(env.host(env.call(op, env.array(chunk["x"]), p, *places, inputs["config"], **options)))
        return results(calls, contents(env, layer, plan.written) if cached else None)

    return Case(op, inputs, script, draw.dtype)


def t5_attention_case(op: Op[..., Any], draw: Draw) -> Case:
    """T5's parts of a layer that take hidden states: keys and values, attention to them, cross-attention, feed-forward."""
    model = draw_model(draw, "t5")
    config, name = model.config, op.name
    plan = draw_plan(draw, cached=False)
    b, t = plan.chunks[0].shape
    s = draw.size("s", high=None if draw.special == "s" else 40) if name in ("t5_attention", "t5_cross_attention") else t
    residual = config.residual_dtype if name in ("t5_cross_attention", "t5_feedforward") else model.compute_dtype
    decoder = draw.below(2) == 1 or name == "t5_cross_attention"
    attention = "cross_attention" if name == "t5_cross_attention" or (decoder and draw.below(2)) else "self_attention"
    layer = f"{'de' if decoder else 'en'}coder.layers.{draw.below(config.num_layers)}"
    keys = np.ones((b, s), bool)
    if s and b and draw.below(2):
        draw.features.add("ragged")
        keys = np.arange(s) < draw.rng.integers(1, s + 1, b)[:, None]
        if draw.chance(3):
            draw.features.add("fully masked")
            keys[draw.rng.integers(b)] = False
    bias_shape = (draw.pick(1, b) if b else 0, config.num_heads, t, s)
    inputs = {
        "params": model.params,
        "config": config,
        "x": vectors(draw, b, t, config.hidden_dim, dtype=residual),
        "source": vectors(draw, b, s, config.hidden_dim, dtype=model.compute_dtype),
        "mask": draw.laid_out(keys[:, None, None, :]),
        "bias": vectors(draw, *bias_shape, dtype=wide_dtype(config.dtype)) if draw.below(2) else None,
        "rng": np.random.default_rng(5) if draw.chance(8) else None,
    }

    def script(inputs: Inputs, env: Environment) -> Any:
        p, config = subtree(env.load(inputs["params"]), layer), inputs["config"]
        x, options = env.array(inputs["x"]), {} if inputs["rng"] is None else {"rng": fresh(inputs["rng"])}
        if op.name == "t5_keys_values":
            return env.call(op, x, p[attention], config)
        if op.name == "t5_feedforward":
            return env.call(op, x, p, config, **options)
        keys_values = t5_keys_values(env.array(inputs["source"]), p[attention], config)
        mask = env.array(inputs["mask"])
        if op.name == "t5_cross_attention":
            return env.call(op, x, p, keys_values, mask, config, **options)
        bias = None if inputs["bias"] is None else env.array(inputs["bias"])
        return env.call(op, x, p[attention], keys_values, mask, bias, config, **options)

    return Case(op, inputs, script, draw.dtype)


# -- stacks, prefill, steps ---------------------------------------------------------------------------------------------------


def stack_case(op: Op[..., Any], draw: Draw) -> Case:
    """Backbones, decoders, prefill and decode steps: token ids, ragged prompts, then more with the cache."""
    family, kind = op.name.split("_", 1)
    model = draw_model(draw, family, longest=LONG_ROW if draw.special == "s" else 80)
    scores = kind in ("prefill", "decode_step")
    cached = scores or draw.special == "s" or draw.below(3) > 0
    plan = draw_plan(draw, cached=cached, steps=3, prompts=scores, single=kind == "decode_step")
    given = draw.chance(5)
    chunks = []
    for chunk in plan.chunks:
        entry = {"ids": token_ids(draw, model, chunk.shape), "real": draw.laid_out(chunk.real), "start": chunk.start}
        entry["lengths"] = draw.laid_out(np.asarray(chunk.lengths))
        if given:
            entry["embeddings"] = vectors(draw, *chunk.shape, model.embedding_dim, dtype=model.embedding_dtype)
        if family == "opt" and kind == "backbone" and draw.chance(4):
            entry["position_ids"] = draw.ints(draw.pick(1, plan.rows) if plan.rows else 0, chunk.shape[1], high=40)
        chunks.append(entry)
    inputs = {
        "params": model.params,
        "config": model.config,
        "chunks": chunks,
        "earlier": earlier(draw, plan, model.config),
        "rng": np.random.default_rng(5) if not cached and draw.chance(8) else None,
    }
    if family == "t5":
        inputs |= draw_source(draw, model, plan.rows)

    def script(inputs: Inputs, env: Environment) -> Any:
        params, config = env.load(inputs["params"]), inputs["config"]
        cache, encoded = None, None
        if family == "t5":
            cache = encoder_cache(inputs, env, params, plan)
            fill(cache, inputs, env)
            encoded = (cache["encoded"], cache["encoder_padding_mask"]) if kind == "decoder" else None
        elif cached:
            cache = empty_cache(inputs, env, plan, layers=config.num_layers)
        calls = [
            env.host(_stack_call(op, env, chunk, params, config, cache if cached else None, encoded, inputs["rng"], i > 0))
            for i, chunk in enumerate(inputs["chunks"])
        ]
        return results(calls, contents(env, cache, plan.written) if cached else None)

    return Case(op, inputs, script, draw.dtype)


def _stack_call(
    op: Op[..., Any], env: Environment, chunk: Inputs, params: Any, config: Any, cache: Any, encoded: Any, rng: Any, later: bool
) -> Any:
    family, kind = op.name.split("_", 1)
    ids, real, lengths = (env.array(chunk[name]) for name in ("ids", "real", "lengths"))
    options = {name: env.array(chunk[name]) for name in ("start", "embeddings", "position_ids") if chunk.get(name) is not None}
    if kind == "decode_step" and later:
        return env.call(op, ids, real, options["start"], params, cache, config)
    if kind in ("prefill", "decode_step"):
        prefill = OPS[f"{family}_prefill"]
        run = env.call if prefill is op else lambda op, *args, **kwargs: op(*args, **kwargs)
        return run(prefill, ids, real, lengths, params, cache, config, **options)
    if cache is not None:
        options["cache"] = cache
    if rng is not None:
        options["rng"] = fresh(rng)
    before = () if encoded is None else encoded
    return env.call(op, ids, real, *before, params, config, **options)


def draw_source(draw: Draw, model: Backbone, rows: int) -> Inputs:
    """The encoder's ids and mask, some with vectors in place of the ids."""
    s = draw.size("source", high=20) if draw.special != "s" or not rows else 5
    real = np.ones((rows, s), bool)
    if rows and s and draw.below(2):
        draw.features.add("ragged")
        real = np.arange(s) < draw.rng.integers(1, s + 1, rows)[:, None]
        if draw.chance(3):
            draw.features.add("fully masked")
            real[draw.rng.integers(rows)] = False
    found: Inputs = {"source": token_ids(draw, model, (rows, s)), "source_real": draw.laid_out(real), "source_vectors": None}
    if draw.chance(5):
        found["source_vectors"] = vectors(draw, rows, s, model.embedding_dim, dtype=model.embedding_dtype)
    return found


def encoder_cache(inputs: Inputs, env: Environment, params: Any, plan: Plan) -> Any:
    """What `t5_cache` makes of the source, by the accelerator's own kernels."""
    options = {} if inputs["source_vectors"] is None else {"embeddings": env.array(inputs["source_vectors"])}
    source, real = env.array(inputs["source"]), env.array(inputs["source_real"])
    return t5_cache(source, real, plan.capacity, params, inputs["config"], **options)


def t5_whole_case(op: Op[..., Any], draw: Draw) -> Case:
    """T5's encoder, both stacks, the keys and values of all decoder layers, the cache."""
    model = draw_model(draw, "t5")
    plan = draw_plan(draw, cached=False)
    b, t = plan.chunks[0].shape
    source = draw_source(draw, model, b)
    inputs = {
        "params": model.params,
        "config": model.config,
        "ids": token_ids(draw, model, (b, t)),
        "real": draw.laid_out(plan.chunks[0].real),
        "hidden": vectors(draw, b, t, model.config.hidden_dim, dtype=model.compute_dtype),
        "vectors": vectors(draw, b, t, model.embedding_dim, dtype=model.embedding_dtype) if draw.chance(5) else None,
        "rng": np.random.default_rng(5) if draw.chance(8) else None,
        **source,
    }
    capacity = draw.pick(1, 0, 9)

    def script(inputs: Inputs, env: Environment) -> Any:
        params, config = env.load(inputs["params"]), inputs["config"]
        source, source_real, ids, real = (env.array(inputs[name]) for name in ("source", "source_real", "ids", "real"))
        options = {} if inputs["rng"] is None or op.name == "t5_cache" else {"rng": fresh(inputs["rng"])}
        given = {"embeddings": "source_vectors"} if op.name != "t5_backbone" else {
            "encoder_embeddings": "source_vectors", "decoder_embeddings": "vectors",
        }  # fmt: skip
        options |= {name: env.array(inputs[key]) for name, key in given.items() if inputs[key] is not None}
        if op.name == "t5_cross_keys_values":
            return env.call(op, env.array(inputs["hidden"]), params, config)
        if op.name == "t5_backbone":
            return env.call(op, source, source_real, ids, real, params, config, **options)
        if op.name == "t5_cache":
            cache = env.call(op, source, source_real, capacity, params, config, **options)
            return cache if isinstance(cache, dict) else {}
        return env.call(op, source, source_real, params, config, **options)

    return Case(op, inputs, script, draw.dtype)


def head_case(op: Op[..., Any], draw: Draw) -> Case:
    """Hidden states to scores."""
    model = draw_model(draw, op.name.split("_")[0])
    hidden = vectors(draw, *draw.leading(), model.embedding_dim, dtype=model.compute_dtype)
    inputs = {"params": model.params, "config": model.config, "hidden": hidden}

    def script(inputs: Inputs, env: Environment) -> Any:
        config = (inputs["config"],) if op.name == "t5_logits" else ()
        return env.call(op, env.array(inputs["hidden"]), env.load(inputs["params"]), *config)

    return Case(op, inputs, script, draw.dtype)


BUILDERS: dict[str, Callable[[Op[..., Any], Draw], Case]] = {
    **dict.fromkeys(
        ("opt_attention", "opt_decoder_layer", "bloom_attention", "bloom_decoder_layer", "t5_self_attention"),
        self_attention_case,
    ),
    **dict.fromkeys(("t5_keys_values", "t5_attention", "t5_cross_attention", "t5_feedforward"), t5_attention_case),
    **dict.fromkeys(("t5_encoder", "t5_cross_keys_values", "t5_backbone", "t5_cache"), t5_whole_case),
    **dict.fromkeys(
        ("opt_backbone", "opt_prefill", "opt_decode_step", "bloom_backbone", "bloom_prefill", "bloom_decode_step", "t5_decoder",
         "t5_prefill", "t5_decode_step"), stack_case,
    ),
    **dict.fromkeys(("opt_logits", "bloom_logits", "t5_logits"), head_case),
}  # fmt: skip
"""Composite -> how its examples are made."""


def model_case(op: Op[..., Any], draw: Draw) -> Case:
    """An example of one of these composites."""
    return BUILDERS[op.name](op, draw)


def letters_of(op: Op[..., Any], kind: str) -> tuple[str, ...]:
    """What may be 0 (rows, tokens), and what thousands (keys in the cache, the inner layer, the vocabulary)."""
    build = BUILDERS[op.name]
    if build is head_case:
        return ("*b",) if kind == EMPTY else ("v",)
    if kind == EMPTY:
        return ("b",) if op.name.endswith(("prefill", "decode_step")) else ("b", "t")
    if build in (self_attention_case, stack_case):
        return ("s",)
    return (
        ("s",) if op.name in ("t5_attention", "t5_cross_attention") else ("m",) if op.name == "t5_feedforward" else ("v", "m")
    )
