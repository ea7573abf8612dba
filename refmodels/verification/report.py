"""What a verification says: a table for the terminal, JSON, a JUnit file; and what got worse since an earlier one.

The keys of the JSON and how to read the table are in `spec/verification-report.md`. Names come from strangers: they are
printed without control characters and never at full length if that is long.
"""

import json
import math
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmodels import junit
from refmodels.files import CheckpointError, parse_json, read_bytes, write_bytes
from refmodels.numerics import Verdict
from refmodels.printing import aligned, printable
from refmodels.verification.judgement import Step, ratio
from refmodels.verification.replay import Report
from refmodels.verification.verify import AGREES, CANNOT_RUN, DIVERGES, INCONCLUSIVE, CaseResult, Verification

FORMAT = "refmodels.verification"
VERSION = 1

OUTCOMES = {AGREES: "agrees", DIVERGES: "diverges", CANNOT_RUN: "cannot run", INCONCLUSIVE: "inconclusive"}
"""What an exit status is called."""

GROWTH = 4.0
"""How many times as large the error over bound of a wrong step must be to count as worse. Measured: on four sorts
of BLAS kernels the same fault moves it by 0.005 %; a fault that is itself noise, drawn 20 times, by a factor of up to 2.2."""


# -- layers -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The steps of one layer, or one step that is in none."""

    name: str
    steps: tuple[Step, ...]

    @property
    def ok(self) -> bool:
        """Whether every step is right by itself."""
        return all(step.ok for step in self.steps)

    @property
    def local(self) -> float:
        """The largest error over bound of its steps."""
        return max(step.ratio for step in self.steps)

    @property
    def accumulated(self) -> float | None:
        """Of the last step whose accumulated error is known, that error over its bound."""
        return next((ratio(step.through) for step in reversed(self.steps) if step.through is not None), None)

    @property
    def largest(self) -> float:
        """The largest magnitude of the truth."""
        return max(step.largest for step in self.steps)


def layers(report: Report) -> list[Layer]:
    """The steps by layer, in the order in which the layers end."""
    found: dict[str, tuple[Step, ...]] = {}
    for step in report.steps:
        name = layer_name(step.name)
        found[name] = (*found.pop(name, ()), step)
    return [Layer(name, steps) for name, steps in found.items()]


def layer_name(step: str) -> str:
    """`encoder.layers.0` for whatever is in that layer, else the step itself."""
    found = re.match(r"[^:]*?\.\d+(?=[.:])", step)
    return found[0] if found else step


def short_name(step: str, layer: str) -> str:
    """The name of a step inside its layer."""
    return step if step == layer else step[len(layer) + 1 :]


# -- the table --------------------------------------------------------------------------------------------------------------


def table(verification: Verification, *, width: int | None = None, all_steps: bool = False) -> str:
    """What was found, for a terminal of this width (its own by default): for each case a line a layer; in the first case that
    diverges the steps of the layer in which it does, or everywhere `all_steps`; then the diagnosis in words."""
    width = width or shutil.get_terminal_size((120, 40)).columns
    parts, seen = [], set()
    for result in verification.cases:
        first = result.report.first
        opens = first is not None and first.name not in seen
        seen |= {first.name} if first is not None else set()
        parts.append(_case_table(result, width, opens, all_steps))
    parts.append("\n".join(_wrapped(line, width) for line in diagnosis(verification)))
    return "\n\n".join(parts)


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, max(width, 40), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _case_table(result: CaseResult, width: int, opens: bool, all_steps: bool) -> str:
    """`opens`: the layer of the first wrong step is shown step by step."""
    report = result.report
    first, verdicts = report.first, step_verdicts(report)

    def row(name: str, local: float, accumulated: float | None, largest: float, verdict: str) -> tuple[str, ...]:
        return name, number(local), "" if accumulated is None else number(accumulated), f"{largest:.3g}", verdict

    def step_row(step: Step, name: str) -> tuple[str, ...]:
        accumulated = None if step.through is None else ratio(step.through)
        said = verdicts[step.name] + ("  <- first" if step is first else "")
        return row(name, step.ratio, accumulated, step.largest, said)

    rows: list[tuple[str, ...]] = [("STEP", "LOCAL", "ACCUMULATED", "LARGEST", "VERDICT")]
    for layer in layers(report):
        if len(layer.steps) == 1:
            rows.append(step_row(layer.steps[0], layer.steps[0].name))
            continue
        has_first = first is not None and first in layer.steps
        is_open = all_steps or (opens and has_first)
        verdict = layer_verdict(layer, verdicts)
        if first is not None and has_first and not is_open:
            verdict += f" at {printable(short_name(first.name, layer.name), 80)}"
        title = f"{layer.name} ({len(layer.steps)} steps)"
        rows.append(row(title, layer.local, layer.accumulated, layer.largest, verdict))
        rows += [step_row(step, f"  {short_name(step.name, layer.name)}") for step in layer.steps if is_open]
    rest = sum(max(len(row[column]) for row in rows) + 2 for column in range(1, 5)) + 2
    rows = [(printable(name, max(width - rest, 20)), *others) for name, *others in rows]
    return "\n".join([case_title(result), *(f"  {line}" for line in aligned(rows, right=(1, 2, 3)))])


def case_title(result: CaseResult) -> str:
    """`Case "one row": token_ids 1 x 7, padding_mask 1 x 7`."""
    shapes = (f"{printable(name)} {' x '.join(map(str, array.shape))}" for name, array in result.case.inputs.items())
    return f'Case "{printable(result.case.name)}": {", ".join(shapes)}'


def step_verdicts(report: Report) -> dict[str, str]:
    """`right`, `WRONG`, or `unclear`: right by itself, and more has added up than is allowed though no step before is wrong."""
    said, faulty = {}, False
    for step in report.steps:
        faulty = faulty or not step.ok
        unclear = not faulty and step.through is not None and not step.through.ok
        said[step.name] = "unclear" if unclear else "right" if step.ok else "WRONG"
    return said


def layer_verdict(layer: Layer, verdicts: Mapping[str, str]) -> str:
    """The worst verdict of its steps."""
    found = {verdicts[step.name] for step in layer.steps}
    return next(verdict for verdict in ("WRONG", "unclear", "right") if verdict in found)


def number(value: float) -> str:
    """An error over its bound: two decimals, and two digits where it is far from 1."""
    if not math.isfinite(value) or 0.01 <= value < 1000 or value == 0:
        return f"{value:.2f}"
    return "<0.01" if value < 0.01 else f"{value:.1e}"


# -- the diagnosis in words -------------------------------------------------------------------------------------------------


def diagnosis(verification: Verification) -> list[str]:
    """What is wrong, how wrong, why as far as is known, and what was not looked at: a sentence or two in each entry."""
    said = [headline(verification)]
    for results in by_first(verification):
        said += ["", *explained(results)]
    unclear = accumulated_in_words(verification)
    said += ["", *unclear] if unclear else []
    said += _laws(verification)
    said += _not_compared(verification)
    facts = dict(verification.facts)
    for result in verification.cases:
        facts |= result.report.facts
    said += [f"With {', '.join(f'{printable(key)} {printable(value)}' for key, value in facts.items())}."] if facts else []
    return said


def headline(verification: Verification) -> str:
    """One line: who, beside what, and the outcome."""
    who = f"{printable(verification.candidate, 80)} beside {printable(verification.model, 80)} in {verification.arithmetic}"
    return f"{who}: {OUTCOMES[verification.status].upper()}; {counts(verification)}"


def counts(verification: Verification) -> str:
    """How many steps are wrong, and how many laws."""
    steps = sum(len(result.report.steps) for result in verification.cases)
    wrong = sum(len(result.report.wrong) for result in verification.cases)
    broken = sum(law.verdict is not None and not law.verdict.ok for law in verification.laws)
    said = f"{wrong} of {_count(steps, 'step')} wrong in {_count(len(verification.cases), 'case')}"
    return said + (f", {broken} of {_count(len(verification.laws), 'law')} broken" if verification.laws else "")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def by_first(verification: Verification) -> list[list[CaseResult]]:
    """The cases that diverge, together where it is at the same step and for the same reason."""
    found: dict[tuple[str, ...], list[CaseResult]] = {}
    for result in verification.cases:
        if result.report.first is not None:
            key = (result.report.first.name, *(finding.name for finding in result.findings[:1]))
            found.setdefault(key, []).append(result)
    return list(found.values())


def explained(results: Sequence[CaseResult]) -> list[str]:
    """Cases that diverge at the same step: which, how wrong, where, why."""
    result = worst_case(results)
    step = result.report.first
    assert step is not None
    names = ", ".join(f'"{printable(found.case.name)}"' for found in results)
    said = [f"First wrong step: {printable(step.name)}, in {'case' if len(results) == 1 else 'cases'} {names}."]
    said.append(how_wrong(step) + (f' In case "{printable(result.case.name)}".' if len(results) > 1 else ""))
    if result.evidence is not None and result.evidence.wrong:
        found = result.evidence
        said.append(f"Where: in {found.wrong} of {_count(found.judged, 'value')}{f': {found.where}' if found.where else ''}.")
    if result.findings:
        best, *others = result.findings
        said.append(f"Why: {printable(best.name)}: {printable(best.says, 600)}")
        if others:
            said.append(f"That fits too: {', '.join(printable(other.name) for other in others)}.")
    else:
        said.append("Why: none of the faults known by name explains it.")
    inside = inner_steps(step, result.report)
    if inside:
        some = ", ".join(printable(name) for name in inside[:3])
        said.append(
            f"To see which of the steps inside it that is, give some of its {len(inside)}: {some}{' ...' * (len(inside) > 3)}"
        )
    more = [other for other in result.report.wrong if other is not step]
    if more:
        some = ", ".join(printable(other.name) for other in more[:4])
        said.append(
            f"Wrong by themselves as well, given their own inputs: {some}{f' and {len(more) - 4} more' * (len(more) > 4)}."
        )
    return said


def worst_case(results: Sequence[CaseResult]) -> CaseResult:
    """The case in which the first wrong step is furthest off."""
    return max(results, key=lambda result: result.report.first.ratio if result.report.first else 0.0)


def how_wrong(step: Step) -> str:
    """How far a step is off against what is allowed."""
    local = step.local
    if not math.isfinite(step.ratio) or local.bound <= 0:
        return f"{printable(local.reason, 400)}."
    return (
        f"It is off by {local.error:.3g} at {local.index}, where {local.bound:.3g} is allowed: {number(step.ratio)} times "
        f"as much. The largest value of the step is {step.largest:.3g}."
    )


def inner_steps(step: Step, report: Report) -> list[str]:
    """The steps inside this one that they did not give: what would say where in it the fault is."""
    place, _, op = step.name.partition(":")
    if not op:  # a whole stack
        return list(report.absent)
    return [name for name in report.absent if name.startswith((f"{place}.", f"{place}:"))]


def accumulated_in_words(verification: Verification) -> list[str]:
    """The cases in which every step is right and what has added up is not."""
    said = []
    for result in verification.cases:
        verdicts = step_verdicts(result.report)
        step = next((step for step in result.report.steps if verdicts[step.name] == "unclear"), None)
        if step is not None and step.through is not None:
            said.append(
                f'In case "{printable(result.case.name)}" every step up to {printable(step.name)} is right by itself, and '
                f"yet what has added up there is {number(ratio(step.through))} times what is allowed: give more of the "
                "steps before it."
            )
    return said


def _laws(verification: Verification) -> list[str]:
    if not verification.laws:
        return []
    kept = [law for law in verification.laws if law.verdict is not None and law.verdict.ok]
    broken = [law for law in verification.laws if law.verdict is not None and not law.verdict.ok]
    untried = [law for law in verification.laws if law.verdict is None]
    said = [
        f"Law broken: {printable(law.name)}: {printable(law.verdict.reason, 400)}." for law in broken if law.verdict is not None
    ]
    said += [f"Laws kept: {', '.join(printable(law.name) for law in kept)}."] if kept else []
    said += [f"Law not tried: {printable(law.name)}: {printable(law.reason, 400)}." for law in untried]
    return ["", *said]


def _not_compared(verification: Verification) -> list[str]:
    said = []
    for names, what in not_compared(verification):
        some = ", ".join(printable(name, 80) for name in names[:3])
        said.append(f"Not compared: {len(names)} {what} ({some}{' ...' * (len(names) > 3)}).")
    return ["", *said] if said else []


def not_compared(verification: Verification) -> list[tuple[list[str], str]]:
    """Names of steps that only one side has, and whose they are."""
    absent = list(dict.fromkeys(name for result in verification.cases for name in result.report.absent))
    unknown = list(dict.fromkeys(name for result in verification.cases for name in result.report.unknown))
    found = [(absent, "of ours that they do not give"), (unknown, "of theirs that we have no step for")]
    return [(names, what) for names, what in found if names]


# -- JSON -------------------------------------------------------------------------------------------------------------------


def as_json(verification: Verification) -> dict[str, Any]:
    """The whole outcome; its keys are stable and documented. A number that is not finite is null."""
    first = verification.first
    return {
        "format": FORMAT,
        "version": VERSION,
        "candidate": verification.candidate,
        "model": verification.model,
        "arithmetic": verification.arithmetic,
        "status": verification.status,
        "outcome": OUTCOMES[verification.status],
        "first": None if first is None else {"case": first[0].case.name, "step": first[1].name},
        "cases": [_case_record(result) for result in verification.cases],
        "laws": [
            {"name": law.name, "reason": law.reason, "verdict": None if law.verdict is None else _verdict_record(law.verdict)}
            for law in verification.laws
        ],
        "facts": dict(verification.facts),
    }


def _case_record(result: CaseResult) -> dict[str, Any]:
    report, evidence = result.report, result.evidence
    return {
        "name": result.case.name,
        "inputs": {name: list(array.shape) for name, array in result.case.inputs.items()},
        "ok": report.ok,
        "first": None if report.first is None else report.first.name,
        "steps": [_step_record(step) for step in report.steps],
        "findings": [
            {"name": finding.name, "says": finding.says, "step": finding.step, "ratio": _finite(finding.ratio)}
            for finding in result.findings
        ],
        "evidence": None
        if evidence is None
        else {
            "step": evidence.step,
            "wrong": evidence.wrong,
            "judged": evidence.judged,
            "where": evidence.where,
            "worst": [
                {"index": list(example.index), "theirs": _finite(example.theirs), "ours": _finite(example.ours)}
                for example in evidence.worst
            ],
        },
        "absent": list(report.absent),
        "unknown": list(report.unknown),
        "facts": dict(report.facts),
    }


def _step_record(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "op": step.op,
        "shape": list(step.shape),
        "local": _verdict_record(step.local),
        "accumulated": None if step.through is None else _verdict_record(step.through),
        "largest": _finite(step.largest),
        "judged": step.judged,
        "size": step.size,
    }


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    return {
        "ok": verdict.ok,
        "ratio": _finite(ratio(verdict)),
        "error": _finite(verdict.error),
        "bound": _finite(verdict.bound),
        "index": list(verdict.index),
        "reason": verdict.reason,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write_report(verification: Verification, path: str | Path) -> None:
    """Write the JSON to a file, such as the baseline of later runs: complete or not there."""
    write_bytes(Path(path), (json.dumps(as_json(verification), indent=1, allow_nan=False) + "\n").encode())


# -- JUnit ------------------------------------------------------------------------------------------------------------------


def write_junit(verification: Verification, path: str | Path, *, excused: Mapping[tuple[str, str], str] | None = None) -> None:
    """Write a JUnit file: a test case for each step of each case, one for what has added up in it, one for each law.

    What is not clear is an error, what is not tried is skipped; so is, with its reason, a failure that is `excused` by its
    (case, name).
    """
    cases = (_excused(case, excused or {}) for case in _test_cases(verification))
    junit.write_junit(Path(path), f"refmodels verify {verification.candidate}", cases)


def _excused(case: junit.TestCase, excused: Mapping[tuple[str, str], str]) -> junit.TestCase:
    reason = excused.get((case.group, case.name))
    if reason is None or case.outcome not in ("failure", "error"):
        return case
    return junit.TestCase(case.group, case.name, "skipped", f"{reason}: {case.message}", case.text)


def _test_cases(verification: Verification) -> Iterator[junit.TestCase]:
    for result in verification.cases:
        group, verdicts = result.case.name, step_verdicts(result.report)
        for step in result.report.steps:
            if step.ok:
                yield junit.TestCase(group, step.name)
                continue
            text = "\n".join(explained([result])) if step is result.report.first else how_wrong(step)
            yield junit.TestCase(group, step.name, "failure", step.local.reason, text)
        unclear = next((step for step in result.report.steps if verdicts[step.name] == "unclear"), None)
        if unclear is None or unclear.through is None:
            yield junit.TestCase(group, ACCUMULATED)
        else:
            yield junit.TestCase(group, ACCUMULATED, "error", unclear.through.reason)
    for law in verification.laws:
        if law.verdict is None:
            yield junit.TestCase(LAWS, law.name, "skipped", law.reason)
        else:
            yield junit.TestCase(
                LAWS, law.name, "" if law.verdict.ok else "failure", "" if law.verdict.ok else law.verdict.reason
            )


ACCUMULATED = "accumulated"
"""In place of a step: what has added up over all of them."""

LAWS = "laws"
"""In place of a case: what needs no reference."""


# -- baseline ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """How a step or a law stood: `ok`, and its error over bound."""

    ok: bool
    ratio: float

    def __str__(self) -> str:
        return f"{'right' if self.ok else 'wrong'} ({number(self.ratio)})"


@dataclass(frozen=True)
class Baseline:
    """An earlier outcome: of which model and arithmetic, and a mark for each (case, step) and (`laws`, law)."""

    source: str
    model: str
    arithmetic: str
    marks: Mapping[tuple[str, str], Mark]


@dataclass(frozen=True)
class Worse:
    """Something that got worse: the mark that it had, and has; None where it was not there, or is not any more."""

    case: str
    name: str
    before: Mark | None
    after: Mark | None

    def __str__(self) -> str:
        before = "was not in the baseline" if self.before is None else f"was {self.before}"
        after = "is no longer compared" if self.after is None else f"is {self.after}"
        return f"{printable(self.case)}: {printable(self.name)} {before}, {after}"


def read_baseline(path: str | Path) -> Baseline:
    """The outcome in a file that `write_report` or `--json` wrote. CheckpointError if it is none or is not there."""
    path = Path(path)
    value = parse_json(read_bytes(path.parent, path.name), str(path))
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        found = f"format {str(value.get('format'))[:50]!r}, version {str(value.get('version'))[:20]!r}"
        raise CheckpointError(f"{path}: {found}, wanted {FORMAT!r}, version {VERSION}")
    try:
        model, arithmetic = value["model"], value["arithmetic"]
        if not isinstance(model, str) or not isinstance(arithmetic, str):
            raise TypeError("model and arithmetic must be strings")
        return Baseline(str(path), model, arithmetic, dict(_marks(value)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: no verification: {type(error).__name__}: {str(error)[:200]}") from None


def _marks(value: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Mark]]:
    """The marks in a record, as `as_json` makes it; TypeError, KeyError or ValueError for a record that is none."""
    for case in value["cases"]:
        clear, faulty = True, False
        for step in case["steps"]:
            mark = _mark(step["local"])
            faulty = faulty or not mark.ok
            clear = clear and (faulty or step["accumulated"] is None or _mark(step["accumulated"]).ok)
            yield (_text(case["name"]), _text(step["name"])), mark
        if not faulty or not clear:  # after a wrong step it says nothing of its own
            yield (_text(case["name"]), ACCUMULATED), Mark(clear, 0.0 if clear else math.inf)
    for law in value["laws"]:
        if law["verdict"] is not None:
            yield (LAWS, _text(law["name"])), _mark(law["verdict"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"wanted a name, found {str(value)[:50]!r}")
    return value


def _mark(verdict: Mapping[str, Any]) -> Mark:
    ok, found = verdict["ok"], verdict["ratio"]
    if not isinstance(ok, bool) or not (found is None or (type(found) in (int, float) and found >= 0)):
        raise TypeError(f"wanted a verdict, found ok {str(ok)[:50]!r}, ratio {str(found)[:50]!r}")
    return Mark(ok, math.inf if found is None else float(found))


def worse_than(verification: Verification, baseline: Baseline) -> list[Worse]:
    """What got worse since the baseline: what was right or not there and is wrong; what is wrong by more than GROWTH times as
    much as it was; and what was compared and is not any more, for it can fail no longer.

    CheckpointError if the baseline is of another model or arithmetic.
    """
    for what, before, after in (
        ("model", baseline.model, verification.model),
        ("arithmetic", baseline.arithmetic, verification.arithmetic),
    ):
        if before != after:
            raise CheckpointError(f"{baseline.source}: its {what} is {printable(before)!r}, wanted {printable(after)!r}")
    marks = dict(_marks(as_json(verification)))
    found = [
        Worse(*key, baseline.marks.get(key), mark) for key, mark in marks.items() if _is_worse(baseline.marks.get(key), mark)
    ]
    lost = ((key, mark) for key, mark in baseline.marks.items() if key not in marks and key[1] != ACCUMULATED)
    return found + [Worse(*key, mark, None) for key, mark in lost]


def _is_worse(before: Mark | None, after: Mark) -> bool:
    if after.ok:
        return False
    return before is None or before.ok or after.ratio > GROWTH * before.ratio


def excused_by(baseline: Baseline, worse: Sequence[Worse]) -> dict[tuple[str, str], str]:
    """What was as wrong in the baseline, for `write_junit`."""
    known = {key for key, mark in baseline.marks.items() if not mark.ok}
    return dict.fromkeys(known - {(entry.case, entry.name) for entry in worse}, f"as in {baseline.source}")
