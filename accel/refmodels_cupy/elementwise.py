"""Element by element, in array functions that CuPy has as NumPy does."""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import elementwise as ops
from refmodels_cupy.device import Device


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.elementwise`."""
    xp = device.xp

    @accelerator.kernel(ops.add)
    def add(x: Any, y: Any) -> Any:
        return (_wide(x) + _wide(y)).astype(x.dtype, copy=False)

    @accelerator.kernel(ops.relu)
    def relu(x: Any) -> Any:
        return xp.maximum(x, x.dtype.type(0))


def _wide(x: Any) -> Any:
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
