"""KerasHub `model.weights.h5` files: HDF5 groups named after layers, with the variables as datasets `vars/0`,
`vars/1`, ...

The only module that uses h5py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refmodels.files import inside
from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.weights.tensor import Tensor

MAX_OBJECTS = 1_000_000
"""A file with more groups and datasets than this is refused."""


def spellings(name: str) -> tuple[str, ...]:
    """`name` and the other names under which KerasHub files of any age hold the same dataset: Keras 3.0.1 wrote OPT's
    attention groups with a leading underscore, files of TensorFlow 2.13 say `_layer_checkpoint_dependencies` for
    `layers`."""
    underscored = name.replace("/_self_attention_layer/", "/_self_attention_layer/_", 1)
    names = (name, underscored)
    return tuple(dict.fromkeys((*names, *("_layer_checkpoint_dependencies/" + n.removeprefix("layers/") for n in names))))


@contextmanager
def open_tensors(directory: Path, name: str) -> Iterator[Mapping[str, Tensor]]:
    """The datasets of the HDF5 file `name` of `directory`, by their paths (`layers/.../vars/0`); groups without any
    are ignored.

    Read inside the `with` block only. ValueError names the file, the dataset, what was found and what was wanted: for
    a file that is truncated or not HDF5, a soft or external link, external or virtual storage, and a dataset whose
    declared size is not all stored; FileNotFoundError for a missing file; ImportError without h5py.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError(f"reading {directory / name} needs h5py: pip install h5py") from None
    path, shown = inside(directory, name), directory / name
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{shown}: not a readable HDF5 file, perhaps truncated: {error}") from None
    with file:
        yield MappingProxyType(_list_datasets(file, shown, path.stat().st_size))


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
                    raise ValueError(f"{shown}: {name!r} is a {type(link).__name__}: links are not followed")
                item = group[key]
                address = h5py.h5o.get_info(item.id).addr
                if address in seen or len(seen) > MAX_OBJECTS:
                    raise ValueError(f"{shown}: {name!r} is stored twice, or the file holds over {MAX_OBJECTS} objects")
                seen.add(address)
                if isinstance(item, h5py.Group):
                    groups.append((f"{name}/", item))
                elif isinstance(item, h5py.Dataset):
                    tensors[name] = _tensor(item, shown, name, size)
    except (OSError, RuntimeError, KeyError, TypeError, UnicodeError) as error:  # what h5py raises for damaged structures
        raise ValueError(f"{shown}: damaged HDF5 file: {error}") from None
    if sum(_bytes(tensor) for tensor in tensors.values()) > size:
        raise ValueError(f"{shown}: the datasets declare more bytes than the {size} of the file")
    return tensors


def _tensor(dataset: Any, shown: Path, name: str, size: int) -> Tensor:
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{shown}: dataset {name!r} keeps its values in other files: not read")
    if dataset.shape is None:
        raise ValueError(f"{shown}: dataset {name!r} has no shape")
    dtype = dataset.dtype
    if _attribute(dataset, "dtype") == "bfloat16" and dtype == np.dtype("V2"):
        dtype = numpy_dtype("bfloat16")
    tensor = Tensor(shown, name, tuple(dataset.shape), dtype, partial(_read, dataset, shown, name, dtype))
    stored = min(dataset.id.get_storage_size(), size)
    if _bytes(tensor) > stored:
        raise ValueError(f"{shown}: dataset {name!r} declares {dtype} {tensor.shape}, {_bytes(tensor)} bytes, stores {stored}")
    return tensor


def _attribute(dataset: Any, name: str) -> str:
    value = dataset.attrs.get(name, "")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _bytes(tensor: Tensor) -> int:
    count = tensor.dtype.itemsize
    for length in tensor.shape:
        count *= length
    return count


def _read(dataset: Any, shown: Path, name: str, dtype: np.dtype) -> Array:
    try:
        values: Array = dataset[()]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{shown}: dataset {name!r} cannot be read, damaged: {error}") from None
    return np.asarray(values).view(dtype) if dtype != dataset.dtype else np.asarray(values)
