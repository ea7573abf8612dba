"""Products with a weight matrix. Few rows read the weights as they are stored, many go through cuBLAS."""

import math
from functools import cache
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import linear as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_cupy.device import Device, Grid, Launch, address
from refmodels_cupy.elementwise import ACTIVATIONS, STORED, each, narrow_types
from refmodels_cupy.source import form
from refmodels_cupy.weights import Matrix, matrix

MOST = 64
"""Rows up to which the weights are read as they are stored, by launches that a graph may hold."""

OUTPUTS = {1: 1, 4: 2, 8: 2}
"""Rows of x that one warp of matvec.cu takes -> outputs that it makes of them, so that the rows are read from the cache less
often."""

TILES = ((8, 16), (32, 32), (64, 16), (64, 32))
"""Rows and outputs of a block of matmul_few.cu. The last has no registers left for int4 weights, whose groups have
sums of their own."""

QUEUE = 64 * 1024
"""Bytes of weights that such a block has under way, in shared memory, where its sums have a place beside them."""

VECTOR_THREADS = 128
TENSOR_THREADS = 256
EPILOGUE_THREADS, EPILOGUE_COLUMNS = 256, 2048
EMBEDDING_THREADS = 128

HALVES = ("float16", "bfloat16")
OPERANDS = {x: (x, "int8", "int4x2") for x in HALVES} | {"int8": ("int8",)}
"""Type of the rows -> types of weights that the tensor cores multiply them by, each exactly as it is stored."""

WEIGHTS = dict.fromkeys(HALVES, ("float32", "int4x2")) | {"float32": ("float32", *HALVES, "int8", "int4x2")}
"""The same of matvec.cu. Rows for which there is neither are widened to float32."""


def tiles(weights: str) -> tuple[tuple[int, int], ...]:
    """Those of `TILES` that there are for this type of weights."""
    return TILES[:-1] if weights == "int4x2" else TILES


FORMS = [
    *(("matmul_few.cu", form("matmul_few", *tile, x, w)) for x in OPERANDS for w in OPERANDS[x] for tile in tiles(w)),
    *(
        ("matvec.cu", form("matvec", rows, outputs, x, w))
        for rows, outputs in OUTPUTS.items()
        for x in WEIGHTS
        for w in WEIGHTS[x]
    ),
    *(("epilogue.cu", form("epilogue", sums)) for sums in ("float32", "int32")),
    *(("embedding.cu", form("embedding", ids, w)) for ids in ("int32", "int64") for w in (*STORED, "int8", "int4x2")),
]


def vector_tile(rows: int, n: int) -> tuple[int, int, Grid]:
    """Rows and outputs of a warp of matvec.cu, and blocks, for so many rows and outputs in all."""
    each = next((count for count in OUTPUTS if count >= rows), max(OUTPUTS))
    return each, OUTPUTS[each], (-(-n // (VECTOR_THREADS // 32 * OUTPUTS[each])) * -(-rows // each), 1, 1)


def tensor_tile(rows: int, n: int, weights: str, multiprocessors: int) -> tuple[int, int, Grid]:
    """Rows and outputs of a block of matmul_few.cu, and blocks: with more outputs x is read less often, but three in four
    multiprocessors are to have a block."""
    fitting = [tile for tile in tiles(weights) if tile[0] >= rows]
    wide = max((tile for tile in fitting if tile[0] == fitting[0][0]), key=lambda tile: tile[1])
    if 4 * -(-n // wide[1]) < 3 * multiprocessors:
        wide = min(fitting, key=lambda tile: tile[1])
    return *wide, (-(-n // wide[1]), 1, 1)


def by_tensor_cores(x: Any, w: Matrix) -> bool:
    """Whether matmul_few.cu multiplies them: of int4 weights it takes 128 inputs at a time, which are to be in one group."""
    return stored(w) in OPERANDS.get(x.dtype.name, ()) and (w.kind != "int4" or w.block % 128 == 0 or w.scale.shape[1] == 1)


class Products:
    """Products of rows with matrices on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def matrix(self, weights: Any, *, by_rows: bool = False) -> Matrix:
        """A leaf that was loaded is a matrix already; a bare array, as a plain op is given, becomes one for this call."""
        return weights if isinstance(weights, Matrix) else matrix(self.device, weights, by_rows=by_rows)

    def flat(self, x: Any) -> Any:
        """The array with its values one after the other."""
        return None if x is None else self.device.xp.ascontiguousarray(x)

    def __call__(
        self, x: Any, w: Matrix, dtype: str | None, *, bias: Any = None, scale: Any = None, factor: float = 1.0
    ) -> Any:
        """factor * (x @ w) / scale + bias, rounded once to `dtype` or the type of x. `scale` is int8 weights'."""
        result = numpy_dtype(dtype) if dtype else x.dtype
        rows, y = math.prod(x.shape[:-1]), self.device.empty((*x.shape[:-1], w.n), result)
        if y.size == 0:
            return y
        flat, results, bias = self.flat(x).reshape(rows, w.k), y.reshape(rows, w.n), self.flat(bias)
        scale = None if scale is None else self.flat(scale.astype(np.float32, copy=False))
        # What int4 numbers stand for is exact in float32 alone, which is slow: of many rows matmul_few.cu makes MOST at a time.
        if rows > MOST and not (w.kind == "int4" and by_tensor_cores(flat, w)):
            self.many(flat, w, results, bias=bias, scale=scale, factor=factor)
            return y
        if not by_tensor_cores(flat, w) and stored(w) not in WEIGHTS[flat.dtype.name]:
            flat = flat.astype(np.float32)
        flat = self.filled(flat, w.pitch)
        for begin in range(0, rows, MOST):
            part = slice(begin, begin + MOST)
            self.fused(flat[part], w, results[part], bias=bias, scale=scale, factor=factor)
        return y

    def fused(
        self,
        x: Any,
        w: Matrix,
        y: Any,
        *,
        row_scale: Any = None,
        bias: Any = None,
        scale: Any = None,
        factor: float = 1.0,
        activation: str = "linear",
        gate: Matrix | None = None,
        gate_scale: Any = None,
        residual: Any = None,
    ) -> None:
        """y = residual + activation(factor * (x @ w) / scale + bias) * (x @ gate / gate_scale), rounded once: only launches.

        x [rows, pitch of w], at most `MOST` rows, with zeros behind the inputs, of a type in `WEIGHTS` or `OPERANDS`; of int8
        with their row_scale [rows], which divides as well. y [rows, n] of any float type, residual like y. scale, gate_scale
        [n] are int8 weights'; gate is stored as w is. All are contiguous, and scales float32.
        """
        rows = len(x)
        parts = (w.rows, *scales(w, scale), *((gate.rows, *scales(gate, gate_scale)) if gate else (None, None, None)))
        finish = (*typed(bias), residual, *typed(y))
        groups = w.scale.shape[1] if w.kind == "int4" else 0
        sizes = (np.int32(size) for size in (rows, w.n, w.pitch, w.block, groups))
        arguments = (*parts, *finish, *sizes, np.float32(factor), np.int32(ACTIVATIONS[activation]))
        if by_tensor_cores(x, w):
            each, outputs, blocks = tensor_tile(rows, w.n, stored(w), self.device.multiprocessors)
            launched, shared = form("matmul_few", each, outputs, x.dtype.name, stored(w)), QUEUE + 4 * each * outputs
            block = (TENSOR_THREADS, 1, 1)
            self.device.launch(Launch("matmul_few.cu", launched, blocks, block, (x, row_scale, *arguments), shared))
        else:
            each, outputs, blocks = vector_tile(rows, w.n)
            launched = form("matvec", each, outputs, x.dtype.name, stored(w))
            self.device.launch(Launch("matvec.cu", launched, blocks, (VECTOR_THREADS, 1, 1), (x, *arguments)))

    def many(
        self,
        x: Any,
        w: Matrix,
        y: Any,
        *,
        row_scale: Any = None,
        bias: Any = None,
        scale: Any = None,
        factor: float = 1.0,
        activation: str = "linear",
        residual: Any = None,
    ) -> None:
        """What `fused` makes without a gate, of any number of rows, by cuBLAS. Rows need no zeros behind the inputs."""
        plain = scale is None and row_scale is None and (factor, activation) == (1.0, "linear")
        bias_fits = bias is None or y.dtype in (bias.dtype, np.float32)
        if plain and bias_fits and w.kind == x.dtype.name and y.dtype in (x.dtype, np.float32):
            # cuBLAS adds to what is in y: the sums need not be written and read again. The sum of residual and bias is rounded
            # before, as by the ops one after the other.
            added = bias is not None or residual is not None
            if added:
                self.finish(None, y, bias=bias, residual=residual)
            self.device.product(self.filled(x, w.pitch), w.rows, transposed=True, out=y, add=added)
            return
        # int8 numbers are exact in half precision, what int4 numbers stand for is not
        common = x.dtype if w.kind in (x.dtype.name, "int8") else np.dtype(np.float32)
        sums = self.sums(x.astype(common, copy=False), self.widened(w, common))
        self.finish(
            sums, y, row_scale=row_scale, bias=bias, scale=scale, factor=factor, activation=activation, residual=residual
        )

    def widened(self, w: Matrix, dtype: Any) -> Any:
        """[n, pitch] numbers of this type, of int8 the integers; of int4 [n, k] numbers that they stand for."""
        return w.rows.astype(dtype, copy=False) if w.kind != "int4" else self.rows(self.device.xp.arange(w.n), w, dtype.name)

    def sums(self, x: Any, weights: Any) -> Any:
        """x @ weights.T for weights [n, pitch] with zeros behind the inputs."""
        return self.device.product(self.filled(x, weights.shape[1]), weights, transposed=True)

    def filled(self, x: Any, pitch: int) -> Any:
        """Rows of `pitch` values, the last of which are zeros, from a multiple of 16 bytes on: as they are, if they are so."""
        if x.shape[1] == pitch and address(x) % 16 == 0:
            return x
        filled = self.device.xp.zeros((len(x), pitch), x.dtype)
        filled[:, : x.shape[1]] = x
        return filled

    def finish(
        self,
        sums: Any,
        y: Any,
        *,
        bias: Any = None,
        row_scale: Any = None,
        scale: Any = None,
        factor: float = 1.0,
        activation: str = "linear",
        residual: Any = None,
    ) -> None:
        """y = residual + activation(factor * sums / (row_scale * scale) + bias), rounded to y's type, which is residual's.

        Sums of None are 0.
        """
        n = y.shape[-1]
        rows = y.size // n
        sizes = (np.int32(n), np.float32(factor), np.int32(ACTIVATIONS[activation]))
        arguments = (sums, row_scale, scale, *typed(bias), residual, *typed(y), *sizes)
        blocks = (rows, -(-n // EPILOGUE_COLUMNS), 1)
        launched = form("epilogue", "float32" if sums is None else sums.dtype.name)
        self.device.launch(Launch("epilogue.cu", launched, blocks, (EPILOGUE_THREADS, 1, 1), arguments))

    def rows(
        self, ids: Any, table: Matrix, dtype: str | None, *, scale: Any = None, position_ids: Any = None, positions: Any = None
    ) -> Any:
        """Rows of a table by their numbers, in `dtype` or the table's. `scale` is an int8 table's.

        With `position_ids`, like ids, rows of the table `positions` [count, k] are added.
        """
        y = self.device.empty((*ids.shape, table.k), numpy_dtype(dtype) if dtype else table.dtype)
        if y.size:
            added = (self.flat(position_ids), *typed(positions), np.int32(0 if positions is None else len(positions)))
            sizes = (np.int32(number) for number in (table.n, table.k, table.pitch, table.block))
            arguments = (self.flat(ids), table.rows, *scales(table, self.flat(scale)), *added, *typed(y), *sizes)
            launched = form("embedding", ids.dtype.name, stored(table))
            blocks = (math.prod(ids.shape), 1, 1)
            self.device.launch(Launch("embedding.cu", launched, blocks, (EMBEDDING_THREADS, 1, 1), arguments))
        return y


def stored(w: Matrix) -> str:
    """The type of a matrix' elements in the kernels."""
    return "int4x2" if w.kind == "int4" else w.kind


def scales(w: Matrix, scale: Any) -> tuple[Any, Any]:
    """What turns the numbers of a matrix into weights, scale and zero: int4 has its own, int8 a scale beside it."""
    return (w.scale, w.zero) if w.kind == "int4" else (scale, None)


def as_it_is(table: Any) -> Matrix:
    """A table, contiguous, that only rows are taken of: nothing of it is moved."""
    return Matrix(table.shape, table.dtype, table.dtype.name, table, table.shape[1], len(table), True)


def typed(array: Any) -> tuple[Any, Any]:
    """An array, or none, and its type, for a kernel that is told of it at the launch."""
    return array, np.int32(0) if array is None else _type(array.dtype)


@cache  # NumPy makes up the name each time
def _type(dtype: Any) -> np.int32:
    return np.int32(STORED[dtype.name])


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.linear`."""
    xp, product = device.xp, Products(device)

    @accelerator.kernel(ops.linear, when=narrow_types)
    def linear(x: Any, kernel: Any, bias: Any = None, *, dtype: str | None = None) -> Any:
        return product(x, product.matrix(kernel), dtype, bias=bias)

    @accelerator.kernel(ops.logits_from_embeddings, when=narrow_types)
    def logits_from_embeddings(x: Any, embeddings: Any, *, scale: float = 1.0) -> Any:
        return product(x, product.matrix(embeddings, by_rows=True), None, factor=scale)

    @accelerator.kernel(ops.embedding, when=narrow_types)
    def embedding(ids: Any, embeddings: Any, *, dtype: str | None = None) -> Any:
        return product.rows(ids, embeddings if isinstance(embeddings, Matrix) else as_it_is(product.flat(embeddings)), dtype)

    @accelerator.kernel(ops.last_rows)
    def last_rows(x: Any, lengths: Any = None) -> Any:
        return x[:, -1] if lengths is None else x[xp.arange(len(x)), lengths - 1]

    @accelerator.kernel(ops.lora_product, when=narrow_types)
    def lora_product(x: Any, lora_kernel_a: Any, lora_kernel_b: Any, lora_scale: Any, *, dtype: str | None = None) -> Any:
        (k, groups, rank), rows = lora_kernel_a.shape, math.prod(x.shape[:-1])
        a, b = (part.astype(np.float32, copy=False) for part in (lora_kernel_a, lora_kernel_b))
        inner = device.product(xp.ascontiguousarray(x).reshape(rows, k).astype(np.float32), a.reshape(k, groups * rank))
        y = each(device, device.product(inner.reshape(rows * groups, rank), b), lora_scale, combination="multiply")
        return y.reshape(*x.shape[:-1], groups * b.shape[1]).astype(numpy_dtype(dtype) if dtype else x.dtype)

    @accelerator.kernel(ops.lora_merged, when=narrow_types)
    def lora_merged(kernel: Any, lora_kernel_a: Any, lora_kernel_b: Any, lora_scale: Any) -> Any:
        plain = kernel.leaf() if isinstance(kernel, Matrix) else kernel
        k, groups, rank = lora_kernel_a.shape
        a, b = (part.astype(np.float32, copy=False) for part in (lora_kernel_a, lora_kernel_b))
        change = each(device, device.product(a.reshape(k * groups, rank), b), lora_scale, combination="multiply")
        return each(device, plain, change.reshape(plain.shape), combination="add")
