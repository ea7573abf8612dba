"""KerasHub's `.lora.h5` files: which layer an index names.

The file holds `lora/vars/rank` and for each adapted layer `lora/<index>/vars/lora_kernel_a` and `lora_kernel_b`. The index is
the layer's place among all layers that own weights, in the order in which Keras walks through a model: parents before their
parts, and the parts of a layer last made first. It was observed in KerasHub 0.17 and 0.32 (spec/lora.md).
"""

from collections.abc import Iterable

RANK = "lora/vars/rank"

_ATTENTION = ("", ".output", ".value", ".key", ".query")
_T5_ENCODER = (
    "",
    ".layer_norm",
    ".output_projector",
    ".gate_projector",
    ".input_projector",
    ".self_attention_layer_norm",
    *(f".self_attention{part}" for part in _ATTENTION),
)
_T5_DECODER = (
    *_T5_ENCODER[:5],
    ".cross_attention_layer_norm",
    *(f".cross_attention{part}" for part in _ATTENTION),
    *_T5_ENCODER[5:],
)
_OPT = (
    "",
    ".feedforward_layer_norm",
    ".feedforward_output_dense",
    ".feedforward_intermediate_dense",
    ".self_attention_layer_norm",
    *(f".self_attention{part}" for part in _ATTENTION),
)
_BLOOM = (
    "",
    ".mlp_output_dense",
    ".mlp_intermediate_dense",
    ".post_attention_layernorm",
    *(f".self_attention{part}" for part in _ATTENTION),
    ".pre_attention_layernorm",
)

WALK: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "t5": (
        ("token_embedding", ("",)),
        ("encoder.layers", _T5_ENCODER),
        ("encoder.layer_norm", ("",)),
        ("decoder.layers", _T5_DECODER),
        ("decoder.layer_norm", ("",)),
    ),
    # Keras' token-and-position layer is a parent, which has no place in our tree.
    "opt": (("", ("", "position_embedding", "token_embedding")), ("layers", _OPT), ("layer_norm", ("",))),
    "bloom": (
        ("token_embedding", ("",)),
        ("embedding_layernorm", ("",)),
        ("layers", _BLOOM),
        ("final_layernorm", ("",)),
    ),
}
"""Family -> its top layers in Keras' order, by our paths, each with its parts; `layers` stands for all of a stack."""


def indices(family: str, num_layers: int, paths: Iterable[str]) -> dict[str, int]:
    """Path of a layer -> its index, in a model with `num_layers` and parameters at `paths`. A layer that KerasHub's class does
    not have has none."""
    owners = {".".join(path.split(".")[:end]) for path in paths for end in range(1, path.count(".") + 1)}
    order: list[str] = []
    for top, parts in WALK[family]:
        tops = [f"{top}.{i}" for i in range(num_layers)] if top.endswith("layers") else [top]
        order += [name + part for name in tops for part in parts if not name or name + part in owners]
    return {path: index for index, path in enumerate(order)}


def dataset(index: int, leaf: str) -> str:
    """The dataset of `lora_kernel_a` or `lora_kernel_b` of the layer with this index."""
    return f"lora/{index}/vars/{leaf}"
