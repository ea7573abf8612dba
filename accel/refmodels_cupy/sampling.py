"""From scores to the next token. What is chosen in every step has kernels that need no sorting; the rest is array functions."""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import sampling as ops
from refmodels_cupy.device import MOST_BLOCKS, Device, Launch
from refmodels_cupy.elementwise import each, narrow_types, to_float64
from refmodels_cupy.source import form

THREADS = (256, 1, 1)
PART = 2048
"""Tokens of a row that one block takes."""

DIGIT = 10
"""Bits of a place that are searched for by one launch."""

SUMS, SEARCHES = 3 * 2**DIGIT, 2 * 3
"""What a row's scratch memory holds besides the best place of each part: numbers of 8 bytes."""

SCORE_BITS = {"float32": 32, "float16": 19, "bfloat16": 16}
CHOICES = {"top_k": 0, "top_p": 1, "draw": 2, "none": 3}

FORMS = [
    *(("sampling.cu", form(kernel, logits)) for kernel in ("best_of_parts", "search") for logits in SCORE_BITS),
    ("sampling.cu", "best_of_rows"),
]


def scratch(device: Device, b: int, v: int) -> Any:
    """Memory for `sample` and `greedy` of b rows of v scores: what is in it before and after is of no account."""
    return device.empty((b, SUMS + SEARCHES + _parts(v)), np.uint64)


def greedy(device: Device, logits: Any, tokens: Any) -> None:
    """tokens[i] = the token with the highest of the scores logits[i], of equal ones the first; NaN is the highest.

    logits [b, v] in float32, float16 or bfloat16, tokens [b] in int64, all contiguous on the device. Two launches.
    """
    (b, v), memory = logits.shape, scratch(device, *logits.shape)
    _best_of_parts(device, logits, memory, nan_first=True)
    arguments = (memory, tokens, np.int32(v), np.int32(_id_bits(v)))
    device.launch(Launch("sampling.cu", "best_of_rows", (b, 1, 1), THREADS, arguments))


def sample(
    device: Device,
    logits: Any,
    uniform: Any,
    step: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    tokens: Any,
    memory: Any,
) -> None:
    """tokens[i] = a draw from the scores logits[i] at the point uniform[step, i], as the op `sample_token` says.

    logits [b, v] in float32, float16 or bfloat16; uniform [count, b] in float64, of which row step[0] (int32) is used, or row 0
    if `step` is None; temperature, top_p and min_p [b] in float64 and top_k [b] in int64, each of which may be None; tokens [b]
    in int64; `memory` from `scratch`. All contiguous on the device, and only looked at there: a graph of these
    launches draws anew each time it is played. A row with temperature 0 is given its best token; NaN is never drawn.

    With float32 scores and a vocabulary of up to 2**18 tokens there are 5 launches for each of top_k, top_p and the draw, and 2
    more; with bfloat16 there are 4 for each.
    """
    (b, v), id_bits = logits.shape, _id_bits(logits.shape[1])
    levels = -(-(SCORE_BITS[logits.dtype.name] + id_bits) // DIGIT)
    choices = [name for name, given in (("top_k", top_k), ("top_p", top_p), ("draw", uniform)) if given is not None]
    turns = [(choice, level) for choice in choices for level in range(levels)]
    _best_of_parts(device, logits, memory, nan_first=False)
    for turn, (choice, level) in enumerate([*turns, ("none", 0)]):
        blocks = (1 if choice == "none" else _parts(v), b, 1)
        settings = (uniform, step, temperature, top_k, top_p, min_p)
        numbers = (np.int32(number) for number in (v, id_bits, turn, CHOICES[choice], level, levels))
        arguments = (logits, *settings, tokens, memory, *numbers)
        device.launch(Launch("sampling.cu", form("search", logits.dtype.name), blocks, THREADS, arguments))


def _best_of_parts(device: Device, logits: Any, memory: Any, *, nan_first: bool) -> None:
    b, v = logits.shape
    arguments = (logits, memory, np.int32(v), np.int32(_id_bits(v)), np.int32(nan_first))
    launched = form("best_of_parts", logits.dtype.name)
    device.launch(Launch("sampling.cu", launched, (_parts(v), b, 1), THREADS, arguments))


def _parts(v: int) -> int:
    return -(-v // PART)


def _id_bits(v: int) -> int:
    return (v - 1).bit_length()


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.sampling`."""
    xp = device.xp

    def wide(x: Any) -> Any:
        return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)

    def best_first(scores: Any) -> Any:
        negative = -scores if scores.dtype == np.float64 else each(device, scores, factor=-1.0)
        return xp.argsort(negative, axis=-1, kind="stable")

    @accelerator.kernel(ops.log_softmax)
    def log_softmax(logits: Any, temperature: float = 1.0) -> Any:
        scores = wide(logits)
        shifted = (scores - scores.max(-1, keepdims=True)) / scores.dtype.type(temperature)
        return shifted - xp.log(xp.exp(shifted).sum(-1, keepdims=True))

    @accelerator.kernel(ops.penalise_repetition, when=_fits)
    def penalise_repetition(logits: Any, token_ids: Any, mask: Any, penalty: Any) -> Any:
        scores, (b, v) = wide(logits), logits.shape
        held = xp.zeros((b, v + 1), bool)  # the last column is for what is no token of the row's
        held[xp.arange(b)[:, None], xp.where(mask, token_ids, v)] = True
        factor = xp.where(held[:, :v], penalty.astype(np.float32)[:, None], np.float32(1))
        return each(device, scores, factor, combination="penalise")

    @accelerator.kernel(ops.forbid_ngrams)
    def forbid_ngrams(logits: Any, token_ids: Any, mask: Any, size: Any) -> Any:
        """The tokens are looked through on the host, which has few of them; the scores stay where they are."""
        scores = xp.array(wide(logits))
        forbidden = ops.forbid_ngrams.reference(
            np.zeros(logits.shape, np.float32), *(device.to_host(part) for part in (token_ids, mask, size))
        )
        rows, tokens = np.nonzero(forbidden)
        scores[device.to_device(rows), device.to_device(tokens)] = -np.inf
        return scores

    @accelerator.kernel(ops.allow_tokens)
    def allow_tokens(logits: Any, allowed: Any) -> Any:
        scores = wide(logits)
        return xp.where(allowed, scores, scores.dtype.type(-np.inf))

    @accelerator.kernel(ops.has_choice)
    def has_choice(logits: Any) -> Any:
        return xp.asarray((wide(logits) > -np.inf).any(-1))

    @accelerator.kernel(ops.token_log_probs)
    def token_log_probs(logits: Any, token_ids: Any) -> Any:
        return xp.take_along_axis(log_softmax(logits), token_ids[..., None], -1)[..., 0]

    @accelerator.kernel(ops.greedy_token, when=_fits)
    def greedy_token(logits: Any) -> Any:
        tokens = device.empty(logits.shape[:1], np.int64)
        if tokens.size:
            greedy(device, xp.ascontiguousarray(logits), tokens)
        return tokens

    @accelerator.kernel(ops.sample_token, when=_fits)
    def sample_token(
        logits: Any, uniform: Any, *, temperature: Any = None, top_k: Any = None, top_p: Any = None, min_p: Any = None
    ) -> Any:
        def settings(values: Any, dtype: Any = np.float64) -> Any:
            return None if values is None else xp.ascontiguousarray(values.astype(dtype, copy=False))

        tokens = device.empty(logits.shape[:1], np.int64)
        if tokens.size:
            given = (settings(temperature), settings(top_k, np.int64), settings(top_p), settings(min_p))
            rows = (xp.ascontiguousarray(logits), settings(uniform), None)
            sample(device, *rows, *given, tokens, scratch(device, *logits.shape))
        return tokens

    @accelerator.kernel(ops.beam_candidates)
    def beam_candidates(log_probabilities: Any, scores: Any, count: int) -> tuple[Any, Any, Any]:
        if np.float64 in (log_probabilities.dtype, scores.dtype):
            total = to_float64(device, log_probabilities) + to_float64(device, scores)[:, None]
        else:
            total = each(device, log_probabilities, scores[:, None], combination="add")
        best = best_first(total.reshape(-1))[:count]
        beams, tokens = best // total.shape[1], best % total.shape[1]
        return total[beams, tokens], beams, tokens

    @accelerator.kernel(ops.likeliest_tokens)
    def likeliest_tokens(logits: Any, count: int, *, temperature: float = 1.0) -> tuple[Any, Any]:
        tokens = best_first(wide(logits))[:, :count]
        return xp.take_along_axis(xp.exp(log_softmax(logits, temperature)), tokens, -1), tokens

    @accelerator.kernel(ops.contrastive_choice, when=narrow_types)
    def contrastive_choice(probabilities: Any, hidden: Any, earlier: Any, *, alpha: float) -> Any:
        candidates, past = to_float64(device, hidden), to_float64(device, earlier[0])
        lengths = xp.sqrt((candidates**2).sum(-1))[:, None] * xp.sqrt((past**2).sum(-1))
        cosine = device.product(candidates, past, transposed=True) / xp.where(lengths > 0, lengths, np.float64(1))
        score = to_float64(device, each(device, probabilities, factor=1.0 - alpha)) - alpha * cosine.max(-1)
        return xp.where(to_float64(device, probabilities) > 0, score, -np.inf).argmax(-1)


def _fits(logits: Any, *_: Any, **__: Any) -> bool | str:
    """scores in float32 and narrower, of up to 65,535 rows"""
    return narrow_types(logits) if len(logits) <= MOST_BLOCKS else f"{len(logits)} rows"
