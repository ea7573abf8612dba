"""Safetensors files: one file, or the shards that an index file names. The safetensors package maps and checks them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

from refmodels.files import CheckpointError, inside
from refmodels.ops.precision import numpy_dtype
from refmodels.weights.shards import open_checkpoint
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


def _open_file(stack: ExitStack, directory: Path, name: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reading safetensors needs safetensors: pip install safetensors") from None
    path, shown = inside(directory, name), directory / name
    try:  # it checks that the header fits the file and that the tensors fill it without gaps or overlaps
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown}: not a sound safetensors file, or truncated: {error}") from None
    tensors: dict[str, Tensor] = {}
    for tensor in file.keys():  # noqa: SIM118  it is no mapping
        view = file.get_slice(tensor)
        code = str(view.get_dtype())
        if code not in DTYPES:
            label = f"{shown}: tensor {tensor[:300]!r}"
            raise CheckpointError(f"{label}: dtype {code!r} is not supported, wanted one of {', '.join(DTYPES)}")
        shape, dtype = tuple(view.get_shape()), numpy_dtype(DTYPES[code])
        tensors[tensor] = Tensor(shown, tensor, shape, dtype, partial(file.get_tensor, tensor))
    return tensors
