"""Between one wide vector and several heads: other shapes of the same memory."""

from typing import Any

from refmodels.accelerator import Accelerator
from refmodels.ops import heads as ops
from refmodels_cupy.device import Device


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.heads`."""

    @accelerator.kernel(ops.split_heads)
    def split_heads(x: Any, num_heads: int) -> Any:
        return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)

    @accelerator.kernel(ops.merge_heads)
    def merge_heads(x: Any) -> Any:
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
