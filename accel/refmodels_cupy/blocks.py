"""What the models are made of, as launches on rows of activations: norms, dense layers, attention, token vectors, scores.

The families put these together as their readable bodies do. On a device the launches run at once, on a `Recorder` they become a
program: one description of a layer serves prompts of any length and the captured step of decoding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmodels.op import Params
from refmodels.ops.precision import compute_dtype, numpy_dtype
from refmodels_cupy.attention import MOST_BLOCKS, ROOMS, attend
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.elementwise import COMBINATIONS
from refmodels_cupy.elementwise import THREADS as ELEMENTWISE_THREADS
from refmodels_cupy.linear import ACTIVATIONS, MOST, STORED, WEIGHTS, Products, as_it_is, stored
from refmodels_cupy.norm import THREADS as NORM_THREADS
from refmodels_cupy.program import Recorder
from refmodels_cupy.quantize import LONGEST, rows_to_int8
from refmodels_cupy.source import form
from refmodels_cupy.weights import Matrix

THREADS = (128, 1, 1)
"""Of a block of cache.cu."""

FORMS = [("cache.cu", form("append", x)) for x in (*STORED, "int8")]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand, and what they look at.

    keys    how many keys attention reads, from the cache or among the call's own
    how     what `attention.plan` is told of masks and positions
    start   int32 (b,): where each row's tokens begin in the cache, read when the launch runs; None is 0
    """

    keys: int
    how: dict[str, Any] = field(default_factory=dict)
    start: Any = None


class Block:
    """Parts of models for `batch` rows of `t` tokens. Activations are [batch * t, n], in `dtype` unless another is given."""

    def __init__(self, device: Device, dtype: str, batch: int, t: int) -> None:
        self.device, self.products = device, Products(device)
        self.dtype, self.batch, self.t, self.rows = numpy_dtype(dtype), batch, t, batch * t

    def layers(self, layers: Iterable[Params]) -> Iterator[tuple[int, Params]]:
        """The layers with their numbers. What one of a recorded program has allocated serves the next one too."""
        for i, layer in enumerate(layers):
            if isinstance(self.device, Recorder):
                self.device.again()
            yield i, layer

    def norm(self, x: Any, p: Params, epsilon: float) -> Any:
        """`layer_norm` (gamma and beta) or `rms_norm` (weight) in the block's type."""
        y = self.device.empty(x.shape, self.dtype)
        if "weight" in p:
            leaves, kernel = (p["weight"],), form("rms_norm", x.dtype.name, p["weight"].dtype.name, y.dtype.name)
        else:
            leaves, kernel = (p["gamma"], p["beta"]), form("layer_norm", x.dtype.name, p["gamma"].dtype.name)
        arguments = (x, *leaves, y, np.int32(x.shape[1]), np.float32(epsilon))
        self.device.launch(Launch("norm.cu", kernel, (len(x), 1, 1), NORM_THREADS, arguments))
        return y

    # -- products -------------------------------------------------------------------------------------------------------------

    def dense(self, x: Any, p: Params, *, gate: Params | None = None, dtype: str | None = None, **finish: Any) -> Any:
        """`dense` and what follows it: residual + activation(x @ kernel + bias) * (x @ gate's kernel), rounded once."""
        return self._product(self._inputs(x, p), _weights(p), None if gate is None else _weights(gate), dtype, **finish)

    def dense_each(self, x: Any, *layers: Params) -> list[Any]:
        """`dense` of the same rows by several layers."""
        inputs = self._inputs(x, layers[0])
        return [self._product(inputs, _weights(p), None, None) for p in layers]

    def scores(self, hidden: Any, table: Params, *, scale: float = 1.0) -> Any:
        """`token_scores` of rows."""
        name = "reverse_embeddings" if "reverse_embeddings" in table else "embeddings"
        weights = _weights(table, name)
        if scale != 1.0 and weights.is_integer:  # the integers are those of the scaled rows
            hidden, scale = self._elementwise(hidden, factor=scale), 1.0
        return self._product(self._inputs(hidden, table, name), weights, None, None, factor=scale)

    def _inputs(self, x: Any, p: Params, name: str = "kernel") -> tuple[Any, Any]:
        """What products with these weights read: the rows, or their int8 numbers and scales; with zeros up to the pitch."""
        weights = _weights(p, name)
        pitch = weights.matrix.pitch
        if weights.is_integer:
            values, scale = self.device.empty((len(x), pitch), np.int8), self.device.empty((len(x),), np.float32)
            rows_to_int8(self.device, x, scale, values)
            return values, scale
        if x.shape[1] == pitch:
            return x, None
        wider = self.device.empty((len(x), pitch), x.dtype)
        wider[...] = 0
        self._append((x, wider), (None, None), None, len(x), pitch, len(x))
        return wider, None

    def _product(
        self,
        inputs: tuple[Any, Any],
        weights: "Weights",
        gate: "Weights | None",
        dtype: str | None,
        **finish: Any,
    ) -> Any:
        (x, row_scale), w = inputs, weights.matrix
        y = self.device.empty((len(x), w.n), numpy_dtype(dtype) if dtype else self.dtype)
        scales = {"row_scale": row_scale, "scale": weights.scale, "bias": weights.bias}
        if len(x) <= MOST:
            gated = {} if gate is None else {"gate": gate.matrix, "gate_scale": gate.scale}
            self.products.fused(x, w, y, **scales, **gated, **finish)
            return y
        # int8 numbers are exact in half precision, what int4 numbers stand for is not
        common = x.dtype if w.kind in (x.dtype.name, "int8") else np.dtype(np.float32)
        self.products.finish(self.products.sums(x.astype(common, copy=False), w.widened(common)), y, **scales, **finish)
        return y if gate is None else self._elementwise(y, self._product(inputs, gate, None, dtype))

    def _elementwise(self, x: Any, by: Any = None, *, factor: float = 1.0) -> Any:
        """x times `by`, or times a number."""
        y, combination = self.device.empty(x.shape, x.dtype), COMBINATIONS["alone" if by is None else "multiply"]
        kernel = form("elementwise", x.dtype.name, (x if by is None else by).dtype.name)
        operation = (np.int64(x.size), np.int32(combination), np.float32(factor), np.int32(ACTIVATIONS["linear"]))
        blocks = (-(-x.size // ELEMENTWISE_THREADS), 1, 1)
        self.device.launch(Launch("elementwise.cu", kernel, blocks, (ELEMENTWISE_THREADS, 1, 1), (x, by, y, *operation)))
        return y

    # -- tokens and positions -------------------------------------------------------------------------------------------------

    def vectors(self, ids: Any, table: Params, *, dtype: str | None = None, **positions: Any) -> Any:
        """`token_vectors` of ids [rows], int32, in the block's type or `dtype`; `positions` as for `Products.rows`."""
        scale = table.get("embeddings_weight_only_scale", table.get("embeddings_scale"))
        return self.products.rows(ids, table["embeddings"], dtype or self.dtype.name, scale=scale, **positions)

    def position_vectors(self, position_ids: Any, table: Any) -> Any:
        """Rows of a table of positions, ids int32."""
        return self.products.rows(position_ids, as_it_is(table), self.dtype.name)

    # -- attention ------------------------------------------------------------------------------------------------------------

    def attention(
        self, x: Any, p: Params, heads: int, cache: Params | None, places: Places, *, scale: float, bias: Any = None
    ) -> Any:
        """Attention of rows to themselves, and to what is in the cache, up to the product with the output's kernel."""
        query, key, value = (y.reshape(self.batch, self.t, heads, -1) for y in self.dense_each(x, p["query"], p["key"], p["value"]))
        if cache is not None:
            batch, capacity, *_ = cache["key"].shape
            pairs = (key, cache["key"]), (value, cache["value"])
            self._append(*pairs, places.start, self.t, key.shape[2] * key.shape[3], capacity)
            key, value = (cache[name][:, : places.keys] for name in ("key", "value"))
        return self.attend(query, key, value, places, scale=scale, bias=bias)

    def attend(self, query: Any, key: Any, value: Any, places: Places, *, scale: float, bias: Any = None) -> Any:
        """Attention to keys and values (b, s, h, d), as rows [rows, h * d]."""
        query = query.reshape(self.batch, self.t, *key.shape[2:])
        return attend(self.device, query, key, value, scale=scale, bias=bias, **places.how).reshape(self.rows, -1)

    def _append(
        self, first: tuple[Any, Any], second: tuple[Any, Any], start: Any, t: int, pitch: int, capacity: int
    ) -> None:
        """Rows of each first array to their places in the second: [-1, t, width] into [-1, capacity, pitch]."""
        ...
