"""Which keys a query may look at, in array functions that CuPy has as NumPy does."""

from typing import Any

from refmodels.accelerator import Accelerator
from refmodels.ops import mask as ops
from refmodels_cupy.device import Device


def register(accelerator: Accelerator, device: Device) -> None:
    """Kernels for the ops of `refmodels.ops.mask`."""
    xp = device.xp

    @accelerator.kernel(ops.causal_mask)
    def causal_mask(positions: Any, key_mask: Any) -> Any:
        not_after = xp.arange(key_mask.shape[1]) <= positions[:, :, None]
        return (not_after & key_mask[:, None, :])[:, None]

    @accelerator.kernel(ops.key_mask)
    def key_mask(padding_mask: Any) -> Any:
        return padding_mask[:, None, None, :]
