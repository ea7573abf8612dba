"""How far a right implementation may be from the truth at a step of a whole run: `calibrated`, of our own run on these inputs.

So two right ones, which may add up in other orders, batch otherwise or use a cache, differ by no more than twice that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.numerics import Verdict, calibrated, compare
from refmodels.op import Array
from refmodels.ops.precision import narrow, numpy_dtype
from refmodels.verification.judgement import counted
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.run import LOCAL, MOVED, Run, Sight

BEYOND = {"float16": 65520.0, "bfloat16": (2.0 - 2.0**-8) * 2.0**127, "float32": (2.0 - 2.0**-24) * 2.0**127}
"""The smallest numbers that these types round to infinity."""


@dataclass(frozen=True)
class Known:
    """A step of our own run: its `truth` in float64, what our run in the type under test gave (`own`), and how far a right
    implementation may be from the truth anywhere in it. Arrays are kept only where they are asked for."""

    bound: float
    truth: Array | None = None
    own: Array | None = None


def bounds(
    model: Backbone,
    inputs: Mapping[str, Any],
    arithmetic: Arithmetic,
    wanted: Callable[[str], bool],
    *,
    second_look: bool = False,
    keep: bool = False,
) -> dict[str, Known]:
    """The floating-point steps that `wanted` admits. `second_look`: with what roundings of inputs and parameters do to them,
    which costs four runs in float64 more; without it a right implementation may be refused where our own run was lucky. `keep`
    the arrays."""
    found: dict[str, Known] = {}

    def look(sight: Sight) -> None:
        if not wanted(sight.name) or sight.result.dtype.kind in "iub":
            return
        own, truth, *moved = (counted(array, sight.selected) for array in sight.result.lanes)
        bound = largest_error(truth, own, moved, sight.result.terms, arithmetic)
        found[sight.name] = Known(bound, truth, own) if keep else Known(bound)

    closer = second_look or arithmetic.products  # our own run does not round what products take
    Run(model, arithmetic, look, lanes=(*LOCAL, *MOVED) if closer else LOCAL).through(inputs)
    return found


def largest_error(truth: Array, own: Array, moved: list[Array], terms: int, arithmetic: Arithmetic) -> float:
    """What `calibrated` allows a result in this type: one number, the same for every element."""
    typed = narrow(truth, numpy_dtype(arithmetic.dtype))
    return compare(typed, truth, calibrated(), wanted=own, terms=terms, moved=moved).bound


def difference(first: Array, second: Array, bound: float, counts: Array | None, dtype: str, name: str) -> tuple[Verdict, bool]:
    """Whether two arrays differ by no more than `bound` where `counts` says that they count, and whether their bits agree.

    An infinity stands for the smallest number that the type cannot hold; NaN agrees with NaN alone.
    """
    if first.shape != second.shape:
        return Verdict(False, f"{name} has shapes {first.shape} and {second.shape}"), False
    if counts is not None and first.shape[: counts.ndim] != counts.shape:
        return Verdict(False, f"{name} has shape {first.shape}, wanted {counts.shape} and more"), False
    limit = BEYOND.get(dtype, np.inf)
    a, b = (np.clip(array.astype(np.float64), -limit, limit) for array in (first, second))
    with np.errstate(invalid="ignore"):
        error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    error = np.where(np.isnan(error), np.inf, error)
    if counts is not None:
        error = np.where(counts.reshape(*counts.shape, *(1,) * (error.ndim - counts.ndim)), error, 0.0)
    if error.size == 0:
        return Verdict(True, f"{name}: empty"), True
    index = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    worst = float(error[index])
    reason = f"{name}: difference {worst:.3g}, bound {bound:.3g} at {index}"
    return Verdict(worst <= bound, reason, worst, bound, index), not error.any()
