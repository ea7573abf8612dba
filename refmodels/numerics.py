"""Error models: how far a right implementation of an op may be from the reference (`spec/numerics.md`).

Truth is the reference run in float64 on the same inputs. A verdict looks at shape, dtype and the pattern of non-finite values
first, and then asks that `error <= bound`, written so that NaN fails. The bound comes from an error model of the arithmetic:

    exact           equal, bit pattern of NaN aside: moves, masks, buckets, argmax, relu
    ulps(k)         error <= k spacings of the true value: elementwise mathematics
    multilinear()   error <= gamma_n * op(|inputs|) + rounding of the result: products and sums of products
    calibrated(c)   max error <= c * the reference's own error in that dtype + 8u * max|y|, and more for long sums; what fails
                    that is looked at again with the error that the inputs' own rounding makes: norms, attention, layers

`u` is the unit roundoff; storage, accumulation and output precision are kept apart: half-precision inputs are accumulated in
float32, so their accumulation error is float32's.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number: the largest relative error of one rounding to nearest."""

_SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}

_NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126}
"""The smallest normal numbers of the types that sums are formed in."""

_OVERFLOW = {
    "float64": math.inf,
    "float32": (2 - 2.0**-24) * 2.0**127,
    "float16": 65520.0,
    "bfloat16": (2 - 2.0**-8) * 2.0**127,
}
"""The smallest numbers that round to infinity."""


@dataclass(frozen=True)
class ErrorModel:
    """The kind of bound and its constant; made by `exact`, `ulps`, `multilinear` and `calibrated`."""

    kind: str
    constant: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("exact", "multilinear") else f"{self.kind}({self.constant:g})"


def exact() -> ErrorModel:
    """Equal values; NaN where the reference has NaN."""
    return ErrorModel("exact")


def ulps(k: float) -> ErrorModel:
    """At most `k` spacings of the true value in the result's type."""
    return ErrorModel("ulps", k)


def multilinear() -> ErrorModel:
    """The bound of any order of summation (Higham 2002, eq. 3.13): gamma_n times the same op on absolute values."""
    return ErrorModel("multilinear")


def calibrated(c: float = 4.0) -> ErrorModel:
    """At most `c` times the largest error that the reference itself makes in this type, or that roundings of the inputs make,
    and never less than 8u max|y|."""
    return ErrorModel("calibrated", c)


@dataclass(frozen=True)
class Verdict:
    """`ok`; `reason` in one sentence; `error` and `bound` at the worst element (largest error over bound), and its index.

    Of several results `place` says which one it is: the keys on the way to it.
    """

    ok: bool
    reason: str
    error: float = 0.0
    bound: float = 0.0
    index: tuple[int, ...] = field(default=())
    place: tuple[Any, ...] = field(default=())

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return ("ok: " if self.ok else "WRONG: ") + self.reason


class Judged(Protocol):
    """What `judge` asks of an op."""

    name: str
    error: ErrorModel
    reference: Callable[..., Any]
    signature: inspect.Signature
    shapes: dict[str, Any]
    result: Any
    composite: bool


Run = Callable[[dict[str, Any]], Any]
"""The reference's way from inputs to results."""


def unit_roundoff(dtype: Any) -> float:
    """u of a floating-point type, by name or NumPy type."""
    return UNIT_ROUNDOFF[np.dtype(dtype).name if not isinstance(dtype, str) else dtype]


def spacing(x: Array, dtype: str) -> Array:
    """Distance between neighbouring numbers of `dtype` at the float64 values `x`, subnormals included."""
    mantissa, exponent = np.frexp(np.abs(x))
    distance: Array = np.maximum(np.ldexp(2.0 * UNIT_ROUNDOFF[dtype] * (mantissa != 0), exponent - 1), _SMALLEST[dtype])
    return distance


def widened(value: Any) -> Any:
    """The same argument in float64: arrays, trees of arrays, the name of a dtype, a config that has a dtype."""
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "iub" else value.astype(np.float64)
    if isinstance(value, dict):
        return {key: widened(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(widened(child) for child in value)
    if isinstance(value, str) and value in UNIT_ROUNDOFF:
        return "float64"
    if is_dataclass(value) and not isinstance(value, type) and hasattr(value, "dtype"):
        return replace(value, dtype="float64")
    return value


def judge(op: Judged, args: tuple[Any, ...], kwargs: dict[str, Any], got: Any) -> Verdict:
    """Hold the result `got` of a kernel of `op` on these arguments to the reference, by the op's error model.

    An op that writes to an argument is judged on what it returns: pass a copy of that argument as it was before the call.
    """
    arguments = dict(op.signature.bind(*args, **kwargs).arguments)
    return judge_run(op, lambda inputs: op.reference(**inputs), arguments, got)


def judge_run(op: Judged, run: Run, inputs: dict[str, Any], got: Any) -> Verdict:
    """Hold the results `got` of several calls to those of `run(inputs)`, which makes them on the reference.

    All of them are judged by the error model of `op`, each array by itself. `run` is given copies of the inputs, in their own
    types and widened; what is in no input, it must not let depend on a type.
    """
    wanted, truth = run(_copied(inputs)), run(widened(_copied(inputs)))
    verdict = _judge_tree(op, run, inputs, got, wanted, truth, [])
    if verdict or op.error.kind != "calibrated" or verdict.bound == 0:
        return verdict
    generator, size = np.random.default_rng(0), _perturbation(op, inputs)
    times = range(4 if _is_smooth(inputs) else 16)
    moved = [run(_perturbed(inputs, size, generator)) for _ in times]
    return _judge_tree(op, run, inputs, got, wanted, truth, moved)


def _judge_tree(
    op: Judged,
    run: Run,
    inputs: dict[str, Any],
    got: Any,
    wanted: Any,
    truth: Any,
    moved: list[Any],
) -> Verdict:
    if not isinstance(wanted, dict | list | tuple):
        return _judge_array(op, run, inputs, np.asarray(got), np.asarray(wanted), np.asarray(truth), moved)
    if type(got) is not type(wanted) or len(got) != len(wanted):
        return Verdict(False, f"{op.name} gives {type(got).__name__}, wanted {type(wanted).__name__} of {len(wanted)}")
    for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
        if isinstance(got, dict) and key not in got:
            return Verdict(False, f"{op.name} lacks {key!r}")
        part = _judge_tree(op, run, inputs, got[key], wanted[key], truth[key], [result[key] for result in moved])
        if not part:
            return replace(part, reason=f"[{key}]: {part.reason}", place=(key, *part.place))
    return Verdict(True, f"{op.name}: every part within its bound")


def _judge_array(
    op: Judged,
    run: Run,
    inputs: dict[str, Any],
    got: Array,
    wanted: Array,
    truth: Array,
    moved: list[Any],
) -> Verdict:
    if got.shape != wanted.shape:
        return Verdict(False, f"{op.name} has shape {got.shape}, wanted {wanted.shape}")
    if got.dtype != wanted.dtype:
        return Verdict(False, f"{op.name} has dtype {got.dtype}, wanted {wanted.dtype}")
    if op.error.kind == "exact" or wanted.dtype.kind in "iub":
        return _equal(got, wanted, op.name)
    condition, terms = None, 1
    if op.error.kind == "multilinear":
        terms = _terms(op, inputs)
        tiny = float(np.finfo(np.float64 if wanted.dtype == np.float64 else np.float32).tiny)
        condition = np.asarray(run(_lifted(widened(inputs), tiny)))
    elif op.error.kind == "calibrated":
        terms = _longest(inputs)
    return compare(got, truth, op.error, wanted=wanted, condition=condition, terms=terms, moved=moved, name=op.name)


def compare(
    got: Array,
    truth: Array,
    error_model: ErrorModel,
    *,
    wanted: Array | None = None,
    condition: Array | None = None,
    terms: int = 1,
    moved: Sequence[Array] = (),
    roundings: int = 1,
    name: str = "result",
) -> Verdict:
    """Judge an array against the float64 truth.

    `wanted` is the reference's own result in `got`'s type and `moved` are float64 results on perturbed inputs (calibrated),
    `condition` is the op on absolute values (multilinear), `terms` the length of its sums (both). `roundings` is how often
    `got` may have been rounded to its type on the way (multilinear): a kernel of ours does that once, at the end.
    """
    if error_model.kind == "exact":
        return _equal(got, truth.astype(got.dtype) if wanted is None else wanted, name)
    dtype = got.dtype.name
    high, exact_value = got.astype(np.float64), truth.astype(np.float64)
    # Rounding the truth to the result's type says where an overflow to infinity is right.
    with np.errstate(over="ignore"):
        rounded = exact_value.astype(got.dtype).astype(np.float64)
    finite, known = np.isfinite(rounded), np.isfinite(exact_value)
    misplaced = Verdict(False, f"{name}: the infinities or NaN are not where the reference has them")
    if not known.all() and not np.array_equal(high[~known], exact_value[~known], equal_nan=True):
        return misplaced
    u = UNIT_ROUNDOFF[dtype]
    if error_model.kind == "ulps":
        bound = error_model.constant * spacing(exact_value, dtype)
    elif error_model.kind == "multilinear":
        accumulation = max(terms + 2, 3) * UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
        gamma = accumulation / (1 - min(accumulation, 0.5))
        magnitude = np.abs(exact_value) if condition is None else np.asarray(condition, np.float64)
        # The float64 truth is itself a float64 computation: twice gamma covers both sides.
        bound = (2 * gamma + (roundings - 1) * u) * magnitude + u * np.abs(exact_value) + _SMALLEST[dtype]
    else:
        others = [*moved, *([] if wanted is None else [wanted])]
        with np.errstate(invalid="ignore"):
            own = max((float(np.abs(x.astype(np.float64) - exact_value)[finite].max(initial=0.0)) for x in others), default=0.0)
        largest = float(np.abs(exact_value[finite]).max()) if finite.any() else 0.0
        summed_in = "float64" if dtype == "float64" else "float32"
        floor = (8 * u + (terms - 1) * UNIT_ROUNDOFF[summed_in]) * largest
        bound = np.full(truth.shape, error_model.constant * own + floor + max(_SMALLEST[dtype], _NORMAL[summed_in]))
    with np.errstate(invalid="ignore", over="ignore"):
        # An infinity stands for whatever the type cannot hold: it is right where the bound reaches that far.
        overflow = np.isinf(high) & (np.sign(high) * exact_value + bound >= _OVERFLOW[dtype])
        error = np.where(known & ~overflow, np.abs(high - exact_value), 0.0)
        bound = np.where(known, bound, 0.0)
        good = error <= bound  # NaN in `got` makes this false
    if (~good & (np.isinf(high) | ~finite)).any():
        return misplaced
    if error.size == 0:
        return Verdict(True, f"{name}: empty")
    ratio = np.where(np.isnan(error), np.inf, error / np.where(bound > 0, bound, _SMALLEST["float64"]))
    index = np.unravel_index(int(ratio.argmax()), error.shape)
    place = tuple(int(i) for i in index)
    worst, limit = float(error[index]), float(np.broadcast_to(bound, error.shape)[index])
    return Verdict(
        bool(good.all()),
        f"{name}: error {worst:.3g}, bound {limit:.3g} ({error_model}) at {place}",
        error=worst,
        bound=limit,
        index=place,
    )


def _equal(got: Array, wanted: Array, name: str) -> Verdict:
    same = (got == wanted) | ((got != got) & (wanted != wanted))
    where = tuple(int(i) for i in np.argwhere(~same)[0]) if not same.all() else ()
    return Verdict(bool(same.all()), f"{name}: {int((~same).sum())} of {got.size} values differ", index=where)


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, np.random.Generator):  # every run makes the same draws
        return copy.deepcopy(value)
    if isinstance(value, dict):
        return {key: _copied(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(child) for child in value)
    return value


def _lifted(value: Any, tiny: float) -> Any:
    """Absolute values, and `tiny` more: an input or a product below the smallest normal number loses up to u * tiny."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.abs(value) + tiny
    if isinstance(value, dict):
        return {key: _lifted(child, tiny) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_lifted(child, tiny) for child in value)
    return value


def _terms(op: Judged, arguments: dict[str, Any]) -> int:
    """The length of the op's sums: the sizes of the dimensions that its inputs have and its result has not."""
    summed = {}
    for name, shape in op.shapes.items():
        array = arguments.get(name)
        if isinstance(array, np.ndarray):
            named = [dim for dim in shape.dims if dim.isalpha() and dim not in op.result.dims]
            summed.update({dim: array.shape[shape.dims.index(dim) - len(shape.dims)] for dim in named})
    return math.prod(summed.values())


# -- how well the inputs determine the result -------------------------------------------------------------------------------


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, leaf) of everything in a tree."""
    if isinstance(value, dict | list | tuple):
        for name, child in value.items() if isinstance(value, dict) else ((key, child) for child in value):
            yield from _leaves(child, str(name))
    else:
        yield key, value


def _longest(inputs: dict[str, Any]) -> int:
    """The longest axis of any input, at least 1: no sum has more terms."""
    return max((max(x.shape, default=1) for _, x in _leaves(inputs) if isinstance(x, np.ndarray)), default=1) or 1


def _is_smooth(inputs: dict[str, Any]) -> bool:
    """False if activations are rounded to integers on the way: then a rounding may become a step (spec/numerics.md, 9)."""
    return not any(isinstance(x, np.ndarray) and x.dtype == np.int8 for _, x in _leaves(inputs))


def _perturbation(op: Judged, inputs: dict[str, Any]) -> Callable[[str], float]:
    """How far a right implementation may seem to move an input of this type: sqrt(n) u of the accumulation, and for a composite
    u of the type that activations are rounded to: the policy's, or without one the input's own."""
    found = [getattr(leaf, "dtype", leaf) for _, leaf in _leaves(inputs)]
    policies = {policy.removeprefix("mixed_") for policy in found if isinstance(policy, str)} & UNIT_ROUNDOFF.keys()
    types = policies or {dtype.name for dtype in found if isinstance(dtype, np.dtype)} & UNIT_ROUNDOFF.keys()
    accumulation = math.sqrt(_longest(inputs)) * UNIT_ROUNDOFF["float64" if "float64" in types else "float32"]
    if not op.composite or "float64" in types:
        return lambda dtype: accumulation
    coarsest = max((UNIT_ROUNDOFF[name] for name in policies), default=0.0)
    return lambda dtype: max(accumulation, coarsest or UNIT_ROUNDOFF.get(dtype, 0.0))


def _perturbed(value: Any, size: Callable[[str], float], generator: np.random.Generator, key: str = "") -> Any:
    """The inputs widened, every floating-point number multiplied by 1 + size or 1 - size. Numbers of groups stay."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "iub" and key != "g_idx":
        return widened(value) * (1.0 + size(value.dtype.name) * generator.choice([-1.0, 1.0], value.shape))
    if isinstance(value, dict):
        return {name: _perturbed(child, size, generator, name) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_perturbed(child, size, generator, key) for child in value)
    return widened(_copied(value))
