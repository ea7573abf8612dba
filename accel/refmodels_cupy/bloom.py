"""BLOOM as launches: a layer, the stack, the scores of the next tokens. Attention makes ALiBi from each head's slope."""

from typing import Any

import numpy as np

from refmodels import bloom as reference
from refmodels.accelerator import Accelerator
from refmodels.bloom import BloomConfig
from refmodels.op import Params
from refmodels.ops.position import alibi_slopes
from refmodels.ops.precision import compute_dtype
from refmodels_cupy.attention import Alibi
from refmodels_cupy.blocks import Block, Places, causal_places, flat_ids, flat_rows, kept, masked_places, refused
from refmodels_cupy.device import Device


def layer(block: Block, x: Any, p: Params, config: BloomConfig, cache: Params | None, places: Places, alibi: Any) -> Any:
    """One layer: rows to rows."""
    own, epsilon = p["self_attention"], config.layer_norm_epsilon
    h = block.norm(x, p["pre_attention_layernorm"], epsilon)
    h = block.attention(h, own, config.num_heads, cache, places, scale=config.head_dim**-0.5, bias=alibi)
    x, h = block.dense_norm(h, own["output"], p["post_attention_layernorm"], epsilon, residual=x)
    h = block.dense(h, p["mlp_intermediate_dense"], activation="gelu_approximate")
    return block.dense(h, p["mlp_output_dense"], residual=x)


def stack(block: Block, x: Any, params: Params, config: BloomConfig, cache: Params | None, places: Places) -> Any:
    """The norm of the token vectors x, all layers, and the last norm."""
    device, heads, epsilon = block.device, config.num_heads, config.layer_norm_epsilon
    slopes = kept(params, "_slopes", lambda: device.to_device(alibi_slopes.reference(heads).astype(np.float32)))
    x = block.norm(x, params["embedding_layernorm"], epsilon)
    for i, p in block.layers(params["layers"]):
        x = layer(block, x, p, config, cache and cache["layers"][i], places, Alibi(slopes))
    return block.norm(x, params["final_layernorm"], epsilon)


def scores(block: Block, ids: Any, positions: Any, params: Params, config: BloomConfig, cache: Params, places: Places) -> Any:
    """The scores of the tokens after these, one of each row."""
    x = block.vectors(ids, params["token_embedding"])
    return block.scores(stack(block, x, params, config, cache, places), params["token_embedding"])


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the composites of `refmodels.bloom`."""

    def backbone_fits(
        token_ids: Any, padding_mask: Any, params: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
    ) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(params, config, token_ids.shape, rng=rng, caches=cache["layers"] if cache else ()) or True

    @accelerator.kernel(reference.bloom_backbone, when=backbone_fits)
    def bloom_backbone(
        token_ids: Any,
        padding_mask: Any,
        params: Params,
        config: BloomConfig,
        *,
        embeddings: Any = None,
        cache: Params | None = None,
        start: Any = None,
        rng: Any = None,
    ) -> Any:
        """The stack, from ids to hidden states."""
        block = Block(device, compute_dtype(config.dtype), *token_ids.shape)
        places = causal_places(device, token_ids, padding_mask, cache, start)
        x = flat_rows(device, embeddings)
        if x is None:
            x = block.vectors(flat_ids(device, token_ids, token_ids.shape), params["token_embedding"])
        return stack(block, x, params, config, cache, places).reshape(*token_ids.shape, -1)

    def layer_fits(
        x: Any, p: Any, mask: Any, alibi: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
    ) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(p, config, x.shape[:2], rng=rng, caches=[cache] if cache else ()) or True

    @accelerator.kernel(reference.bloom_decoder_layer, when=layer_fits)
    def bloom_decoder_layer(
        x: Any,
        p: Params,
        mask: Any,
        alibi: Any,
        config: BloomConfig,
        *,
        cache: Params | None = None,
        start: Any = None,
        rng: Any = None,
    ) -> Any:
        """One layer, with ALiBi as it is given."""
        block, places = Block(device, compute_dtype(config.dtype), *x.shape[:2]), masked_places(device, x, mask, cache, start)
        return layer(block, flat_rows(device, x), p, config, cache, places, alibi).reshape(x.shape)
