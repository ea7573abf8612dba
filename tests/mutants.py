"""Planted faults: the mistakes that are made in the field, one at a time, to test the tests.

A mutant of an op is an `Accelerator` with one wrong kernel: the op's own body with a piece of its text replaced. So it stays in
step with the code, and fails loudly when the text is no longer there. What is no op (the table of weight names, the loop of
generation) is rewritten where it stands, in the same way. `test_mutants.py` holds that the suite rejects each of them.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from refmodels import (
    Accelerator,
    bloom,
    causal_lm,
    generate,
    lora,
    lora_files,
    opt,
    preprocessors,
    quantization,
    seq_2_seq_lm,
    t5,
    task,
    use,
)
from refmodels.backbone import Backbone
from refmodels.ops import attention, cache, dense, elementwise, heads, linear, mask, norm, position, quantize, sampling
from refmodels.ops.precision import compute_dtype
from refmodels.weights import huggingface, keras_config, keras_lora, peft, torch_bin, torch_legacy

Change = tuple[str, str]


@dataclass(frozen=True)
class Mutant:
    """One fault: its name, what it does wrong, the block in which it is in force, and the areas whose tests must see it."""

    name: str
    fault: str
    plant: Callable[[], AbstractContextManager[Any]]
    areas: tuple[str, ...]


def rewritten(function: Callable[..., Any], changes: tuple[Change, ...]) -> Callable[..., Any]:
    """The function compiled again with each `old` text replaced by `new`. Each `old` must occur exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    source = source[re.search("^def ", source, re.MULTILINE).start() :]  # without its decorators
    for old, new in changes:
        found = source.count(old)
        if found != 1:
            raise LookupError(f"stale mutant: {old!r} occurs {found} times in {function.__qualname__}")
        source = source.replace(old, new)
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile(source, f"<mutant of {function.__qualname__}>", "exec"), namespace)
    return namespace[function.__name__]


MUTANTS: list[Mutant] = []
REORDERINGS: list[Mutant] = []
"""Not faults: the same sums in another order, which the tests must let pass."""


def mutate(target: Any, name: str, fault: str, *changes: Change, areas: str = "") -> None:
    """Enter a mutant of an op, with these changes to its text. A primitive has its own name for an area."""
    MUTANTS.append(mutant_of_op(target, name, fault, lambda: rewritten(target.reference, changes), areas))


def replace(target: Any, name: str, fault: str, other: Any) -> None:
    """Enter a mutant of an op: another op in its place."""
    MUTANTS.append(mutant_of_op(target, name, fault, lambda: other.reference, ""))


def reorder(target: Any, name: str, what: str, *changes: Change, areas: str = "") -> None:
    """Enter a right kernel of an op, with these changes to its text."""
    REORDERINGS.append(mutant_of_op(target, name, what, lambda: rewritten(target.reference, changes), areas))


def mutant_of_op(target: Any, name: str, fault: str, kernel: Callable[[], Callable[..., Any]], areas: str) -> Mutant:
    @contextmanager
    def plant() -> Iterator[None]:
        accelerator = Accelerator(name)
        accelerator.kernel(target)(kernel())
        with use(accelerator):
            yield

    own = () if target.composite else (target.name,)
    return Mutant(name, fault, plant, (*own, *areas.split()))


def mutate_function(function: Any, name: str, fault: str, *changes: Change, areas: str) -> None:
    """Enter a mutant of a function or method that is no op. Its code is replaced, wherever it has been imported to."""
    set_attribute(function, "__code__", name, fault, lambda: rewritten(function, changes).__code__, areas=areas)


def set_attribute(owner: Any, attribute: str, name: str, fault: str, value: Callable[[], Any], *, areas: str) -> None:
    """Enter a mutant that gives `attribute` of a module, class or function another value."""

    @contextmanager
    def plant() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, value())
            yield

    MUTANTS.append(Mutant(name, fault, plant, tuple(areas.split())))


# -- Quantised weights ---------------------------------------------------------------------------------------------------------

PRODUCTS = "linear_int8 logits_int8"
INT4 = "linear_int4 embedding_int4 logits_int4"

mutate_function(
    quantize._rescaled,
    "scales multiplied",
    "the sum is multiplied by the scales, not divided",
    ("/ (scale.astype", "* (scale.astype"),
    areas=PRODUCTS,
)
mutate_function(
    quantize._rescaled,
    "scale of the inputs forgotten",
    "the sum is divided by the kernel's scale alone",
    ("scale.astype(compute)[..., None] * kernel_scale", "kernel_scale"),
    areas=PRODUCTS,
)
mutate_function(
    quantize._integer_product,
    "sum in int16",
    "the products are added in sixteen bits",
    (
        "rows[:, :_EXACT_TERMS].astype(np.float32) @ kernel[:_EXACT_TERMS].astype(np.float32)",
        "rows[:, :_EXACT_TERMS].astype(np.int16) @ kernel[:_EXACT_TERMS].astype(np.int16)",
    ),
    areas=PRODUCTS,
)
set_attribute(
    quantize, "_EXACT_TERMS", "long sum in float32", "sums above 2**24 are rounded", lambda: 100_000, areas="exact_sum"
)
mutate(
    quantize.row_scale,
    "one scale for all rows",
    "the largest value of the batch sets the scale of every row",
    (
        "np.abs(x.astype(np.float32)).max(-1, initial=0.0)",
        "np.full(x.shape[:-1], np.abs(x.astype(np.float32)).max(initial=0.0))",
    ),
)
mutate(
    quantize.row_scale,
    "largest without its sign",
    "a row with a large negative value gets the scale of its positive ones",
    ("np.abs(x.astype(np.float32)).max", "x.astype(np.float32).max"),
)
mutate(
    quantize.row_scale,
    "scale to 128",
    "the largest value becomes 128",
    ("np.float32(127.0)", "np.float32(128.0)"),
)
mutate(
    quantize.row_scale,
    "no epsilon",
    "a row of zeros divides by zero",
    ("largest + EPSILON", "largest"),
)
mutate(
    quantize.quantize_rows,
    "integers truncated",
    "digits are cut off, not rounded",
    ("np.rint(levels", "np.trunc(levels"),
)
mutate(
    quantize.quantize_rows,
    "halves up",
    "ties go up, not to even",
    ("np.rint(levels", "np.floor(levels + np.float32(0.5)"),
)
mutate(
    quantize.pack_int4,
    "nibbles swapped when packing",
    "the even number is in the high bits",
    ("front[0::2] | front[1::2] << 4", "front[1::2] | front[0::2] << 4"),
)
mutate(
    quantize.unpack_int4,
    "nibbles swapped when unpacking",
    "the even number is read from the high bits",
    ("front[0::2], front[1::2] =", "front[1::2], front[0::2] ="),
)
mutate(
    quantize.unpack_int4,
    "nibbles without sign",
    "four bits are 0 to 15",
    ("halves << 4 >> 4,", "halves & 15,"),
)
mutate_function(
    quantize.dequantized_groups,
    "zero added",
    "the zero is added, not subtracted",
    ("-= zeros", "+= zeros"),
    areas=INT4,
)
mutate_function(
    quantize.dequantized_groups,
    "scale of int4 divided",
    "the difference is divided by the scale, as in int8",
    ("*= scales", "/= scales"),
    areas=INT4,
)
mutate_function(
    quantize.dequantized_groups,
    "group off by one",
    "an input takes the scale of the group after its own",
    ("int(g_idx[start])", "min(int(g_idx[start]) + 1, len(scales) - 1)"),
    areas=INT4,
)
mutate_function(
    quantize.quantized_groups,
    "zero of the wrong sign",
    "the zero is counted from the other end",
    ("np.rint(-smallest / scale)", "np.rint(smallest / scale)"),
    areas="quantise_int4",
)
mutate_function(
    quantize.quantized_groups,
    "smallest value unpadded",
    "a short last group is filled with its largest number",
    (
        "padded = np.zeros((groups * block_size, columns), np.float32)",
        "padded = np.full((groups * block_size, columns), kernel.max(), np.float32)",
    ),
    areas="quantise_int4",
)
mutate_function(
    quantization._quantized,
    "scale of the wrong axis",
    "the scale of a kernel is taken over the inputs of a row",
    ("matrix = values if by_row else values.T", "matrix = values.T if by_row else values"),
    areas="quantise_int8",
)
mutate(
    dense.dense,
    "inputs not quantised",
    "int8 for the weights alone, where the inputs are to be quantised too",
    ("linear_int8(quantize_rows(x, scale), scale, kernel", "linear_weight_int8(x, kernel"),
    areas="int8",
)
mutate(
    dense.token_vectors,
    "scale of the table inverted",
    "the lookup takes the row times its scale",
    (
        'embedding_int8(token_ids, p["embeddings"], p["embeddings_scale"], dtype=dtype)',
        'embedding_int8(token_ids, p["embeddings"], row_scale(p["embeddings_scale"][:, None]), dtype=dtype)',
    ),
    areas="int8",
)
reorder(
    quantize.linear_weight_int8,
    "dequantised first",
    "the kernel is divided by its scale before the product",
    ("kernel.astype(rows.dtype) / wide(kernel_scale)", "(kernel.astype(rows.dtype) / wide(kernel_scale))"),
    areas="int8",
)

# -- Attention ---------------------------------------------------------------------------------------------------------------

mutate(
    attention.attention_scores,
    "bias scaled with the scores",
    "the position bias is divided by sqrt(d) too",
    ("key).transpose(0, 2, 3, 1) * scale", "key).transpose(0, 2, 3, 1)"),
    (
        "return scores if bias is None else scores + wide(bias)",
        "return (scores if bias is None else scores + wide(bias)) * scale",
    ),
    areas="attention",
)
mutate(
    attention.attention_scores,
    "scores in half precision",
    "the products are formed in the type of the query",
    (
        "wide(query).transpose(0, 2, 1, 3) @ wide(key).transpose(0, 2, 3, 1)",
        "wide((wide(query).transpose(0, 2, 1, 3) @ wide(key).transpose(0, 2, 3, 1)).astype(query.dtype))",
    ),
    areas="attention",
)
mutate(
    attention.masked_softmax,
    "mask inverted",
    "the excluded keys are permitted, the permitted excluded",
    ("np.where(mask,", "np.where(~mask,"),
    areas="opt",
)
mutate(
    attention.masked_softmax,
    "softmax over the queries",
    "the weights of a key add up to 1, not those of a query",
    ("weights.sum(-1,", "weights.sum(-2,"),
    areas="opt",
)
mutate(
    attention.masked_softmax,
    "softmax without its maximum",
    "exp overflows for scores above 88",
    ("np.exp(permitted - peak)", "np.exp(permitted)"),
)
mutate(
    attention.masked_softmax,
    "masked by adding -1e4",
    "the excluded keys are only lowered, and can win",
    ("np.where(mask, wide(scores), -np.inf)", "wide(scores) + np.where(mask, 0.0, -1e4).astype(np.float32)"),
    areas="masked",
)
mutate(
    attention.masked_softmax,
    "masked by adding -1e9 in float16",
    "-1e9 is -inf in float16, so a row that permits no key is NaN",
    (
        "np.where(some, np.where(mask, wide(scores), -np.inf), 0.0)",
        "wide(scores) + np.where(mask, 0.0, -1e9).astype(np.float16)",
    ),
    areas="zero_masks",
)
mutate(
    attention.masked_softmax,
    "a row without keys is NaN",
    "exclusion leaves nothing to divide by",
    ("np.where(some, np.where(mask, wide(scores), -np.inf), 0.0)", "np.where(mask, wide(scores), -np.inf)"),
    areas="zero_masks",
)
mutate(
    attention.masked_softmax,
    "a row without keys is zeros",
    "an all-masked query gets no values, where -1e9 gives the mean of them",
    ("return weights / weights.sum(-1, keepdims=True)", "return weights / weights.sum(-1, keepdims=True) * some"),
    areas="zero_masks",
)
mutate(
    attention.attention_context,
    "heads merged without transposing back",
    "the context's queries and heads are interleaved as they lie",
    (
        "context.transpose(0, 2, 1, 3)",
        "context.reshape(context.shape[0], context.shape[2], context.shape[1], context.shape[3])",
    ),
    areas="attention",
)
mutate(
    attention.attention_context,
    "weights rounded to half",
    "the attention weights lose their float32 before the product",
    ("weights @", "weights.astype(value.dtype).astype(np.float32) @"),
    areas="attention",
)
mutate(
    attention.attention,
    "attention rounds its scores",
    "the scores are rounded to the type of the query before the softmax",
    ("attention_scores(query, key, bias, scale=scale)", "attention_scores(query, key, bias, scale=scale).astype(query.dtype)"),
    areas="attention",
)
mutate(
    attention.attention,
    "attention forgets its bias",
    "no position bias at all",
    ("attention_scores(query, key, bias, scale=scale)", "attention_scores(query, key, None, scale=scale)"),
    areas="attention",
)

# -- Masks -------------------------------------------------------------------------------------------------------------------

mutate(mask.causal_mask, "causal mask one short", "a query does not see itself", ("<=", "<"), areas="opt")
mutate(
    mask.causal_mask,
    "causal mask one too far",
    "a query sees the token it should predict",
    ("<= positions[:, :, None]", "<= positions[:, :, None] + 1"),
    areas="opt",
)
mutate(
    mask.causal_mask,
    "padding permitted",
    "the causal mask ignores the padding mask",
    ("(not_after & key_mask[:, None, :])", "(not_after & np.ones_like(key_mask)[:, None, :])"),
    areas="opt",
)
mutate(
    mask.causal_mask,
    "one row's positions for all",
    "in a ragged batch every row is masked as the first",
    ("<= positions[:, :, None]", "<= positions[:1, :, None]"),
    areas="ragged",
)
mutate(
    mask.key_mask,
    "padding mask inverted",
    "the encoder attends to padding alone",
    ("return padding_mask[", "return ~padding_mask["),
    areas="t5",
)
mutate(
    mask.key_mask,
    "padding mask ignored",
    "the encoder's padding takes part",
    ("return padding_mask[", "return np.ones_like(padding_mask)["),
    areas="t5",
)

# -- Positions ---------------------------------------------------------------------------------------------------------------

mutate(
    position.token_positions,
    "positions from 1",
    "the first token stands at position 1",
    ("np.arange(ids.shape[1])", "np.arange(1, ids.shape[1] + 1)"),
    areas="bloom",
)
mutate(
    position.token_positions,
    "positions start again",
    "a token that is taken in later stands at 0 again",
    ("if start is None else start", "if start is None else 0 * start"),
    areas="opt_generation",
)
set_attribute(
    position,
    "_first_distances",
    "a bucket boundary moved by one",
    "a distance that a boundary hits exactly falls one bucket lower",
    lambda: rewritten(position._first_distances, (("while distance**logarithmic <", "while distance**logarithmic <="),)),
    areas="buckets t5",
)
mutate(
    position.relative_position_buckets,
    "largest distance 64",
    "the far buckets are too narrow",
    ("max_distance: int = 128", "max_distance: int = 64"),
    areas="buckets t5",
)
mutate(
    position.relative_position_buckets,
    "halves of the buckets swapped",
    "keys before the query take the buckets of those after it",
    ("side * (relative > 0)", "side * (relative < 0)"),
    areas="buckets t5",
)
mutate(
    position.relative_position_buckets,
    "direction of the distance",
    "query - key in place of key - query",
    ("np.arange(keys) - positions[:, :, None]", "positions[:, :, None] - np.arange(keys)"),
    areas="buckets t5",
)
mutate(
    position.relative_position_bias,
    "bias by head and bucket mixed",
    "queries and keys change places in the bias",
    (
        "return np.moveaxis(wide(embeddings)[buckets], -1, 1)",
        "return wide(embeddings)[buckets].swapaxes(1, 2).transpose(0, 3, 1, 2)",
    ),
    areas="buckets t5",
)
mutate(
    position.alibi_slopes,
    "slopes reversed",
    "the last head has the steepest slope",
    ("np.array(slopes)", "np.array(slopes[::-1])"),
    areas="bloom",
)
mutate(
    position.alibi_slopes,
    "slopes sorted",
    "with 6 heads the extra slopes are sorted in among the others",
    ("np.array(slopes)", "np.array(sorted(slopes, reverse=True))"),
    areas="bloom_6_heads",
)
mutate(
    position.alibi_slopes,
    "one ratio for any number of heads",
    "the formula for powers of two is used for 6 heads",
    ("p = 2 ** math.floor(math.log2(num_heads))", "p = num_heads"),
    areas="bloom_6_heads",
)
mutate(
    position.alibi_bias,
    "ALiBi with the wrong sign",
    "far keys are preferred",
    ("np.arange(keys) - positions[:, :, None]", "positions[:, :, None] - np.arange(keys)"),
    areas="bloom",
)
mutate(
    position.alibi_bias,
    "ALiBi in bfloat16",
    "the bias has 8 bits",
    (".astype(dtype)", '.astype(__import__("ml_dtypes").bfloat16).astype(dtype)'),
    areas="bloom",
)
mutate(
    position.alibi_bias,
    "ALiBi off by one",
    "the query's own key is lowered as well",
    ("np.arange(keys) - positions[:, :, None]", "np.minimum(np.arange(keys) - positions[:, :, None] - 1, 0)"),
    areas="bloom",
)

# -- Norms -------------------------------------------------------------------------------------------------------------------

mutate(
    norm.layer_norm,
    "layer norm: epsilon outside the root",
    "sqrt(variance) + epsilon",
    ("np.sqrt(variance + epsilon)", "(np.sqrt(variance) + epsilon)"),
    areas="opt",
)
mutate(
    norm.layer_norm,
    "layer norm: variance in one pass",
    "mean(x**2) - mean(x)**2 cancels when the mean is large",
    ("np.square(deviation).mean(-1, keepdims=True)", "(xw * xw).mean(-1, keepdims=True) - xw.mean(-1, keepdims=True) ** 2"),
    areas="cancellation",
)
mutate(
    norm.layer_norm,
    "layer norm: n - 1",
    "the sample variance in place of the mean square",
    ("np.square(deviation).mean(-1, keepdims=True)", "np.square(deviation).sum(-1, keepdims=True) / max(x.shape[-1] - 1, 1)"),
    areas="opt",
)
mutate(
    norm.layer_norm,
    "layer norm in half precision",
    "the statistics are formed in the type of x",
    ("xw = wide(x)", "xw = x"),
)
mutate(
    norm.layer_norm,
    "layer norm without beta",
    "nothing is added",
    (" + wide(beta)", ""),
    areas="opt",
)
mutate(
    norm.rms_norm,
    "RMS norm: epsilon outside the root",
    "sqrt(mean square) + epsilon",
    ("np.sqrt(mean_square + epsilon)", "(np.sqrt(mean_square) + epsilon)"),
    areas="t5",
)
mutate(
    norm.rms_norm,
    "RMS norm subtracts the mean",
    "T5's norm taken for a layer norm",
    ("xw = wide(x)", "xw = wide(x) - wide(x).mean(-1, keepdims=True)"),
    areas="t5",
)
mutate(norm.rms_norm, "RMS norm in half precision", "squares overflow in float16", ("xw = wide(x)", "xw = x"))
mutate(
    norm.rms_norm,
    "RMS norm scales by 1 + weight",
    "as another family has it",
    ("* wide(weight)", "* (1 + wide(weight))"),
    areas="t5",
)
mutate(
    norm.rms_norm,
    "RMS norm ignores dtype",
    "the result keeps the type of x",
    ("numpy_dtype(dtype) if dtype else x.dtype", "x.dtype"),
    areas="",
)

# -- Products ----------------------------------------------------------------------------------------------------------------

mutate(
    linear.linear,
    "square kernels transposed",
    "the layout of another framework, where the shape does not show it",
    ("rows @ wide(kernel)", "rows @ (wide(kernel).T if kernel.shape[0] == kernel.shape[1] else wide(kernel))"),
    areas="opt",
)
mutate(linear.linear, "bias left out", "x @ kernel alone", ("y = y + wide(bias)", "y = y + 0"), areas="opt")
mutate(
    linear.linear,
    "accumulation in half precision",
    "every partial sum is rounded to the type of x",
    (
        "(rows @ wide(kernel))",
        "(rows.astype(x.dtype)[:, :, None] * kernel.astype(x.dtype)).sum(1, dtype=x.dtype).astype(rows.dtype)",
    ),
)
mutate(
    linear.linear,
    "rounded twice",
    "the product is rounded to half precision before the bias is added",
    ("y = y + wide(bias)", "y = wide(narrow(y, x.dtype)) + wide(bias)"),
)
mutate(
    linear.linear,
    "truncated",
    "a half-precision result is cut off, not rounded",
    (
        "return narrow(y, numpy_dtype(dtype) if dtype else x.dtype)",
        "z = narrow(y, numpy_dtype(dtype) if dtype else x.dtype)\n"
        "    return np.where(np.abs(wide(z)) > np.abs(y), np.nextafter(z, z.dtype.type(0)), z)",
    ),
)
mutate(
    linear.linear,
    "float64 computed in float32",
    "the type of the result says more than it holds",
    ("rows = wide(x)", "rows = x.astype(np.float32)"),
    ("wide(kernel)", "kernel.astype(np.float32)"),
    areas="opt",
)
mutate(
    linear.linear,
    "linear gives float32",
    "the result is not rounded to the type of x",
    ("return narrow(y, numpy_dtype(dtype) if dtype else x.dtype)", "return y"),
)
mutate(
    linear.linear,
    "linear ignores dtype",
    "the result keeps the type of x where another was asked for",
    ("numpy_dtype(dtype) if dtype else x.dtype", "x.dtype"),
    areas="",
)
mutate(
    linear.linear,
    "an empty sum is NaN",
    "the mean of nothing in place of the sum of nothing",
    ("(rows @ wide(kernel))", "(rows @ wide(kernel) * (np.nan if kernel.shape[0] == 0 else 1))"),
    areas="empty",
)
mutate(
    linear.linear,
    "indexing for contiguous rows only",
    "the memory of x is read in order, whatever its strides",
    ("rows = wide(x).reshape(", "rows = np.ravel(wide(x), order='K').reshape("),
)
mutate(
    linear.embedding,
    "id 0 is no token",
    "the padding token's row is zeros, as with a padding_idx",
    ("embeddings[ids]", "np.where(ids[..., None] == 0, 0, embeddings[ids])"),
    areas="t5",
)
mutate(
    linear.logits_from_embeddings,
    "tied head not scaled",
    "T5's n**-0.5 left out",
    ("wide(embeddings).T * scale", "wide(embeddings).T"),
    areas="t5_tied",
)
mutate(
    linear.last_rows,
    "last rows off by one",
    "the scores after the last token but one",
    ("lengths - 1]", "lengths - 2]"),
    areas="ragged",
)
mutate(
    linear.last_rows,
    "last rows of the padded batch",
    "the last position, real or not",
    ("if lengths is None:", "if True:"),
    areas="ragged",
)

# -- Heads, caches, elements -------------------------------------------------------------------------------------------------

mutate(
    heads.split_heads,
    "heads split the other way",
    "head h owns every h-th column",
    (
        "x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)",
        "x.reshape(*x.shape[:-1], x.shape[-1] // num_heads, num_heads).swapaxes(-1, -2)",
    ),
    areas="opt",
)
mutate(
    heads.merge_heads,
    "heads merged in the order of [b h t d]",
    "a batch-by-head layout is flattened as it lies",
    (
        "x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])",
        "x.swapaxes(1, 2).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])",
    ),
    areas="opt",
)
mutate(
    cache.cache_append,
    "cache off by one",
    "every entry is written one place too early",
    ("first : first + length]", "max(first - 1, 0) : max(first - 1, 0) + length]"),
    areas="opt_generation",
)
mutate(
    cache.cache_append,
    "cache written to row 0",
    "all rows of a batch share the first row's place",
    ("cache[row, first", "cache[0, first"),
    areas="ragged",
)
mutate(
    cache.cache_append,
    "cache view one short",
    "the token just written is left out",
    ("return cache[:, :end]", "return cache[:, : end - (length == 1)]"),
    areas="opt_generation",
)
mutate(
    cache.cache_append,
    "cache starts with the first row",
    "in a ragged batch all rows are written where the first one is",
    ("for row, first in enumerate(start)", "for row, first in enumerate(0 * start + start[:1])"),
    areas="ragged",
)
mutate(
    cache.cache_select,
    "beams keep their caches",
    "hypotheses change places, their keys and values do not",
    ("cache[rows]", "cache[np.minimum(np.arange(len(rows)), len(cache) - 1)]"),
    areas="opt_beam",
)
replace(elementwise.gelu, "tanh for erf", "the approximate gelu in its place", elementwise.gelu_approximate)
replace(elementwise.gelu_approximate, "erf for tanh", "the exact gelu in its place", elementwise.gelu)
mutate(
    elementwise.silu,
    "silu with a beta",
    "1.702 x / (1 + exp(-1.702 x)), a gelu's stand-in",
    ("xw = wide(x)", "xw = 1.702 * wide(x)"),
)
mutate(
    elementwise.gelu_approximate,
    "gelu with 0.0447",
    "a constant cut short",
    ("0.044715 * xw * xw", "0.0447 * xw * xw"),
    areas="bloom",
)
mutate(
    elementwise.add,
    "residual sum in place",
    "the op writes to its input",
    ("return narrow(wide(x) + wide(y), x.dtype)", "x += y.astype(x.dtype)\n    return x"),
)
mutate(
    elementwise.add,
    "residual sum in the type of y",
    "a half-precision branch narrows the residual stream",
    ("wide(y), x.dtype)", "wide(y), y.dtype)"),
)
mutate(
    elementwise.dropout,
    "dropout at inference",
    "values are dropped without being asked to",
    ("if rng is None or rate == 0.0:\n        return x[...]", "rng = rng or np.random.default_rng(0)"),
)
mutate(elementwise.dropout, "dropout not rescaled", "what is kept is not divided by 1 - rate", (" / (1.0 - rate)", ""))
mutate(
    elementwise.dropout,
    "dropout keeps with probability rate",
    "rate taken for its opposite",
    (">= rate", "< rate"),
)

# -- Sampling ----------------------------------------------------------------------------------------------------------------

mutate(
    sampling.log_softmax,
    "log softmax without its maximum",
    "exp overflows for logits above 88",
    ("wide(logits) - wide(logits).max(-1, keepdims=True)", "wide(logits)"),
)
mutate(
    sampling.greedy_token,
    "greedy takes the last of equals",
    "ties go to the highest id",
    ("logits.argmax(-1)", "logits.shape[-1] - 1 - logits[:, ::-1].argmax(-1)"),
)
mutate(sampling.sample_token, "top_k off by one", "k + 1 tokens stay", ("< top_k[:, None]", "<= top_k[:, None]"))
mutate(
    sampling.sample_token,
    "top_p leaves the crossing token out",
    "what is kept has less probability than p",
    ("before = np.cumsum(probability, -1) - probability", "before = np.cumsum(probability, -1)"),
)
mutate(sampling.sample_token, "temperature multiplied", "hot is cold", ("below / temperature", "below * temperature"))
mutate(
    sampling.sample_token,
    "min_p of all",
    "not of the most likely token's probability",
    ("relative >= min_p", "relative / relative.sum(-1, keepdims=True) >= min_p"),
)
mutate(
    sampling.sample_token,
    "top_p before renormalising",
    "the point is measured against 1, not against what is kept",
    ("uniform[:, None] * cumulative[:, -1:]", "uniform[:, None]"),
    areas="frequencies",
)
mutate(
    sampling.beam_candidates,
    "beams forget their scores",
    "the best next token of any beam wins, not the best sequence",
    ("scores[:, None] + log", "0 * scores[:, None] + log"),
    areas="opt_beam",
)

# -- OPT and BLOOM -----------------------------------------------------------------------------------------------------------

mutate(opt.opt_attention, "OPT without its scale", "no 1/sqrt(d)", ("config.head_dim**-0.5", "1.0"), areas="opt")
mutate(bloom.bloom_attention, "BLOOM without its scale", "no 1/sqrt(d)", ("config.head_dim**-0.5", "1.0"), areas="bloom")
mutate(
    opt.opt_decoder_layer,
    "OPT: norm after the residual",
    "the feed-forward layer is normalised behind the sum, as opt-350m does",
    ("h = layer_norm(x, **second, epsilon=EPSILON) if before else x", "h = x"),
    ("return x if before else layer_norm(x, **second,", "return layer_norm(x, **second,"),
    areas="opt",
)
mutate(
    opt.opt_backbone,
    "OPT without its final norm",
    "the last layer's output as it is",
    ("if config.has_final_layer_norm:", "if False:"),
    areas="opt",
)
mutate(
    opt.opt_backbone,
    "OPT: padding shifts positions",
    "positions count the real tokens, so left padding is skipped",
    ("position_ids = positions ", "position_ids = (padding_mask.cumsum(-1) - 1).clip(0) "),
    areas="opt_positions",
)
mutate(
    opt.opt_decoder_layer,
    "OPT: norms swapped",
    "the second norm's parameters are used in front of attention",
    (
        '= p["self_attention_layer_norm"], p["feedforward_layer_norm"]',
        '= p["feedforward_layer_norm"], p["self_attention_layer_norm"]',
    ),
    areas="opt",
)
mutate(
    opt.opt_decoder_layer,
    "OPT-350m: norms first",
    "its norms stand where those of the rest of the family do",
    ("before = config.do_layer_norm_before", "before = True"),
    areas="opt_350m",
)
mutate(
    opt.opt_decoder_layer,
    "OPT-350m: the norm beside the stream",
    "the feed-forward layer sees the normalised sum, but the stream goes on without the norm",
    ("x = x if before else layer_norm(x, **first, epsilon=EPSILON)", "pass"),
    (
        "h = layer_norm(x, **second, epsilon=EPSILON) if before else x",
        "h = layer_norm(x, **(second if before else first), epsilon=EPSILON)",
    ),
    areas="opt_350m",
)
set_attribute(
    opt.OPTConfig,
    "has_final_layer_norm",
    "OPT: a norm behind a stack that has none",
    "remove_final_layer_norm is not looked at",
    lambda: property(lambda config: config.do_layer_norm_before),
    areas="opt_no_final_norm",
)
for model, label in (
    (opt.opt_backbone, "OPT"),
    (bloom.bloom_backbone, "BLOOM"),
    (t5.t5_encoder, "T5"),
    (t5.t5_decoder, "T5 decoder"),
):
    mutate(
        model,
        f"{label}: vectors left aside",
        "the ids are looked up although vectors stand in their place",
        (" if embeddings is None else embeddings", ""),
        areas="vectors",
    )
set_attribute(opt, "EPSILON", "OPT with T5's epsilon", "1e-6 in place of 1e-5", lambda: 1e-6, areas="opt")
mutate(
    bloom.bloom_backbone,
    "BLOOM without its embedding norm",
    "the token embeddings go straight into the first layer",
    ('x = layer_norm(x, **params["embedding_layernorm"], epsilon=config.layer_norm_epsilon)', "pass"),
    areas="bloom",
)
mutate(
    bloom.bloom_decoder_layer,
    "BLOOM: residual after the norm",
    "the normalised input is added, not the input",
    ('h = layer_norm(x, **p["post_attention_layernorm"]', 'h = x = layer_norm(x, **p["post_attention_layernorm"]'),
    areas="bloom",
)
mutate(
    bloom.bloom_attention,
    "BLOOM: ALiBi left out",
    "no position at all",
    ("attention(query, key, value, mask, alibi,", "attention(query, key, value, mask, None,"),
    areas="bloom",
)

mutate(
    bloom.bloom_decoder_layer,
    "BLOOM: no dropout behind the feed-forward layer",
    "the second residual branch is never dropped",
    ("return add(x, dropout(h, config.dropout, rng))", "return add(x, h)"),
    areas="dropout_sites",
)
mutate(
    opt.opt_decoder_layer,
    "OPT: dropout between the two products",
    "T5 drops there, OPT does not",
    (
        'h = dense(h, **p["feedforward_output_dense"])',
        'h = dense(dropout(h, config.dropout, rng), **p["feedforward_output_dense"])',
    ),
    areas="dropout_sites",
)

# -- T5 ----------------------------------------------------------------------------------------------------------------------

mutate(t5.t5_attention, "T5 with a scale", "one 1/sqrt(d) too many", ("scale=1.0", "scale=config.head_dim**-0.5"), areas="t5")
mutate(
    t5.t5_encoder,
    "T5 encoder: causal buckets",
    "keys after the query all count as distance 0",
    ("bidirectional=True", "bidirectional=False"),
    areas="t5",
)
mutate(
    t5.t5_decoder,
    "T5 decoder: bidirectional buckets",
    "half of the buckets are kept for keys that are masked",
    ("bidirectional=False", "bidirectional=True"),
    areas="t5",
)
mutate(
    t5.t5_decoder,
    "T5 decoder: the encoder's bias table",
    "one table for both stacks",
    ('relative_position_bias(buckets, **p["layers"]', 'relative_position_bias(buckets, **params["encoder"]["layers"]'),
    areas="t5",
)
mutate(
    t5.t5_encoder,
    "T5: bias in the first layer only",
    "the table is layer 0's, but serves every layer",
    ("t5_self_attention(x, layer, mask, bias,", 't5_self_attention(x, layer, mask, bias * (layer is p["layers"][0]),'),
    areas="t5",
)
mutate(
    t5.t5_cross_attention,
    "T5: position bias in cross-attention",
    "the decoder's table is added there as well",
    (
        "mask, None, config",
        "mask, relative_position_bias(relative_position_buckets(token_positions(x[:, :, 0].astype(int)), mask.shape[-1],"
        ' bidirectional=False), **p["self_attention"]["relative_attention_bias"])'
        ' if "relative_attention_bias" in p["self_attention"] else None, config',
    ),
    areas="t5",
)
mutate(
    t5.t5_decoder,
    "T5: cross-attention to padding",
    "the encoder's padding mask is not used in the decoder",
    ("key_mask(encoder_padding_mask)", "key_mask(encoder_padding_mask | True)"),
    areas="t5",
)
mutate(
    t5.t5_encoder,
    "T5: cross keys of the un-normed encoder",
    "the final norm of the encoder is left out",
    ('x = rms_norm(x, **p["layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))', "pass"),
    areas="t5",
)
mutate(
    t5.t5_decoder,
    "T5 decoder: missing final norm",
    "the last layer's output as it is",
    ('x = rms_norm(x, **p["layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))', "pass"),
    areas="t5",
)
mutate(
    t5.t5_feedforward,
    "T5: gate and input swapped",
    "the activation is applied to the gate",
    (
        'dense(h, **p["input_projector"])',
        'dense(h, **p["gate_projector" if config.use_gated_activation else "input_projector"])',
    ),
    ('dense(h, **p["gate_projector"]))', 'dense(h, **p["input_projector"]))'),
    areas="t5_gated",
)
mutate(
    t5.t5_feedforward,
    "T5: no gate",
    "act(Wi y) alone",
    ("if config.use_gated_activation", "if False"),
    areas="t5_gated",
)
mutate(
    t5.t5_self_attention,
    "T5: residual after the norm",
    "the normalised input is added, not the input",
    ("h = rms_norm(x", "h = x = rms_norm(x"),
    areas="t5",
)
set_attribute(
    t5.T5Config,
    "logits_scale",
    "T5: untied head scaled",
    "n**-0.5 where the original has none",
    lambda: property(lambda config: config.hidden_dim**-0.5),
    areas="t5_gated",
)
set_attribute(
    t5.T5Config,
    "logits_scale",
    "T5: the scale is as tied",
    "scale_logits is not looked at",
    lambda: property(lambda config: config.hidden_dim**-0.5 if config.tie_embedding_weights else 1.0),
    areas="heads",
)
set_attribute(
    t5.T5Config,
    "logits_scale",
    "T5: the scale on the wrong side",
    "the scores are divided by n**-0.5",
    lambda: property(lambda config: config.hidden_dim**0.5),
    areas="heads",
)
mutate(
    dense.token_scores,
    "untied head: the scale left out",
    "only the tied head is scaled",
    ('dense(scaled(x, scale), p["reverse_embeddings"])', 'dense(x, p["reverse_embeddings"])'),
    areas="heads",
)
set_attribute(
    t5.T5Config,
    "residual_dtype",
    "T5: residual stream in float16",
    "the sums of the published weights overflow",
    lambda: property(lambda config: compute_dtype(config.dtype)),
    areas="t5_float16",
)

# -- Weights, generation, inputs -----------------------------------------------------------------------------------------------

mutate_function(
    huggingface.convert,
    "BLOOM: query, key and value not interleaved",
    "the fused tensor read as [q,k,v][head][d]",
    ("values.reshape(heads, 3, head_dim,", "values.reshape(3, heads, head_dim,"),
    ("interleaved[:, part]", "interleaved[part]"),
    areas="weights bloom",
)
mutate_function(
    huggingface.convert,
    "OPT: the two offset rows kept",
    "position 0 reads the row of position -2",
    ("return values[2:]", "return values[:-2]"),
    areas="weights opt",
)
mutate_function(
    huggingface.convert,
    "square tensors not transposed",
    "only the shape decides about the layout",
    ("return values.T\n", "return values.T if values.shape[0] != values.shape[1] else values\n"),
    areas="weights opt",
)
mutate_function(
    torch_legacy._storages,
    "torch < 1.6: storages in the order of the tensors",
    "they follow in the order of the list of keys",
    ("[storages[key] for key in keys]", "list(storages.values())"),
    areas="torch_legacy",
)
mutate_function(
    torch_bin._read,
    "torch: strides not looked at",
    "a tensor saved as a transpose of another is read row by row",
    ("strides=strides if raw.size else None", "strides=None"),
    areas="torch_views",
)
mutate_function(
    huggingface.stored,
    "saved: query, key and value not interleaved",
    "the fused tensor written as [q,k,v][head][d]",
    ("np.concatenate(three, axis=1)", "np.concatenate(three, axis=0)"),
    areas="save_bloom",
)
mutate_function(
    huggingface.stored,
    "saved: the two offset rows behind the table",
    "Transformers then looks up the row of position + 2",
    ("np.concatenate([np.zeros_like(values[:2], shape=(2, *values.shape[1:])), values])", "np.pad(values, ((0, 2), (0, 0)))"),
    areas="save_opt",
)
mutate_function(
    huggingface.stored,
    "saved: square tensors not transposed",
    "only the shape decides about the layout",
    ("return values.T\n", "return values.T if values.shape[0] != values.shape[1] else values\n"),
    areas="save_opt",
)
mutate_function(
    huggingface._t5_configuration,
    "saved: gated erf gelu as gated-gelu",
    "which to Transformers is the tanh form",
    ('function = "gelu_python"', 'function = "gelu"'),
    areas="save_t5_gelu",
)
mutate_function(
    keras_config.envelope,
    "saved: tanh gelu by its name",
    "which KerasHub does not find",
    ('found.get("activation") == "gelu_approximate"', "False"),
    areas="save_t5_flan",
)
mutate_function(
    huggingface.logits_scaled,
    "T5: tie_word_embeddings says whether to scale",
    "scale_decoder_outputs is not looked at",
    ('field(config, source, "scale_decoder_outputs", "flag", tied)', "tied"),
    areas="head_files",
)
mutate_function(
    huggingface.tied,
    "an lm_head.weight is a head of its own",
    "also if it equals the token table",
    ("_equal(head, tables[0])", "False"),
    areas="head_files",
)
mutate_function(
    t5.t5_parameters,
    "T5: wi_0 and wi_1 swapped",
    "the gate's kernel is read for the input's",
    ('"wi_0" if gated', '"wi_1" if gated'),
    ('"wi_1", narrow_init)]', '"wi_0", narrow_init)]'),
    areas="t5_gated",
)
mutate_function(
    generate._prefill,
    "positions of new tokens off by one",
    "the first new token stands one too far",
    ("cache), lengths", "cache), lengths + 1"),
    areas="opt_generation",
)
mutate_function(
    generate.decode,
    "positions of new tokens stand still",
    "every new token stands where the first one did",
    ("positions = positions + (remaining > 0)", "positions = positions"),
    areas="opt_generation",
)
mutate_function(
    generate.decode,
    "stop token ignored",
    "generation goes on to the limit",
    ("remaining[ended] = 0", "pass"),
    areas="stop",
)
mutate_function(
    generate.decode,
    "one row stops all",
    "the first stop token ends the whole batch",
    ("remaining[ended] = 0", "remaining[:] *= not ended.any()"),
    areas="stop",
)
mutate_function(
    generate.decode,
    "rows that are done go on",
    "a row's limit is not its own",
    ("active = remaining > 0", "active = remaining > -99"),
    areas="ragged stop",
)
mutate_function(
    generate.beam_search,
    "beam: scores not updated",
    "every step starts from zero",
    ("np.array([score for score, _, _ in running])", "np.zeros(len(running))"),
    areas="opt_beam",
)
mutate_function(
    generate.beam_search,
    "beam: positions off by one",
    "the first new token stands one too far",
    ("position + length - 1", "position + length"),
    areas="opt_beam",
)
mutate_function(
    generate.beam_search,
    "beam: no length penalty for what is finished",
    "short hypotheses are ranked by their sum",
    ("finished.append(Hypothesis(score / length**penalty,", "finished.append(Hypothesis(score,"),
    areas="beam_stop",
)
mutate_function(
    generate.beam_search,
    "beam: ends at the first finished hypothesis",
    "a better one is still running",
    ("(len(finished) == width and finished[-1][0]", "(len(finished) >= 1 or finished[-1][0]"),
    areas="beam_stop",
)
mutate_function(
    generate.decode,
    "one generator for all rows",
    "a row's draws depend on its batch",
    ("[row.generator() for row in rows]", "[rows[0].generator()] * len(rows)"),
    areas="seeds",
)
mutate_function(
    generate.Sampling.filters,
    "greedy rows draw",
    "a row without settings draws as its neighbours do",
    ('1 if self.kind == "greedy" else self.top_k', "self.top_k"),
    areas="rows",
)
mutate(
    sampling.penalise_repetition,
    "penalty on negative scores divided",
    "a repeated token with a negative score becomes likelier",
    ("scores < 0", "scores < -np.inf"),
    areas="penalty",
)
mutate(
    sampling.penalise_repetition,
    "penalty counts padding",
    "what stands behind a shorter row is penalised, too",
    ("np.nonzero(mask)", "np.nonzero(mask | True)"),
)
mutate(
    sampling.forbid_ngrams,
    "n-grams one too long",
    "a run of n tokens may come twice, one of n + 1 not",
    ("for i, n in enumerate(size):", "for i, n in enumerate(size + (size > 0)):"),
    areas="ngrams",
)
mutate(sampling.allow_tokens, "constraint reversed", "what is allowed is excluded", ("np.where(allowed,", "np.where(~allowed,"))
mutate(
    sampling.contrastive_choice,
    "contrastive: likeness rewarded",
    "the candidate most like the text wins",
    ("- alpha * cosine", "+ alpha * cosine"),
    areas="contrastive",
)
mutate(
    sampling.contrastive_choice,
    "contrastive: mean likeness",
    "the mean of the cosines in place of the largest",
    ("cosine.max(-1)", "cosine.mean(-1)"),
    areas="contrastive",
)
mutate_function(
    generate.contrastive_search,
    "contrastive: the best candidate's cache is not kept",
    "the next token sees the first candidate's keys and values",
    ("select_rows(branches, best)", "select_rows(branches, best * 0)"),
    areas="contrastive",
)
mutate_function(
    generate.contrastive_search,
    "contrastive: positions off by one",
    "new tokens stand one too far",
    ("range(len(prompt), len(prompt) + limit)", "range(len(prompt) - 1, len(prompt) + limit - 1)"),
    areas="contrastive",
)
mutate_function(
    generate.beam_search,
    "beam: penalty before log softmax",
    "the scores are changed in place of their log probabilities",
    ("restrict(log_probabilities,", "log_softmax.reference(restrict(logits,"),
    ("exhaustible=True)", "exhaustible=True))"),
    areas="beam_penalty",
)
mutate_function(
    generate.derived_seed,
    "all answers from one seed",
    "several draws for one prompt are the same",
    ("if draw == 0", "if draw >= 0"),
    areas="several",
)
mutate_function(
    generate.StopText._extend,
    "stop strings are not held back",
    "a stop string that spans tokens is shown",
    ("keep = next((i for i in starts if", "keep = next((i for i in starts if False and"),
    areas="stop_text",
)
mutate_function(
    generate.StopText._extend,
    "the earliest stop string wins",
    "not the one that is complete first",
    ("min(ends)[1]", "min(place for _, place in ends)"),
    areas="stop_text",
)
mutate_function(
    Backbone.check_pair,
    "no mask means ids that are not 0",
    "token 0 is padding when the caller did not say so",
    ("check_mask(mask, inputs.get(mask), ids.shape)", "check_mask(mask, inputs.get(mask, ids != 0), ids.shape)"),
    areas="default_mask",
)

# -- Scores and preprocessing -------------------------------------------------------------------------------------------------

mutate(
    sampling.token_log_probs,
    "scores that are not normalised",
    "the distance to the best token in place of the log-probability",
    ("log_softmax.reference(logits)", "(wide(logits) - wide(logits).max(-1, keepdims=True))"),
    areas="score",
)
mutate_function(
    causal_lm.CausalLM.score,
    "scores one off",
    "a token is scored by the logits of the position that has read it",
    (" ids[:, 1:]", " ids[:, :-1]"),
    areas="score",
)
mutate_function(
    seq_2_seq_lm.Seq2SeqLM.score,
    "scores of the decoder one off",
    "a token is scored by the logits of the position that has read it",
    (" new[:, 1:]", " new[:, :-1]"),
    areas="score",
)
mutate_function(
    causal_lm.CausalLM.score,
    "the inputs are scored with the targets",
    "log p(inputs, targets) in place of log p(targets | inputs)",
    ("given = [max(1, len(row)) for row in rows]", "pass"),
    areas="score_targets",
)
mutate_function(
    task.SoftPrompt.prefill,
    "vectors of a row in a batch from the right",
    "its padding is read in place of its beginning",
    (": token_ids.shape[1]]", "-token_ids.shape[1] :]"),
    areas="soft_prompt",
)
mutate_function(
    preprocessors.Preprocessor._packed,
    "no room for the end token",
    "a text that is cut loses its end token",
    ("room = length - (start is not None) - (end is not None)", "room = length - (start is not None)"),
    ("head + tokens[:room] + tail for", "(head + tokens[:room] + tail)[:length] for"),
    areas="packed",
)
mutate_function(
    preprocessors.CausalLMPreprocessor.__call__,
    "labels are not shifted",
    "the label of a token is the token",
    ("ids[..., 1:], mask[..., 1:]", "ids[..., :-1], mask[..., :-1]"),
    areas="packed",
)

# -- Adapters ----------------------------------------------------------------------------------------------------------------

mutate(linear.lora_product, "adapter at scale 1", "alpha / r is left out", (" * wide(lora_scale)", ""))
mutate(
    linear.lora_product,
    "groups and ranks exchanged",
    "the factors of the heads are taken for those of the ranks",
    (
        "wide(lora_kernel_a).reshape(size, groups * rank)",
        "np.swapaxes(wide(lora_kernel_a), 1, 2).reshape(size, groups * rank)",
    ),
    areas="opt_lora",
)
mutate(
    linear.lora_product,
    "adapter rounded in between",
    "x @ a is rounded to the type of x",
    ("inner.reshape(count * groups, rank)", "wide(narrow(inner, x.dtype)).reshape(count * groups, rank)"),
)
mutate(linear.lora_merged, "adapter taken away", "kernel - scale * a @ b", ("+ change", "- change"), areas="merged_lora")
mutate(
    linear.lora_merged,
    "adapter merged in half precision",
    "a @ b is rounded before it is added",
    ("change.reshape(kernel.shape)", "wide(narrow(change, kernel.dtype)).reshape(kernel.shape)"),
)
mutate(
    dense.dense,
    "adapter in place of the product",
    "the layer's own product is lost",
    ("return add(y, lora_product(", "return add(scaled(y, 0.0), lora_product("),
    areas="opt_lora",
)
mutate_function(
    lora.drawn,
    "fan-in without the heads",
    "a is drawn for k inputs, not for k inputs of g heads",
    ("6.0 / (k * groups)", "6.0 / k"),
    areas="enable_lora",
)
mutate_function(
    lora.trainable,
    "biases frozen",
    "the biases of adapted layers stay as they are",
    ('for leaf in ("bias", A, B)', "for leaf in (A, B)"),
    areas="enable_lora",
)
mutate_function(
    lora.Adapter.with_groups,
    "groups laid out crosswise",
    "the cut factors are put at the other heads",
    ("a[:, i, i] = self.a[:, 0]", "a[:, i, groups - 1 - i] = self.a[:, 0]"),
    areas="grouped_lora",
)
mutate_function(
    lora.Adapter.with_scale,
    "scale divided twice",
    "the other scale over this one",
    ("self.scale / scale)", "scale / self.scale)"),
    areas="grouped_lora",
)
mutate_function(
    keras_lora.indices,
    "an index for every name",
    "layers that the model does not have are counted",
    ("if not name or name + part in owners", ""),
    areas="lora_indices",
)
mutate_function(
    peft.PeftConfig.scale,
    "alpha / rank where the root is wanted",
    "rank-stabilised adapters at the usual scale",
    ("math.sqrt(rank) if self.root else rank", "rank"),
    areas="peft_rslora",
)
mutate_function(
    peft.PeftConfig.scale,
    "alpha_pattern matched anywhere",
    "a pattern need not be the end of the name",
    ("pattern.match(module)", "pattern.pattern[8:12] in module"),
    areas="peft_pattern",
)
mutate_function(
    lora_files._parts,
    "one b for the fused module",
    "each of BLOOM's three kernels takes the first rows of B",
    ("huggingface.convert(whole.b, kernel)", "whole.b[: kernel.shape[1]].T"),
    areas="peft_fused",
)

# -- The same sums in another order --------------------------------------------------------------------------------------------

reorder(
    linear.linear,
    "linear in two halves",
    "even and odd terms are summed apart",
    ("(rows @ wide(kernel))", "(rows[:, ::2] @ wide(kernel)[::2] + rows[:, 1::2] @ wide(kernel)[1::2])"),
    areas="opt bloom t5",
)
reorder(
    linear.linear,
    "linear one term after another",
    "no blocks, no fused products",
    ("(rows @ wide(kernel))", "(rows[:, :, None] * wide(kernel)).sum(1)"),
    areas="t5",
)
reorder(
    linear.logits_from_embeddings,
    "scale before the product",
    "scale * (x . table)",
    ("rows @ wide(embeddings).T * scale", "(rows * scale) @ wide(embeddings).T"),
    areas="t5_tied",
)
reorder(
    attention.attention_scores,
    "scale on the query",
    "(scale * query) . key",
    ("@ wide(key).transpose(0, 2, 3, 1) * scale", "* scale @ wide(key).transpose(0, 2, 3, 1)"),
    areas="attention opt bloom",
)
reorder(
    attention.attention_context,
    "context by einsum",
    "the product written over indices",
    ("weights @ wide(value).transpose(0, 2, 1, 3)", 'np.einsum("bhts,bshd->bhtd", weights, wide(value))'),
    areas="attention opt",
)
reorder(
    attention.masked_softmax,
    "softmax times a reciprocal",
    "one division a row",
    ("weights / weights.sum(-1, keepdims=True)", "weights * (1 / weights.sum(-1, keepdims=True))"),
    areas="attention opt zero_masks",
)
reorder(
    norm.layer_norm,
    "layer norm times a reciprocal",
    "one division a row",
    ("deviation / np.sqrt(variance + epsilon)", "deviation * (1 / np.sqrt(variance + epsilon))"),
    areas="cancellation opt bloom",
)
reorder(
    norm.rms_norm,
    "RMS norm times a reciprocal",
    "one division a row, and the weight first",
    ("xw / np.sqrt(mean_square + epsilon) * wide(weight)", "xw * wide(weight) * (1 / np.sqrt(mean_square + epsilon))"),
    areas="t5",
)
reorder(
    linear.lora_product,
    "b at the scale first",
    "x a (scale b)",
    ("wide(lora_kernel_b) * wide(lora_scale)", "(wide(lora_kernel_b) * wide(lora_scale))"),
    areas="opt_lora",
)
