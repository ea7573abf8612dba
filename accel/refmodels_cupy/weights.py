"""Weights as the kernels read them, and back: matrices with one output after the other, bit for bit the same numbers."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmodels.op import Array, Params
from refmodels.ops.quantize import dequantized_groups
from refmodels_cupy.device import Device

PIECE = {"float32": 8, "float16": 8, "bfloat16": 8, "int8": 16, "int4": 32}
"""Values that a lane of matvec.cu reads at once: rows are filled up with zeros to a multiple of it, 16 bytes or 32."""


LARGEST_ZERO = 119
"""With it 128 + zero + 8 is exact in bfloat16, which matmul_few.cu takes away from 128 + q + 8."""


@dataclass(frozen=True)
class Matrix:
    """A matrix on the device, in place of the host's leaf.

    shape, dtype   those of the host's leaf
    kind           how it is stored: float32, float16, bfloat16, int8, int4
    rows           [n, pitch], the weights of one output after the other; of int4 [n, pitch / 2] bytes, two numbers in each
    k, n           inputs and outputs; a table of embeddings (v, n) has v outputs of n inputs: `by_rows`, not turned
    axis           of int4: the axis along which the host's leaf packs two numbers in a byte
    scale, zero    of int4: float32 and int8 [n, groups]
    block          of int4: the length of a group, and 0 for all others
    host           the host's leaf, where rows do not hold it: of int4 in other groups, whose rows are float32
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: str
    rows: Any
    k: int
    n: int
    by_rows: bool
    axis: int = -1
    scale: Any = None
    zero: Any = None
    block: int = 0
    host: Array | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def pitch(self) -> int:
        """Values from one row to the next."""
        return int(self.rows.shape[1]) * (2 if self.kind == "int4" else 1)

    def leaf(self) -> Any:
        """The host's leaf again, as a device array, unless it is at `host`."""
        if self.kind != "int4":
            numbers = self.rows[:, : self.k]
            return (numbers if self.by_rows else numbers.T).copy()
        if self.by_rows:
            return self.rows[:, : self.shape[1]].copy()
        return packed_halves(halves(self.rows, self.k).T, self.axis)


def matrix(device: Device, leaf: Any, *, by_rows: bool = False) -> Matrix:
    """A matrix (k, n), or a table (n, k) if `by_rows`, of the host or the device: float32 and narrower, or int8."""
    kind = leaf.dtype.name
    rows = _filled(device, _bits(device.to_device(leaf)), by_rows, PIECE[kind])
    n, k = leaf.shape if by_rows else leaf.shape[::-1]
    return Matrix(leaf.shape, leaf.dtype, kind, rows.view(leaf.dtype), k, n, by_rows)


def int4_matrix(device: Device, leaf: Array, scale: Array, zero: Array, g_idx: Array, *, by_rows: bool, axis: int) -> Matrix:
    """Packed int4 numbers, on the host, of a matrix (k, n) whose row i is in group g_idx[i], or of a table (n, k) if `by_rows`.

    `scale` and `zero` are (groups, n), or (n, groups) if `by_rows`. Groups that `group_length` refuses, and zeros that are
    no whole numbers from -119 to 119, are rare: such a matrix is kept as the float32 numbers that it stands for.
    """
    block, whole = group_length(g_idx), np.asarray(zero).astype(np.int8)
    if block is None or not np.array_equal(whole, zero) or (abs(whole.astype(np.int32)) > LARGEST_ZERO).any():
        numbers = dequantized_groups(leaf, scale, zero, g_idx, np.dtype(np.float32), axis=axis, group_axis=int(by_rows))
        made = matrix(device, numbers, by_rows=by_rows)
        return Matrix(leaf.shape, leaf.dtype, "float32", made.rows, made.k, made.n, by_rows, host=np.array(leaf))
    k, n = len(g_idx), scale.shape[0 if by_rows else 1]
    rows = device.to_device(leaf)
    if not by_rows:
        numbers = halves(rows, n) if axis % 2 else halves(rows.T, k).T
        rows = packed_halves(numbers[:k].T, -1)
    rows = _filled(device, rows, True, PIECE["int4"] // 2)
    parts = [part if by_rows else part.T for part in (np.asarray(scale, np.float32), whole)]
    scale, zero = (device.to_device(np.ascontiguousarray(part)) for part in parts)
    return Matrix(leaf.shape, leaf.dtype, "int4", rows, k, n, by_rows, axis, scale, zero, block)


def group_length(g_idx: Array) -> int | None:
    """The length of the groups that g_idx numbers, the last of which may be shorter. None unless they are runs of one length, a
    multiple of 8 if there are several: so eight values that are read together have one scale."""
    g = np.asarray(g_idx).astype(np.int64)
    block = int((g == 0).sum())
    if block == 0 or not np.array_equal(g, np.arange(len(g)) // block):
        return None
    return block if block % 8 == 0 or block == len(g) else None


def _bits(x: Any) -> Any:
    """Half-precision numbers as integers, to be moved about."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def _filled(device: Device, matrix: Any, by_rows: bool, piece: int) -> Any:
    """[n, pitch] of a matrix, whose rows are filled up with zeros to whole pieces."""
    rows = matrix if by_rows else matrix.T
    n, k = rows.shape
    filled = device.xp.zeros((n, -(-k // piece) * piece), matrix.dtype)
    filled[:, :k] = rows
    return filled


def halves(packed: Any, size: int) -> Any:
    """The first `size` int4 numbers of each row of bytes, as int8. Four bits shifted up and down again keep their sign."""
    n, length = packed.shape
    both = packed.reshape(n, length, 1).repeat(2, 2)
    both[..., 0] <<= 4
    both >>= 4
    return both.reshape(n, 2 * length)[:, :size]


def packed_halves(numbers: Any, axis: int) -> Any:
    """Two int4 numbers in a byte along the axis, the even one in the low four bits. The last high bits may be 0."""
    if axis % 2 == 0:
        return packed_halves(numbers.T, -1).T.copy()
    low, high = numbers[:, 0::2] & 15, numbers[:, 1::2] << 4
    low[:, : high.shape[1]] |= high
    return low


# -- the tree -----------------------------------------------------------------------------------------------------------------


def loaded(device: Device, tree: Any, *, owned: bool, name: str = "") -> Any:
    """The tree on the device. If it is `owned`, leaves leave it as they are moved, so that none is there twice."""
    if isinstance(tree, list):
        return [loaded(device, part, owned=owned) for part in tree]
    # int4 leaves are made with the help of others of their layer, which leave it later
    result, host = dict.fromkeys(tree), dict(tree) if any(key.endswith("_zero") for key in tree) else {}
    for key in list(tree):
        part = tree[key]
        if owned:
            del tree[key]
        if isinstance(part, dict | list):
            result[key] = loaded(device, part, owned=owned, name=key)
        else:
            result[key] = _leaf(device, key, part, host, table=name == "token_embedding")
        del part
    if joint := joined(device, result):
        result["_joint"] = joint
    return result


TOGETHER = ("query", "key", "value")
"""Layers of an attention that multiply the same rows."""


def joined(device: Device, p: Params) -> Params | None:
    """The dense layers of an attention as one, whose outputs are those of all of them, one launch in place of three.

    Their matrices are parts of its matrix from then on, so that none is there twice. None where they are not stored alike.
    """
    layers = [p[name] for name in TOGETHER if isinstance(p.get(name), dict)]
    if len(layers) < len(TOGETHER) or len({_stored(layer) for layer in layers}) > 1 or _stored(layers[0]) is None:
        return None
    matrices = [layer["kernel"] for layer in layers]

    def together(parts: list[Any]) -> Any:
        """The arrays one behind the other; None if there are none."""
        if parts[0] is None:
            return None
        whole, end = device.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype), 0
        for part in parts:
            whole[end : end + len(part)] = part
            end += len(part)
        return whole

    rows, scale, zero = (together([getattr(w, name) for w in matrices]) for name in ("rows", "scale", "zero"))
    end = 0
    for layer, w in zip(layers, matrices, strict=True):
        layer["kernel"] = replace(w, rows=rows[end : end + w.n])
        end += w.n
    whole = replace(matrices[0], shape=(matrices[0].k, end), rows=rows, n=end, scale=scale, zero=zero)
    beside = ("bias", "kernel_scale", "kernel_weight_only_scale") if whole.kind == "int8" else ("bias",)
    return {"kernel": whole, **{name: together([layer[name] for layer in layers]) for name in beside if name in layers[0]}}


def _stored(layer: Params) -> Any:
    """What two layers have in common if their matrices can be one. None: nothing, with this one."""
    w = layer.get("kernel")
    if not isinstance(w, Matrix) or w.host is not None or "lora_kernel_a" in layer:
        return None
    return w.kind, w.k, w.rows.shape[1], w.block, frozenset(layer)


def _leaf(device: Device, key: str, leaf: Array, others: dict[str, Any], *, table: bool) -> Any:
    by_rows = key == "embeddings"
    if not (key == "kernel" or (table and key in ("embeddings", "reverse_embeddings"))):
        return device.to_device(leaf)
    if leaf.ndim != 2 or leaf.dtype.name not in PIECE:
        return device.to_device(leaf)
    if f"{key}_zero" not in others:
        return matrix(device, leaf, by_rows=by_rows)
    scale, zero, g_idx = others[f"{key}_scale"], others[f"{key}_zero"], others["g_idx"]
    # Kernels and tables have two numbers of a row in a byte, the untied head's table two of a column.
    axis = -1 if by_rows or leaf.shape == (len(g_idx), -(-scale.shape[1] // 2)) else 0
    return int4_matrix(device, leaf, scale, zero, g_idx, by_rows=by_rows, axis=axis)


def unloaded(device: Device, tree: Any) -> Any:
    """The host's tree in place of a loaded one: a leaf that nobody else holds goes when it has come home."""
    if isinstance(tree, dict):
        for key in [key for key in tree if key.startswith("_")]:
            del tree[key]
    elif not isinstance(tree, list):
        return on_host(device, tree)
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        tree[key] = unloaded(device, tree[key])
    return tree


def on_host(device: Device, leaf: Any) -> Array:
    """The host's array of a leaf, in memory of its own."""
    if isinstance(leaf, Matrix):
        return np.array(device.to_host(leaf.leaf()) if leaf.host is None else leaf.host, order="C")
    return np.array(device.to_host(leaf), order="C")
