"""The accelerator: kernels for every op of the models, bound to one device."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from refmodels.accelerator import Accelerator, AcceleratorError
from refmodels.op import Array, Op, Params
from refmodels_cupy import limits, weights
from refmodels_cupy.decoding import AHEAD, Decoding
from refmodels_cupy.device import Device, Gpu

CLAIMED = ("float32", "float16", "bfloat16")

FAMILIES = ("attention", "elementwise", "linear", "quantize", "norm", "heads", "mask", "position", "cache", "sampling",
            "opt", "bloom", "t5", "decoding")  # fmt: skip
"""The modules of this package that register kernels."""

OLDEST = 80
"""Compute capability from which on the kernels run: bfloat16 in the tensor cores."""


class Cupy(Accelerator):
    """Kernels on one device. `find("cupy", device=1)` is the second GPU."""

    ahead = AHEAD

    def __init__(self, device: Device) -> None:
        super().__init__("cupy", dtypes=CLAIMED, tiles=(32, 256))
        self.device = device
        self.decoding: dict[Op[..., Any], Decoding] = {}
        for family in FAMILIES:
            importlib.import_module(f"refmodels_cupy.{family}").register(self, device)

    def configured(self, **settings: Any) -> "Cupy":
        """Another accelerator with `device=N`, a GPU by its index."""
        index = settings.pop("device", None)
        super().configured(**settings)
        if index is None:
            return self
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise AcceleratorError(f"accelerator 'cupy': device must be an integer from 0 on, got {index!r}")
        return Cupy(Gpu(index))

    def kernel(self, op: Op[..., Any], *, when: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a kernel that works on the device, when the arguments have been checked: behind it are bare addresses."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def working(*args: Any, **kwargs: Any) -> Any:
                op.check(*args, **kwargs)
                with self.device.working():
                    return function(*args, **kwargs)

            super(Cupy, self).kernel(op, when=when)(working)
            return function

        return register

    def load(self, params: Params) -> Params:
        with self.device.working():
            return weights.loaded(self.device, params, owned=False)

    def take(self, params: Params) -> Params:
        with self.device.working():
            return weights.loaded(self.device, params, owned=True)

    def unload(self, tree: Params) -> Params:
        with self.device.working():
            return weights.unloaded(self.device, tree)

    def decode_tokens(self, step: Op[..., Any], *args: Any, **how: Any) -> Any:
        with self.device.working():
            return self.decoding[step].tokens(*args, **how)

    def asarray(self, x: Array) -> Any:
        return self.device.to_device(x)

    def asnumpy(self, x: Any) -> Array:
        with self.device.working():
            return weights.on_host(self.device, x) if isinstance(x, weights.Matrix) else self.device.to_host(x)

    def hardware(self) -> dict[str, str]:
        return self.device.description() if isinstance(self.device, Gpu) else {"device": self.device.name}

    def limits(self) -> tuple[float, float]:
        return limits.measured(self.device)
