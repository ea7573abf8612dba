"""Every primitive op against the oracle: right values within the op's error model, for every type, size and memory layout."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 -- registers bfloat16
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from oracle import ORACLES, Tensor

import refmodels
from refmodels.numerics import UNIT_ROUNDOFF, compare, judge, multilinear
from refmodels.op import OPS
from refmodels.ops.attention import attention, attention_scores, masked_softmax
from refmodels.ops.cache import cache_append
from refmodels.ops.elementwise import dropout, gelu, gelu_approximate, relu, silu
from refmodels.ops.linear import last_rows, linear
from refmodels.ops.mask import causal_mask
from refmodels.ops.norm import layer_norm, rms_norm
from refmodels.ops.position import alibi_bias, alibi_slopes, relative_position_buckets
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.quantize import row_scale
from refmodels.ops.sampling import beam_candidates, forbid_ngrams, greedy_token, log_softmax, sample_token

PROFILE = settings(max_examples=80, suppress_health_check=list(HealthCheck))

PRIMITIVES = {name: op for name, op in OPS.items() if not op.composite and op.reference.__module__.startswith("refmodels.")}
FLOATS = ("float32", "float64", "float16", "bfloat16")
SUBNORMAL = {"float32": 1e-40, "float64": 5e-310, "float16": 3e-7, "bfloat16": 1e-39}
LARGE = {"float32": 3e38, "float64": 1e308, "float16": 6e4, "bfloat16": 3e38}
LAYOUTS = ("C", "F", "strided", "reversed", "read-only")


# -- drawing calls ----------------------------------------------------------------------------------------------------


def laid_out(array, layout):
    """The same values in another memory layout."""
    if layout == "F":
        return array.copy(order="F")
    if layout == "strided":
        wide = np.zeros([2 * size + 1 for size in array.shape], array.dtype)
        view = wide[(..., *(slice(1, None, 2) for _ in array.shape))]
        view[...] = array
        return view
    if layout == "reversed":
        flip = (slice(None, None, -1),) * array.ndim
        return array[flip].copy()[flip]
    result = array.copy()
    result.flags.writeable = layout != "read-only"
    return result


@dataclass
class Case:
    """A call, and what the oracle needs to be told beside it.

    `dtype` is the type that the result must have. For an op with a calibrated model, whose bound is made of the reference's own
    error, `condition` and `terms` give the bound that the reference itself is held to: 2 gamma_terms * condition + u |y|.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: Any = None
    condition: Any = None
    terms: int = 1
    oracle_kwargs: dict[str, Any] | None = None


class Draw:
    """Hypothesis draws the sizes, the kind of values and the layouts; a seeded generator draws the bulk."""

    def __init__(self, data):
        self.data = data
        self.dtype = data.draw(st.sampled_from(FLOATS), "dtype")
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
        self.scale = data.draw(st.sampled_from([1.0, 1e-3, 30.0]), "scale")

    def pick(self, *values, label=None):
        return self.data.draw(st.sampled_from(values), label)

    def size(self, letter, low=0, high=9):
        # The smallest size, often 0, is one choice among many: what is empty says little about the arithmetic.
        return self.data.draw(st.sampled_from([*range(max(low, 1), high + 1)] * 3 + [low]), letter)

    def lead(self):
        """Leading axes `*b`."""
        return tuple(self.data.draw(st.lists(st.sampled_from([1, 2, 3, 4] * 3 + [0]), max_size=2), "*b"))

    def layout(self, array, *, writeable=False):
        layout = self.pick(*(LAYOUTS[:-1] if writeable else LAYOUTS), label="layout")
        return laid_out(array, layout)

    def floats(self, *shape, dtype=None, limit=None, spikes=(), positive=False):
        """Normal values, with a few spikes: zeros, a subnormal, values up to `limit` (the type's largest) and `spikes`."""
        dtype = dtype or self.dtype
        values = self.rng.standard_normal(shape) * self.scale
        if values.size and self.pick(True, False, label="spikes"):
            large = LARGE[dtype] if limit is None else min(limit, LARGE[dtype])
            for spike in (0.0, -0.0, SUBNORMAL[dtype], large, -large, *spikes):
                if self.rng.random() < 0.5:
                    values[tuple(self.rng.integers(size) for size in shape)] = spike
        with np.errstate(over="ignore"):
            array = (np.abs(values) if positive else values).astype(numpy_dtype(dtype))
        return self.layout(array)

    def ints(self, *shape, low=0, high=9):
        """Integers from `low` to `high`, which is not drawn."""
        dtype = self.pick(np.int64, np.int32, label="integers")
        return self.layout(self.rng.integers(low, max(high, low + 1), shape).astype(dtype))

    def bools(self, *shape):
        return self.layout(self.rng.random(shape) < self.pick(0.5, 0.0, 0.9, label="share of true"))


CASES = {}


def case(function):
    CASES[function.__name__.removeprefix("case_")] = function
    return function


def f64(x):
    return x.astype(np.float64)


def wide_type(dtype):
    return "float64" if dtype == "float64" else "float32"


def widest(*dtypes):
    return "float64" if "float64" in dtypes else "float32"


@case
def case_add(d):
    x = d.floats(*d.lead(), d.size("n"))
    other = d.pick(d.dtype, "float32", label="dtype of y")  # a float32 branch joins a half-precision stream, and the reverse
    shape = tuple(size if d.pick(True, False, label="same") else 1 for size in x.shape[:-1])
    return Case((x, d.floats(*shape, x.shape[-1], dtype=other)), dtype=d.dtype)


@case
def case_multiply(d):
    x = d.floats(*d.lead(), d.size("n"))
    return Case((x, d.floats(*x.shape)), dtype=d.dtype)


@case
def case_scaled(d):
    return Case((d.floats(*d.lead(), d.size("n")), d.pick(1.0, 0.37, 5**-0.5, label="factor")), dtype=d.dtype)


@case
def case_relu(d):
    return Case((d.floats(*d.lead(), d.size("n"), spikes=(np.inf, -np.inf, np.nan)),), dtype=d.dtype)


@case
def case_linear_activation(d):
    return Case((d.floats(*d.lead(), d.size("n"), spikes=(np.inf, np.nan)),), dtype=d.dtype)


@case
def case_gelu(d):
    x = d.floats(*d.lead(), d.size("n"))
    y = np.abs(f64(x)) * array(Tensor(x.shape, [oracle.normal_cdf(v) for v in f64(x).ravel().tolist()]))
    # d log Phi(x) / dx is about -x in the lower tail: a rounding of x is magnified x**2 times.
    condition = y * (1.0 + np.minimum(f64(x), 0.0).clip(-50) ** 2) + np.abs(f64(x)) * np.finfo(float).tiny
    return Case((x,), dtype=d.dtype, condition=condition, terms=16)


@case
def case_gelu_approximate(d):
    x = d.floats(*d.lead(), d.size("n"), limit=1e12)
    x64 = f64(x)
    u = np.minimum(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3), 0.0)
    y = np.abs(x64) / (1.0 + np.exp(-2.0 * np.maximum(u, -350.0)))
    # A rounding of u is magnified 2|u| times.
    condition = y * (1.0 - 2.0 * u) + flushed(x64, -2.0 * u, d.dtype)
    return Case((x,), dtype=d.dtype, condition=condition, terms=16)


def flushed(x, exponent, dtype):
    """x / (1 + exp(exponent)) is 0 where the exponential overflows: an error of up to |x| over the type's largest number."""
    largest = float(np.finfo(wide_type(dtype)).max)
    lost = np.abs(x) / largest / UNIT_ROUNDOFF[wide_type(dtype)]
    return np.where(exponent > math.log(largest) - 1e-3, lost, 0.0)


@case
def case_silu(d):
    x = d.floats(*d.lead(), d.size("n"), spikes=(-89.5, -95.0, -104.0))
    y = np.abs(array(oracle.silu(tensor(x))))
    return Case((x,), dtype=d.dtype, condition=y + flushed(f64(x), -f64(x), d.dtype), terms=16)


@case
def case_dropout(d):
    x = d.floats(*d.lead(), d.size("n"))
    rate, seed = d.pick(0.0, 0.1, 0.3, 0.5, 0.9, label="rate"), d.size("seed of the mask", high=99)
    if d.pick(True, False, label="without a generator"):
        return Case((x, rate), dtype=d.dtype, oracle_kwargs={})
    kept = np.random.default_rng(seed).random(x.shape, np.float32) >= rate
    kept = tensor(kept) if rate else None
    return Case((x, rate, np.random.default_rng(seed)), dtype=d.dtype, oracle_kwargs={"kept": kept})


@case
def case_split_heads(d):
    heads = d.size("h", 1, 5)
    return Case((d.floats(d.size("b"), d.size("t"), heads * d.size("d", high=5), spikes=(np.nan,)), heads), dtype=d.dtype)


@case
def case_merge_heads(d):
    x = d.floats(d.size("b", high=4), d.size("t", high=5), d.size("h", high=5), d.size("d", high=5), spikes=(np.nan,))
    return Case((x,), dtype=d.dtype)


@case
def case_linear(d):
    k, n = d.size("k"), d.size("n")
    x, kernel = d.floats(*d.lead(), k, limit=1e12), d.floats(k, n, limit=1e12, dtype=d.pick(d.dtype, "float32", label="kernel"))
    bias = d.floats(n, limit=1e12) if d.pick(True, False, label="with bias") else None
    dtype = d.pick(None, "float32", d.dtype, label="dtype of the result")
    return Case((x, kernel, bias), {"dtype": dtype}, dtype=dtype or d.dtype)


def subnormal(dtype):
    """What a product formed on the way is taken to be at least: below it rounding errs by this times u, however small it is."""
    return 2 * float(np.finfo("float64" if dtype == "float64" else "float32").tiny)


@case
def case_lora_product(d):
    k, groups, rank, columns = d.size("k"), d.size("g", 1, 3), d.size("r", 1, 3), d.size("o", high=4)
    x, a, b = d.floats(*d.lead(), k, limit=1e4), d.floats(k, groups, rank, limit=1e4), d.floats(rank, columns, limit=1e4)
    scale = np.float32(d.pick(1.0, 0.5, -3.7, label="scale"))
    dtype = d.pick(None, "float32", d.dtype, label="dtype of the result")
    inner = np.abs(f64(x)) @ np.abs(f64(a)).reshape(k, groups * rank) + subnormal(d.dtype)
    inner = (inner.reshape(*x.shape[:-1], groups, rank) @ np.abs(f64(b)) + subnormal(d.dtype)) * abs(float(scale))
    condition = inner.reshape(*x.shape[:-1], groups * columns)
    args = (x, a, b, np.asarray(scale))
    return Case(args, {"dtype": dtype}, dtype=dtype or d.dtype, condition=condition, terms=k + rank + 2)


@case
def case_lora_merged(d):
    k, groups, rank, columns = d.size("k"), d.size("g", 1, 3), d.size("r", 1, 3), d.size("o", high=4)
    kernel = d.floats(k, groups * columns, limit=1e4)
    wide = "float64" if d.dtype == "float64" else "float32"  # what adapters are kept in
    a, b = d.floats(k, groups, rank, limit=1e4, dtype=wide), d.floats(rank, columns, limit=1e4, dtype=wide)
    scale = np.float32(d.pick(1.0, 0.5, -3.7, label="scale"))
    change = (np.abs(f64(a)) @ np.abs(f64(b)) + subnormal(wide)).reshape(kernel.shape) * abs(float(scale))
    args = (kernel, a, b, np.asarray(scale))
    return Case(args, {}, dtype=d.dtype, condition=np.abs(f64(kernel)) + change, terms=rank + 3)


@case
def case_logits_from_embeddings(d):
    n, v = d.size("n"), d.size("v")
    x, table = d.floats(*d.lead(), n, limit=1e12), d.floats(v, n, limit=1e12)
    return Case((x, table), {"scale": d.pick(1.0, 0.37, 5**-0.5, label="scale")}, dtype=d.dtype)


@case
def case_embedding(d):
    v = d.size("v", 1)
    dtype = d.pick(None, *FLOATS, label="dtype of the result")
    ids = d.ints(*d.lead(), high=v)
    return Case((ids, d.floats(v, d.size("n"), limit=5e4)), {"dtype": dtype}, dtype=dtype or d.dtype)


def int8s(d, *shape, low=-128, high=128):
    return d.layout(d.rng.integers(low, high, shape).astype(np.int8))


def scales(d, *shape, dtype="float32"):
    drawn = np.asarray(10.0 ** d.rng.uniform(-1, 3, shape), dtype)
    return d.layout(drawn) if shape else drawn


def groups_of(d, size):
    """g_idx of `size` inputs, and the number of groups."""
    block = d.size("block", 1, 5)
    return d.layout((np.arange(size) // block).astype(np.float32)), -(-size // block)


def some_bias(d, size):
    return d.floats(size, limit=1e4) if d.pick(True, False, label="with bias") else None


@case
def case_row_scale(d):
    spikes = (np.inf, np.nan) if d.pick(False, False, True, label="not finite") else ()
    x = d.floats(*d.lead(), d.size("k"), spikes=spikes)
    return Case((x if d.pick(True, True, False, label="zeros") else np.zeros_like(x),), dtype="float32")


@case
def case_quantize_rows(d):
    x = d.floats(*d.lead(), d.size("k"), spikes=(np.inf, np.nan))
    scale = row_scale(x) if d.pick(True, True, False, label="its own scale") else scales(d, *x.shape[:-1])
    if d.pick(True, False, label="ties"):  # halves, of either sign
        x, scale = d.layout((d.rng.integers(-9, 9, x.shape) / 2).astype(x.dtype)), np.ones(x.shape[:-1], np.float32)
    return Case((x, scale), dtype="int8")


@case
def case_linear_int8(d):
    values, dtype = int8s(d, *d.lead(), d.size("k")), d.pick(*FLOATS, label="dtype of the result")
    kernel, scale = int8s(d, values.shape[-1], d.size("n")), scales(d, *values.shape[:-1])
    kernel_scale, bias = scales(d, kernel.shape[1]), some_bias(d, kernel.shape[1])
    condition = np.abs(f64(values) @ f64(kernel)) / (f64(scale)[..., None] * f64(kernel_scale)) + absolute(bias)
    return Case((values, scale, kernel, kernel_scale, bias), {"dtype": dtype}, dtype=dtype, condition=condition, terms=3)


def absolute(bias):
    return 0.0 if bias is None else np.abs(f64(bias))


@case
def case_linear_weight_int8(d):
    x, dtype = d.floats(*d.lead(), d.size("k"), limit=1e4), d.pick(None, "float32", d.dtype, label="dtype of the result")
    kernel = int8s(d, x.shape[-1], d.size("n"))
    kernel_scale, bias = scales(d, kernel.shape[1]), some_bias(d, kernel.shape[1])
    condition = np.abs(f64(x)) @ np.abs(f64(kernel)) / f64(kernel_scale) + absolute(bias) + 1e-36
    args = (x, kernel, kernel_scale, bias)
    return Case(args, {"dtype": dtype}, dtype=dtype or d.dtype, condition=condition, terms=len(kernel) + 3)


@case
def case_pack_int4(d):
    return Case((int8s(d, d.size("i"), d.size("j"), low=-8, high=8),), {"axis": d.pick(0, 1, -1, label="axis")}, dtype="int8")


@case
def case_unpack_int4(d):
    axis, packed = d.pick(0, 1, -1, label="axis"), int8s(d, d.size("a"), d.size("c"))
    return Case((packed, max(2 * packed.shape[axis] - d.pick(0, 1, label="padding"), 0)), {"axis": axis}, dtype="int8")


@case
def case_linear_int4(d):
    x, dtype, n = d.floats(*d.lead(), d.size("k"), limit=1e4), d.pick(None, "float32", d.dtype, label="dtype"), d.size("n")
    size, axis = x.shape[-1], d.pick(0, 1, -1, label="axis")
    packed = int8s(d, -(-size // 2), n) if axis == 0 else int8s(d, size, -(-n // 2))
    g_idx, groups = groups_of(d, size)
    scale, zero, bias = scales(d, groups, n), int8s(d, groups, n, low=-8, high=8), some_bias(d, n)
    zero = zero.astype(d.pick(np.int8, np.float32, label="dtype of zero"))
    condition = np.abs(f64(x)) @ (15 * np.abs(f64(scale))[g_idx.astype(int)]) + absolute(bias) + 1e-36
    args = (x, packed, scale, zero, g_idx, bias)
    return Case(args, {"axis": axis, "dtype": dtype}, dtype=dtype or d.dtype, condition=condition, terms=size + 4)


@case
def case_embedding_int8(d):
    table, dtype = int8s(d, d.size("v", 1), d.size("n")), d.pick(*FLOATS, label="dtype")
    return Case((d.ints(*d.lead(), high=len(table)), table, scales(d, len(table))), {"dtype": dtype}, dtype=dtype)


def int4_table(d):
    v, n = d.size("v", 1), d.size("n")
    g_idx, groups = groups_of(d, n)
    return int8s(d, v, -(-n // 2)), scales(d, v, groups), int8s(d, v, groups, low=-8, high=8), g_idx


@case
def case_embedding_int4(d):
    (table, *rest), dtype = int4_table(d), d.pick(*FLOATS, label="dtype")
    return Case((d.ints(*d.lead(), high=len(table)), table, *rest), {"dtype": dtype}, dtype=dtype)


@case
def case_logits_int8(d):
    values, dtype = int8s(d, *d.lead(), d.size("n")), d.pick(*FLOATS, label="dtype of the result")
    table, scale = int8s(d, d.size("v"), values.shape[-1]), scales(d, *values.shape[:-1])
    table_scale = scales(d, len(table))
    condition = np.abs(f64(values) @ f64(table).T) / (f64(scale)[..., None] * f64(table_scale))
    return Case((values, scale, table, table_scale), {"dtype": dtype}, dtype=dtype, condition=condition, terms=3)


@case
def case_logits_weight_int8(d):
    table = int8s(d, d.size("v"), d.size("n"))
    x, scale = d.floats(*d.lead(), table.shape[1], limit=1e4), scales(d, len(table))
    condition = np.abs(f64(x)) @ np.abs(f64(table)).T / f64(scale) + 1e-36
    return Case((x, table, scale), dtype=d.dtype, condition=condition, terms=table.shape[1] + 3)


@case
def case_logits_int4(d):
    table = _, scale, _, g_idx = int4_table(d)
    x = d.floats(*d.lead(), len(g_idx), limit=1e4)
    condition = np.abs(f64(x)) @ (15 * f64(scale)[:, g_idx.astype(int)]).T + 1e-36
    return Case((x, *table), dtype=d.dtype, condition=condition, terms=x.shape[-1] + 4)


@case
def case_last_rows(d):
    x = d.floats(d.size("b"), d.size("t", 1), d.size("n"), spikes=(np.nan,))
    lengths = None if d.pick(True, False, label="no lengths") else d.ints(x.shape[0], low=1, high=x.shape[1] + 1)
    return Case((x, lengths), dtype=d.dtype)


@case
def case_causal_mask(d):
    b, t, s = d.size("b"), d.size("t"), d.size("s")
    rows, others = d.pick((b, b), (1, b), (b, 1), label="rows")
    return Case((d.ints(rows, t, high=12), d.bools(others, s)), dtype="bool")


@case
def case_key_mask(d):
    return Case((d.bools(d.size("b"), d.size("s")),), dtype="bool")


@case
def case_token_positions(d):
    ids = d.ints(d.size("b"), d.size("t"))
    return Case((ids, d.ints(ids.shape[0], high=50) if d.pick(True, False, label="start") else None), dtype="int")


@case
def case_relative_position_buckets(d):
    arguments = {"bidirectional": d.pick(True, False, label="bidirectional")}
    if d.pick(True, False, label="other sizes"):
        arguments |= {"num_buckets": d.pick(8, 16, 32, label="num_buckets"), "max_distance": d.pick(20, 128, 200)}
    positions = d.ints(d.size("b", high=3), d.size("t", high=5), high=d.pick(9, 300, label="furthest"))
    return Case((positions, d.size("s", high=20)), arguments, dtype="int")


@case
def case_relative_position_bias(d):
    r = d.size("r", 1)
    buckets = d.ints(d.size("b", high=3), d.size("t"), d.size("s"), high=r)
    return Case((buckets, d.floats(r, d.size("h"))), dtype=wide_type(d.dtype))


@case
def case_alibi_slopes(d):
    return Case((d.size("h", 1, 130),), dtype="float64")


@case
def case_alibi_bias(d):
    slopes = alibi_slopes(d.size("h", 1, 20))
    positions = d.ints(d.size("b", high=3), d.size("t", high=5), high=d.pick(9, 100_000, label="furthest"))
    arguments = d.pick({}, {"dtype": "float32"}, {"dtype": "float64"}, label="dtype of the result")
    return Case((d.layout(slopes), positions, d.size("s")), arguments, dtype=arguments.get("dtype", "float32"))


def spread(*arrays):
    return np.maximum.reduce([np.abs(a) for a in arrays])


@case
def case_layer_norm(d):
    n = d.size("n")
    x = d.floats(*d.lead(), n, limit=1e8)
    gamma, beta = d.floats(n, limit=1e3), d.floats(n, limit=1e3)
    epsilon = d.pick(1e-5, 1e-3, 1.0, label="epsilon")
    if not x.size:
        return Case((x, gamma, beta), {"epsilon": epsilon}, dtype=d.dtype)
    # The mean's rounding, (n+1) u max|x|, goes over sigma into the result and into the variance. Where that is not small, all
    # that holds is |normalised| <= sqrt(n).
    x64, g = f64(x), np.abs(f64(gamma))
    sigma = np.sqrt(x64.var(-1, keepdims=True) + epsilon)
    normalised = np.abs(x64 - x64.mean(-1, keepdims=True)) / sigma
    largest, u = np.abs(x64).max(-1, keepdims=True), UNIT_ROUNDOFF[wide_type(d.dtype)]
    condition = g * (largest / sigma + 1.0) * (1.0 + normalised) + np.abs(f64(beta))
    condition += (g + 1 / sigma) * np.finfo(wide_type(d.dtype)).tiny
    lost = (n + 8) * u * largest / sigma > 0.05
    condition = np.where(lost, condition + g * math.sqrt(n) / u, condition)
    return Case((x, gamma, beta), {"epsilon": epsilon}, dtype=d.dtype, condition=condition, terms=n + 8)


@case
def case_rms_norm(d):
    n = d.size("n")
    x, weight = d.floats(*d.lead(), n, limit=1e15), d.floats(n, limit=1e3)
    epsilon, dtype = d.pick(1e-6, 1e-3, label="epsilon"), d.pick(None, "float32", d.dtype, label="dtype of the result")
    x64 = f64(x)
    root = np.sqrt((x64**2).sum(-1, keepdims=True) / max(n, 1) + epsilon)
    condition = np.abs(x64) / root * np.abs(f64(weight))
    condition += (np.abs(f64(weight)) + 1 / root) * np.finfo(wide_type(d.dtype)).tiny  # of a subnormal quotient or product
    return Case((x, weight), {"epsilon": epsilon, "dtype": dtype}, dtype=dtype or d.dtype, condition=condition, terms=n + 8)


@case
def case_attention_scores(d):
    b, t, s, h, size = d.size("b", high=3), d.size("t", high=4), d.size("s", high=5), d.size("h", high=3), d.size("d", high=7)
    query, key = d.floats(b, t, h, size, limit=1e12), d.floats(b, s, h, size, limit=1e12)
    bias = d.floats(d.pick(1, b, label="rows"), h, t, s, dtype=wide_type(d.dtype))
    bias = d.pick(bias, None, label="bias")
    return Case((query, key, bias), {"scale": d.pick(1.0, 0.3, label="scale")}, dtype=wide_type(d.dtype))


@case
def case_masked_softmax(d):
    b, h, t, s = d.size("b", high=3), d.size("h", high=3), d.size("t", high=4), d.size("s", high=7)
    scores = d.floats(b, h, t, s, limit=1e30).copy()
    mask = d.bools(d.pick(1, b, label="rows"), 1, d.pick(1, t, label="queries"), s)
    # -inf may stand anywhere but for the highest permitted score of a row.
    if scores.size and d.pick(True, False, label="-inf"):
        permitted = np.where(np.broadcast_to(mask, scores.shape), f64(scores), -np.inf)
        free = (d.rng.random(scores.shape) < 0.3) & (permitted < permitted.max(-1, keepdims=True))
        scores[free] = -np.inf
    scores = d.layout(scores)
    wide = np.where(mask.any(-1, keepdims=True), np.where(mask, f64(scores), -np.inf), 0.0)
    below = wide - wide.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(below) / np.exp(below).sum(-1, keepdims=True)
    # Rounding the difference to the peak, |below| u, multiplies the weight by e**(that), and the sum by their mean.
    distance = np.where(np.isinf(below), 0.0, -below)
    condition = weights * (1.0 + distance + (weights * distance).sum(-1, keepdims=True)) + 1e-37 * (d.dtype != "float64")
    return Case((scores, mask), dtype=wide_type(d.dtype), condition=condition, terms=s + 8)


@case
def case_attention_context(d):
    b, t, s, h, size = d.size("b", high=3), d.size("t", high=4), d.size("s", high=5), d.size("h", high=3), d.size("d", high=7)
    weights = d.floats(b, h, t, s, dtype=wide_type(d.dtype), limit=1.0, positive=True)
    return Case((weights, d.floats(b, s, h, size, limit=1e12)), dtype=d.dtype)


@case
def case_cache_allocate(d):
    dtype = d.pick(*FLOATS, "bool", label="dtype of the cache")
    return Case(((*d.lead(), d.size("positions")), dtype), dtype=dtype)


@case
def case_cache_append(d):
    b, length, rest = d.size("b", high=4), d.size("length", high=4), d.lead()
    start = d.ints(b, high=5) if d.pick(True, False, label="start") else None
    capacity = (0 if start is None else int(start.max(initial=0))) + length + d.size("room", high=3)
    cache = laid_out(np.asarray(d.floats(b, capacity, *rest)), d.pick(*LAYOUTS[:-1], label="layout of the cache"))
    return Case((cache, d.floats(b, length, *rest, spikes=(np.nan,)), start), dtype=d.dtype)


@case
def case_cache_select(d):
    cache = d.floats(d.size("beams", 1), d.size("positions"), *d.lead(), spikes=(np.nan,))
    return Case((cache, d.ints(d.size("b"), high=cache.shape[0])), dtype=d.dtype)


@case
def case_log_softmax(d):
    x = d.floats(*d.lead(), d.size("v", 1), limit=1e30)
    x64, temperature = f64(x), d.pick(1.0, 0.5, 3.0, label="temperature")
    below = (x64 - x64.max(-1, keepdims=True)) / temperature
    total = np.exp(below).sum(-1, keepdims=True)
    condition = np.abs(below) + 1.0 + np.log(total) + (np.exp(below) * -below).sum(-1, keepdims=True) / total
    return Case((x, temperature), dtype=wide_type(d.dtype), condition=condition, terms=x.shape[-1] + 9)


@case
def case_token_log_probs(d):
    x = d.floats(*d.lead(), d.size("v", 1), limit=1e30)
    ids = d.ints(*x.shape[:-1], high=x.shape[-1])
    x64 = f64(x)
    below = x64 - x64.max(-1, keepdims=True)
    total = np.exp(below).sum(-1)
    condition = np.abs(np.take_along_axis(below, ids[..., None], -1)[..., 0]) + 1.0 + np.log(total)
    condition += (np.exp(below) * -below).sum(-1) / total
    return Case((x, ids), dtype=wide_type(d.dtype), condition=condition, terms=x.shape[-1] + 9)


def held_by_rows(d, b, v):
    """Tokens of each of b rows with their mask: few different ones, so that runs come twice."""
    length = d.size("s", high=7)
    return d.ints(b, length, high=min(v, 3)), d.bools(b, length)


@case
def case_penalise_repetition(d):
    logits = d.floats(d.size("b"), d.size("v", 1), spikes=(-np.inf, np.inf))
    factors = d.layout(d.rng.choice([1.0, 1.3, 0.7, 5.0], len(logits)))
    return Case((logits, *held_by_rows(d, *logits.shape), factors), dtype=wide_type(d.dtype))


@case
def case_forbid_ngrams(d):
    logits = d.floats(d.size("b"), d.size("v", 1), spikes=(-np.inf,))
    return Case((logits, *held_by_rows(d, *logits.shape), d.ints(len(logits), high=5)), dtype=wide_type(d.dtype))


@case
def case_allow_tokens(d):
    logits = d.floats(d.size("b"), d.size("v", 1), spikes=(-np.inf, np.inf))
    return Case((logits, d.bools(*logits.shape)), dtype=wide_type(d.dtype))


@case
def case_has_choice(d):
    logits = d.floats(d.size("b"), d.size("v", 1))
    return Case((d.layout(np.where(d.bools(*logits.shape), logits, -np.inf).astype(logits.dtype)),), dtype="bool")


@case
def case_greedy_token(d):
    logits = d.floats(d.size("b"), d.size("v", 1), spikes=(-np.inf, np.inf))
    if d.pick(True, False, label="ties"):
        logits = d.layout(np.round(f64(logits)).astype(logits.dtype))
    return Case((logits,), dtype="int")


@case
def case_sample_token(d):
    logits = d.floats(d.size("b"), d.size("v", 1), limit=1e4, spikes=(1.5, 1.5, 1.5))
    choices = {
        "temperature": [1.0, 0.3, 3.0],
        "top_k": [1, 2, 3, 50],
        "top_p": [0.0, 0.3, 0.77, 1.0, np.inf],
        "min_p": [0.0, 0.2, 0.5, 1.0],
    }
    settings = {
        name: d.layout(d.rng.choice(values, len(logits))) if d.pick(True, False, label=name) else None
        for name, values in choices.items()
    }
    uniform = d.layout(d.rng.random(logits.shape[0]))
    tolerance = 64 * UNIT_ROUNDOFF[wide_type(d.dtype)] * (1 + np.abs(f64(logits)).max(initial=0.0) / 0.3)
    assume(tolerance < 0.01)
    for i, point in enumerate(uniform.tolist()):  # no draw within rounding of a border
        own = {name: values[i].item() for name, values in settings.items() if values is not None}
        kept, margin = oracle.candidates(f64(logits)[i].tolist(), **own)
        borders = np.cumsum([probability for _, probability in kept])[:-1]
        assume(margin > tolerance)
        assume(not (np.abs(borders - point) < tolerance).any())
    oracle_settings = {name: None if values is None else tensor(values) for name, values in settings.items()}
    return Case((logits, uniform), settings, dtype="int", oracle_kwargs=oracle_settings)


@case
def case_beam_candidates(d):
    logits = d.floats(d.size("b", 1, 4), d.size("v", 1), limit=10.0)
    scores = d.layout(d.rng.standard_normal(logits.shape[0]))
    total = np.sort((scores[:, None] + f64(logits)).ravel())
    assume(len(total) < 2 or np.diff(total).min() > 1e-4)  # no ties but exact ones, which have a test of their own
    return Case((logits, scores, d.size("count", 0, 12)), dtype="float64")


@case
def case_likeliest_tokens(d):
    logits = d.floats(d.size("b", 1, 4), d.size("v", 1), limit=10.0)
    return Case((logits, d.size("count", 1, 12)), {"temperature": d.pick(1.0, 0.5, label="temperature")}, wide_type(d.dtype))


@case
def case_contrastive_choice(d):
    hidden = d.floats(d.size("b", 1, 4), d.size("n", 1), limit=10.0)
    earlier = d.layout(d.rng.standard_normal((1, d.size("s", 1, 4), hidden.shape[1])).astype(hidden.dtype))
    shares = d.rng.random((1, len(hidden))) * (d.rng.random((1, len(hidden))) < 0.8)
    assume(shares.any())
    probabilities, alpha = d.layout(shares.astype(wide_type(d.dtype))), d.pick(0.0, 0.6, 1.0, label="alpha")
    scores = sorted(oracle.contrastive_scores(tensor(probabilities), tensor(hidden), tensor(earlier), alpha))
    assume(len(scores) < 2 or scores[-1] - scores[-2] > 1e-4)  # no ties but exact ones
    return Case((probabilities, hidden, earlier), {"alpha": alpha}, dtype="int")


# -- running them -----------------------------------------------------------------------------------------------------


def tensor(value):
    if isinstance(value, np.ndarray):
        return Tensor(value.shape, (value if value.dtype.kind in "iub" else f64(value)).ravel().tolist())
    return value


def array(result):
    floats = not result.values or isinstance(result.values[0], float)
    return np.array(result.values, np.float64 if floats else None).reshape(result.shape)


def matches_annotation(op, case, got):
    """The result's letters have the sizes that they have in the arguments; a letter with # may be 1."""
    bound = op.signature.bind(*case.args, **case.kwargs).arguments
    sizes, leading = {}, None
    for name, shape in op.shapes.items():
        if bound.get(name) is None:
            continue
        own = bound[name].shape
        if shape.dims and shape.dims[0] == "*b":
            leading, own = own[: len(own) - len(shape.dims) + 1], own[len(own) - len(shape.dims) + 1 :]
        letters = shape.dims[1:] if shape.dims[:1] in (("*b",), ("*#b",)) else shape.dims
        for letter, size in zip(letters, own[len(own) - len(letters) :], strict=True):
            if not letter.startswith("#") or letter[1:] not in sizes or sizes[letter[1:]] == 1:
                sizes[letter.lstrip("#")] = size
    dims, shape = op.result.dims, got.shape
    if dims[:1] == ("*b",):
        assert shape[: len(leading)] == leading
        dims, shape = dims[1:], shape[len(leading) :]
    assert len(dims) == len(shape)
    for letter, size in zip(dims, shape, strict=True):
        wanted = int(letter) if letter.isdigit() else sizes.get(letter.lstrip("#"), size)
        assert size == wanted or (letter.startswith("#") and size == 1), f"{op.name}: {letter} is {size}, wanted {wanted}"


def check_dtype(dtype, wanted):
    assert np.dtype(dtype).kind == "i" if wanted == "int" else dtype == numpy_dtype(wanted)


def check_values(op, case, got, truth):
    """The op's own error model; where that is calibrated, the bound that the case derives."""
    if op.error.kind == "exact" or got.dtype.kind in "iub":
        with np.errstate(over="ignore"):
            rounded = truth.astype(got.dtype)
        np.testing.assert_array_equal(f64(got), f64(rounded))
        return
    if op.error.kind == "calibrated":
        verdict = compare(got, truth, multilinear(), condition=case.condition, terms=case.terms, name=op.name)
    elif op.error.kind == "multilinear":
        size = {"linear": 0, "logits_from_embeddings": 0, "attention_scores": 0, "attention_context": 0}[op.name]
        terms = size + case.args[0].shape[-1]
        absolute = [abs_tensor(tensor(value)) for value in case.args]
        condition = array(ORACLES[op.name](*absolute, **case.kwargs))
        verdict = compare(got, truth, op.error, condition=condition, terms=terms, name=op.name)
    else:
        verdict = compare(got, truth, op.error, name=op.name)
    assert verdict, verdict


def abs_tensor(value):
    """As `numerics` has it: absolute values, raised by the smallest normal number."""
    tiny = 2.0**-126
    return Tensor(value.shape, [abs(v) + tiny for v in value.values]) if isinstance(value, Tensor) else value


def truth_of(op, case):
    arguments = case.args[:2] if op.name == "dropout" else case.args  # a generator means nothing to the oracle
    kwargs = case.kwargs if case.oracle_kwargs is None else case.oracle_kwargs
    return ORACLES[op.name](*map(tensor, arguments), **kwargs)


def call(op, case):
    with np.errstate(all="ignore"):
        return op(*case.args, **case.kwargs)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("name", PRIMITIVES)
@given(data=st.data())
@settings(PROFILE)
def test_op_agrees_with_the_oracle(name, data):
    op = PRIMITIVES[name]
    case = CASES[name](Draw(data))
    truth = truth_of(op, case)
    before = {id(a): a.tobytes() for a in [*case.args, *case.kwargs.values()] if isinstance(a, np.ndarray)}
    got = call(op, case)
    bound = op.signature.bind(*case.args, **case.kwargs).arguments
    for argument, value in bound.items():
        assert got is not value or value is None, f"{name} gives its own argument {argument} back"
        if isinstance(value, np.ndarray) and argument not in op.mutates:
            assert value.tobytes() == before[id(value)], f"{name} changed its argument {argument}"
    if isinstance(got, tuple):
        assert isinstance(truth, tuple)
        assert len(got) == len(truth)
        check_dtype(got[0].dtype, case.dtype)
        assert np.abs(got[0] - array(truth[0])).max(initial=0.0) < 1e-4  # its exact test is below
        for part, wanted in zip(got[1:], truth[1:], strict=True):
            np.testing.assert_array_equal(part, array(wanted))
        return
    assert got.shape == truth.shape
    if hasattr(op.result, "dims"):
        matches_annotation(op, case, got)
    check_dtype(got.dtype, case.dtype)
    check_values(op, case, got, array(truth))


def test_every_primitive_has_an_oracle_and_a_test():
    assert set(ORACLES) == set(PRIMITIVES)
    assert set(CASES) == set(PRIMITIVES)


@pytest.mark.parametrize("name", [name for name, op in PRIMITIVES.items() if {"rowwise", "elementwise"} & set(op.laws)])
@given(data=st.data())
@settings(PROFILE, max_examples=40)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_each_row_is_computed_alone(name, data):
    """The law `rowwise`: row i of the result is the result of row i. `elementwise`: so is each element."""
    op = PRIMITIVES[name]
    case = CASES[name](Draw(data))
    if name == "dropout":
        case = Case(case.args[:2])  # with a generator each place has a draw of its own
    bound = op.signature.bind(*case.args, **case.kwargs).arguments
    got = call(op, case)
    assume(got.ndim > 0 and got.size)
    given = [a for a in bound if a in op.shapes and bound[a] is not None]
    rowwise = [a for a in given if op.shapes[a].dims[:1] in (("*b",), ("*#b",), ("b",))]
    leading = got.ndim - (op.result.dims[0].startswith("*") and len(op.result.dims) - 1)
    row = data.draw(st.integers(0, got.shape[0] - 1)) if leading else 0

    def cut(value, start, axis):
        return value if value.shape[axis] == 1 else np.take(value, [start], axis)

    if leading:
        for argument in rowwise:
            bound[argument] = cut(bound[argument], row, 0)
        got = got[row : row + 1]
    if "elementwise" in op.laws:
        column = data.draw(st.integers(0, got.shape[-1] - 1))
        for argument in rowwise:
            bound[argument] = np.take(bound[argument], [column], -1)
        got = got[..., column : column + 1]
    with np.errstate(all="ignore"):
        verdict = judge(op, tuple(bound.values())[: len(case.args)], {name: bound[name] for name in case.kwargs}, got)
    assert verdict, verdict


def test_results_do_not_depend_on_the_layout():
    """Bitwise, where no sum is involved; the sums are held to the oracle in every layout above."""
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32) * 3
    for op in (relu, gelu, gelu_approximate, silu):
        for layout in LAYOUTS:
            np.testing.assert_array_equal(op(laid_out(x, layout)), op(x))


# -- facts about single ops -------------------------------------------------------------------------------------------


def test_silu_known_values():
    x = np.array([0.0, 1.0, -1.0, 20.0, -20.0, -80.0])
    wanted = [0.0, 0.731058578630005, -0.268941421369995, 19.9999999587769, -4.12230723638041e-8, -1.44388111027633e-33]
    np.testing.assert_allclose(silu(x), wanted, rtol=2e-14)
    np.testing.assert_allclose(silu(x.astype(np.float32)), wanted, rtol=1e-6)
    far = silu(np.array([-1e4, -200.0, 200.0, 1e4], np.float32))  # no NaN and no warning where the exponential overflows
    assert far.tolist() == [0.0, 0.0, 200.0, 1e4]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_known_values(dtype):
    x = np.array([0.0, 1.0, -1.0, 3.0, -3.0, -8.0], dtype)
    erf_form = [0.0, 0.841344746068543, -0.158655253931457, 2.99595030590511, -0.00404969409489028, -4.97676845941743e-15]
    tanh_form = [0.0, 0.841191990608277, -0.158808009391723, 2.996362607918227, -0.003637392081773019, -3.10778293750111122e-21]
    rtol = {"float32": 1e-5, "float64": 2e-14}[dtype]  # the tanh form's own condition at -8 is 2|u| = 49
    np.testing.assert_allclose(gelu(x), erf_form, rtol=rtol)
    np.testing.assert_allclose(gelu_approximate(x), tanh_form, rtol=rtol)
    assert np.abs(gelu(x) - gelu_approximate(x)).max() > 1e-4  # the two forms are different functions


@settings(PROFILE)
@given(
    shift=st.sampled_from([-130_000, 130_000]) | st.integers(-2000, 2000),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_softmax_does_not_see_a_shift(shift, seed, dtype):
    """Scores in steps of 1/64 take an integer shift without rounding: then the results are the same bits."""
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-640, 640, (2, 3, 4, 5)) / 64).astype(dtype)
    mask = rng.random((2, 1, 4, 5)) < 0.7
    np.testing.assert_array_equal(masked_softmax(scores + dtype_of(scores, shift), mask), masked_softmax(scores, mask))
    np.testing.assert_array_equal(log_softmax(scores + dtype_of(scores, shift)), log_softmax(scores))


@settings(PROFILE)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_softmax_sees_of_any_shift_only_its_rounding(seed, shift):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((1, 2, 3, 6)).astype(np.float32) * 5
    mask = rng.random((1, 1, 3, 6)) < 0.7
    moved = scores + np.float32(shift)
    weights = f64(masked_softmax(f64(scores), mask))
    # Adding the shift rounds each score by u |score + shift|; that much the logarithm of a weight may move, twice over.
    condition = weights * 2 * (1 + np.abs(f64(moved)).max() + 2 * np.abs(f64(scores)).max())
    verdict = compare(masked_softmax(moved, mask), weights, multilinear(), condition=condition, terms=14)
    assert verdict, verdict


def dtype_of(x, value):
    return x.dtype.type(value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_fully_masked_row_weighs_all_keys_alike(dtype):
    scores = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(numpy_dtype(dtype)) * 9
    mask = np.ones((2, 1, 4, 5), bool)
    mask[0, 0, 1], mask[1] = False, False
    weights = masked_softmax(scores, mask)
    assert (weights[0, :, 1] == dtype_of(weights, 0.2)).all()
    assert (weights[1] == dtype_of(weights, 0.2)).all()
    assert (weights[0, :, 0] != dtype_of(weights, 0.2)).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_masked_keys_weigh_nothing_whatever_they_hold(dtype):
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((1, 2, 3, 4)).astype(numpy_dtype(dtype))
    mask = np.array([True, False, True, False]).reshape(1, 1, 1, 4)
    wanted = masked_softmax(scores, mask)
    for value in (np.inf, -np.inf, np.nan, 6e4):
        scores[..., 1] = value
        got = masked_softmax(scores, mask)
        np.testing.assert_array_equal(got, wanted)
    assert (wanted[..., [1, 3]] == 0).all()
    np.testing.assert_allclose(f64(wanted).sum(-1), 1.0, rtol=1e-6)


def test_half_precision_scores_and_weights_stay_float32():
    """The promise of the documentation: softmax in float32 or wider. float16 could not tell these two weights apart."""
    for dtype in ("float16", "bfloat16"):
        query = np.full((1, 1, 1, 1), 1.0, numpy_dtype(dtype))
        key = np.array([1.0, 1.0 + 2.0**-7]).astype(numpy_dtype(dtype)).reshape(1, 2, 1, 1)
        scores = attention_scores(query, key, scale=0.01)
        assert scores.dtype == np.float32
        weights = masked_softmax(scores, np.ones((1, 1, 1, 2), bool))
        assert weights.dtype == np.float32
        assert weights[0, 0, 0, 0] < weights[0, 0, 0, 1]
        assert masked_softmax(scores.astype(numpy_dtype(dtype)), np.ones((1, 1, 1, 2), bool)).dtype == np.float32


def test_attention_is_its_equation():
    rng = np.random.default_rng(3)
    query, key, value = (rng.standard_normal((2, size, 3, 4)) for size in (2, 5, 5))
    mask, bias = rng.random((2, 1, 2, 5)) < 0.8, rng.standard_normal((1, 3, 2, 5))
    weights = oracle.masked_softmax(oracle.attention_scores(*map(tensor, (query, key, bias)), scale=0.5), tensor(mask))
    wanted = array(oracle.attention_context(weights, tensor(value)))
    np.testing.assert_allclose(attention(query, key, value, mask, bias, scale=0.5), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_up_to_300_both_ways(bidirectional):
    positions = np.array([[0, 300]])
    got = relative_position_buckets(positions, 301, bidirectional=bidirectional)
    wanted = oracle.relative_position_buckets(tensor(positions), 301, bidirectional=bidirectional)
    np.testing.assert_array_equal(got, array(wanted))
    side = (16 if bidirectional else 32), 128
    back = got[0, 1, ::-1]  # from distance 0 to distance 300, keys before the query
    first = [int(np.argmax(back == bucket)) for bucket in range(side[0])]
    assert first == oracle.FIRST_DISTANCES[side]
    ahead = got[0, 0]
    np.testing.assert_array_equal(ahead, np.where(np.arange(301) > 0, back + 16, back) if bidirectional else 0)


def test_bucket_boundaries_one_by_one():
    def bucket(relative, bidirectional):
        query = max(-relative, 0)
        return relative_position_buckets(np.array([[query]]), query + relative + 1, bidirectional=bidirectional)[0, 0, -1]

    for distance, encoder, decoder in [
        (0, 0, 0), (1, 1, 1), (7, 7, 7), (8, 8, 8), (11, 8, 11), (12, 9, 12), (15, 9, 15), (16, 10, 16), (18, 10, 16),
        (19, 10, 17), (20, 10, 17), (21, 10, 18), (22, 10, 18), (23, 11, 18), (31, 11, 21), (32, 12, 21), (45, 12, 23),
        (46, 13, 24), (63, 13, 26), (64, 14, 26), (90, 14, 29), (91, 15, 29), (98, 15, 29), (99, 15, 30), (112, 15, 30),
        (113, 15, 31), (127, 15, 31), (128, 15, 31), (129, 15, 31), (100_000, 15, 31),
    ]:  # fmt: skip
        assert bucket(-distance, True) == encoder
        assert bucket(-distance, False) == decoder
        assert bucket(distance, True) == encoder + 16 * (distance > 0)
        assert bucket(distance, False) == 0


def test_slopes_for_1_to_130_heads():
    for heads in range(1, 131):
        slopes = alibi_slopes(heads)
        assert slopes.shape == (heads,)
        assert slopes.dtype == np.float64
        verdict = compare(slopes, np.array(oracle.slopes(heads)), alibi_slopes.error)
        assert verdict, f"{heads} heads: {verdict}"
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    np.testing.assert_allclose(alibi_slopes(3), [2**-4, 2**-8, 2**-2], rtol=1e-15)
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rtol=1e-15)


def test_alibi_is_relative_to_the_query_and_exact_far_out():
    bias = alibi_bias(np.array([0.5, 0.25]), np.array([[70_001, 3]]), 70_003)
    assert bias.dtype == np.float32
    assert bias[0, :, 0, 70_000].tolist() == [-0.5, -0.25]
    assert bias[0, :, 0, 70_001].tolist() == [0.0, 0.0]
    assert bias[0, :, 1, 0].tolist() == [-1.5, -0.75]


def test_causal_mask_known():
    mask = causal_mask(np.array([[0, 1, 2]]), np.array([[True, False, True], [True, True, True]]))
    assert mask[0, 0].astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert mask[1, 0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_norms_known():
    x, ones = np.array([[3.0, 4.0, 3.0, 4.0]]), np.ones(4)
    np.testing.assert_allclose(rms_norm(x, ones, epsilon=1e-12), x / math.sqrt(12.5), rtol=1e-12)
    np.testing.assert_allclose(layer_norm(x, 2 * ones, ones, epsilon=0.75), [[0, 2, 0, 2]], rtol=1e-12)
    np.testing.assert_array_equal(layer_norm(np.full((1, 4), 7.0), ones, 5 * ones), [[5, 5, 5, 5]])


def test_layer_norm_does_not_cancel():
    """Deviations of 1 around 4096: the one-pass variance E x**2 - (E x)**2 would have lost them in float32."""
    x = (4096 + np.array([[-1, 1, -1, 1, -1, 1, 1, -1]])).astype(np.float32)
    got = layer_norm(x, np.ones(8, np.float32), np.zeros(8, np.float32), epsilon=1e-12)
    np.testing.assert_allclose(got, x - 4096, rtol=1e-6)


def test_linear_accumulates_halves_in_float32():
    for dtype, size in (("float16", 4096), ("bfloat16", 1024)):
        ones = np.ones((1, size), numpy_dtype(dtype))
        assert float(linear(ones, ones.T)[0, 0]) == size  # one by one in its own type the sum stops at 2048 or 256


def test_last_rows_known():
    x = np.arange(12.0).reshape(2, 3, 2)
    assert last_rows(x).tolist() == [[4, 5], [10, 11]]
    assert last_rows(x, np.array([1, 2])).tolist() == [[0, 1], [8, 9]]


# -- cache ------------------------------------------------------------------------------------------------------------


@settings(PROFILE)
@given(data=st.data())
def test_cache_append_writes_where_it_says_and_nowhere_else(data):
    case = case_cache_append(Draw(data))
    cache, new, start = case.args
    wanted = array(oracle.cache_after(tensor(cache), tensor(new), tensor(start)))
    result = cache_append(cache, new, start)
    np.testing.assert_array_equal(f64(cache), wanted)
    np.testing.assert_array_equal(f64(result), wanted[:, : result.shape[1]])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cache_append_past_the_end_is_an_error(length):
    """Not silence: NumPy writes one position into an empty slice without a word."""
    cache, new = np.zeros((2, 3, 1)), np.ones((2, length, 1))
    with pytest.raises((ValueError, IndexError)):
        cache_append(cache, new, np.array([0, 4 - length]))


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(dtype, rate):
    n = 200_000
    x = np.full((n, 1), 3.0, numpy_dtype(dtype))
    y = f64(dropout(x, rate, np.random.default_rng(5)))
    kept = y != 0
    assert abs(kept.sum() - n * (1 - rate)) < 6 * math.sqrt(n * rate * (1 - rate))
    np.testing.assert_allclose(y[kept], 3.0 / (1 - rate), rtol=2 * UNIT_ROUNDOFF[dtype])
    runs = (kept[1:] & kept[:-1]).sum()  # neighbours are independent
    assert abs(runs - n * (1 - rate) ** 2) < 6 * math.sqrt(3 * n * (1 - rate) ** 2)


def test_dropout_comes_from_the_generator_alone():
    x = np.ones((50, 3), np.float32)
    once, again = (dropout(x, 0.4, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (once != dropout(x, 0.4, np.random.default_rng(2))).any()
    generator = np.random.default_rng(1)
    first, second = dropout(x, 0.4, generator), dropout(x, 0.4, generator)
    np.testing.assert_array_equal(first, once)
    assert (first != second).any()


def test_dropout_without_generator_or_rate_is_the_identity():
    x = np.array([[1.0, np.nan, -np.inf, -0.0]])
    untouched = np.random.default_rng(1)
    for y in (dropout(x, 0.9), dropout(x, 0.0, untouched), dropout(x)):
        np.testing.assert_array_equal(y, x)
    assert untouched.random() == np.random.default_rng(1).random()


def test_dropout_of_any_rate_is_within_its_error_model():
    rng = np.random.default_rng(0)
    for rate in rng.random(300).tolist():
        x = rng.standard_normal((1, 500)).astype(np.float32)
        kept = np.random.default_rng(0).random(x.shape, np.float32) >= rate
        truth = np.where(kept, f64(x) / (1.0 - rate), 0.0)
        verdict = compare(dropout(x, rate, np.random.default_rng(0)), truth, dropout.error)
        assert verdict, f"rate {rate}: {verdict}"


# -- sampling ---------------------------------------------------------------------------------------------------------


def for_rows(count, **settings):
    """The same settings for each of `count` rows."""
    return {name: np.full(count, value) for name, value in settings.items()}


def test_greedy_token_takes_the_first_of_equals():
    assert greedy_token(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-np.inf, -np.inf, -9.0]])).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_k": 4, "top_p": 0.5, "temperature": 2.0},
        {"min_p": 0.3, "temperature": 2.0},
    ],
    ids=str,
)
def test_sample_token_draws_with_the_right_frequencies(arguments):
    row, n = [0.3, 1.2, -0.5, 1.1, 0.0, -2.0], 40_000
    uniform = np.random.default_rng(11).random(n)
    drawn = sample_token(np.tile(np.array([row]), (n, 1)), uniform, **for_rows(n, **arguments))
    kept = dict(oracle.candidates(row, **arguments)[0])
    chi_square = 0.0
    for token in range(len(row)):
        expected, count = n * kept.get(token, 0.0), int((drawn == token).sum())
        if token not in kept:
            assert count == 0, f"token {token} is not to be drawn"
            continue
        assert abs(count - expected) < 6 * math.sqrt(expected)
        chi_square += (count - expected) ** 2 / expected
    assert chi_square < 30  # 5 degrees of freedom: one in 70 000


def test_sample_token_keeps_what_top_k_and_top_p_say():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]]))
    grid = np.linspace(0, 1, 1001)[:-1] + 0.0005

    def drawn(**arguments):
        return set(sample_token(np.tile(logits, (1000, 1)), grid, **for_rows(1000, **arguments)).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=1) == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.0) == {1}
    assert drawn(top_p=0.39) == {1}  # the shortest start whose probability exceeds p
    assert drawn(top_p=0.5) == {1, 3}
    assert drawn(top_p=0.75) == {1, 2, 3}
    assert drawn(top_p=1.0) == {0, 1, 2, 3}
    assert drawn(top_k=2, top_p=0.8) == {1, 3}
    assert drawn(min_p=0.0) == {0, 1, 2, 3}
    assert drawn(min_p=0.4) == {1, 2, 3}
    assert drawn(min_p=0.6) == {1, 3}
    assert drawn(min_p=1.0) == {1}
    assert drawn(min_p=0.6, temperature=100.0) == {0, 1, 2, 3}  # of the probabilities after the temperature
    assert drawn(top_p=0.0, min_p=0.1) == {1}


def test_each_row_has_settings_of_its_own():
    logits = np.log(np.tile([[0.1, 0.4, 0.2, 0.3]], (4, 1)))
    points = np.full(4, 0.95)
    assert sample_token(logits, points).tolist() == [0, 0, 0, 0]
    rows = {"temperature": [1.0, 1e-3, 1.0, 1.0], "top_k": [1, 9, 9, 9], "top_p": [9.0, 9.0, 0.5, 9.0], "min_p": [0, 0, 0, 0.5]}
    assert sample_token(logits, points, **{name: np.array(values) for name, values in rows.items()}).tolist() == [1, 1, 3, 2]


def test_forbidden_runs_of_tokens():
    ids, mask = np.array([[1, 2, 3, 1, 2, 0]]), np.array([[True] * 5 + [False]])

    def left(size):
        scores = forbid_ngrams(np.zeros((1, 5)), ids, mask, np.array([size]))
        return [token for token in range(5) if scores[0, token] == 0]

    assert left(0) == [0, 1, 2, 3, 4]
    assert left(1) == [0, 4]
    assert left(2) == left(3) == [0, 1, 2, 4]  # 2 3 and 1 2 3 are there already
    assert left(4) == [0, 1, 2, 3, 4]
    assert left(9) == [0, 1, 2, 3, 4]


def test_sample_token_lays_tokens_out_from_the_most_likely():
    logits = np.tile(np.log(np.array([[0.1, 0.4, 0.2, 0.3]])), (4, 1))
    assert sample_token(logits, np.array([0.39, 0.41, 0.71, 0.91])).tolist() == [1, 3, 2, 0]
    ties = np.zeros((3, 3))
    assert sample_token(ties, np.array([0.0, 0.34, 0.99])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_sample_token_never_draws_what_cannot_be(dtype):
    """At the ends of [0, 1) too, or at a 1 that a narrower type has rounded up; and where most scores are -inf."""
    logits = np.array([[-np.inf, 2.0, -np.inf, 1.0], [0.0, -np.inf, -np.inf, -np.inf]]).astype(numpy_dtype(dtype))
    for point in (0.0, 0.5, np.nextafter(1.0, 0.0), 1.0):
        first, second = sample_token(logits, np.array([point, point]))
        assert first in (1, 3)
        assert second == 0


def test_beam_candidates_are_the_best_sums_of_log_probabilities():
    rng = np.random.default_rng(2)
    for dtype in ("float32", "float64"):
        logits, scores = log_softmax(rng.standard_normal((3, 7)).astype(dtype)), rng.standard_normal(3)
        total, beams, tokens = beam_candidates(logits, scores, 6)
        wanted, wanted_beams, wanted_tokens = oracle.beam_candidates(tensor(logits), tensor(scores), 6)
        assert beams.tolist() == wanted_beams.values
        assert tokens.tolist() == wanted_tokens.values
        np.testing.assert_allclose(total, wanted.values, rtol=20 * UNIT_ROUNDOFF[dtype])
        assert (np.diff(total) <= 0).all()


def test_beam_candidates_breaks_ties_by_beam_and_token():
    _, beams, tokens = beam_candidates(np.zeros((2, 3)), np.zeros(2), 4)
    assert (beams.tolist(), tokens.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 0])
    _, beams, _ = beam_candidates(np.zeros((2, 3)), np.zeros(2), 99)
    assert len(beams) == 6


@settings(PROFILE, max_examples=20)
@given(dtype=st.sampled_from(FLOATS))
@example(dtype="float64")
def test_every_float_op_gives_empty_for_empty(dtype):
    x = np.zeros((0, 3), numpy_dtype(dtype))
    vector = np.ones(3, numpy_dtype(dtype))
    for op in (relu, gelu, gelu_approximate, silu, log_softmax):
        assert op(x).shape == (0, 3)
    assert layer_norm(x, vector, vector).shape == rms_norm(x, vector).shape == (0, 3)
    assert linear(x, np.ones((3, 4), x.dtype)).shape == (0, 4)
    assert linear(np.zeros((2, 0), x.dtype), np.ones((0, 4), x.dtype), np.ones(4, x.dtype)).tolist() == [[1.0] * 4] * 2


def test_the_oracle_is_no_numpy():
    """Its own equations: the file imports nothing but the standard library."""
    source = Path(oracle.__file__).read_text()
    assert "import numpy" not in source
    assert "refmodels." not in source.split('"""', 2)[2]
    assert refmodels.__name__ not in sys.modules["oracle"].__dict__
