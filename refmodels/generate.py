"""Text generation: take in the prompts, then choose one token after another until every row is done.

The loops know a model only through `Decoder`; whether it decodes from a prompt (OPT, BLOOM) or from an encoded input (T5) has
been settled when its cache was made. What a row says depends on nothing in its batch: each draws from a generator of its own,
and searches (beams, contrastive) run one row at a time. The rules are in `spec/generation.md`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np

from refmodels.arguments import is_integer, is_number
from refmodels.op import Array, Params
from refmodels.ops.cache import cache_allocate, cache_append, cache_select
from refmodels.ops.linear import last_rows
from refmodels.ops.sampling import (
    allow_tokens,
    beam_candidates,
    contrastive_choice,
    forbid_ngrams,
    greedy_token,
    has_choice,
    likeliest_tokens,
    log_softmax,
    penalise_repetition,
    sample_token,
)

TAKES = {
    "greedy": (),
    "random": ("temperature", "top_k", "top_p", "min_p"),
    "top_k": ("temperature", "top_k", "top_p", "min_p"),
    "top_p": ("temperature", "top_k", "top_p", "min_p"),
    "beam": ("temperature", "num_beams", "length_penalty"),
    "contrastive": ("temperature", "top_k", "penalty_alpha"),
}
"""Sampler -> the settings that it takes, beside those that all of them take."""

SAMPLERS = tuple(TAKES)
CHOOSING = ("sampler", "temperature", "top_k", "top_p", "min_p", "num_beams", "penalty_alpha")
"""The settings that say which sampler there is: with one of them, `generate` does not ask for the compiled one."""

Constraint = Callable[[int, list[int]], Any]
"""constraint(row, token_ids): which tokens may follow these, as ids or as booleans (v,); None allows all."""


class Decoder(Protocol):
    """What the loops ask of a backbone; the last two only for contrastive search."""

    def running(self) -> Any: ...
    def on_device(self, array: Array) -> Any: ...
    def on_host(self, outputs: Any) -> Any: ...
    def prefill(self, token_ids: Array, padding_mask: Array, lengths: Array, cache: Params) -> Array: ...
    def decode_step(self, token_ids: Array, padding_mask: Array, positions: Array, cache: Params) -> Array: ...
    @property
    def ahead(self) -> int: ...
    def decode_tokens(
        self, token_ids: Array, positions: Array, remaining: Array, cache: Params, *, count: int, **choice: Array
    ) -> Array | None: ...
    def hidden_states(self, token_ids: Array, padding_mask: Array, start: Array | None, cache: Params) -> Array: ...
    def logits(self, hidden: Array) -> Array: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token of one row is chosen: a sampler and its settings.

    sampler               greedy, random, top_k, top_p, beam or contrastive; None takes what the other settings imply
    temperature           scores are divided by it before the softmax
    top_k, top_p, min_p   keep the k most likely tokens; the most likely ones until their probability exceeds p; those with at
                          least p times the probability of the most likely one
    num_beams             hypotheses that a beam search keeps
    length_penalty        finished hypotheses are ranked by score / length**length_penalty
    penalty_alpha         contrastive search's weight of likeness to earlier tokens, against 1 - alpha of probability
    repetition_penalty    scores of tokens that the row holds are divided by it (negative ones multiplied)
    no_repeat_ngram_size  no run of so many tokens comes twice; 0 allows all
    seed                  of the draws; None is fresh
    """

    sampler: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    penalty_alpha: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        for name, (whole, wanted, holds) in _RULES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not (is_integer(value) if whole else is_number(value)):
                raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r}")
            if not holds(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if self.seed is not None and not (is_integer(self.seed) and self.seed >= 0):
            raise ValueError(f"seed must be None, an integer from 0 on, or one for each row, got {self.seed!r}")
        for name in (*CHOOSING[1:], "length_penalty"):
            if getattr(self, name) not in (None, _NEUTRAL.get(name)) and name not in TAKES[self.kind]:
                raise ValueError(f"sampler {self.kind!r} takes no {name}")

    @classmethod
    def of(cls, settings: Mapping[str, Any], rows: int) -> "list[Sampling]":
        """One for each row: a list, tuple or array among the settings has an entry for each, anything else serves them all."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise TypeError(f"generate has no argument {unknown[0]!r}; settings of the sampler are: {', '.join(known)}")
        settings = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in settings.items()}
        for name, value in settings.items():
            if isinstance(value, list | tuple) and len(value) != rows:
                raise ValueError(f"{name} has {len(value)} entries, wanted one value or {rows}, one for each row")
        each = [{name: v[i] if isinstance(v, list | tuple) else v for name, v in settings.items()} for i in range(rows)]
        return [cls(**own) for own in each]

    @property
    def kind(self) -> str:
        """The sampler in force."""
        if self.sampler is not None:
            return self.sampler
        if self.num_beams is not None and self.num_beams > 1:
            return "beam"
        if self.penalty_alpha is not None:
            return "contrastive"
        draws = (self.temperature, self.top_k, self.top_p, self.min_p) != (None, None, None, None)
        return "random" if draws else "greedy"

    @property
    def beams(self) -> int:
        """num_beams, or KerasHub's default of 5."""
        return self.num_beams or 5

    def generator(self) -> np.random.Generator:
        """The same seed gives a row the same draws, alone or in any batch."""
        return np.random.default_rng(self.seed)

    def filters(self) -> tuple[float, int, float, float]:
        """temperature, top_k, top_p and min_p with what does nothing, or KerasHub's default, where none is given."""
        top_k = 5 if self.kind == "top_k" and self.top_k is None else 1 if self.kind == "greedy" else self.top_k
        top_p = 0.1 if self.kind == "top_p" and self.top_p is None else self.top_p
        least = np.iinfo(np.int64).max if top_k is None else top_k
        return self.temperature or 1.0, least, np.inf if top_p is None else top_p, self.min_p or 0.0


_RULES: dict[str, tuple[bool, str, Callable[[Any], bool]]] = {
    "temperature": (False, "positive and finite", lambda value: 0 < value < float("inf")),
    "top_p": (False, "in [0, 1]", lambda value: 0 <= value <= 1),
    "min_p": (False, "in [0, 1]", lambda value: 0 <= value <= 1),
    "length_penalty": (False, "a number between -1000 and 1000", lambda value: -1e3 <= value <= 1e3),
    "penalty_alpha": (False, "in [0, 1]", lambda value: 0 <= value <= 1),
    "repetition_penalty": (False, "a number between 0.001 and 1000", lambda value: 1e-3 <= value <= 1e3),
    "top_k": (True, "at least 1", lambda value: value >= 1),
    "num_beams": (True, "at least 1", lambda value: value >= 1),
    "no_repeat_ngram_size": (True, "at least 0", lambda value: value >= 0),
}
"""Setting -> whether it must be an integer, what it must be in words, and the test of that."""

_NEUTRAL = {"temperature": 1.0, "num_beams": 1, "length_penalty": 1.0}
"""What does nothing, and so is no mistake where a sampler does not take it."""


def derived_seed(seed: int, draw: int) -> int:
    """The seed of a row's answer number `draw` (0, 1, ...) among several: the row's own for the first."""
    if draw == 0:
        return seed
    low, high = np.random.SeedSequence([seed, draw]).generate_state(2, np.uint64).tolist()
    return int(low) | int(high) << 64


class Answer(NamedTuple):
    """The new tokens of one answer, their text if a stop string cut it, and of a beam the sum of its log probabilities."""

    tokens: list[int]
    cut: str | None = None
    log_probability: float | None = None


@dataclass(frozen=True)
class Request:
    """What `generate` is asked for beside its inputs.

    sampling    settings of `Sampling`, one value for all rows or a list with one for each
    stop_ids    token ids that end a row
    stop_texts  stop strings
    answers     how many for each input; None is one, and not in a list
    all_beams   as many answers as there are beams, with their log probabilities
    constraint  see `Constraint`
    """

    sampling: Mapping[str, Any]
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    answers: int | None = None
    all_beams: bool = False
    constraint: Constraint | None = None

    def rows(self, count: int) -> list[Sampling]:
        """The settings of each of `count` rows; ValueError if one cannot give the answers that are asked for."""
        rows = Sampling.of(self.sampling, count)
        for row in rows:
            if self.all_beams and row.kind != "beam":
                raise ValueError(f"return_all_beams needs a beam search, got sampler {row.kind!r}")
            if self.several(row) > 1 and row.kind in ("greedy", "contrastive"):
                raise ValueError(f"num_return_sequences {self.answers} needs draws or beams: {row.kind!r} has one answer")
            if row.kind == "beam" and self.several(row) > row.beams:
                raise ValueError(f"num_return_sequences {self.answers} is more than num_beams {row.beams}")
        return rows

    def several(self, row: Sampling) -> int:
        """How many answers this row gives."""
        return row.beams if self.all_beams else self.answers or 1


# -- stop strings ---------------------------------------------------------------------------------------------------------


class StopText:
    """The text of one row's new tokens, cut where the first of the stop strings is complete.

    `text` is an incremental decoder of the tokenizer: push(id) and finish() give text. What may yet become a stop string is
    held back, so that `take` gives nothing that belongs to one; how the text falls into tokens makes no difference.
    """

    def __init__(self, text: Any, stops: Sequence[str]) -> None:
        self._text, self._stops = text, stops
        self._held, self._ready = "", ""
        self.found = False
        """Whether a stop string was complete."""

    def push(self, token: int) -> bool:
        """Take in a token; whether the row is to end here."""
        self._extend(self._text.push(token))
        return self.found

    def take(self) -> str:
        """The text that is certain now and was not taken before."""
        ready, self._ready = self._ready, ""
        return ready

    def finish(self) -> str:
        """The rest of the text."""
        self._extend(self._text.finish())
        rest, self._held = self.take() + self._held, ""
        return rest

    def _extend(self, new: str) -> None:
        if self.found:
            return
        held = self._held + new
        ends = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if ends:
            self.found, keep = True, min(ends)[1]
            self._ready, self._held = self._ready + held[:keep], ""
            return
        longest = max(map(len, self._stops), default=1) - 1
        starts = range(max(len(held) - longest, 0), len(held))
        keep = next((i for i in starts if any(stop.startswith(held[i:]) for stop in self._stops)), len(held))
        self._ready, self._held = self._ready + held[:keep], held[keep:]


# -- one token after another ----------------------------------------------------------------------------------------------


def decode(
    decoder: Decoder,
    cache: Params,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop: frozenset[int],
    rows: Sequence[Sampling],
    *,
    texts: Sequence[StopText] | None = None,
    restrict: "Restriction | None" = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, until each has met a stop token, its text a stop string, or its limit.

    None for a row that is done. `rows` are greedy or draw.
    """
    generators = [row.generator() for row in rows]
    remaining = np.array(limits)
    if not (remaining > 0).any():
        return
    restrict = restrict or Restriction(decoder)
    sequences = [restrict.begin(prompt) for prompt in prompts]
    logits, positions = _prefill(decoder, cache, prompts)
    real, waiting = np.ones((len(prompts), 1), bool), deque[Array]()
    while True:
        if waiting:
            tokens = waiting.popleft()
        else:
            with decoder.running():
                scores = restrict(logits, rows, sequences, remaining > 0)
                tokens = decoder.on_host(_choose(decoder, scores, rows, generators))
        active = remaining > 0
        new = [int(token) if on else None for token, on in zip(tokens, active, strict=True)]
        ended = np.isin(tokens, list(stop))
        for i, token in enumerate(new):
            if token is not None:
                sequences[i].append(token)
                ended[i] |= texts is not None and texts[i].push(token)
        yield new
        remaining[active] -= 1
        remaining[ended] = 0
        if not (remaining > 0).any():
            return
        if not waiting and not restrict.acts(rows):
            waiting.extend(_ahead(decoder, cache, tokens, positions, remaining, rows, generators))
        if not waiting:
            logits = decoder.decode_step(tokens[:, None], real, positions, cache)
        positions = positions + (remaining > 0)  # a row that is done stays where it is, inside its cache


def _ahead(
    decoder: Decoder,
    cache: Params,
    tokens: Array,
    positions: Array,
    remaining: Array,
    rows: Sequence[Sampling],
    generators: Sequence[np.random.Generator],
) -> Array:
    """The next tokens (count, b) of all rows, where they can be chosen without anyone looking at them; else none.

    Those of a row that turns out to have ended among them are for nobody, nor are the numbers that its generator drew for them.
    """
    count = min(decoder.ahead, int(remaining.max()))
    if count < 2:
        return tokens[:0, None]
    choice: dict[str, Array] = {}
    if any(row.kind != "greedy" for row in rows):
        states = [generator.bit_generator.state for generator in generators]
        choice = {"uniform": np.stack([generator.random(count) for generator in generators], 1), **_filters(rows)}
    found = decoder.decode_tokens(tokens, positions, remaining, cache, count=count, **choice)
    if found is None and choice:
        for generator, state in zip(generators, states, strict=True):
            generator.bit_generator.state = state
    return tokens[:0, None] if found is None else found.T


def _choose(decoder: Decoder, logits: Array, rows: Sequence[Sampling], generators: Sequence[np.random.Generator]) -> Array:
    """One token for each row of scores."""
    if all(row.kind == "greedy" for row in rows):
        return greedy_token(logits)
    uniform = decoder.on_device(np.array([generator.random() for generator in generators]))
    return sample_token(logits, uniform, **{name: decoder.on_device(values) for name, values in _filters(rows).items()})


def _filters(rows: Sequence[Sampling]) -> dict[str, Array]:
    """temperature, top_k, top_p and min_p of all rows (b,)."""
    names = ("temperature", "top_k", "top_p", "min_p")
    return dict(zip(names, map(np.array, zip(*(row.filters() for row in rows), strict=True)), strict=True))


class Restriction:
    """What is done to the scores before a token is chosen from them: repetition penalty, n-grams, constraint, in this order."""

    def __init__(
        self,
        decoder: Decoder,
        constraint: Constraint | None = None,
        *,
        inputs: Sequence[int] | None = None,
        prompts_known: bool = True,
    ) -> None:
        """`inputs` are the numbers by which the constraint and errors know the rows, if they are not 0, 1, ... A prompt that is
        not known, for it came as vectors, has no tokens to look at."""
        self._decoder, self._constraint, self._inputs, self._known = decoder, constraint, inputs, prompts_known

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """What of the prompt is looked at: a list to which the row's new tokens are appended."""
        return list(prompt) if self._known else []

    def acts(self, rows: Sequence[Sampling]) -> bool:
        """Whether it does anything to the scores of these rows."""
        return self._constraint is not None or any(
            (row.repetition_penalty or 1.0) != 1 or row.no_repeat_ngram_size for row in rows
        )

    def __call__(
        self,
        logits: Array,
        rows: Sequence[Sampling],
        sequences: Sequence[list[int]],
        active: Iterable[Any],
        *,
        exhaustible: bool = False,
    ) -> Array:
        """The scores, for the rows' tokens so far; ValueError when an active row has no token left, unless `exhaustible`."""
        decoder = self._decoder
        penalties = np.array([row.repetition_penalty or 1.0 for row in rows])
        sizes = np.array([row.no_repeat_ngram_size or 0 for row in rows])
        if (penalties != 1).any() or sizes.any():
            ids, mask = map(decoder.on_device, padded(sequences, max(map(len, sequences))))
            if (penalties != 1).any():
                logits = penalise_repetition(logits, ids, mask, decoder.on_device(penalties))
            if sizes.any():
                logits = forbid_ngrams(logits, ids, mask, decoder.on_device(sizes))
        if self._constraint is not None:
            vocabulary = logits.shape[-1]
            masks = [
                self._allowed(i, tokens, vocabulary) if on else np.ones(vocabulary, bool)
                for i, (tokens, on) in enumerate(zip(sequences, active, strict=True))
            ]
            logits = allow_tokens(logits, decoder.on_device(np.array(masks)))
        if (sizes.any() or self._constraint is not None) and not exhaustible:
            left = decoder.on_host(has_choice(logits))
            for i, (any_left, on) in enumerate(zip(left, active, strict=True)):
                if on and not any_left:
                    raise ValueError(f"row {self._input(i)}: after {len(sequences[i])} tokens every token is excluded")
        return logits

    def _allowed(self, row: int, tokens: list[int], vocabulary: int) -> Array:
        number = self._input(row)
        assert self._constraint is not None
        answer = self._constraint(number, list(tokens))
        if answer is None:
            return np.ones(vocabulary, bool)
        allowed = np.asarray(sorted(answer) if isinstance(answer, set | frozenset) else answer)
        if allowed.dtype == bool and allowed.shape != (vocabulary,):
            raise ValueError(f"constraint: the mask of row {number} has shape {allowed.shape}, wanted ({vocabulary},)")
        if allowed.dtype != bool:
            if allowed.ndim != 1 or (allowed.size and allowed.dtype.kind not in "iu"):
                raise TypeError(f"constraint must give token ids, a mask of booleans or None, got {answer!r} for row {number}")
            outside = [int(i) for i in allowed if not 0 <= i < vocabulary]
            if outside:
                raise ValueError(f"constraint allows token {outside[0]} for row {number}, wanted 0 to {vocabulary - 1}")
            mask = np.zeros(vocabulary, bool)
            mask[allowed.astype(np.int64)] = True
            allowed = mask
        if not allowed.any():
            raise ValueError(f"constraint allows no token for row {number} after {len(tokens)} tokens")
        return allowed

    def _input(self, row: int) -> int:
        return row if self._inputs is None else self._inputs[row]


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


# -- beam search ----------------------------------------------------------------------------------------------------------


class Hypothesis(NamedTuple):
    """A finished beam: its rank's score / length**length_penalty, its tokens, and the sum of their log probabilities."""

    rank: float
    tokens: list[int]
    log_probability: float


def beam_search(
    decoder: Decoder,
    cache: Params,
    prompt: Sequence[int],
    limit: int,
    stop: frozenset[int],
    sampling: Sampling,
    *,
    ended: Callable[[Sequence[int]], bool] | None = None,
    restrict: Restriction | None = None,
) -> list[Hypothesis]:
    """What a beam search finds after one prompt, best first: the tokens with the highest sum of log probabilities.

    Each step takes the best continuations of all beams. One that ends with a stop token, or that `ended` says is at its end, is
    set aside with its score divided by length**length_penalty; the others go on. It ends at the limit, or when no beam can
    overtake what has been set aside. With a penalty, n-grams or a constraint it is the log probabilities that are changed.
    """
    width, finished = sampling.beams, list[Hypothesis]()
    penalty = 1.0 if sampling.length_penalty is None else sampling.length_penalty
    if limit <= 0:
        return [Hypothesis(0.0, [], 0.0)] * width
    restrict = restrict or Restriction(decoder)
    logits, position = _prefill(decoder, cache, [prompt])
    hypotheses: list[list[int]] = [[]]
    scores = np.zeros(1)
    for length in range(1, limit + 1):
        rows, sequences = [sampling] * len(hypotheses), [[*restrict.begin(prompt), *tokens] for tokens in hypotheses]
        with decoder.running():
            log_probabilities = log_softmax(logits, sampling.temperature or 1.0)
            changed = restrict(log_probabilities, rows, sequences, [True] * len(rows), exhaustible=True)
            candidates = beam_candidates(changed, decoder.on_device(scores), width * max(2, 1 + len(stop)))
        running: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(zip(*(decoder.on_host(part).tolist() for part in candidates), strict=True)):
            if score == -np.inf:
                continue
            tokens = [*hypotheses[beam], token]
            if token not in stop and not (ended is not None and ended(tokens)):
                running.append((score, beam, token))
            elif rank < width:
                finished.append(Hypothesis(score / length**penalty, tokens, score))
        running = running[:width]
        finished = sorted(finished, key=lambda entry: -entry[0])[:width]
        hypotheses = [[*hypotheses[beam], token] for _, beam, token in running]
        scores = np.array([score for score, _, _ in running])
        if not running or (len(finished) == width and finished[-1][0] >= scores[0] / length**penalty):
            break
        if length == limit:
            rest = zip(hypotheses, scores.tolist(), strict=True)
            finished += [Hypothesis(score / length**penalty, tokens, score) for tokens, score in rest]
            break
        order = [beam for _, beam, _ in running]
        if order != list(range(len(rows))):  # else every beam stays where it is
            with decoder.running():
                cache = select_rows(cache, decoder.on_device(np.array(order)))
        ids = np.array([[token] for _, _, token in running])
        positions = np.repeat(position + length - 1, len(running))
        logits = decoder.decode_step(ids, np.ones(ids.shape, bool), positions, cache)
    if not finished:
        raise ValueError(f"beam search: after {len(prompt) + length - 1} tokens every token is excluded")
    return sorted(finished, key=lambda entry: -entry[0])


def select_rows(cache: Any, rows: Array) -> Any:
    """A cache whose row i is row rows[i] of the given one, without an accelerator's private entries (`_...`)."""
    if isinstance(cache, dict):
        return {name: select_rows(part, rows) for name, part in cache.items() if not name.startswith("_")}
    if isinstance(cache, list):
        return [select_rows(part, rows) for part in cache]
    return cache_select(cache, rows)


# -- contrastive search ---------------------------------------------------------------------------------------------------


def contrastive_search(
    decoder: Decoder,
    cache: Params,
    prompt: Sequence[int],
    limit: int,
    stop: frozenset[int],
    sampling: Sampling,
    *,
    text: StopText | None = None,
    restrict: Restriction | None = None,
) -> Iterator[int]:
    """Yield the tokens after one prompt, each the best of the top_k most likely by `contrastive_choice`.

    Every candidate is run through the model, as a row of a batch, to see how like its hidden state is to the earlier ones.
    """
    count = 5 if sampling.top_k is None else sampling.top_k
    alpha = 0.6 if sampling.penalty_alpha is None else sampling.penalty_alpha
    if limit <= 0:
        return
    restrict = restrict or Restriction(decoder)
    sequence = restrict.begin(prompt)
    with decoder.running():
        ids, mask = map(decoder.on_device, padded([prompt], len(prompt)))
        hidden = decoder.hidden_states(ids, mask, None, cache)
        seen = cache_allocate((1, len(prompt) + limit, hidden.shape[-1]), hidden.dtype.name)
        earlier = cache_append(seen, hidden)
    for position in range(len(prompt), len(prompt) + limit):
        with decoder.running():
            scores = restrict(decoder.logits(last_rows(hidden)), [sampling], [sequence], [True])
            probabilities, candidates = likeliest_tokens(scores, count, temperature=sampling.temperature or 1.0)
            tokens = decoder.on_host(candidates)[0]
            branches = select_rows(cache, decoder.on_device(np.zeros(len(tokens), np.int64)))
            ids, mask = decoder.on_device(tokens[:, None]), decoder.on_device(np.ones((len(tokens), 1), bool))
            after = decoder.hidden_states(ids, mask, decoder.on_device(np.full(len(tokens), position)), branches)
            best = contrastive_choice(probabilities, last_rows(after), earlier, alpha=alpha)
            cache, hidden = select_rows(branches, best), cache_select(after, best)
            earlier = cache_append(seen, hidden, decoder.on_device(np.array([position])))
            token = int(tokens[decoder.on_host(best)[0]])
        sequence.append(token)
        ended = token in stop or (text is not None and text.push(token))
        yield token
        if ended:
            return
