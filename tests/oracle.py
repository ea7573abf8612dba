"""The primitive ops once more, in plain Python: loops over indices, the math module, and nothing of NumPy.

Each function follows the published equation, not our code, and computes in double precision with exactly rounded sums
(`math.fsum`). `tests/test_ops.py` holds every primitive to the function of its name here; arrays come as a `Tensor`.
"""

import math
import struct
from fractions import Fraction
from itertools import product


class Tensor:
    """A shape and a flat list of Python numbers, last axis fastest; `t[i, j]` is one of them."""

    def __init__(self, shape, values):
        self.shape, self.values = tuple(shape), values
        assert len(values) == math.prod(self.shape)

    def __getitem__(self, index):
        place = 0
        for i, size in zip(index, self.shape, strict=True):
            assert 0 <= i < size, f"index {index} outside {self.shape}"
            place = place * size + i
        return self.values[place]


def build(shape, element):
    """The tensor of this shape with element(i, j, ...) at [i, j, ...]."""
    return Tensor(shape, [element(*index) for index in product(*map(range, shape))])


def stretched(index, shape):
    """The index into an array of this shape that broadcasting gives: axes of size 1 are read at 0."""
    return tuple(0 if size == 1 else i for i, size in zip(index, shape, strict=True))


def exp(x):
    """e**x; infinite where math.exp refuses."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


# -- elementwise ------------------------------------------------------------------------------------------------------


def add(x, y):
    return build(x.shape, lambda *i: x[i] + y[stretched(i, y.shape)])


def multiply(x, y):
    return build(x.shape, lambda *i: x[i] * y[i])


def scaled(x, factor):
    return build(x.shape, lambda *i: factor * x[i])


def relu(x):
    return build(x.shape, lambda *i: 0.0 if x[i] <= 0 else x[i])


def normal_cdf(x):
    """The normal distribution function: 1/2 (1 + erf(x / sqrt 2)); its lower tail by Laplace's continued fraction."""
    if x > -2:
        return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))
    tail = -x
    for k in range(400, 0, -1):
        tail = -x + k / tail
    return exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi) / tail


def gelu(x):
    return build(x.shape, lambda *i: x[i] * normal_cdf(x[i]))


def tanh_plus_one(u):
    """1 + tanh(u); where u is negative by the identity e**2u (1 - tanh(u)), which does not cancel."""
    return 1.0 + math.tanh(u) if u > -0.5 else exp(2.0 * u) * (1.0 - math.tanh(u))


def gelu_approximate(x):
    def element(*i):
        v = x[i]
        return 0.5 * v * tanh_plus_one(math.sqrt(2.0 / math.pi) * (v + 0.044715 * (v * v * v)))

    return build(x.shape, element)


def silu(x):
    def element(*i):
        v = x[i]
        if v > -0.5:
            return v / (1.0 + exp(-v))
        return v * exp(v / 2) / (1.0 + exp(v)) * exp(v / 2)

    return build(x.shape, element)


def linear_activation(x):
    return build(x.shape, lambda *i: x[i])


def dropout(x, rate=0.0, kept=None):
    """`kept` is the tensor of what the generator decided; None means that nothing is dropped."""
    if kept is None:
        return build(x.shape, lambda *i: x[i])
    return build(x.shape, lambda *i: x[i] / (1.0 - rate) if kept[i] else 0.0)


# -- heads ------------------------------------------------------------------------------------------------------------


def split_heads(x, num_heads):
    d = x.shape[2] // num_heads
    return build((*x.shape[:2], num_heads, d), lambda b, t, h, j: x[b, t, h * d + j])


def merge_heads(x):
    h, d = x.shape[2:]
    return build((*x.shape[:2], h * d), lambda b, t, c: x[b, t, c // d, c % d])


# -- products with a matrix -------------------------------------------------------------------------------------------


def linear(x, kernel, bias=None, *, dtype=None):
    k, n = kernel.shape

    def element(*i):
        *row, column = i
        terms = [x[(*row, j)] * kernel[j, column] for j in range(k)]
        return math.fsum([*terms, bias[(column,)]] if bias is not None else terms)

    return build((*x.shape[:-1], n), element)


def lora_product(x, lora_kernel_a, lora_kernel_b, lora_scale, *, dtype=None):
    k, groups, rank = lora_kernel_a.shape
    columns = lora_kernel_b.shape[1]

    def element(*i):
        *row, column = i
        group, place = divmod(column, columns)
        return lora_scale[()] * math.fsum(
            x[(*row, j)] * lora_kernel_a[j, group, r] * lora_kernel_b[r, place] for j in range(k) for r in range(rank)
        )

    return build((*x.shape[:-1], groups * columns), element)


def lora_merged(kernel, lora_kernel_a, lora_kernel_b, lora_scale):
    rank, columns = lora_kernel_b.shape

    def element(j, column):
        group, place = divmod(column, columns)
        products = math.fsum(lora_kernel_a[j, group, r] * lora_kernel_b[r, place] for r in range(rank))
        return kernel[j, column] + lora_scale[()] * products

    return build(kernel.shape, element)


def embedding(ids, embeddings, *, dtype=None):
    return build((*ids.shape, embeddings.shape[1]), lambda *i: embeddings[ids[i[:-1]], i[-1]])


def logits_from_embeddings(x, embeddings, *, scale=1.0):
    v, n = embeddings.shape
    return build((*x.shape[:-1], v), lambda *i: scale * math.fsum(x[(*i[:-1], j)] * embeddings[i[-1], j] for j in range(n)))


def last_rows(x, lengths=None):
    b, t, n = x.shape
    return build((b, n), lambda i, j: x[i, (t if lengths is None else lengths[(i,)]) - 1, j])


# -- masks and positions ----------------------------------------------------------------------------------------------


def causal_mask(positions, key_mask):
    b = max(positions.shape[0], key_mask.shape[0]) if 0 not in (positions.shape[0], key_mask.shape[0]) else 0
    s = key_mask.shape[1]

    def element(i, _, t, key):
        query = positions[stretched((i, t), (positions.shape[0], -1))]
        return bool(key_mask[stretched((i, key), (key_mask.shape[0], -1))]) and key <= query

    return build((b, 1, positions.shape[1], s), element)


def key_mask(padding_mask):
    b, s = padding_mask.shape
    return build((b, 1, 1, s), lambda i, _, __, key: padding_mask[i, key])


def token_positions(ids, start=None):
    b, t = ids.shape
    if start is None:
        return build((1, t), lambda _, j: j)
    return build((b, t), lambda i, j: start[(i,)] + j)


# The first distance of every bucket, as run on the original's framework: encoder (16 a side) and decoder.
FIRST_DISTANCES = {
    (16, 128): [*range(8), 8, 12, 16, 23, 32, 46, 64, 91],
    (32, 128): [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
}


def bucket_of_distance(distance, buckets, max_distance):
    """The original's rule: e + floor(log(d/e) / log(max/e) * (buckets - e)), at most buckets - 1.

    floor(log_r(q)**(1/k)) is decided in rationals: a quotient that is an integer is not at the mercy of a logarithm's rounding.
    """
    e = buckets // 2
    if distance < e:
        return distance
    steps = buckets - e
    guess = math.log(distance / e) / math.log(max_distance / e) * steps
    near = round(guess)
    if abs(guess - near) > 1e-9:
        return min(e + math.floor(guess), buckets - 1)
    reached = Fraction(distance, e) ** steps >= Fraction(max_distance, e) ** near
    return min(e + (near if reached else near - 1), buckets - 1)


def relative_position_buckets(positions, keys, *, bidirectional, num_buckets=32, max_distance=128):
    def element(i, t, key):
        relative = key - positions[i, t]
        if not bidirectional:
            return bucket_of_distance(max(-relative, 0), num_buckets, max_distance)
        side = num_buckets // 2
        return bucket_of_distance(abs(relative), side, max_distance) + (side if relative > 0 else 0)

    return build((*positions.shape, keys), element)


def relative_position_bias(buckets, embeddings):
    b, t, s = buckets.shape
    return build((b, embeddings.shape[1], t, s), lambda i, h, q, k: embeddings[buckets[i, q, k], h])


def slope_exponents(n):
    """get_slopes of the paper's reference code, in its recursive form; of its powers of two the exponents, which are exact."""
    if n & (n - 1) == 0:
        return [Fraction(-8, n) * (i + 1) for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return slope_exponents(closest) + slope_exponents(2 * closest)[0::2][: n - closest]


def slopes(n):
    return [2.0 ** float(exponent) for exponent in slope_exponents(n)]


def alibi_slopes(num_heads):
    return Tensor((num_heads,), slopes(num_heads))


def alibi_bias(slopes, positions, keys, *, dtype="float32"):
    b, t = positions.shape
    return build((b, slopes.shape[0], t, keys), lambda i, h, q, k: -slopes[(h,)] * (positions[i, q] - k))


# -- normalisation ----------------------------------------------------------------------------------------------------


def layer_norm(x, gamma, beta, *, epsilon=1e-5):
    n = x.shape[-1]

    def element(*i):
        row = [x[(*i[:-1], j)] for j in range(n)]
        mean = math.fsum(row) / n
        variance = math.fsum((v - mean) ** 2 for v in row) / n
        return gamma[i[-1:]] * (x[i] - mean) / math.sqrt(variance + epsilon) + beta[i[-1:]]

    return build(x.shape, element)


def rms_norm(x, weight, *, epsilon=1e-6, dtype=None):
    n = x.shape[-1]

    def element(*i):
        mean_square = math.fsum(x[(*i[:-1], j)] ** 2 for j in range(n)) / n
        return weight[i[-1:]] * x[i] / math.sqrt(mean_square + epsilon)

    return build(x.shape, element)


# -- attention --------------------------------------------------------------------------------------------------------


def attention_scores(query, key, bias=None, *, scale=1.0):
    b, t, h, d = query.shape

    def element(i, head, q, k):
        score = scale * math.fsum(query[i, q, head, j] * key[i, k, head, j] for j in range(d))
        return score if bias is None else score + bias[stretched((i, head, q, k), (bias.shape[0], -1, -1, -1))]

    return build((b, h, t, key.shape[1]), element)


def masked_softmax(scores, mask):
    s = scores.shape[3]

    def permitted(i, q, k):
        return mask[stretched((i, 0, q, k), mask.shape)]

    def element(i, head, q, k):
        keys = [j for j in range(s) if permitted(i, q, j)]
        if not keys:
            return 1.0 / s
        if k not in keys:
            return 0.0
        peak = max(scores[i, head, q, j] for j in keys)
        return exp(scores[i, head, q, k] - peak) / math.fsum(exp(scores[i, head, q, j] - peak) for j in keys)

    return build(scores.shape, element)


def attention_context(weights, value):
    b, h, t, s = weights.shape
    return build(
        (b, t, h, value.shape[3]),
        lambda i, q, head, j: math.fsum(weights[i, head, q, k] * value[i, k, head, j] for k in range(s)),
    )


# -- cache ------------------------------------------------------------------------------------------------------------


def cache_allocate(shape, dtype):
    return build(shape, lambda *_: 0)


def cache_append(cache, new, start=None):
    """Gives what the call returns; the cache afterwards is `cache_after`."""
    starts = [0] * new.shape[0] if start is None else start.values
    after = cache_after(cache, new, start)
    return build((cache.shape[0], max([0, *starts]) + new.shape[1], *cache.shape[2:]), lambda *i: after[i])


def cache_after(cache, new, start=None):
    def element(*i):
        place = i[1] - (0 if start is None else start[i[:1]])
        return new[(i[0], place, *i[2:])] if 0 <= place < new.shape[1] else cache[i]

    return build(cache.shape, element)


def cache_select(cache, rows):
    return build((*rows.shape, *cache.shape[1:]), lambda *i: cache[(rows[i[:1]], *i[1:])])


# -- sampling ---------------------------------------------------------------------------------------------------------


def log_softmax(logits, temperature=1.0):
    def element(*i):
        row = [logits[(*i[:-1], j)] for j in range(logits.shape[-1])]
        peak = max(row)
        return (logits[i] - peak) / temperature - math.log(math.fsum(exp((v - peak) / temperature) for v in row))

    return build(logits.shape, element)


def token_log_probs(logits, token_ids):
    logs = log_softmax(logits)
    return build(token_ids.shape, lambda *i: logs[(*i, int(token_ids[i]))])


def greedy_token(logits):
    def element(i):
        row = [logits[i, j] for j in range(logits.shape[1])]
        return row.index(max(row))

    return build(logits.shape[:1], element)


def held_tokens(token_ids, mask, i):
    """The tokens of row i."""
    return [token_ids[i, j] for j in range(mask.shape[1]) if mask[i, j]]


def penalise_repetition(logits, token_ids, mask, penalty):
    def element(i, j):
        score, factor = logits[i, j], penalty[(i,)]
        if j not in held_tokens(token_ids, mask, i):
            return score
        return score * factor if score < 0 else score / factor

    return build(logits.shape, element)


def forbid_ngrams(logits, token_ids, mask, size):
    def element(i, j):
        n, longer = size[(i,)], [*held_tokens(token_ids, mask, i), j]
        runs = [tuple(longer[k : k + n]) for k in range(len(longer) - n + 1)]
        return -math.inf if n > 0 and runs and runs[-1] in runs[:-1] else logits[i, j]

    return build(logits.shape, element)


def allow_tokens(logits, allowed):
    return build(logits.shape, lambda *i: logits[i] if allowed[i] else -math.inf)


def has_choice(logits):
    return build(logits.shape[:1], lambda i: max(logits[i, j] for j in range(logits.shape[1])) > -math.inf)


def candidates(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """[(token, probability), ...] of what may be drawn, most likely first, and how far top_p and min_p are from another."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))[:top_k]
    peak = row[order[0]]
    weights = [exp((row[token] - peak) / temperature) for token in order]
    total = math.fsum(weights)
    likely, kept, margin = [w / total for w in weights], [], math.inf
    for rank, token in enumerate(order):
        before = math.fsum(likely[:rank])
        if top_p is not None and rank > 0:
            margin = min(margin, abs(before - top_p))
            if before > top_p:
                break
        if min_p is not None and rank > 0:
            margin = min(margin, abs(weights[rank] - min_p))
            if weights[rank] < min_p:
                break
        kept.append((token, likely[rank]))
    total = math.fsum(p for _, p in kept)
    return [(token, p / total) for token, p in kept], margin


def sample_token(logits, uniform, **settings):
    """`settings` are tensors with an entry for each row, or None."""

    def element(i):
        row = [logits[i, j] for j in range(logits.shape[1])]
        kept, _ = candidates(row, **{name: values[(i,)] for name, values in settings.items() if values is not None})
        reached = 0.0
        for token, probability in kept:
            reached += probability
            if uniform[(i,)] < reached:
                return token
        return [token for token, probability in kept if probability > 0][-1]

    return build(logits.shape[:1], element)


def beam_candidates(log_probabilities, scores, count):
    b, v = log_probabilities.shape
    logs = log_probabilities
    ranked = sorted((-(scores[(i,)] + logs[i, j]), i, j) for i in range(b) for j in range(v))[:count]
    size = (len(ranked),)
    return tuple(Tensor(size, [sign * entry[part] for entry in ranked]) for part, sign in ((0, -1), (1, 1), (2, 1)))


def likeliest_tokens(logits, count, *, temperature=1.0):
    b, v = logits.shape
    logs = log_softmax(logits, temperature)
    ranked = [sorted(range(v), key=lambda j: (-logits[i, j], j))[:count] for i in range(b)]
    shape = (b, min(count, v))
    tokens = build(shape, lambda i, k: ranked[i][k])
    return build(shape, lambda i, k: exp(logs[i, tokens[i, k]])), tokens


def contrastive_scores(probabilities, hidden, earlier, alpha):
    """What `contrastive_choice` compares."""

    def cosine(x, y):
        lengths = math.sqrt(math.fsum(v * v for v in x)) * math.sqrt(math.fsum(v * v for v in y))
        return math.fsum(v * w for v, w in zip(x, y, strict=True)) / lengths if lengths else 0.0

    n = range(hidden.shape[1])
    past = [[earlier[0, j, m] for m in n] for j in range(earlier.shape[1])]
    likeness = [max(cosine([hidden[i, m] for m in n], y) for y in past) for i in range(hidden.shape[0])]
    shares = [probabilities[0, i] for i in range(hidden.shape[0])]
    return [
        (1.0 - alpha) * share - alpha * like if share > 0 else -math.inf for share, like in zip(shares, likeness, strict=True)
    ]


def contrastive_choice(probabilities, hidden, earlier, *, alpha):
    scores = contrastive_scores(probabilities, hidden, earlier, alpha)
    return Tensor((1,), [scores.index(max(scores))])


# -- quantised weights ------------------------------------------------------------------------------------------------


def single(x):
    """x rounded to float32. One operation on two float32 numbers, rounded to double before, comes out the same."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def row_scale(x):
    def element(*i):
        row = [single(x[(*i, j)]) for j in range(x.shape[-1])]
        if not all(map(math.isfinite, row)):
            return math.nan
        return single(127.0 / single(max(map(abs, row), default=0.0) + single(1e-7)))

    return build(x.shape[:-1], element)


def quantize_rows(x, scale):
    def element(*i):
        level = single(x[i]) * single(scale[i[:-1]])
        if math.isnan(level):
            return 0
        level = single(level)
        return max(-127, min(127, round(level) if math.isfinite(level) else math.copysign(127, level)))

    result = build(x.shape, element)
    return Tensor(result.shape, [int(v) for v in result.values])


def linear_int8(values, scale, kernel, kernel_scale, bias=None, *, dtype):
    def element(*i):
        total = sum(values[(*i[:-1], j)] * kernel[j, i[-1]] for j in range(kernel.shape[0]))
        return total / (scale[i[:-1]] * kernel_scale[i[-1:]]) + (bias[i[-1:]] if bias else 0.0)

    return build((*values.shape[:-1], kernel.shape[1]), element)


def linear_weight_int8(x, kernel, kernel_scale, bias=None, *, dtype=None):
    kernel = build(kernel.shape, lambda i, j: kernel.values[i * kernel.shape[1] + j] / kernel_scale[(j,)])
    return linear(x, kernel, bias)


def nibble(byte, high):
    """The number from -8 to 7 in the low or high four bits of a byte, which is given signed."""
    four = byte % 256 // 16 if high else byte % 16
    return four - 16 if four > 7 else four


def pack_int4(values, *, axis=-1):
    axis %= len(values.shape)
    shape = list(values.shape)
    shape[axis] = -(-shape[axis] // 2)

    def element(*i):
        def four(place):
            return values[(*i[:axis], place, *i[axis + 1 :])] % 16 if place < values.shape[axis] else 0

        byte = four(2 * i[axis]) + 16 * four(2 * i[axis] + 1)
        return byte - 256 if byte > 127 else byte

    return build(shape, element)


def unpack_int4(packed, size, *, axis=-1):
    axis %= len(packed.shape)
    shape = (*packed.shape[:axis], size, *packed.shape[axis + 1 :])
    return build(shape, lambda *i: nibble(packed[(*i[:axis], i[axis] // 2, *i[axis + 1 :])], i[axis] % 2))


def linear_int4(x, kernel, kernel_scale, kernel_zero, g_idx, bias=None, *, axis=-1, dtype=None):
    size, columns = x.shape[-1], kernel_scale.shape[1]
    levels = unpack_int4(kernel, size if axis == 0 else columns, axis=axis)

    def weight(i, j):
        place = int(g_idx[(i,)]), j
        return (levels[i, j] - kernel_zero[place]) * kernel_scale[place]

    return linear(x, build((size, columns), weight), bias)


def embedding_int8(ids, embeddings, embeddings_scale, *, dtype):
    def element(*i):
        row = ids[i[:-1]]
        return embeddings[row, i[-1]] / embeddings_scale[(row,)]

    return build((*ids.shape, embeddings.shape[1]), element)


def int4_table(embeddings, embeddings_scale, embeddings_zero, g_idx):
    levels = unpack_int4(embeddings, g_idx.shape[0])

    def element(i, j):
        place = i, int(g_idx[(j,)])
        return (levels[i, j] - embeddings_zero[place]) * embeddings_scale[place]

    return build(levels.shape, element)


def embedding_int4(ids, embeddings, embeddings_scale, embeddings_zero, g_idx, *, dtype):
    return embedding(ids, int4_table(embeddings, embeddings_scale, embeddings_zero, g_idx), dtype=dtype)


def transposed(table):
    return build(table.shape[::-1], lambda i, j: table[j, i])


def logits_int8(values, scale, embeddings, embeddings_scale, *, dtype):
    return linear_int8(values, scale, transposed(embeddings), embeddings_scale, dtype=dtype)


def logits_weight_int8(x, embeddings, embeddings_scale):
    return linear_weight_int8(x, transposed(embeddings), embeddings_scale)


def logits_int4(x, embeddings, embeddings_scale, embeddings_zero, g_idx):
    return linear(x, transposed(int4_table(embeddings, embeddings_scale, embeddings_zero, g_idx)))


ORACLES = {
    function.__name__: function
    for function in (
        add, multiply, scaled, relu, gelu, gelu_approximate, silu, linear_activation, dropout, split_heads, merge_heads,
        linear, lora_merged, lora_product,
        embedding, logits_from_embeddings, last_rows, causal_mask, key_mask, token_positions, relative_position_buckets,
        relative_position_bias, alibi_slopes, alibi_bias, layer_norm, rms_norm, attention_scores, masked_softmax,
        attention_context, cache_allocate, cache_append, cache_select, log_softmax, token_log_probs,
        greedy_token, sample_token,
        row_scale, quantize_rows, linear_int8, linear_weight_int8, pack_int4, unpack_int4, linear_int4, embedding_int8,
        embedding_int4, logits_int8, logits_weight_int8, logits_int4,
        beam_candidates, penalise_repetition, forbid_ngrams, allow_tokens, has_choice, likeliest_tokens, contrastive_choice,
    )
}  # fmt: skip
