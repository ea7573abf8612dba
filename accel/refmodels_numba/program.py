"""Programs: lists of instructions for the compiled machine, built once for a model and run with other addresses each time.

An operand is a number that is known when the program is built (a weight's address, a size), or a `Slot`, which is filled in for
each call: an input's address, a number of rows, a buffer in the call's own memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels_numba.layout import CODES, HEADER, INSTRUCTIONS, TEMPORARY, WIDTH, attention_scratch, bits
from refmodels_numba.packing import Packed, address
from refmodels_numba.team import Team

FEW = 1 << 18
"""Bytes of weights times rows below which a call is done before another thread would have woken."""


@dataclass(frozen=True)
class Slot:
    """An operand that each call fills in."""

    number: int


class Buffers:
    """The memory of a call that has run: `buffers[name]` is a buffer as flat float32."""

    def __init__(self, memory: Array, places: dict[str, tuple[int, int]]) -> None:
        self._memory, self._places = memory, places

    def __getitem__(self, name: str) -> Array:
        start, size = self._places[name]
        return self._memory[start : start + size].view(np.float32)


class Program:
    """Instructions, slots, and the buffers that a call needs."""

    def __init__(self) -> None:
        self._code: list[list[int]] = []
        self._filled: list[tuple[int, int]] = []  # (place in the flat code, number of its slot)
        self._slots: dict[str, Slot] = {}
        self._buffers: dict[str, tuple[str, int]] = {}
        self._kept: list[Any] = []
        self._template: Array | None = None
        self.weight_bytes = 0
        self._widest = self._head = 0

    def slot(self, name: str) -> Slot:
        """The operand of this name."""
        return self._slots.setdefault(name, Slot(len(self._slots)))

    def buffer(self, name: str, count: str, width: int) -> Slot:
        """Memory of the call: `width` float32 for each of the call's size `count`."""
        self._buffers[name] = count, width
        return self.slot(name)

    def vector(self, leaf: Any) -> int:
        """The address of a parameter that is no matrix, as float32."""
        array = np.ascontiguousarray(leaf, np.float32)
        self._kept.append(array)
        return address(array)

    def keep(self, thing: Any) -> None:
        """Hold what the code has addresses of."""
        self._kept.append(thing)

    def add(self, name: str, *, wait: bool = True, **operands: Any) -> None:
        """An instruction. With `wait` it begins when all before it are complete; operands that are not given are 0."""
        line = [0] * WIDTH
        line[0], line[1] = CODES[name], int(wait)
        names = INSTRUCTIONS[name].split()
        if name in ("attention", "scores"):
            self._head = max(self._head, int(operands["size"]))
        for operand, value in operands.items():
            place = HEADER + names.index(operand)
            if isinstance(value, Slot):
                self._filled.append((len(self._code) * WIDTH + place, value.number))
            else:
                line[place] = bits(value) if isinstance(value, float) else int(value)
        self._code.append(line)

    def linear(
        self,
        rows: Slot,
        x: Any,
        weights: Packed,
        out: Any,
        *,
        wait: bool = True,
        column_scale: Any = None,
        bias: Any = None,
        factor: float = 1.0,
        **operands: Any,
    ) -> None:
        """A product with packed weights. With `column_scale` they are int8; then x may be what `quantize` has made."""
        self.keep(weights)
        self.weight_bytes += weights.nbytes
        self._widest = max(self._widest, weights.k)
        scales = address(weights.scales) if weights.scales is not None else 0
        self.add(
            "linear",
            wait=wait,
            rows=rows,
            x=x,
            k=weights.k,
            n=weights.n,
            weights=weights.address,
            kind=weights.kind,
            scales=scales if column_scale is None else self.vector(column_scale),
            zeros=address(weights.zeros) if weights.zeros is not None else 0,
            block=weights.block,
            bias=0 if bias is None else self.vector(bias),
            factor=float(factor),
            out=out,
            **operands,
        )

    def run(
        self, team: Team, sizes: dict[str, int], arguments: dict[str, int], *, keys: int = 0, alone: bool | None = None
    ) -> "Buffers":
        """Run with these sizes and addresses by slot name; `keys` is the longest row of scores. Gives the buffers, flat.

        `alone` says that one thread is to do it all; None decides by the weights that are read.
        """
        if self._template is None:
            self._places, self._numbers = (np.array(part, np.int64) for part in zip(*self._filled, strict=True))
            self._template = np.array(self._code, np.int64)
        offsets, end = {}, 0
        for name, (count, width) in self._buffers.items():
            offsets[name] = end
            end += -(-sizes[count] * width * 4 // 64) * 64
        memory = np.empty(end + 64, np.uint8)
        start = address(memory)
        start += -start % 64
        values = [
            start + offsets[name] if name in offsets else arguments[name] if name in arguments else sizes[name]
            for name in self._slots
        ]
        code = self._template.copy()
        code.reshape(-1)[self._places] = np.array(values, np.int64)[self._numbers]
        scratch = max(TEMPORARY + 64 * self._widest, attention_scratch(keys, self._head))
        if alone is None:
            alone = sizes["rows"] * (self.weight_bytes + 4 * keys) < FEW
        team.run(code, scratch, alone=alone)
        first = start - address(memory)
        return Buffers(
            memory, {name: (first + offsets[name], 4 * sizes[count] * width) for name, (count, width) in self._buffers.items()}
        )
