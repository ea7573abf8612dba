"""The key/value cache: places, starts of rows, what is shared."""

import numpy as np

from planted import cast, right, wrong
from refmodels.ops.cache import cache_allocate, cache_append, cache_select, key_value_cache


def starts(cache, start):
    return np.zeros(len(cache), np.int64) if start is None else start


def written(cache, new, places):
    """Write each row where `places` says, as far as there is room, and give what the reference gives."""
    length = new.shape[1]
    for row, first in enumerate(places):
        last = min(first + length, cache.shape[1])
        cache[row, first:last] = new[row, : last - first]


def seen(cache, new, start):
    return cache[:, : int(starts(cache, start).max(initial=0)) + new.shape[1]]


@wrong(cache_append, "one position too far")
def _(cache, new, start=None):
    written(cache, new, starts(cache, start) + (0 if start is None else 1))
    return seen(cache, new, start)


@wrong(cache_append, "start is not looked at")
def _(cache, new, start=None):
    written(cache, new, np.zeros(len(cache), np.int64))
    return seen(cache, new, start)


@wrong(cache_append, "every row begins where the first does")
def _(cache, new, start=None):
    places = starts(cache, start)
    written(cache, new, places if not len(places) else np.full(len(places), places[0]))
    return seen(cache, new, start)


@wrong(cache_append, "zeros are written behind the row's end")
def _(cache, new, start=None):
    result = cache_append.reference(cache, new, start)
    for row, first in enumerate(starts(cache, start)):
        cache[row, first + new.shape[1] :] = 0
        if new.shape[1] == 1 and first:
            cache[row, first - 1 : first] = 0
    return result


@wrong(cache_append, "the last position written is not seen")
def _(cache, new, start=None):
    result = cache_append.reference(cache, new, start)
    return result[:, :-1] if result.shape[1] > 1 else result


@wrong(cache_append, "what is seen ends where the shortest row does")
def _(cache, new, start=None):
    cache_append.reference(cache, new, start)
    return cache[:, : int(starts(cache, start).min(initial=10**6)) + new.shape[1]] if len(cache) else cache[:, : new.shape[1]]


@wrong(cache_append, "NaN is not stored")
def _(cache, new, start=None):
    return cache_append.reference(cache, np.nan_to_num(new), start)


@wrong(cache_append, "rows are written in pairs, and one that is left over is not")
def _(cache, new, start=None):
    places = starts(cache, start)
    pairs = len(cache) // 2 * 2 if len(cache) > 2 else len(cache)
    written(cache[:pairs], new[:pairs], places[:pairs])
    return seen(cache, new, start)


@wrong(cache_append, "a copy is written to, not the cache")
def _(cache, new, start=None):
    return cache_append.reference(cache.copy(), new, start)


@wrong(cache_append, "values pass through half precision")
def _(cache, new, start=None):
    return cache_append.reference(cache, cast(new, "bfloat16").astype(new.dtype), start)


@wrong(cache_select, "rows that are in order are not copied")
def _(cache, rows):
    rows = np.asarray(rows)
    if len(rows) <= len(cache) and (rows == np.arange(len(rows))).all():
        return cache[: len(rows)]
    return cache[rows]


@wrong(cache_select, "a row that is wanted twice is given once")
def _(cache, rows):
    result, taken = cache[rows], set()
    for i, row in enumerate(np.asarray(rows).tolist()):
        if row in taken:
            result[i] = 0
        taken.add(row)
    return result


@wrong(cache_select, "in place, and so from rows that were overwritten")
def _(cache, rows):
    result = cache.copy()
    result = np.concatenate([result, np.zeros((max(len(rows) - len(cache), 0), *cache.shape[1:]), cache.dtype)])
    for i, row in enumerate(np.asarray(rows).tolist()):
        result[i] = result[row]
    return result[: len(rows)]


@wrong(cache_allocate, "memory is not cleared")
def _(shape, dtype):
    return np.full_like(cache_allocate.reference(shape, dtype), 1)


@wrong(cache_allocate, "bfloat16 caches are float16", dtype="bfloat16")
def _(shape, dtype):
    return cache_allocate.reference(shape, "float16" if dtype == "bfloat16" else dtype)


@wrong(key_value_cache, "keys and values share their memory, and so the layers")
def _(batch, capacity, *, layers, heads, head_dim, dtype):
    cache = key_value_cache.reference(batch, capacity, layers=layers, heads=heads, head_dim=head_dim, dtype=dtype)
    return {**cache, "layers": [{"key": cache["layers"][0]["key"], "value": cache["layers"][0]["key"]}] * layers}


@right(cache_append, "position by position, rows from the last to the first")
def _(cache, new, start=None):
    places = starts(cache, start)
    for row in reversed(range(len(cache))):
        for i in range(new.shape[1]):
            cache[row, int(places[row]) + i] = new[row, i]
    return seen(cache, new, start)
