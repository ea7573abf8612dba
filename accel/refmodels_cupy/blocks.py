"""What the models are made of, as launches on rows of activations: norms, dense layers, attention, and what makes rows of tokens.

The families put these together as their readable bodies do. On a device the launches run at once; on a `Recorder` they become a
program. So one description of a layer serves prompts of any length, and the captured step of decoding.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmodels.op import Params
from refmodels.ops.cache import cache_append
from refmodels.ops.precision import compute_dtype, numpy_dtype
from refmodels_cupy.attention import attend
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.elementwise import COMBINATIONS
from refmodels_cupy.linear import ACTIVATIONS, EMBEDDING_THREADS, STORED, Products, typed
from refmodels_cupy.program import Recorder
from refmodels_cupy.source import form
from refmodels_cupy.weights import Matrix

THREADS = (128, 1, 1)
"""Of a block of cache.cu and of advance.cu."""

FORMS = [("cache.cu", form("append", x)) for x in (*STORED, "int8")] + [("cache.cu", "enter")]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand, and what they may look at.

    keys    how many keys attention reads, in the cache or among the call's own
    how     what `attention.plan` is told of masks and positions
    start   int32 (b,): where each row's tokens begin in the cache; None is 0
    """

    keys: int
    how: dict[str, Any] = field(default_factory=dict)
    start: Any = None


class Block:
    """Parts of models for `batch` rows of `t` tokens each. Activations are [batch * t, n], in `dtype` unless another is given."""

    def __init__(self, device: Device, dtype: str, batch: int, t: int) -> None:
        self.device, self.products = device, Products(device)
        self.dtype, self.batch, self.t, self.rows = numpy_dtype(dtype), batch, t, batch * t

    def empty(self, width: int, dtype: str | None = None) -> Any:
        """Room for rows of activations."""
        return self.device.empty((self.rows, width), numpy_dtype(dtype) if dtype else self.dtype)

    def layers(self, layers: Iterable[Params]) -> Iterator[tuple[int, Params]]:
        """The layers with their numbers. What one of a recorded program has allocated serves the next one too."""
        for i, layer in enumerate(layers):
            if isinstance(self.device, Recorder):
                self.device.again()
            yield i, layer

    def norm(self, x: Any, p: Params, epsilon: float, *, dtype: str | None = None) -> Any:
        """`layer_norm` (gamma and beta) or `rms_norm` (weight)."""
        y = self.empty(x.shape[1], dtype or (self.dtype.name if "weight" in p else x.dtype.name))
        leaves = (p["weight"],) if "weight" in p else (p["gamma"], p["beta"])
        types = (x.dtype.name, leaves[0].dtype.name, *((y.dtype.name,) if "weight" in p else ()))
        kernel = form("rms_norm" if "weight" in p else "layer_norm", *types)
        arguments = (x, *leaves, y, np.int32(x.shape[1]), np.float32(epsilon))
        self.device.launch(Launch("norm.cu", kernel, (self.rows, 1, 1), (256, 1, 1), arguments))
        return y
