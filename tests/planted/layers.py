"""Fused layers: OPT's whole decoder layer, attention of the three families, T5's feed-forward; each with one fault."""

import numpy as np

from planted import cast, f32, right, wrong
from refmodels.bloom import bloom_attention, bloom_decoder_layer
from refmodels.ops.precision import compute_dtype
from refmodels.opt import opt_attention, opt_decoder_layer
from refmodels.t5 import (
    ACTIVATIONS,
    t5_attention,
    t5_cross_attention,
    t5_encoder,
    t5_feedforward,
    t5_keys_values,
    t5_logits,
    t5_self_attention,
)


def is_plain(*args, **kwargs):
    """Plain weights alone, and no dropout."""
    if kwargs.get("rng") is not None:
        return "dropout"
    return all(plain_leaf(p) for p in args if isinstance(p, dict)) or "weights of another form"


def plain_leaf(tree):
    if isinstance(tree, dict):
        return not any("scale" in name or "lora" in name for name in tree) and all(map(plain_leaf, tree.values()))
    return all(map(plain_leaf, tree)) if isinstance(tree, list) else True


def norm(x, p, dtype):
    xw = f32(x)
    deviation = xw - xw.mean(-1, keepdims=True)
    root = np.sqrt((deviation * deviation).mean(-1, keepdims=True) + xw.dtype.type(1e-5))
    return cast(deviation / root * f32(p["gamma"]) + f32(p["beta"]), dtype)


def product(x, p, bias=True):
    y = f32(x) @ f32(p["kernel"])
    return cast(y + f32(p["bias"]) if bias and "bias" in p else y, x.dtype)


def attend(q, k, v, mask, scale, bias=None):
    q, k, v = (f32(a).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * q.dtype.type(scale)
    if bias is not None:
        scores = scores + f32(bias)
    some = mask.any(-1, keepdims=True)
    scores = np.where(some, np.where(mask, scores, -np.inf), 0).astype(scores.dtype)
    e = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    return ((e @ v) / e.sum(-1, keepdims=True)).transpose(0, 2, 1, 3)


def opt_layer(**flaw):
    """OPT's decoder layer in one function, its products and cache included; `flaw` says what is wrong with it."""
    has = flaw.get

    def kernel(x, p, mask, config, *, cache=None, start=None, rng=None):
        b, t, n = x.shape
        heads, before = config.num_heads, config.do_layer_norm_before or has("always_before", False)
        first, second = p["self_attention_layer_norm"], p["feedforward_layer_norm"]
        a = p["self_attention"]
        h = norm(x, first, x.dtype) if before else x
        q, k, v = (
            product(h, a[name], has("bias", True)).reshape(b, t, heads, config.head_dim) for name in ("query", "key", "value")
        )
        if has("halves_of_heads") and heads > 1:
            q = q.reshape(b, t, config.head_dim, heads).swapaxes(2, 3).reshape(q.shape)
        if cache is not None:
            places = np.zeros(b, np.int64) if start is None or has("ignore_start") else np.array(start)
            if has("first_row") and b:
                places[:] = places[0]
            places = places + (has("shift", 0) if start is not None and places.any() else 0)
            end = mask.shape[-1]
            for name, new in (("key", k), ("value", v)):
                for row, place in enumerate(places):
                    last = min(place + t, cache[name].shape[1])
                    cache[name][row, place:last] = new[row, : last - place]
            if has("kept_key") and t == 1:
                cache["key"][:, :1] = k
            k, v = cache["key"][:, :end], cache["value"][:, :end]
        mask = np.ones_like(mask) if has("no_mask") and t == 1 else mask
        if has("one_key_less") and t == 1 and mask.shape[-1] > 1:
            mask = mask & (np.arange(mask.shape[-1]) > 0)
        scale = 1.0 if has("unscaled") else config.head_dim**-0.5
        context = cast(attend(q, k, v, mask, scale), x.dtype).reshape(b, t, n)
        h = product(context, a["output"])
        x = h if has("no_residual") else cast(f32(x) + f32(h), x.dtype)
        x = x if before else norm(x, first, x.dtype)
        h = norm(x, second, x.dtype) if before else x
        inner = product(h, p["feedforward_intermediate_dense"])
        inner = inner if has("no_relu") else np.maximum(inner, 0)
        h = product(inner, p["feedforward_output_dense"])
        x = h if has("no_second_residual") else cast(f32(x) + f32(h), x.dtype)
        return x if before else norm(x, second, x.dtype)

    return kernel


right(opt_decoder_layer, "the whole layer in one function", when=is_plain)(opt_layer())
right(opt_decoder_layer, "the same in bfloat16", when=is_plain, dtype="bfloat16")(opt_layer())
for what, flaw in {
    "the first residual is forgotten": {"no_residual": True},
    "the second residual is forgotten": {"no_second_residual": True},
    "norms that come last are taken to come first": {"always_before": True},
    "no bias in query, key and value": {"bias": False},
    "scores are not divided by sqrt(d)": {"unscaled": True},
    "no relu": {"no_relu": True},
    "heads interleaved": {"halves_of_heads": True},
    "start is not looked at": {"ignore_start": True},
    "every row is written where the first is": {"first_row": True},
    "the cache is written one position off": {"shift": 1},
    "a single token sees every key": {"no_mask": True},
    "a single token does not see the first key": {"one_key_less": True},
    "the first position's key is overwritten by every token": {"kept_key": True},
}.items():
    wrong(opt_decoder_layer, what, when=is_plain)(opt_layer(**flaw))


@wrong(opt_attention, "an adapter of the output is not seen")
def _(x, p, mask, config, *, cache=None, start=None, rng=None):
    output = {name: leaf for name, leaf in p["output"].items() if "lora" not in name}
    query = {name: leaf for name, leaf in p["query"].items() if "lora" not in name}
    return opt_attention.reference(x, {**p, "output": output, "query": query}, mask, config, cache=cache, start=start, rng=rng)


@wrong(bloom_attention, "ALiBi is scaled with the scores")
def _(x, p, mask, alibi, config, *, cache=None, start=None, rng=None):
    alibi = alibi * alibi.dtype.type(config.head_dim**-0.5)
    return bloom_attention.reference(x, p, mask, alibi, config, cache=cache, start=start, rng=rng)


@wrong(bloom_attention, "the first head's ALiBi serves every head")
def _(x, p, mask, alibi, config, *, cache=None, start=None, rng=None):
    alibi = np.broadcast_to(alibi[:, :1], alibi.shape)
    return bloom_attention.reference(x, p, mask, alibi, config, cache=cache, start=start, rng=rng)


@wrong(bloom_decoder_layer, "the residual is taken behind the norm")
def _(x, p, mask, alibi, config, *, cache=None, start=None, rng=None):
    from refmodels.ops.norm import layer_norm

    shifted = layer_norm.reference(x, **p["pre_attention_layernorm"], epsilon=config.layer_norm_epsilon)
    y = bloom_decoder_layer.reference(x, p, mask, alibi, config, cache=cache, start=start, rng=rng)
    return cast(f32(y) - f32(x) + f32(shifted), x.dtype)


@wrong(t5_attention, "scores divided by sqrt(d)")
def _(x, p, keys_values, mask, bias, config, *, rng=None):
    keys_values = {**keys_values, "key": cast(f32(keys_values["key"]) * config.head_dim**-0.5, keys_values["key"].dtype)}
    return t5_attention.reference(x, p, keys_values, mask, bias, config, rng=rng)


@wrong(t5_attention, "the result in the type of x, not of the residual stream", dtype="float16")
def _(x, p, keys_values, mask, bias, config, *, rng=None):
    return cast(t5_attention.reference(x, p, keys_values, mask, bias, config, rng=rng), x.dtype)


@wrong(t5_keys_values, "keys and values change places")
def _(x, p, config):
    made = t5_keys_values.reference(x, p, config)
    return {"key": made["value"], "value": made["key"]}


@wrong(t5_self_attention, "a cache that is empty is not written to", dtype="float32")
def _(x, p, mask, bias, config, *, cache=None, start=None, rng=None):
    if cache is not None and start is None:
        cache = {name: leaf.copy() for name, leaf in cache.items()}
    return t5_self_attention.reference(x, p, mask, bias, config, cache=cache, start=start, rng=rng)


@wrong(t5_cross_attention, "padding of the encoder is seen")
def _(x, p, encoded, mask, config, *, rng=None):
    return t5_cross_attention.reference(x, p, encoded, np.ones_like(mask), config, rng=rng)


@wrong(t5_encoder, "causal, as the decoder is")
def _(token_ids, padding_mask, params, config, *, embeddings=None, rng=None):
    hidden = t5_encoder.reference(token_ids, padding_mask, params, config, embeddings=embeddings, rng=rng)
    if hidden.shape[1] < 2:
        return hidden
    given = None if embeddings is None else embeddings[:, :1]
    first = t5_encoder.reference(token_ids[:, :1], padding_mask[:, :1], params, config, embeddings=given, rng=rng)
    return np.concatenate([first, hidden[:, 1:]], 1)


@wrong(t5_logits, "an untied head is scaled as well")
def _(hidden, params, config):
    y = t5_logits.reference(hidden, params, config)
    return y if config.tie_embedding_weights else cast(f32(y) * config.hidden_dim**-0.5, y.dtype)


def feedforward(*, activated_gate=False, no_gate=False, relu_always=False, no_residual=False, narrow=False):
    """T5's feed-forward in one function."""

    def kernel(x, p, config, *, rng=None):
        compute = compute_dtype(config.dtype)
        xw = f32(x)
        root = np.sqrt((xw * xw).mean(-1, keepdims=True) + xw.dtype.type(config.layer_norm_epsilon))
        h = cast(xw / root * f32(p["layer_norm"]["weight"]), compute)
        act = ACTIVATIONS["relu" if relu_always else config.activation].reference
        inner = act(product(h, p["input_projector"]))
        if config.use_gated_activation and not no_gate:
            gate = product(h, p["gate_projector"])
            inner = cast(f32(inner) * f32(act(gate) if activated_gate else gate), inner.dtype)
        y = f32(inner) @ f32(p["output_projector"]["kernel"])
        y = f32(cast(y, compute)) if narrow else cast(y, config.residual_dtype)
        return cast(f32(y) if no_residual else xw + f32(y), x.dtype)

    return kernel


right(t5_feedforward, "the whole sublayer in one function", when=is_plain)(feedforward())
right(t5_feedforward, "the same in float16", when=is_plain, dtype="float16")(feedforward())
wrong(t5_feedforward, "the gate is activated", when=is_plain)(feedforward(activated_gate=True))
wrong(t5_feedforward, "the gate is forgotten", when=is_plain)(feedforward(no_gate=True))
wrong(t5_feedforward, "relu whatever the config says", when=is_plain)(feedforward(relu_always=True))
wrong(t5_feedforward, "the residual is forgotten", when=is_plain)(feedforward(no_residual=True))
