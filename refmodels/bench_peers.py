"""refmodels on an accelerator beside the libraries that one would pick instead, on the same device, by turns, in one run.

What is measured, and what it is held to: spec/bench.md. Every system is a process of its own, which `bench_worker.py` is: here
is what they are asked, when, and what the ratios are. What one fails at is left out, with the reason, and the others go on; a
run ends when its time is up, with what there is. For processors there is accel/bench/peers.py.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from refmodels.backbone import Backbone
from refmodels.bench import bytes_per_step, prefill_flops
from refmodels.bench_worker import Job, Work, serve

Series = tuple[str, str]
"""A system's name and a figure: the speeds of one, a number for each round."""

LIMIT = "limit"
"""In the place of a system: what the device allows."""

OURS, INTEGERS, EAGER, COMPILED = "refmodels", "refmodels, int8", "transformers", "transformers, compiled"
MOST_SECONDS, KEPT_SECONDS = 440, 120
"""Of a run, so that it ends within eight minutes; and what of it is kept for each shape that is still to come."""

FIRST_SECONDS, SECONDS, GRACE = 180, 45, 5
"""That a process may take to start, or for a first call, which may compile; for another call; to end by itself."""


class Figure(NamedTuple):
    """A speed in tokens a second: the `tokens` of a piece of work over its seconds, less those of `without`."""

    work: Work
    tokens: int
    without: Work | None = None


@dataclass(frozen=True)
class Aim:
    """How many times as fast as another a series is to be."""

    name: str
    over: Series
    under: Series
    wanted: float


AIMS = (
    Aim("decode, batch 1, of what the memory allows", (OURS, "decode 1"), (LIMIT, "decode 1"), 0.8),
    Aim("decode, batch 1, beside Transformers, eager", (OURS, "decode 1"), (EAGER, "decode 1"), 3.0),
    Aim(
        "decode, batch 1, beside Transformers, static cache and torch.compile", (OURS, "decode 1"), (COMPILED, "decode 1"), 1.3
    ),
    Aim("decode, batch 1, int8 beside bfloat16", (INTEGERS, "decode 1"), (OURS, "decode 1"), 1.6),
    Aim("prefill of 2,048 tokens, of the matrix rate", (OURS, "prefill"), (LIMIT, "prefill"), 0.7),
    Aim("T5's encoder, beside Transformers, eager", (OURS, "encode"), (EAGER, "encode"), 1.5),
    Aim("decode, batch 32 beside batch 1", (OURS, "decode 32"), (OURS, "decode 1"), 20.0),
)
"""Those of the shapes in `AIMED`, in bfloat16."""

AIMED = ("opt_6.7b_en", "t5_1.1_xl")


@dataclass(frozen=True)
class Plan:
    """Lengths, in tokens, and rounds.

    A step of decoding is the difference of two generations from a short prompt, one with `more` new tokens than the other: what
    comes once (taking in the prompt, recording a graph) is in both.
    """

    repeats: int = 5
    decode_after: int = 32
    fewer: int = 32
    more: int = 128
    prefill: int = 2048
    encode: tuple[int, int] = (8, 512)
    batch: int = 32
    most_seconds: float = MOST_SECONDS

    def figures(self, shape: Backbone) -> dict[str, Figure]:
        """Every figure of this shape by name."""
        if shape.family == "t5":
            rows, length = self.encode
            return {"encode": Figure(Work("encode", rows, length), rows * length)}
        prompt = min(self.prefill, getattr(shape.config, "max_sequence_length", self.prefill))
        return {
            "decode 1": self._decode(1),
            f"decode {self.batch}": self._decode(self.batch),
            "prefill": Figure(Work("generate", 1, prompt, 1), prompt),
        }

    def _decode(self, batch: int) -> Figure:
        short, long = (Work("generate", batch, self.decode_after, n) for n in (self.fewer, self.fewer + self.more))
        return Figure(long, batch * self.more, without=short)

    def sides(self, shape: Backbone, preset: str, accelerator: str, device: str) -> "list[Side]":
        """The systems that are measured on this shape, and which of its figures each gives."""
        all_of_them = tuple(self.figures(shape))
        jobs = {
            OURS: (Job("refmodels", preset, "bfloat16", accelerator), all_of_them),
            INTEGERS: (Job("refmodels", preset, "int8_from_bfloat16", accelerator), ("decode 1",)),
            EAGER: (Job("transformers", preset, "bfloat16", device), all_of_them),
            COMPILED: (Job("transformers, compiled", preset, "bfloat16", device), all_of_them[:1]),
        }
        return [Side(name, job, names) for name, (job, names) in jobs.items() if set(names) <= set(all_of_them)]


# -- a system ----------------------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers one request after the other. RuntimeError for whatever goes wrong there."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
        self._connection: Connection
        self._connection, other = context.Pipe()
        self._process: SpawnProcess = context.Process(target=serve, args=(other, job), daemon=True)
        self._process.start()
        other.close()

    def ask(self, method: str, *arguments: Any) -> None:
        """Send a request, and do not wait."""
        with suppress(OSError):  # the process has ended, as `answer` will find
            self._connection.send((method, arguments))

    def answer(self, deadline: float) -> Any:
        """What the last request gave, or the start. `deadline` is by time.monotonic; after it nothing counts, ready or not."""
        left = deadline - time.monotonic()
        try:
            if left <= 0 or not self._connection.poll(left):
                raise RuntimeError("not done when the time was up")
            outcome, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise RuntimeError(f"its process ended with status {self._process.exitcode}") from None
        if outcome != "done":
            raise RuntimeError(result)
        return result

    def end(self) -> None:
        """End the process; its memory on the device is free then."""
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()
        self._connection.close()


def within(seconds: float, deadline: float) -> float:
    """So many seconds from now, by time.monotonic, but not after the deadline."""
    return min(time.monotonic() + seconds, deadline)


@dataclass
class Side:
    """One system in one type: what is asked of it, and what it was found to do."""

    name: str
    job: Job
    wanted: tuple[str, ...]
    worker: Worker | None = None
    about: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """Figure -> why there is none."""

    @property
    def left(self) -> list[str]:
        """The figures that it has not failed at."""
        return [name for name in self.wanted if name not in self.problems]

    def fail(self, figures: Iterable[str], problem: object) -> None:
        """Leave these figures out from now on. A process that has failed is not trusted again."""
        self.problems |= dict.fromkeys(figures, str(problem)[:300])
        self.end()

    def started(self, deadline: float) -> Worker:
        """The process, started anew if the last one has been ended."""
        if self.worker is None:
            self.worker = Worker(self.job)
            self.about = self.worker.answer(within(FIRST_SECONDS, deadline))
        return self.worker

    def seconds(self, work: Work, deadline: float) -> float:
        """Of one piece of work."""
        worker = self.started(deadline)
        worker.ask("seconds", work)
        return float(worker.answer(within(SECONDS, deadline)))

    def end(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None


# -- measuring ---------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What came of one shape."""

    preset: str
    sides: list[Side]
    speeds: dict[Series, list[float | None]] = field(default_factory=dict)
    limits: list[tuple[float, float]] = field(default_factory=list)


def measure(
    presets: Sequence[str], plan: Plan, accelerator: str, device: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Everything in spec/bench.md about these shapes, one after the other, as one dictionary.

    accelerator   refmodels', by name
    device        the same hardware as torch calls it
    """
    began = time.monotonic()
    found = []
    for i, preset in enumerate(presets, start=1):
        deadline = began + plan.most_seconds - KEPT_SECONDS * (len(presets) - i)
        found.append(measure_shape(preset, plan, accelerator, device, deadline, progress))
    return result_of(found, plan, time.monotonic() - began, aims=AIMS if tuple(presets) == AIMED else ())


def measure_shape(
    preset: str, plan: Plan, accelerator: str, device: str, deadline: float, progress: Callable[[str], None]
) -> Measured:
    """All systems on one shape: all of them loaded at once, then by turns."""
    shape: Backbone = Backbone.from_preset(preset, load_weights=False, dtype="bfloat16")
    figures, sides = plan.figures(shape), plan.sides(shape, preset, accelerator, device)
    found = Measured(preset, sides)
    found.speeds = {(side.name, name): [] for side in sides for name in side.wanted}
    try:
        make_ready(sides, figures, deadline, lambda line: progress(f"{preset}: {line}"))
        took = 0.0
        for i in range(plan.repeats):
            if (began := time.monotonic()) + took > deadline:
                break
            for side in sides if i % 2 == 0 else sides[::-1]:
                progress(f"{preset}: round {i + 1} of {plan.repeats}, {side.name}")
                measure_side(side, figures, found.speeds, deadline)
            progress(f"{preset}: round {i + 1} of {plan.repeats}, the device's limits")
            add_limits(found, shape, figures, deadline)
            took = time.monotonic() - began
    finally:
        for side in sides:
            side.end()
    return found


def make_ready(sides: Sequence[Side], figures: Mapping[str, Figure], deadline: float, progress: Callable[[str], None]) -> None:
    """Start all processes at once, and let each do all of its work once: what compiles does so now, side by side."""
    progress("starting every system, and making the weights")
    for side in sides:
        side.worker = Worker(side.job)
    for side in sides:
        try:
            assert side.worker is not None
            side.about = side.worker.answer(within(FIRST_SECONDS, deadline))
        except RuntimeError as error:
            side.fail(side.wanted, error)
    for name, figure in figures.items():
        for work in filter(None, (figure.work, figure.without)):
            progress(f"first calls: {name}")
            asked = [side for side in sides if name in side.left]
            for side in asked:
                try:
                    side.started(deadline).ask("seconds", work)
                except RuntimeError as error:
                    side.fail(side.left, error)
            for side in asked:
                try:
                    if side.worker is not None:
                        side.worker.answer(within(FIRST_SECONDS, deadline))
                except RuntimeError as error:
                    side.fail([name], error)


def measure_side(side: Side, figures: Mapping[str, Figure], speeds: dict[Series, list[float | None]], deadline: float) -> None:
    """Every figure of one side once; None for one that failed."""
    for name in side.wanted:
        speed = None
        if name in side.left:
            figure = figures[name]
            try:
                seconds = side.seconds(figure.work, deadline)
                if figure.without is not None:
                    seconds -= side.seconds(figure.without, deadline)
                speed = figure.tokens / max(seconds, 1e-9)
            except RuntimeError as error:
                side.fail([name], error)
        speeds[side.name, name].append(speed)


def add_limits(found: Measured, shape: Backbone, figures: Mapping[str, Figure], deadline: float) -> None:
    """Measure the device's limits, and add what they allow: decoding by the bytes of a step, a prompt by its operations."""
    ours = found.sides[0]
    memory = rate = None
    if ours.left and LIMIT not in ours.problems:
        try:
            worker = ours.started(deadline)
            worker.ask("limits")
            memory, rate = worker.answer(within(SECONDS, deadline))
            found.limits.append((memory, rate))
        except RuntimeError as error:
            ours.fail([LIMIT], error)
    for name, figure in figures.items():
        work, allowed = figure.work, None
        if name.startswith("decode") and memory is not None:
            allowed = work.batch * memory / bytes_per_step(shape)
        if name == "prefill" and rate is not None:
            allowed = work.length * rate / prefill_flops(shape, work.length)
        if name != "encode":
            found.speeds.setdefault((LIMIT, name), []).append(allowed)


# -- what is told ------------------------------------------------------------------------------------------------------------


def ratio(speeds: Mapping[Series, Sequence[float | None]], over: Series, under: Series) -> float | None:
    """The median of the ratios of each round in which both have a speed."""
    rounds = zip(speeds.get(over, ()), speeds.get(under, ()), strict=False)
    ratios = [a / b for a, b in rounds if a is not None and b is not None]
    return statistics.median(ratios) if ratios else None


def result_of(found: Sequence[Measured], plan: Plan, seconds: float, aims: Sequence[Aim]) -> dict[str, Any]:
    """The dictionary that spec/bench.md describes."""
    speeds = {series: values for measured in found for series, values in measured.speeds.items()}
    abouts = [side.about for measured in found for side in measured.sides]
    hardware = next((about for about in abouts if "device" in about), {})
    names = ("refmodels", "numpy", "torch", "transformers", "triton")
    limits = [pair for measured in found for pair in measured.limits]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {name: value for name, value in hardware.items() if name not in names},
        "versions": {name: about[name] for about in abouts for name in names if name in about},
        "seconds": seconds,
        "plan": asdict(plan),
        "limits": [dict(zip(("bytes_per_second", "flops_per_second"), pair, strict=True)) for pair in limits],
        "aims": [_judged(aim, ratio(speeds, aim.over, aim.under)) for aim in aims],
        "figures": [
            _figure(measured.preset, series, [value for value in values if value is not None], measured.speeds)
            for measured in found
            for series, values in measured.speeds.items()
        ],
        "left_out": [
            {
                "preset": measured.preset,
                "system": side.name,
                "figures": [name for name, why in side.problems.items() if why == reason],
                "reason": reason,
            }
            for measured in found
            for side in measured.sides
            for reason in dict.fromkeys(side.problems.values())
        ],
    }


def _judged(aim: Aim, reached: float | None) -> dict[str, Any]:
    return {"aim": aim.name, "wanted": aim.wanted, "reached": reached, "met": reached is not None and reached >= aim.wanted}


def _figure(
    preset: str, series: Series, values: Sequence[float], speeds: Mapping[Series, Sequence[float | None]]
) -> dict[str, Any]:
    system, figure = series
    spread = (statistics.median(values), min(values), max(values)) if values else (None, None, None)
    told = dict(zip(("tokens_per_second", "least", "most"), spread, strict=True))
    beside = ratio(speeds, (OURS, figure), series)
    return {"preset": preset, "system": system, "figure": figure, **told, "ours_over_this": beside}
