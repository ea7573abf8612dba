"""Norms, and residual sums with the norm behind them: one block of threads for each row."""

import math
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.op import Params
from refmodels.ops import norm as ops
from refmodels.ops.precision import numpy_dtype
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.elementwise import narrow_types
from refmodels_cupy.linear import typed

THREADS = (256, 1, 1)

LONGEST = 24 * 1024
"""Values of a row: more are not in a block's shared memory on every GPU."""

FORMS = [("norm.cu", "norm_rows")]


def norm(device: Device, x: Any, p: Params, y: Any, *, epsilon: float) -> None:
    """y = `layer_norm` of the rows x with the leaves gamma and beta, or `rms_norm` with the leaf weight: one launch.

    x and y [rows, n] and the leaves [n] are float32, float16 or bfloat16, each of a type of its own, contiguous; n is at most
    `LONGEST`.
    """
    _launched(device, x, None, None, None, p, y, epsilon)


def residual_norm(
    device: Device, x: Any, delta: Any, total: Any, p: Params, y: Any, *, epsilon: float, bias: Any = None
) -> None:
    """total = x + (delta + bias), rounded to its type, and y = the norm of total: one launch that reads the row once.

    As for `norm`; delta [rows, n] is of any of the three types, such as the float32 sums of a product, bias [n] likewise. total
    is of the type of x, and may be x.
    """
    _launched(device, x, delta, bias, total, p, y, epsilon)


def _launched(device: Device, x: Any, delta: Any, bias: Any, total: Any, p: Params, y: Any, epsilon: float) -> None:
    rows, n = math.prod(x.shape[:-1]), x.shape[-1]
    leaves = (*typed(p.get("weight", p.get("gamma"))), *typed(p.get("beta")))
    arguments = (*typed(x), *typed(delta), *typed(bias), total, *leaves, *typed(y), np.int32(n), np.float32(epsilon))
    device.launch(Launch("norm.cu", "norm_rows", (rows, 1, 1), THREADS, arguments, shared=4 * (-(-n // 8) * 8)))


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.norm`."""

    def rows(x: Any, dtype: Any, epsilon: float, **leaves: Any) -> Any:
        flat, y = device.xp.ascontiguousarray, device.empty(x.shape, dtype)
        if y.size:
            norm(device, flat(x), {name: flat(leaf) for name, leaf in leaves.items()}, y, epsilon=epsilon)
        return y

    @accelerator.kernel(ops.layer_norm, when=_is_narrow)
    def layer_norm(x: Any, gamma: Any, beta: Any, *, epsilon: float = 1e-5) -> Any:
        return rows(x, x.dtype, epsilon, gamma=gamma, beta=beta)

    @accelerator.kernel(ops.rms_norm, when=_is_narrow)
    def rms_norm(x: Any, weight: Any, *, epsilon: float = 1e-6, dtype: str | None = None) -> Any:
        return rows(x, numpy_dtype(dtype) if dtype else x.dtype, epsilon, weight=weight)


def _is_narrow(x: Any, *leaves: Any, dtype: str | None = None, **named: Any) -> bool | str:
    """float32 and narrower, in rows that fit into shared memory"""
    if x.shape[-1] > LONGEST:
        return f"rows of more than {LONGEST} values"
    return narrow_types(x, *leaves, dtype=dtype, **named)
