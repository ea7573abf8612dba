"""Whole decode steps and prefills: positions, masks, what of the cache is read."""

import numpy as np

from planted import cast, f32, right, wrong
from planted.layers import is_plain, norm, opt_layer, product
from refmodels.bloom import bloom_backbone, bloom_decode_step
from refmodels.ops.precision import compute_dtype
from refmodels.opt import opt_backbone, opt_decode_step, opt_logits, opt_prefill
from refmodels.t5 import t5_cache, t5_decode_step, t5_prefill


def opt_step(**flaw):
    """OPT's decode step in one function; `flaw` says what is wrong with it."""
    has, layer = flaw.get, opt_layer(**flaw)

    def kernel(token_ids, padding_mask, positions, params, cache, config):
        rows, dtype = np.arange(len(token_ids)), compute_dtype(config.dtype)
        places = np.array(positions)
        if has("first_position") and len(places):
            places[:] = places[0]
        x = cast(params["token_embedding"]["embeddings"][token_ids[:, 0]], dtype)
        if config.has_projections:
            x = product(x, params["project_in"])
        learned = params["position_embedding"]["embeddings"]
        x = cast(f32(x) + f32(cast(learned[(places + has("next", 0)) % len(learned)], dtype)), dtype)[:, None]
        cache["padding_mask"][rows, np.asarray(positions)] = padding_mask[:, 0]
        end = int(np.asarray(positions).max(initial=-1)) + 1
        real = cache["padding_mask"][:, :end]
        if has("no_padding"):
            real = np.ones_like(real)
        seen = np.arange(end) <= places[:, None]
        mask = (real & seen)[:, None, None]
        for i, p in enumerate(params["layers"][: has("layers")]):
            x = layer(x, p, mask, config, cache=cache["layers"][i], start=positions)
        if config.has_final_layer_norm or has("always_final"):
            x = norm(x, params["layer_norm"], x.dtype) if "layer_norm" in params else x
        x = x[:, -1]
        if config.has_projections:
            x = product(x, params["project_out"])
        table = params["token_embedding"]
        reverse = table["embeddings"].T if "reverse_embeddings" not in table or has("tied") else table["reverse_embeddings"]
        return cast(f32(x) @ f32(reverse), x.dtype)

    return kernel


right(opt_decode_step, "the whole step in one function", when=is_plain)(opt_step())
right(opt_decode_step, "the same in float16", when=is_plain, dtype="float16")(opt_step())
for what, flaw in {
    "the position is one too far": {"next": 1},
    "rows share the first row's position": {"first_position": True},
    "padding in the cache is seen": {"no_padding": True},
    "one layer only": {"layers": 1},
    "the first residual of a layer is forgotten": {"no_residual": True},
    "keys are written one position off": {"shift": 1},
    "an untied head is taken to be tied": {"tied": True},
}.items():
    wrong(opt_decode_step, what, when=is_plain)(opt_step(**flaw))


@wrong(opt_backbone, "position_ids are not looked at")
def _(token_ids, padding_mask, params, config, *, position_ids=None, embeddings=None, cache=None, start=None, rng=None):
    return opt_backbone.reference(
        token_ids, padding_mask, params, config, embeddings=embeddings, cache=cache, start=start, rng=rng
    )


@wrong(opt_backbone, "vectors in place of tokens are not looked at")
def _(token_ids, padding_mask, params, config, *, position_ids=None, embeddings=None, cache=None, start=None, rng=None):
    return opt_backbone.reference(
        token_ids, padding_mask, params, config, position_ids=position_ids, cache=cache, start=start, rng=rng
    )


@wrong(opt_prefill, "the last column in place of each row's last token")
def _(token_ids, padding_mask, lengths, params, cache, config, *, start=None, embeddings=None):
    lengths = np.full_like(lengths, token_ids.shape[1])
    return opt_prefill.reference(token_ids, padding_mask, lengths, params, cache, config, start=start, embeddings=embeddings)


@wrong(opt_prefill, "padding inside of a prompt is seen")
def _(token_ids, padding_mask, lengths, params, cache, config, *, start=None, embeddings=None):
    mask = np.arange(token_ids.shape[1]) < lengths[:, None]
    return opt_prefill.reference(token_ids, mask, lengths, params, cache, config, start=start, embeddings=embeddings)


@wrong(opt_logits, "the last of the vocabulary is left out where it is odd")
def _(hidden, params):
    y = opt_logits.reference(hidden, params).copy()
    if y.shape[-1] % 2 and y.size:
        y[..., -1] = 0
    return y


@wrong(bloom_decode_step, "the step remembers how far it was", state=True)
def remembers():
    seen = {"positions": None}

    def kernel(token_ids, padding_mask, positions, params, cache, config):
        if seen["positions"] is None or len(seen["positions"]) != len(positions) or (positions < seen["positions"]).any():
            seen["positions"] = np.array(positions)
        result = bloom_decode_step.reference(token_ids, padding_mask, seen["positions"], params, cache, config)
        seen["positions"] = seen["positions"] + 1
        return result

    return kernel


@wrong(bloom_backbone, "the embeddings' norm is forgotten for given vectors")
def _(token_ids, padding_mask, params, config, *, embeddings=None, cache=None, start=None, rng=None):
    if embeddings is not None:
        n = embeddings.shape[-1]
        one = {"gamma": np.full(n, 2, embeddings.dtype), "beta": np.zeros(n, embeddings.dtype)}
        params = {**params, "embedding_layernorm": one}
    return bloom_backbone.reference(
        token_ids, padding_mask, params, config, embeddings=embeddings, cache=cache, start=start, rng=rng
    )


@wrong(bloom_backbone, "a key is rounded to half precision on its way to the cache")
def _(token_ids, padding_mask, params, config, *, embeddings=None, cache=None, start=None, rng=None):
    result = bloom_backbone.reference(
        token_ids, padding_mask, params, config, embeddings=embeddings, cache=cache, start=start, rng=rng
    )
    for layer in cache["layers"] if cache else []:
        layer["key"][...] = f32(cast(layer["key"], "bfloat16"))
    return result


@wrong(t5_cache, "the encoder's padding is forgotten")
def _(encoder_token_ids, encoder_padding_mask, capacity, params, config, *, embeddings=None):
    cache = t5_cache.reference(encoder_token_ids, encoder_padding_mask, capacity, params, config, embeddings=embeddings)
    return {**cache, "encoder_padding_mask": np.ones_like(encoder_padding_mask)}


@wrong(t5_prefill, "start is not looked at")
def _(token_ids, padding_mask, lengths, params, cache, config, *, start=None, embeddings=None):
    result = t5_prefill.reference(token_ids, padding_mask, lengths, params, cache, config, start=start, embeddings=embeddings)
    if start is not None and (start == 0).all() and token_ids.shape[1] > 1:
        return result + result.dtype.type(1)
    return result


@wrong(t5_decode_step, "the cross-attention is that of the first row")
def _(token_ids, padding_mask, positions, params, cache, config):
    first = [{name: np.broadcast_to(leaf[:1], leaf.shape) for name, leaf in layer.items()} for layer in cache["encoded"]]
    return t5_decode_step.reference(token_ids, padding_mask, positions, params, {**cache, "encoded": first}, config)
