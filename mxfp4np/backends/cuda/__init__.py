"""The CUDA backend: kernels compiled by CuPy, and the copying of packed bytes from the host to a device."""
