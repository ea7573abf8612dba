"""What a fault is, and how its edits are written."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array, Op, Params
from refmodels.ops.precision import narrow, numpy_dtype
from refmodels.verification.judgement import SHIFTED, without_shift
from refmodels.verification.lanes import OWN, TRUTH, Arithmetic
from refmodels.verification.run import Edit, Sight

FAMILIES = ("t5", "opt", "bloom")

Change = Callable[[dict[str, Any], Callable[..., Any]], Any]
"""`change(arguments, run)` in place of `run(**arguments)`, of one op."""


@dataclass(frozen=True)
class Scene:
    """Where a step went wrong: the model and its inputs, the step's name, and the largest magnitude (in float64) of every step
    of ours that it depends on and that theirs do not give, in order, the step itself last."""

    model: Backbone
    inputs: Mapping[str, Any]
    step: str
    arithmetic: Arithmetic
    magnitudes: Mapping[str, float]


@dataclass(frozen=True)
class Compared:
    """What a step is judged by: `theirs` in float64, the `truth`, our `own` result in the type under test, and which values
    count (`selected`; None for all). Of a run without the truth, our own result stands for it."""

    op: Op[..., Any]
    theirs: Array
    truth: Array
    own: Array
    selected: Array | None

    @classmethod
    def of(cls, sight: Sight) -> "Compared":
        """The arrays of a step that they give."""
        own, theirs = sight.lane(OWN), np.asarray(sight.theirs)
        if theirs.size == own.size:
            theirs = theirs.astype(np.float64)
        else:  # no order of axes makes it ours, and it may be huge
            theirs = np.broadcast_to(np.nan, theirs.shape)
        truth, selected = sight.lane(TRUTH) if sight.has(TRUTH) else own, sight.selected if sight.fits else None
        if sight.op.name in SHIFTED and sight.fits:
            theirs = without_shift(theirs, truth, selected)
        return cls(sight.op, theirs, truth, own, selected)


@dataclass(frozen=True)
class Variant:
    """One form of a fault: `detail` says which, empty where there is one only."""

    edit: Edit
    detail: str = ""


@dataclass(frozen=True)
class Symptom:
    """What a rule saw: `detail`, and `left`, how much of the disagreement it leaves unexplained."""

    detail: str
    left: float = 0.0


@dataclass(frozen=True)
class Fault:
    """A hypothesis: `name` (`logits-not-scaled`), what it `says` of an implementation, in one sentence with what to change,
    and the `families` it can happen in.

    `variants` are the edits that put it into our steps, for a model on these inputs; they change what the `ops` of these names
    give and no others. A fault that is seen rather than tried has a `rule`, which looks at the arrays; it may have both.
    `general` faults say what the arrays are like, not what is done wrong, and stand behind those that do.
    """

    name: str
    says: str
    families: tuple[str, ...] = FAMILIES
    ops: frozenset[str] = frozenset()
    variants: Callable[[Backbone, Mapping[str, Any]], Iterable[Variant]] = lambda model, inputs: ()
    rule: Callable[[Scene, Compared], Symptom | None] | None = None
    general: bool = False


def changing(ops: Iterable[str], change: Change, where: Callable[[str], bool] = lambda name: True) -> Edit:
    """The edit that makes this change of these ops, at the steps whose names fit."""
    names = frozenset(ops)

    def edit(op: Op[..., Any], name: str, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        return change(arguments, run) if op.name in names and where(name) else run(**arguments)

    return edit


def fault(
    name: str,
    says: str,
    ops: str,
    *changes: Change | tuple[str, Change],
    families: str = "t5 opt bloom",
    where: Callable[[str], bool] = lambda name: True,
) -> Fault:
    """A fault that is a change of these ops; several forms of it each with a word on which."""
    names = ops.split()
    pairs = [("", change) if callable(change) else change for change in changes]
    forms = [Variant(changing(names, change, where), detail) for detail, change in pairs]
    return Fault(name, says, tuple(families.split()), frozenset(names), lambda model, inputs: forms)


def instead(**values: Any) -> Change:
    """The same call with other arguments."""
    return lambda arguments, run: run(**{**arguments, **values})


def replaced(**makes: Callable[[dict[str, Any]], Any]) -> Change:
    """The same call with arguments that are made from those that it has."""
    return lambda arguments, run: run(**{**arguments, **{key: make(arguments) for key, make in makes.items()}})


def by(other: Op[..., Any]) -> Change:
    """Another op of one argument in its place."""
    return lambda arguments, run: other.reference(arguments["x"])


def rounded(array: Array, dtype: str) -> Array:
    """Rounded to this type and back."""
    return narrow(array, numpy_dtype(dtype)).astype(array.dtype)


def place_of(name: str) -> str:
    """Whose parameters a step uses: `layers.0.self_attention.query`."""
    return name.partition(":")[0]


def layer_of(name: str) -> int | None:
    """The number of the layer that a step is in."""
    found = re.search(r"\blayers\.(\d+)\b", name)
    return int(found[1]) if found else None


def leaves(model: Backbone, place: str) -> Params | None:
    """The parameters at this place, None if there is no such place."""
    tree: Any = model.params
    for key in place.split("."):
        if isinstance(tree, list):
            tree = tree[int(key)] if key.isdigit() and int(key) < len(tree) else None
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


def places(tree: Any, path: str = "") -> Iterator[tuple[str, Params]]:
    """(place, parameters) of every part of a tree that holds arrays."""
    children = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    if any(isinstance(child, np.ndarray) for _, child in children):
        yield path, tree
    for key, child in children:
        if isinstance(child, dict | list):
            yield from places(child, f"{path}.{key}" if path else str(key))


def as_it_was(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    """x itself, as a new array of the result's type."""
    dtype = arguments.get("dtype")
    return arguments["x"].astype(numpy_dtype(dtype) if dtype else arguments["x"].dtype)
