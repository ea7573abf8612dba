"""A run in lanes: our model on its inputs, with their values in place of ours from each step on that they give.

`Run` is an executor of ops. It names every step, says which of its values count, and shows it to whoever asked for the run.
Everything happens in one pass, with one layer's arrays in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
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

LOCAL = (OWN, TRUTH)
THROUGH = (OWN_THROUGH, TRUTH_THROUGH)
MOVED = tuple(range(FIRST_MOVED, FIRST_MOVED + 4))
"""The lanes that say how well a step's inputs determine it."""

Edit = Callable[[Op[..., Any], str, dict[str, Any], Callable[..., Any]], Any]
"""`edit(op, name, arguments, run)` in place of `run(**arguments)`: a hypothesis about what they do."""


@dataclass(frozen=True)
class Sight:
    """A step as it ends: the call, its `result` in lanes, what `theirs` is (None where they do not give it), and which values
    count (`selected`, in the result's shape; None: all)."""

    name: str
    op: Op[..., Any]
    arguments: Mapping[str, Any]
    result: Value
    theirs: Array | None
    selected: Array | None
    places: Mapping[int, int]
    """Lane -> where values have it."""

    def lane(self, lane: int) -> Array:
        """The result in one lane."""
        return self.result.lanes[self.places[lane]]

    def has(self, lane: int) -> bool:
        """Whether the run has this lane."""
        return lane in self.places

    @property
    def moved(self) -> list[Array]:
        """The result in the lanes that were moved by a rounding."""
        return [self.lane(lane) for lane in self.places if lane >= FIRST_MOVED]

    @property
    def fits(self) -> bool:
        """Whether theirs has the shape of the result."""
        return self.theirs is not None and self.theirs.shape == self.result.shape


class Enough(Exception):  # noqa: N818  no error
    """Raised by whoever looks: the run may end."""


class Run:
    """Our model in lanes. `look` is called with every step.

    `theirs` by name take the place of ours, or where `substitutes` has the name that array; with `adopts=False` nothing does.
    `toward` is the one step that is wanted: what leads up to it is taken from theirs, whole layers at a time. `edit` changes
    what our steps do.
    """

    def __init__(
        self,
        model: Backbone,
        arithmetic: Arithmetic,
        look: Callable[[Sight], None],
        *,
        theirs: Mapping[str, Array] | None = None,
        substitutes: Mapping[str, Array] | None = None,
        lanes: Sequence[int] = LOCAL,
        toward: str | None = None,
        edit: Edit | None = None,
        adopts: bool = True,
    ) -> None:
        self._model, self._arithmetic, self._look = model, arithmetic, look
        self._theirs, self._substitutes = theirs or {}, substitutes or {}
        self._lanes, self._toward, self._edit, self._adopts = lanes, toward, edit, adopts
        self._places = {lane: i for i, lane in enumerate(lanes)}
        self._params = model.params
        self._parameter_names = dict(_leaf_names(self._params))
        self._namer = Namer(self._params)
        self._real: list[Array | None] = [None]
        self._permitted: Array | None = None
        self._right_masks: dict[int, tuple[Value, Array]] = {}
        self.names: dict[str, tuple[int, ...]] = {}
        """The steps so far, each with its shape."""

    def through(self, inputs: Mapping[str, Any]) -> "Run":
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
        except Enough:
            pass
        return self

    def run(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call: what `Op` asks of an executor."""
        arguments = dict(op.signature.bind(*args, **kwargs).arguments)
        with self._namer.call(op, args, kwargs) as name, self._masks(op, arguments):
            if op.composite and self._may_skip(name):
                return self._known(name)
            op.check(*args, **kwargs)
            result = self._called(op, name, arguments) if op.composite else self._primitive(op, name, arguments)
            if op.name in ("causal_mask", "key_mask"):
                self._permitted = self._right_mask(op, result, arguments)
            return self._arrived(op, name, arguments, result) if isinstance(result, Value) else result

    # -- running ------------------------------------------------------------------------------------------------------------

    def _called(self, op: Op[..., Any], name: str, arguments: dict[str, Any]) -> Any:
        return op.reference(**arguments) if self._edit is None else self._edit(op, name, arguments, op.reference)

    def _primitive(self, op: Op[..., Any], name: str, arguments: dict[str, Any]) -> Any:
        values = [value for value in arguments.values() if isinstance(value, Value)]
        arrays = [value for value in arguments.values() if isinstance(value, Value | np.ndarray)]
        longest = max((max(array.shape, default=1) for array in arrays), default=1) or 1
        terms = max([longest, *(value.terms for value in values)])
        by, moves = self._arithmetic.movement(terms), op.error.kind == "exact"
        # What only moves numbers is done before they are widened: a table of tokens is large, the rows of a text are few.
        resolve = Resolver(by, lambda array: self._parameter_names.get(id(array), ""), widens=not moves)
        done: dict[tuple[int, ...], Any] = {}
        results = []
        for place, lane in enumerate(self._lanes):
            key = (is_wide(lane), max(lane, TRUTH_THROUGH), *(id(value.lanes[place]) for value in values))
            if key not in done:  # lanes that hold the same arrays so far have the same result
                resolved = {key: resolve(value, lane, place) for key, value in arguments.items()}
                with np.errstate(all="ignore"):  # infinities and NaN of theirs are judged, not warned of
                    done[key] = self._called(op, name, resolved)
                if moves and is_wide(lane) and isinstance(done[key], np.ndarray) and done[key].dtype.kind not in "iub":
                    done[key] = done[key].astype(np.float64, copy=False)
                    if lane >= FIRST_MOVED and not _any_float(values):
                        done[key] = moved(done[key], by, lane, name)
            results.append(done[key])
        if not isinstance(results[0], np.ndarray):
            return results[0]
        given = op.error.kind == "exact" and all(value.given for value in values)
        return Value(results, given=given, terms=1 if given else terms)

    def _given(self, name: str, array: Array) -> Value:
        return Value(self._in_lanes(name, array, max(array.shape, default=1)), given=True)

    def _in_lanes(self, name: str, array: Array, terms: int) -> list[Array]:
        if array.dtype.kind in "iub":
            return [array] * len(self._lanes)
        wide, by = array.astype(np.float64), self._arithmetic.movement(terms)
        return [
            moved(wide, by, lane, name) if lane >= FIRST_MOVED else wide if is_wide(lane) else array for lane in self._lanes
        ]

    # -- their values -------------------------------------------------------------------------------------------------------

    def _may_skip(self, name: str) -> bool:
        """Whether this composite need not run: it is known, and the step that is wanted is not inside."""
        if self._toward is None or name not in self._theirs or name == self._toward:
            return False
        place, target = (text.partition(":")[0] for text in (name, self._toward))
        return ":" in name and target != place and not target.startswith(f"{place}.")

    def _known(self, name: str) -> Value:
        array = self._substitutes.get(name)
        dtype = numpy_dtype(self._model.embedding_dtype)  # what is skipped is whole layers: their results have its type
        return self._given(name, _typed(self._theirs[name] if array is None else array, dtype))

    def _arrived(self, op: Op[..., Any], name: str, arguments: dict[str, Any], result: Value) -> Value:
        if op.name in QUIET:
            return result
        self.names[name] = result.shape
        theirs = np.asarray(self._theirs[name]) if name in self._theirs else None
        sight = Sight(name, op, arguments, result, theirs, self._selection(op, result.shape), self._places)
        self._look(sight)
        # Masks and buckets steer our steps as they are to be.
        if theirs is None or not sight.fits or not self._adopts or result.dtype.kind in "iub":
            return result
        substitute = self._substitutes.get(name)
        return self._substituted(sight, theirs if substitute is None else substitute)

    def _substituted(self, sight: Sight, array: Array) -> Value:
        """Theirs in place of ours, where it counts; elsewhere ours, as theirs may be anything there."""
        new = self._in_lanes(sight.name, _typed(array, sight.result.dtype), sight.result.terms)
        lanes = []
        for lane, chosen, ours in zip(self._lanes, new, sight.result.lanes, strict=True):
            if lane in THROUGH:
                lanes.append(ours)
            else:
                lanes.append(chosen if sight.selected is None else np.where(sight.selected, chosen, ours))
        return Value(lanes, given=True, theirs=True)

    # -- what counts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _masks(self, op: Op[..., Any], arguments: Mapping[str, Any]) -> Iterator[None]:
        """Inside a stack its padding mask says which tokens are real; inside an attention its mask which keys are permitted."""
        real, before = self._real[-1], self._permitted
        if op.composite:
            padding, permitted = arguments.get("padding_mask"), arguments.get("mask")
            if isinstance(padding, Value):
                real = padding.lanes[0]
            if "encoder_output" in arguments:
                real = self._encoder_mask
            if isinstance(permitted, Value):
                self._permitted = self._right_masks.get(id(permitted), (permitted, permitted.lanes[0]))[1]
        self._real.append(real)
        try:
            yield
        finally:
            self._real.pop()
            if op.composite and isinstance(arguments.get("mask"), Value):
                self._permitted = before

    def _right_mask(self, op: Op[..., Any], result: Value, arguments: Mapping[str, Any]) -> Array:
        """Which keys are permitted: a hypothesis about the mask must not change what counts."""
        if self._edit is None:
            return result.lanes[0]
        mask: Array = op.reference(**{key: Resolver(0.0, str)(value, OWN, 0) for key, value in arguments.items()})
        self._right_masks[id(result)] = result, mask
        return mask

    def _selection(self, op: Op[..., Any], shape: tuple[int, ...]) -> Array | None:
        """Which values of a result count, in its shape; None for all of them."""
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


def _any_float(values: Sequence[Value]) -> bool:
    """Whether any of these holds numbers that are rounded, and so was moved itself."""
    return any(value.dtype.kind not in "iub" for value in values)


def _typed(array: Array, ours: np.dtype[Any]) -> Array:
    """Their values as the step after takes them: in our own type of this step, which may be wider than theirs."""
    array = np.asarray(array)
    return array if array.dtype == ours else narrow(array.astype(np.float64), ours)


def _leaf_names(tree: Any, path: str = "") -> Iterator[tuple[int, str]]:
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(child, dict | list):
            yield from _leaf_names(child, f"{path}{key}.")
        else:
            yield id(child), f"{path}{key}"
