"""Values in lanes: one pass through a model that computes several versions of every array side by side.

    OWN            in the type under test, from their values wherever they are known
    TRUTH          the same in float64
    OWN_THROUGH    in the type under test, from the inputs of the model alone: nothing of theirs
    TRUTH_THROUGH  the same in float64
    then           float64 with every input of a step, parameters too, moved by about a rounding: what no implementation
                   in this type can know better

A model runs on such values as on any accelerator's: it calls ops and never looks inside.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refmodels.numerics import UNIT_ROUNDOFF, widened
from refmodels.op import Array

OWN, TRUTH, OWN_THROUGH, TRUTH_THROUGH = range(4)
FIRST_MOVED = 4


PIECE = 2**20
"""So many numbers are moved at a time, as a table of tokens has hundreds of millions."""


class Value:
    """An array in every lane. `given`: it came from outside or was only moved about since, so that it is exactly what the next
    step was given. `theirs`: it is what they gave for a step. `terms`: the longest axis of whatever it was computed from since
    then."""

    __slots__ = ("given", "lanes", "terms", "theirs")

    def __init__(self, lanes: Sequence[Array], *, given: bool, terms: int = 1, theirs: bool = False) -> None:
        self.lanes, self.given, self.terms, self.theirs = tuple(lanes), given, terms, theirs

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, the same in every lane."""
        return self.lanes[OWN].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in the lanes that run in the type under test."""
        return self.lanes[OWN].dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.lanes[OWN].ndim


class Arithmetic:
    """The type under test, and what is declared of its products: `products` is the type that their inputs are rounded to.

    `dtype` is float32, float16, bfloat16 or float64. `products` is `tf32` or `bfloat16` where a float32 implementation says
    that it rounds the inputs of its matrix products so, and empty where it does not.
    """

    PRODUCTS = {"": 0.0, "tf32": 2.0**-11, "bfloat16": 2.0**-8}
    """Unit roundoff of the inputs of products."""

    def __init__(self, dtype: str, products: str = "") -> None:
        if dtype not in UNIT_ROUNDOFF:
            raise ValueError(f"dtype must be one of {', '.join(UNIT_ROUNDOFF)}, got {dtype!r}")
        if products not in self.PRODUCTS:
            raise ValueError(f"products must be one of {', '.join(filter(None, self.PRODUCTS))} or empty, got {products!r}")
        self.dtype, self.products = dtype, products

    @property
    def u(self) -> float:
        """Unit roundoff of the type under test."""
        return UNIT_ROUNDOFF[self.dtype]

    @property
    def product_u(self) -> float:
        """How far the inputs of products may be rounded, relative to each."""
        return self.PRODUCTS[self.products]

    def movement(self, terms: int) -> float:
        """How far a right implementation may seem to move an input of a step with sums of this length."""
        summed_in = UNIT_ROUNDOFF["float64" if self.dtype == "float64" else "float32"]
        return max(math.sqrt(terms) * summed_in, self.u, self.product_u)

    def __str__(self) -> str:
        return f"{self.dtype} with products in {self.products}" if self.products else self.dtype


def is_wide(lane: int) -> bool:
    """Whether this lane computes in float64."""
    return lane not in (OWN, OWN_THROUGH)


class Resolver:
    """The arguments of one call in each lane. Parameters are widened once, however many lanes want them so; with
    `widens=False`, not at all."""

    def __init__(self, movement: float, names: Callable[[Array], str], *, widens: bool = True) -> None:
        self._movement, self._names, self._widens = movement, names, widens
        self._wide: dict[int, Array] = {}

    def __call__(self, value: Any, lane: int, place: int) -> Any:
        """`value`, a tree of arguments, as this lane has it; `place` is where values have the lane."""
        if isinstance(value, Value):
            return value.lanes[place]
        if isinstance(value, np.ndarray):
            return self._parameter(value, lane)
        if isinstance(value, dict):
            return {key: self(child, lane, place) for key, child in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(child, lane, place) for child in value)
        return widened(value) if is_wide(lane) else value

    def _parameter(self, array: Array, lane: int) -> Array:
        if not self._widens or not is_wide(lane) or array.dtype.kind in "iub":
            return array
        if id(array) not in self._wide:
            self._wide[id(array)] = array.astype(np.float64)
        wide = self._wide[id(array)]
        return wide if lane < FIRST_MOVED else moved(wide, self._movement, lane, self._names(array))


def moved(wide: Array, by: float, lane: int, name: str) -> Array:
    """Every number times 1 + by or 1 - by, at random: the same for the same lane and name."""
    generator, flat = np.random.default_rng([lane, zlib.crc32(name.encode())]), wide.reshape(-1)
    result = np.empty(flat.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # what stands for minus infinity in a mask of theirs
        for start in range(0, flat.size, PIECE):
            part = flat[start : start + PIECE]
            result[start : start + PIECE] = part * (1.0 + by * (2 * generator.integers(0, 2, part.size, np.int8) - 1))
    return result.reshape(wide.shape)
