"""The accelerator: kernels for every op of the models, bound to one device."""

import importlib
from typing import Any

from refmodels.accelerator import Accelerator, AcceleratorError
from refmodels.op import Array, Params
from refmodels_cupy.device import Device, Gpu

CLAIMED = ("float32", "float16", "bfloat16")

FAMILIES = ("attention", "elementwise", "norm")
"""The modules of this package that register kernels."""

OLDEST = 80
"""Compute capability from which on the kernels run: bfloat16 in the tensor cores."""


class Cupy(Accelerator):
    """Kernels on one device. `find("cupy", device=1)` is the second GPU."""

    def __init__(self, device: Device) -> None:
        super().__init__("cupy", dtypes=CLAIMED, tiles=(32, 256))
        self.device = device
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

    def load(self, params: Params) -> Params:
        return _mapped(params, self.device.to_device)

    def asarray(self, x: Array) -> Any:
        return self.device.to_device(x)

    def asnumpy(self, x: Any) -> Array:
        return self.device.to_host(x)


def _mapped(tree: Any, leaf: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(part, leaf) for key, part in tree.items()}
    return [_mapped(part, leaf) for part in tree] if isinstance(tree, list) else leaf(tree)
