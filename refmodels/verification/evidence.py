"""What a wrong step looks like: where it is wrong, the part of it that holds the worst value, the attention that it spoils."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import OPS, Array, Shape
from refmodels.verification.judgement import SHIFTED, Step, without_shift
from refmodels.verification.lanes import TRUTH, TRUTH_THROUGH, Arithmetic
from refmodels.verification.replay import Report
from refmodels.verification.run import LOCAL, THROUGH, Enough, Run, Sight

MAX_ROWS, MAX_COLUMNS = 256, 2048
"""No more of a step is kept: some 9 MB, whatever the model."""

EXAMPLES = 8
"""So many of the worst values are kept by themselves."""

AXES = {"b": "row", "t": "position", "s": "key", "h": "head", "d": "channel", "v": "token", "r": "bucket", "1": ""}
"""What a letter of an op's signature counts; any other counts channels. An axis of size 1 counts nothing."""

WEIGHED = ("masked_softmax", "attention_scores")
"""Steps that show whom a token attends to, the plainer one first."""

BEFORE_WEIGHTS = ("causal_mask", "key_mask", "alibi_slopes", "alibi_bias", "relative_position_buckets")
"""Steps outside of any layer that every attention after them goes by."""


@dataclass(frozen=True)
class Slice:
    """A table of numbers out of a step, theirs and ours (in float64): the one at `at`, such as `row 0, head 3`.

    `axes` say what its rows and columns count, `start` from which of them on it was kept; `judged` are the values that count.
    """

    step: str
    at: str
    axes: tuple[str, str]
    start: tuple[int, int]
    theirs: Array
    ours: Array
    judged: Array

    @property
    def error(self) -> Array:
        """How far theirs are from ours; infinite where only one of them is finite; 0 where it does not count."""
        return _distance(self.theirs, self.ours, self.judged)


@dataclass(frozen=True)
class Example:
    """One value: its index in the step, theirs and ours."""

    index: tuple[int, ...]
    theirs: float
    ours: float


@dataclass(frozen=True)
class Evidence:
    """Of one wrong step. `bound` is what its worst value is held to; `wrong` of `judged` values are further off than that,
    and `where` says in words which. In `attention`, ours are the weights as they would be without the fault."""

    step: str
    bound: float
    wrong: int
    judged: int
    where: str
    worst: tuple[Example, ...]
    error: Slice
    attention: Slice | None = None


def gather(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    report: Report,
    *,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
) -> Evidence | None:
    """What the first wrong step of a report looks like; None without one, or where its shape is what is wrong."""
    step = report.first
    if step is None:
        return None
    attention = _attention(step, report.steps)
    names, through = {step.name, *([] if attention is None else [attention.name])}, attention is not None
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    found: dict[str, Sight] = {}

    def look(sight: Sight) -> None:
        if sight.name in names and sight.fits:
            found[sight.name] = sight
            if found.keys() == names:
                raise Enough

    lanes = (*LOCAL, *THROUGH) if through else LOCAL
    toward = None if through else step.name  # a single step takes little more than running its own layer
    Run(model, arithmetic, look, theirs=theirs, substitutes=substitutes, lanes=lanes, toward=toward).through(inputs)
    if step.name not in found:
        return None
    weights = None
    if attention is not None and attention.name in found:
        sight = found[attention.name]
        weights = _slice(attention, np.asarray(sight.theirs), sight.lane(TRUTH_THROUGH), _judged(sight))
    return _evidence(step, found[step.name], weights)


def _attention(step: Step, steps: Sequence[Step]) -> Step | None:
    """The weights that this step had a part in, if it spoilt them."""
    place = step.name.partition(":")[0]
    later = steps[steps.index(step) :]
    for op in WEIGHED:
        for weights in later:
            own = weights.name.partition(":")[0]
            if weights.op == op and (own == place or place.startswith(f"{own}.") or step.op in BEFORE_WEIGHTS):
                spoilt = not weights.ok or (weights.through is not None and not weights.through.ok)
                return weights if spoilt else None
    return None


def _evidence(step: Step, sight: Sight, attention: Slice | None) -> Evidence:
    judged, bound = _judged(sight), step.local.bound
    theirs, ours = _wide(np.asarray(sight.theirs)), _wide(sight.lane(TRUTH))
    if step.op in SHIFTED:
        theirs = without_shift(theirs, ours, sight.selected)
    error = _distance(theirs, ours, judged)
    wrong = error > bound
    order = np.flatnonzero(wrong)
    if order.size > EXAMPLES:  # logits have millions
        order = order[np.argpartition(-error.flat[order], EXAMPLES)[:EXAMPLES]]
    order = order[np.argsort(-error.flat[order], kind="stable")]
    indices = [tuple(map(int, np.unravel_index(place, error.shape))) for place in order]
    return Evidence(
        step=step.name,
        bound=bound,
        wrong=int(wrong.sum()),
        judged=int(judged.sum()),
        where=_where(wrong, judged, _axes(step)),
        worst=tuple(Example(index, float(theirs[index]), float(ours[index])) for index in indices),
        error=_slice(step, theirs, ours, judged, index=step.local.index),
        attention=attention,
    )


def _judged(sight: Sight) -> Array:
    return np.broadcast_to(True, sight.result.shape) if sight.selected is None else sight.selected


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _distance(theirs: Array, ours: Array, judged: Array) -> Array:
    with np.errstate(invalid="ignore"):
        error = np.abs(theirs - ours)
    same = (theirs == ours) | (np.isnan(theirs) & np.isnan(ours))
    error = np.where(same | ~judged, 0.0, error)
    return np.where(np.isnan(error), np.inf, error)


def _axes(step: Step) -> tuple[str, ...]:
    """What each axis of this step counts."""
    rank, result = len(step.shape), OPS[step.op].result if step.op in OPS else None
    letters = [dim.lstrip("#") for dim in result.dims] if isinstance(result, Shape) else []
    if len(letters) != rank or letters[0].startswith("*"):  # any leading axes: of activations
        lead, last = max(rank - 1, 0), letters[-1:] if letters and not letters[-1].startswith("*") else ["n"]
        letters = [*"bt"[:lead], *["n"] * (lead - 2), *last][-rank:]
    return tuple(AXES.get(letter, "channel") for letter in letters[:rank])


def _where(wrong: Array, judged: Array, axes: Sequence[str]) -> str:
    """`every row, every position, channels 4 to 7`."""
    said = []
    for axis, name in enumerate(axes):
        others = tuple(i for i in range(wrong.ndim) if i != axis)
        bad, counted = np.flatnonzero(wrong.any(others)), np.flatnonzero(judged.any(others))
        if len(counted) > 1:
            said.append(f"every {name}" if len(bad) == len(counted) else _ranges(name, bad.tolist()))
    return ", ".join(said)


def _ranges(name: str, numbers: Sequence[int], most: int = 4) -> str:
    """`key 3`, `keys 1, 4 to 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    said = ", ".join(" to ".join(map(str, run)) for run in runs[:most])
    if len(runs) > most:
        return f"{len(numbers)} {name}s ({said} ...)"
    return f"{name}{'s' if len(numbers) > 1 else ''} {said}"


def _slice(step: Step, theirs: Array, ours: Array, judged: Array, index: Sequence[int] = ()) -> Slice:
    """The table that holds the value at this index, else the worst: one row of the batch, and one head of pairs of tokens."""
    axes, found = _axes(step), int(np.ravel_multi_index(tuple(index), theirs.shape)) if index else None
    arrays = [_wide(theirs), _wide(np.broadcast_to(ours, theirs.shape)), np.broadcast_to(judged, theirs.shape)]
    if len(axes) == 4 and axes[-1] == "channel":  # heads side by side
        arrays, axes = [array.reshape(*array.shape[:2], -1) for array in arrays], (*axes[:2], "channel")
    if len(axes) < 2:
        arrays, axes = [array.reshape(1, -1) for array in arrays], ("row", *axes)
    worst = np.unravel_index(int(_distance(*arrays).argmax()) if found is None else found, arrays[0].shape)
    lead = tuple(int(i) for i in worst[:-2])
    at = ", ".join(f"{name} {i}" for name, i in zip(axes, lead, strict=False) if name)
    start, window = [], []
    for place, size, most in zip(worst[-2:], arrays[0].shape[-2:], (MAX_ROWS, MAX_COLUMNS), strict=True):
        start.append(max(0, min(int(place) - most // 2, size - most)))
        window.append(slice(start[-1], start[-1] + most))
    kept = [array[lead][tuple(window)].copy() for array in arrays]
    return Slice(step.name, at, (axes[-2], axes[-1]), (start[0], start[1]), kept[0], kept[1], kept[2])
