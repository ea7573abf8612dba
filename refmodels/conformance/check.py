"""Search for an example that an accelerator, or one kernel, gets wrong; make it small; and say how to see it again.

`check_op` is for one kernel in somebody's pytest, `check_accelerator` is what `refmodels check` runs, `reproduce` tries one
example again.
"""

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from refmodels.accelerator import REFERENCE, Accelerator, AcceleratorError, Kernel, When, find
from refmodels.conformance import model_laws, models
from refmodels.conformance.case import Case
from refmodels.conformance.cases import draw_case
from refmodels.conformance.drawing import EMPTY, LONG, USUAL, Source, Unsuitable, encoded, of_kind, random_source, replayed
from refmodels.conformance.examine import Wrong, examine, lines_of
from refmodels.coverage import OWN, coverage
from refmodels.coverage import REFERENCE as ALONE
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.op import OPS, Array, Op
from refmodels.opdoc import table

EXAMPLES = 100
"""Examples of an op in one type, by default. `check_accelerator` takes fewer where they cost much: see there."""

MOST_THREADED = 25
"""Examples of one search that are also run in two threads at once: each takes as long as several others."""

LAW = "law"

SHRINKING = 10.0
"""Seconds after which an example is small enough."""

Make = Callable[[Source, str, tuple[int, ...]], Case]
"""Draws an example of an op or of a law, from choices, for a type and with these tiles."""


@dataclass
class Failure:
    """What is wrong, in an example as small as was found.

    law        which of the laws of `examine` is broken
    reason     how, in one sentence
    inputs     the example: a line for each argument
    lines      more about it, such as what was got and wanted at the worst place
    example    the code that replays it; `reproduce` is the line to paste
    """

    op: str
    dtype: str
    law: str
    reason: str
    inputs: list[str]
    lines: list[str]
    example: str
    reproduce: str

    def __str__(self) -> str:
        laws = "" if self.law == "values" else f" ({self.law})"
        body = [f"{self.op}, {self.dtype}{laws}: {self.reason}", *(f"    {line}" for line in [*self.lines, *self.inputs])]
        return "\n".join([*body, f"    {self.reproduce}"])


@dataclass
class Checked:
    """The verdict on one op or law.

    runs       `own kernel`, `composite of kernels` or `reference`; of a law `law`
    dtypes     the types that were tried
    examples   how many; `taken` of them by a kernel of the op's own
    failures   at most one for each type
    skipped    why it could not be tried, if so
    features   how many examples showed what: `empty`, `fully masked` ...
    """

    name: str
    runs: str
    dtypes: list[str] = field(default_factory=list)
    examples: int = 0
    taken: int = 0
    failures: list[Failure] = field(default_factory=list)
    skipped: str = ""
    features: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`right`, `WRONG` or `skipped`."""
        return "WRONG" if self.failures else "right" if self.examples else "skipped"


@dataclass
class Search:
    """One search: what is tried, where, in which type, and what came of it."""

    name: str
    make: Make
    accelerator: Accelerator
    dtype: str
    variants: tuple[Accelerator, ...] = ()
    shrink: bool = True
    checked: Checked | None = None
    best: tuple[Case, Wrong] | None = None
    threaded: int = 0

    def run(self, examples: int, seed: int) -> None:
        """Try so many examples, most of them usual, until one is wrong; make that smaller. A seed gives the same examples."""
        empty, long = max(1, examples // 10), max(1, examples // 20)
        for kind, count in ((USUAL, max(examples - empty - long, 1)), (EMPTY, empty), (LONG, long)):
            source = random_source(zlib.crc32(f"{self.name} {self.dtype} {kind} {seed}".encode()))
            unsuitable = 0
            while count > 0 and unsuitable < 20 + 5 * count:
                try:
                    case = self.make(of_kind(kind, source), self.dtype, self.accelerator.tiles)
                except Unsuitable:  # or an op without a dimension that may be empty, or long
                    unsuitable += 1
                    continue
                count -= 1
                if self.is_wrong(case):
                    if self.shrink:
                        self.make_smaller()
                    return

    def replay(self, code: str) -> None:
        """Try one example alone. ValueError if the code is none."""
        case = self._made(replayed(code))
        if case is None:
            raise ValueError(f"example {code} is none of {self.name} in {self.dtype}")
        case.threaded = case.thorough = True  # what was wrong by chance has every chance
        self.is_wrong(case)

    def is_wrong(self, case: Case) -> bool:
        """Examine the example, and count it."""
        found, wrong = self.best is not None, None
        case.threaded &= self.threaded < MOST_THREADED
        self.threaded += case.threaded
        try:
            environment = examine(case, self.accelerator, self.variants)
        except Wrong as fault:
            wrong = fault
            if self.best is None or _size(case) < _size(self.best[0]):
                self.best = case, wrong
        if self.checked is not None and not found:
            self.checked.examples += 1
            self.checked.features.update(case.features)
            if wrong is None:
                self.checked.taken += environment.kernel_calls > 0
                self.checked.refused.update(set(environment.refused))
        return wrong is not None

    def make_smaller(self) -> None:
        """Simplify the choices of the wrong example one after the other, as long as it stays wrong."""
        deadline, before = time.monotonic() + SHRINKING, None
        while self.best is not None and before is not self.best:
            before = self.best
            place = 0
            while place < len(now := list(_size(self.best[0])[1])) and time.monotonic() < deadline:
                value = now[place]
                simpler = [now[:place]] if place else []
                simpler += [[*now[:place], smaller, *now[place + 1 :]] for smaller in _smaller(value)]
                simpler += [[*now[:place], *now[place + 1 :]]] if place > 1 else []
                if not any(self._is_smaller_and_wrong(choices) for choices in simpler):
                    place += 1

    def _is_smaller_and_wrong(self, choices: list[int]) -> bool:
        assert self.best is not None
        case, size = self._made(replayed(encoded(choices))), _size(self.best[0])
        return case is not None and _size(case) < size and self.is_wrong(case)

    def _made(self, source: Source) -> Case | None:
        try:
            return self.make(source, self.dtype, self.accelerator.tiles)
        except Unsuitable:
            return None


def _size(case: Case) -> tuple[int, list[int]]:
    choices = [int(part) for part in case.code.split(".")]
    return len(choices), choices


def _smaller(value: int) -> list[int]:
    return sorted({0, value // 2, value - 1} - {value, -1})


def cases(op: Op[..., Any], dtype: str = "float32", tiles: tuple[int, ...] = ()) -> Any:
    """The Hypothesis strategy of an op's examples: for `examine(case, accelerator)`, or look at `case.inputs`."""
    from hypothesis import reject
    from hypothesis import strategies as st

    @st.composite
    def drawn(draw: Any) -> Case:
        kind = draw(st.sampled_from([USUAL] * 10 + [EMPTY, LONG]))
        try:
            return draw_case(op, of_kind(kind, lambda count: draw(st.integers(0, count - 1))), dtype, tiles)
        except Unsuitable:
            reject()

    return drawn()


# -- one kernel ---------------------------------------------------------------------------------------------------------------


def check_op(
    op: Op[..., Any],
    kernel: Kernel,
    dtype: str = "float32",
    *,
    examples: int = EXAMPLES,
    tiles: tuple[int, ...] = (),
    invariant: bool = False,
    when: When | bool | str | None = None,
    seed: int = 0,
    example: str | None = None,
    shrink: bool = True,
) -> Checked:
    """Hold one kernel of `op` to the reference. AssertionError shows the smallest example found, and how to see it again.

    dtype       of the activations: float32, float16, bfloat16, float64
    examples    how many are tried; `seed` chooses others
    tiles       sizes at which the kernel begins another block, beside 8, 16, 32 and 64
    invariant   also hold it to the same bits for a row alone
    when        as for `Accelerator.kernel`: calls that it declines go to the reference
    example     try this one alone: the code that a failure shows
    """
    accelerator = Accelerator("this kernel", dtypes=(dtype,), tiles=tiles, invariant=invariant)
    accelerator.kernel(op, when=when)(kernel)
    line = f"check_op({op.name}, kernel, {dtype!r}, example={{code!r}})"
    checked = searched(op, accelerator, dtype, examples=examples, seed=seed, example=example, shrink=shrink, line=line)
    if checked.failures:
        raise AssertionError(str(checked.failures[0]))
    if not checked.taken:
        reasons = "; ".join(checked.refused)
        raise AssertionError(f"{op.name}: the kernel took none of {checked.examples} calls{f': {reasons}' if reasons else ''}")
    return checked


def searched(
    op: Op[..., Any],
    accelerator: Accelerator,
    dtype: str,
    *,
    examples: int = EXAMPLES,
    seed: int = 0,
    example: str | None = None,
    shrink: bool = True,
    line: str = "",
) -> Checked:
    """What `check_op` finds out, of an accelerator that has one kernel. `line` is to be pasted to see a failure again."""
    checked = Checked(op.name, OWN, [dtype])
    search = Search(op.name, _maker(op), accelerator, dtype, shrink=shrink, checked=checked)
    if example is not None:
        search.replay(example)
    else:
        search.run(examples, seed)
    if search.best is not None:
        checked.failures.append(_failure(search, line))
    return checked


def _maker(op: Op[..., Any]) -> Make:
    return lambda source, dtype, tiles: draw_case(op, source, dtype, tiles)


def _failure(search: Search, line: str) -> Failure:
    assert search.best is not None
    case, wrong = search.best
    return Failure(
        search.name,
        search.dtype,
        wrong.law,
        wrong.reason,
        lines_of(case),
        list(wrong.lines),
        case.code,
        line.format(code=case.code),
    )


# -- a whole accelerator ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """An op or a law of models, to be checked. `typed`: examples differ by type; `cost`: so many times fewer are tried."""

    name: str
    runs: str
    make: Make
    typed: bool = True
    cost: int = 1


def subjects(accelerator: Accelerator, names: Iterable[str] = ()) -> list[Subject]:
    """The ops, then the laws of models, of these names (`*` stands for any letters; none: all). ValueError for no match."""
    runs = {entry.op.name: entry.runs for entry in coverage(accelerator)}
    cost = dict.fromkeys(models.BUILDERS, 4)
    found = [Subject(op.name, runs[op.name], _maker(op), _is_typed(op), cost.get(op.name, 1)) for op in table()]
    laws = {name: make for name, make in model_laws.LAWS.items() if accelerator.ahead > 1 or not name.endswith("/ahead")}
    found += [Subject(name, LAW, make, cost=4) for name, make in laws.items()]
    wanted = list(names)
    for name in wanted:
        if not any(fnmatchcase(subject.name, name) for subject in found):
            raise ValueError(f"no op or law is named {name!r}: `refmodels ops` lists the ops; laws are {', '.join(laws)}")
    return [subject for subject in found if not wanted or any(fnmatchcase(subject.name, name) for name in wanted)]


def _is_typed(op: Op[..., Any]) -> bool:
    """Whether examples differ by the type of the activations."""
    kinds = {shape.kind for shape in op.shapes.values()}
    arrays = any(parameter.annotation is Array for parameter in op.signature.parameters.values())
    return op.composite or "float" in kinds or arrays or "dtype" in op.signature.parameters


def check_accelerator(
    accelerator: str | Accelerator,
    *,
    ops: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    examples: int = EXAMPLES,
    seed: int = 0,
    example: str | None = None,
    shrink: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Checked]:
    """Hold an accelerator to the reference: every op and every law of models, or those of these names, in every type claimed.

    `progress(name, done, all)` is told where it is. A composite has all of the examples in its first type (float32, if that is
    claimed) and a quarter in the others, a law of models a quarter, and what no kernel has a part in a tenth. With `example`,
    that one alone is tried, of one op. AcceleratorError if it cannot run here; ValueError for an unknown name or type.
    """
    found = find(accelerator)
    subject = Accelerator(REFERENCE) if found is None else found
    claimed = [name for name in ("float32", *UNIT_ROUNDOFF) if name in subject.dtypes]
    claimed = list(dict.fromkeys(claimed))
    wanted = list(dtypes) or claimed
    for name in wanted:
        if name not in claimed:
            raise ValueError(f"dtype {name!r} is not one that {subject.name} claims: {', '.join(claimed)}")
    chosen = subjects(subject, ops)
    if example is not None and len(chosen) != 1:
        raise ValueError("an example is that of one op: name it")
    variants = _variants(subject)
    # Nothing may be spared where even the reference's ops run on other arrays than NumPy's.
    full = found is None or type(subject).run is not Accelerator.run or subject.foreign(subject.asarray(np.zeros(1)))
    report = []
    for place, entry in enumerate(chosen):
        if progress is not None:
            progress(entry.name, place, len(chosen))
        count = examples if full or entry.runs != ALONE else max(examples // 10, 5)
        counts = dict.fromkeys(wanted, max(count // entry.cost, 5))
        if entry.cost > 1 and entry.runs != LAW:
            counts[wanted[0]] = count
        report.append(_check_subject(entry, subject, counts, variants, seed, example, shrink))
    return report


def _check_subject(
    entry: Subject,
    accelerator: Accelerator,
    counts: dict[str, int],
    variants: tuple[Accelerator, ...],
    seed: int,
    example: str | None,
    shrink: bool,
) -> Checked:
    checked, begun = Checked(entry.name, entry.runs), time.monotonic()
    for dtype, examples in list(counts.items())[: None if entry.typed else 1]:
        checked.dtypes.append(dtype)
        search = Search(entry.name, entry.make, accelerator, dtype, variants, shrink, checked=checked)
        try:
            if example is None:
                search.run(examples, seed)
            else:
                search.replay(example)
        except AcceleratorError as error:
            checked.skipped = " ".join(str(error).split())
            break
        if search.best is not None:
            line = f"refmodels check --accelerator {accelerator.name} --op {entry.name} --dtype {dtype} --example {{code}}"
            checked.failures.append(_failure(search, line))
    checked.seconds = time.monotonic() - begun
    return checked


def _variants(accelerator: Accelerator) -> tuple[Accelerator, ...]:
    """The accelerator with one thread and with two, if it claims that this changes nothing and can be told."""
    if not accelerator.invariant:
        return ()
    try:
        return tuple(accelerator.configured(threads=count) for count in (1, 2))
    except AcceleratorError:
        return ()


def reproduce(accelerator: str | Accelerator, op: str, dtype: str, example: str) -> None:
    """Try one example of a failure again. AssertionError shows what is wrong."""
    if op not in OPS and op not in model_laws.LAWS:
        raise ValueError(f"no op or law is named {op!r}")
    for checked in check_accelerator(accelerator, ops=[op], dtypes=[dtype], example=example):
        if checked.failures:
            raise AssertionError(str(checked.failures[0]))
