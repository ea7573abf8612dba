"""Norms: one block of threads for each row."""

import math
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops import norm as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.source import form

THREADS = (256, 1, 1)
FLOATS = ("float32", "float16", "bfloat16")

FORMS = [
    *(("norm.cu", form("layer_norm", x, weight)) for x in FLOATS for weight in FLOATS),
    *(("norm.cu", form("rms_norm", x, weight, y)) for x in FLOATS for weight in FLOATS for y in FLOATS),
]


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.norm`."""

    def rows(kernel: str, x: Any, dtype: Any, types: tuple[str, ...], *leaves: Any, epsilon: float) -> Any:
        y = device.empty(x.shape, dtype)
        count, n = math.prod(x.shape[:-1]), x.shape[-1]
        if y.size:
            arguments = (
                device.xp.ascontiguousarray(x),
                *map(device.xp.ascontiguousarray, leaves),
                y,
                np.int32(n),
                np.float32(epsilon),
            )
            device.launch(Launch("norm.cu", form(kernel, *types), (count, 1, 1), THREADS, arguments))
        return y

    @accelerator.kernel(ops.layer_norm, when=_is_narrow)
    def layer_norm(x: Any, gamma: Any, beta: Any, *, epsilon: float = 1e-5) -> Any:
        types = (x.dtype.name, gamma.dtype.name)
        return rows("layer_norm", x, x.dtype, types, gamma, beta, epsilon=epsilon)

    @accelerator.kernel(ops.rms_norm, when=_is_narrow)
    def rms_norm(x: Any, weight: Any, *, epsilon: float = 1e-6, dtype: str | None = None) -> Any:
        result = numpy_dtype(dtype) if dtype else x.dtype
        types = (x.dtype.name, weight.dtype.name, result.name)
        return rows("rms_norm", x, result, types, weight, epsilon=epsilon)


def _is_narrow(x: Any, *_: Any, **__: Any) -> bool | str:
    """float32 and narrower"""
    return x.dtype != np.float64 or "x is float64"
