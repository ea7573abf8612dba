"""Replay: their values through our steps, each step judged by itself.

A step is a call of an op in our model; what they give for it is judged against what ours makes of *their* values of the steps
before, wherever those are known. So an error is reported where it is made and nowhere after, whatever the number of steps
between two known values: a single product, a layer, the whole model. Beside that local verdict stands the accumulated one,
against our own run from the model's inputs. Everything happens in one pass, with one layer's arrays in memory at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from refmodels.backbone import Backbone
from refmodels.numerics import UNIT_ROUNDOFF, Verdict, calibrated, compare, exact, multilinear
from refmodels.op import Array, Op, Shape, executing
from refmodels.ops.precision import narrow, numpy_dtype
from refmodels.trace import QUIET, Namer
from refmodels.verification.lanes import (
    FIRST_MOVED,
    OWN,
    OWN_THROUGH,
    TRUTH,
    TRUTH_THROUGH,
    Arithmetic,
    Resolver,
    Value,
    is_wide,
    moved,
)

ROUNDINGS = 3
"""How often a step of theirs may round on its way: a product, its scale and its bias are three calls in some frameworks."""

MOVED_LANES = 4

BIASES = ("alibi_bias", "relative_position_bias")
"""Steps whose results are added to scores: what counts is their absolute error, as exp turns it into a relative one."""

Edit = Callable[[Op[..., Any], str, dict[str, Any], Callable[..., Any]], Any]
"""`edit(op, name, arguments, run)` in place of `run(**arguments)`: a hypothesis about what they do."""


@dataclass(frozen=True)
class Step:
    """One step of theirs: `local` judges it given their inputs of it, `through` given the model's; `largest` is the largest
    magnitude of the truth, `judged` how many of `size` values counted (padding and forbidden keys do not)."""

    name: str
    op: str
    shape: tuple[int, ...]
    local: Verdict
    through: Verdict | None
    largest: float
    judged: int
    size: int

    @property
    def ok(self) -> bool:
        """Whether the step itself is right."""
        return self.local.ok

    @property
    def ratio(self) -> float:
        """Local error over bound: above 1 is wrong; infinite for a shape, a type or a pattern that is wrong."""
        return ratio(self.local)


def ratio(verdict: Verdict) -> float:
    """Error over bound."""
    if not verdict.ok and not verdict.error > verdict.bound:
        return float("inf")
    return verdict.error / verdict.bound if verdict.bound > 0 else 0.0


@dataclass(frozen=True)
class Report:
    """What a comparison found. `steps` in the order of the model; `absent` are our steps that they do not give, `unknown`
    their names that no step of ours has."""

    steps: tuple[Step, ...]
    absent: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    arithmetic: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every step agrees."""
        return all(step.ok for step in self.steps)

    @property
    def first(self) -> Step | None:
        """The first step that is wrong."""
        return next((step for step in self.steps if not step.ok), None)

    @property
    def wrong(self) -> tuple[Step, ...]:
        """Every step that is wrong by itself."""
        return tuple(step for step in self.steps if not step.ok)


@dataclass(frozen=True)
class Evidence:
    """What a step was judged by: `theirs` in float64, the `truth`, our `own` result in the type under test, and which values
    counted (`selected`; None for all). Where the shapes differ, nothing was judged."""

    op: Op[..., Any]
    theirs: Array
    truth: Array
    own: Array
    selected: Array | None


class NothingToCompareError(ValueError):
    """No step of theirs has the name of one of ours."""


def replay(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    *,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
    through: bool = True,
    progress: Callable[[Step], None] = lambda step: None,
) -> Report:
    """Judge every step of theirs that has a name of ours.

    `model` has their weights, in their type; `inputs` are its inputs. Arrays in `theirs` are in our layout and are read one at
    a time, so a `StoredTrace` will do. `substitutes` are what their run was given in place of its own values at these steps.
    `progress` is called with each step. NothingToCompareError if no name is ours.
    """
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    steps: list[Step] = []

    def arrived(step: Step) -> None:
        steps.append(step)
        progress(step)

    run = _Replay(model, theirs, arithmetic, substitutes=substitutes or {}, through=through, report=arrived)
    run.model(inputs)
    absent = tuple(name for name in run.names if name not in theirs)
    unknown = tuple(name for name in theirs if name not in set(run.names))
    if not steps:
        some = ", ".join(list(theirs)[:3]) or "none at all"
        raise NothingToCompareError(f"no step to compare: theirs are {some}; ours are {', '.join(list(run.names)[:3])} ...")
    doubtful = {step.name for step in steps if not step.ok and step.local.bound > 0}
    if doubtful:  # how much do the inputs determine them?
        again: dict[str, Step] = {}
        run = _Replay(
            model,
            theirs,
            arithmetic,
            substitutes=substitutes or {},
            moved=MOVED_LANES,
            only=doubtful,
            report=lambda step: again.update({step.name: step}),
        )
        run.model(inputs)
        steps = [replace(step, local=again[step.name].local) if step.name in again else step for step in steps]
    astray = {step.name for step in steps if step.through is not None and not step.through.ok and step.through.bound > 0}
    if astray and all(step.ok for step in steps):  # nothing is wrong by itself: how much do the model's inputs determine?
        afar: dict[str, Step] = {}
        run = _Replay(
            model,
            theirs,
            arithmetic,
            substitutes={},
            moved=MOVED_LANES,
            only=astray,
            adopts=False,
            report=lambda step: afar.update({step.name: step}),
        )
        run.model(inputs)
        steps = [replace(step, through=afar[step.name].local) if step.name in afar else step for step in steps]
    return Report(tuple(steps), absent, unknown, str(arithmetic))


def judge_step(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    name: str,
    *,
    edit: Edit | None = None,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
    moved: int = 0,
    examine: Callable[[Evidence], None] = lambda evidence: None,
) -> Step | None:
    """The one step `name`, under a hypothesis about what they do; None if it is not reached. What leads up to it is taken from
    theirs, so that little more than its own layer is run. `moved` lanes say how well its inputs determine it; `examine` is
    given the arrays that are compared."""
    found: list[Step] = []
    run = _Replay(
        model,
        theirs,
        arithmetic or Arithmetic(model.compute_dtype),
        substitutes=substitutes or {},
        only={name},
        until=name,
        edit=edit,
        moved=moved,
        report=found.append,
        examine=examine,
    )
    run.model(inputs)
    return found[0] if found else None


def sketch_step(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    name: str,
    *,
    edit: Edit,
    arithmetic: Arithmetic,
    substitutes: Mapping[str, Array] | None = None,
) -> Evidence | None:
    """As `judge_step`, in the type under test alone and without a verdict, which takes a third of the time: what would be
    compared, with our own result for the truth."""
    found: list[Evidence] = []
    run = _Replay(
        model,
        theirs,
        arithmetic,
        substitutes=substitutes or {},
        only={name},
        until=name,
        edit=edit,
        sketch=True,
        report=lambda step: None,
        examine=found.append,
    )
    run.model(inputs)
    return found[0] if found else None


@dataclass(frozen=True)
class StepArrays:
    """A step in numbers: theirs, the truth given their inputs of it, the truth given the model's if that was asked for;
    `judged` says which count."""

    theirs: Array
    local: Array
    through: Array | None
    judged: Array | None


def step_arrays(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    names: Collection[str],
    *,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
    through: bool = False,
) -> dict[str, StepArrays]:
    """These steps in numbers, those that theirs have in the shape of ours: what a picture of an error is drawn from.

    A single one, and not `through`, takes little more than running its own layer."""
    found: dict[str, StepArrays] = {}
    run = _Replay(
        model,
        theirs,
        arithmetic or Arithmetic(model.compute_dtype),
        substitutes=substitutes or {},
        report=lambda step: None,
        through=through,
        only=set(),
        until=next(iter(names)) if len(names) == 1 and not through else None,
        show=(set(names), found),
    )
    run.model(inputs)
    return found


def step_names(model: Backbone, inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every step of a run of this model on these inputs, in order, with its shape."""
    run = _Replay(model, {}, Arithmetic(model.compute_dtype), substitutes={}, through=False, report=lambda step: None)
    run.model(inputs)
    return run.names


Seen = Callable[[str, Op[..., Any], dict[str, Any], Value, Array | None], None]
"""`seen(name, op, arguments, result, selected)`: a step of a run in lanes, and which of its values count (None: all)."""


def run_in_lanes(
    model: Backbone,
    inputs: Mapping[str, Any],
    seen: Seen,
    *,
    theirs: Mapping[str, Array] | None = None,
    arithmetic: Arithmetic | None = None,
    moved: int = 0,
    until: str | None = None,
) -> None:
    """Run our model in the type under test, in float64 and in `moved` lanes more, and show every step to `seen`; the values
    that `theirs` has are taken from there on. With `until` it stops behind this step, which theirs must have."""
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    only = set[str]() if until is None else {until}
    run = _Replay(
        model,
        theirs or {},
        arithmetic,
        substitutes={},
        report=lambda step: None,
        moved=moved,
        only=only,
        until=until,
        seen=seen,
    )
    run.model(inputs)


class _Reached(Exception):  # noqa: N818  no error
    """The step that was asked for is judged."""


class _Replay:
    """The executor of a replay."""

    def __init__(
        self,
        model: Backbone,
        theirs: Mapping[str, Array],
        arithmetic: Arithmetic,
        *,
        substitutes: Mapping[str, Array],
        report: Callable[[Step], None],
        through: bool = False,
        moved: int = 0,
        only: set[str] | None = None,
        until: str | None = None,
        edit: Edit | None = None,
        adopts: bool = True,
        sketch: bool = False,
        examine: Callable[[Evidence], None] = lambda evidence: None,
        seen: Seen | None = None,
        show: tuple[set[str], dict[str, StepArrays]] | None = None,
    ) -> None:
        self._adopts, self._sketch, self._examine, self._seen = adopts, sketch, examine, seen
        self._model, self._theirs, self._arithmetic, self._substitutes = model, theirs, arithmetic, substitutes
        self._report, self._only, self._until, self._edit = report, only, until, edit
        self._through, self._show = through, show
        first = [OWN] if sketch else [OWN, TRUTH]
        self._lanes = [*first, *((OWN_THROUGH, TRUTH_THROUGH) if through else ()), *range(FIRST_MOVED, FIRST_MOVED + moved)]
        self._place = {lane: i for i, lane in enumerate(self._lanes)}
        self._params = model.params
        self._parameter_names = dict(_leaf_names(self._params))
        self._namer = Namer(self._params)
        self._real: list[Array | None] = [None]
        self._permitted: Array | None = None
        self._right_masks: dict[int, tuple[Value, Array]] = {}
        self.names: dict[str, tuple[int, ...]] = {}

    def model(self, inputs: Mapping[str, Any]) -> None:
        """Run the model and its head."""
        arrays = self._model.checked(inputs)
        self._encoder_mask = arrays.get("encoder_padding_mask")
        values: dict[str, Any] = {name: self._given(name, array) for name, array in arrays.items()}
        try:
            with executing(self):
                hidden = self._model.forward(values, None)
                if isinstance(hidden, dict):
                    hidden = hidden["decoder_sequence_output"]
                self._real.append(arrays.get("padding_mask", arrays.get("decoder_padding_mask")))
                self._model.logits(hidden)
        except _Reached:
            pass

    def run(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call: what `Op` asks of an executor."""
        with self._namer.call(op, args, kwargs) as name, self._masks(op, args, kwargs):
            if op.composite and self._may_skip(name):
                return self._known(name)
            op.check(*args, **kwargs)
            result = self._composite(op, name, args, kwargs) if op.composite else self._primitive(op, name, args, kwargs)
            if op.name in ("causal_mask", "key_mask"):
                self._permitted = self._right_mask(op, result, args, kwargs)
            return self._arrived(op, name, result, args, kwargs) if isinstance(result, Value) else result

    # -- running ------------------------------------------------------------------------------------------------------------

    def _composite(self, op: Op[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._edit is None:
            return op.reference(*args, **kwargs)
        arguments = dict(op.signature.bind(*args, **kwargs).arguments)
        return self._edit(op, name, arguments, op.reference)

    def _primitive(self, op: Op[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(op.signature.bind(*args, **kwargs).arguments)
        values = [value for value in arguments.values() if isinstance(value, Value)]
        arrays = [value for value in arguments.values() if isinstance(value, Value | np.ndarray)]
        longest = max((max(array.shape, default=1) for array in arrays), default=1) or 1
        terms = max([longest, *(value.terms for value in values)])
        resolve = Resolver(self._arithmetic.movement(terms), lambda array: self._parameter_names.get(id(array), ""))
        done: dict[tuple[int, ...], Any] = {}
        results = []
        for place, lane in enumerate(self._lanes):
            key = (is_wide(lane), max(lane, TRUTH_THROUGH), *(id(value.lanes[place]) for value in values))
            if key not in done:  # lanes that hold the same arrays so far have the same result
                resolved = {key: resolve(value, lane, place) for key, value in arguments.items()}
                with np.errstate(all="ignore"):  # infinities and NaN of theirs are judged, not warned of
                    done[key] = op.reference(**resolved) if self._edit is None else self._edit(op, name, resolved, op.reference)
            results.append(done[key])
        if not isinstance(results[0], np.ndarray):
            return results[0]
        given = op.error.kind == "exact" and all(value.given for value in values)
        return Value(results, given=given, terms=1 if given else terms)

    def _given(self, name: str, array: Array) -> Value:
        if array.dtype.kind in "iub":
            return Value([array] * len(self._lanes), given=True)
        wide = array.astype(np.float64)
        by = self._arithmetic.movement(max(array.shape, default=1))
        lanes = [
            moved(wide, by, lane, name) if lane >= FIRST_MOVED else wide if is_wide(lane) else array for lane in self._lanes
        ]
        return Value(lanes, given=True)

    # -- their values -------------------------------------------------------------------------------------------------------

    def _may_skip(self, name: str) -> bool:
        """Whether this composite need not run: it is known, and the step that is asked for is not inside."""
        if self._until is None or name not in self._theirs or name == self._until:
            return False
        place, target = (text.partition(":")[0] for text in (name, self._until))
        return ":" in name and target != place and not target.startswith(f"{place}.")

    def _known(self, name: str) -> Value:
        array = self._substitutes.get(name)
        dtype = numpy_dtype(self._model.embedding_dtype)  # what is skipped is whole layers: their results have its type
        return self._given(name, self._typed(self._theirs[name] if array is None else array, dtype))

    def _arrived(self, op: Op[..., Any], name: str, result: Value, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        if op.name in QUIET:
            return result
        self.names[name] = result.shape
        if self._seen is not None:
            arguments = dict(op.signature.bind(*args, **kwargs).arguments)
            self._seen(name, op, arguments, result, self._selection(op, result.shape))
        if name not in self._theirs:
            return result
        got = np.asarray(self._theirs[name])
        if got.shape != result.shape:
            if name == self._until:
                self._examine(Evidence(op, got.astype(np.float64), result.lanes[-1], result.lanes[0], None))
            wrong = Verdict(False, f"{name} has shape {got.shape}, wanted {result.shape}")
            self._step(name, op, result, wrong, None, 0.0, got.size)
            return result
        selected = self._selection(op, result.shape)
        if self._show is not None and name in self._show[0]:
            self._keep(name, op, got, result, selected, *self._show)
        if self._only is None or name in self._only:
            if self._sketch:
                self._sketched(op, got.astype(np.float64), result.lanes[0], selected)
            arguments = dict(op.signature.bind(*args, **kwargs).arguments)
            self._judge(op, name, arguments, got, result, selected)
        substitute = np.asarray(self._substitutes.get(name, got))
        if not self._adopts or result.dtype.kind in "iub":
            return result  # masks and buckets steer our steps as they are to be; theirs are judged by themselves
        return self._substituted(name, substitute, result, selected)

    def _keep(
        self,
        name: str,
        op: Op[..., Any],
        got: Array,
        result: Value,
        selected: Array | None,
        wanted: set[str],
        found: dict[str, StepArrays],
    ) -> None:
        local = result.lanes[self._place[TRUTH]]
        through = result.lanes[self._place[TRUTH_THROUGH]] if self._through else None
        if got.dtype.kind not in "iub" and op.name == "attention_scores":
            got = _without_shift(got.astype(np.float64), local, selected)
        found[name] = StepArrays(got, local, through, selected)
        if found.keys() == wanted:
            raise _Reached

    def _substituted(self, name: str, array: Array, result: Value, selected: Array | None) -> Value:
        """Theirs in place of ours, where it counts; elsewhere ours, as theirs may be anything there."""
        chosen = self._typed(array, result.dtype)
        wide = chosen.astype(np.float64)
        by = self._arithmetic.movement(result.terms)
        lanes = []
        for lane, ours in zip(self._lanes, result.lanes, strict=True):
            if lane in (OWN_THROUGH, TRUTH_THROUGH):
                lanes.append(ours)
                continue
            new = moved(wide, by, lane, name) if lane >= FIRST_MOVED else wide if is_wide(lane) else chosen
            lanes.append(new if selected is None else np.where(selected, new, ours))
        return Value(lanes, given=True)

    def _typed(self, array: Array, ours: np.dtype[Any]) -> Array:
        """Their values as the step after takes them: in our own type of this step, which may be wider than theirs."""
        array = np.asarray(array)
        return array if array.dtype == ours else narrow(array.astype(np.float64), ours)

    # -- what counts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _masks(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Inside a stack its padding mask says which tokens are real; inside an attention its mask which keys are permitted."""
        arguments = op.signature.bind(*args, **kwargs).arguments if op.composite else {}
        mask, permitted = arguments.get("padding_mask"), arguments.get("mask")
        real = mask.lanes[0] if isinstance(mask, Value) else self._real[-1]
        if "encoder_output" in arguments:
            real = self._encoder_mask
        before = self._permitted
        self._real.append(real)
        if isinstance(permitted, Value):
            self._permitted = self._right_masks.get(id(permitted), (permitted, permitted.lanes[0]))[1]
        try:
            yield
        finally:
            self._real.pop()
            if isinstance(permitted, Value):
                self._permitted = before

    def _right_mask(self, op: Op[..., Any], result: Value, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """Which keys are permitted: a hypothesis about the mask must not change what counts."""
        if self._edit is None:
            return result.lanes[0]
        arguments = op.signature.bind(*args, **kwargs).arguments
        mask: Array = op.reference(**{key: Resolver(0.0, str)(value, OWN, 0) for key, value in arguments.items()})
        self._right_masks[id(result)] = result, mask
        return mask

    def _selection(self, op: Op[..., Any], shape: tuple[int, ...]) -> Array | None:
        """Which values of a result count, to be broadcast to its shape; None for all of them."""
        real = self._real[-1]
        if real is None or not isinstance(op.result, Shape):
            return None
        if "s" in op.result.dims and "t" in op.result.dims:  # pairs of query and key
            return self._selected_pairs(op, shape, real)
        if shape[:2] == real.shape:
            return np.broadcast_to(real.reshape(*real.shape, *(1,) * (len(shape) - 2)), shape)
        return None

    def _selected_pairs(self, op: Op[..., Any], shape: tuple[int, ...], real: Array) -> Array | None:
        if len(shape) != 4:
            return None
        selected: Array = np.ones((1, 1, 1, 1), bool)
        if shape[-2] == real.shape[1]:
            selected = real[:, None, :, None]
        if op.name != "causal_mask" and self._permitted is not None and self._permitted.shape[-1] == shape[-1]:
            permitted: Array = self._permitted
            if op.name == "masked_softmax":  # a forbidden key must have no weight: those count
                permitted = np.asarray(permitted.any(-1, keepdims=True))
            selected = selected & permitted
        if shape[0] == 1:  # one bias for all rows: where any row uses it
            selected = np.asarray(selected.any(0, keepdims=True))
        return np.broadcast_to(selected, shape)

    def _sketched(self, op: Op[..., Any], got: Array, own: Array, selected: Array | None) -> NoReturn:
        if op.name == "attention_scores":
            got = _without_shift(got, own, selected)
        self._examine(Evidence(op, got, own, own, selected))
        raise _Reached

    # -- judging ------------------------------------------------------------------------------------------------------------

    def _judge(
        self, op: Op[..., Any], name: str, arguments: dict[str, Any], got: Array, result: Value, selected: Array | None
    ) -> None:
        if result.dtype.kind in "iub":
            self._examine(Evidence(op, got.astype(np.float64), result.lanes[1], result.lanes[0], selected))
            found, wanted = _kept(got.astype(result.dtype), selected), _kept(result.lanes[0], selected)
            local = compare(found, wanted, exact(), wanted=wanted, name=name)
            self._step(name, op, result, local, None, 0.0, got.size if selected is None else int(selected.sum()))
            return
        if not np.issubdtype(got.dtype, np.floating) and got.dtype.name != "bfloat16":
            wrong = Verdict(False, f"{name} has dtype {got.dtype}, wanted floating-point numbers")
            self._step(name, op, result, wrong, None, 0.0, got.size)
            return
        wide = got.astype(np.float64)
        lane = {lane: _kept(array, selected) for lane, array in zip(self._lanes, result.lanes, strict=True)}

        def judged(values: Array) -> tuple[Array, Verdict]:
            typed, kept = _kept(narrow(values, numpy_dtype(self._arithmetic.dtype)), selected), _kept(values, selected)
            return typed, self._local(op, name, arguments, typed, kept, lane, result, selected)

        typed, local = judged(wide)
        if op.name == "attention_scores" and not local.ok:  # the softmax does not see what all keys of a query have in common
            wide = _without_shift(wide, result.lanes[self._place[TRUTH]], selected)
            typed, local = judged(wide)
        self._examine(Evidence(op, wide, result.lanes[self._place[TRUTH]], result.lanes[self._place[OWN]], selected))
        largest = float(np.abs(lane[TRUTH]).max(initial=0.0))
        through = None
        if self._through:
            through = compare(
                typed, lane[TRUTH_THROUGH], calibrated(4), wanted=lane[OWN_THROUGH], terms=result.terms, name=name
            )
        self._step(name, op, result, local, through, largest, got.size if selected is None else int(selected.sum()))

    def _local(
        self,
        op: Op[..., Any],
        name: str,
        arguments: dict[str, Any],
        typed: Array,
        wide: Array,
        lane: dict[int, Array],
        result: Value,
        selected: Array | None,
    ) -> Verdict:
        if op.name in BIASES:
            return _elementwise(name, np.abs(wide - lane[TRUTH]), self._bias_bound(lane[TRUTH]))
        values = [value for value in arguments.values() if isinstance(value, Value)]
        if not op.composite and op.error.kind in ("multilinear", "ulps", "exact") and all(value.given for value in values):
            condition = self._condition(op, name, arguments)
            if condition is not None:
                allowance = 2 * self._arithmetic.product_u * _kept(condition, selected)
                bias = arguments.get("bias")
                if op.name == "attention_scores" and isinstance(bias, Value):
                    allowance = allowance + self._bias_bound(bias.lanes[self._place[TRUTH]], lane[TRUTH])
                closer = _towards(wide, lane[TRUTH], allowance)
                return compare(
                    narrow(closer, typed.dtype),
                    lane[TRUTH],
                    multilinear(),
                    condition=_kept(condition, selected),
                    terms=max(max(value.shape, default=1) for value in values) if values else 1,
                    roundings=ROUNDINGS,
                    name=name,
                )
        others = [lane[number] for number in self._lanes if number >= FIRST_MOVED]
        return compare(typed, lane[TRUTH], calibrated(4), wanted=lane[OWN], terms=result.terms, moved=others, name=name)

    def _bias_bound(self, bias: Array, scores: Array | None = None) -> Array:
        """How far a bias (b, h, t, s), or the scores that it was added to, may be off. In float32 or wider it may be counted
        from either end of a row, as the softmax sees no difference: then its largest numbers are what is rounded."""
        summed_in = UNIT_ROUNDOFF["float64" if self._arithmetic.dtype == "float64" else "float32"]
        largest = np.abs(bias).max(axis=(-2, -1), keepdims=True, initial=0.0)
        found: Array = 4 * self._arithmetic.u + 4 * summed_in * (largest + (0.0 if scores is None else np.abs(scores)))
        return np.broadcast_to(found, bias.shape) if scores is None else found

    def _condition(self, op: Op[..., Any], name: str, arguments: dict[str, Any]) -> Array | None:
        """The op on absolute values; of scores without the position bias, which is not to be rounded as they are."""
        resolve = Resolver(0.0, lambda array: "")
        wide = {key: _absolute(resolve(value, TRUTH, self._place[TRUTH])) for key, value in arguments.items()}
        if op.name == "attention_scores":
            wide["bias"] = None
        with np.errstate(all="ignore"):
            found = op.reference(**wide)
            if self._edit is not None:  # which may move numbers to other places, and may bring in some of either sign
                edited = np.abs(self._edit(op, name, wide, op.reference))
                found = np.maximum(edited, found) if edited.shape == found.shape else edited
        return np.abs(found) if isinstance(found, np.ndarray) else None

    def _step(
        self,
        name: str,
        op: Op[..., Any],
        result: Value,
        local: Verdict,
        through: Verdict | None,
        largest: float,
        judged: int,
    ) -> None:
        size = int(np.prod(result.shape))
        self._report(Step(name, op.name, result.shape, local, through, largest, judged, size))
        if name == self._until:
            raise _Reached


def _leaf_names(tree: Any, path: str = "") -> Iterator[tuple[int, str]]:
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(child, dict | list):
            yield from _leaf_names(child, f"{path}{key}.")
        else:
            yield id(child), f"{path}{key}"


def _kept(array: Array, selected: Array | None) -> Array:
    """Zero wherever it does not count."""
    return array if selected is None else np.where(selected, array, array.dtype.type(0))


def _absolute(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.abs(value)
    return value


def _without_shift(got: Array, truth: Array, selected: Array | None) -> Array:
    """`got` less what it has more than the truth in the middle of each row."""
    counts = np.broadcast_to(True, got.shape) if selected is None else selected
    with np.errstate(all="ignore"):
        difference = np.where(counts, got - truth, np.nan)
        shift = np.zeros((*got.shape[:-1], 1))
        rows = np.isfinite(difference).any(-1)
        if rows.any():
            shift[rows, 0] = np.nanmedian(np.where(np.isfinite(difference[rows]), difference[rows], np.nan), axis=-1)
    return got - shift


def _towards(got: Array, truth: Array, allowance: Array | float) -> Array:
    """`got`, nearer to the truth by what is allowed beside the bound."""
    if np.all(allowance == 0.0):
        return got
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(got), truth + np.sign(got - truth) * np.maximum(np.abs(got - truth) - allowance, 0.0), got)


def _elementwise(name: str, error: Array, bound: Array) -> Verdict:
    good = error <= bound
    if error.size == 0:
        return Verdict(True, f"{name}: empty")
    over = np.where(np.isnan(error), np.inf, error / bound)
    index = tuple(int(i) for i in np.unravel_index(int(over.argmax()), error.shape))
    worst, limit = float(error[index]), float(bound[index])
    return Verdict(bool(good.all()), f"{name}: error {worst:.3g}, bound {limit:.3g} (absolute) at {index}", worst, limit, index)
