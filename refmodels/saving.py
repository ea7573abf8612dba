"""Saving: from a backbone or a task to a directory, in KerasHub's form or in Hugging Face's.

What is in the files is in `spec/files.md`. Weights are written tensor by tensor, so that saving needs the memory of the
largest one beside the model's. A directory appears when it is complete (`staging`).
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refmodels import lora
from refmodels.backbone import Backbone
from refmodels.files import write_json
from refmodels.op import Array
from refmodels.ops.precision import FLOATS, narrow, numpy_dtype
from refmodels.parameters import Parameter, check_leaves
from refmodels.placement import Leaves
from refmodels.staging import staged
from refmodels.task import Task
from refmodels.tokenizer_files import save_hugging_face
from refmodels.weights import huggingface, keras_config, keras_h5, safetensors
from refmodels.weights.tensor import Tensor

LOG = logging.getLogger("refmodels")

GIB = 2**30

_WEIGHTS = re.compile(
    r"model\.weights\.(h5|json)|model_\d{5}\.weights\.h5|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
"""Files that are in the way of new weights."""

Progress = Callable[[int, int], None]
"""Called before the first tensor and after every one, with the bytes that are written and those that will be."""


def save_to_preset(model: Backbone | Task, directory: str | Path, max_shard_size: float = 10) -> None:
    """Write KerasHub's files: config.json, metadata.json, the weights, and what a task's preprocessor needs.

    Weights of more than `max_shard_size` GiB go into shards of at most that. A directory that is there keeps its other files.
    OSError if it cannot be written: then it is as it was.
    """
    with staged(directory, superseded=_WEIGHTS) as place:
        write_preset(model, place, max_shard_size)


def save_to_hf(model: Backbone | Task, directory: str | Path, max_shard_size: float = 5, dtype: str | None = None) -> None:
    """Write the files with which Transformers builds an equal model: config.json, generation_config.json, model.safetensors,
    and a task's tokenizer.

    dtype   type of the tensors, of `FLOATS`; by default that of the model's parameters. For the rest see `save_to_preset`.
            ValueError for a model that Transformers' class of the family cannot hold.
    """
    with staged(directory, superseded=_WEIGHTS) as place:
        write_hugging_face(model, place, max_shard_size, dtype)


def write_preset(
    model: Backbone | Task, directory: Path, max_shard_size: float, progress: Progress = lambda done, total: None
) -> list[Tensor]:
    """`save_to_preset` into an empty directory; the tensors that are in it then."""
    backbone, limit = backbone_of(model), shard_bytes(max_shard_size)
    with saved_leaves(backbone) as leaves:
        tensors = [
            Tensor(directory, leaf.parameter.keras, leaf.parameter.keras_shape, leaf.dtype, partial(_keras_values, leaf))
            for leaf in leaves
        ]
        arguments = backbone.get_config()
        held = keras_config.keras_hub_can_hold(type(backbone).__name__, arguments)
        if not held:
            LOG.warning("KerasHub's %s cannot hold this model: its files are for refmodels alone", type(backbone).__name__)
        check_room(directory, tensors)
        package = "keras_hub" if held else "refmodels"
        config = keras_config.envelope(backbone.family, arguments, package)
        write_json(directory / "config.json", config)
        metadata = {
            "keras_version": "3.7.0",  # the versions whose form of files this is
            "keras_hub_version": "0.17.0",
            "parameter_count": backbone.count_params(),
            "date_saved": time.strftime("%Y-%m-%d@%H:%M:%S"),
            "tasks": ["Seq2SeqLM" if backbone.family == "t5" else "CausalLM"],
        }
        write_json(directory / "metadata.json", metadata)
        keras_h5.write_tensors(directory, tensors, limit, reporting(progress, tensors))
    if isinstance(model, Task):
        write_json(directory / "task.json", model.keras_object(config))
        if model.preprocessor is not None:
            model.preprocessor.save_to_preset(directory)
    return tensors


def _keras_values(leaf: "Leaf") -> Array:
    return finite(leaf.parameter.keras, leaf.read().reshape(leaf.parameter.keras_shape))


def write_hugging_face(
    model: Backbone | Task,
    directory: Path,
    max_shard_size: float,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Tensor]:
    """`save_to_hf` into an empty directory; the tensors that are in it then."""
    backbone, limit = backbone_of(model), shard_bytes(max_shard_size)
    family, tokenizer = backbone.family, model.tokenizer if isinstance(model, Task) else None
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    target = numpy_dtype(dtype or backbone.variable_dtype)
    token_ids = huggingface.TOKEN_IDS[family]
    if tokenizer is not None:
        of_tokenizer = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.start_token_id}
        token_ids = {name: of_tokenizer.get(name, tokenizer.end_token_id) for name in token_ids}
    with saved_leaves(backbone) as leaves:
        shared: dict[str, list[Leaf]] = {}  # BLOOM's query, key and value are one tensor
        for leaf in leaves:
            if leaf.dtype.name not in FLOATS:
                path = leaf.parameter.path
                raise ValueError(
                    f"{path} is quantised, which these files cannot hold: call dequantize(), or convert with --dequantize"
                )
            shared.setdefault(huggingface.stored_name(leaf.parameter, family), []).append(leaf)
        config = huggingface.configuration(family, backbone.get_config(), target.name, token_ids)
        shapes = {name: huggingface.stored_shape(members[0].parameter) for name, members in shared.items()}
        tensors = [
            Tensor(directory, name, shapes[name], target, partial(_stored_values, name, members, target))
            for name, members in shared.items()
        ]
        check_room(directory, tensors)
        write_json(directory / "config.json", config)
        write_json(directory / "generation_config.json", huggingface.generation_configuration(family, token_ids))
        safetensors.write_tensors(directory, tensors, limit, reporting(progress, tensors))
    if tokenizer is not None:
        save_hugging_face(tokenizer, directory)
    return tensors


def _stored_values(name: str, members: "list[Leaf]", dtype: np.dtype[Any]) -> Array:
    return finite(name, narrow(huggingface.stored([(leaf.parameter, leaf.read()) for leaf in members]), dtype))


def finite(name: str, values: Array) -> Array:
    """The same values, after a warning if some are not finite: a cast to float16 may have overflowed."""
    if not np.isfinite(values).all():
        LOG.warning("tensor %s has values that are not finite as %s", name, values.dtype)
    return values


def reporting(progress: Progress, tensors: Iterable[Tensor]) -> Callable[[Tensor], None]:
    """What the writer of `tensors` calls after each."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def written(tensor: Tensor) -> None:
        nonlocal done
        done += tensor.nbytes
        progress(done, total)

    progress(0, total)
    return written


def backbone_of(model: Backbone | Task) -> Backbone:
    """The backbone that is to be saved."""
    backbone: Backbone = model.backbone if isinstance(model, Task) else model
    return backbone


@dataclass(frozen=True)
class Leaf:
    """What is saved of a parameter: `read()` gives its values, of this type."""

    parameter: Parameter
    dtype: np.dtype[Any]
    read: Callable[[], Array]


@contextmanager
def saved_leaves(backbone: Backbone) -> Iterator[list[Leaf]]:
    """What is saved of a backbone, to read inside the block: every parameter in the order of the table, its adapter merged when
    it is read. ValueError for a tree that does not fit the table, and for an adapter that cannot be merged."""
    with backbone.leaves() as held:
        check_leaves(held.forms, backbone.parameters(), type(backbone).__name__)
        found = []
        for parameter in backbone.parameters():
            path, dtype = parameter.path, held.forms[parameter.path].dtype
            layer, _, name = path.rpartition(".")
            adapter = [f"{layer}.{leaf}" for leaf in lora.LEAVES if name == "kernel" and f"{layer}.{lora.A}" in held]
            if adapter:
                lora.check_mergeable(layer, dtype)
            found.append(Leaf(parameter, dtype, partial(_values, held, path, adapter)))
        yield found


def _values(held: Leaves, path: str, adapter: list[str]) -> Array:
    return lora.merged_kernel(*(held[name] for name in (path, *adapter))) if adapter else np.asarray(held[path])


def shard_bytes(gibibytes: float) -> int:
    """`max_shard_size` in bytes; ValueError unless it is a positive number."""
    if isinstance(gibibytes, bool) or not isinstance(gibibytes, int | float) or not 0 < gibibytes < float("inf"):
        raise ValueError(f"max_shard_size must be a positive number of GiB, got {gibibytes!r}")
    return max(1, int(gibibytes * GIB))


def check_room(directory: Path, tensors: Iterable[Tensor]) -> None:
    """OSError if the disk has no room for these tensors."""
    wanted, free = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(directory).free
    if wanted > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {wanted} bytes are to be written, {free} are free")
