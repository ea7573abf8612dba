"""Examples are lists of small integers: each choice on the way to an example is one, and 0 is always the simplest.

A generator of random numbers draws the integers (Hypothesis' own draws are too much alike in a hundred examples), or Hypothesis
does, in somebody's pytest; a search makes them smaller; and a line to paste replays them. Sizes, layouts and kinds of values
are choices; the bulk of an array comes from a seed, which is one choice as well.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype

USUAL, EMPTY, LONG = KINDS = ("usual", "empty", "long")
"""Kinds of example: any sizes; one dimension 0; one dimension of `LONG_ROW`."""

SEED_CHOICE = 1
"""Which choice of an example of an op is the seed of its numbers: the one after its kind."""

LONG_ROW = 8192
SMALL = (1, 2, 3, 4, 5, 6, 7, 8, 9)
TILES = (8, 16, 32, 64)
"""Where kernels often begin another block, whatever their accelerator says."""

LAYOUTS = ("C", "F", "strided", "reversed", "read-only")
SUBNORMAL = {"float32": 1e-40, "float64": 5e-310, "float16": 3e-7, "bfloat16": 1e-39}
LARGE = {"float32": 3e38, "float64": 1e308, "float16": 6e4, "bfloat16": 3e38}
ROOM = 2**16
"""How large the product of all sizes of an ordinary example may be."""

Source = Callable[[int], int]
"""Gives an integer from 0 on and below the given one."""


class Unsuitable(Exception):  # noqa: N818 -- no error: the example is not one
    """The choices led to inputs outside of the op's domain, or to such whose right result hangs on a rounding."""


def replayed(code: str) -> Source:
    """The choices of a code again; what it does not have is 0. ValueError for what is no code."""
    if not all(part.isdecimal() for part in code.split(".")):
        raise ValueError(f"example must be numbers with dots between them, such as 0.3.1, got {code!r}")
    choices = iter([int(part) for part in code.split(".")])
    return lambda count: min(next(choices, 0), count - 1)


def random_source(seed: int) -> Source:
    """Choices at random."""
    return random.Random(seed).randrange


def of_kind(kind: str, source: Source) -> Source:
    """The same choices but for the first, which is the kind of example."""
    first = [KINDS.index(kind)]
    return lambda count: first.pop() if first else source(count)


def encoded(choices: Iterable[int]) -> str:
    """The code of some choices: without the zeros at its end."""
    found = list(choices)
    while found and found[-1] == 0:
        found.pop()
    return ".".join(map(str, found or [0]))


class Draw:
    """One example in the making: what was chosen so far, the sizes of the letters, and what the example shows (`features`)."""

    def __init__(
        self, source: Source, dtype: str, tiles: tuple[int, ...] = (), letters: Callable[[str], Sequence[str]] | None = None
    ) -> None:
        """`letters` says which dimensions may be empty or long; without it there are only usual examples."""
        self._source = source
        self.choices: list[int] = []
        self.features: set[str] = set()
        self.dtype = dtype
        self.sizes: dict[str, int] = {}
        self.lead: tuple[int, ...] | None = None
        self.tiles = sorted({*tiles, *TILES})
        self.plain_models = False
        self.room = max(ROOM, 2 * max(self.tiles) ** 2)
        self.kind = USUAL if letters is None else self.pick(*KINDS)
        self.rng = np.random.default_rng(self.below(2**16))
        self.special = None if letters is None or self.kind == USUAL else self.pick(*letters(self.kind))
        self.tiled = self.below(2) == 1
        self.scale = self.pick(1.0, 1e-3, 30.0)
        self.offset = self.pick(0.0, 0.0, 0.0, 0.0, 0.0, 1000.0)
        self.spiky = self.below(3) == 1
        self.mixed_layouts = self.below(2) == 1
        self.mixed_types = self.below(2) == 1

    # -- choices ----------------------------------------------------------------------------------------------------------

    def below(self, count: int) -> int:
        """An integer from 0 on."""
        if count <= 1:
            return 0  # no choice
        self.choices.append(self._source(count))
        return self.choices[-1]

    def pick(self, *values: Any) -> Any:
        """One of the values; the first is the simplest."""
        if not values:
            raise Unsuitable
        return values[self.below(len(values))]

    def chance(self, one_in: int) -> bool:
        """True once in so many times."""
        return self.below(one_in) == one_in - 1

    @property
    def code(self) -> str:
        """What to replay."""
        return encoded(self.choices)

    # -- sizes ------------------------------------------------------------------------------------------------------------

    def size(self, letter: str, *, high: int | None = None) -> int:
        """The size of a dimension, the same each time: small, at the edge of a tile, or as the kind of example asks."""
        if letter not in self.sizes:
            self.sizes[letter] = self._new_size(letter, high)
        return self.sizes[letter]

    def _new_size(self, letter: str, high: int | None) -> int:
        if letter == self.special:
            self.features.add(self.kind)
            return 0 if self.kind == EMPTY else LONG_ROW
        room = min(self.room, high or self.room, 3 if self.kind == LONG else self.room)
        edges = [size for tile in self.tiles for size in (tile - 1, tile, tile + 1) if 0 < size <= room]
        if edges and self.tiled and self.below(2):
            self.features.add("tile")
            size = int(self.pick(*edges))
        else:
            size = int(self.pick(*[size for size in SMALL if size <= room]))
        self.room = max(self.room // size, 1)
        return size

    def leading(self) -> tuple[int, ...]:
        """The axes `*b`: none, one or two."""
        if self.lead is None:
            if self.special == "*b":
                self.features.add(self.kind)
                self.lead = self.pick((0,), (2, 0), (0, 3)) if self.kind == EMPTY else (LONG_ROW,)
            else:
                count = self.pick(1, 2, 0, 1)
                self.lead = (
                    (1,)
                    if self.chance(4)
                    else tuple(self.size(f"row axis {i}", high=None if i == 0 else 4) for i in range(count))
                )
        return self.lead

    def shape(self, dims: Iterable[str]) -> tuple[int, ...]:
        """The sizes of an annotation's dimensions; `#b` is 1 or the size of b."""
        found: list[int] = []
        for dim in dims:
            if dim == "*b":
                found += self.leading()
            elif dim == "*#b":
                found += [self.pick(size, 1) for size in self.leading()]
            elif dim.startswith("#"):
                found.append(self.pick(self.size(dim[1:]), 1))
            else:
                found.append(int(dim) if dim.isdecimal() else self.size(dim))
        return tuple(found)

    # -- arrays -----------------------------------------------------------------------------------------------------------

    def floats(
        self,
        *shape: int,
        dtype: str | None = None,
        limit: float | None = None,
        spikes: tuple[float, ...] = (),
        positive: bool = False,
        centred: bool = False,
    ) -> Array:
        """Normal numbers; with a few zeros, a subnormal, numbers up to `limit` (the type's largest) and `spikes` among them."""
        dtype = dtype or self.dtype
        values = self.rng.standard_normal(shape) * self.scale
        if not centred:
            values += self.offset * self.scale
        if self.spiky and values.size:
            large = LARGE[dtype] if limit is None else min(limit, LARGE[dtype])
            for spike in (0.0, -0.0, SUBNORMAL[dtype], large, -large, *spikes):
                if self.rng.random() < 0.5:  # once, or in every eighth place
                    often = self.rng.random(shape) < 0.125 * (self.rng.random() < 0.5)
                    values[often] = spike
                    values[tuple(self.rng.integers(size) for size in shape)] = spike
                    self._note(spike, dtype)
        with np.errstate(over="ignore"):
            return self.laid_out((np.abs(values) if positive else values).astype(numpy_dtype(dtype)))

    def _note(self, spike: float, dtype: str) -> None:
        if spike == SUBNORMAL[dtype]:
            self.features.add("subnormal")
        elif not np.isfinite(spike):
            self.features.add("not finite")

    def ints(self, *shape: int, low: int = 0, high: int = 9) -> Array:
        """Integers from `low` on and below `high`."""
        return self.laid_out(self.rng.integers(low, max(high, low + 1), shape).astype(self.pick(np.int64, np.int32)))

    def int8s(self, *shape: int, low: int = -128, high: int = 128) -> Array:
        """Small integers from `low` on and below `high`."""
        return self.laid_out(self.rng.integers(low, high, shape).astype(np.int8))

    def bools(self, *shape: int) -> Array:
        """True by half, nearly always, always or never."""
        return self.laid_out(self.rng.random(shape) < self.pick(0.5, 0.9, 1.0, 0.0))

    def laid_out(self, array: Array) -> Array:
        """The same values in one of the layouts."""
        if not self.mixed_layouts or array.ndim == 0:
            return array
        layout = self.pick(*LAYOUTS)
        self.features.add(layout)
        return in_layout(array, layout)


def in_layout(array: Array, layout: str) -> Array:
    """The same values in this memory layout, in memory of their own."""
    if layout == "strided":
        room = np.zeros([2 * size + 1 for size in array.shape], array.dtype)
        view: Array = room[tuple(slice(1, None, 2) for _ in array.shape)]
        view[...] = array
        return view
    if layout == "reversed":
        flip = (slice(None, None, -1),) * array.ndim
        return array[flip].copy()[flip]
    copy = array.copy(order="F" if layout == "F" else "C")
    copy.flags.writeable = layout != "read-only"
    return copy
