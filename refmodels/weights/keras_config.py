"""KerasHub's config.json of the three families, of any generation: which class, and its constructor arguments.

A model that KerasHub's class cannot be has the same form of file, with `refmodels>` in place of `keras_hub>`.

Only small functions of plain values, like `huggingface` for that world's config.json.
"""

from collections.abc import Mapping
from typing import Any

from refmodels.files import CheckpointError, field, keras_object, keras_policy

CLASSES = {"T5Backbone": "t5", "OPTBackbone": "opt", "BloomBackbone": "bloom"}
"""Class -> its family."""

_SIZES = {
    "vocabulary_size": "size",
    "num_layers": "layers",
    "num_heads": "size",
    "hidden_dim": "size",
    "intermediate_dim": "size",
}
_OPTIONAL = {"dropout": "fraction", "name": "text", "trainable": "flag", "weight_only": "flag"}
_OF_FAMILY = {
    "t5": {
        "key_value_dim": "size",
        "use_gated_activation": "flag",
        "layer_norm_epsilon": "fraction",
        "tie_embedding_weights": "flag",
    },
    "opt": {"max_sequence_length": "size"},
    "bloom": {"layer_norm_epsilon": "fraction"},
}
_BEYOND = {
    "t5": {"scale_logits": "flag"},
    "opt": {
        "word_embed_proj_dim": "size",
        "do_layer_norm_before": "flag",
        "remove_final_layer_norm": "flag",
        "tie_embedding_weights": "flag",
    },
    "bloom": {"tie_embedding_weights": "flag"},
}
"""Arguments that KerasHub's class of the family does not have."""


def class_name(config: Mapping[str, Any], source: str) -> str:
    """The class that `registered_name` names: a key of `CLASSES`."""
    registered: str = field(config, source, "registered_name", "text")
    package, _, name = registered.rpartition(">")
    if package not in {"keras_hub", "keras_nlp", "refmodels"} or name not in CLASSES:
        wanted = ", ".join(f"keras_hub>{known}" for known in CLASSES)
        raise CheckpointError(f"{source}: field 'registered_name' is {registered!r}, wanted one of {wanted}")
    return name


def keras_hub_can_hold(class_name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether KerasHub's class of this name has these arguments, those of a backbone's `get_config()`."""
    return not _BEYOND[CLASSES[class_name]].keys() & arguments.keys()


def arguments(config: Any, family: str, source: str) -> dict[str, Any]:
    """The constructor arguments in a KerasHub config, each checked."""
    if type(config) is not dict:
        raise CheckpointError(f"{source}: field 'config' is {type(config).__name__}, wanted an object of constructor arguments")
    found = {name: field(config, source, name, kind) for name, kind in _SIZES.items()}
    optional = _OPTIONAL | _OF_FAMILY[family] | _BEYOND[family]
    for name, value in config.items():
        if name in optional:
            nullable = name == "key_value_dim" and value is None
            found[name] = None if nullable else field(config, source, name, optional[name])
        elif name == "activation" and family == "t5":
            if value is not None and not isinstance(value, str | dict):
                raise CheckpointError(
                    f"{source}: field 'activation' is {str(value)[:100]!r}, wanted a name or a function object"
                )
            found[name] = value
        elif name not in _SIZES and name != "dtype":
            wanted = ", ".join((*_SIZES, *optional, "dtype", *(["activation"] if family == "t5" else [])))
            raise CheckpointError(f"{source}: field {name!r} is unknown, wanted {wanted}")
    return found | {"dtype": config.get("dtype")}  # like activation, the class reads every form of it


# -- writing --------------------------------------------------------------------------------------------------------------


def envelope(family: str, arguments: Mapping[str, Any], package: str = "keras_hub") -> dict[str, Any]:
    """The config.json of a backbone with these constructor arguments; `package` is whose class can hold it.

    A float32 model has no `dtype` in it: KerasHub 0.17 ignores `from_preset(dtype=...)` if there is one.
    """
    found = dict(arguments)
    if found["dtype"] == "float32":
        del found["dtype"]
    elif isinstance(found["dtype"], str):
        found["dtype"] = keras_policy(found["dtype"])
    if found.get("activation") == "gelu_approximate":  # by its name alone KerasHub does not find it
        function = {"module": "builtins", "class_name": "function", "config": "keras_hub>gelu_approximate"}
        found["activation"] = {**function, "registered_name": "function"}
    name = next(name for name, known in CLASSES.items() if known == family)
    written = keras_object(f"keras_hub.src.models.{family}.{family}_backbone", name, found)
    return written | {"registered_name": f"{package}>{name}"}
