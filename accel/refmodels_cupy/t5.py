"""T5 as launches: the parts of a layer, both stacks, and the scores of the next tokens.

The position bias is looked up in the attention kernels, by distance.

The residual stream and what is added to it are in `residual_dtype`, float32 for a float16 model (T5-C8): products round their
float32 sums to that type, and norms bring the stream down to the type of the activations.
"""

from typing import Any

from refmodels import t5 as reference
from refmodels.accelerator import Accelerator
from refmodels.op import Params
from refmodels.ops.precision import compute_dtype
from refmodels.t5 import T5Config
from refmodels_cupy.attention import relative_table
from refmodels_cupy.blocks import Block, Places, causal_places, flat_ids, flat_rows, kept, masked_places, refused
from refmodels_cupy.device import Device


def self_attention(block: Block, x: Any, p: Params, config: T5Config, cache: Params | None, places: Places, bias: Any) -> Any:
    """x + attention(norm(x)), to what is in the cache too."""
    own = p["self_attention"]
    h = block.norm(x, p["self_attention_layer_norm"], config.layer_norm_epsilon)
    h = block.attention(h, own, config.num_heads, cache, places, scale=1.0, bias=bias)
    return block.dense(h, own["output"], residual=x, dtype=config.residual_dtype)


def cross_attention(block: Block, x: Any, p: Params, config: T5Config, encoded: Params, places: Places) -> Any:
    """x + attention(norm(x)) to the encoder's output."""
    own = p["cross_attention"]
    h = block.norm(x, p["cross_attention_layer_norm"], config.layer_norm_epsilon)
    query = block.dense(h, own["query"]).reshape(block.batch, block.t, *encoded["key"].shape[2:])
    h = block.attend(query, encoded["key"], encoded["value"], places, scale=1.0)
    return block.dense(h, own["output"], residual=x, dtype=config.residual_dtype)


def feedforward(block: Block, x: Any, p: Params, config: T5Config) -> Any:
    """x + Wo f(norm(x))."""
    h = block.norm(x, p["layer_norm"], config.layer_norm_epsilon)
    h = block.dense(h, p["input_projector"], activation=config.activation, gate=p.get("gate_projector"))
    return block.dense(h, p["output_projector"], residual=x, dtype=config.residual_dtype)


def encoder(block: Block, x: Any, params: Params, config: T5Config, places: Places) -> Any:
    """All layers of the encoder and its norm."""
    p, epsilon = params["encoder"], config.layer_norm_epsilon
    bias = bias_of(block, p, bidirectional=True)
    for _, layer in block.layers(p["layers"]):
        x = self_attention(block, x, layer, config, None, places, bias)
        x = feedforward(block, x, layer, config)
    return block.norm(x, p["layer_norm"], epsilon)


def decoder(
    block: Block,
    x: Any,
    params: Params,
    config: T5Config,
    cache: Params | None,
    places: Places,
    encoded: list[Params],
    cross_places: Places,
) -> Any:
    """All layers of the decoder and its norm."""
    p, epsilon = params["decoder"], config.layer_norm_epsilon
    bias = bias_of(block, p, bidirectional=False)
    for i, layer in block.layers(p["layers"]):
        x = self_attention(block, x, layer, config, cache and cache["layers"][i], places, bias)
        x = cross_attention(block, x, layer, config, encoded[i], cross_places)
        x = feedforward(block, x, layer, config)
    return block.norm(x, p["layer_norm"], epsilon)


def bias_of(block: Block, stack: Params, *, bidirectional: bool) -> Any:
    """The position bias of a stack: layer 0's table, for all layers (T5-C2)."""
    table = stack["layers"][0]["self_attention"]["relative_attention_bias"]["embeddings"]
    return kept(stack, "_bias", lambda: relative_table(block.device, table, bidirectional=bidirectional))


def looks_at(padding_mask: Any, device: Device) -> Places:
    """The real keys, for every query."""
    return Places(padding_mask.shape[1], {"key_mask": device.xp.ascontiguousarray(padding_mask)})


def scores(block: Block, ids: Any, positions: Any, params: Params, config: T5Config, cache: Params, places: Places) -> Any:
    """The scores of the tokens after these, one of each row."""
    x = block.vectors(ids, params["token_embedding"], dtype=config.residual_dtype)
    cross_places = looks_at(cache["encoder_padding_mask"], block.device)
    x = decoder(block, x, params, config, cache, places, cache["encoded"], cross_places)
    return block.scores(x, params["token_embedding"], scale=config.logits_scale)


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the composites of `refmodels.t5`."""

    def vectors(block: Block, token_ids: Any, params: Params, config: T5Config, embeddings: Any) -> Any:
        if embeddings is not None:
            return flat_rows(device, embeddings)
        ids = flat_ids(device, token_ids, token_ids.shape)
        return block.vectors(ids, params["token_embedding"], dtype=config.residual_dtype)

    def encoder_fits(
        token_ids: Any, padding_mask: Any, params: Any, config: Any, *, embeddings: Any = None, rng: Any = None
    ) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(params, config, token_ids.shape, rng=rng) or True

    @accelerator.kernel(reference.t5_encoder, when=encoder_fits)
    def t5_encoder(
        token_ids: Any, padding_mask: Any, params: Params, config: T5Config, *, embeddings: Any = None, rng: Any = None
    ) -> Any:
        """The encoder, from ids to its output."""
        block = Block(device, compute_dtype(config.dtype), *token_ids.shape)
        places = causal_places(device, token_ids, padding_mask, None, None, causal=False)
        x = vectors(block, token_ids, params, config, embeddings)
        return encoder(block, x, params, config, places).reshape(*token_ids.shape, -1)

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
        caches = [*encoded, *(cache["layers"] if cache else ())]
        return refused(params, config, token_ids.shape, rng=rng, caches=caches) or True

    @accelerator.kernel(reference.t5_decoder, when=decoder_fits)
    def t5_decoder(
        token_ids: Any,
        padding_mask: Any,
        encoded: list[Params],
        encoder_padding_mask: Any,
        params: Params,
        config: T5Config,
        *,
        embeddings: Any = None,
        cache: Params | None = None,
        start: Any = None,
        rng: Any = None,
    ) -> Any:
        """The decoder, from ids to its output."""
        block = Block(device, compute_dtype(config.dtype), *token_ids.shape)
        places = causal_places(device, token_ids, padding_mask, cache, start)
        x = vectors(block, token_ids, params, config, embeddings)
        x = decoder(block, x, params, config, cache, places, encoded, looks_at(encoder_padding_mask, device))
        return x.reshape(*token_ids.shape, -1)

    def self_attention_fits(
        x: Any, p: Any, mask: Any, bias: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
    ) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(p, config, x.shape[:2], rng=rng, caches=[cache] if cache else ()) or True

    @accelerator.kernel(reference.t5_self_attention, when=self_attention_fits)
    def t5_self_attention(
        x: Any,
        p: Params,
        mask: Any,
        bias: Any,
        config: T5Config,
        *,
        cache: Params | None = None,
        start: Any = None,
        rng: Any = None,
    ) -> Any:
        """One part of a layer, with the bias as it is given."""
        block, places = Block(device, compute_dtype(config.dtype), *x.shape[:2]), masked_places(device, x, mask, cache, start)
        return self_attention(block, flat_rows(device, x), p, config, cache, places, bias).reshape(x.shape)

    def cross_attention_fits(x: Any, p: Any, encoded: Any, mask: Any, config: Any, *, rng: Any = None) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(p, config, x.shape[:2], rng=rng, caches=[encoded]) or True

    @accelerator.kernel(reference.t5_cross_attention, when=cross_attention_fits)
    def t5_cross_attention(x: Any, p: Params, encoded: Params, mask: Any, config: T5Config, *, rng: Any = None) -> Any:
        """One part of a layer."""
        block, places = Block(device, compute_dtype(config.dtype), *x.shape[:2]), masked_places(device, x, mask)
        return cross_attention(block, flat_rows(device, x), p, config, encoded, places).reshape(x.shape)

    def feedforward_fits(x: Any, p: Any, config: Any, *, rng: Any = None) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(p, config, x.shape[:2], rng=rng) or True

    @accelerator.kernel(reference.t5_feedforward, when=feedforward_fits)
    def t5_feedforward(x: Any, p: Params, config: T5Config, *, rng: Any = None) -> Any:
        """One part of a layer."""
        block = Block(device, compute_dtype(config.dtype), *x.shape[:2])
        return feedforward(block, flat_rows(device, x), p, config).reshape(x.shape)
