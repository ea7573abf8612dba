"""The parameters of a model: one record each, from which trees are counted, drawn, loaded and written.

A model's table (`opt_parameters(config)` and so on) lists every parameter with its place in the tree, its shape, its name in a
KerasHub weight file and in a Hugging Face checkpoint, and how the original draws it. Nothing here allocates until asked to.
"""

import math
import zlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refmodels.op import Array, Params
from refmodels.ops.precision import numpy_dtype


@dataclass(frozen=True)
class Initializer:
    """How a parameter is drawn: `kind` is zeros, ones, normal, truncated_normal (both with standard deviation `scale`) or
    uniform (between -`scale` and `scale`)."""

    kind: str
    scale: float = 0.0

    def draw(self, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
        """One float32 array of this shape."""
        if self.kind == "zeros":
            return np.zeros(shape, np.float32)
        if self.kind == "ones":
            return np.ones(shape, np.float32)
        if self.kind == "uniform":
            return generator.uniform(-self.scale, self.scale, shape).astype(np.float32)
        values = generator.standard_normal(shape, np.float32)
        if self.kind == "truncated_normal":  # at two deviations, by drawing again, as the originals do
            while (outside := np.abs(values) > 2.0).any():
                values[outside] = generator.standard_normal(int(outside.sum()), np.float32)
        return values * np.float32(self.scale)


ZEROS = Initializer("zeros")
ONES = Initializer("ones")


def normal(std: float) -> Initializer:
    """Gaussian with standard deviation `std`."""
    return Initializer("normal", std)


def truncated_normal(std: float) -> Initializer:
    """Gaussian with scale `std`, cut off at two of them."""
    return Initializer("truncated_normal", std)


def glorot_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform between plus and minus sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16)."""
    return Initializer("uniform", math.sqrt(6.0 / (fan_in + fan_out)))


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    path            its place in the tree: `layers.0.self_attention.query.kernel`
    shape           there
    keras           dataset in a KerasHub `model.weights.h5`
    keras_shape     its shape in that file; the values are in the same order, so a reshape converts
    huggingface     names in a Hugging Face checkpoint without the model's prefix: the usual one, then aliases
    layout          how the Hugging Face tensor holds it: `same`; `transposed`; `offset_rows` (two rows to drop in front);
                    `query`, `key` or `value` of BLOOM's interleaved [head][q,k,v][d] tensor
    initializer     how the original draws it
    dtype           the type of its values, if that is its own and not that of the model's parameters: a quantised matrix and
                    what belongs to it, of which `huggingface` is the tensor that it was made of
    """

    path: str
    shape: tuple[int, ...]
    keras: str
    keras_shape: tuple[int, ...]
    huggingface: tuple[str, ...]
    layout: str
    initializer: Initializer
    dtype: str | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class ParameterTable(list[Parameter]):
    """A list of parameters that a model fills layer by layer."""

    def add(
        self,
        path: str,
        shape: tuple[int, ...],
        keras: str,
        huggingface: str | tuple[str, ...],
        initializer: Initializer,
        *,
        keras_shape: tuple[int, ...] | None = None,
        layout: str = "same",
    ) -> None:
        """One parameter; `keras` is the dataset below `layers/`."""
        names = (huggingface,) if isinstance(huggingface, str) else huggingface
        self.append(Parameter(path, shape, f"layers/{keras}", keras_shape or shape, names, layout, initializer))

    def layer_norm(self, path: str, size: int, keras: str, huggingface: str) -> None:
        """gamma and beta of a layer norm."""
        self.add(f"{path}.gamma", (size,), f"{keras}/vars/0", f"{huggingface}.weight", ONES)
        self.add(f"{path}.beta", (size,), f"{keras}/vars/1", f"{huggingface}.bias", ZEROS)

    def dense(
        self,
        path: str,
        rows: tuple[int, ...],
        columns: tuple[int, ...],
        keras: str,
        huggingface: str,
        initializer: Initializer,
        *,
        bias: bool = True,
        layout: str = "",
    ) -> None:
        """Kernel and bias of a dense layer; `rows` and `columns` are the axes in the KerasHub file, more than one for heads."""
        shape = (math.prod(rows), math.prod(columns))
        self.add(
            f"{path}.kernel",
            shape,
            f"{keras}/vars/0",
            f"{huggingface}.weight",
            initializer,
            keras_shape=rows + columns,
            layout=layout or "transposed",
        )
        if bias:
            self.add(
                f"{path}.bias",
                shape[1:],
                f"{keras}/vars/1",
                f"{huggingface}.bias",
                ZEROS,
                keras_shape=columns,
                layout=layout or "same",
            )


def numbered(name: str, index: int) -> str:
    """Keras' name of layer `index` of one class: `name`, `name_1`, `name_2`, ..."""
    return name if index == 0 else f"{name}_{index}"


def count(parameters: Iterable[Parameter]) -> int:
    """Number of values in all of them."""
    return sum(parameter.size for parameter in parameters)


def stored_bytes(parameters: Iterable[Parameter], dtype: str) -> int:
    """Bytes of all of them, where the parameters of the model have this type."""
    return sum(parameter.size * numpy_dtype(parameter.dtype or dtype).itemsize for parameter in parameters)


def build_tree(parameters: Iterable[Parameter], leaf: Callable[[Parameter], Any]) -> Params:
    """The tree with `leaf(parameter)` at every path."""
    return grown((parameter.path, leaf(parameter)) for parameter in parameters)


class Unread(dict[str, Any]):
    """A dictionary of a tree in which each array is read when it is asked for, and is kept there until it is deleted.

    To look at all entries, or to copy them, is to read them. The keys and their number are known before.
    """

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, partial):
            value = self[key] = value()
        return value

    def __iter__(self) -> Iterator[str]:  # a copy of a dictionary that has its own asks for each entry
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  it is what `get` is made of

    def pop(self, key: str, *default: Any) -> Any:
        self.get(key)
        return super().pop(key, *default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return ValuesView(self)


def unread_tree(parameters: Iterable[Parameter], leaf: Callable[[Parameter], Any]) -> Params:
    """The tree for which `leaf(parameter)` is called when something asks for it."""

    def unread(tree: Any) -> Any:
        if isinstance(tree, dict):
            return Unread({key: unread(child) for key, child in tree.items()})
        return [unread(child) for child in tree] if isinstance(tree, list) else tree

    tree: Params = unread(build_tree(parameters, lambda parameter: partial(leaf, parameter)))
    return tree


def grown(leaves: Iterable[tuple[str, Any]]) -> Params:
    """The tree with these (path, leaf). A path's numbers become list positions, and must come in order."""
    tree: Params = {}
    for path, leaf in leaves:
        node: Any = tree
        *parents, last = path.split(".")
        for key, child in zip(parents, [*parents[1:], last], strict=True):
            node = _descend(node, key, [] if child.isdigit() else {})
        node[last] = leaf
    return tree


def _descend(node: Any, key: str, empty: Any) -> Any:
    if isinstance(node, list):
        if int(key) == len(node):
            node.append(empty)
        return node[int(key)]
    return node.setdefault(key, empty)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) for every leaf of a tree, in order."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from flatten(child, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for index, child in enumerate(tree):
            yield from flatten(child, f"{prefix}{index}.")
    else:
        yield prefix[:-1], tree


def copy_containers(tree: Any) -> Any:
    """The same leaves in dictionaries and lists of their own. Private entries (`_...`) stay what they are."""
    if isinstance(tree, dict):
        return {key: child if key.startswith("_") else copy_containers(child) for key, child in tree.items()}
    return [copy_containers(child) for child in tree] if isinstance(tree, list) else tree


def replace_leaves(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """This tree with `leaf(x)` in the place of every x: one after the other, so that each x can go before the next is read."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        if isinstance(tree[key], dict | list):
            replace_leaves(tree[key], leaf)
        else:
            tree[key] = leaf(tree[key])
    return tree


def check_leaves(leaves: Mapping[str, Any], parameters: Iterable[Parameter], owner: str) -> None:
    """ValueError unless these leaves, by path, are one for each parameter, of its shape, and those of adapters (`lora_...`)."""
    known = {parameter.path: parameter.shape for parameter in parameters}
    for path, shape in known.items():
        if path not in leaves:
            raise ValueError(f"{owner} params: {path} is missing, wanted {shape}")
        if np.shape(leaves[path]) != shape:
            raise ValueError(f"{owner} params: {path} has shape {np.shape(leaves[path])}, wanted {shape}")
    for path in leaves:
        if path not in known and not path.rpartition(".")[2].startswith("lora_"):
            raise ValueError(f"{owner} params: {path[:300]} is no parameter of this model")


def draw(parameters: Iterable[Parameter], *, seed: int, dtype: str) -> Params:
    """Random parameters. Each depends on the seed and its own path alone, so one layer more changes no other layer."""
    target = numpy_dtype(dtype)

    def leaf(parameter: Parameter) -> Array:
        generator = np.random.default_rng([seed, zlib.crc32(parameter.path.encode())])
        return parameter.initializer.draw(parameter.shape, generator).astype(target, copy=False)

    return build_tree(parameters, leaf)
