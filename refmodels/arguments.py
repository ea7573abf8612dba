"""What a caller passes, checked: kinds of values, the fields of a config, dtype policies. An error says what was wanted."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeGuard

import numpy as np

from refmodels.ops.precision import POLICIES

LARGEST_SIZE = 10_000_000
"""No dimension of a published model comes near; a larger one is a corrupt config."""


def check_config(config: Any, *, optional: tuple[str, ...] = ()) -> None:
    """Check the fields of a config by their type: sizes positive, dropout in [0, 1), epsilon positive, flags boolean."""
    for field in fields(config):
        value, label = getattr(config, field.name), f"{type(config).__name__.removesuffix('Config')} {field.name}"
        if field.name == "dtype":
            if value not in POLICIES:
                raise ValueError(f"{label} must be one of {', '.join(POLICIES)}, got {value!r}")
        elif field.name == "dropout":
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"{label} must be a number in [0, 1), got {value!r}")
        elif field.name == "layer_norm_epsilon":
            if not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{label} must be a positive number, got {value!r}")
        elif field.name in optional and value is None:
            continue
        elif field.type in (bool, bool | None):
            if not isinstance(value, bool):
                raise ValueError(f"{label} must be true or false, got {value!r}")
        elif field.name != "activation" and not (is_integer(value) and 0 < value <= LARGEST_SIZE):
            raise ValueError(f"{label} must be a positive integer up to {LARGEST_SIZE}, got {value!r}")


def check_heads(config: Any) -> None:
    """hidden_dim must be a multiple of num_heads."""
    if config.hidden_dim % config.num_heads:
        raise ValueError(f"hidden_dim must be divisible by num_heads, got {config.hidden_dim} and {config.num_heads}")


def check_length(length: int, limit: int | None) -> None:
    """A sequence must fit the table of positions."""
    if limit is not None and length > limit:
        raise ValueError(f"sequence length {length} is more than max_sequence_length {limit}")


def is_number(value: Any) -> bool:
    """A number, Python's or NumPy's, but no boolean."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """An integer, Python's or NumPy's, but no boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def policy_name(dtype: Any) -> str:
    """The policy in any form a config holds it: None (float32), a name, a NumPy type, Keras' serialised DTypePolicy."""
    if dtype is None:
        return "float32"
    if isinstance(dtype, Mapping):
        inner = dtype.get("config")
        name = inner.get("name") if isinstance(inner, Mapping) else None
        plain = ("DTypePolicy", "FloatDTypePolicy")  # the second is the name in Keras before 3.4, and an alias since
        if dtype.get("class_name") not in plain or not isinstance(name, str):
            raise ValueError(f"dtype policy {dtype.get('class_name')!r} is not supported, wanted a DTypePolicy with a name")
        return name
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        raise ValueError(f"dtype must be one of {', '.join(POLICIES)}, got {dtype!r}") from None
