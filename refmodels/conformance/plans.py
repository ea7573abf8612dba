"""Plans of calls with a cache: ragged prompts, then more for each row at its own position, and what a query may look at."""

from dataclasses import dataclass

import numpy as np

from refmodels.conformance.drawing import LONG, LONG_ROW, Draw
from refmodels.op import Array


@dataclass
class Chunk:
    """Some tokens for all rows: `start` (b,) or None for 0, `real` (b, t), how many of each row are real, and where it ends."""

    start: Array | None
    real: Array
    lengths: Array
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        """(b, t)."""
        return self.real.shape[0], self.real.shape[1]

    @property
    def positions(self) -> Array:
        """(b, t)."""
        first = np.zeros((self.shape[0], 1), np.int64) if self.start is None else self.start[:, None].astype(np.int64)
        return first + np.arange(self.shape[1])


@dataclass
class Plan:
    """Chunks one after the other. `filled` positions were there before; `keys` (b, capacity) is the mask after each chunk."""

    chunks: list[Chunk]
    filled: int
    capacity: int
    keys: list[Array]

    @property
    def rows(self) -> int:
        """b."""
        return self.chunks[0].shape[0]

    @property
    def written(self) -> Array:
        """(b, capacity): the positions that were written to."""
        found = np.zeros((self.rows, self.capacity), bool)
        found[:, : self.filled] = True
        for chunk in self.chunks:
            for row, first in enumerate(chunk.positions[:, 0] if chunk.shape[1] else []):
                found[row, first : first + chunk.shape[1]] = True
        return found

    def masks(self) -> list[Array]:
        """The mask (b, 1, t, s) of each chunk: the real keys up to each query."""
        pairs = zip(self.chunks, self.keys, strict=True)
        return [
            (keys[:, None, : chunk.end] & (np.arange(chunk.end) <= chunk.positions[:, :, None]))[:, None]
            for chunk, keys in pairs
        ]


def draw_plan(draw: Draw, *, cached: bool, steps: int = 0, prompts: bool = False, single: bool = False) -> Plan:
    """Ragged prompts, and then steps of one token or chunks of some, each row at its own position.

    `prompts`: every row has at least one real token, and the chunks are full. `single`: what follows is one token a step.
    """
    b = draw.size("b", high=9)
    filled = LONG_ROW - 2 if draw.special == "s" else 0
    t = draw.size("t", high=17 if not draw.chance(6) else 66) if not filled else draw.pick(1, 2)
    lengths = np.full(b, t)
    real = np.ones((b, t), bool)
    if filled:
        draw.features.add(LONG)
    elif t and b and draw.below(2):
        draw.features.add("ragged")
        lengths = draw.rng.integers(1, t + 1, b)
        real = np.arange(t) < lengths[:, None]
    elif t > 1 and b and cached and draw.chance(3):
        real = draw.rng.random((b, t)) < 0.7  # holes: padding in front, for one
        real[:, -1] = True
    even = not (cached and len(set(lengths.tolist())) > 1)  # then no key that was never written is in sight
    if not prompts and even and t and b and draw.chance(4):
        draw.features.add("fully masked")
        row = int(draw.rng.integers(b))
        real[row], lengths[row] = False, t
    if not cached:
        return Plan([Chunk(None, real, lengths, t)], 0, t, [real])
    capacity = filled + t + 4 * steps + draw.pick(0, 1, 7)
    start = np.full(b, filled) if filled or draw.below(2) else None
    chunks, position = [Chunk(start, real, lengths, filled + t)], filled + lengths
    keys = np.zeros((b, capacity), bool)
    keys[:, :filled] = True
    keys[:, filled : filled + t] = real
    history = [keys.copy()]
    for _ in range(draw.pick(*range(min(1, steps), steps + 1)) if steps else 0):
        count = 1 if single else draw.pick(1, 2, 3)
        chunk = Chunk(position.copy(), np.ones((b, count), bool), np.full(b, count), int(position.max(initial=0)) + count)
        for row, first in enumerate(position):
            keys[row, first : first + count] = True
        chunks.append(chunk)
        history.append(keys.copy())
        position = position + count
    if len(chunks) > 1:
        draw.features.add("cache")
    return Plan(chunks, filled, capacity, history)
