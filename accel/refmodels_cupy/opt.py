"""OPT as launches: a layer, the stack, and the scores of the next tokens, of which decoding.py makes a graph."""

from typing import Any

from refmodels import opt as reference
from refmodels.accelerator import Accelerator
from refmodels.op import Params
from refmodels.ops.precision import compute_dtype
from refmodels.opt import EPSILON, OPTConfig
from refmodels_cupy.blocks import Block, Places, causal_places, flat_ids, flat_rows, masked_places, refused
from refmodels_cupy.device import Device


def layer(block: Block, x: Any, p: Params, config: OPTConfig, cache: Params | None, places: Places) -> Any:
    """One layer: rows to rows."""
    first, second = p["self_attention_layer_norm"], p["feedforward_layer_norm"]
    before, own = config.do_layer_norm_before, p["self_attention"]
    h = block.norm(x, first, EPSILON) if before else x
    h = block.attention(h, own, config.num_heads, cache, places, scale=config.head_dim**-0.5)
    total, h = block.dense_norm(h, own["output"], second if before else first, EPSILON, residual=x)
    x = total if before else h
    h = block.dense(h, p["feedforward_intermediate_dense"], activation="relu")
    if before:
        return block.dense(h, p["feedforward_output_dense"], residual=x)
    return block.dense_norm(h, p["feedforward_output_dense"], second, EPSILON, residual=x)[1]


def embedded(block: Block, ids: Any, position_ids: Any, params: Params, config: OPTConfig, given: Any = None) -> Any:
    """Token and position vectors, one row each; `given` rows in place of the tokens'."""
    table = params["position_embedding"]["embeddings"]
    if given is None and not config.has_projections:
        return block.vectors(ids, params["token_embedding"], position_ids=position_ids, positions=table)
    positions = block.position_vectors(position_ids, table)
    tokens = block.vectors(ids, params["token_embedding"]) if given is None else given
    if config.has_projections:
        return block.dense(tokens, params["project_in"], residual=positions)
    return block.sum(tokens, positions)


def stack(block: Block, x: Any, params: Params, config: OPTConfig, cache: Params | None, places: Places) -> Any:
    """All layers and what follows them."""
    for i, p in block.layers(params["layers"]):
        x = layer(block, x, p, config, cache and cache["layers"][i], places)
    if config.has_final_layer_norm:
        x = block.norm(x, params["layer_norm"], EPSILON)
    return block.dense(x, params["project_out"]) if config.has_projections else x


def scores(block: Block, ids: Any, positions: Any, params: Params, config: OPTConfig, cache: Params, places: Places) -> Any:
    """The scores of the tokens after these, one of each row."""
    x = embedded(block, ids, positions, params, config)
    return block.scores(stack(block, x, params, config, cache, places), params["token_embedding"])


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the composites of `refmodels.opt`."""

    def backbone_fits(
        token_ids: Any, padding_mask: Any, params: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any
    ) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(params, config, token_ids.shape, rng=rng, caches=cache["layers"] if cache else ()) or True

    @accelerator.kernel(reference.opt_backbone, when=backbone_fits)
    def opt_backbone(
        token_ids: Any,
        padding_mask: Any,
        params: Params,
        config: OPTConfig,
        *,
        position_ids: Any = None,
        embeddings: Any = None,
        cache: Params | None = None,
        start: Any = None,
        rng: Any = None,
    ) -> Any:
        """The stack, from ids to hidden states."""
        block = Block(device, compute_dtype(config.dtype), *token_ids.shape)
        places = causal_places(device, token_ids, padding_mask, cache, start)
        ids, numbers = (
            flat_ids(device, given, token_ids.shape)
            for given in (token_ids, places.how["positions"] if position_ids is None else position_ids)
        )
        x = embedded(block, ids, numbers, params, config, flat_rows(device, embeddings))
        return stack(block, x, params, config, cache, places).reshape(*token_ids.shape, -1)

    def layer_fits(x: Any, p: Any, mask: Any, config: Any, *, cache: Any = None, rng: Any = None, **_: Any) -> bool | str:
        """loaded parameters, no adapters, no dropout, not float64"""
        return refused(p, config, x.shape[:2], rng=rng, caches=[cache] if cache else ()) or True

    @accelerator.kernel(reference.opt_decoder_layer, when=layer_fits)
    def opt_decoder_layer(
        x: Any,
        p: Params,
        mask: Any,
        config: OPTConfig,
        *,
        cache: Params | None = None,
        start: Any = None,
        rng: Any = None,
    ) -> Any:
        """One layer."""
        block = Block(device, compute_dtype(config.dtype), *x.shape[:2])
        return layer(block, flat_rows(device, x), p, config, cache, masked_places(device, x, mask, cache, start)).reshape(
            x.shape
        )
