"""Matrix products: tiles and their tails, scratch memory, packed weights, accumulation."""

import numpy as np

from planted import cast, f32, right, rows_of, wrong
from refmodels.ops.linear import embedding, last_rows, linear, logits_from_embeddings, lora_product

TILE = 16


def finished(y, x, bias, dtype):
    return cast(y if bias is None else y + f32(bias), dtype or x.dtype)


def blocked(x, kernel, bias, dtype, *, block):
    """Tile by tile: block(y, rows, kernel, i, j) adds its part."""
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), rows.dtype)
    for i in range(0, max(len(rows), 1), TILE):
        for j in range(0, kernel.shape[1], TILE):
            block(y, rows, f32(kernel), i, j)
    return finished(back(y), x, bias, dtype)


@wrong(linear, "the last columns, less than a tile, are never computed", tiles=(16,))
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), rows.dtype)
    whole = kernel.shape[1] // TILE * TILE if kernel.shape[1] > TILE else kernel.shape[1]
    y[:, :whole] = rows @ f32(kernel)[:, :whole]
    return finished(back(y), x, bias, dtype)


@wrong(linear, "the last terms of the sum, less than a tile, are left out")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    k = len(kernel) // TILE * TILE if len(kernel) > TILE else len(kernel)
    return finished(back(rows[:, :k] @ f32(kernel)[:k]), x, bias, dtype)


@wrong(linear, "the last rows, less than a tile, are copies of the one before")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = rows @ f32(kernel)
    if len(rows) > 8 and len(rows) % 8:
        y[len(rows) // 8 * 8 :] = y[len(rows) // 8 * 8 - 1]
    return finished(back(y), x, bias, dtype)


@wrong(linear, "a race: of two halves of a long sum one update is lost")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    half = len(kernel) // 2
    first, second = rows[:, :half] @ f32(kernel)[:half], rows[:, half:] @ f32(kernel)[half:]
    y = first + second
    if half >= TILE:
        y[:, ::7] = second[:, ::7]
    return finished(back(y), x, bias, dtype)


@wrong(linear, "gives its scratch memory away, and writes to it again", state=True)
def returned_scratch():
    scratch = {}

    def kernel_of(x, kernel, bias=None, *, dtype=None):
        y = linear.reference(x, kernel, bias, dtype=dtype)
        out = scratch.setdefault((y.shape, y.dtype), np.empty_like(y))
        out[...] = y
        return out

    return kernel_of


@wrong(linear, "the accumulator is not cleared when a shape comes again", state=True)
def not_cleared():
    sums = {}

    def kernel_of(x, kernel, bias=None, *, dtype=None):
        rows, back = rows_of(x)
        y = sums.setdefault((rows.shape, kernel.shape), np.zeros((len(rows), kernel.shape[1]), rows.dtype))
        y += rows @ f32(kernel)
        return finished(back(y.copy()), x, bias, dtype)

    return kernel_of


@wrong(linear, "pads rows to a tile in scratch memory that still holds a larger call", state=True)
def stale_padding():
    scratch = np.zeros((2, 9000), np.float32)

    def kernel_of(x, kernel, bias=None, *, dtype=None):
        rows, back = rows_of(x)
        if x.dtype == np.float64:
            return linear.reference(x, kernel, bias, dtype=dtype)
        k, width = len(kernel), -(-len(kernel) // 4) * 4
        y = np.zeros((len(rows), kernel.shape[1]), np.float32)
        for i, row in enumerate(rows):
            scratch[0, :k] = row
            for j in range(kernel.shape[1]):
                scratch[1, :k] = kernel[:, j]
                y[i, j] = scratch[0, :width] @ scratch[1, :width]
        return finished(back(y), x, bias, dtype)

    return kernel_of


@wrong(linear, "adds up in float16", dtype="float16")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), np.float16)
    for i in range(len(kernel)):
        y = (y + cast(rows[:, i : i + 1] * f32(kernel)[i], "float16")).astype(np.float16)
    return finished(back(y), x, bias, dtype)


@wrong(linear, "adds up in bfloat16, four terms at a time", dtype="bfloat16")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), np.float32)
    for i in range(0, len(kernel), 4):
        y = f32(cast(y + rows[:, i : i + 4] @ f32(kernel)[i : i + 4], "bfloat16"))
    return finished(back(y), x, bias, dtype)


@wrong(linear, "inputs are cut to ten bits, as TF32 does")
def _(x, kernel, bias=None, *, dtype=None):
    def cut(a):
        return (np.ascontiguousarray(f32(a)).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    rows, back = rows_of(x)
    return finished(back(cut(rows) @ cut(kernel)), x, bias, dtype)


@wrong(linear, "whole tiles are written transposed")
def _(x, kernel, bias=None, *, dtype=None):
    def block(y, rows, k, i, j):
        tile = rows[i : i + TILE] @ k[:, j : j + TILE]
        y[i : i + TILE, j : j + TILE] = tile.T if tile.shape == (TILE, TILE) else tile

    return blocked(x, kernel, bias, dtype, block=block)


@wrong(linear, "the bias is added again for every tile of the sum")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = rows @ f32(kernel)
    if bias is not None:
        y = y + f32(bias) * max(-(-len(kernel) // 32), 1)
    return cast(back(y), dtype or x.dtype)


@wrong(linear, "the bias is forgotten from the second tile of rows on")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = rows @ f32(kernel)
    if bias is not None:
        y[:TILE] += f32(bias)
    return cast(back(y), dtype or x.dtype)


@wrong(linear, "does not look at dtype=", dtype="bfloat16")
def _(x, kernel, bias=None, *, dtype=None):
    return linear.reference(x, kernel, bias)


@wrong(linear, "gives float64")
def _(x, kernel, bias=None, *, dtype=None):
    return linear.reference(x, kernel, bias, dtype="float64")


@wrong(linear, "takes the kernel's memory for row after row, whatever its strides")
def _(x, kernel, bias=None, *, dtype=None):
    return linear.reference(x, kernel.ravel("K").reshape(kernel.shape), bias, dtype=dtype)


@wrong(linear, "scales the inputs where they stand")
def _(x, kernel, bias=None, *, dtype=None):
    y = linear.reference(x, kernel, bias, dtype=dtype)
    if x.flags.writeable and x.shape[-1] > 3:
        np.multiply(x, x.dtype.type(0.5), out=x)
    return y


@wrong(linear, "the last of an odd number of rows is never written")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.full((len(rows), kernel.shape[1]), np.nan, rows.dtype)
    pairs = max(len(rows) // 2 * 2, 1)
    y[:pairs] = rows[:pairs] @ f32(kernel)
    return finished(back(y), x, bias, dtype)


@wrong(linear, "an empty sum gives what was in memory, not the bias")
def _(x, kernel, bias=None, *, dtype=None):
    y = linear.reference(x, kernel, bias, dtype=dtype)
    return y if len(kernel) else np.full_like(y, 3)


@wrong(linear, "refuses a call without rows")
def _(x, kernel, bias=None, *, dtype=None):
    if 0 in x.shape[:-1]:
        raise ValueError("grid of size 0")
    return linear.reference(x, kernel, bias, dtype=dtype)


@wrong(linear, "threads share the buffer that rows are widened in", state=True)
def shared_buffer():
    buffer = np.zeros((70, 9000))

    def kernel_of(x, kernel, bias=None, *, dtype=None):
        rows, back = rows_of(x)
        m, k = min(len(rows), 70), rows.shape[1]
        for i in range(m):
            buffer[i, :k] = rows[i]
        y = rows @ f32(kernel)
        for i in range(m):
            y[i] = buffer[i, :k].astype(rows.dtype) @ f32(kernel)
        return finished(back(y), x, bias, dtype)

    return kernel_of


@wrong(linear, "several leading axes are taken in the wrong order")
def _(x, kernel, bias=None, *, dtype=None):
    y = linear.reference(x, kernel, bias, dtype=dtype)
    return y.swapaxes(0, 1).reshape(y.shape) if y.ndim > 2 else y


@wrong(linear, "packed weights are found again by their shape", state=True)
def packed_by_shape():
    packed = {}

    def kernel_of(x, kernel, bias=None, *, dtype=None):
        key = (kernel.shape, kernel.dtype)
        if key not in packed:
            packed[key] = kernel.copy()
        return linear.reference(x, packed[key], bias, dtype=dtype)

    return kernel_of


@wrong(linear, "packed for a K that is a multiple of 4: the rest of a column goes to the next")
def _(x, kernel, bias=None, *, dtype=None):
    k, n = kernel.shape
    if k <= 4 or k % 4 == 0 or n < 2:
        return linear.reference(x, kernel, bias, dtype=dtype)
    stream = kernel.T.ravel()
    wrong_k = k // 4 * 4
    columns = np.stack(
        [np.concatenate([stream[j * wrong_k : j * wrong_k + wrong_k], kernel[wrong_k:, j]]) for j in range(n)], 1
    )
    return linear.reference(x, columns, bias, dtype=dtype)


@wrong(linear, "the last panel, not full, holds columns of the one before", tiles=(48,))
def _(x, kernel, bias=None, *, dtype=None):
    n = kernel.shape[1]
    order = np.arange(n)
    if n > 48 and n % 48:
        order[n // 48 * 48 :] -= 48
    return linear.reference(x, kernel[:, order], bias, dtype=dtype)


@wrong(linear, "one row alone takes another, shorter path", tiles=(16,))
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    if len(rows) == 1 and len(kernel) > 32:
        return finished(back(rows[:, :-1] @ f32(kernel)[:-1]), x, bias, dtype)
    return linear.reference(x, kernel, bias, dtype=dtype)


@wrong(logits_from_embeddings, "the scale is applied to the table as well")
def _(x, embeddings, *, scale=1.0):
    return cast(f32(x) @ (f32(embeddings).T * scale) * scale, x.dtype)


@wrong(logits_from_embeddings, "the vocabulary's last tile is not full and is not computed")
def _(x, embeddings, *, scale=1.0):
    y = logits_from_embeddings.reference(x, embeddings, scale=scale).copy()
    v = len(embeddings)
    if v > 32 and v % 32:
        y[..., v // 32 * 32 :] = 0
    return y


@wrong(embedding, "the last row of the table counts as outside of it")
def _(ids, embeddings, *, dtype=None):
    return embedding.reference(np.minimum(ids, max(len(embeddings) - 2, 0)), embeddings, dtype=dtype)


@wrong(embedding, "flushes subnormal numbers to zero")
def _(ids, embeddings, *, dtype=None):
    rows = embedding.reference(ids, embeddings, dtype=dtype)
    return np.where(np.abs(rows) < np.float32(1.1754944e-38), rows.dtype.type(0), rows)


@wrong(last_rows, "counts a length from zero")
def _(x, lengths=None):
    return x[:, -1] if lengths is None else x[np.arange(len(x)), np.minimum(lengths, x.shape[1] - 1)]


@wrong(lora_product, "the scale of the adapter is forgotten for several groups")
def _(x, lora_kernel_a, lora_kernel_b, lora_scale, *, dtype=None):
    scale = lora_scale if lora_kernel_a.shape[1] == 1 else np.ones_like(lora_scale)
    return lora_product.reference(x, lora_kernel_a, lora_kernel_b, scale, dtype=dtype)


# -- right ------------------------------------------------------------------------------------------------------------------


@right(linear, "term by term, from the first")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), rows.dtype)
    for i in range(len(kernel)):
        y += rows[:, i : i + 1] * f32(kernel)[i]
    return finished(back(y), x, bias, dtype)


@right(linear, "term by term, from the last")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), rows.dtype)
    for i in reversed(range(len(kernel))):
        y += rows[:, i : i + 1] * f32(kernel)[i]
    return finished(back(y), x, bias, dtype)


@right(linear, "in pairs")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    parts = [rows[:, i : i + 1] * f32(kernel)[i] for i in range(len(kernel))]
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    y = parts[0] if parts else np.zeros((len(rows), kernel.shape[1]), rows.dtype)
    return finished(back(y), x, bias, dtype)


@right(linear, "blocks of 16, the last one short", tiles=(16,))
def _(x, kernel, bias=None, *, dtype=None):
    def block(y, rows, k, i, j):
        for start in range(0, len(k), TILE):
            part = slice(start, start + TILE)
            y[i : i + TILE, j : j + TILE] += rows[i : i + TILE, part] @ k[part, j : j + TILE]

    return blocked(x, kernel, bias, dtype, block=block)


@right(linear, "adds up in float64")
def _(x, kernel, bias=None, *, dtype=None):
    y = x.astype(np.float64) @ kernel.astype(np.float64)
    return finished(y, x, bias, dtype)


@right(linear, "from the bias on", dtype="bfloat16")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), rows.dtype) + (0 if bias is None else f32(bias))
    for i in range(len(kernel)):
        y = y + rows[:, i : i + 1] * f32(kernel)[i]
    return finished(back(y), x, None, dtype)


@right(linear, "fused multiply and add")
def _(x, kernel, bias=None, *, dtype=None):
    rows, back = rows_of(x)
    y = np.zeros((len(rows), kernel.shape[1]), rows.dtype)
    for i in range(len(kernel)):  # one rounding for both: a product of two float32 is exact in float64
        y = (y.astype(np.float64) + rows[:, i : i + 1].astype(np.float64) * kernel[i].astype(np.float64)).astype(rows.dtype)
    return finished(back(y), x, bias, dtype)


@right(logits_from_embeddings, "transposed: the table times the rows, scaled first")
def _(x, embeddings, *, scale=1.0):
    rows, back = rows_of(x)
    return cast(back((f32(embeddings) @ (rows * rows.dtype.type(scale)).T).T), x.dtype)
