"""Files of low-rank adapters: KerasHub's `.lora.h5`, our paths in safetensors, PEFT's directories (spec/lora.md).

Everything in a file is checked against the backbone before any values are read.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.files import CheckpointError, MissingFileError, read_json, replacing, write_json
from refmodels.lora import LEAVES, MAX_RANK, SCALE, A, Adapter, B, adapters, dense_layers, kernel_shapes, layer_names
from refmodels.op import Array
from refmodels.parameters import Parameter
from refmodels.staging import staged
from refmodels.weights import huggingface, keras_h5, keras_lora, peft, safetensors, torch_bin
from refmodels.weights.tensor import Misfits, Tensor

LOG = logging.getLogger("refmodels")

KERAS_SUFFIX, NAMED_SUFFIX = ".lora.h5", ".safetensors"

VERSION = "1"
"""Of the form of the safetensors files."""


# -- files by path --------------------------------------------------------------------------------------------------------


def save(backbone: Backbone, filepath: str | Path) -> None:
    """Write the adapters: KerasHub's form if the path ends in `.lora.h5`, by our paths if it ends in `.safetensors`.

    ValueError for another ending or a model without adapters. A file that is there is replaced when the new one is complete.
    """
    path, form, found = Path(filepath), _form(filepath), _own(backbone)
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
    own = {adapter.rank for adapter in adapters(backbone).values()} if backbone.has_lora else ranks
    if ranks != own:
        shown, enabled = (", ".join(map(str, sorted(each))) for each in (ranks, own))
        raise ValueError(f"{path}: the adapters have rank {shown}, the model was enabled with rank {enabled}")
    return found


def _own(backbone: Backbone) -> dict[str, Adapter]:
    """The adapters that are to be saved; ValueError without any."""
    if not backbone.has_lora:
        raise ValueError(f"{type(backbone).__name__} has no adapters to save: call enable_lora(rank) first")
    return adapters(backbone)


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
        misfits, layers, read = Misfits(path, type(backbone).__name__), dense_layers(backbone), {}
        for layer in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            if layer not in layers:
                continue
            a = tensors.get(f"{layer}.{A}")
            k, n = layers[layer].shape
            rank, groups = (a.shape[2], a.shape[1]) if a is not None and len(a.shape) == 3 else (0, 0)
            if a is not None and not (1 <= rank <= MAX_RANK and groups >= 1 and n % groups == 0 and a.shape[0] == k):
                misfits.add(f"tensor {a.name!r} has shape {a.shape}, wanted ({k}, groups that divide {n}, rank)")
                groups = 0
            wanted = (None, (rank, n // groups) if groups else None, ())
            read[layer] = [
                misfits.tensor(tensors, (f"{layer}.{leaf}",), shape) for leaf, shape in zip(LEAVES, wanted, strict=True)
            ]
        _check(misfits, tensors, read)
        return {layer: _finite(path, layer, *(tensor.read() for tensor in three)) for layer, three in read.items()}


def _check(misfits: Misfits, names: Iterable[str], read: Mapping[str, Any]) -> None:
    """CheckpointError if the file of these tensors does not fit, or if there is nothing in it that was `read`."""
    misfits.surplus(names)
    if not read:
        misfits.add("it holds no adapter")
    misfits.check()


def _finite(path: Path, layer: str, a: Array, b: Array, scale: Array) -> Adapter:
    if not np.isfinite(scale.astype(np.float64)):
        raise CheckpointError(f"{path}: {layer}.{SCALE} is {scale}, wanted a finite number")
    return Adapter(a, b, float(scale))


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
        rank, misfits = int(stated.read()), Misfits(path, type(backbone).__name__)
        there = [index for index in layer_of if any(keras_lora.dataset(index, leaf) in tensors for leaf in (A, B))]
        meant = _with_namesakes(backbone, [layer_of[index] for index in there])
        read: dict[str, list[Tensor]] = {}
        for index, layer in layer_of.items():
            if layer in meant:
                kernel = layers[layer]
                shapes = (*kernel.keras_shape[:-1], rank), (rank, kernel.keras_shape[-1])
                names = [keras_lora.dataset(index, leaf) for leaf in (A, B)]
                read[layer] = [misfits.tensor(tensors, (name,), shape) for name, shape in zip(names, shapes, strict=True)]
        _check(misfits, (name for name in tensors if name != keras_lora.RANK), read)
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
        misfits, read = Misfits(path, type(backbone).__name__), {}
        modules = peft.modules(dense_layers(backbone).values(), start)
        for module, kernels in modules.items():
            down, up = (f"{peft.WRAPPER}{module}.lora_{letter}.weight" for letter in "AB")
            if not (config.selects(module) or down in tensors or up in tensors):
                continue
            if config.targets is not None and not config.selects(module):
                misfits.add(f"module {module!r} has an adapter, which {peft.CONFIG} does not say")
            rank = tensors[down].shape[0] if down in tensors and tensors[down].shape else 0
            if rank not in config.ranks:
                rank = min(config.ranks)
            k, n = kernels[0].shape
            shapes = (rank, k), (len(kernels) * n, rank)
            read[module] = [misfits.tensor(tensors, (name,), shape) for name, shape in zip((down, up), shapes, strict=True)]
        _check(misfits, tensors, read)
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
    found = _own(backbone)
    place, start = Path(directory), huggingface.PREFIXES[backbone.family][0]
    path, tensors = place / peft.WEIGHTS[0], list[Tensor]()
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
    with staged(directory) as beside:
        safetensors.write_file(beside / peft.WEIGHTS[0], tensors)
        write_json(beside / peft.CONFIG, peft.document(backbone.family, ranks, scales, modules, base))


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
