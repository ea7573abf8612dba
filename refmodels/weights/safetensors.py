"""Safetensors files, memory-mapped: one file, or the shards that an index file names.

The format is 8 bytes of header length (little endian), a JSON header, then the tensors without gaps or overlaps.
Reading it takes less code than calling the `safetensors` package and translating its errors, so NumPy is all that is
needed.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.weights.files import MAX_JSON_BYTES, Tensor, inside, parse_json, read_json

INDEX_SUFFIX = ".index.json"

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""Name of a type in a header -> its NumPy name."""


@contextmanager
def open_tensors(directory: Path, name: str) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of file `name` of `directory` by their names; of all its shards if the name ends in `.index.json`.

    Nothing but headers is read until a tensor's `read()`, which gives a read-only view of the mapped file. ValueError
    names the file, the tensor, what was found and what was wanted; FileNotFoundError for a missing file or shard;
    ImportError for bfloat16 tensors without ml_dtypes.
    """
    read = _read_shards if name.endswith(INDEX_SUFFIX) else _read_file
    yield MappingProxyType(read(directory, name))


def _read_shards(directory: Path, name: str) -> dict[str, Tensor]:
    index = directory / name
    places = read_json(directory, name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: field 'weight_map' must map tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        found = _read_file(directory, shard)
        promised = {tensor for tensor, place in places.items() if place == shard}
        if difference := sorted(promised ^ found.keys()):
            where = "the index alone" if difference[0] in promised else "the shard alone"
            raise ValueError(f"{index}: tensor {difference[0]!r} of shard {shard} is in {where}")
        tensors |= found
    return tensors


def _read_file(directory: Path, name: str) -> dict[str, Tensor]:
    path, shown = inside(directory, name), directory / name
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{shown}: {size} bytes, too short for a safetensors file: truncated?")
    content = np.memmap(path, np.uint8, mode="r")
    header_size = int(content[:8].view("<u8")[0])
    if header_size > min(size - 8, MAX_JSON_BYTES):
        raise ValueError(
            f"{shown}: not a safetensors file, or truncated: the header claims {header_size} bytes, {size - 8} follow "
            f"and {MAX_JSON_BYTES} are allowed"
        )
    header = parse_json(content[8 : 8 + header_size].tobytes(), f"{shown}: header")
    header.pop("__metadata__", None)
    data = content[8 + header_size :]
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for tensor_name, entry in header.items():
        dtype, shape, begin, end = _entry(f"{shown}: tensor {tensor_name[:300]!r}", entry, data.size)
        spans.append((begin, end, tensor_name))
        tensors[tensor_name] = Tensor(shown, tensor_name, shape, dtype, partial(_view, data, begin, end, dtype, shape))
    _check_spans(shown, spans, data.size)
    return tensors


def _entry(label: str, entry: Any, available: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one entry of a header, checked against each other and the bytes that there are."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{label}: wanted dtype, shape and two data_offsets, found {str(entry)[:200]}") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{label}: dtype {code!r} is not supported, wanted one of {', '.join(DTYPES)}")
    if len(shape) > 16 or any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise ValueError(f"{label}: shape and data_offsets must be counts of 0 or more, found {str(entry)[:200]}")
    dtype = numpy_dtype(DTYPES[code])
    if end > available:
        raise ValueError(f"{label}: ends at byte {end} of the data, but the file has {available}: truncated?")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{label}: {code} {shape} takes {math.prod(shape) * dtype.itemsize} bytes, data_offsets span {end - begin}"
        )
    return dtype, shape, begin, end


def _check_spans(shown: Path, spans: list[tuple[int, int, str]], available: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{shown}: tensor {name!r} begins at byte {begin} of the data, wanted {position}")
        position = end
    if position != available:
        raise ValueError(f"{shown}: {available} bytes of data, but the header describes {position}")


def _view(data: Array, begin: int, end: int, dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    return data[begin:end].view(np.ndarray).view(dtype).reshape(shape)
