"""The CPU backend: kernels compiled by Numba, run by a pool of worker threads."""
