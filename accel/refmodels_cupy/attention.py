"""Attention: by the tensor cores for half precision, without them for float32 and odd head sizes, and one query at a time.

`plan` and `attend` are what composites call: the kernels make causal masks, ALiBi and T5's bias by themselves, from positions,
so that no matrix of them need be there. The op `attention` is given such matrices.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import attention as ops
from refmodels.ops.position import _first_distances
from refmodels_cupy.device import MOST_BLOCKS, Device, Launch, Strided, address
from refmodels_cupy.elementwise import STORED, each, narrow_types
from refmodels_cupy.linear import HALVES
from refmodels_cupy.recorder import Recorder, RecordingError
from refmodels_cupy.source import form

TENSOR_SIZES = (64, 80, 96, 128)
"""Sizes of a head for the tensor cores."""

ROOMS = (64, 128, 256)
"""The plain and the decode kernel take any size of a head up to one of these."""

NONE, ALIBI, TABLE, GIVEN = range(4)
"""Kinds of bias, by their numbers in attention.cuh."""

PREFILL_THREADS, PREFILL_QUERIES, PREFILL_KEYS = 128, 64, 64
PLAIN_WARPS, PLAIN_QUERIES, PLAIN_KEYS = 8, 32, 32
DECODE_THREADS, PIECE = 128, 128
SOFTMAX_ROWS = 8
"""Threads, queries or rows, and keys of a block: as the kernels have them."""

LONGEST_REACH = 256
"""Distances on each side that the kernels have room to hold T5's bias for, beside the largest tiles."""


def _decode_form(dtype: str, size: int, aligned: bool) -> str:
    """How a key is read: numbers of a load, lanes of a key, loads of a lane."""
    if not aligned:
        return form("attention_decode", dtype, 1, 32, 8)
    if dtype == "float32":
        return form("attention_decode", dtype, 4, 32 if size > 128 else 16, 2 if size > 64 else 1)
    return form("attention_decode", dtype, 8, 32 if size > 128 else 16 if size > 64 else 8, 1)


FORMS = (
    [
        ("attention_prefill.cu", form("attention_prefill", dtype, size, kind))
        for dtype in HALVES
        for size in TENSOR_SIZES
        for kind in (NONE, ALIBI, TABLE, GIVEN)
    ]
    + [("attention_plain.cu", form("attention_plain", dtype, room)) for dtype in STORED for room in ROOMS]
    + [("attention_decode.cu", _decode_form(dtype, room, aligned=True)) for dtype in STORED for room in ROOMS]
    + [("attention_decode.cu", _decode_form(dtype, 1, aligned=False)) for dtype in STORED]
    + [("softmax.cu", form("masked_softmax", dtype)) for dtype in STORED]
)
"""Every form that may be launched, with its file."""


@dataclass(frozen=True)
class Alibi:
    """slope * (key - query): slopes float32 (h,)."""

    slopes: Any


@dataclass(frozen=True)
class Table:
    """T5's bias: embeddings float32 (buckets, h), and the smallest distance of each bucket of a side, int32."""

    embeddings: Any
    firsts: Any
    side: int
    reach: int
    bidirectional: bool


def relative_table(
    device: Device, embeddings: Any, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Table | None:
    """T5's bias as the kernels look it up. None where distances are told apart beyond what they have room for."""
    side = num_buckets // 2 if bidirectional else num_buckets
    firsts = _first_distances(side, max_distance)
    if firsts[-1] > LONGEST_REACH:
        return None
    wide = embeddings.astype(np.float32, copy=False)
    return Table(wide, device.to_device(np.array(firsts, np.int32)), side, firsts[-1], bidirectional)


def plan(
    device: Device,
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    key_mask: Any = None,
    causal: bool = False,
    positions: Any = None,
    lengths: Any = None,
    bias: Any = None,
    scale: float = 1.0,
) -> tuple[Any, list[Launch]]:
    """The context (b, t, h, d) and the launches that make it: all that is allocated is allocated here, not by them.

    mask        (b or 1, 1, t or 1, s), or None: all
    key_mask    (b or 1, s), or None: all
    causal      a query may not look behind its own position
    positions   (b or 1, t) of the queries, for `causal` and for biases by distance
    lengths     (b,) how many of the keys there are, read when the launch runs; of one query each
    bias        Alibi, Table, an array (b or 1, h, t, s), or None

    Arrays that are not as the kernels read them are copied here: what launches are to read again when it has changed must have
    its type (int32 positions and lengths, float32 biases) and be contiguous; keys and values may be the beginning of a cache,
    and queries, keys and values columns of one matrix.
    """
    xp = device.xp
    batch, t, heads, size = query.shape
    s = key.shape[1]
    context = device.empty(query.shape, value.dtype)
    if not context.size or not s:
        context[...] = 0
        return context, []
    query, query_stride = _rows(device, query)
    key, value = _with_strides(device, key, value)
    if mask is not None and key_mask is None and mask.shape[2] == 1:
        mask, key_mask = None, mask[:, 0, 0]
    if mask is None:
        masked = (None, np.int64(0), np.int64(0))
    else:
        mask = xp.ascontiguousarray(mask)
        masked = (mask, _stride(mask, 0), _stride(mask, 2))
    if key_mask is not None:
        key_mask = xp.ascontiguousarray(key_mask)
    if positions is not None:
        positions = xp.ascontiguousarray(positions.astype(np.int32, copy=False))
    if bias is not None and not isinstance(bias, Alibi | Table):
        bias = xp.ascontiguousarray(bias.astype(np.float32, copy=False))

    dtype, kind = value.dtype.name, _kind(bias)
    numbers = bias.slopes if kind == ALIBI else bias.embeddings if kind == TABLE else bias
    table = bias if kind == TABLE else Table(None, None, 0, 0, False)
    biased = (numbers, _stride(bias, 0) if kind == GIVEN else np.int64(0), table.firsts, np.int32(table.side))
    of_distance = 4 * (2 * table.reach + 1) if kind == TABLE else 0
    strides = tuple(np.int64(stride) for stride in _strides(key)[:2])
    arrays = (Strided(query), query_stride, Strided(key), Strided(value), context)
    permitted = (
        *(key_mask, np.int64(0) if key_mask is None else _stride(key_mask, 0), np.int32(causal)),
        *(positions, np.int64(0) if positions is None else _stride(positions, 0)),
    )
    if t == 1 and mask is None:
        pieces = -(-s // PIECE)
        partial, arrived = device.empty((batch, heads, pieces, size + 2), np.float32), xp.zeros((batch, heads), np.int32)
        aligned = all(int(number) * key.itemsize % 16 == 0 for number in (size, *strides)) and not address(key) % 16
        launch = Launch(
            "attention_decode.cu",
            _decode_form(dtype, size, aligned and not address(value) % 16),
            (pieces, heads, batch),
            (DECODE_THREADS, 1, 1),
            (*arrays, partial, arrived, lengths, np.int32(size), np.int32(s), np.int32(heads), *strides, np.float32(scale),
             *permitted, np.int32(kind), *biased, np.int32(table.bidirectional)),
        )  # fmt: skip
        return context, [launch]
    assert lengths is None, "lengths are of one query"
    sizes = (np.int32(t), np.int32(s), np.int32(heads), *strides, np.float32(scale), *masked, *permitted)
    distances = (np.int32(table.reach), np.int32(table.bidirectional))
    if dtype in HALVES and size in TENSOR_SIZES and not any(int(stride) % 8 for stride in strides):
        return context, [
            Launch(
                "attention_prefill.cu",
                form("attention_prefill", dtype, size, kind),
                (-(-t // PREFILL_QUERIES), heads, batch),
                (PREFILL_THREADS, 1, 1),
                (*arrays, *sizes, *biased, *distances),
                4 * PREFILL_KEYS * (size + 8) * 2 + of_distance,
            )
        ]
    room = next(room for room in ROOMS if size <= room)
    return context, [
        Launch(
            "attention_plain.cu",
            form("attention_plain", dtype, room),
            (-(-t // PLAIN_QUERIES), heads, batch),
            (32 * PLAIN_WARPS, 1, 1),
            (*arrays, np.int32(size), *sizes, np.int32(kind), *biased, *distances),
            16 * PLAIN_WARPS * room + 4 * PLAIN_KEYS * (2 * room + 1) + of_distance,
        )
    ]


def attend(device: Device, query: Any, key: Any, value: Any, **how: Any) -> Any:
    """The context (b, t, h, d); `how` as for `plan`."""
    with device.working():
        context, launches = plan(device, query, key, value, **how)
        for launch in launches:
            device.launch(launch)
    return context


def _kind(bias: Any) -> int:
    return NONE if bias is None else ALIBI if isinstance(bias, Alibi) else TABLE if isinstance(bias, Table) else GIVEN


def _stride(array: Any, axis: int) -> np.int64:
    """Elements from one index of a contiguous array's axis to the next; 0 for an axis of one, which stands for any."""
    return np.int64(0 if array.shape[axis] == 1 else math.prod(array.shape[axis + 1 :]))


def _rows(device: Device, query: Any) -> tuple[Any, np.int64]:
    """Queries whose rows follow one another with one stride, and that stride: as they are, or a copy."""
    batch, t, _, size = query.shape
    per_row, stride, *inner = _strides(query)
    one_stride = batch == 1 or t == 1 or per_row == t * stride
    aligned = size not in TENSOR_SIZES or not ((per_row | stride) * query.itemsize | address(query)) % 16
    if not one_stride or inner != [size, 1] or not aligned:
        query = _aligned(device, query)
        per_row, stride, *_ = _strides(query)
    return query, np.int64(stride if batch == 1 else per_row // t)


def _strides(array: Any) -> tuple[int, ...]:
    """Elements from one index of each axis to the next; of an axis of one, which may say anything, as if it were contiguous."""
    found, inside = [], 1
    for size, stride in zip(array.shape[::-1], array.strides[::-1], strict=True):
        found.append(inside if size == 1 else stride // array.itemsize)
        inside = found[-1] * size
    return tuple(found[::-1])


def _aligned(device: Device, array: Any) -> Any:
    """A copy, contiguous from a multiple of 16 bytes on, unless the array is so.

    RecordingError while launches are recorded: they would read the copy for ever.
    """
    contiguous = device.xp.ascontiguousarray(array)
    aligned = contiguous.copy() if address(contiguous) % 16 else contiguous
    if aligned is not array and isinstance(device, Recorder):
        raise RecordingError(f"attention to an array of {array.shape} that is not read where it lies: strides {array.strides}")
    return aligned


def _with_strides(device: Device, key: Any, value: Any) -> tuple[Any, Any]:
    """Keys and values with the same strides, the numbers and heads of a position side by side: as they are, or copies."""
    wanted = _strides(key)

    def is_fine(array: Any) -> bool:
        strides = _strides(array)
        return strides == wanted and strides[2:] == (key.shape[3], 1) and min(strides) >= 0 and address(array) % 16 == 0

    return (key, value) if is_fine(key) and is_fine(value) else (_aligned(device, key), _aligned(device, value))


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.attention`."""
    xp = device.xp

    @accelerator.kernel(ops.attention, when=_fits)
    def attention(
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        bias: Any = None,
        *,
        scale: float = 1.0,
        dropout_rate: float = 0.0,
        rng: Any = None,
    ) -> Any:
        return attend(device, query, key, value, mask=mask, bias=bias, scale=scale)

    @accelerator.kernel(ops.attention_scores, when=narrow_types)
    def attention_scores(query: Any, key: Any, bias: Any = None, *, scale: float = 1.0) -> Any:
        with device.working():
            products = _wide(query).transpose(0, 2, 1, 3) @ _wide(key).transpose(0, 2, 3, 1)
            scores = each(device, products, factor=scale)
            return scores if bias is None else each(device, scores, bias, combination="add")

    @accelerator.kernel(ops.masked_softmax, when=narrow_types)
    def masked_softmax(scores: Any, mask: Any) -> Any:
        _, heads, t, s = scores.shape
        weights = device.empty(scores.shape, np.float32)
        if weights.size:
            with device.working():
                scores, mask = xp.ascontiguousarray(scores), xp.ascontiguousarray(mask)
            rows = weights.size // s
            sizes = (np.int64(rows), np.int32(s), np.int32(t), np.int32(heads * t), _stride(mask, 0), _stride(mask, 2))
            blocks, threads = (-(-rows // SOFTMAX_ROWS), 1, 1), (32 * SOFTMAX_ROWS, 1, 1)
            kernel = form("masked_softmax", scores.dtype.name)
            device.launch(Launch("softmax.cu", kernel, blocks, threads, (scores, mask, weights, *sizes)))
        return weights

    @accelerator.kernel(ops.attention_context, when=narrow_types)
    def attention_context(weights: Any, value: Any) -> Any:
        with device.working(), np.errstate(over="ignore"):
            context = _wide(weights) @ _wide(value).transpose(0, 2, 1, 3)
            return context.transpose(0, 2, 1, 3).astype(value.dtype)


def _wide(x: Any) -> Any:
    return x.astype(np.float32, copy=False)


def _fits(
    query: Any, key: Any, value: Any, mask: Any, bias: Any = None, *, dropout_rate: float = 0.0, rng: Any = None, **_: Any
) -> bool | str:
    """heads of up to 256 numbers of one type, float32 or narrower, without dropout"""
    batch, _t, heads, size = query.shape
    if len({query.dtype, key.dtype, value.dtype}) > 1 or value.dtype.name not in STORED:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}"
    if bias is not None and bias.dtype == np.float64:
        return "bias is float64"
    if rng is not None and dropout_rate > 0:
        return "dropout draws: op by op"
    if size > ROOMS[-1] or max(batch, heads) > MOST_BLOCKS:
        return f"a head of {size} numbers, {heads} heads, {batch} rows"
    return True
