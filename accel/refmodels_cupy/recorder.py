"""Launches that are recorded once and played many times: a decode step is one graph, which the host starts with one call.

Whatever makes launches takes a `Device` and calls its `launch`. Given a `Recorder` in its place, the same code leaves a list.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from refmodels.op import Array
from refmodels_cupy.device import Device, Launch


class RecordingError(RuntimeError):
    """Work that cannot be part of a captured step."""


class Recorder:
    """A device that keeps launches for later. What is allocated is allocated for good, since they have its addresses."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.xp, self.name, self.multiprocessors = device.xp, device.name, device.multiprocessors
        self.launches: list[Launch] = []
        self._of_a_layer: list[Any] | None = None
        self._next = 0

    def to_device(self, array: Array) -> Any:
        """A constant of the step."""
        return self.device.to_device(array)

    def to_host(self, array: Any) -> Array:
        raise RecordingError("a step that is captured may not be waited for")

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """An array of the step, which a layer may have from the layer before it: see `again`."""
        if self._of_a_layer is None:
            return self.device.empty(shape, dtype)
        known, place = self._of_a_layer, self._next
        self._next += 1
        if place == len(known) or (known[place].shape, known[place].dtype) != (tuple(shape), dtype):
            known[place:] = [self.device.empty(shape, dtype)]
        return known[place]

    def again(self) -> None:
        """Begin a layer: from here on `empty` gives what it gave since the last `again`, in the same order.

        Launches run one after the other, so a layer may write where the layer before it has written. What it is given is the
        last that was allocated, which it writes to when it has read it.
        """
        self._of_a_layer, self._next = self._of_a_layer or [], 0

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)

    def product(self, *_: Any, **__: Any) -> Any:
        raise RecordingError("a step that is captured may not call cuBLAS")

    def captured(self, launches: Sequence[Launch]) -> Any:
        raise RecordingError("a step that is captured may not capture another")

    def working(self) -> AbstractContextManager[None]:
        return self.device.working()
