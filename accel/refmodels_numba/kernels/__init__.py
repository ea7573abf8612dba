"""The compiled kernels: imported only to compile them. One file for each family of ops, named as in `refmodels/ops`."""
