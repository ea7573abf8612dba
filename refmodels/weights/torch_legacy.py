"""torch checkpoints in the form of torch before 1.6: pickles one behind the other, then the values.

The pickles are a magic number, the version of the form, facts about the system that wrote it, the state dict, and the keys of
its storages. Then each storage follows in the order of the keys: how many elements it has, in eight bytes, and these. Nothing
in the pickles is run: see `torch_pickle`.
"""

import io
import os
import struct
from pathlib import Path
from typing import Any

from refmodels.files import CheckpointError
from refmodels.ops.precision import numpy_dtype
from refmodels.weights.torch_pickle import MAX_BYTES, Record, Storage, View, read_pickle, short, tensors_of

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
"""The first and the second pickle."""


def read_legacy(file: io.BufferedReader, shown: Path) -> tuple[dict[str, View], dict[str, Record]]:
    """The tensors by their names, and the records of the storages by their keys, which fill the file to its last byte.

    ValueError that starts with `shown` for a file that is not sound. None of the values is read.
    """
    source, size = str(shown), os.fstat(file.fileno()).st_size
    stream = io.BytesIO(file.read(min(size, MAX_BYTES)))
    for wanted, what in ((MAGIC, "magic number"), (VERSION, "version of the form")):
        found = read_pickle(stream, source)
        if type(found) is not int or found != wanted:
            raise CheckpointError(f"{source}: not a sound torch checkpoint: {what} {short(found)}, wanted {wanted}")
    system = read_pickle(stream, source)
    if type(system) is not dict or system.get("little_endian") is not True:
        found = short(system.get("little_endian")) if type(system) is dict else short(system)
        raise CheckpointError(f"{source}: byte order: little_endian is {found}, wanted True")
    views = tensors_of(read_pickle(stream, source), source)
    keys = read_pickle(stream, source)
    return views, _records(file, source, size, stream.tell(), _storages(views, keys, source))


def _storages(views: dict[str, View], keys: Any, source: str) -> list[Storage]:
    """The storages of the tensors in the order of the keys, which must name each of them once."""
    storages: dict[str, Storage] = {}
    for name, view in views.items():
        first = storages.setdefault(view.storage.key, view.storage)
        if view.storage != first:
            raise CheckpointError(
                f"{source}: tensor {name[:300]!r}: its storage has {view.storage.numel} elements of {view.storage.dtype}, "
                f"in another tensor {first.numel} of {first.dtype}"
            )
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{source}: not a sound torch checkpoint: wanted a list of the keys of storages, each once")
    if storages.keys() != set(keys):
        key = min(storages.keys() ^ set(keys))
        where = "tensors, but not in the list of keys" if key in storages else "list of keys, but in no tensor"
        raise CheckpointError(f"{source}: not a sound torch checkpoint: storage {key[:100]!r} is in the {where}")
    return [storages[key] for key in keys]


def _records(file: io.BufferedReader, source: str, size: int, place: int, storages: list[Storage]) -> dict[str, Record]:
    """Where the storages lie that begin at byte `place`."""
    records = {}
    for storage in storages:
        label = f"{source}: storage {storage.key[:100]!r}"
        file.seek(place)
        count = file.read(8)
        if count != struct.pack("<Q", storage.numel):
            found = f"{struct.unpack('<Q', count)[0]} elements" if len(count) == 8 else "nothing: it is truncated"
            raise CheckpointError(f"{label} has {storage.numel} elements, at byte {place} the file has {found}")
        record = records[storage.key] = Record(place + 8, storage.numel * numpy_dtype(storage.dtype).itemsize)
        place = record.start + record.size
        if place > size:
            raise CheckpointError(f"{label} ends at byte {place}, the file at byte {size}: it is truncated")
    if place != size:
        raise CheckpointError(f"{source}: not a sound torch checkpoint: the last storage ends at byte {place} of {size}")
    return records
