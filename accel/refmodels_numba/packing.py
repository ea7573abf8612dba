"""Weights as the kernels read them, and back: matrices in panels of sixteen columns, bit for bit the same numbers."""

import math
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops.quantize import dequantized_groups, pack_int4, unpack_int4
from refmodels_numba.layout import FLOAT32, INT4, INT8, INTEGER, LANES, STORED


class Packed:
    """A matrix in panels, in place of the host's leaf.

    shape, dtype   those of the host's leaf
    kind           how it is stored (`layout`): float32, bfloat16, float16, int8, int4, or int8 for products with int8
    panels         [panels, ...], panel after panel (`layout`); the last is filled up with zeros
    k, n           rows and columns of the matrix; a table of embeddings (v, n) is the matrix (n, v) of its head: `by_rows`
    axis           of int4: the axis along which the host's leaf packs two numbers in a byte
    scales, zeros, block   of int4: float32 and int8 [panels, groups, 16], and the length of a group along k, which is even
    host           the host's leaf, where panels do not hold it: of int4 in other groups, whose panels are float32

    int4 numbers and zeros are kept as 8 more than they are, from 0 to 15.
    """

    def __init__(
        self,
        leaf: Array,
        kind: int,
        panels: Array,
        k: int,
        n: int,
        *,
        by_rows: bool = False,
        axis: int = 0,
        scales: Array | None = None,
        zeros: Array | None = None,
        block: int = 1,
        host: Array | None = None,
    ) -> None:
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self.kind, self.panels, self.k, self.n = kind, panels, k, n
        self.by_rows, self.axis, self.scales, self.zeros, self.block, self.host = by_rows, axis, scales, zeros, block, host

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, and of int4 groups' scales and zeros."""
        return sum(part.nbytes for part in (self.panels, self.scales, self.zeros) if part is not None)

    @property
    def address(self) -> int:
        """Where the panels are."""
        return address(self.panels)

    def matrix(self) -> Array:
        """The matrix (k, n) in its stored type; int4 numbers as int8."""
        panels = self.panels
        if self.kind == INTEGER:
            panels = panels.transpose(0, 1, 3, 2).reshape(len(panels), 2 * panels.shape[1], LANES)
        elif self.kind == INT4:
            panels = np.stack(_halves(panels), 2).reshape(len(panels), 2 * panels.shape[1], LANES)
        rows = panels[:, : self.k].transpose(1, 0, 2).reshape(self.k, len(panels) * LANES)
        return rows[:, : self.n]

    def unpacked(self) -> Array:
        """The host's leaf again."""
        if self.host is not None:
            return np.array(self.host, order="C")
        matrix = self.matrix()
        if self.by_rows:
            matrix = matrix.T
        if self.kind == INT4:
            return np.ascontiguousarray(pack_int4.reference(matrix, axis=self.axis)).astype(self.dtype, copy=False)
        return np.ascontiguousarray(matrix).view(self.dtype).reshape(self.shape)

    def rows(self, ids: Array) -> Array:
        """Rows of a table by their numbers, (ids, k), in the stored type."""
        panel, lane = np.divmod(ids, LANES)
        if self.kind == INTEGER:
            return self.panels[panel, :, lane].reshape(len(ids), 2 * self.panels.shape[1])[:, : self.k]
        if self.kind == INT4:
            both = _halves(self.panels[panel, :, lane])
            return np.stack(both, 2).reshape(len(ids), 2 * self.panels.shape[1])[:, : self.k]
        rows = self.panels[panel, :, lane]
        return rows if self.kind == FLOAT32 or self.dtype.kind == "i" else rows.view(self.dtype)


def _halves(packed: Array) -> tuple[Array, Array]:
    """The int4 numbers in the low and in the high four bits, as int8."""
    return (packed & 15).astype(np.int8) - np.int8(8), (packed >> 4).astype(np.int8) - np.int8(8)


def address(array: Array) -> int:
    """Where an array's first element is."""
    return int(array.__array_interface__["data"][0])


def _panels(matrix: Array) -> Array:
    """[n/16, k, 16] of a matrix (k, n)."""
    k, n = matrix.shape
    full = n // LANES
    panels = np.empty((-(-n // LANES), k, LANES), matrix.dtype)
    panels[:full] = matrix[:, : full * LANES].reshape(k, full, LANES).transpose(1, 0, 2)
    if full < len(panels):
        panels[full] = 0
        panels[full, :, : n - full * LANES] = matrix[:, full * LANES :]
    return panels


def _row_panels(table: Array, *, owned: bool) -> Array:
    """[v/16, n, 16] of a table (v, n), in its own memory if that is ours."""
    v, n = table.shape
    if v % LANES == 0 and owned and table.flags.c_contiguous and table.flags.writeable and table.flags.owndata:
        panels = table.reshape(v // LANES, n, LANES)
    else:
        panels = np.empty((-(-v // LANES), n, LANES), table.dtype)
    for i, panel in enumerate(panels):
        rows = table[i * LANES : (i + 1) * LANES]
        if len(rows) < LANES:
            panel[...] = 0
        panel[:, : len(rows)] = rows.T.copy()
    return panels


def packed(leaf: Array, *, by_rows: bool = False, owned: bool = False) -> Packed:
    """A matrix (or an array of more axes, the first of which is k) of floats; a table (v, n) if `by_rows`."""
    matrix = leaf if leaf.dtype == np.float32 else leaf.view(np.uint16)
    if by_rows:
        return Packed(
            leaf, STORED[leaf.dtype.name], _row_panels(matrix, owned=owned), leaf.shape[1], leaf.shape[0], by_rows=True
        )
    matrix = matrix.reshape(len(leaf), math.prod(leaf.shape[1:]))
    return Packed(leaf, STORED[leaf.dtype.name], _panels(matrix), *matrix.shape)


def packed_int8(leaf: Array, *, by_rows: bool = False, integer: bool) -> Packed:
    """An int8 matrix (k, n), or table (v, n); for products with int8 inputs if `integer`, else with floats."""
    matrix = leaf.T if by_rows else leaf
    k, n = matrix.shape
    if not integer:
        return Packed(leaf, INT8, _panels(matrix), k, n, by_rows=by_rows)
    if k % 2:
        matrix = np.concatenate([matrix, np.zeros((1, n), np.int8)])
    panels = _panels(matrix)
    pairs = panels.reshape(len(panels), len(matrix) // 2, 2, LANES).transpose(0, 1, 3, 2)
    return Packed(leaf, INTEGER, np.ascontiguousarray(pairs), k, n, by_rows=by_rows)


def packed_int4(leaf: Array, scale: Array, zero: Array, g_idx: Array, *, by_rows: bool, axis: int) -> Packed:
    """Packed int4 numbers of a matrix (k, n) whose row i is in group g_idx[i], or of a table (n, k) if `by_rows`.

    `scale` and `zero` are (groups, n), or (n, groups) if `by_rows`. Groups that are no runs of one even length are rare: such a
    matrix is kept as the float32 numbers that it stands for.
    """
    k, n, block = len(g_idx), scale.shape[0 if by_rows else 1], group_length(g_idx)
    if block is None:
        numbers = dequantized_groups(leaf, scale, zero, g_idx, np.dtype(np.float32), axis=axis, group_axis=int(by_rows))
        return Packed(leaf, FLOAT32, _panels(numbers.T if by_rows else numbers), k, n, by_rows=by_rows, host=leaf)
    values = unpack_int4.reference(leaf, leaf.shape[axis] * 2, axis=axis)
    values, scale, zero = (part.T if by_rows else part for part in (values, scale, zero))
    panels = _panels(values[:k, :n])
    if k % 2:
        panels = np.concatenate([panels, np.zeros((len(panels), 1, LANES), np.int8)], 1)
    levels = (panels + np.int8(8)).view(np.uint8)
    both = levels[:, 0::2] | levels[:, 1::2] << 4
    scales = _panels(np.ascontiguousarray(scale, np.float32))
    zeros = _panels(np.ascontiguousarray(zero).astype(np.int8)) + np.int8(8)
    return Packed(leaf, INT4, both, k, n, by_rows=by_rows, axis=axis, scales=scales, zeros=zeros, block=block)


def group_length(g_idx: Array) -> int | None:
    """The length of the groups that g_idx numbers, the last of which may be shorter; None unless they are even runs."""
    g = np.asarray(g_idx).astype(np.int64)
    block = int((g == 0).sum())
    if block == 0 or not np.array_equal(g, np.arange(len(g)) // block):
        return None
    return block if block % 2 == 0 or block >= len(g) else None


def unpacked_tree(tree: Any) -> Any:
    """The host's tree in place of a loaded one: a packed leaf that nobody else holds goes when it has been unpacked."""
    if isinstance(tree, Packed):
        return tree.unpacked()
    if isinstance(tree, dict):
        tree.pop("_programs", {}).clear()  # they hold the packed leaves; a call that runs one holds it itself
    elif not isinstance(tree, list):
        return np.array(tree, order="C")
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        tree[key] = unpacked_tree(tree[key])
    return tree
