"""torch checkpoints, `pytorch_model.bin`, without torch: a zip archive of one pickle and one record for each storage.

One file, or the shards that an index file names. Nothing in the pickle is run: see `torch_pickle`. Files of torch before
1.6 have another form: see `torch_legacy`.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refmodels.files import CheckpointError, inside
from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.weights.shards import open_checkpoint
from refmodels.weights.tensor import Tensor
from refmodels.weights.torch_legacy import read_legacy
from refmodels.weights.torch_pickle import MAX_BYTES, Record, View, read_tensors

MAX_ALIASES = 4
"""The tensors of a file may declare this many times its bytes: T5 has four names for its embeddings."""


@contextmanager
def open_tensors(directory: Path, name: str) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of file `name` of `directory` by their names; of all its shards if the name ends in `.index.json`.

    Nothing but the pickles is read until a tensor's `read()`, which must be called inside the `with` block. ValueError
    names the file and what is wrong with it; FileNotFoundError a missing file or shard.
    """
    with ExitStack() as stack:
        yield MappingProxyType(open_checkpoint(stack, directory, name, _open_file))


def _open_file(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    path, shown = inside(directory, name), directory / name
    try:
        file = stack.enter_context(_Bounded(io.FileIO(path)))
        size = os.fstat(file.fileno()).st_size
        views, records = (read_legacy if file.peek(1)[:1] == b"\x80" else _read_archive)(file, shown)
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be read: {error}") from None
    tensors = {tensor: _tensor(file, shown, tensor, view, records) for tensor, view in views.items()}
    declared = sum(tensor.nbytes for tensor in tensors.values())
    if declared > MAX_ALIASES * size:
        raise CheckpointError(f"{shown}: the tensors declare {declared} bytes, the file has {size}")
    return tensors


class _Bounded(io.BufferedReader):
    """A file of which `read` gives at most `MAX_BYTES` at once: the central directory of an archive may claim to be as
    large as all of it. Tensors are read with `readinto`."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(MAX_BYTES + 1 if size is None or size < 0 else min(size, MAX_BYTES + 1))
        if len(content) > MAX_BYTES:
            raise ValueError(f"the directory of the archive or the pickle is larger than {MAX_BYTES} bytes")
        return content


def _read_archive(file: _Bounded, shown: Path) -> tuple[dict[str, View], dict[str, Record]]:
    """The tensors by their names, and the records of the storages by their keys."""
    entries = _entries(file, shown)
    order = _content(file, entries, "byteorder", shown) if "byteorder" in entries else b"little"
    if order != b"little":
        raise CheckpointError(f"{shown}: byte order {order[:20]!r} is not supported, wanted b'little'")
    views = read_tensors(_content(file, entries, "data.pkl", shown), str(shown))
    return views, {name.removeprefix("data/"): record for name, record in entries.items() if name.startswith("data/")}


def _entries(file: _Bounded, shown: Path) -> dict[str, Record]:
    """The entries of the archive by their names without the directory that all of them are in."""
    try:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it does not begin with a zip entry")
        with zipfile.ZipFile(file) as archive:
            entries, end = sorted(archive.infolist(), key=lambda entry: entry.header_offset, reverse=True), archive.start_dir
        found = [(entry.filename, _record(file, entry)) for entry in entries]
        for (entry_name, record), entry in zip(found, entries, strict=True):
            if record.start + record.size > end:
                raise ValueError(f"entry {entry_name[:300]!r} reaches into the next one or out of the file")
            end = entry.header_offset
    except (ValueError, zipfile.BadZipFile, NotImplementedError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{shown}: not a sound torch checkpoint, perhaps truncated: {error}") from None
    prefix = found[0][0].partition("/")[0] + "/" if found else ""
    records = {name.removeprefix(prefix): record for name, record in found if name.startswith(prefix)}
    if len(records) != len(found) or "data.pkl" not in records:
        raise CheckpointError(
            f"{shown}: not a sound torch checkpoint: wanted data.pkl and other entries, each once, in one directory"
        )
    return records


def _record(file: _Bounded, entry: zipfile.ZipInfo) -> Record:
    """ValueError for an entry that is not simply a run of bytes."""
    label = f"entry {entry.filename[:300]!r}"
    if entry.flag_bits & 0x2041:
        raise CheckpointError(f"{label} is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{label} is compressed, wanted it stored")
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4" or len(header) != 30:
        raise CheckpointError(f"{label} has no header at byte {entry.header_offset}")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    if file.read(name_length).decode("utf-8" if entry.flag_bits & 0x800 else "cp437") != entry.orig_filename:
        raise CheckpointError(f"{label} has another name at byte {entry.header_offset}")
    return Record(entry.header_offset + 30 + name_length + extra_length, entry.file_size, entry.CRC)


def _content(file: _Bounded, records: Mapping[str, Record], name: str, shown: Path) -> bytes:
    record = records[name]
    if record.size > MAX_BYTES:
        raise CheckpointError(f"{shown}: {name} has {record.size} bytes, wanted at most {MAX_BYTES}")
    file.seek(record.start)
    content = file.read(record.size)
    if len(content) != record.size or (record.crc and zlib.crc32(content) != record.crc):
        raise CheckpointError(f"{shown}: {name} is damaged: its checksum is wrong")
    return content


def _tensor(file: _Bounded, shown: Path, name: str, view: View, records: Mapping[str, Record]) -> Tensor:
    label, storage = f"{shown}: tensor {name[:300]!r}", view.storage
    dtype, record = numpy_dtype(storage.dtype), records.get(storage.key)
    if record is None:
        raise CheckpointError(f"{label} lies in record {storage.key[:100]!r}, which the file lacks")
    if storage.numel * dtype.itemsize != record.size:
        raise CheckpointError(f"{label}: its storage has {storage.numel} elements of {dtype}, its record {record.size} bytes")
    span = 0 if 0 in view.shape else 1  # from the first element to the last, of the axes so far
    for stride, length in sorted(axis for axis in zip(view.strides, view.shape, strict=True) if span and axis[1] > 1):
        if stride < span:
            raise CheckpointError(f"{label} has shape {view.shape} and strides {view.strides}: its elements overlap")
        span += (length - 1) * stride
    if view.offset + span > storage.numel:
        wanted = f"{span} elements from {view.offset} on"
        raise CheckpointError(f"{label} has shape {view.shape} and strides {view.strides}: {wanted} of {storage.numel}")
    return Tensor(shown, name, view.shape, dtype, partial(_read, file, label, view, dtype, span, record))


def _read(file: _Bounded, label: str, view: View, dtype: np.dtype[Any], span: int, record: Record) -> Array:
    raw = np.empty(span * dtype.itemsize, np.uint8)
    try:
        file.seek(record.start + view.offset * dtype.itemsize)
        count = file.readinto(raw.data)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{label} cannot be read: {error}") from None
    whole = raw.size == record.size and record.crc != 0
    if count != raw.size or (whole and zlib.crc32(raw.data) != record.crc):
        raise CheckpointError(f"{label} is damaged: its checksum is wrong, or the file shorter than before")
    strides = [stride * dtype.itemsize if length > 1 else 0 for stride, length in zip(view.strides, view.shape, strict=True)]
    return np.ndarray(view.shape, dtype, raw.data, strides=strides if raw.size else None)
