"""NumPy's files: `x.npy`, one array named `x`, and `*.npz`, a zip archive of them. Nothing in them is unpickled.

The values are read when they are asked for. What the header says is held against the size of the file before anything of that
size is allocated.
"""

import math
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from refmodels.files import CheckpointError, inside
from refmodels.op import Array
from refmodels.weights.tensor import Tensor

NUMBERS = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"bool"}
FLOATS = {"float16", "float32", "float64"}

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Version of the format -> what reads its header; later ones are for records and objects."""

Open = Callable[[], AbstractContextManager[BinaryIO]]


def open_npy(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    """The array of one file by the file's name without its ending. ValueError if it is not sound."""
    path = inside(directory, name)
    stem = name.removesuffix(".npy")
    opened = cast(Open, partial(path.open, "rb"))
    return {stem: _tensor(directory / name, stem, opened, path.stat().st_size)}


def open_npz(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    """The arrays of one archive by their names. ValueError if it, or one of them, is not sound."""
    shown = directory / name
    try:
        archive = stack.enter_context(zipfile.ZipFile(inside(directory, name)))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shown}: not a sound npz file: {error}") from None
    tensors: dict[str, Tensor] = {}
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        if key == member.filename:
            raise CheckpointError(f"{shown}: holds {member.filename[:300]!r}, which is no npy file")
        if key in tensors:
            raise CheckpointError(f"{shown}: has {key[:300]!r} twice")
        opened = cast(Open, partial(archive.open, member))
        tensors[key] = _tensor(Path(f"{shown}: {key[:300]}"), key, opened, member.file_size)
    return tensors


def _tensor(shown: Path, name: str, opened: Open, size: int) -> Tensor:
    shape, dtype = _checked(shown, lambda: _header(shown, opened, size))
    return Tensor(shown, name, shape, dtype, lambda: _checked(shown, lambda: _values(opened, dtype)))


def _checked(shown: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except CheckpointError:
        raise
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for what is damaged, packed unknown ways, or locked
        raise CheckpointError(f"{shown}: not a sound npy file: {' '.join(str(error).split())[:300]}") from None


def _header(shown: Path, opened: Open, size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with opened() as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise CheckpointError(f"{shown}: npy format {version[0]}.{version[1]}, wanted 1.0 or 2.0")
        shape, _, dtype = HEADERS[version](file)
        left = size - file.tell()
    if dtype.hasobject:
        raise CheckpointError(f"{shown}: holds pickled objects, which are not read")
    if dtype.name not in FLOATS | NUMBERS:
        hint = " (bfloat16 is written as float32, or to safetensors)" if dtype.kind == "V" else ""
        raise CheckpointError(f"{shown}: dtype {str(dtype)[:100]} is not supported, wanted numbers or bool{hint}")
    if any(extent < 0 for extent in shape) or math.prod(shape) * dtype.itemsize != left:
        raise CheckpointError(f"{shown}: {left} bytes of values, wanted those of shape {shape} in {dtype.name}")
    return shape, dtype.newbyteorder("=")


def _values(opened: Open, dtype: np.dtype[Any]) -> Array:
    with opened() as file:
        values: Array = np.lib.format.read_array(file, allow_pickle=False)
    return values.astype(dtype, copy=False)
