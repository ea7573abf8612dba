"""Low-rank adapters (LoRA): leaves of the parameter tree beside a dense layer's kernel, and the files that hold them.

An adapter adds lora_scale * (x @ a @ b) to the product of its layer. Its leaves are `lora_kernel_a` (k, g, r), `lora_kernel_b`
(r, o) and `lora_scale` (): g groups of o columns share b, and r is the rank (spec/lora.md). Adapters are in float32, as Keras
keeps them, whatever the type of the kernels; in a float64 model they are in float64.

The tree is all there is: a model has the adapters that are in its `params`.
"""

import logging
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.files import CheckpointError, MissingFileError, read_json, replacing, write_json
from refmodels.op import Array, Params, executing
from refmodels.ops.linear import lora_merged
from refmodels.ops.precision import numpy_dtype, wide_dtype
from refmodels.parameters import Initializer, Parameter, flatten
from refmodels.weights import huggingface, keras_h5, keras_lora, peft, safetensors, torch_bin
from refmodels.weights.tensor import Tensor

LOG = logging.getLogger("refmodels")

A, B, SCALE = LEAVES = ("lora_kernel_a", "lora_kernel_b", "lora_scale")

KERAS_SUFFIX, NAMED_SUFFIX = ".lora.h5", ".safetensors"

VERSION = "1"
"""Of the form of the safetensors files."""

MAX_RANK = 65536

FLOATS = ("float16", "bfloat16", "float32", "float64")


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


def adapters(tree: Params) -> dict[str, Adapter]:
    """The adapters in this tree by the paths of their layers."""
    leaves = dict(flatten(tree))
    paths = [path.removesuffix(f".{A}") for path in leaves if path.endswith(f".{A}")]
    return {path: Adapter(leaves[f"{path}.{A}"], leaves[f"{path}.{B}"], float(leaves[f"{path}.{SCALE}"])) for path in paths}


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
        if layer["kernel"].dtype.name not in FLOATS:
            raise ValueError(f"{path}: a quantised kernel cannot take in its adapter: call dequantize() first")
        kernel = lora_merged(layer["kernel"], *(layer[leaf] for leaf in LEAVES))
        return {name: leaf for name, leaf in layer.items() if name not in LEAVES} | {"kernel": kernel}

    with executing(None):  # the tree is the host's, whatever accelerator is in force around this
        return _changed(tree, change)


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
    leaves = [path for path, _ in flatten(backbone.params)]
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
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank must be an integer from 1 to {MAX_RANK}, got {rank!r}")


def kernel_shapes(kernel: Parameter, rank: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Of `a` and `b` in the groups in which Keras adapts this kernel: one for each head that it makes, else one."""
    k = kernel.shape[0]
    return (k, math.prod(kernel.keras_shape[:-1]) // k, rank), (rank, kernel.keras_shape[-1])


# -- files by path --------------------------------------------------------------------------------------------------------


def save(backbone: Backbone, filepath: str | Path) -> None:
    """Write the adapters: KerasHub's form if the path ends in `.lora.h5`, by our paths if it ends in `.safetensors`.

    ValueError for another ending or a model without adapters. A file that is there is replaced when the new one is complete.
    """
    path, found = Path(filepath), adapters(backbone.params)
    form = _form(filepath)
    if not found:
        raise ValueError(f"{type(backbone).__name__} has no adapters to save: call enable_lora(rank) first")
    with replacing(path) as beside:
        if form == KERAS_SUFFIX:
            keras_h5.write_file(beside, _keras_tensors(backbone, found, path))
        else:
            safetensors.write_file(beside, _named_tensors(found, path), metadata=_metadata(backbone, found))


def load(backbone: Backbone, filepath: str | Path) -> dict[str, Adapter]:
    """The adapters in a file that `save` or KerasHub wrote, all of it checked against this backbone.

    ValueError for another ending, a rank that is not that of the model's own adapters, and anything else that does not fit.
    """
    path, form = Path(filepath), _form(filepath)
    found = (_read_keras if form == KERAS_SUFFIX else _read_named)(backbone, path)
    ranks = {adapter.rank for adapter in found.values()}
    own = {adapter.rank for adapter in adapters(backbone.params).values()} if backbone.has_lora else ranks
    if ranks != own:
        shown, enabled = (", ".join(map(str, sorted(each))) for each in (ranks, own))
        raise ValueError(f"{path}: the adapters have rank {shown}, the model was enabled with rank {enabled}")
    return found


def _form(filepath: str | Path) -> str:
    for suffix in (KERAS_SUFFIX, NAMED_SUFFIX):
        if str(filepath).endswith(suffix):
            return suffix
    raise ValueError(f"the file name must end in {KERAS_SUFFIX} (KerasHub's form) or {NAMED_SUFFIX}, got {str(filepath)!r}")


def _named_tensors(found: Mapping[str, Adapter], path: Path) -> list[Tensor]:
    values = {
        f"{layer}.{leaf}": value
        for layer, adapter in found.items()
        for leaf, value in zip(LEAVES, (adapter.a, adapter.b, np.array(adapter.scale, adapter.a.dtype)), strict=True)
    }
    return [stored(path, name, value) for name, value in values.items()]


def stored(path: Path, name: str, values: Array) -> Tensor:
    """The record of these values, to be written."""
    return Tensor(path, name, values.shape, values.dtype, partial(np.asarray, values))


def _metadata(backbone: Backbone, found: Mapping[str, Adapter]) -> dict[str, str]:
    """Rank and alpha are for readers: the tensors have them too, and may have different ones for each layer."""
    several = {(adapter.rank, adapter.scale * adapter.rank) for adapter in found.values()}
    facts = {"format": "refmodels.lora", "version": VERSION, "model": type(backbone).__name__}
    if len(several) == 1:
        ((rank, alpha),) = several
        facts |= {"rank": str(rank), "alpha": repr(float(alpha))}
    return facts


def _read_named(backbone: Backbone, path: Path) -> dict[str, Adapter]:
    facts = safetensors.read_metadata(path.parent, path.name)
    if facts.get("format") != "refmodels.lora" or facts.get("version") != VERSION:
        what = f"{facts.get('format')!r:.100} version {facts.get('version')!r:.100}"
        raise CheckpointError(f"{path}: metadata says format {what}, wanted 'refmodels.lora' version {VERSION!r}")
    with safetensors.open_tensors(path.parent, path.name) as tensors:
        problems, layers, read = _Problems(backbone, path), dense_layers(backbone), {}
        for layer in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            if layer not in layers:
                continue
            a = tensors.get(f"{layer}.{A}")
            k, n = layers[layer].shape
            rank, groups = (a.shape[2], a.shape[1]) if a is not None and len(a.shape) == 3 else (0, 0)
            if a is not None and not (1 <= rank <= MAX_RANK and groups >= 1 and n % groups == 0 and a.shape[0] == k):
                problems.add(f"tensor {a.name!r} has shape {a.shape}, wanted ({k}, groups that divide {n}, rank)")
                groups = 0
            wanted = (None, (rank, n // groups) if groups else None, ())
            read[layer] = [
                problems.tensor(tensors, f"{layer}.{leaf}", shape) for leaf, shape in zip(LEAVES, wanted, strict=True)
            ]
        problems.surplus(tensors)
        problems.check()
        return {layer: _finite(path, layer, *(tensor.read() for tensor in three)) for layer, three in read.items()}


def _finite(path: Path, layer: str, a: Array, b: Array, scale: Array) -> Adapter:
    if not np.isfinite(scale.astype(np.float64)):
        raise CheckpointError(f"{path}: {layer}.{SCALE} is {scale}, wanted a finite number")
    return Adapter(a, b, float(scale))


class _Problems:
    """What does not fit in a file, collected so that one error tells all; and what of it was asked for."""

    def __init__(self, backbone: Backbone, path: Path) -> None:
        self.model, self.path = type(backbone).__name__, path
        self.found: list[str] = []
        self.used: set[str] = set()

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def tensor(self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None) -> Any:
        """The tensor of this name, shape (None for any) and a type of `FLOATS`."""
        self.used.add(name)
        tensor = tensors.get(name)
        if tensor is None:
            self.add(f"tensor {name!r} is missing")
        elif shape is not None and tensor.shape != shape:
            self.add(f"tensor {name!r} has shape {tensor.shape}, wanted {shape}")
        elif tensor.dtype.name not in FLOATS:
            self.add(f"tensor {name!r} has dtype {tensor.dtype}, wanted one of {', '.join(FLOATS)}")
        return tensor

    def surplus(self, tensors: Iterable[str]) -> None:
        self.found += [f"tensor {name[:300]!r} is surplus" for name in tensors if name not in self.used]

    def check(self) -> None:
        """ValueError if there was any, or nothing at all in the file."""
        if not self.used:
            self.add("it holds no adapter")
        if self.found:
            more = f"; and {len(self.found) - 8} more" if len(self.found) > 8 else ""
            raise CheckpointError(f"{self.path} does not fit this {self.model}: {'; '.join(self.found[:8])}{more}")


# -- KerasHub's files -----------------------------------------------------------------------------------------------------


def _keras_layers(backbone: Backbone) -> dict[int, str]:
    """Index in a `.lora.h5` -> the dense layer that it names."""
    layers, paths = dense_layers(backbone), [parameter.path for parameter in backbone.plain_parameters()]
    order = keras_lora.indices(backbone.family, backbone.config.num_layers, paths)
    return {index: path for path, index in order.items() if path in layers}


def _with_namesakes(backbone: Backbone, paths: Iterable[str]) -> set[str]:
    """These layers and all that share a name with one of them: KerasHub adapts by name, so all or none."""
    layers = dense_layers(backbone)
    named = set().union(*(layer_names(path, layers[path]) for path in paths))
    return {path for path, kernel in layers.items() if layer_names(path, kernel) & named}


def _keras_tensors(backbone: Backbone, found: Mapping[str, Adapter], path: Path) -> list[Tensor]:
    """In Keras' groups, of one rank, at scale 1, and zeros for layers that KerasHub expects beside those that are there."""
    layers = dense_layers(backbone)
    index_of = {layer: index for index, layer in _keras_layers(backbone).items()}
    if unknown := [layer for layer in found if layer not in index_of]:
        raise ValueError(f"KerasHub's {type(backbone).__name__} has no layer {unknown[0]}: save the adapters as {NAMED_SUFFIX}")
    grouped = {
        layer: adapter.with_groups(kernel_shapes(layers[layer], 1)[0][1]).with_scale(1.0) for layer, adapter in found.items()
    }
    rank = max(adapter.rank for adapter in grouped.values())
    if any(grouped[layer] is not adapter or adapter.rank != rank for layer, adapter in found.items()):
        LOG.info("%s: the adapters are written in KerasHub's form, at rank %d and scale 1", path, rank)
    tensors = [stored(path, keras_lora.RANK, np.array(rank, np.int64))]
    for layer in sorted(_with_namesakes(backbone, found), key=index_of.__getitem__):
        a_shape, b_shape = kernel_shapes(layers[layer], rank)
        zero = Adapter(np.zeros(a_shape, np.float32), np.zeros(b_shape, np.float32))
        adapter = grouped[layer].with_rank(rank) if layer in grouped else zero
        a = adapter.a.reshape(*layers[layer].keras_shape[:-1], rank)
        index = index_of[layer]
        tensors += [stored(path, keras_lora.dataset(index, leaf), value) for leaf, value in ((A, a), (B, adapter.b))]
    return tensors


def _read_keras(backbone: Backbone, path: Path) -> dict[str, Adapter]:
    layers, layer_of = dense_layers(backbone), _keras_layers(backbone)
    with keras_h5.open_tensors(path.parent, path.name) as tensors:
        if keras_lora.RANK not in tensors:
            raise CheckpointError(f"{path}: dataset {keras_lora.RANK!r} is missing: no adapters that KerasHub wrote")
        stated = tensors[keras_lora.RANK]
        if stated.shape != () or stated.dtype.kind not in "iu" or not 1 <= stated.read() <= MAX_RANK:
            raise CheckpointError(f"{path}: dataset {keras_lora.RANK!r} is no whole number from 1 to {MAX_RANK}")
        rank, problems = int(stated.read()), _Problems(backbone, path)
        there = [index for index in layer_of if any(keras_lora.dataset(index, leaf) in tensors for leaf in (A, B))]
        meant = _with_namesakes(backbone, [layer_of[index] for index in there])
        read: dict[str, list[Tensor]] = {}
        for index, layer in layer_of.items():
            if layer in meant:
                kernel = layers[layer]
                shapes = (*kernel.keras_shape[:-1], rank), (rank, kernel.keras_shape[-1])
                names = [keras_lora.dataset(index, leaf) for leaf in (A, B)]
                read[layer] = [problems.tensor(tensors, name, shape) for name, shape in zip(names, shapes, strict=True)]
        problems.surplus(name for name in tensors if name != keras_lora.RANK)
        problems.check()
        return {
            layer: Adapter(a.read().reshape(kernel_shapes(layers[layer], rank)[0]), b.read()) for layer, (a, b) in read.items()
        }


# -- PEFT's files ---------------------------------------------------------------------------------------------------------


def load_peft(backbone: Backbone, directory: str | Path) -> dict[str, Adapter]:
    """The adapters in a directory that PEFT wrote, all of it checked against this backbone.

    ValueError names the file and the field or tensor that is wrong, or that asks for what is not supported.
    """
    directory = Path(directory)
    config = peft.parse(read_json(directory, peft.CONFIG), str(directory / peft.CONFIG))
    name = next((name for name in peft.WEIGHTS if (directory / name).exists()), None)
    if name is None:
        raise MissingFileError(f"{directory}: no adapter weights, wanted {' or '.join(peft.WEIGHTS)}")
    with (torch_bin if name.endswith(".bin") else safetensors).open_tensors(directory, name) as tensors:
        path, inner = directory / name, [key.removeprefix(peft.WRAPPER) for key in tensors]
        start = huggingface.prefix(inner, backbone.family)
        problems, read = _Problems(backbone, path), {}
        modules = peft.modules(dense_layers(backbone).values(), start)
        for module, kernels in modules.items():
            down, up = (f"{peft.WRAPPER}{module}.lora_{letter}.weight" for letter in "AB")
            if not (config.selects(module) or down in tensors or up in tensors):
                continue
            if config.targets is not None and not config.selects(module):
                problems.add(f"module {module!r} has an adapter, which {peft.CONFIG} does not say")
            rank = tensors[down].shape[0] if down in tensors and tensors[down].shape else 0
            if rank not in config.ranks:
                rank = min(config.ranks)
            k, n = kernels[0].shape
            shapes = (rank, k), (len(kernels) * n, rank)
            read[module] = [problems.tensor(tensors, name, shape) for name, shape in zip((down, up), shapes, strict=True)]
        problems.surplus(tensors)
        problems.check()
        found: dict[str, Adapter] = {}
        for module, (a, b) in read.items():
            whole = Adapter(a.read().T[:, None], b.read(), config.scale(module, a.shape[0]))
            found |= {kernel.path.removesuffix(".kernel"): part for kernel, part in _parts(whole, modules[module])}
        return found


def _parts(whole: Adapter, kernels: Sequence[Parameter]) -> list[tuple[Parameter, Adapter]]:
    """The adapter of a module, whose b is as stored, for each of its kernels. Of several, each gets the ranks at which its b is
    not zero, and none if there is none: `_side_by_side` fills with such zeros."""
    parts = [(kernel, replace(whole, b=huggingface.convert(whole.b, kernel))) for kernel in kernels]
    if len(parts) == 1 or not whole.b.any():
        return parts
    ranks = [part.b.any(axis=1) for _, part in parts]
    return [
        (kernel, replace(part, a=part.a[:, :, used], b=part.b[used]))
        for (kernel, part), used in zip(parts, ranks, strict=True)
        if used.any()
    ]


def save_peft(backbone: Backbone, directory: str | Path, base: str | None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for PEFT on the Hugging Face model with its head.

    ValueError for a model without adapters.
    """
    found = adapters(backbone.params)
    if not found:
        raise ValueError(f"{type(backbone).__name__} has no adapters to save: call enable_lora(rank) first")
    place, start = Path(directory), huggingface.PREFIXES[backbone.family][0]
    path, tensors = place / peft.WEIGHTS[0], []
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    modules = peft.modules(dense_layers(backbone).values(), start)
    for module, kernels in modules.items():
        layers = [kernel.path.removesuffix(".kernel") for kernel in kernels]
        if any(layer in found for layer in layers):
            parts = _side_by_side([found.get(layer) for layer in layers], [kernel.shape[1] for kernel in kernels])
            ranks[module], scales[module] = parts[0].rank, parts[0].scale
            up = huggingface.stored(list(zip(kernels, (part.b for part in parts), strict=True)))
            tensors += [
                stored(path, f"{peft.WRAPPER}{module}.lora_A.weight", parts[0].a[:, 0].T),
                stored(path, f"{peft.WRAPPER}{module}.lora_B.weight", up),
            ]
    place.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        safetensors.write_file(beside, tensors)
    write_json(place / peft.CONFIG, peft.document(backbone.family, ranks, scales, modules, base))


def _side_by_side(parts: Sequence[Adapter | None], columns: Sequence[int]) -> list[Adapter]:
    """These adapters in one group, with one a and one scale for all: the a's side by side, each b with zeros for the others.
    The a of adapters that have the same one is there once."""
    given = [part.with_groups(1) for part in parts if part is not None]
    scale = next((part.scale for part in given if part.scale), 0.0)
    same = all(part.scale == scale and np.array_equal(part.a, given[0].a) for part in given)
    a = given[0].a if same else np.concatenate([part.a for part in given], axis=2)
    row, result = 0, []
    for part, size in zip(parts, columns, strict=True):
        b = np.zeros((a.shape[2], size), a.dtype)
        if part is not None:
            own = part.with_groups(1).with_scale(scale)
            b[row : row + own.rank] = own.b
            row += 0 if same else own.rank
        result.append(Adapter(a, b, scale))
    return result
