"""The accelerator: kernels for every op of the models, bound to one device."""

import functools
import importlib
import time
import weakref
from collections.abc import Callable
from typing import Any

from refmodels.accelerator import Accelerator, AcceleratorError, Room
from refmodels.op import Array, Op, Params
from refmodels_cupy import compiler, installation, limits, weights
from refmodels_cupy.decoding import AHEAD, Decoding
from refmodels_cupy.device import Device, Gpu
from refmodels_cupy.source import all_forms

CLAIMED = ("float32", "float16", "bfloat16")

FAMILIES = ("attention", "elementwise", "linear", "quantize", "norm", "heads", "mask", "position", "cache", "sampling",
            "opt", "bloom", "t5", "decoding")  # fmt: skip
"""The modules of this package that register kernels."""


class Cupy(Accelerator):
    """Kernels on one device, with memory and a stream of their own, which go when the accelerator does.

    `find("cupy", device=1)` is the second GPU, `find("cupy", tf32=True)` multiplies float32 as TF32, faster and with a relative
    error of about 1e-3. Every `find` with settings gives another accelerator.
    """

    ahead = AHEAD

    def __init__(self, device: Device) -> None:
        super().__init__("cupy", dtypes=CLAIMED, tiles=(32, 256))
        self.device = device
        self.decoding: dict[Op[..., Any], Decoding] = {}
        for family in FAMILIES:
            importlib.import_module(f"refmodels_cupy.{family}").register(self, device)
        if isinstance(device, Gpu):
            weakref.finalize(self, device.close).atexit = False  # at the end of the process the driver takes back everything

    def close(self) -> None:
        """Give back the stream, the memory that no model holds, and recorded decode steps, before the accelerator is collected.
        Models that were loaded for it are to be loaded again."""
        if isinstance(self.device, Gpu):
            self.device.close()

    def configured(self, **settings: Any) -> "Cupy":
        """Another accelerator with `device=N`, a GPU by its index, and `tf32=True` or False. AcceleratorError for a GPU that
        is not there."""
        gpu = self.device if isinstance(self.device, Gpu) else Gpu()
        index, tf32 = settings.pop("device", gpu.index), settings.pop("tf32", gpu.tf32)
        super().configured(**settings)
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise AcceleratorError(f"accelerator 'cupy': device must be an integer from 0 on, got {index!r}")
        if not isinstance(tf32, bool):
            raise AcceleratorError(f"accelerator 'cupy': tf32 must be true or false, got {tf32!r}")
        problem = installation.missing(index)
        if problem is not None:
            raise AcceleratorError(f"accelerator 'cupy' cannot run here: {problem}")
        return Cupy(Gpu(index, tf32=tf32))

    def missing(self) -> str | None:
        return installation.missing(self.device.index) if isinstance(self.device, Gpu) else None

    def intended(self) -> bool:
        return installation.is_installed()

    def compile(self, report: Callable[[str], None]) -> str | None:
        if not isinstance(self.device, Gpu):
            return None
        begun = time.perf_counter()
        count = self.device.compile(all_forms(FAMILIES), report)
        return f"ready, {count} kernels in {time.perf_counter() - begun:.1f} s, cached in {compiler.directory()}"

    def room(self) -> Room | None:
        if not isinstance(self.device, Gpu):
            return None
        return Room(self.device.name, *self.device.room())

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


cupy = Cupy(Gpu())
