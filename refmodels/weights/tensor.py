"""The record of a stored tensor."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.op import Array


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
