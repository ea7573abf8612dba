"""KerasHub `model.weights.h5` files: HDF5 groups named after layers, with the variables as datasets `vars/0`,
`vars/1`, ...; also in several files, with an index `model.weights.json`.

The only module that uses h5py.
"""

import errno
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refmodels.files import CheckpointError, inside, read_json
from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.weights import hdf5_check
from refmodels.weights.shards import partition, read_index
from refmodels.weights.tensor import Tensor

MAX_OBJECTS = 1_000_000
"""A file with more groups and datasets than this is refused."""

_OBJECT_BYTES = 8192  # more than a dataset takes beside its values, with the groups it is in


def spellings(name: str) -> tuple[str, ...]:
    """`name` and the other names under which KerasHub files of any age hold the same dataset: Keras 3.0.1 wrote OPT's
    attention groups with a leading underscore, files of TensorFlow 2.13 say `_layer_checkpoint_dependencies` for
    `layers`."""
    underscored = name.replace("/_self_attention_layer/", "/_self_attention_layer/_", 1)
    names = (name, underscored)
    return tuple(dict.fromkeys((*names, *("_layer_checkpoint_dependencies/" + n.removeprefix("layers/") for n in names))))


@contextmanager
def open_tensors(directory: Path, name: str) -> Iterator[Mapping[str, Tensor]]:
    """The datasets of the HDF5 file `name` of `directory`, by their paths (`layers/.../vars/0`), or of the shards that
    the index `name` lists if it ends in `.json`; groups without any are ignored.

    Read inside the `with` block only. ValueError names the file, the dataset, what was found and what was wanted: for
    a file that is truncated or not HDF5, a soft or external link, external or virtual storage, a dataset whose
    declared size is not all stored, and shards that are not what the index says; FileNotFoundError for a missing file
    or shard; ImportError without h5py.
    """
    with ExitStack() as stack:
        read = _open_shards if name.endswith(".json") else _open_file
        yield MappingProxyType(read(stack, directory, name))


def _open_shards(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    """`weight_map` maps the absolute path of a group to the shards with its datasets, which may be split between two.

    Keras once named only the first of two. So a dataset may lie in any shard, as long as it lies in no other.
    """
    index, promised = directory / name, read_index(directory, name)
    shards = {
        shard: _open_file(stack, directory, shard) for shard in sorted({file for files in promised.values() for file in files})
    }
    groups = {shard: {dataset.rpartition("/")[0] for dataset in found} for shard, found in shards.items()}
    for group, files in promised.items():
        if missing := [file for file in files if group.removeprefix("/") not in groups[file]]:
            raise CheckpointError(
                f"{index}: group {group[:300]!r} has no dataset in shard {missing[0]}, where the index puts it"
            )
    tensors: dict[str, Tensor] = {}
    for found in shards.values():
        for dataset, tensor in found.items():
            if dataset in tensors:
                other = tensors[dataset].file.name
                raise CheckpointError(f"{index}: dataset {dataset!r} is in two shards, {other} and {tensor.file.name}")
            tensors[dataset] = tensor
    metadata = read_json(directory, name).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if stated is not None and stated != total:
        raise CheckpointError(f"{index}: field 'total_size' is {str(stated)[:100]}, the datasets have {total} bytes")
    return tensors


def _open_file(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    try:
        import h5py
    except ImportError:
        raise ImportError(f"reading {directory / name} needs h5py: pip install h5py") from None
    path, shown = inside(directory, name), directory / name
    hdf5_check.check(path, str(shown))
    try:
        file = stack.enter_context(h5py.File(path, "r"))
    except OSError as error:
        raise CheckpointError(f"{shown}: not a readable HDF5 file, perhaps truncated: {error}") from None
    return _list_datasets(file, shown, path.stat().st_size)


def _list_datasets(file: Any, shown: Path, size: int) -> dict[str, Tensor]:
    import h5py

    tensors: dict[str, Tensor] = {}
    groups = [("", file)]
    seen: set[int] = set()
    try:
        while groups:
            prefix, group = groups.pop()
            for key in group:
                name = f"{prefix}{key}"
                link = group.get(key, getlink=True)
                if type(link) is not h5py.HardLink:
                    raise CheckpointError(f"{shown}: {name!r} is a {type(link).__name__}: links are not followed")
                item = group[key]
                address = h5py.h5o.get_info(item.id).addr
                if address in seen or len(seen) > MAX_OBJECTS:
                    raise CheckpointError(f"{shown}: {name!r} is stored twice, or the file holds over {MAX_OBJECTS} objects")
                seen.add(address)
                if isinstance(item, h5py.Group):
                    groups.append((f"{name}/", item))
                elif isinstance(item, h5py.Dataset):
                    tensors[name] = _tensor(item, shown, name, size)
    except (OSError, RuntimeError, KeyError, TypeError, UnicodeError) as error:  # what h5py raises for damaged structures
        raise CheckpointError(f"{shown}: damaged HDF5 file: {error}") from None
    if sum(tensor.nbytes for tensor in tensors.values()) > size:
        raise CheckpointError(f"{shown}: the datasets declare more bytes than the {size} of the file")
    return tensors


def _tensor(dataset: Any, shown: Path, name: str, size: int) -> Tensor:
    if dataset.is_virtual or dataset.external:
        raise CheckpointError(f"{shown}: dataset {name!r} keeps its values in other files: not read")
    if dataset.shape is None:
        raise CheckpointError(f"{shown}: dataset {name!r} has no shape")
    if dataset.chunks is not None:
        raise CheckpointError(f"{shown}: dataset {name!r} is stored in chunks, wanted in one piece, as Keras stores it")
    dtype = dataset.dtype
    # Keras marks bfloat16 by an attribute "dtype". It is a string of variable length, which is never read: with a damaged
    # one the C library does not end, or fills gigabytes. Keras gives the attribute to no other type.
    if dtype == np.dtype("V2") and "dtype" in dataset.attrs:
        dtype = numpy_dtype("bfloat16")
    elif dtype.kind not in "fiubV" or dtype.names:
        raise CheckpointError(f"{shown}: dataset {name!r} has dtype {dtype}, wanted numbers")
    tensor = Tensor(shown, name, tuple(dataset.shape), dtype, partial(_read, dataset, shown, name, dtype))
    stored = min(dataset.id.get_storage_size(), size)
    if tensor.nbytes > stored:
        raise CheckpointError(
            f"{shown}: dataset {name!r} declares {dtype} {tensor.shape}, {tensor.nbytes} bytes, stores {stored}"
        )
    return tensor


def _read(dataset: Any, shown: Path, name: str, dtype: np.dtype) -> Array:
    try:
        values: Array = dataset[()]
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{shown}: dataset {name!r} cannot be read, damaged: {error}") from None
    return np.asarray(values).view(dtype) if dtype != dataset.dtype else np.asarray(values)


def write_tensors(directory: Path, tensors: Sequence[Tensor], limit: int, written: Callable[[Tensor], None]) -> None:
    """Write `model.weights.h5`; or, where the tensors have more bytes than `limit`, shards of at most that many (a larger
    tensor is alone in its shard) and `model.weights.json`. A tensor's name is its dataset, `layers/.../vars/0`.

    In the oldest form of HDF5, each dataset in one piece, as Keras does; `written` is called after every tensor. OSError if the
    disk is full; ImportError without h5py.
    """
    parts = partition(tensors, limit)
    if len(parts) == 1:
        write_file(directory / "model.weights.h5", parts[0], written)
        return
    places: dict[str, list[str]] = {}
    for number, part in enumerate(parts):
        name = f"model_{number:05}.weights.h5"
        write_file(directory / name, part, written)
        for group in dict.fromkeys(f"/{tensor.name.rpartition('/')[0]}" for tensor in part):
            places.setdefault(group, []).append(name)
    weight_map = {group: files[0] if len(files) == 1 else files for group, files in places.items()}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    (directory / "model.weights.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[Tensor], written: Callable[[Tensor], None] = lambda _: None) -> None:
    """Write one HDF5 file with these datasets; errors as for `write_tensors`."""
    try:
        import h5py
    except ImportError:
        raise ImportError(f"writing {path} needs h5py: pip install h5py") from None
    try:
        with h5py.File(empty := io.BytesIO(), "w", libver="earliest"):
            pass
        _reserve(path, empty.getvalue(), sum(tensor.nbytes + _OBJECT_BYTES for tensor in tensors))
        with h5py.File(path, "r+", libver="earliest") as file:  # closing it cuts off what is not needed
            for tensor in tensors:
                values = np.asarray(tensor.read(), order="C")
                if tensor.dtype.name == "bfloat16":
                    file.create_dataset(tensor.name, data=values.view("V2")).attrs["dtype"] = "bfloat16"
                else:
                    file.create_dataset(tensor.name, data=values)
                written(tensor)
    except RuntimeError as error:  # what h5py raises for a full disk when the file is closed
        raise OSError(f"{path}: cannot be written: {error}") from None


def _reserve(path: Path, content: bytes, size: int) -> None:
    """Write a file that begins with `content` and takes `size` bytes. OSError if the disk has no room for it: where a write
    fails later, the HDF5 library ends the process."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that reserves nothing
            raise OSError(error.errno, error.strerror, str(path)) from None
