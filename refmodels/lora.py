"""Low-rank adapters (LoRA): leaves of the parameter tree beside a dense layer's kernel. Their files: `lora_files`.

An adapter adds lora_scale * (x @ a @ b) to the product of its layer. Its leaves are `lora_kernel_a` (k, g, r), `lora_kernel_b`
(r, o) and `lora_scale` (): g groups of o columns share b, and r is the rank (spec/lora.md). Adapters are in float32, as Keras
keeps them, whatever the type of the kernels; in a float64 model they are in float64.

The tree is all there is: a model has the adapters that are in its `params`.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmodels.arguments import is_integer
from refmodels.backbone import Backbone
from refmodels.op import Array, Params, executing
from refmodels.ops.linear import lora_merged
from refmodels.ops.precision import FLOATS, numpy_dtype, wide_dtype
from refmodels.parameters import Initializer, Parameter

A, B, SCALE = LEAVES = ("lora_kernel_a", "lora_kernel_b", "lora_scale")

MAX_RANK = 65536


@dataclass(frozen=True)
class Adapter:
    """The adapter of one layer: `a` (k, g, r), `b` (r, o), `scale`."""

    a: Array
    b: Array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[2])

    @property
    def groups(self) -> int:
        """g."""
        return int(self.a.shape[1])

    def with_groups(self, groups: int) -> "Adapter":
        """The same product in another number of groups, or this adapter if it has that number. Exact, at a higher rank.

        To one group: the factors side by side, b along a diagonal of blocks. From one group to several: back, if b is such a
        diagonal of equal blocks; else a and b are cut, and zeros keep what belongs to other groups out.
        """
        if self.groups == groups:
            return self
        if self.groups != 1:
            b = np.kron(np.eye(self.groups, dtype=self.b.dtype), self.b)
            return replace(self, a=self.a.reshape(len(self.a), 1, -1), b=b).with_groups(groups)
        rank, rest = divmod(self.rank, groups)
        block = self.b[:rank, : self.b.shape[1] // groups]
        if rank and not rest and np.array_equal(self.b, np.kron(np.eye(groups, dtype=block.dtype), block)):
            return replace(self, a=self.a.reshape(len(self.a), groups, rank), b=block)
        a = np.zeros((len(self.a), groups, groups, self.rank), self.a.dtype)
        for i in range(groups):
            a[:, i, i] = self.a[:, 0]
        columns = self.b.reshape(self.rank, groups, -1)
        return replace(self, a=a.reshape(len(a), groups, -1), b=columns.swapaxes(0, 1).reshape(groups * self.rank, -1))

    def with_rank(self, rank: int) -> "Adapter":
        """The same product at a higher rank, by zeros."""
        more = rank - self.rank
        return replace(self, a=np.pad(self.a, ((0, 0), (0, 0), (0, more))), b=np.pad(self.b, ((0, more), (0, 0))))

    def with_scale(self, scale: float) -> "Adapter":
        """The same product at another scale: b takes the difference, and is rounded unless that is a power of two."""
        return self if scale == self.scale else replace(self, b=self.b * self.b.dtype.type(self.scale / scale), scale=scale)


# -- the tree -------------------------------------------------------------------------------------------------------------


def dense_layers(backbone: Backbone) -> dict[str, Parameter]:
    """Every dense layer that can have an adapter, by its path: its kernel."""
    kernels = (parameter for parameter in backbone.plain_parameters() if parameter.path.endswith(".kernel"))
    return {kernel.path.removesuffix(".kernel"): kernel for kernel in kernels}


def adapters(backbone: Backbone) -> dict[str, Adapter]:
    """Copies of the adapters of this model by the paths of their layers."""
    with backbone.leaves() as leaves:
        paths = [path.removesuffix(f".{A}") for path in leaves if path.endswith(f".{A}")]
        return {
            path: Adapter(np.array(leaves[f"{path}.{A}"]), np.array(leaves[f"{path}.{B}"]), float(leaves[f"{path}.{SCALE}"]))
            for path in paths
        }


def attached(tree: Params, found: Mapping[str, Adapter], policy: str) -> Params:
    """The tree with these adapters and no others, for a model of this dtype policy. Its other arrays are not copied."""
    target = numpy_dtype(wide_dtype(policy))

    def change(path: str, layer: Params) -> Params:
        plain = {name: leaf for name, leaf in layer.items() if name not in LEAVES}
        if path not in found:
            return plain
        adapter = found[path]
        a, b = (np.array(values, target, order="C") for values in (adapter.a, adapter.b))
        return plain | {A: a, B: b, SCALE: np.array(adapter.scale, target)}

    return _changed(tree, change)


def merged(tree: Params) -> Params:
    """The tree without adapters: each kernel became kernel + scale * (a @ b), rounded once to its type. Nothing else is copied.

    ValueError for an adapter beside a quantised kernel.
    """

    def change(path: str, layer: Params) -> Params:
        if A not in layer:
            return layer
        check_mergeable(path, layer["kernel"].dtype)
        kernel = merged_kernel(*(layer[leaf] for leaf in ("kernel", *LEAVES)))
        return {name: leaf for name, leaf in layer.items() if name not in LEAVES} | {"kernel": kernel}

    return _changed(tree, change)


def merged_kernel(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """kernel + scale * (a @ b), rounded once to the kernel's type."""
    with executing(None):  # these are the host's, whatever accelerator is in force around this
        return lora_merged(kernel, a, b, scale)


def check_mergeable(path: str, dtype: np.dtype[Any]) -> None:
    """ValueError if the kernel of this layer is of a type that cannot take in an adapter."""
    if dtype.name not in FLOATS:
        raise ValueError(f"{path}: a quantised kernel cannot take in its adapter: call dequantize() first")


def _changed(node: Any, change: Callable[[str, Params], Params], path: str = "") -> Any:
    """A copy of the tree with every dense layer, a dictionary with a kernel, as `change(path, layer)` gives it."""
    if isinstance(node, list):
        return [_changed(child, change, f"{path}{index}.") for index, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "kernel" in node:
        return change(path[:-1], node)
    return {key: _changed(child, change, f"{path}{key}.") for key, child in node.items()}


def trainable(backbone: Backbone) -> list[str]:
    """The paths of the parameters that KerasHub would train: with adapters these and the biases of their layers, else all."""
    leaves = backbone.paths()
    layers = {path.removesuffix(f".{A}") for path in leaves if path.endswith(f".{A}")}
    chosen = {f"{layer}.{leaf}" for layer in layers for leaf in ("bias", A, B)}
    return [path for path in leaves if path in chosen or not layers]


# -- enabling -------------------------------------------------------------------------------------------------------------


def layer_names(path: str, kernel: Parameter) -> set[str]:
    """The names by which a layer can be a target: our tree's and KerasHub's."""
    group = kernel.keras.split("/")[-3].removeprefix("_")
    names = {path.rpartition(".")[2], group}
    return names | {"attention_output"} if path.endswith(".self_attention.output") and group == "output_dense" else names


def drawn(backbone: Backbone, rank: int, target_layer_names: Iterable[str]) -> dict[str, Adapter]:
    """New adapters for the layers of these names: b is zero, a uniform within sqrt(6 / (k * g)) (He et al. 2015), drawn from
    the model's seed and the layer's path. ValueError for a rank below 1, or if no layer has any of the names."""
    check_rank(rank)
    if isinstance(target_layer_names, str):
        raise TypeError(f"target_layer_names must be a list of names, got the string {target_layer_names!r}")
    layers, wanted = dense_layers(backbone), set(target_layer_names)
    if not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"target_layer_names must be a list of names, got {target_layer_names!r}")
    known = {path: layer_names(path, kernel) for path, kernel in layers.items()}
    named = set().union(*known.values())
    if not wanted & named:
        what = f"no layer is named {', '.join(sorted(wanted)) or 'at all'}"
        raise ValueError(f"target_layer_names: {what}; {type(backbone).__name__} has {', '.join(sorted(named))}")
    found: dict[str, Adapter] = {}
    for path, names in known.items():
        if names & wanted:
            (k, groups, _), b_shape = kernel_shapes(layers[path], rank)
            generator = np.random.default_rng([backbone.seed, zlib.crc32(f"{path}.{A}".encode())])
            a = Initializer("uniform", math.sqrt(6.0 / (k * groups))).draw((k, groups, rank), generator)
            found[path] = Adapter(a, np.zeros(b_shape, np.float32))
    return found


def check_rank(rank: int) -> None:
    """ValueError unless the rank is an integer from 1 on."""
    if not (is_integer(rank) and 1 <= rank <= MAX_RANK):
        raise ValueError(f"rank must be an integer from 1 to {MAX_RANK}, got {rank!r}")


def kernel_shapes(kernel: Parameter, rank: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Of `a` and `b` in the groups in which Keras adapts this kernel: one for each head that it makes, else one."""
    k = kernel.shape[0]
    return (k, math.prod(kernel.keras_shape[:-1]) // k, rank), (rank, kernel.keras_shape[-1])
