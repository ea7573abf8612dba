"""Faults that are seen in the arrays rather than tried: overflow, NaN, other orders of axes, roundings, factors."""

import math
from collections.abc import Iterator
from itertools import permutations

import numpy as np

from refmodels.numerics import calibrated, compare
from refmodels.op import Array
from refmodels.ops.precision import narrow
from refmodels.verification.signatures.fault import Compared, Fault, Scene, Symptom, rounded

LARGEST_FLOAT16 = 65504.0
CLAMPS = (65504.0, 64504.0)
"""Where float16 implementations cut off: its largest number, and Transformers' 1000 less."""


def remaining(compared: Compared | None) -> float:
    """The root mean square of the disagreement where it counts: infinite for another shape, for NaN and for nothing."""
    if compared is None:
        return math.inf
    return _distance(compared.theirs, compared.truth, compared.selected)


def _distance(theirs: Array, truth: Array, selected: Array | None) -> float:
    if theirs.shape != truth.shape:
        return math.inf
    with np.errstate(all="ignore"):
        difference = theirs - truth.astype(np.float64)
        difference = np.where((theirs == truth) | (np.isnan(theirs) & np.isnan(truth)), 0.0, difference)
        if selected is not None:
            difference = difference[np.broadcast_to(selected, difference.shape)]
        mean = float(np.square(difference).mean()) if difference.size else 0.0
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def _explains(compared: Compared, theirs: Array, truth: Array, own: Array, selected: Array | None = None) -> float | None:
    """What is left of the disagreement if theirs is to be compared with these; None where it does not fit the bound."""
    if theirs.shape != truth.shape:
        return None
    if selected is not None:
        theirs, truth, own = (np.where(selected, array, array.dtype.type(0)) for array in (theirs, truth, own))
    if not compare(narrow(theirs, own.dtype), truth, calibrated(4), wanted=own):
        return None
    before = remaining(compared)
    return 0.0 if math.isinf(before) else _distance(theirs, truth, None) / before if before else None


def _counted(compared: Compared, array: Array) -> Array:
    if compared.selected is None or array.shape != compared.truth.shape:
        return array.ravel()
    return array[np.broadcast_to(compared.selected, array.shape)]


def _is_float(compared: Compared) -> bool:
    return compared.truth.dtype.kind == "f"


# -- numbers that a type cannot hold ----------------------------------------------------------------------------------------


def _overflow(scene: Scene, compared: Compared) -> Symptom | None:
    if not _is_float(compared) or compared.theirs.shape != compared.truth.shape:
        return None
    theirs, truth = _counted(compared, compared.theirs), _counted(compared, compared.truth)
    reached = next(((name, size) for name, size in scene.magnitudes.items() if size > LARGEST_FLOAT16), None)
    detail = f"{reached[0]} reaches {reached[1]:.4g}, beyond float16's {LARGEST_FLOAT16:g}" if reached else ""
    if np.isfinite(truth).all() and not np.isfinite(theirs).all():
        norms = [(name, size) for name, size in scene.magnitudes.items() if "norm" in name.rpartition(":")[2]]
        squared = next(((name, size) for name, size in norms if size > LARGEST_FLOAT16**0.5), None)
        if not reached and squared:
            detail = f"squares of up to {squared[1]:.4g} in {squared[0]} are beyond float16's {LARGEST_FLOAT16:g}"
        return Symptom(detail) if detail else None
    for clamp in CLAMPS if reached and theirs.size else ():
        if abs(np.abs(theirs).max() - clamp) < 1e-3 * clamp:
            left = _explains(compared, compared.theirs, np.clip(compared.truth, -clamp, clamp),
                             np.clip(compared.own, -clamp, clamp), compared.selected)  # fmt: skip
            return Symptom(f"{detail}, and is cut off at {clamp:g}", left or 0.0)
    return None


def _nan_without_keys(scene: Scene, compared: Compared) -> Symptom | None:
    theirs, truth = _counted(compared, compared.theirs), _counted(compared, compared.truth)
    if not _is_float(compared) or not np.isnan(theirs).any() or np.isnan(truth).any():
        return None
    masks = {name: np.asarray(mask).astype(bool) for name, mask in scene.inputs.items() if name.endswith("padding_mask")}
    for name, mask in masks.items():
        empty = ~mask.any(-1) if name == "encoder_padding_mask" else ~mask[:, 0]  # a causal row sees what is before it
        if empty.any():
            return Symptom(f"row {int(empty.argmax())} of {name} begins with padding" if mask.any() else f"{name} is empty")
    return None


# -- the same numbers in other places ---------------------------------------------------------------------------------------


def _permuted(scene: Scene, compared: Compared) -> Symptom | None:
    if not _is_float(compared) or compared.theirs.shape != compared.truth.shape:
        return None
    dims = getattr(compared.op.result, "dims", ())
    for axis, label in _permutable(dims, compared.truth.ndim):
        order = _matching(np.moveaxis(compared.theirs, axis, 0), np.moveaxis(compared.truth, axis, 0))
        if order is None or order == list(range(len(order))):
            continue
        truth, own = (np.take(array, order, axis) for array in (compared.truth, compared.own))
        selected = None
        if compared.selected is not None:
            full = np.broadcast_to(compared.selected, compared.truth.shape)
            selected = np.take(full, order, axis) & full
        left = _explains(compared, compared.theirs, truth, own, selected)
        if left is not None:
            return Symptom(f"{label} stand in the order {', '.join(map(str, order))}", left)
    return None


def _permutable(dims: tuple[str, ...], ndim: int) -> Iterator[tuple[int, str]]:
    if ndim > 1:
        yield 0, "rows of the batch"
    if "h" in dims and len(dims) == ndim and dims.index("h") > 0:
        yield dims.index("h"), "heads"


def _matching(theirs: Array, truth: Array) -> list[int] | None:
    """For each of theirs the one of ours that is nearest, if each is taken once."""
    if not 1 < len(theirs) <= 256:
        return None
    left = list(range(len(truth)))
    order = []
    for part in theirs:
        with np.errstate(all="ignore"):
            distances = [float(np.abs(part - truth[i]).mean()) for i in left]
        if not all(map(math.isfinite, distances)):
            return None
        order.append(left.pop(int(np.argmin(distances))))
    return order


def _layout(scene: Scene, compared: Compared) -> Symptom | None:
    if not _is_float(compared) or compared.theirs.size != compared.truth.size or compared.truth.ndim > 4:
        return None
    shape, ndim = compared.theirs.shape, compared.truth.ndim
    for axes in permutations(range(ndim)):
        turned = compared.truth.transpose(axes)
        if axes == tuple(range(ndim)) and turned.shape == shape:
            continue
        selected = None
        if compared.selected is not None:
            selected = np.broadcast_to(compared.selected, compared.truth.shape).transpose(axes).reshape(shape)
        own = compared.own.transpose(axes)
        left = _explains(compared, compared.theirs, turned.reshape(shape), own.reshape(shape), selected)
        if left is not None:
            turning = f"with its axes in the order {axes}" if axes != tuple(range(ndim)) else ""
            reshaping = f"of shape {shape} in place of {compared.truth.shape}" if turned.shape != shape else ""
            return Symptom(f"it is ours {' and '.join(filter(None, (turning, reshaping)))}", left)
    return None


# -- roundings, factors, dropout --------------------------------------------------------------------------------------------


def _kept_in_half(scene: Scene, compared: Compared) -> Symptom | None:
    if not _is_float(compared) or compared.theirs.shape != compared.truth.shape:
        return None
    theirs, truth = _counted(compared, compared.theirs), _counted(compared, compared.truth)
    if np.unique(theirs).size < 8 or not np.isfinite(theirs).all():
        return None
    before = remaining(compared)
    for dtype, u in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        kept = rounded(theirs, dtype)
        if u <= scene.arithmetic.u or not np.array_equal(kept, theirs):
            continue
        if float(np.abs(theirs - truth).max()) <= 16 * u * float(np.abs(truth).max()):
            return Symptom(dtype, _distance(theirs, rounded(truth.astype(np.float64), dtype), None) / before if before else 0.0)
    return None


def _factor(scene: Scene, compared: Compared) -> Symptom | None:
    if not _is_float(compared) or compared.theirs.shape != compared.truth.shape:
        return None
    theirs, truth = _counted(compared, compared.theirs), _counted(compared, compared.truth.astype(np.float64))
    square = float(np.square(truth).sum())
    if truth.size < 2 or not square or not np.isfinite(theirs).all():
        return None
    factor = float((theirs * truth).sum()) / square
    if abs(factor - 1) < 1e-3 or abs(factor) < 1e-6:
        return None
    own = (compared.own.astype(np.float64) * factor).astype(compared.own.dtype)
    left = _explains(compared, compared.theirs, compared.truth * factor, own, compared.selected)
    return None if left is None else Symptom(f"{factor:.6g}{_guessed(scene, factor)}", left)


def _guessed(scene: Scene, factor: float) -> str:
    config = scene.model.config
    d, n, h = config.head_dim, config.hidden_dim, config.num_heads
    kept = 1 - config.dropout
    guesses = {
        "1/sqrt(head_dim)": d**-0.5, "sqrt(head_dim)": d**0.5, "1/head_dim": 1 / d, "head_dim": d,
        "1/sqrt(hidden_dim)": n**-0.5, "sqrt(hidden_dim)": n**0.5, "1/hidden_dim": 1 / n, "hidden_dim": n,
        "1/num_heads": 1 / h, "num_heads": h, "log2(e)": math.log2(math.e), "log(2)": math.log(2),
        "1 - dropout": kept, "1/(1 - dropout)": 1 / kept if kept else 0.0,
    }  # fmt: skip
    fitting = [name for name, value in guesses.items() if value not in (0, 1) and abs(factor / value - 1) < 1e-3]
    return f", which is {' or '.join(fitting)}" if fitting else ""


def _offset(scene: Scene, compared: Compared) -> Symptom | None:
    if not _is_float(compared) or compared.theirs.shape != compared.truth.shape:
        return None
    theirs, truth = _counted(compared, compared.theirs), _counted(compared, compared.truth)
    if truth.size < 2 or not np.isfinite(theirs).all():
        return None
    offset = float(np.median(theirs - truth))
    own = (compared.own.astype(np.float64) + offset).astype(compared.own.dtype)
    if abs(offset) <= 1e-3 * float(np.abs(truth).max()):
        return None
    left = _explains(compared, compared.theirs, compared.truth + offset, own, compared.selected)
    return None if left is None else Symptom(f"{offset:.6g}", left)


def _dropout(scene: Scene, compared: Compared) -> Symptom | None:
    """Some values zero, all others larger by one factor."""
    if not _is_float(compared) or compared.theirs.shape != compared.truth.shape:
        return None
    theirs, truth = _counted(compared, compared.theirs), _counted(compared, compared.truth)
    theirs, truth = theirs[truth != 0], truth[truth != 0]
    zero = theirs == 0
    if theirs.size < 16 or not 0 < zero.mean() < 1 or not np.isfinite(theirs).all():
        return None
    ratios = theirs[~zero] / truth[~zero]
    factor = float(np.median(ratios))
    if factor <= 1 + 1e-3 or float(np.abs(ratios / factor - 1).max()) > 64 * scene.arithmetic.u + 1e-3:
        return None
    return Symptom(f"at a rate of {1 - 1 / factor:.3g}: {zero.mean():.0%} of the values are zero")


FAULTS: list[Fault] = [
    Fault(
        "overflow",
        "A number beyond float16's range became infinite, NaN or was cut off: keep this step in float32.",
        rule=_overflow,
    ),
    Fault(
        "nan-in-rows-without-keys",
        "A softmax over no permitted key gives NaN, which spreads: give such rows any weights, such as equal ones.",
        rule=_nan_without_keys,
    ),
    Fault(
        "rows-permuted",
        "The numbers are right, and stand in another order along the batch or the heads.",
        rule=_permuted,
    ),
    Fault(
        "dropout-active",
        "Dropout is active: switch to inference.",
        rule=_dropout,
    ),
    Fault(
        "layout",
        "The array is ours in another layout: the mapping may need a transpose or a reshape.",
        rule=_layout,
        general=True,
    ),
    Fault(
        "kept-in-half-precision",
        "The numbers are rounded to a shorter type than declared.",
        rule=_kept_in_half,
        general=True,
    ),
    Fault("constant-factor", "Every value is the right one times a constant.", rule=_factor, general=True),
    Fault("constant-offset", "Every value is the right one plus a constant.", rule=_offset, general=True),
]
