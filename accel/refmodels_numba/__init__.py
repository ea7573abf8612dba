"""T5, OPT and BLOOM on the CPU: kernels that Numba compiles once, for float32, float16, bfloat16, int8 and int4 weights.

`numba` is the accelerator, found by its name: `from_preset(..., accelerator="numba")`. To compile, and only then, Numba itself
is imported.
"""

# Each of these registers its kernels.
from refmodels_numba import attention, bloom, cache, elementwise, linear, norm, opt, quantize, sampling, t5
from refmodels_numba.accelerator import Numba, numba

__all__ = [
    "Numba",
    "attention",
    "bloom",
    "cache",
    "elementwise",
    "linear",
    "norm",
    "numba",
    "opt",
    "quantize",
    "sampling",
    "t5",
]
