"""What the fused kernels are made of: layers as instructions, on activations that stay float32 and are rounded where ops round.

So a fused kernel gives the bits of the ops that it stands for, each run by its own kernel.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.op import Array, Params, ShapeError
from refmodels.ops.precision import compute_dtype, numpy_dtype
from refmodels_numba.layout import ACTIVATIONS, FLOAT32, INT8, INTEGER, ROUND, STORED
from refmodels_numba.packing import Packed, address
from refmodels_numba.program import Buffers, Program, Slot
from refmodels_numba.team import Team


class UnfusibleError(Exception):
    """Why a layer is run op by op."""


class Block(Program):
    """A program for rows of activations, with the layers of the models as methods.

    `dtype` is the type that activations are rounded to. Sizes of a call: `rows` = `batch` * `t`, and `s` keys.
    """

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.rounding = ROUND[dtype]
        self.rows = self.slot("rows")

    def norm(self, x: Slot, out: Slot, n: int, p: Params, epsilon: float, *, rounding: int | None = None) -> None:
        """layer_norm (gamma and beta) or rms_norm (weight)."""
        gamma = self.vector(p["gamma"] if "gamma" in p else p["weight"])
        beta = self.vector(p["beta"]) if "beta" in p else 0
        rounding = self.rounding if rounding is None else rounding
        self.add("norm", rows=self.rows, x=x, n=n, gamma=gamma, beta=beta, epsilon=float(epsilon), out=out, rounding=rounding)

    def inputs(self, x: Slot, layers: list[Params]) -> tuple[Slot, Slot | None]:
        """What products with these layers read: x, or its int8 numbers and their scales."""
        kernels = [layer["kernel"] for layer in layers]
        if not all(isinstance(kernel, Packed) for kernel in kernels):
            raise UnfusibleError("a kernel is not packed")
        if kernels[0].kind != INTEGER:
            return x, None
        return self.quantized(self.rows, x, kernels[0].k)

    def quantized(self, rows: Slot, x: Slot, k: int) -> tuple[Slot, Slot]:
        """x as int8 numbers, and the scale of each row."""
        count = "rows" if rows is self.rows else "batch"
        out = self.buffer(f"integers {count} {k}", count, -(-k // 2))
        scales = self.buffer(f"scales {count}", count, 1)
        self.add("quantize", rows=rows, x=x, k=k, out=out, row_scales=scales)
        return out, scales

    def dense(
        self,
        given: tuple[Slot, Slot | None],
        p: Params,
        out: Slot,
        *,
        activation: str = "none",
        rounding: int | None = None,
        residual_rounding: int | None = None,
        **operands: Any,
    ) -> None:
        """`dense` and what follows it; `given` is from `inputs`."""
        if "lora_kernel_a" in p:
            raise UnfusibleError("a layer has an adapter")
        kernel, (x, row_scales) = p["kernel"], given
        scale = p.get("kernel_weight_only_scale", p.get("kernel_scale"))
        self.linear(
            self.rows,
            x,
            kernel,
            out,
            column_scale=scale if kernel.kind in (INT8, INTEGER) else None,
            bias=p.get("bias"),
            row_scales=0 if row_scales is None else row_scales,
            activation=ACTIVATIONS[activation],
            rounding=self.rounding if rounding is None else rounding,
            residual_rounding=self.rounding if residual_rounding is None else residual_rounding,
            **operands,
        )

    def scores(self, rows: Slot, hidden: Slot, p: Params, out: Slot, *, scale: float = 1.0) -> None:
        """`token_scores` of hidden states."""
        name = "reverse_embeddings" if "reverse_embeddings" in p else "embeddings"
        table = p[name]
        if not isinstance(table, Packed):
            raise UnfusibleError("the token table is not packed")
        x, row_scales, factor = hidden, None, scale
        if scale != 1.0 and (name == "reverse_embeddings" or table.dtype == np.int8):
            x, factor = self.buffer("scaled hidden", "batch", table.k), 1.0
            self.add(
                "elementwise", count=self.slot("hidden_values"), x=hidden, out=x, factor=float(scale), rounding=self.rounding
            )
        if table.kind == INTEGER:
            x, row_scales = self.quantized(rows, x, table.k)
        scale_of_columns = p.get(f"{name}_weight_only_scale", p.get(f"{name}_scale"))
        self.linear(
            rows,
            x,
            table,
            out,
            column_scale=scale_of_columns if table.kind in (INT8, INTEGER) else None,
            factor=factor,
            row_scales=row_scales or 0,
            rounding=self.rounding,
        )

    def attend(
        self,
        query: Slot,
        keys: Slot,
        values: Slot,
        out: Slot,
        heads: int,
        size: int,
        *,
        prefix: str,
        kind: int,
        **operands: Any,
    ) -> None:
        """Attention to keys and values whose strides, mask and number are slots that begin with `prefix`."""
        if kind == UNREADABLE:
            raise UnfusibleError("keys and values of another type or layout")
        strides: dict[str, Any] = {
            name: self.slot(f"{prefix}{name}")
            for name in ("key_batch", "key_position", "key_head", "value_batch", "value_position", "value_head")
        }
        masks: dict[str, Any] = {name: self.slot(f"{prefix}{name}") for name in ("mask", "mask_batch", "mask_query")}
        self.add(
            "attention",
            batch=self.slot("batch"),
            t=self.slot("t"),
            s=self.slot(f"{prefix}s"),
            heads=heads,
            size=size,
            query=query,
            keys=keys,
            values=values,
            kind=kind,
            out=out,
            rounding=self.rounding,
            **strides,
            **masks,
            **operands,
        )

    def write(self, x: Slot, cache: Slot, prefix: str, heads: int, size: int, kind: int, *, wait: bool = True) -> None:
        """`cache_append` of x, [rows, heads * size]."""
        self.add(
            "write",
            wait=wait,
            rows=self.rows,
            t=self.slot("t"),
            heads=heads,
            size=size,
            x=x,
            out=cache,
            kind=kind,
            start=self.slot("start"),
            batch_stride=self.slot(f"{prefix}_batch"),
            position_stride=self.slot(f"{prefix}_position"),
            head_stride=self.slot(f"{prefix}_head"),
        )


class Call:
    """The sizes and addresses of one call, and the arrays that they belong to."""

    def __init__(self, x: Array) -> None:
        """x: activations (b, t, n), of which the program gets a copy of its own."""
        self.batch, self.t, self.n = x.shape
        self.sizes = {"rows": self.batch * self.t, "batch": self.batch, "t": self.t}
        self.addresses: dict[str, int] = {}
        self._kept: list[Any] = []
        self.longest = 0
        self.x = np.array(x, np.float32, order="C")
        self.array("x", self.x)
        self.sizes["hidden_values"] = self.batch * self.n

    def array(self, name: str, array: Array) -> None:
        """An array of a slot."""
        self._kept.append(array)
        self.addresses[name] = address(array)

    def keys_values(self, prefix: str, key: Array, value: Array, length: int) -> None:
        """The strides of keys and values (b, s, h, d), of which `length` positions are looked at."""
        self.sizes[f"{prefix}s"] = length
        self.longest = max(self.longest, length)
        for name, array in (("key", key), ("value", value)):
            for axis, part in ((0, "batch"), (1, "position"), (2, "head")):
                self.sizes[f"{prefix}{name}_{part}"] = array.strides[axis]

    def own_keys_values(self, heads: int, size: int) -> None:
        """The strides of keys and values that the program makes itself, (b, t, h, d)."""
        batch, position, head = 4 * self.t * heads * size, 4 * heads * size, 4 * size
        for name in ("key", "value"):
            self.sizes |= {f"{name}_batch": batch, f"{name}_position": position, f"{name}_head": head}
        self.sizes["s"] = self.longest = self.t

    def mask(self, prefix: str, mask: Array) -> None:
        """A mask (b or 1, 1, t or 1, s) of booleans."""
        if mask.shape[-1] > 1 and mask.strides[-1] != 1:
            mask = np.ascontiguousarray(mask)
        self.array(f"{prefix}mask", mask)
        self.sizes[f"{prefix}mask_batch"] = mask.strides[0] if mask.shape[0] > 1 else 0
        self.sizes[f"{prefix}mask_query"] = mask.strides[2] if mask.shape[2] > 1 else 0

    def positions(self, positions: Array) -> None:
        """Positions (b or 1, t) of the queries."""
        positions = np.ascontiguousarray(positions, np.int64)
        self.array("positions", positions)
        self.sizes["positions_batch"] = 8 * self.t if len(positions) > 1 else 0

    def caches(self, layers: list[Params], start: Array | None, length: int, cache: Params | None = None) -> None:
        """The caches of the layers, of which `length` positions are looked at, and where each row's tokens begin in them.

        What does not change from step to step is kept in `cache`. ShapeError for a place that is not in a cache.
        """
        self._where("", layers, length, cache)
        rows, capacity = layers[0]["key"].shape[:2]
        if rows < self.batch:
            raise ShapeError(f"the cache has {rows} rows, wanted {self.batch}")
        end = self.t + (0 if start is None else int(start.max(initial=0)))
        if (start is not None and start.min(initial=0) < 0) or end > min(length, capacity):
            raise ShapeError(f"positions up to {end - 1} are written, but {length} of the cache's {capacity} are looked at")
        self.start(start)

    def encoded(self, layers: list[Params], padding_mask: Array | None, cache: Params | None = None) -> None:
        """Keys and values of the encoder's output for each layer, and if given its padding mask (b, s)."""
        self._where("cross_", layers, layers[0]["key"].shape[1], cache)
        if padding_mask is not None:
            self.mask("cross_", padding_mask[:, None, None, :])

    def _where(self, prefix: str, layers: list[Params], length: int, cache: Params | None) -> None:
        """Addresses and strides of keys and values, `length` positions of which are looked at. All layers' must be alike."""
        known = None if cache is None else cache.get(f"_{prefix}addresses")
        if known is None:
            known = {}
            for i, layer in enumerate(layers):
                for name in ("key", "value"):
                    array, first = layer[name], layers[0][name]
                    if array.strides != first.strides or array.shape != first.shape:
                        raise ShapeError(f"the {name} of layer {i} is not like that of layer 0")
                    known[f"{prefix}{name}{i}"] = address(array)
            if cache is not None:
                cache[f"_{prefix}addresses"] = known
        self._kept.append(layers)
        self.addresses.update(known)
        self.keys_values(prefix, layers[0]["key"], layers[0]["value"], length)

    def start(self, start: Array | None) -> None:
        """Where each row's tokens begin in the cache; None is 0."""
        if start is None:
            self.sizes["start"] = 0
        else:
            self.array("start", np.ascontiguousarray(start, np.int64))

    def run(self, program: Program | str, team: Team) -> Buffers:
        """Run the program; gives its buffers, flat. Activations are in `x`."""
        assert isinstance(program, Program)  # the kernel's `when` has said so
        return program.run(team, self.sizes, self.addresses, keys=self.longest)

    def bias(self, bias: Array) -> None:
        """A position bias (b or 1, h, t, s)."""
        if bias.dtype != np.float32 or (bias.shape[-1] > 1 and bias.strides[-1] != 4):
            bias = np.ascontiguousarray(bias, np.float32)
        self.array("bias", bias)
        self.sizes["bias_batch"] = bias.strides[0] if bias.shape[0] > 1 else 0
        self.sizes["bias_head"], self.sizes["bias_query"] = bias.strides[1], bias.strides[2]


UNREADABLE = -1


def cached_kind(cache: Array) -> int:
    """How keys or values are stored; UNREADABLE if kernels cannot read them."""
    if cache.shape[-1] > 1 and cache.size and cache.strides[-1] != cache.itemsize:
        return UNREADABLE
    if cache.dtype == np.float32:
        return FLOAT32
    return STORED.get(cache.dtype.name, UNREADABLE)


def program_of(p: Params, key: Any, build: Callable[[], Program]) -> Program | str:
    """The program that `build` makes, kept in the loaded tree `p`; or the reason why there is none."""
    programs = p.get("_programs")
    if programs is None:
        return "parameters that were not loaded: op by op"
    found = programs.get(key)
    if found is None:
        try:
            found = build()
        except UnfusibleError as error:
            found = f"{error}: op by op"
        programs[key] = found
    return found


def refused(config: Any, rng: Any) -> str | None:
    """Why a model of this config is run op by op, if that is so."""
    if compute_dtype(config.dtype) not in ROUND:
        return f"{config.dtype}: the reference's"
    return "dropout draws: op by op" if rng is not None and config.dropout > 0 else None


def result(values: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """A buffer of a program as an array of its own, in the type that its values have been rounded to."""
    return values.reshape(shape).astype(numpy_dtype(dtype))
