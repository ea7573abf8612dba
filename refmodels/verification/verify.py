"""Verify a candidate: run it on a few cases, judge its steps, name what is wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refmodels.backbone import Backbone
from refmodels.numerics import Verdict
from refmodels.op import Array
from refmodels.trace import traced
from refmodels.verification.candidate import Candidate
from refmodels.verification.evidence import Evidence, gather
from refmodels.verification.judgement import Step
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import Report, replay
from refmodels.verification.signatures import FAULTS, Finding, diagnose

AGREES, DIVERGES, CANNOT_RUN, INCONCLUSIVE = range(4)
"""Exit statuses of `refmodels verify`."""


@dataclass(frozen=True)
class Case:
    """Inputs to try: `name` says what is special about them."""

    name: str
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class CaseResult:
    """What a case gave: the report of its steps, the faults that explain the first wrong one, and what that looks like."""

    case: Case
    report: Report
    findings: tuple[Finding, ...] = ()
    evidence: Evidence | None = None


@dataclass(frozen=True)
class LawResult:
    """A law that needs no reference (`batch = singles`): its verdict, or None and why it was not tried.

    `fault` names what is wrong where the law is broken and `says` what that is, in one sentence; `bitwise` is whether the two
    ways gave the same bits, which nobody has to.
    """

    name: str
    verdict: Verdict | None
    reason: str = ""
    fault: str = ""
    says: str = ""
    bitwise: bool | None = None


@dataclass(frozen=True)
class Verification:
    """The whole outcome for one candidate."""

    candidate: str
    model: str
    arithmetic: str
    cases: tuple[CaseResult, ...]
    laws: tuple[LawResult, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> tuple[CaseResult, Step] | None:
        """The first case with a wrong step, and that step."""
        return next(((result, result.report.first) for result in self.cases if result.report.first is not None), None)

    @property
    def status(self) -> int:
        """Exit status: DIVERGES if a step or a law is wrong by itself; INCONCLUSIVE if each step is right and yet what has
        added up is not; else AGREES."""
        if self.first is not None or any(law.verdict is not None and not law.verdict.ok for law in self.laws):
            return DIVERGES
        through = [step.through for result in self.cases for step in result.report.steps if step.through is not None]
        return AGREES if all(verdict.ok for verdict in through) else INCONCLUSIVE


def cases(model: Backbone, seed: int = 0) -> list[Case]:
    """Inputs that bring out what people get wrong: one row, padding on either side, a length past T5's exact buckets."""
    generator = np.random.default_rng(seed)
    longest = getattr(model.config, "max_sequence_length", None) or 150

    def ids(batch: int, length: int) -> Array:
        return generator.integers(3, model.config.vocabulary_size, (batch, length))

    def mask(lengths: Sequence[int], length: int, side: str = "right") -> Array:
        places = np.arange(length) if side == "right" else np.arange(length)[::-1]
        return np.stack([places < count for count in lengths])

    found = []
    short, ragged, long = 7, min(12, longest), min(150, longest)
    for name, rows, length, lengths, side in (
        ("one row", 1, short, [short], "right"),
        ("padded on the right", 3, ragged, [ragged, 5, 1], "right"),
        ("padded on the left", 3, ragged, [ragged, 5, 2], "left"),
        ("long", 1, long, [long], "right"),
    ):
        if model.family == "t5":
            target = min(length, 24)
            inputs = {
                "encoder_token_ids": ids(rows, length),
                "encoder_padding_mask": mask(lengths, length, side),
                "decoder_token_ids": ids(rows, target),
                "decoder_padding_mask": np.ones((rows, target), bool),
            }
        else:
            inputs = {"token_ids": ids(rows, length), "padding_mask": mask(lengths, length, side)}
        found.append(Case(name, inputs))
    return found


def verify(
    candidate: Candidate,
    model: Backbone,
    tried: Sequence[Case] | None = None,
    *,
    inject: bool = True,
    progress: Callable[[str, Step], None] = lambda case, step: None,
) -> Verification:
    """Judge a candidate beside `model`, which has its weights, in its type. All cases are tried (default: `cases`)."""
    arithmetic = Arithmetic(candidate.dtype, candidate.products)
    results: list[CaseResult] = []
    named: dict[str, set[str]] = {}  # trying every fault takes as long as many runs: the next case tries what fitted
    for case in cases(model) if tried is None else tried:

        def arrived(step: Step, name: str = case.name) -> None:
            progress(name, step)

        substitutes: Mapping[str, Array] = {}
        if inject and candidate.injects:
            substitutes = traced(model, case.inputs, candidate.injects.__contains__)
        theirs = candidate.run(case.inputs, substitutes or None)
        report = replay(model, case.inputs, theirs, arithmetic=arithmetic, substitutes=substitutes, progress=arrived)
        findings: list[Finding] = []
        if report.first is not None:
            step = report.first.name
            faults = FAULTS if step not in named else [fault for fault in FAULTS if fault.name in named[step]]
            findings = diagnose(model, case.inputs, theirs, step, arithmetic=arithmetic, substitutes=substitutes, faults=faults)
            named.setdefault(step, {finding.name for finding in findings})
        evidence = gather(model, case.inputs, theirs, report, arithmetic=arithmetic, substitutes=substitutes)
        results.append(CaseResult(case, report, tuple(findings), evidence))
    return Verification(candidate.name, model.name, str(arithmetic), tuple(results), facts=candidate.facts())
