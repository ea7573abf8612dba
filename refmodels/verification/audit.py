"""Audit: where would a checkpoint overflow or lose precision in float16 or bfloat16, and what to keep in float32 for it not to.

    found = audit(model, inputs, "float16")
    found.keep          the cheapest set of kinds of steps to keep wide, such as `decoder.layers.*:add`

What is audited is the plain implementation: parameters in the low type, and the result of every op rounded to it. It is run in
float64, and rounded where it would be; so a step's share of the error is found by rounding there alone, and what keeping it in
float32 saves by rounding everywhere else. Moves and look-ups round nothing.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import eq
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.numerics import UNIT_ROUNDOFF, widened
from refmodels.op import Array, Op, executing
from refmodels.ops.precision import narrow, numpy_dtype
from refmodels.parameters import flatten
from refmodels.trace import QUIET, Namer

LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127}
"""The largest numbers of the types."""

LAYERS = ("opt_decoder_layer", "bloom_decoder_layer", "t5_feedforward")
"""Composites whose result is the residual stream behind a layer."""

ROUNDINGS = 8
"""The default target: as many roundings of the largest logit."""


@dataclass(frozen=True)
class StepRange:
    """The largest magnitude of a step's values in float64; `headroom` is how often it fits into the type's largest number."""

    name: str
    largest: float
    headroom: float

    @property
    def overflows(self) -> bool:
        """Whether the type cannot hold it."""
        return not self.headroom >= 1.0


@dataclass(frozen=True)
class Share:
    """A kind of step, in every layer: `error` is what rounding there alone does to the logits, relative to the largest of them;
    infinite if that overflows."""

    kind: str
    steps: int
    largest: float
    overflowing: int
    error: float


@dataclass(frozen=True)
class Drift:
    """How far the residual stream behind a layer has gone, relative to its largest value: where everything is rounded, and
    where what is to be kept is kept."""

    name: str
    largest: float
    plain: float
    kept: float


@dataclass(frozen=True)
class Audit:
    """What an audit found. Errors are those of the logits of real tokens, relative to the largest of them.

    `plain` is the error of rounding everywhere, `weights` that of rounding parameters alone, which all others do not count.
    `keep` are the kinds of steps to keep in float32, `kept` is the error that is left then; `reached` says whether it is at
    most `target`. `agreement` is in how many of the places the likeliest token is the same, plain and kept.
    """

    dtype: str
    target: float
    plain: float
    weights: float
    kept: float
    keep: tuple[str, ...]
    agreement: tuple[float, float]
    steps: tuple[StepRange, ...] = field(repr=False)
    shares: tuple[Share, ...] = field(repr=False)
    layers: tuple[Drift, ...] = field(repr=False)

    @property
    def reached(self) -> bool:
        """Whether the target is met, which only finite logits can."""
        return self.kept <= self.target

    @property
    def first_overflow(self) -> StepRange | None:
        """The first step that the type cannot hold."""
        return next((step for step in self.steps if step.overflows), None)


def audit(
    model: Backbone,
    inputs: Mapping[str, Any],
    dtype: str,
    *,
    target: float | None = None,
    progress: Callable[[str], None] = lambda kind: None,
) -> Audit:
    """Audit a model in float32 or float64 on these inputs. `progress` is called with each kind of step that is tried."""
    if dtype not in LARGEST:
        raise ValueError(f"dtype must be one of {', '.join(LARGEST)}, got {dtype!r}")
    if model.compute_dtype not in ("float32", "float64"):
        raise ValueError(f"a model in {model.compute_dtype} cannot be audited: load it in float32")
    if target is not None and not target > 0:
        raise ValueError(f"target must be above 0, got {target}")
    target = ROUNDINGS * UNIT_ROUNDOFF[dtype] if target is None else target
    exactly = RoundedRun(model, dtype, rounds=lambda kind: False)
    truth = exactly(inputs)
    untouched = RoundedRun(model, dtype, rounds=lambda kind: False, weights=False)(inputs)
    checked = model.checked(inputs)
    real = np.asarray(checked["decoder_padding_mask" if model.family == "t5" else "padding_mask"]).astype(bool)

    def error(run: Callable[[str], bool]) -> float:
        return _error(RoundedRun(model, dtype, rounds=run)(inputs), truth, real)

    shares = []
    for kind, names in exactly.kinds.items():
        progress(kind)
        largest = [exactly.largest[name] for name in names]
        over = sum(not value <= LARGEST[dtype] for value in largest)
        shares.append(Share(kind, len(names), max(largest), over, error(partial(eq, kind))))
    keep = _cheapest(shares, target, error)
    plain = RoundedRun(model, dtype, rounds=lambda kind: True, beside=exactly)
    kept = RoundedRun(model, dtype, rounds=lambda kind: kind not in keep, beside=exactly)
    plain_logits, kept_logits = plain(inputs), kept(inputs)
    return Audit(
        dtype=dtype,
        target=target,
        plain=_error(plain_logits, truth, real),
        weights=_error(truth, untouched, real),
        kept=_error(kept_logits, truth, real),
        keep=tuple(share.kind for share in shares if share.kind in keep),
        agreement=(_agreement(plain_logits, truth, real), _agreement(kept_logits, truth, real)),
        steps=tuple(StepRange(name, value, _headroom(value, dtype)) for name, value in exactly.largest.items()),
        shares=tuple(sorted(shares, key=lambda share: -share.error)),
        layers=tuple(
            Drift(name, float(np.abs(array).max(initial=0.0)), plain.drift[name], kept.drift[name])
            for name, array in exactly.layers.items()
        ),
    )


def _cheapest(shares: Collection[Share], target: float, error: Callable[[Callable[[str], bool]], float]) -> set[str]:
    """Kinds to keep: those with the largest shares until the target is met, less those without which it is met as well."""
    keep: set[str] = set()

    def keeping(kinds: set[str]) -> float:
        return error(lambda kind: kind not in kinds)

    for share in sorted(shares, key=lambda share: -share.error):
        if share.error < np.inf and keeping(keep) <= target:
            break
        keep.add(share.kind)
    for share in sorted(shares, key=lambda share: share.error):
        without = keep - {share.kind}
        if share.kind in keep and keeping(without) <= target:
            keep = without
    return keep


def _headroom(largest: float, dtype: str) -> float:
    return LARGEST[dtype] / largest if largest > 0 else np.inf


def _error(logits: Array, truth: Array, real: Array) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(logits - truth)[real]
    largest = float(np.abs(truth[real]).max(initial=0.0))
    worst = float(difference.max(initial=0.0))
    return worst / largest if np.isfinite(worst) and largest > 0 else 0.0 if worst == 0.0 else np.inf


def _agreement(logits: Array, truth: Array, real: Array) -> float:
    got, wanted = np.where(np.isnan(logits), -np.inf, logits)[real], truth[real]
    broken = np.isnan(logits)[real].any(-1)
    return float(((got.argmax(-1) == wanted.argmax(-1)) & ~broken).mean()) if wanted.size else 1.0


def kind_of(name: str) -> str:
    """The kind of a step: its name with a star for the number of its layer."""
    return re.sub(r"(?<=layers\.)\d+", "*", name)


class RoundedRun:
    """A run of the model in float64 that rounds the results of the kinds of steps for which `rounds` is true to the low type,
    and the parameters, unless `weights` is false. With `beside`, an exact run, it measures how far each layer drifts from that.

    `kinds` has the steps of each kind, `largest` their largest magnitudes, `layers` the residual stream behind every layer.
    """

    def __init__(
        self,
        model: Backbone,
        dtype: str,
        *,
        rounds: Callable[[str], bool],
        weights: bool = True,
        beside: "RoundedRun | None" = None,
    ) -> None:
        self._model, self._dtype, self._rounds, self._weights, self._beside = model, dtype, rounds, weights, beside
        self._namer = Namer(model.params)
        self._parameters = {id(leaf) for _, leaf in flatten(model.params)}
        self._wide: dict[int, Array] = {}
        self.kinds: dict[str, list[str]] = {}
        self.largest: dict[str, float] = {}
        self.layers: dict[str, Array] = {}
        self.drift: dict[str, float] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> Array:
        """The logits (b, t, v), in float64."""
        arrays: dict[str, Any] = {name: widened(array) for name, array in self._model.checked(inputs).items()}
        with executing(self), np.errstate(all="ignore"):
            hidden = self._model.forward(arrays, None)
            return self._model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)

    def run(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call: what `Op` asks of an executor."""
        with self._namer.call(op, args, kwargs) as name:
            if op.composite:
                result = op.reference(*args, **kwargs)
                if op.name in LAYERS:
                    self._arrived(name, result)
                return result
            result = op.reference(*(self._widened(value) for value in args), **{k: self._widened(v) for k, v in kwargs.items()})
        if not isinstance(result, np.ndarray) or result.dtype.kind != "f" or op.error.kind == "exact" or op.name in QUIET:
            return result
        kind = kind_of(name)
        self.kinds.setdefault(kind, []).append(name)
        self.largest[name] = float(np.abs(result).max(initial=0.0))
        return self._narrowed(result) if self._rounds(kind) else result

    def _widened(self, value: Any) -> Any:
        """An argument in float64: a parameter rounded first, once; what was computed here is float64 already."""
        if id(value) not in self._parameters or value.dtype.kind in "iub":
            return value if isinstance(value, np.ndarray) else widened(value)
        if id(value) not in self._wide:
            self._wide[id(value)] = self._narrowed(value) if self._weights else value.astype(np.float64)
        return self._wide[id(value)]

    def _narrowed(self, value: Array) -> Array:
        return narrow(value, numpy_dtype(self._dtype)).astype(np.float64)

    def _arrived(self, name: str, result: Array) -> None:
        self.layers[name] = result
        if self._beside is not None:
            truth = self._beside.layers[name]
            largest = float(np.abs(truth).max(initial=0.0))
            with np.errstate(invalid="ignore"):
                worst = float(np.abs(result - truth).max(initial=0.0))
            self.drift[name] = worst / largest if np.isfinite(worst) and largest > 0 else 0.0 if worst == 0.0 else np.inf
