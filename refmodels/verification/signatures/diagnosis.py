"""Diagnosis: which faults would give what theirs gives."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array, Op
from refmodels.verification.judgement import Step, judge
from refmodels.verification.lanes import OWN, Arithmetic, Value
from refmodels.verification.replay import sight_of
from refmodels.verification.run import LOCAL, MOVED, Edit, Sight
from refmodels.verification.signatures.fault import Compared, Fault, Scene, Variant
from refmodels.verification.signatures.rules import remaining

PROMISING = 0.9
"""A hypothesis that leaves more than this of the disagreement at first sight is not looked at again."""

EXPLAINED = 0.5
"""A hypothesis must leave less than this part of the disagreement (root mean square), or it explains nothing."""

ALIKE = 10.0
"""A hypothesis that leaves this many times what the best one leaves is no rival of it."""

NEAR = 0.1
"""A hypothesis that leaves less than this, and yet more than its bound, is judged once more with moved inputs."""

DOUBTFUL = 1e4
"""A step whose error is fewer times its bound is judged once more with moved inputs before anything is tried."""

NEGLIGIBLE = 0.01
"""Parts of the disagreement below this are not told apart."""


@dataclass(frozen=True)
class Finding:
    """A fault that explains a `step`: `says` what is wrong, in which form; `ratio` is what is left of the error over its bound,
    and `left` what part of the disagreement (root mean square)."""

    name: str
    says: str
    step: str
    ratio: float
    left: float = 0.0


def diagnose(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    step: str,
    *,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
    faults: Sequence[Fault] | None = None,
) -> list[Finding]:
    """The faults under which the step of theirs is right, those that leave the least error first; none if it is right.

    Only faults of ops that the step depends on are tried, given what is known of theirs. All of those returned fit: where they
    leave about the same, this case does not tell them apart. `faults` are those to try (default: all).
    """
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    case = _Case(model, inputs, theirs, step, arithmetic, substitutes)
    recorder = Recorder()
    judged, compared = case.judge(recorder)
    if judged is not None and 1 < judged.ratio < DOUBTFUL:
        judged, _ = case.judge(_unchanged, moved=True)
    if judged is None or compared is None or judged.ok:
        return []
    before = remaining(compared)
    ops, magnitudes = recorder.dependencies()
    scene = Scene(model, inputs, step, arithmetic, magnitudes)
    findings: list[tuple[bool, Finding]] = []
    for fault in _all_faults() if faults is None else faults:
        if model.family not in fault.families:
            continue
        symptom = fault.rule(scene, compared) if fault.rule else None
        fits = [_Fit(symptom.left, 0.0, symptom.detail)] if symptom else []
        variants = fault.variants(model, inputs) if fault.ops & ops else ()
        fits += filter(None, (case.fit(variant, before) for variant in variants))
        if fits:
            findings.append((fault.general, _finding(fault, step, fits)))
    return _ranked(findings)


def _all_faults() -> Sequence[Fault]:
    from refmodels.verification.signatures import FAULTS

    return FAULTS


@dataclass(frozen=True)
class _Fit:
    """How well one form of a fault explains the step."""

    left: float
    ratio: float
    detail: str

    @property
    def rank(self) -> tuple[float, float]:
        return max(self.left, NEGLIGIBLE), self.ratio


def _finding(fault: Fault, step: str, fits: Sequence[_Fit]) -> Finding:
    best = min(fits, key=lambda fit: fit.rank)
    details = [fit.detail for fit in fits if fit.detail and fit.left <= max(2 * best.left, NEGLIGIBLE)]
    says = f"{fault.says} Here: {', or '.join(dict.fromkeys(details))}." if details else fault.says
    return Finding(fault.name, says, step, best.ratio, best.left)


def _ranked(findings: Sequence[tuple[bool, Finding]]) -> list[Finding]:
    """Those that say what is done wrong before those that say what the arrays are like; then by what they leave, and where that
    is the same in the order of `FAULTS`."""
    least = min((finding.left for _, finding in findings), default=0.0)
    rivals = [pair for pair in findings if pair[1].left <= max(ALIKE * least, NEGLIGIBLE)]
    ordered = sorted(rivals, key=lambda pair: (pair[0], max(pair[1].left, NEGLIGIBLE)))
    return [finding for _, finding in ordered]


def _unchanged(op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    return run(**arguments)


@dataclass(frozen=True)
class _Case:
    """The step under test and what is known."""

    model: Backbone
    inputs: Mapping[str, Any]
    theirs: Mapping[str, Array]
    step: str
    arithmetic: Arithmetic
    substitutes: Mapping[str, Array] | None

    def judge(self, edit: Edit, *, moved: bool = False) -> tuple[Step | None, Compared | None]:
        """The step under an edit, and the arrays that were compared."""
        sight = self._sight(edit, (*LOCAL, *MOVED) if moved else LOCAL)
        return (None, None) if sight is None else (judge(sight, self.arithmetic, edit), Compared.of(sight))

    def sketch(self, edit: Edit) -> Compared | None:
        """The arrays that would be compared, roughly."""
        sight = self._sight(edit, (OWN,))
        return None if sight is None else Compared.of(sight)

    def _sight(self, edit: Edit, lanes: tuple[int, ...]) -> Sight | None:
        return sight_of(
            self.model,
            self.inputs,
            self.theirs,
            self.step,
            lanes=lanes,
            edit=edit,
            arithmetic=self.arithmetic,
            substitutes=self.substitutes,
        )

    def fit(self, variant: Variant, before: float) -> _Fit | None:
        """How the step looks under this hypothesis; None where it is wrong all the same, or cannot be formed."""
        try:
            if not remaining(self.sketch(variant.edit)) < PROMISING * before:
                return None
            judged, compared = self.judge(variant.edit)
            if judged is None or compared is None:
                return None
            after = remaining(compared)
            left = 0.0 if math.isinf(before) and not math.isinf(after) else after / before
            if not judged.ok and left < NEAR and judged.local.bound > 0:
                judged, _ = self.judge(variant.edit, moved=True)
        except (ValueError, IndexError, ImportError):  # no such shape with these heads, no such type on this machine
            return None
        return _Fit(left, judged.ratio, variant.detail) if judged is not None and judged.ok and left < EXPLAINED else None


class Recorder:
    """An edit that changes nothing and sees which calls the last one depends on: those whose results reach it, unless theirs
    took their place on the way."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._made: dict[int, tuple[weakref.ref[Array], int]] = {}
        self._around: list[str] = []
        self._lanes: Counter[str] = Counter()
        self._last: Any = None

    def __call__(self, op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        if op.composite:
            self._around.append(op.name)
            try:
                self._last = run(**arguments)
            finally:
                self._around.pop()
            return self._last
        self._lanes[name] += 1
        if self._lanes[name] > 2:  # neither our own lane nor the truth: how large a sum of magnitudes would be
            return run(**arguments)
        inputs = [number for array in arguments.values() if (number := self._maker(array)) is not None]
        self._last = run(**arguments)
        if isinstance(self._last, np.ndarray):
            self._made[id(self._last)] = weakref.ref(self._last), len(self._calls)
            largest = float(np.abs(self._last).max(initial=0.0)) if self._last.dtype == np.float64 else 0.0
            self._calls.append(_Call(op.name, name, inputs, (*self._around,), largest))
        return self._last

    def _maker(self, array: Any) -> int | None:
        """The number of the call that made this array."""
        found = self._made.get(id(array))
        return found[1] if found is not None and found[0]() is array else None

    def dependencies(self) -> tuple[frozenset[str], dict[str, float]]:
        """The names of the ops that the last call depends on, composites around them included; the largest magnitudes of the
        steps, in order."""
        results = self._last.lanes if isinstance(self._last, Value) else [self._last]
        waiting = [number for array in results if (number := self._maker(array)) is not None]
        reached: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number not in reached:
                reached.add(number)
                waiting += self._calls[number].inputs
        ops: set[str] = set()
        magnitudes: dict[str, float] = {}
        for number in sorted(reached):
            call = self._calls[number]
            ops |= {call.op, *call.around}
            magnitudes[call.name] = max(magnitudes.get(call.name, 0.0), call.largest)
        return frozenset(ops), magnitudes


@dataclass(frozen=True)
class _Call:
    op: str
    name: str
    inputs: Sequence[int]
    around: tuple[str, ...]
    largest: float
