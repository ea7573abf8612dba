"""int8 and int4: sums, ties, nibbles, groups, scales."""

import numpy as np

from planted import cast, f32, right, rows_of, wrong
from refmodels.ops.dense import dense
from refmodels.ops.quantize import (
    embedding_int4,
    embedding_int8,
    linear_int4,
    linear_int8,
    linear_weight_int8,
    logits_int4,
    logits_int8,
    logits_weight_int8,
    pack_int4,
    quantize_rows,
    row_scale,
    unpack_int4,
)


def rescaled(total, scale, kernel_scale, bias, dtype):
    wide = np.float64 if dtype == "float64" else np.float32
    y = total.astype(wide) / (scale.astype(wide)[..., None] * kernel_scale.astype(wide))
    return cast(y if bias is None else y + f32(bias), dtype)


@wrong(linear_int8, "adds up in sixteen bits")
def _(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    with np.errstate(over="ignore"):
        total = (values.astype(np.int16)[..., :, None] * kernel.astype(np.int16)).sum(-2, dtype=np.int16)
    return rescaled(total, scale, kernel_scale, bias, dtype)


@wrong(linear_int8, "pairs of products saturate at sixteen bits, as pmaddubsw's do")
def _(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    shifted, wide = values.astype(np.int64) + 128, kernel.astype(np.int64)  # one side must be unsigned
    products = shifted[..., :, None] * wide
    k = len(kernel) // 2 * 2
    pairs = (products[..., 0:k:2, :] + products[..., 1:k:2, :]).clip(-32768, 32767)
    total = pairs.sum(-2) + products[..., k:, :].sum(-2) - 128 * wide.sum(0)
    return rescaled(total, scale, kernel_scale, bias, dtype)


@wrong(linear_int8, "the scale of the inputs is forgotten")
def _(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    return linear_int8.reference(values, np.ones_like(scale), kernel, kernel_scale, bias, dtype=dtype)


@wrong(linear_int8, "the first row's scale serves every row")
def _(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    first = scale if scale.size == 0 else np.full_like(scale, scale.reshape(-1)[0])
    return linear_int8.reference(values, first, kernel, kernel_scale, bias, dtype=dtype)


@wrong(linear_weight_int8, "multiplies by the scale")
def _(x, kernel, kernel_scale, bias=None, *, dtype=None):
    return linear_weight_int8.reference(x, kernel, 1 / kernel_scale, bias, dtype=dtype)


@wrong(linear_weight_int8, "quantises the inputs as well")
def _(x, kernel, kernel_scale, bias=None, *, dtype=None):
    scale = row_scale.reference(x)
    values = quantize_rows.reference(x, scale)
    return linear_int8.reference(values, scale, kernel, kernel_scale, bias, dtype=dtype or x.dtype.name)


@wrong(quantize_rows, "ties go away from zero")
def _(x, scale):
    levels = f32(x).astype(np.float32) * scale.astype(np.float32)[..., None]
    levels = np.nan_to_num(np.sign(levels) * np.floor(np.abs(levels) + np.float32(0.5)))
    return levels.clip(-127, 127).astype(np.int8)


@wrong(quantize_rows, "rounds down")
def _(x, scale):
    return np.nan_to_num(np.floor(x.astype(np.float32) * scale.astype(np.float32)[..., None])).clip(-127, 127).astype(np.int8)


@wrong(quantize_rows, "-128 is used")
def _(x, scale):
    levels = np.rint(x.astype(np.float32) * scale.astype(np.float32)[..., None])
    return np.nan_to_num(levels).clip(-128, 127).astype(np.int8)


@wrong(quantize_rows, "NaN becomes the lowest number")
def _(x, scale):
    levels = np.rint(x.astype(np.float32) * scale.astype(np.float32)[..., None])
    return np.where(np.isnan(levels), -127, levels.clip(-127, 127)).astype(np.int8)


@wrong(row_scale, "a row of zeros has an infinite scale")
def _(x):
    with np.errstate(all="ignore"):
        largest = np.abs(x.astype(np.float32)).max(-1, initial=0)
        return np.where(np.isfinite(largest), np.float32(127) / largest, np.float32(np.nan))


@wrong(row_scale, "the largest value without its sign is forgotten: only positive ones count")
def _(x):
    with np.errstate(all="ignore"):
        largest = x.astype(np.float32).max(-1, initial=0)
        return np.where(np.isfinite(largest), np.float32(127) / (largest + np.float32(1e-7)), np.float32(np.nan))


@wrong(pack_int4, "the even number in the high bits")
def _(values, *, axis=-1):
    packed = pack_int4.reference(values, axis=axis).view(np.uint8)
    return ((packed << 4) | (packed >> 4)).view(np.int8)


@wrong(unpack_int4, "without a sign")
def _(packed, size, *, axis=-1):
    return unpack_int4.reference(packed, size, axis=axis) & np.int8(15)


@wrong(unpack_int4, "axis 0 is taken for the last")
def _(packed, size, *, axis=-1):
    if axis == 0 and packed.shape[0] == packed.shape[1]:
        return unpack_int4.reference(packed.T, size, axis=0).T.copy()
    return unpack_int4.reference(packed, size, axis=axis)


@wrong(linear_int4, "the groups begin one row late")
def _(x, kernel, kernel_scale, kernel_zero, g_idx, bias=None, *, axis=-1, dtype=None):
    late = np.concatenate([g_idx[:1], g_idx[:-1]])
    return linear_int4.reference(x, kernel, kernel_scale, kernel_zero, late, bias, axis=axis, dtype=dtype)


@wrong(linear_int4, "the zero is not taken away")
def _(x, kernel, kernel_scale, kernel_zero, g_idx, bias=None, *, axis=-1, dtype=None):
    return linear_int4.reference(x, kernel, kernel_scale, 0 * kernel_zero, g_idx, bias, axis=axis, dtype=dtype)


@wrong(linear_int4, "the last of an odd number of columns is a zero")
def _(x, kernel, kernel_scale, kernel_zero, g_idx, bias=None, *, axis=-1, dtype=None):
    y = linear_int4.reference(x, kernel, kernel_scale, kernel_zero, g_idx, bias, axis=axis, dtype=dtype)
    if kernel_scale.shape[1] % 2 and axis != 0:
        y[..., -1] = 0 if bias is None else bias[-1]
    return y


@wrong(linear_int4, "all groups are of 128 inputs")
def _(x, kernel, kernel_scale, kernel_zero, g_idx, bias=None, *, axis=-1, dtype=None):
    groups = (np.arange(len(g_idx)) // 128).clip(0, max(len(kernel_scale) - 1, 0)).astype(g_idx.dtype)
    return linear_int4.reference(x, kernel, kernel_scale, kernel_zero, groups, bias, axis=axis, dtype=dtype)


@wrong(embedding_int8, "multiplies by the scale")
def _(ids, embeddings, embeddings_scale, *, dtype):
    return embedding_int8.reference(ids, embeddings, 1 / embeddings_scale, dtype=dtype)


@wrong(embedding_int4, "every row has the first row's zero")
def _(ids, embeddings, embeddings_scale, embeddings_zero, g_idx, *, dtype):
    zero = np.broadcast_to(embeddings_zero[:1], embeddings_zero.shape)
    return embedding_int4.reference(ids, embeddings, embeddings_scale, zero, g_idx, dtype=dtype)


@wrong(logits_int8, "the table's scale is that of the row, and the row's that of the table")
def _(values, scale, embeddings, embeddings_scale, *, dtype):
    y = logits_int8.reference(values, scale, embeddings, embeddings_scale, dtype=dtype)
    if y.ndim == 2 and y.shape[0] == y.shape[1] > 1:
        return logits_int8.reference(values, embeddings_scale, embeddings, scale, dtype=dtype)
    return y * y.dtype.type(1.001)


@wrong(dense, "an adapter beside a quantised kernel is not seen")
def _(x, kernel, bias=None, lora_kernel_a=None, lora_kernel_b=None, lora_scale=None, kernel_scale=None,
      kernel_weight_only_scale=None, kernel_zero=None, g_idx=None, *, dtype=None):  # fmt: skip
    if kernel.dtype == np.int8:
        lora_scale = None
    return dense.reference(x, kernel, bias, lora_kernel_a, lora_kernel_b, lora_scale, kernel_scale,
                           kernel_weight_only_scale, kernel_zero, g_idx, dtype=dtype)  # fmt: skip


@wrong(dense, "int8 with quantised inputs is taken for int8 of the weights alone")
def _(x, kernel, bias=None, lora_kernel_a=None, lora_kernel_b=None, lora_scale=None, kernel_scale=None,
      kernel_weight_only_scale=None, kernel_zero=None, g_idx=None, *, dtype=None):  # fmt: skip
    if kernel_scale is not None and kernel_zero is None:
        kernel_scale, kernel_weight_only_scale = None, kernel_scale
    return dense.reference(x, kernel, bias, lora_kernel_a, lora_kernel_b, lora_scale, kernel_scale,
                           kernel_weight_only_scale, kernel_zero, g_idx, dtype=dtype)  # fmt: skip


@right(linear_int8, "adds up in thirty-two bits")
def _(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    total = values.astype(np.int32) @ kernel.astype(np.int32)
    return rescaled(total, scale, kernel_scale, bias, dtype)


@right(linear_int8, "products with the inverse of both scales")
def _(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    wide = np.float64 if dtype == "float64" else np.float32
    total = (values.astype(np.int32) @ kernel.astype(np.int32)).astype(wide)
    y = total * (wide(1) / scale.astype(wide))[..., None] * (wide(1) / kernel_scale.astype(wide))
    return cast(y if bias is None else y + f32(bias), dtype)


@right(linear_weight_int8, "the kernel is widened and rescaled first")
def _(x, kernel, kernel_scale, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = back(rows @ (kernel.astype(rows.dtype) / kernel_scale.astype(rows.dtype)))
    return cast(y if bias is None else y + f32(bias), dtype or x.dtype)


@right(logits_weight_int8, "the scale before the sum", dtype="bfloat16")
def _(x, embeddings, embeddings_scale):
    rows, back = rows_of(x)
    return cast(back(rows @ (embeddings.T / f32(embeddings_scale)).astype(rows.dtype)), x.dtype)


@right(linear_int4, "sums of groups, each scaled once")
def _(x, kernel, kernel_scale, kernel_zero, g_idx, bias=None, *, axis=-1, dtype=None):
    rows, back = rows_of(x)
    size = len(g_idx) if axis == 0 else kernel_scale.shape[1]
    q = unpack_int4.reference(kernel, size, axis=axis).astype(rows.dtype)
    y = np.zeros((len(rows), kernel_scale.shape[1]), rows.dtype)
    for group in range(len(kernel_scale)):
        own = g_idx == group
        inner = rows[:, own] @ (q[own] - kernel_zero[group].astype(rows.dtype))
        y = y + inner * kernel_scale[group].astype(rows.dtype)
    y = back(y)
    return cast(y if bias is None else y + f32(bias), dtype or x.dtype)


@right(logits_int4, "rows of the table one by one")
def _(x, embeddings, embeddings_scale, embeddings_zero, g_idx):
    rows, back = rows_of(x)
    table = embedding_int4.reference(
        np.arange(len(embeddings)), embeddings, embeddings_scale, embeddings_zero, g_idx, dtype=rows.dtype.name
    )
    y = np.stack([rows @ row for row in table], 1) if len(table) else np.zeros((len(rows), 0), rows.dtype)
    return cast(back(y), x.dtype)
