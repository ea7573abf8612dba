"""The verdict on one step of theirs: error against what the arithmetic allows (`spec/verification.md`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.numerics import UNIT_ROUNDOFF, Verdict, calibrated, compare, exact, multilinear
from refmodels.op import Array
from refmodels.ops.precision import narrow, numpy_dtype
from refmodels.verification.lanes import OWN, OWN_THROUGH, TRUTH, TRUTH_THROUGH, Arithmetic, Resolver, Value
from refmodels.verification.run import Edit, Sight

ROUNDINGS = 3
"""How often a step of theirs may round on its way: a product, its scale and its bias are three calls in some frameworks."""

SHIFTED = ("attention_scores", "alibi_bias")
"""Steps that may be off by a number for each row: the softmax does not see it, and ALiBi is counted from either end."""

BIASES = ("alibi_bias", "relative_position_bias")
"""Steps whose results are added to scores: what counts is their absolute error, as exp turns it into a relative one."""


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


def judge(sight: Sight, arithmetic: Arithmetic, edit: Edit | None = None) -> Step:
    """The verdict on a step that they give. `edit` is the hypothesis that the run was made under."""
    local, through, largest = _verdicts(sight, arithmetic, edit)
    size = sight.result.lanes[0].size
    judged = size if sight.selected is None else int(sight.selected.sum())
    return Step(sight.name, sight.op.name, sight.result.shape, local, through, largest, judged, size)


def counted(array: Array, selected: Array | None) -> Array:
    """Zero wherever it does not count."""
    return array if selected is None else np.where(selected, array, array.dtype.type(0))


def without_shift(got: Array, truth: Array, selected: Array | None) -> Array:
    """Scores less what they have more than the truth in the middle of each row: the softmax does not see it."""
    counts = np.broadcast_to(True, got.shape) if selected is None else selected
    with np.errstate(all="ignore"):
        difference = np.where(counts, got - truth, np.nan)
        shift = np.zeros((*got.shape[:-1], 1))
        rows = np.isfinite(difference).any(-1)
        if rows.any():
            shift[rows, 0] = np.nanmedian(np.where(np.isfinite(difference[rows]), difference[rows], np.nan), axis=-1)
    return got - shift


def _verdicts(sight: Sight, arithmetic: Arithmetic, edit: Edit | None) -> tuple[Verdict, Verdict | None, float]:
    """Local, accumulated, and the largest magnitude of the truth."""
    got, result, selected, name = sight.theirs, sight.result, sight.selected, sight.name
    if got is None:
        raise ValueError(f"{name}: theirs do not give it")
    if not sight.fits:
        return Verdict(False, f"{name} has shape {got.shape}, wanted {result.shape}"), None, 0.0
    if result.dtype.kind in "iub":
        found, wanted = counted(got.astype(result.dtype), selected), counted(sight.lane(OWN), selected)
        return compare(found, wanted, exact(), wanted=wanted, name=name), None, 0.0
    if got.dtype.name not in UNIT_ROUNDOFF:
        return Verdict(False, f"{name} has dtype {got.dtype}, wanted floating-point numbers"), None, 0.0
    truth, wide = sight.lane(TRUTH), got.astype(np.float64)
    local = _local(sight, arithmetic, edit, wide)
    if sight.op.name in SHIFTED and not local.ok:
        wide = without_shift(wide, truth, selected)
        local = _local(sight, arithmetic, edit, wide)
    through = None
    if sight.has(TRUTH_THROUGH):
        typed = counted(narrow(wide, numpy_dtype(arithmetic.dtype)), selected)
        far, own = (counted(sight.lane(lane), selected) for lane in (TRUTH_THROUGH, OWN_THROUGH))
        through = compare(typed, far, calibrated(4), wanted=own, terms=result.terms, name=name)
    return local, through, float(np.abs(counted(truth, selected)).max(initial=0.0))


def _local(sight: Sight, arithmetic: Arithmetic, edit: Edit | None, got: Array) -> Verdict:
    """By the error model of the op where the step is one op on values that are known, else `calibrated`."""
    selected, op, name = sight.selected, sight.op, sight.name
    wide, truth = counted(got, selected), counted(sight.lane(TRUTH), selected)
    dtype = numpy_dtype(arithmetic.dtype)
    if op.name in BIASES:
        return _elementwise(name, np.abs(wide - truth), _bias_bound(arithmetic, truth))
    values = [value for value in sight.arguments.values() if isinstance(value, Value)]
    if not op.composite and op.error.kind in ("multilinear", "ulps", "exact") and all(value.given for value in values):
        condition = _condition(sight, edit)
        if condition is not None:
            condition = counted(condition, selected)
            allowance = 2 * arithmetic.product_u * condition
            bias = sight.arguments.get("bias")
            if op.name == "attention_scores" and isinstance(bias, Value):
                allowance = allowance + _bias_bound(arithmetic, bias.lanes[sight.places[TRUTH]], truth)
            return compare(
                narrow(_towards(wide, truth, allowance), dtype),
                truth,
                multilinear(),
                condition=condition,
                terms=max((max(value.shape, default=1) for value in values), default=1),
                roundings=ROUNDINGS,
                name=name,
            )
    if "elementwise" in op.laws and len(values) == 1 and values[0].given and values[0].shape == truth.shape:
        given = counted(values[0].lanes[sight.places[TRUTH]], selected)
        bound = 8 * arithmetic.u * np.maximum(np.abs(given), np.abs(truth))  # of each value by itself
        return _elementwise(name, np.abs(wide - truth), bound + np.finfo(np.float32).tiny)
    own, others = counted(sight.lane(OWN), selected), [counted(array, selected) for array in sight.moved]
    return compare(narrow(wide, dtype), truth, calibrated(4), wanted=own, terms=sight.result.terms, moved=others, name=name)


def _bias_bound(arithmetic: Arithmetic, bias: Array, scores: Array | None = None) -> Array:
    """How far a bias (b, h, t, s), or the scores that it was added to, may be off. In float32 or wider it may be counted from
    either end of a row, as the softmax sees no difference: then its largest numbers are what is rounded."""
    summed_in = UNIT_ROUNDOFF["float64" if arithmetic.dtype == "float64" else "float32"]
    largest = np.abs(bias).max(axis=(-2, -1), keepdims=True, initial=0.0)
    found: Array = 4 * arithmetic.u + 4 * summed_in * (largest + (0.0 if scores is None else np.abs(scores)))
    return np.broadcast_to(found, bias.shape) if scores is None else found


def _condition(sight: Sight, edit: Edit | None) -> Array | None:
    """The op on absolute values; of scores without the position bias, which is not to be rounded as they are."""
    if sight.op.error.kind == "exact" and edit is None:
        return np.abs(sight.lane(TRUTH))
    resolve, place = Resolver(0.0, lambda array: ""), sight.places[TRUTH]
    wide = {key: _absolute(resolve(value, TRUTH, place), isinstance(value, Value)) for key, value in sight.arguments.items()}
    if sight.op.name == "attention_scores":
        wide["bias"] = None
    with np.errstate(all="ignore"):
        found = sight.op.reference(**wide)
        if edit is not None:  # which may move numbers to other places, and may bring in some of either sign
            edited = np.abs(edit(sight.op, sight.name, wide, sight.op.reference))
            found = np.maximum(edited, found) if edited.shape == found.shape else edited
    return np.abs(found) if isinstance(found, np.ndarray) else None


def _absolute(value: Any, theirs: bool) -> Any:
    """Absolute values: in the place of a parameter's own wide copy, which may be large."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    return np.abs(value) if theirs or not value.flags.owndata else np.abs(value, out=value)


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
    return Verdict(bool(good.all()), f"{name}: error {worst:.3g}, bound {limit:.3g} at {index}", worst, limit, index)
