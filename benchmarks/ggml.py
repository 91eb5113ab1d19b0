"""ggml's product with MXFP4 weights on the CPU, as a peer, through its C interface.

`GGML_LIBRARY` is the path of libggml.so. It is built for the processor at hand with

    git clone --depth 1 https://github.com/ggml-org/ggml && cd ggml
    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
    cmake --build build --target ggml
    export GGML_LIBRARY=$PWD/build/src/libggml.so

and for AVX2 without AVX-512 with ``-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON
-DGGML_FMA=ON -DGGML_F16C=ON`` too. A process loads one of the two. With OpenMP, threads would stay busy between runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from contextlib import ExitStack
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mxfp4np

FLOAT32, MXFP4 = 0, 39  # of enum ggml_type


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


FUNCTIONS = {
    "ggml_version": (c_char_p,),
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_get_data": (ctypes.POINTER(ctypes.c_float), c_void_p),
    "ggml_threadpool_params_init": (None, c_void_p, c_int),
    "ggml_threadpool_new": (c_void_p, c_void_p),
    "ggml_threadpool_pause": (None, c_void_p),
    "ggml_threadpool_free": (None, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}
"""Functions of the library: the types of the result and of the parameters."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, or raise ImportError."""
    path = os.environ.get("GGML_LIBRARY")
    if not path:
        raise ImportError("GGML_LIBRARY is not set")
    found = ctypes.CDLL(path)
    for name, (result, *parameters) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, parameters
    return found


def version() -> str:
    """Return the library's version."""
    text: bytes = library().ggml_version()
    return text.decode()


def buffer_type(*, repack: bool) -> int:
    """Return the type of buffer for weights as they are stored, or for a copy in the order of its fastest kernels."""
    ggml = library()
    found: int
    if not repack:
        found = ggml.ggml_backend_cpu_buffer_type()
        return found
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(ggml.ggml_backend_reg_dev_get(registry, 0))
    for found in types:
        if not found:  # the end of the list
            break
        if ggml.ggml_backend_buft_name(found) == b"CPU_REPACK":
            return found
    raise ImportError("the library is built without CPU_REPACK")


def rows_of(packed: mxfp4np.MXFP4Array) -> NDArray[np.uint8]:
    """Return blocks as ggml stores them: the scale, then elements 0 to 15 in low nibbles and others in high ones."""
    codes = packed.blocks
    if packed.order == "pairs":
        elements = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)
        codes = elements[..., :16] | elements[..., 16:] << 4
    return np.concatenate([packed.scales[..., None], codes], axis=-1)


class Product:
    """A run that multiplies some vectors by some matrices, one after another. Vectors are rounded to 8 bits inside.

    Parameters
    ----------
    matrices : list of MXFP4Array
        (N, K) each. With ``repack``, ``N`` is a multiple of 8.
    x : (M, K) float32
    threads : int
    repack : bool
    """

    def __init__(
        self, matrices: list[mxfp4np.MXFP4Array], x: NDArray[np.float32], *, threads: int, repack: bool = True
    ) -> None:
        ggml = library()
        weights, rest = (ggml.ggml_init(InitParams(1 << 20, None, True)) for _ in range(2))
        m, k = x.shape
        vectors, self._graph = ggml.ggml_new_tensor_2d(rest, FLOAT32, k, m), ggml.ggml_new_graph(rest)
        tensors = [ggml.ggml_new_tensor_2d(weights, MXFP4, k, len(matrix)) for matrix in matrices]
        products = [ggml.ggml_mul_mat(rest, tensor, vectors) for tensor in tensors]
        for product in products:
            ggml.ggml_build_forward_expand(self._graph, product)
        with ExitStack() as stack:
            for context, is_packed in ((weights, repack), (rest, False)):
                stack.callback(ggml.ggml_free, context)
                kind = buffer_type(repack=is_packed)
                stack.callback(
                    ggml.ggml_backend_buffer_free, ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
                )
            arrays: list[NDArray[Any]] = [*map(rows_of, matrices), np.ascontiguousarray(x, np.float32)]
            for tensor, array in zip([*tensors, vectors], arrays, strict=True):
                ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
            params = ctypes.create_string_buffer(4096)  # more than struct ggml_threadpool_params
            ggml.ggml_threadpool_params_init(params, threads)
            self._pool, self._backend = ggml.ggml_threadpool_new(params), ggml.ggml_backend_cpu_init()
            stack.callback(ggml.ggml_threadpool_free, self._pool)
            stack.callback(ggml.ggml_backend_free, self._backend)
            ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
            ggml.ggml_backend_cpu_set_threadpool(self._backend, self._pool)
            self.close = stack.pop_all().close
        self._results = [
            np.ctypeslib.as_array(ggml.ggml_get_data(product), (m, len(matrix)))
            for product, matrix in zip(products, matrices, strict=True)
        ]

    def __call__(self) -> list[NDArray[np.float32]]:
        """Return the products, (M, N) each: arrays that the next run writes to, and that `close` frees."""
        if library().ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml failed")
        library().ggml_threadpool_pause(self._pool)  # its threads would stay busy for a while
        return self._results
