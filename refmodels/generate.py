"""Text generation: take in the prompts, then choose one token after another until every row is done.

The loop knows a model only through `Decoder`; whether it decodes from a prompt (OPT, BLOOM) or from an encoded input (T5) has
been settled when its cache was made. Each row draws from a generator of its own, so a row does not depend on its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from refmodels.backbone import is_integer
from refmodels.op import Array, Params
from refmodels.ops.cache import cache_select
from refmodels.ops.sampling import beam_candidates, greedy_token, sample_token

SAMPLERS = ("greedy", "random", "top_k", "top_p", "beam")


class Decoder(Protocol):
    """What the loop asks of a backbone."""

    def running(self) -> Any: ...
    def on_device(self, array: Array) -> Any: ...
    def on_host(self, outputs: Any) -> Any: ...
    def prefill(self, token_ids: Array, padding_mask: Array, lengths: Array, cache: Params) -> Array: ...
    def decode_step(self, token_ids: Array, padding_mask: Array, positions: Array, cache: Params) -> Array: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: a sampler and its settings, KerasHub's names and defaults.

    sampler         greedy, random, top_k, top_p or beam; None takes the one that the other settings imply
    temperature     scores are divided by it before the softmax
    top_k, top_p    keep the k most likely tokens; keep the most likely tokens until their probability exceeds p
    num_beams       hypotheses that a beam search keeps
    length_penalty  finished hypotheses are ranked by score / length**length_penalty
    seed            one integer for all rows, or one for each; None is fresh
    """

    sampler: str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int | None = None
    length_penalty: float = 1.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        for name, kind in (
            ("temperature", float),
            ("top_p", float),
            ("length_penalty", float),
            ("top_k", int),
            ("num_beams", int),
        ):
            value = getattr(self, name)
            if value is not None and not is_integer(value) and (kind is int or not isinstance(value, float | np.floating)):
                raise TypeError(f"{name} must be {'an integer' if kind is int else 'a number'}, got {value!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k!r}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be in [0, 1], got {self.top_p!r}")
        if self.num_beams is not None and self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams!r}")
        if self.kind == "beam" and (self.top_k, self.top_p, self.temperature) != (None, None, 1.0):
            raise ValueError("beam search takes no temperature, top_k or top_p")
        if self.kind == "greedy" and (self.top_k, self.top_p, self.temperature) != (None, None, 1.0):
            raise ValueError("greedy search takes no temperature, top_k or top_p")
        if self.kind != "beam" and (self.num_beams or 1) > 1:
            raise ValueError(f"sampler {self.kind!r} takes no num_beams")
        if not -1e3 <= self.length_penalty <= 1e3:
            raise ValueError(f"length_penalty must be a number between -1000 and 1000, got {self.length_penalty!r}")
        seeds: Any = [0] if self.seed is None else [self.seed] if is_integer(self.seed) else self.seed
        if not (isinstance(seeds, list | tuple) and all(is_integer(seed) and seed >= 0 for seed in seeds)):
            raise ValueError(f"seed must be None, an integer from 0 on, or a list of them, got {self.seed!r}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Sampling":
        """These settings; TypeError that lists what exists for one that does not."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise TypeError(f"generate has no argument {unknown[0]!r}; settings of the sampler are: {', '.join(known)}")
        return cls(**settings)

    @property
    def kind(self) -> str:
        """The sampler in force."""
        if self.sampler is not None:
            return self.sampler
        if self.num_beams is not None:
            return "beam" if self.num_beams > 1 else "greedy"
        return "greedy" if (self.top_k, self.top_p, self.temperature) == (None, None, 1.0) else "random"

    @property
    def beams(self) -> int:
        """num_beams, or KerasHub's default of 5."""
        return self.num_beams or 5

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One generator for each row. The same seed gives a row the same draws, alone or in any batch."""
        if self.seed is None:
            return [np.random.default_rng() for _ in range(rows)]
        seeds = list(self.seed) if isinstance(self.seed, list | tuple) else [self.seed] * rows
        if len(seeds) != rows:
            raise ValueError(f"seed has {len(seeds)} entries, wanted one integer or {rows}")
        return [np.random.default_rng(seed) for seed in seeds]

    def choose(self, decoder: Decoder, logits: Array, generators: list[np.random.Generator]) -> Array:
        """One token for each row of scores."""
        if self.kind == "greedy":
            return greedy_token(logits)
        top_k = 5 if self.kind == "top_k" and self.top_k is None else self.top_k
        top_p = 0.1 if self.kind == "top_p" and self.top_p is None else self.top_p
        uniform = decoder.on_device(np.array([generator.random() for generator in generators]))
        return sample_token(logits, uniform, temperature=self.temperature, top_k=top_k, top_p=top_p)


def decode(
    decoder: Decoder,
    cache: Params,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop: frozenset[int],
    sampling: Sampling,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, until each has met a stop token or its limit; None for a row that is done."""
    generators = sampling.generators(len(prompts))
    remaining = np.array(limits)
    if not (remaining > 0).any():
        return
    logits, positions = _prefill(decoder, cache, prompts)
    while True:
        with decoder.running():
            tokens = decoder.on_host(sampling.choose(decoder, logits, generators))
        active = remaining > 0
        yield [int(token) if on else None for token, on in zip(tokens, active, strict=True)]
        remaining[active] -= 1
        remaining[np.isin(tokens, list(stop))] = 0
        if not (remaining > 0).any():
            return
        logits = decoder.decode_step(tokens[:, None], np.ones((len(prompts), 1), bool), positions, cache)
        positions = positions + (remaining > 0)  # a row that is done stays where it is, inside its cache


def padded(rows: Sequence[Sequence[int]], width: int, *, fill: int = 0) -> tuple[Array, Array]:
    """Rows of ids as one array (b, width) with `fill` behind each, and the mask of what is real."""
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    ids = np.full(mask.shape, fill, np.int64)
    ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return ids, mask


def _prefill(decoder: Decoder, cache: Params, prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Take in the prompts together, padded on the right; the scores after each, and the position of its next token."""
    lengths = np.array([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError(f"prompt {int(lengths.argmin())} is empty: there must be a token to go on from")
    ids, mask = padded(prompts, int(lengths.max()))
    return decoder.prefill(ids, mask, lengths, cache), lengths


def beam_search(
    decoder: Decoder, cache: Params, prompt: Sequence[int], limit: int, stop: frozenset[int], sampling: Sampling
) -> list[int]:
    """The tokens after one prompt with the highest sum of log probabilities that a beam search finds.

    Each step takes the best continuations of all beams. One that ends with a stop token is set aside with its score divided by
    length**length_penalty; the others go on. It ends at the limit, or when no beam can overtake what has been set aside.
    """
    width, finished = sampling.beams, list[tuple[float, list[int]]]()
    if limit <= 0:
        return []
    logits, position = _prefill(decoder, cache, [prompt])
    hypotheses: list[list[int]] = [[]]
    scores = np.zeros(1)
    for length in range(1, limit + 1):
        with decoder.running():
            candidates = beam_candidates(logits, decoder.on_device(scores), width * max(2, 1 + len(stop)))
        running: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(zip(*(decoder.on_host(part).tolist() for part in candidates), strict=True)):
            if token not in stop:
                running.append((score, beam, token))
            elif rank < width:
                finished.append((score / length**sampling.length_penalty, [*hypotheses[beam], token]))
        running = running[:width]
        finished = sorted(finished, key=lambda entry: -entry[0])[:width]
        hypotheses = [[*hypotheses[beam], token] for _, beam, token in running]
        scores = np.array([score for score, _, _ in running])
        if not running or (len(finished) == width and finished[-1][0] >= scores[0] / length**sampling.length_penalty):
            break
        if length == limit:
            ranked = scores / length**sampling.length_penalty
            finished += zip(ranked.tolist(), hypotheses, strict=True)
            break
        with decoder.running():
            cache = select_rows(cache, decoder.on_device(np.array([beam for _, beam, _ in running])))
        ids = np.array([[token] for _, _, token in running])
        positions = np.repeat(position + length - 1, len(running))
        logits = decoder.decode_step(ids, np.ones(ids.shape, bool), positions, cache)
    return max(finished, key=lambda entry: entry[0])[1]


def select_rows(cache: Any, rows: Array) -> Any:
    """A cache whose row i is row rows[i] of the given one."""
    if isinstance(cache, dict):
        return {name: select_rows(part, rows) for name, part in cache.items()}
    if isinstance(cache, list):
        return [select_rows(part, rows) for part in cache]
    return cache_select(cache, rows)
