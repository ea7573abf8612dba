"""Quantised models: which parameters become what, the transformed tree and table, and Keras' names for it.

The arithmetic is in `ops/quantize.py`, the choice of the product in `ops/dense.py`, the document is `spec/quantization.md`. The
tree of a quantised model has int8 leaves in place of its matrices and a few small leaves beside each; `quantized` says which.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from refmodels.arguments import is_integer
from refmodels.op import Array, Params
from refmodels.ops.quantize import dequantized_groups, pack_int4, quantize_rows, quantized_groups, row_scale
from refmodels.parameters import ZEROS, Parameter, grown

MODES = ("int8", "int4")
BLOCK_SIZE = 128

_FILE_ORDER = {
    name: place
    for place, name in enumerate(
        ("kernel", "embeddings", "bias", "kernel_scale", "kernel_zero", "embeddings_scale", "embeddings_zero", "g_idx",
         "reverse_embeddings", "reverse_embeddings_scale", "reverse_embeddings_zero")
    )
}  # fmt: skip
"""The order in which a Keras layer numbers what it has of these: vars/0, vars/1, ..."""


@dataclass(frozen=True)
class Quantization:
    """How a model is quantised.

    mode          int8: a scale for each column of a kernel and each row of a table. int4: a scale and a zero for each
                  `block_size` consecutive inputs of a column (for a table: consecutive columns of a row)
    block_size    of int4; None for int8
    weight_only   int8 alone has a choice: False quantises the inputs of a product too, row by row, as Keras does
    """

    mode: str
    block_size: int | None = None
    weight_only: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"quantisation mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mode == "int4" and not (is_integer(self.block_size) and self.block_size > 0):
            raise ValueError(f"block_size of int4 must be a positive integer, got {self.block_size!r}")
        if self.mode == "int8" and self.block_size is not None:
            raise ValueError(f"int8 has no block_size, got {self.block_size!r}")
        if self.mode == "int4" and not self.weight_only:
            raise ValueError("int4 is for weights alone: weight_only must be true")

    @property
    def keras_mode(self) -> str:
        """Keras' name: `int8`, `int4/128`."""
        return self.mode if self.block_size is None else f"{self.mode}/{self.block_size}"


def quantization(mode: str, block_size: int | None = None, weight_only: bool | None = None) -> Quantization:
    """The quantisation of these arguments of `Backbone.quantize`, None being the mode's default."""
    if mode == "int4":
        return Quantization(mode, BLOCK_SIZE if block_size is None else block_size, weight_only is None or weight_only)
    return Quantization(mode, block_size, bool(weight_only))


def is_matrix(path: str) -> bool:
    """Whether the parameter of this path is one that is quantised: the kernels and the token tables."""
    *_, layer, name = ("", *path.split("."))
    return name == "kernel" or layer == "token_embedding"


# -- the table ------------------------------------------------------------------------------------------------------------


def quantized_table(parameters: Iterable[Parameter], how: Quantization) -> list[Parameter]:
    """The table of the quantised model: the matrices in their new form, each followed by its scale and what else it needs."""
    table: list[Parameter] = []
    for keras, group in groupby(parameters, lambda parameter: parameter.keras.rpartition("/")[0]):
        members = list(group)
        bias = next((member for member in members if member.path.endswith(".bias")), None)
        new = [entry for member in members for entry in _entries(member, bias, how)]
        if len(new) > len(members):
            ranked = sorted(new, key=lambda entry: _FILE_ORDER[_file_name(entry.path)])
            new = [replace(entry, keras=f"{keras}/{ranked.index(entry)}") for entry in new]
        table += new
    return table


def _file_name(path: str) -> str:
    return path.rpartition(".")[2].replace("_weight_only", "")


def _entries(parameter: Parameter, bias: Parameter | None, how: Quantization) -> Iterator[Parameter]:
    path, (rows, columns) = parameter.path, parameter.shape if is_matrix(parameter.path) else (0, 0)
    if not is_matrix(path):
        yield parameter
        return

    def entry(suffix: str, shape: tuple[int, ...], dtype: str, keras_shape: tuple[int, ...] | None = None) -> Parameter:
        return replace(
            parameter, path=path + suffix, shape=shape, keras_shape=keras_shape or shape, dtype=dtype, initializer=ZEROS
        )

    by_row = path.endswith(".embeddings")
    if how.mode == "int8":
        yield entry("", parameter.shape, "int8", parameter.keras_shape)
        heads = len(parameter.keras_shape) == 3 and bias is not None  # Keras' EinsumDense keeps the axes of its result
        keras_shape = (1, 1, *bias.keras_shape) if heads and bias is not None else None
        yield entry(f"{_weight_only(how)}_scale", (rows if by_row else columns,), "float32", keras_shape)
        return
    summed = columns if by_row else rows
    groups, half = -(-summed // int(how.block_size or 0)), -(-columns // 2)
    reverse = path.endswith(".reverse_embeddings")
    yield entry("", (-(-rows // 2), columns) if reverse else (rows, half), "int8")
    shape = (rows, groups) if by_row else (groups, columns)
    yield entry("_scale", shape, "float32")
    yield entry("_zero", shape, "float32" if reverse else "int8")  # so Keras has it
    if not reverse:  # an untied head shares the table's
        yield replace(entry("", (summed,), "float32"), path=f"{path.rpartition('.')[0]}.g_idx")


def _weight_only(how: Quantization) -> str:
    return "_weight_only" if how.mode == "int8" and how.weight_only else ""


# -- the tree -------------------------------------------------------------------------------------------------------------


def check_finite(leaves: Mapping[str, Array]) -> None:
    """ValueError for a matrix, by path, that is not finite in float32."""
    for path, values in leaves.items():
        if is_matrix(path) and not np.isfinite(row_scale.reference(values)).all():
            raise ValueError(f"{path} holds infinities or NaN, or numbers beyond float32: it cannot be quantised")


def quantized_tree(leaves: dict[str, Array], how: Quantization) -> Params:
    """The tree of these leaves, by path, with the matrices quantised one after the other; each leaves `leaves` as it is read,
    so that no two whole trees are held."""
    return grown(entry for path in list(leaves) for entry in _quantized(path, leaves.pop(path), how))


def _quantized(path: str, values: Array, how: Quantization) -> Iterator[tuple[str, Array]]:
    by_row = path.endswith(".embeddings")
    if not is_matrix(path):
        yield path, values
    elif how.mode == "int8":
        matrix = values if by_row else values.T
        scale = row_scale.reference(matrix)  # by the reference, whatever accelerator is in force
        levels = quantize_rows.reference(matrix, scale)
        yield path, levels if by_row else np.ascontiguousarray(levels.T)
        yield f"{path}{_weight_only(how)}_scale", scale
    else:
        reverse = path.endswith(".reverse_embeddings")
        levels, scale, zero = quantized_groups(values.T if by_row else values, int(how.block_size or 0))
        size = len(levels)
        if by_row:
            levels, scale, zero = levels.T, scale.T, zero.T
        yield path, np.ascontiguousarray(pack_int4.reference(levels, axis=0 if reverse else -1))
        yield f"{path}_scale", np.ascontiguousarray(scale)
        yield f"{path}_zero", np.ascontiguousarray(zero, np.float32 if reverse else np.int8)
        if not reverse:
            yield f"{path.rpartition('.')[0]}.g_idx", group_indices(size, int(how.block_size or 0))


def group_indices(size: int, block_size: int) -> Array:
    """The group of each of `size` inputs, as the floating-point numbers that Keras keeps them as."""
    return (np.arange(size) // block_size).astype(np.float32)


def fault(parameter: Parameter, values: Array, how: Quantization) -> str:
    """What is wrong with these values of a file for this entry of a quantised table; "" if nothing is."""
    name = parameter.path.rpartition(".")[2]
    if name == "g_idx" and not np.array_equal(values, group_indices(len(values), int(how.block_size or 0))):
        return f"does not count groups of {how.block_size}: other orders are not supported"
    if name.endswith("_scale") and parameter.dtype is not None and not (np.isfinite(values) & (values > 0)).all():
        return "has a scale that is not a positive finite number"
    return ""


def dequantized_tree(leaves: dict[str, Array], how: Quantization, dtype: np.dtype[Any]) -> Params:
    """The tree with plain matrices of this type again: the numbers that the quantised ones stand for. Empties `leaves`."""
    return grown(entry for path in list(leaves) if path in leaves for entry in _dequantized(path, leaves, how, dtype))


def _dequantized(path: str, leaves: dict[str, Array], how: Quantization, dtype: np.dtype[Any]) -> Iterator[tuple[str, Array]]:
    name = path.rpartition(".")[2]
    if name == "g_idx" or re.fullmatch(r"(kernel|(reverse_)?embeddings)_(zero|(weight_only_)?scale)", name):
        return
    values = leaves.pop(path)
    if is_matrix(path):
        by_row = name == "embeddings"
        scale = leaves[f"{path}{_weight_only(how)}_scale"]
        if how.mode == "int8":
            values = values / (scale[:, None] if by_row else scale)
        else:
            zero, groups = leaves[f"{path}_zero"], leaves[f"{path.rpartition('.')[0]}.g_idx"]
            axes = {"axis": 0 if name == "reverse_embeddings" else -1, "group_axis": int(by_row)}
            values = dequantized_groups(values, scale, zero, groups, scale.dtype, **axes)
        values = np.array(values, dtype, order="C")
    yield path, values


# -- Keras' names ---------------------------------------------------------------------------------------------------------

_LAYER_NAMES = {
    "t5": ((r"(attention/\w+)$", r"\1_projector"), (r"^(en|de)coder/layers/", r"transformer_\1coder_layer_")),
    "opt": (
        ("^token_embedding$", "embeddings/token_embedding"),
        ("attention/output$", "attention/attention_output"),
        ("^layers/", "transformer_layer_"),
    ),
    "bloom": ((r"(attention/\w+)$", r"\1_dense"), ("^layers/", "transformer_layer_")),
}


def keras_layers(family: str, parameters: Iterable[Parameter]) -> list[str]:
    """Keras' paths of the layers of this plain table that are quantised."""
    found: dict[str, None] = {}
    for parameter in parameters:
        if is_matrix(parameter.path):
            name = parameter.path.rpartition(".")[0].replace(".", "/")
            for pattern, new in _LAYER_NAMES[family]:
                name = re.sub(pattern, new, name)
            found[name] = None
    return list(found)


def policy_map(policy: str, how: Quantization, layers: Iterable[str]) -> dict[str, Any]:
    """Keras' serialised DTypePolicyMap of a quantised model of this policy. Keras itself names no source type, so that a
    model is read with the global policy of the reader; for another type than float32 the map here names it."""
    source = None if policy == "float32" else policy
    kind = "QuantizedDTypePolicy" if how.mode == "int8" else "Int4DTypePolicy"
    layer = _keras("keras.dtype_policies", kind, {"mode": how.keras_mode, "source_name": source})
    default = None if source is None else _keras("keras", "DTypePolicy", {"name": source})
    return _keras(
        "keras.dtype_policies", "DTypePolicyMap", {"default_policy": default, "policy_map": dict.fromkeys(layers, layer)}
    )


def _keras(module: str, name: str, config: Any) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": config, "registered_name": None}


def read_policy(dtype: Any, plain: Callable[[Any], str]) -> tuple[str, str | None, tuple[str, ...] | None]:
    """(policy, Keras' quantisation mode or None, the layers that a map lists or None) of a dtype in any form a config has it.

    Besides the plain forms, which `plain` reads: the names `int8_from_bfloat16` and `int4/128_from_float32`, Keras' serialised
    QuantizedDTypePolicy and Int4DTypePolicy, and a DTypePolicyMap of them, all of one mode and one source.
    """
    if isinstance(dtype, str) and (match := re.fullmatch(r"(int8|int4/\d{1,9})_from_(\w+)", dtype)):
        return match[2], match[1], None
    if not isinstance(dtype, Mapping) or dtype.get("class_name") not in ("DTypePolicyMap", *_QUANTIZED):
        return plain(dtype), None, None
    inner = dtype.get("config")
    if not isinstance(inner, Mapping):
        raise ValueError(f"dtype policy {dtype['class_name']} has no config")
    if dtype["class_name"] in _QUANTIZED:
        mode, source = _mode(dtype)
        return source or "float32", mode, None
    default, layers = inner.get("default_policy"), inner.get("policy_map")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError("dtype policy map: policy_map is missing or empty")
    modes = {_mode(layer) for layer in layers.values()}
    if len(modes) != 1:
        raise ValueError(f"dtype policy map: the layers differ, {sorted(map(str, modes))[:3]}: one mode for all is supported")
    mode, source = modes.pop()
    return source or ("float32" if default is None else plain(default)), mode, tuple(layers)


_QUANTIZED = ("QuantizedDTypePolicy", "Int4DTypePolicy")


def _mode(policy: Any) -> tuple[str, str | None]:
    """(mode, source or None) of one serialised policy."""
    inner = policy.get("config") if isinstance(policy, Mapping) else None
    mode, source = (inner.get("mode"), inner.get("source_name")) if isinstance(inner, Mapping) else (None, None)
    if not isinstance(mode, str) or not re.fullmatch(r"int8|int4/\d{1,9}", mode):
        raise ValueError(f"dtype policy: mode is {mode!r}, wanted 'int8' or 'int4/<block size>'")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"dtype policy: source_name is {str(source)[:100]!r}, wanted a name")
    return mode, source


def of_keras_mode(mode: str, weight_only: bool) -> Quantization:
    """The quantisation that Keras names `int8` or `int4/128`."""
    name, _, block = mode.partition("/")
    return Quantization(name, int(block) if block else None, weight_only or name == "int4")
