"""Safetensors files: one file, or the shards that an index file names.

The safetensors package checks a file that is to be read. The values are read and written here, one tensor after the other
(https://github.com/huggingface/safetensors, section "Format"): it maps the file to read it, and wants the bytes of every tensor
at once to write them; either is a second model in memory.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from refmodels.files import CheckpointError, inside
from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.weights.shards import INDEX_SUFFIX, open_checkpoint, partition
from refmodels.weights.tensor import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Name of a type in a header -> its NumPy name."""


@contextmanager
def open_tensors(directory: Path, name: str) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of file `name` of `directory` by their names; of all its shards if the name ends in `.index.json`.

    Nothing but headers is read until a tensor's `read()`, which must be called inside the `with` block. ValueError names the
    file and what is wrong with it; FileNotFoundError a missing file or shard; ImportError a missing package.
    """
    with ExitStack() as stack:
        yield MappingProxyType(open_checkpoint(stack, directory, name, _open_file))


def _opened(stack: ExitStack, directory: Path, name: str) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reading safetensors needs safetensors: pip install safetensors") from None
    path = inside(directory, name)
    try:  # it checks that the header fits the file and that the tensors fill it without gaps or overlaps
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / name}: not a sound safetensors file, or truncated: {error}") from None


def _open_file(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    file, shown = _opened(stack, directory, name), directory / name
    content = stack.enter_context(inside(directory, name).open("rb"))
    (length,) = struct.unpack("<Q", content.read(8))
    header = json.loads(content.read(length))
    tensors: dict[str, Tensor] = {}
    for tensor in file.keys():  # noqa: SIM118  it is no mapping
        view = file.get_slice(tensor)
        code, label = str(view.get_dtype()), f"{shown}: tensor {tensor[:300]!r}"
        if code not in DTYPES:
            raise CheckpointError(f"{label}: dtype {code!r} is not supported, wanted one of {', '.join(DTYPES)}")
        shape, dtype = tuple(view.get_shape()), numpy_dtype(DTYPES[code])
        start = 8 + length + header[tensor]["data_offsets"][0]
        tensors[tensor] = Tensor(shown, tensor, shape, dtype, partial(_read, content, label, start, shape, dtype))
    return tensors


def _read(content: BinaryIO, label: str, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    values = np.empty(shape, dtype)
    content.seek(start)
    if content.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"{label} cannot be read: the file is shorter than before")
    return values


def read_metadata(directory: Path, name: str) -> dict[str, str]:
    """The metadata in the header of one file; errors as for `open_tensors`."""
    with ExitStack() as stack:
        return dict(_opened(stack, directory, name).metadata() or {})


def write_tensors(directory: Path, tensors: Sequence[Tensor], limit: int, written: Callable[[Tensor], None]) -> None:
    """Write `model.safetensors`; or, where the tensors have more bytes than `limit`, shards of at most that many (a larger
    tensor is alone in its shard) and their index. `written` is called after every tensor. OSError if the disk is full."""
    parts = partition(tensors, limit)
    if len(parts) == 1:
        write_file(directory / "model.safetensors", parts[0], written)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_file(directory / name, part, written)
        weight_map |= {tensor.name: name for tensor in part}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / f"model.safetensors{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path,
    tensors: Sequence[Tensor],
    written: Callable[[Tensor], None] = lambda _: None,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write one file with these tensors and this metadata; `written` is called after every tensor."""
    codes = {name: code for code, name in DTYPES.items()}
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so each begins at a multiple of its size
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": codes[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for tensor in tensors:
            file.write(np.asarray(tensor.read(), order="C").reshape(-1).view(np.uint8).data)
            written(tensor)
