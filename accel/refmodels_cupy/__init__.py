"""T5, OPT and BLOOM on one NVIDIA GPU: CUDA kernels, cuBLAS for large products, a decode step in one graph.

`cupy` is the accelerator, found by its name: `from_preset(..., accelerator="cupy")`. CuPy itself is imported when it is asked
whether it can run here.
"""

from refmodels_cupy.accelerator import Cupy, cupy

__all__ = ["Cupy", "cupy"]
