"""Laws that need no reference: a candidate against itself, in two ways that exact arithmetic cannot tell apart.

    two runs            the same inputs give the same, nothing is drawn at random
    batch = singles     a row gives in a batch what it gives alone
    rows reordered      the order of the rows does not matter
    padding on the right, padding on the left    more padding changes nothing
    padding unseen      which tokens stand in the padding changes nothing
    future unseen       later tokens change nothing before them
    cache = no cache    token after token with the cache gives what one pass without it gives
    chunks = whole      chunks with the cache give what one chunk gives
    cache starts empty  a text gives the same after another one

How far the two ways may differ comes from our own runs on the same inputs (`bounds`). In `spec/verification-dynamics.md` each
law has its reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.numerics import Verdict
from refmodels.op import Array, Op
from refmodels.verification.adaptors.own import Observer, OwnCandidate
from refmodels.verification.bounds import Known, bounds, difference
from refmodels.verification.candidate import Candidate, CandidateError
from refmodels.verification.judgement import ratio
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import step_names
from refmodels.verification.verify import LawResult

Inputs = Mapping[str, Array]
FIRST_PLAIN_ID = 3
"""Below it ids have a meaning of their own in the vocabularies of these models: padding, beginning, end, unknown."""

MORE = 5
"""Columns of padding that are added."""


@dataclass(frozen=True)
class Variation:
    """Other inputs that must give the same. `back(arrays, side)` puts what the runs gave for a step together as the run on the
    inputs themselves has it; `counts` says for each side of the model which tokens (b, t) are compared."""

    runs: Sequence[Inputs]
    back: Callable[[Sequence[Array], str], Array]
    counts: Mapping[str, Array]


@dataclass(frozen=True)
class Law:
    """`vary(inputs, model, generator)` gives a variation, or says why there is none. `fault` is what a candidate that breaks
    the law has, and `says` what that means."""

    name: str
    fault: str
    says: str
    vary: Callable[[Inputs, Backbone, np.random.Generator], Variation | str]


def law_inputs(model: Backbone, seed: int = 0) -> dict[str, Array]:
    """Three rows of different lengths, padded on the right, with room for more padding where the model has a limit."""
    generator = np.random.default_rng(seed)
    length = max(min(12, (longest(model) * 2) // 3), 1)
    lengths = np.array([length, max(length // 2, 1), min(2, length)])
    found = {}
    for side in sides(model):
        width = length if side != "decoder_" else max(length - 2, 1)
        found[f"{side}token_ids"] = random_ids(model, generator, (3, width))
        found[f"{side}padding_mask"] = np.arange(width) < np.minimum(lengths, width)[:, None]
    return found


def longest(model: Backbone) -> int:
    """How many tokens a row may have."""
    return getattr(model.config, "max_sequence_length", None) or 10**6


def sides(model: Backbone) -> tuple[str, ...]:
    """What the names of the token inputs begin with; what comes last has the causal mask."""
    return ("encoder_", "decoder_") if model.family == "t5" else ("",)


def random_ids(model: Backbone, generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Ids without a meaning of their own."""
    vocabulary = model.config.vocabulary_size
    return generator.integers(min(FIRST_PLAIN_ID, vocabulary - 1), vocabulary, shape)


# -- the laws of a run --------------------------------------------------------------------------------------------------------


def _masks(inputs: Inputs, model: Backbone) -> dict[str, Array]:
    return {side: np.asarray(inputs[f"{side}padding_mask"], bool) for side in sides(model)}


def _again(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    return Variation([inputs], lambda arrays, side: arrays[0], _masks(inputs, model))


def _singles(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    rows = len(next(iter(inputs.values())))
    if rows < 2:
        return "these inputs have one row"
    runs = [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(rows)]
    return Variation(runs, lambda arrays, side: np.concatenate(arrays), _masks(inputs, model))


def _reordered(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    rows = len(next(iter(inputs.values())))
    if rows < 2:
        return "these inputs have one row"
    order = np.roll(np.arange(rows), 1)
    run = {name: array[order] for name, array in inputs.items()}
    return Variation([run], lambda arrays, side: arrays[0][np.argsort(order)], _masks(inputs, model))


def _padded(inputs: Inputs, model: Backbone, generator: np.random.Generator, left: Sequence[str]) -> Variation | str:
    run, widths = dict(inputs), {}
    more = min(MORE, longest(model) - max(array.shape[1] for array in inputs.values()))
    if more < 1:
        return f"these inputs have the greatest length, {longest(model)}"
    for side in sides(model):
        ids, mask = inputs[f"{side}token_ids"], np.asarray(inputs[f"{side}padding_mask"], bool)
        widths[side] = ids.shape[1]
        if left and side not in left:
            continue
        filler = random_ids(model, generator, (len(ids), more))
        run[f"{side}token_ids"] = np.concatenate([filler, ids] if left else [ids, filler], 1)
        run[f"{side}padding_mask"] = np.pad(mask, ((0, 0), (more, 0) if left else (0, more)))

    def back(arrays: Sequence[Array], side: str) -> Array:
        return arrays[0][:, more:] if side in left else arrays[0][:, : widths[side]]

    return Variation([run], back, _masks(inputs, model))


def _padded_right(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    return _padded(inputs, model, generator, left=())


def _padded_left(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    if model.family == "opt":
        return "OPT counts positions from the left, padding included (OPT-C1)"
    return _padded(inputs, model, generator, left=("encoder_",) if model.family == "t5" else ("",))


def _filled(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    run, masks = dict(inputs), _masks(inputs, model)
    if all(mask.all() for mask in masks.values()):
        return "these inputs have no padding"
    for side, mask in masks.items():
        run[f"{side}token_ids"] = np.where(mask, inputs[f"{side}token_ids"], random_ids(model, generator, mask.shape))
    return Variation([run], lambda arrays, side: arrays[0], masks)


def _later(inputs: Inputs, model: Backbone, generator: np.random.Generator) -> Variation | str:
    run, masks, side = dict(inputs), _masks(inputs, model), sides(model)[-1]
    ids, real = inputs[f"{side}token_ids"], masks[side]
    place = real.shape[1] // 2
    later = np.arange(real.shape[1]) >= place
    if not (later & real).any() or not (~later & real).any():
        return "these inputs have no tokens before and behind a place in the middle"
    new = random_ids(model, generator, ids.shape)
    run[f"{side}token_ids"] = np.where(later & real, np.where(new == ids, (ids + 1) % model.config.vocabulary_size, new), ids)
    return Variation([run], lambda arrays, side: arrays[0], {**masks, side: real & ~later})


TWO_RUNS = Law(
    "two runs", "not-deterministic", "two runs on the same inputs differ: is dropout on, or something not initialised?", _again
)
LAWS = (
    TWO_RUNS,
    Law("batch = singles", "rows-not-independent", "what a row gives depends on the other rows of its batch", _singles),
    Law("rows reordered", "rows-not-independent", "what a row gives depends on its place in the batch", _reordered),
    Law(
        "padding on the right", "padding-leaks", "more padding behind the tokens changes what they give: is it masked?",
        _padded_right,
    ),
    Law(
        "padding on the left", "padding-leaks",
        "padding before the tokens changes what they give: is it masked, and are distances counted between tokens?",
        _padded_left,
    ),
    Law("padding unseen", "padding-leaks", "the ids in the padding change what the tokens give: mask them", _filled),
    Law("future unseen", "future-leaks", "later tokens change what earlier ones give: is the mask causal?", _later),
)  # fmt: skip


QUICK, FULL, THOROUGH = range(3)
"""Held to the bound of the first way alone; to that of both; to that of both with what the inputs leave open."""

NOTHING = Verdict(True, "nothing to compare", bound=float("inf"))


# -- judging --------------------------------------------------------------------------------------------------------------


class _Bounds:
    """Bounds of our own runs, each made once."""

    def __init__(self, model: Backbone, arithmetic: Arithmetic, wanted: Callable[[str], bool]) -> None:
        self._model, self._arithmetic, self._wanted = model, arithmetic, wanted
        self._known: dict[tuple[Any, ...], dict[str, Known]] = {}

    def __call__(self, runs: Sequence[Inputs], *, second_look: bool) -> dict[str, float]:
        """For each step the largest bound of these runs."""
        every = [self._of(inputs, second_look) for inputs in runs]
        return {name: max(known[name].bound for known in every) for name in every[0]}

    def _of(self, inputs: Inputs, second_look: bool) -> dict[str, Known]:
        key = (second_look, *((name, array.shape, array.tobytes()) for name, array in sorted(inputs.items())))
        if key not in self._known:
            self._known[key] = bounds(self._model, inputs, self._arithmetic, self._wanted, second_look=second_look)
        return self._known[key]


def token_steps(model: Backbone, inputs: Inputs) -> dict[str, str]:
    """Our steps that give something (b, t, n) for each token, and the side of the model that they are on, in order."""
    found = {}
    for name, shape in step_names(model, inputs).items():
        side = sides(model)[-1]
        if model.family == "t5":
            if name.startswith("token_embedding:embedding") or name.startswith("token_embedding:token_vectors"):
                continue  # of both sides, under one name
            of_encoder = name.startswith("encoder.") or name == "t5_encoder"
            if of_encoder or ".cross_attention.key:" in name or ".cross_attention.value:" in name:
                side = "encoder_"
        if len(shape) == 3 and shape[:2] == inputs[f"{side}token_ids"].shape and "buckets" not in name:
            found[name] = side
    return found


def check_laws(
    candidate: Candidate,
    model: Backbone,
    inputs: Inputs | None = None,
    *,
    seed: int = 0,
    progress: Callable[[LawResult], None] = lambda result: None,
) -> tuple[LawResult, ...]:
    """Hold a candidate to every law, on `inputs` or on ragged ones of ours. `model` has its weights, for the bounds alone.

    A law that it cannot be asked has no verdict, and the reason why. `progress` is called with each result.
    """
    checked = dict(model.checked(law_inputs(model, seed) if inputs is None else inputs))
    arithmetic = Arithmetic(candidate.dtype, candidate.products)
    steps = token_steps(model, checked)
    checker = _Checker(candidate, model, checked, arithmetic, steps, _Bounds(model, arithmetic, steps.__contains__), seed)
    results: list[LawResult] = []
    unsteady = False
    for result in checker.results():
        broken = result.verdict is not None and not result.verdict.ok
        if broken and unsteady:
            says = "it breaks this law too, as its results differ from run to run"
            result = replace(result, fault=TWO_RUNS.fault, says=says)
        unsteady = unsteady or (broken and result.name == TWO_RUNS.name)
        results.append(result)
        progress(result)
    return tuple(results)


@dataclass
class _Checker:
    candidate: Candidate
    model: Backbone
    inputs: dict[str, Array]
    arithmetic: Arithmetic
    steps: Mapping[str, str]
    bounds: _Bounds
    seed: int

    def results(self) -> Iterator[LawResult]:
        try:
            base = self.candidate.run(self.inputs)
        except CandidateError as error:
            yield from (LawResult(law.name, None, f"it cannot be run: {error}") for law in LAWS)
        else:
            for law in LAWS:
                yield self._of_runs(law, base)
        yield from self._of_the_cache()

    def _of_runs(self, law: Law, base: Mapping[str, Array]) -> LawResult:
        variation = law.vary(self.inputs, self.model, np.random.default_rng([self.seed, 1]))
        if isinstance(variation, str):
            return LawResult(law.name, None, variation)
        try:
            others = [self.candidate.run(run) for run in variation.runs]
        except CandidateError as error:
            return LawResult(law.name, None, f"it cannot be run so: {error}")
        names = [name for name in self.steps if name in base and all(name in other for other in others)]
        if not names:
            return LawResult(law.name, None, "it gives no step that has something for each token")

        def compared(look: int) -> tuple[Verdict, bool]:
            first = self.bounds([self.inputs], second_look=look == THOROUGH)
            again = {} if look == QUICK else self.bounds(variation.runs, second_look=look == THOROUGH)
            worst, same = NOTHING, True
            for name in names:
                counts, bound = variation.counts[self.steps[name]], first[name] + again.get(name, 0.0)
                if not np.isfinite(bound):
                    continue
                theirs = np.asarray(base[name])
                if theirs.shape[:2] != counts.shape:
                    continue  # a wrong shape is for the replay to tell
                other = variation.back([np.asarray(run[name]) for run in others], self.steps[name])
                verdict, equal = difference(theirs, other, bound, counts, self.arithmetic.dtype, name)
                same = same and equal
                if not verdict.ok:
                    return verdict, False
                if ratio(verdict) >= ratio(worst):
                    worst = verdict
            return worst, same

        return _result(law.name, law.fault, law.says, compared)

    # -- the cache --------------------------------------------------------------------------------------------------------

    def _of_the_cache(self) -> Iterator[LawResult]:
        logits = f"{self.model.family}_logits"
        length = self.inputs[f"{sides(self.model)[-1]}token_ids"].shape[1]
        names = ("cache = no cache", "chunks = whole", "cache starts empty")
        sizes = [size for size in (length // 2, 1, length - length // 2 - 1) if size > 0]
        generator = np.random.default_rng([self.seed, 2])
        other = {name: array for name, array in self.inputs.items() if not name.endswith("token_ids")}
        for one in sides(self.model):
            other[f"{one}token_ids"] = random_ids(self.model, generator, self.inputs[f"{one}token_ids"].shape)
        try:
            in_one = self.candidate.chunked(self.inputs, [length])
            if in_one is None:
                yield from (LawResult(name, None, "it has no cache, or none that it can be asked for") for name in names)
                return
            plain = self.candidate.run(self.inputs).get(logits)
            single = self.candidate.chunked(self.inputs, [1] * length)
            chunks = self.candidate.chunked(self.inputs, sizes)
            plain_other = self.candidate.run(other).get(logits)
            after_other = self.candidate.chunked(other, [1] * length)
            after = self.candidate.chunked(self.inputs, sizes)
        except CandidateError as error:
            yield from (LawResult(name, None, f"it cannot be run with its cache: {error}") for name in names)
            return
        assert single is not None
        assert chunks is not None
        assert after is not None
        assert after_other is not None
        whole = [1] * length
        if plain is None:
            without = LawResult(names[0], None, f"it gives no {logits} to compare with")
        else:
            without = self._of_pairs(names[0], [(self.inputs, plain, single)], "cache-wrong", _CACHE_SAYS, whole)
        yield without
        says = "in chunks it gives something else than in one"
        yield self._of_pairs(names[1], [(self.inputs, in_one, chunks)], "cache-wrong", says, sizes)
        pairs = [(self.inputs, chunks, after)]
        if without.verdict is not None and without.verdict.ok and plain_other is not None:
            pairs.append((other, plain_other, after_other))  # right for the first text: is it for the second?
        yield self._of_pairs(names[2], pairs, "stale-cache", "after another text it still has something of it in its cache", [])

    def _of_pairs(
        self, name: str, pairs: Sequence[tuple[Inputs, Array, Array]], fault: str, says: str, sizes: Sequence[int]
    ) -> LawResult:
        """Logits of the same inputs in two ways, the second with the cache in chunks of these sizes."""
        side, logits = sides(self.model)[-1], f"{self.model.family}_logits"

        def compared(look: int) -> tuple[Verdict, bool]:
            worst, same = NOTHING, True
            for inputs, first, second in pairs:
                mask = np.asarray(inputs[f"{side}padding_mask"], bool)
                bound = (1 if look == QUICK else 2) * self.bounds([inputs], second_look=look == THOROUGH)[logits]
                verdict, equal = difference(np.asarray(first), np.asarray(second), bound, mask, self.arithmetic.dtype, logits)
                if not verdict.ok:
                    return verdict, False
                worst, same = verdict if ratio(verdict) >= ratio(worst) else worst, same and equal
            return worst, same

        found = _result(name, fault, says, compared)
        if found.verdict is not None and not found.verdict.ok and sizes:
            mask = np.asarray(self.inputs[f"{side}padding_mask"], bool)
            named = self._cache_fault(pairs[0][2], sizes, mask, found.verdict.bound)
            if named is not None:
                return replace(found, fault=named.fault, says=named.says)
        return found

    def _cache_fault(self, theirs: Array, sizes: Sequence[int], mask: Array, bound: float) -> "CacheFault | None":
        """The fault with which our own run gives what theirs gives."""
        for fault in CACHE_FAULTS:
            try:
                ours = OwnCandidate(self.model, observer=fault.observer(self.model)).chunked(self.inputs, sizes)
            except (ValueError, IndexError):
                continue  # it leads out of a table or a cache: theirs has done something else
            if ours is not None and difference(theirs, ours, bound, mask, self.arithmetic.dtype, "")[0].ok:
                return fault
        return None


def _result(name: str, fault: str, says: str, compared: Callable[[int], tuple[Verdict, bool]]) -> LawResult:
    """Compared in the cheapest way that shows the law to hold."""
    for look in (QUICK, FULL, THOROUGH):
        verdict, same = compared(look)
        if verdict.ok:
            break
    if not np.isfinite(verdict.bound):
        return LawResult(name, None, "there is nothing to compare, or our own run overflows there")
    return LawResult(name, verdict, bitwise=same) if verdict.ok else LawResult(name, verdict, "", fault, says, False)


_CACHE_SAYS = "with its cache it gives something else than without"


# -- faults of a cache ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheFault:
    """A hypothesis about a cache: `observer(model)` puts it into our ops."""

    fault: str
    says: str
    observer: Callable[[Backbone], Observer]


def _shifted_positions(by: int, *, mask: bool) -> Callable[[Backbone], Observer]:
    """Every chunk but the first stands `by` places from where it should, for the mask too or not."""

    def make(model: Backbone) -> Observer:
        def observer(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
            if mask and op.name == "token_positions":
                positions = proceed()
                return positions + by if positions.min() > 0 else positions
            if not mask and op.name in ("embedding", "relative_position_buckets", "alibi_bias"):
                bound = op.signature.bind(*args, **kwargs)
                name = "positions" if op.name != "embedding" else "ids"
                is_positions = op.name != "embedding" or bound.arguments["embeddings"] is _position_table(model)
                if is_positions and bound.arguments[name].min() > 0:
                    bound.arguments[name] = bound.arguments[name] + by
                    return op.reference(*bound.args, **bound.kwargs)
            return proceed()

        return observer

    return make


def _position_table(model: Backbone) -> Any:
    return model.device_params.get("position_embedding", {}).get("embeddings")


def _shifted_slots(by: int) -> Callable[[Backbone], Observer]:
    """Every chunk but the first is written `by` slots from where it should be."""

    def make(model: Backbone) -> Observer:
        def observer(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
            if op.name != "cache_append" or args[2] is None or args[2].min() == 0 or args[0].ndim != 4:
                return proceed()
            cache, new, start = args
            end = int(start.max()) + new.shape[1]
            last = min(end + by, cache.shape[1])
            cache[:, start[0] + by : last] = new[:, : last - (start[0] + by)]
            return cache[:, :end]

        return observer

    return make


def _unwritten(which: Sequence[str]) -> Callable[[Backbone], Observer]:
    """Keys or values of every chunk but the first do not get into the cache."""

    def make(model: Backbone) -> Observer:
        calls = 0

        def observer(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
            nonlocal calls
            if op.name != "cache_append" or args[0].ndim != 4:
                return proceed()
            calls += 1
            cache, new, start = args
            if start is None or start.min() == 0 or ("key", "value")[(calls - 1) % 2] not in which:
                return proceed()
            return cache[:, : int(start.max()) + new.shape[1]]

        return observer

    return make


_OFF_BY_ONE = "tokens taken with the cache stand one place from where they should"
_STALE = "the cache still has what was there before in place of the new"
CACHE_FAULTS = (
    *(
        CacheFault("cache-off-by-one", f"{_OFF_BY_ONE} ({'behind' if by > 0 else 'before'} it)", make)
        for by in (1, -1)
        for make in (_shifted_positions(by, mask=False), _shifted_positions(by, mask=True), _shifted_slots(by))
    ),
    CacheFault("stale-cache", f"{_STALE} keys and values", _unwritten(("key", "value"))),
    CacheFault("stale-cache", f"{_STALE} keys", _unwritten(("key",))),
    CacheFault("stale-cache", f"{_STALE} values", _unwritten(("value",))),
)
