"""The record of a stored tensor, and what does not fit in a file of them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.files import CheckpointError
from refmodels.op import Array
from refmodels.ops.precision import FLOATS


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, not read yet: the `file` it lies in, its `name` there, `shape`, `dtype`.

    `read()` gives the values; ValueError if the file turns out to be damaged. Of a tensor that is to be stored, `file` is what
    it is stored for, and `read()` makes the values when their turn comes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """How many bytes the values take."""
        return self.dtype.itemsize * math.prod(self.shape)


class Misfits:
    """What in a `file` of tensors does not fit a `model` (the name of its class), collected so that one error tells all."""

    def __init__(self, file: Path, model: str) -> None:
        self._file, self._model = file, model
        self._found: list[str] = []
        self._used: set[str] = set()

    def add(self, problem: str) -> None:
        """One more."""
        self._found.append(problem)

    def tensor(
        self,
        tensors: Mapping[str, Tensor],
        names: tuple[str, ...],
        shape: tuple[int, ...] | None,
        dtypes: tuple[str, ...] = FLOATS,
    ) -> Any:
        """The tensor of the first of these names that is there, which is to have this shape (None for any) and one of these
        types; None, or one that does not fit, is noted, so that `check` raises."""
        name = next((name for name in names if name in tensors), None)
        if name is None:
            self.add(f"tensor {names[0]!r}{'' if shape is None else f' of shape {shape}'} is missing")
            return None
        self._used.add(name)
        tensor = tensors[name]
        if shape is not None and tensor.shape != shape:
            self.add(f"tensor {name!r} has shape {tensor.shape}, wanted {shape}")
        elif tensor.dtype.name not in dtypes:
            wanted = dtypes[0] if len(dtypes) == 1 else f"one of {', '.join(dtypes)}"
            self.add(f"tensor {name!r} has dtype {tensor.dtype}, wanted {wanted}")
        return tensor

    def surplus(self, names: Iterable[str]) -> None:
        """Every one of these names that `tensor` did not give is a problem."""
        self._found += [f"tensor {name[:300]!r} is surplus" for name in names if name not in self._used]

    def check(self) -> None:
        """CheckpointError with the first eight problems, if there is any."""
        if self._found:
            more = f"; and {len(self._found) - 8} more" if len(self._found) > 8 else ""
            raise CheckpointError(f"{self._file} does not fit this {self._model}: {'; '.join(self._found[:8])}{more}")
