"""Faults of norms and of the residual sums around them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array, Op
from refmodels.ops.precision import narrow, numpy_dtype, wide
from refmodels.verification.run import Edit
from refmodels.verification.signatures.fault import (
    Change,
    Fault,
    Variant,
    as_it_was,
    changing,
    fault,
    place_of,
    replaced,
    rounded,
)

NORMS = "layer_norm rms_norm"
FINAL_NORMS = ("encoder.layer_norm", "decoder.layer_norm", "layer_norm", "final_layernorm")


def _norm(
    *,
    mean: bool | None = None,
    unbiased: bool = False,
    outside: bool = False,
    epsilon: float | None = None,
    gain: Callable[[Array], Array] = lambda gain: gain,
    shift: bool = True,
    half: str = "",
) -> Change:
    """A norm over the last axis, with whatever is not said as it should be."""

    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        x = wide(arguments["x"])
        keep = (lambda array: rounded(array, half)) if half else (lambda array: array)
        weight = wide(arguments["gamma"] if "gamma" in arguments else arguments["weight"])
        takes_mean = "gamma" in arguments if mean is None else mean
        deviation = keep(x - keep(x.mean(-1, keepdims=True))) if takes_mean else keep(x)
        squares = keep(np.square(deviation))
        variance = keep(squares.sum(-1, keepdims=True) / (x.shape[-1] - unbiased))
        small = x.dtype.type(arguments["epsilon"] if epsilon is None else epsilon)
        root = keep(np.sqrt(variance) + small if outside else np.sqrt(keep(variance + small)))
        y = keep(keep(deviation / root) * gain(weight))
        if shift and "beta" in arguments:
            y = keep(y + wide(arguments["beta"]))
        return narrow(y, numpy_dtype(arguments["dtype"]) if arguments.get("dtype") else arguments["x"].dtype)

    return change


NORM_FAULTS = [
    fault(
        "epsilon-wrong",
        "The norm's epsilon is not that of the checkpoint.",
        NORMS,
        *[(f"{epsilon:g}", _norm(epsilon=epsilon)) for epsilon in (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0)],
    ),
    fault(
        "epsilon-outside-root",
        "The norm's epsilon is added to the root: add it to the variance.",
        NORMS,
        _norm(outside=True),
    ),
    fault(
        "norm-with-mean",
        "The norm takes the mean away: T5's divides by the root mean square alone.",
        "rms_norm",
        _norm(mean=True),
        families="t5",
    ),
    fault(
        "norm-without-mean",
        "The norm does not take the mean away.",
        "layer_norm",
        _norm(mean=False),
        families="opt bloom",
    ),
    fault(
        "variance-unbiased",
        "The norm's variance is divided by n - 1: divide by n.",
        NORMS,
        _norm(unbiased=True),
    ),
    fault(
        "norm-gain-plus-one",
        "The norm multiplies by 1 + gain: the gain is stored whole.",
        NORMS,
        _norm(gain=lambda gain: 1 + gain),
    ),
    fault("norm-gain-missing", "The norm's gain is left out.", NORMS, _norm(gain=np.ones_like)),
    fault(
        "norm-shift-missing",
        "The norm's beta is left out.",
        "layer_norm",
        _norm(shift=False),
        families="opt bloom",
    ),
    fault(
        "norm-in-half-precision",
        "The norm's statistics are formed in half precision: form them in float32.",
        NORMS,
        *[(half, _norm(half=half)) for half in ("bfloat16", "float16")],
    ),
    fault(
        "final-norm-missing",
        "The norm after the last layer is left out.",
        NORMS,
        as_it_was,
        where=lambda name: place_of(name) in FINAL_NORMS,
    ),
    fault(
        "embedding-norm-missing",
        "The norm of the token embeddings is left out.",
        "layer_norm",
        as_it_was,
        families="bloom",
        where=lambda name: place_of(name) == "embedding_layernorm",
    ),
    fault(
        "norm-missing",
        "A norm inside the layers is left out.",
        NORMS,
        *[(label, as_it_was_where) for label, as_it_was_where in (("every one", as_it_was),)],
        where=lambda name: "layers." in name,
    ),
]

# -- residual sums -----------------------------------------------------------------------------------------------------------


class _ResidualOfNorm:
    """The residual sum takes what the norm made of x in place of x."""

    def __init__(self) -> None:
        self._normed: dict[int, tuple[Array, Array]] = {}

    def __call__(self, op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        x: Any = arguments.get("x")
        if op.name == "add" and id(x) in self._normed:
            normed = self._normed[id(x)][1]
            return run(**{**arguments, "x": narrow(wide(normed), arguments["x"].dtype)})
        result = run(**arguments)
        if op.name in NORMS.split():
            self._normed[id(x)] = x, result  # the array is kept, so that no other has its identity
            if len(self._normed) > 16:
                self._normed.pop(next(iter(self._normed)))
        return result


class _NormAfterSum:
    """The norms inside the layers stand behind the residual sums in place of before what they add."""

    def __init__(self) -> None:
        self._waiting: dict[Any, Callable[[Array], Array]] = {}

    def __call__(self, op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        if op.name in NORMS.split() and "layers." in name:
            held = {key: value for key, value in arguments.items() if key not in ("x", "dtype")}
            self._waiting[arguments["x"].dtype] = lambda x: run(x, **held)
            return as_it_was(arguments, run)
        result = run(**arguments)
        norm = self._waiting.get(result.dtype) if op.name == "add" and "layers." in name else None
        return norm(result) if norm else result


def _norm_order(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    if getattr(model.config, "do_layer_norm_before", True):
        yield Variant(_NormAfterSum(), "the norm stands behind the sum")
        yield Variant(_ResidualOfNorm(), "the sum takes the normed x")


def _norm_first(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    if not getattr(model.config, "do_layer_norm_before", True):
        change = replaced(config=lambda a: replace(a["config"], do_layer_norm_before=True))
        yield Variant(changing(["opt_decoder_layer"], change))


def _without_x(where: Callable[[str], bool]) -> Edit:
    return changing(["add"], lambda a, run: narrow(wide(np.broadcast_to(a["y"], a["x"].shape)), a["x"].dtype), where)


def _ends_in_layer(ending: str) -> Callable[[str], bool]:
    return lambda name: "layers." in name and name.endswith(ending)


def _sums(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    """In every layer; then that of one sub-layer alone, told by its number in its layer."""
    yield Variant(_without_x(lambda name: "layers." in name), "in every sub-layer")
    for ending, label in ((":add", "first"), (":add.2", "second"), (":add.3", "third")):
        yield Variant(_without_x(_ends_in_layer(ending)), f"the {label} of a layer")


RESIDUAL_FAULTS = [
    Fault(
        "residual-missing",
        "The residual x is not added.",
        ops=frozenset({"add"}),
        variants=_sums,
    ),
    Fault(
        "residual-after-norm",
        "The residual is taken after the norm: the layer gives x + f(norm(x)).",
        ops=frozenset({*NORMS.split(), "add"}),
        variants=_norm_order,
    ),
    Fault(
        "norm-before-residual",
        "The norms come before what they should follow: this checkpoint's layers give norm(x + f(x)).",
        ("opt",),
        frozenset({"opt_decoder_layer"}),
        _norm_first,
    ),
]

FAULTS: list[Fault] = [*NORM_FAULTS, *RESIDUAL_FAULTS]
