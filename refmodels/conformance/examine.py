"""One example on one accelerator: what must hold for it. `Wrong` says what does not.

values      within the op's error model of the reference, in shape, type and non-finite values too
inputs      not written to
repeat      two runs of one call give the same bits, with a call of other sizes in between
rows        a row of the batch alone gives what it gave in the batch (row-wise ops)
composed    the body of a composite, on the accelerator's kernels for what is inside, is right as well
threads     two Python threads at once get what each gets alone
settings    any number of the accelerator's own threads gives the same bits, where it claims that
"""

import sys
import threading
import time
import warnings
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator, AcceleratorError
from refmodels.conformance.case import Case, Environment, described, fingerprints, own, same_bits
from refmodels.conformance.cases import draw_case, neighbour, single_row, with_other_values
from refmodels.conformance.drawing import Source
from refmodels.numerics import Verdict, judge_run
from refmodels.op import OPS, executing


class Wrong(AssertionError):  # noqa: N818 -- the verdict, not a fault of ours
    """What an example shows: the law that is broken, the reason in one sentence, and more lines."""

    def __init__(self, law: str, reason: str, lines: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.law, self.reason, self.lines = law, reason, lines


def examine(case: Case, accelerator: Accelerator, variants: tuple[Accelerator, ...] = ()) -> Environment:
    """Hold the accelerator to the reference on this example. `Wrong`, or what happened."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _examine(case, accelerator, variants)


def _examine(case: Case, accelerator: Accelerator, variants: tuple[Accelerator, ...]) -> Environment:
    before = fingerprints(case.inputs)
    got, environment = _attempt(case, accelerator)
    _check_values(case, got)
    after = fingerprints(case.inputs)
    for path, held in before.items():
        if after[path] != held:
            raise Wrong("inputs", f"{case.op.name} writes to its argument {path}")
    _check_repeat(case, accelerator, got, environment)
    if case.other_way is not None and accelerator.invariant and not case.reordered:
        _check_other_way(case, accelerator, got)
    if case.thorough:
        _check_row(case, accelerator, got)
        _check_composed(case, accelerator)
        for variant in variants:
            again, _ = _attempt(case, variant)
            if not same_bits(got, again):
                raise Wrong("settings", f"{case.op.name} gives other bits with another number of threads")
    if case.threaded:
        _check_threads(case, accelerator, got)
    return environment


def _attempt(case: Case, accelerator: Accelerator) -> tuple[Any, Environment]:
    """The results; a kernel that raises is wrong."""
    try:
        return case.run(accelerator)
    except AcceleratorError as error:
        if accelerator.strict:
            raise
        raise Wrong("values", _raised(case, error)) from error
    except Exception as error:
        raise Wrong("values", _raised(case, error)) from error


def _raised(case: Case, error: Exception) -> str:
    return f"{case.op.name} raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_values(case: Case, got: Any) -> None:
    def run(inputs: Any) -> Any:
        return _as_far_as(case.reference(inputs), got)

    verdict = judge_run(case.op, run, case.inputs, got)
    if not verdict:
        raise Wrong("values", verdict.reason, _worst(verdict, got, run(case.inputs)))


def _as_far_as(wanted: Any, got: Any) -> Any:
    """The contents of a cache are compared only where the accelerator's may be looked at."""
    if isinstance(wanted, dict) and isinstance(got, dict) and "cache" in wanted and "cache" not in got:
        return {key: value for key, value in wanted.items() if key in got}
    return wanted


def _worst(verdict: Verdict, got: Any, wanted: Any) -> tuple[str, ...]:
    """Got and wanted at the worst element."""
    for key in verdict.place:
        try:
            got, wanted = got[key], wanted[key]
        except (KeyError, IndexError, TypeError):
            return ()
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape or (verdict.index and len(verdict.index) != got.ndim) or (got.ndim and not verdict.index):
        return () if got.shape != wanted.shape or not got.size else (_element(*_first_difference(got, wanted)),)
    return (_element(verdict.index, got[verdict.index], wanted[verdict.index]),)


def _first_difference(got: Any, wanted: Any) -> tuple[Any, Any, Any]:
    differ = ~((got == wanted) | ((got != got) & (wanted != wanted)))
    place = tuple(int(i) for i in np.argwhere(differ)[0]) if differ.any() else (0,) * got.ndim
    return place, got[place], wanted[place]


def _element(place: Any, got: Any, wanted: Any) -> str:
    return f"at {place}: got {got!s}, wanted {wanted!s}"


def _check_repeat(case: Case, accelerator: Accelerator, got: Any, first: Environment) -> None:
    between = _others(case, accelerator) if case.thorough else []
    for other in between:
        _attempt(other, accelerator)
    if not same_bits(first.host(first.given), got):
        raise Wrong("repeat", f"{case.op.name} writes to what it gave for an earlier call")
    again, _ = _attempt(case, accelerator)
    if not same_bits(got, again):
        with_others = " with other calls in between" if between else ""
        raise Wrong("repeat", f"{case.op.name} gives other bits the second time{with_others}", _differences(again, got))


def _others(case: Case, accelerator: Accelerator) -> list[Case]:
    """A call of other sizes, and one of the same sizes with other numbers."""

    def make(source: Source) -> Case:
        return draw_case(case.op, source, case.dtype, accelerator.tiles)

    found = (neighbour(case, accelerator.tiles), None if case.other_way else with_other_values(case, make))
    return [other for other in found if other is not None]


def _differences(got: Any, wanted: Any, path: str = "") -> tuple[str, ...]:
    """The first difference of two trees."""
    if isinstance(wanted, dict | list | tuple) and type(got) is type(wanted):
        for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
            if lines := _differences(got[key], wanted[key], f"{path}[{key}]"):
                return lines
        return ()
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape or same_bits(got, wanted):
        return ()
    return (path + _element(*_first_difference(got, wanted)),)


def _check_other_way(case: Case, accelerator: Accelerator, got: Any) -> None:
    """A law of models, bit for bit."""
    assert case.other_way is not None
    other = Case(case.op, case.inputs, case.other_way, case.dtype)
    wanted, _ = _attempt(other, accelerator)
    if not same_bits(got, wanted):
        raise Wrong("invariant", f"{case.op.name}: not the same bits, as the accelerator claims", _differences(got, wanted))


def _check_row(case: Case, accelerator: Accelerator, got: Any) -> None:
    found = single_row(case, got)
    if found is None:
        return
    row, place = found
    alone, _ = _attempt(row, accelerator)
    try:
        _check_values(row, alone)
    except Wrong as wrong:
        raise Wrong("rows", f"row {place} alone: {wrong.reason}", wrong.lines) from None
    if accelerator.invariant and not same_bits(own(alone[0]), own(got[place])):
        raise Wrong("invariant", f"{case.op.name}: row {place} alone gives other bits", _differences(alone[0], got[place]))


def _check_composed(case: Case, accelerator: Accelerator) -> None:
    """Only where there is something to compare: a kernel for the composite, and kernels for other ops."""
    others = (op for op in OPS.values() if op is not case.op)
    if not (case.op.composite and accelerator.kernels(case.op) and any(accelerator.kernels(op) for op in others)):
        return
    body = Environment(accelerator, body_of=case.op)
    with executing(accelerator), np.errstate(all="ignore"):
        got = body.host(case.script(case.inputs, body))
    try:
        _check_values(case, got)
    except Wrong as wrong:
        raise Wrong("composed", f"the body of {case.op.name} on the kernels inside: {wrong.reason}", wrong.lines) from None


def _check_threads(case: Case, accelerator: Accelerator, got: Any, seconds: float = 0.02) -> None:
    """Two calls at once, several times, with threads that change places as often as they can."""
    other = neighbour(case, accelerator.tiles)
    if other is None:
        return
    jobs = [(case, got), (other, _attempt(other, accelerator)[0])]
    faults: list[Wrong] = []
    start = threading.Barrier(2)

    def work(job: Case, wanted: Any) -> None:
        start.wait()
        end, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < end or rounds < 2:
            rounds += 1
            try:
                again, _ = _attempt(job, accelerator)
                if not same_bits(again, wanted):
                    raise Wrong("threads", f"{job.op.name} gives other bits beside a call in another thread")
            except Wrong as wrong:
                faults.append(wrong)
                return

    threads = [threading.Thread(target=work, args=job, daemon=True) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if faults:
        raise Wrong("threads", faults[0].reason, faults[0].lines)


def lines_of(case: Case) -> list[str]:
    """The inputs of an example, as a report shows them."""
    return described(case.inputs)
