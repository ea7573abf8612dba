"""T5, OPT and BLOOM on one NVIDIA GPU: CUDA kernels, cuBLAS for large products, a decode step in one graph."""
