"""What the models are made of, as launches on rows of activations: norms, dense layers, attention, token vectors, scores.

The families put these together as their readable bodies do. On a device the launches run at once, a `Recorder` keeps them: one
description of a layer serves prompts of any length and the captured step of decoding.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmodels.op import Params, ShapeError
from refmodels.ops.cache import cache_append
from refmodels.ops.position import token_positions
from refmodels.ops.precision import compute_dtype, numpy_dtype
from refmodels_cupy.attention import ROOMS, attend
from refmodels_cupy.cache import append, filled
from refmodels_cupy.device import MOST_BLOCKS, Device, address
from refmodels_cupy.elementwise import STORED, elementwise
from refmodels_cupy.linear import MOST, OPERANDS, WEIGHTS, Products, as_it_is, by_tensor_cores, stored
from refmodels_cupy.norm import LONGEST as LONGEST_NORM
from refmodels_cupy.norm import norm, residual_norm
from refmodels_cupy.quantize import LONGEST, rows_to_int8
from refmodels_cupy.recorder import Recorder
from refmodels_cupy.weights import TOGETHER, Matrix


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
        """The layers with their numbers. What one of a recorded step has allocated serves the next one too."""
        for i, layer in enumerate(layers):
            if isinstance(self.device, Recorder):
                self.device.again()
            yield i, layer

    def norm(self, x: Any, p: Params, epsilon: float) -> Any:
        """`layer_norm` (gamma and beta) or `rms_norm` (weight) in the block's type."""
        y = self.device.empty(x.shape, self.dtype)
        norm(self.device, x, p, y, epsilon=epsilon)
        return y

    # -- products -------------------------------------------------------------------------------------------------------------

    def dense(self, x: Any, p: Params, *, gate: Params | None = None, dtype: str | None = None, **finish: Any) -> Any:
        """`dense` and what follows it: residual + activation(x @ kernel + bias) * (x @ gate's kernel), rounded once."""
        return self._product(self._inputs(x, p), _weights(p), None if gate is None else _weights(gate), dtype, **finish)

    def dense_norm(self, x: Any, p: Params, norm_p: Params, epsilon: float, *, residual: Any) -> tuple[Any, Any]:
        """residual + `dense` of x, and the norm of that. Of many rows the sum is made where the norm reads it."""
        if len(x) <= MOST:
            total = self.dense(x, p, residual=residual)
            return total, self.norm(total, norm_p, epsilon)
        total, y = (self.device.empty(residual.shape, residual.dtype) for _ in range(2))
        change = self.dense(x, p | {"bias": None})
        residual_norm(self.device, residual, change, total, norm_p, y, epsilon=epsilon, bias=p.get("bias"))
        return total, y

    def query_key_value(self, x: Any, p: Params, heads: int) -> list[Any]:
        """Queries, keys and values (b, t, h, d) of an attention: by one product where their matrices are one."""
        if "_joint" in p:
            together = self.dense(x, p["_joint"]).reshape(self.batch, self.t, len(TOGETHER), heads, -1)
            return [together[:, :, i] for i in range(len(TOGETHER))]
        layers = [p[name] for name in TOGETHER]
        inputs = self._inputs(x, layers[0])
        return [self._product(inputs, _weights(layer), None, None).reshape(self.batch, self.t, heads, -1) for layer in layers]

    def scores(self, hidden: Any, table: Params, *, scale: float = 1.0) -> Any:
        """`token_scores` of rows."""
        name = "reverse_embeddings" if "reverse_embeddings" in table else "embeddings"
        weights = _weights(table, name)
        if scale != 1.0 and weights.is_integer:  # the integers are those of the scaled rows
            hidden, scale = elementwise(self.device, hidden, factor=scale), 1.0
        return self._product(self._inputs(hidden, table, name), weights, None, None, factor=scale)

    def _inputs(self, x: Any, p: Params, name: str = "kernel") -> tuple[Any, Any]:
        """What products with these weights read: the rows, with zeros up to the pitch, or their int8 numbers and scales."""
        weights = _weights(p, name)
        pitch = weights.matrix.pitch
        if weights.is_integer:
            values, scale = self.device.empty((len(x), pitch), np.int8), self.device.empty((len(x),), np.float32)
            rows_to_int8(self.device, x, scale, values)
            return values, scale
        if x.shape[1] == pitch or not _by_own_kernels(x, weights.matrix):
            return x, None
        wider = self.device.empty((len(x), pitch), x.dtype)
        wider[...] = 0
        append(self.device, [(x, wider[None])], None, len(x), x.shape[1])
        return wider, None

    def _product(
        self,
        inputs: tuple[Any, Any],
        weights: "Weights",
        gate: "Weights | None",
        dtype: str | None,
        *,
        residual: Any = None,
        **finish: Any,
    ) -> Any:
        (x, row_scale), w = inputs, weights.matrix
        y = self.device.empty((len(x), w.n), numpy_dtype(dtype) if dtype else self.dtype)
        finish |= {"scale": weights.scale, "bias": weights.bias}
        by_row = {"row_scale": row_scale, "residual": residual}
        if _by_own_kernels(x, w):
            gated = {} if gate is None else {"gate": gate.matrix, "gate_scale": gate.scale}
            for begin in range(0, len(x), MOST):
                part = slice(begin, begin + MOST)
                rows: dict[str, Any] = {name: None if array is None else array[part] for name, array in by_row.items()}
                self.products.fused(x[part], w, y[part], **rows, **gated, **finish)
            return y
        self.products.many(x, w, y, **by_row, **finish)
        if gate is None:
            return y
        return elementwise(self.device, y, self._product(inputs, gate, None, dtype), combination="multiply")

    def sum(self, x: Any, other: Any) -> Any:
        """x + other, in the type of x."""
        return elementwise(self.device, x, other, combination="add")

    # -- tokens and positions -------------------------------------------------------------------------------------------------

    def vectors(self, ids: Any, table: Params, *, dtype: str | None = None, **positions: Any) -> Any:
        """`token_vectors` of ids [rows], int32, in the block's type or `dtype`; `positions` as for `Products.rows`."""
        w = _weights(table, "embeddings")
        return self.products.rows(ids, w.matrix, dtype or self.dtype.name, scale=w.scale, **positions)

    def position_vectors(self, position_ids: Any, table: Any) -> Any:
        """Rows of a table of positions, ids int32."""
        return self.products.rows(position_ids, as_it_is(table), self.dtype.name)

    # -- attention ------------------------------------------------------------------------------------------------------------

    def attention(
        self, x: Any, p: Params, heads: int, cache: Params | None, places: Places, *, scale: float, bias: Any = None
    ) -> Any:
        """Attention of rows to themselves, and to what is in the cache, up to the product with the output's kernel."""
        query, key, value = self.query_key_value(x, p, heads)
        if cache is not None:
            pairs = [(key, cache["key"]), (value, cache["value"])]
            append(self.device, pairs, places.start, self.t, key.shape[2] * key.shape[3])
            key, value = (cache[name][:, : places.keys] for name in ("key", "value"))
        return self.attend(query, key, value, places, scale=scale, bias=bias)

    def attend(self, query: Any, key: Any, value: Any, places: Places, *, scale: float, bias: Any = None) -> Any:
        """Attention to keys and values (b, s, h, d), as rows [rows, h * d]."""
        return attend(self.device, query, key, value, scale=scale, bias=bias, **places.how).reshape(self.rows, -1)


@dataclass(frozen=True)
class Weights:
    """A matrix with what stands beside it. `is_integer`: its products are with int8 numbers."""

    matrix: Matrix
    scale: Any
    bias: Any
    is_integer: bool


def _by_own_kernels(x: Any, w: Matrix) -> bool:
    """Whether `Products.fused` multiplies them, so many rows at a time as it takes; cuBLAS has no product for int4 weights."""
    return len(x) <= MOST or (w.kind == "int4" and by_tensor_cores(x, w))


def _weights(p: Params, name: str = "kernel") -> Weights:
    w, only = p[name], p.get(f"{name}_weight_only_scale")
    scale = (p[f"{name}_scale"] if only is None else only) if w.kind == "int8" else None
    return Weights(w, scale, p.get("bias"), w.kind == "int8" and only is None)


def causal_places(
    device: Device, token_ids: Any, padding_mask: Any, cache: Params | None, start: Any, *, causal: bool = True
) -> Places:
    """The real keys, and if `causal` none after the token itself. With a cache their mask is entered there."""
    positions = token_positions(token_ids, start)
    if cache is not None:
        padding_mask = cache_append(cache["padding_mask"], padding_mask, start)
    how = {"causal": causal, "key_mask": device.xp.ascontiguousarray(padding_mask), "positions": positions.astype(np.int32)}
    return Places(padding_mask.shape[1], how, _int32(start))


def masked_places(device: Device, x: Any, mask: Any, cache: Params | None = None, start: Any = None) -> Places:
    """What a mask (b or 1, 1, t or 1, s) permits."""
    if cache is not None:
        end = filled(device, start, x.shape[1], cache["key"].shape[1])
        if end > mask.shape[-1]:
            raise ShapeError(f"positions up to {end - 1} are written, but the mask is of {mask.shape[-1]}")
    return Places(mask.shape[-1], {"mask": mask}, _int32(start))


def _int32(array: Any) -> Any:
    return None if array is None else array.astype(np.int32)


def flat_ids(device: Device, ids: Any, shape: tuple[int, ...]) -> Any:
    """Ids (b or 1, t) as one row of int32 for each of the call's."""
    return device.xp.ascontiguousarray(device.xp.broadcast_to(ids.astype(np.int32), shape)).reshape(-1)


def flat_rows(device: Device, x: Any) -> Any:
    """Activations (b, t, n) as contiguous rows, from a multiple of 16 bytes on: so much do products read at once."""
    if x is None:
        return None
    rows = device.xp.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return rows.copy() if address(rows) % 16 else rows


def kept(p: Params, name: str, make: Callable[[], Any]) -> Any:
    """The private entry of this name of a loaded tree, made when it is first asked for."""
    if name not in p:
        p[name] = make()
    return p[name]


# -- when a model is run op by op ---------------------------------------------------------------------------------------------


def refused(
    params: Params, config: Any, shape: tuple[int, int], *, rng: Any = None, caches: Iterable[Params] = ()
) -> str | None:
    """Why a part of a model is run op by op, if that is so. `params` are the part's, the tokens (b, t) have this `shape`, and
    `caches` have keys and values."""
    dtype = compute_dtype(config.dtype)
    if dtype not in STORED:
        return f"{config.dtype}: the reference's"
    if rng is not None and config.dropout > 0:
        return "dropout draws: op by op"
    batch, t = shape
    if not batch * t:
        return "no rows: op by op"
    if config.hidden_dim > LONGEST_NORM:
        return f"norms of {config.hidden_dim} values: op by op"
    if config.head_dim > ROOMS[-1] or max(batch, config.num_heads) > MOST_BLOCKS:
        return f"heads of {config.head_dim} numbers, {config.num_heads} of them, {batch} rows: op by op"
    for cache in caches:
        for name in ("key", "value"):
            if cache[name].dtype.name != dtype or not cache[name].flags.c_contiguous:
                return "keys and values of another type or layout: op by op"
    known = params.get("_obstacles", {})
    if dtype not in known:
        known[dtype] = _obstacle(params, dtype)
        if known[dtype] != NOT_LOADED:
            params["_obstacles"] = known
    return known[dtype]


NOT_LOADED = "parameters that were not loaded: op by op"


def _obstacle(tree: Any, dtype: str, name: str = "") -> str | None:
    """What in a tree is not for launches."""
    if isinstance(tree, list):
        return next((found for part in tree if (found := _obstacle(part, dtype))), None)
    if "lora_kernel_a" in tree:
        return "a layer has an adapter: op by op"
    for key, part in tree.items():
        found = None
        if key.startswith("_"):
            continue
        if isinstance(part, dict | list):
            found = _obstacle(part, dtype, key)
        elif key in ("kernel", "reverse_embeddings") or (key == "embeddings" and name == "token_embedding"):
            if not isinstance(part, Matrix):
                found = NOT_LOADED
            elif stored(part) not in (*WEIGHTS[dtype], *OPERANDS.get(dtype, ())):
                found = f"weights of {part.kind} in a model of {dtype}: op by op"
            elif part.kind == "int8" and part.k > LONGEST:
                found = f"rows of {part.k}: sums that may not fit into int32"
        if found:
            return found
    return None
