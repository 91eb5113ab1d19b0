"""The CUDA backend: kernels built by CuPy, and the staging that brings packed bytes of the host to a device."""
