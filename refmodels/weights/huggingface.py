"""Hugging Face checkpoints of the three families: their config.json, their tensor names and the way their tensors are
laid out.

Only small functions of plain values: opening the files is the business of `safetensors`, putting the tree together
that of `presets`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from refmodels.files import CheckpointError, field
from refmodels.op import Array
from refmodels.parameters import Parameter
from refmodels.weights.tensor import Tensor

CLASSES = {"t5": "T5Backbone", "mt5": "T5Backbone", "opt": "OPTBackbone", "bloom": "BloomBackbone"}
"""`model_type` in config.json -> the class that can hold it."""

PREFIXES = {
    "t5": ("",),
    "opt": ("model.decoder.", "decoder.", ""),
    "bloom": ("transformer.", ""),
}
"""What a checkpoint of a family may put in front of every name: with a head, without, bare."""

EMBEDDINGS = {
    "t5": ("shared.weight", "decoder.embed_tokens.weight"),
    "opt": ("embed_tokens.weight",),
    "bloom": ("word_embeddings.weight",),
}
"""The token embeddings, behind the prefix."""

HEAD = "lm_head.weight"

_IGNORED = {
    "t5": r"(encoder|decoder)\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    "opt": r"version|layers\.\d+\.self_attn\.(masked_)?bias",
    "bloom": r"h\.\d+\.self_attention\.(masked_)?bias",
}
"""Names behind the prefix that may be there and are not used: aliases, a table that no layer reads, mask buffers."""

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_approximate",
    "gelu_pytorch_tanh": "gelu_approximate",
    "gelu_fast": "gelu_approximate",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}
"""Activation there -> the same function here."""


def arguments(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The constructor arguments of our class for this config.json.

    ValueError says which field of the file `source` is missing, absurd or asks for something that the class cannot be.
    """
    model_type = str(config.get("model_type"))
    if model_type not in CLASSES:
        raise CheckpointError(f"{source}: field 'model_type' is {model_type!r}, wanted one of {', '.join(CLASSES)}")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: field 'quantization_config': quantised checkpoints are not supported")
    return {"T5Backbone": _t5, "OPTBackbone": _opt, "BloomBackbone": _bloom}[CLASSES[model_type]](config, source)


def _only(config: Mapping[str, Any], source: str, name: str, wanted: Any, class_name: str) -> None:
    """The field must be absent, null or what it is in every model that the class can hold."""
    found = config.get(name)
    if found is not None and found != wanted:
        raise CheckpointError(
            f"{source}: field {name!r} is {found!r}: {class_name} can only hold models where it is {wanted!r}"
        )


def _t5(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    layers = field(config, source, "num_layers", "layers")
    _only(config, source, "num_decoder_layers", layers, "T5Backbone")
    _only(config, source, "relative_attention_num_buckets", 32, "T5Backbone")
    _only(config, source, "relative_attention_max_distance", 128, "T5Backbone")
    gate, _, function = field(config, source, "feed_forward_proj", "text", "relu").rpartition("-")
    if (gate, function) == ("gated", "gelu"):
        function = "gelu_new"  # the name says gelu, the function has always been the tanh form
    if gate not in {"", "gated"} or function not in _ACTIVATIONS:
        raise CheckpointError(
            f"{source}: field 'feed_forward_proj' is {config['feed_forward_proj']!r}, wanted one of "
            f"{', '.join(sorted(_ACTIVATIONS))}, or gated- and one of them"
        )
    _only(config, source, "dense_act_fn", function, "with this feed_forward_proj T5Backbone")
    _only(config, source, "is_gated_act", gate == "gated", "with this feed_forward_proj T5Backbone")
    tied = field(config, source, "tie_word_embeddings", "flag", True)
    return {
        "vocabulary_size": field(config, source, "vocab_size", "size"),
        "num_layers": layers,
        "num_heads": field(config, source, "num_heads", "size"),
        "hidden_dim": field(config, source, "d_model", "size"),
        "intermediate_dim": field(config, source, "d_ff", "size"),
        "key_value_dim": field(config, source, "d_kv", "size"),
        "dropout": field(config, source, "dropout_rate", "fraction", 0.1),
        "activation": _ACTIVATIONS[function],
        "use_gated_activation": gate == "gated",
        "layer_norm_epsilon": field(config, source, "layer_norm_epsilon", "fraction", 1e-6),
        # What the configuration decides is whether logits are scaled; for the class that is the same as being tied.
        "tie_embedding_weights": field(config, source, "scale_decoder_outputs", "flag", tied),
    }


def _opt(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    hidden = field(config, source, "hidden_size", "size")
    for name, wanted in (
        ("word_embed_proj_dim", hidden),
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("activation_function", "relu"),
        ("enable_bias", True),
        ("layer_norm_elementwise_affine", True),
    ):
        _only(config, source, name, wanted, "OPTBackbone")
    return {
        "vocabulary_size": field(config, source, "vocab_size", "size"),
        "num_layers": field(config, source, "num_hidden_layers", "layers"),
        "num_heads": field(config, source, "num_attention_heads", "size"),
        "hidden_dim": hidden,
        "intermediate_dim": field(config, source, "ffn_dim", "size"),
        "dropout": field(config, source, "dropout", "fraction", 0.1),
        "max_sequence_length": field(config, source, "max_position_embeddings", "size"),
    }


def _bloom(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    _only(config, source, "apply_residual_connection_post_layernorm", False, "BloomBackbone")
    hidden = field(config, source, ("hidden_size", "n_embed"), "size")
    return {
        "vocabulary_size": field(config, source, "vocab_size", "size"),
        "num_layers": field(config, source, ("n_layer", "num_hidden_layers"), "layers"),
        "num_heads": field(config, source, ("n_head", "num_attention_heads"), "size"),
        "hidden_dim": hidden,
        "intermediate_dim": 4 * hidden,
        "dropout": field(config, source, "hidden_dropout", "fraction", 0.0),
        "layer_norm_epsilon": field(config, source, "layer_norm_epsilon", "fraction", 1e-5),
    }


def prefix(names: Iterable[str], family: str) -> str:
    """What this checkpoint puts in front of its names: the first known prefix that any of them has."""
    names = tuple(names)
    return next(known for known in PREFIXES[family] if not known or any(name.startswith(known) for name in names))


def check_head(tensors: Mapping[str, Tensor], family: str, config: Mapping[str, Any], source: str) -> None:
    """Whether the checkpoint's output head is one that the class for `config` (constructor arguments) computes.

    Tied is what the tensors say: no `lm_head.weight`, or one equal to the token embeddings. KerasHub's T5 scales the
    logits if and only if the head is tied; its OPT and BLOOM are always tied. ValueError for anything else.
    """
    start = prefix(tensors, family)
    embeddings = next((tensors[start + name] for name in EMBEDDINGS[family] if start + name in tensors), None)
    head = tensors.get(HEAD)
    alone = family == "opt" and embeddings is None  # some files keep of the two names for one tensor only this
    tied = head is None or alone or (embeddings is not None and np.array_equal(head.read(), embeddings.read()))
    if family == "t5" and tied != config["tie_embedding_weights"]:
        raise CheckpointError(
            f"{source}: the output head is {'tied' if tied else f'a separate {HEAD}'} but its logits are "
            f"{'not ' if tied else ''}scaled (scale_decoder_outputs, else tie_word_embeddings): T5Backbone can hold "
            "only a tied head with scaled logits or a separate one with unscaled logits"
        )
    if family != "t5" and not tied:
        raise CheckpointError(f"{source}: {HEAD} differs from the token embeddings: the class can hold only a tied head")


def names(parameter: Parameter, start: str) -> tuple[str, ...]:
    """Where this parameter may be found in a checkpoint whose names begin with `start`, the usual name first."""
    return (*(start + name for name in parameter.huggingface), *parameter.huggingface)


def ignorable(name: str, family: str, start: str) -> bool:
    """Whether a tensor that is no parameter may be left aside. A head can, since `check_head` has seen it."""
    return name == HEAD or re.fullmatch(_IGNORED[family], name.removeprefix(start)) is not None


def stored_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape of the tensor that holds this parameter."""
    shape = parameter.shape
    if parameter.layout == "offset_rows":
        return (shape[0] + 2, *shape[1:])
    if parameter.layout == "same":
        return shape
    rows = shape[-1] if parameter.layout == "transposed" else 3 * shape[-1]
    return (rows, *shape[:-1])


def convert(values: Array, parameter: Parameter) -> Array:
    """The stored values (of shape `stored_shape(parameter)`) as this parameter; a view where possible."""
    if parameter.layout == "offset_rows":
        return values[2:]
    if parameter.layout == "transposed":
        return values.T
    if parameter.layout in {"query", "key", "value"}:
        heads, head_dim = parameter.keras_shape[-2:]
        part = ("query", "key", "value").index(parameter.layout)
        interleaved = values.reshape(heads, 3, head_dim, *values.shape[1:])
        return interleaved[:, part].reshape(heads * head_dim, *values.shape[1:]).T
    return values
