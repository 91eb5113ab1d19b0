"""What ``mxfp4np warmup`` does: compile all kernels that decoding, encoding and products use on this machine.

Every kind of array is decoded in every way that has a kernel of its own. Which kernel that is, the driver decides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ..array import MXFP4Array
from ..backends.cpu.compiler import check_numba, compiled_functions
from ..backends.cpu.driver import STREAMING_BYTES
from ..backends.memory import aligned_empty
from ..blocks import BlockArray
from ..codec import encode
from ..errors import BackendUnavailableError
from ..format import BLOCK_SIZE, DTYPES, ORDERS, DecodedName, decoded_dtype, dtype_named
from ..products import linear
from ..scaled import ScaledArray
from ..text import count

FEW: Final = 64
"""Rows of which the output is small."""


def run() -> dict[str, Any]:
    """Compile what is not in the cache yet; return what that was as plain objects.

    Raises
    ------
    BackendUnavailableError
        If there is no Numba, its compiler is switched off, or it has no folder to keep anything in.
    """
    check_numba()
    begin = time.perf_counter()
    for array in arrays():
        for dtype in DTYPES:
            _decode(array, dtype)
    for dtype in DTYPES:
        values = np.zeros((BLOCK_SIZE, BLOCK_SIZE), decoded_dtype(dtype))
        for x in (values, values.swapaxes(0, 1)):
            encode(x, backend="cpu")
    for order in ORDERS:
        packed = MXFP4Array(np.zeros((8, 2, 16), np.uint8), np.full((8, 2), 127, np.uint8), order=order)
        for vectors in range(1, 9):
            linear(np.ones((vectors, 2 * BLOCK_SIZE), np.float32), packed)
        linear(np.ones(2 * BLOCK_SIZE, np.float32), packed, activations="int16")
    folders = sorted({function.cache for function in compiled_functions if function.cache is not None})
    if not folders:
        raise BackendUnavailableError(
            "no folder keeps what Numba compiles: set NUMBA_CACHE_DIR to one that can be written, and unset "
            "NUMBA_DISABLE_JIT"
        )
    return {
        "folders": folders,
        "kernels": len(compiled_functions),
        "compiled": sum(function.is_new for function in compiled_functions),
        "seconds": time.perf_counter() - begin,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield a report of what `run` returned for a person."""
    yield (
        f"{count(found['kernels'], 'kernel')}, {found['compiled']:,} of them compiled in {found['seconds']:.1f} s, in "
        + ", ".join(found["folders"])
    )


def arrays() -> Iterator[BlockArray]:
    """Yield a large array of each kind that kernels tell apart: by order, elements and scales."""
    rows = STREAMING_BYTES // (2 * BLOCK_SIZE)
    ones = np.ones((rows, 1), np.uint8)
    for order in ORDERS:
        yield MXFP4Array(np.zeros((rows, 1, 16), np.uint8), ones, order=order)
    for element in ("E4M3", "E5M2"):
        codes = np.zeros((rows, BLOCK_SIZE), np.uint8)
        yield ScaledArray(codes, ones, element)
        yield ScaledArray(codes, ones.astype(np.float32), element)
    codes, scales = np.zeros((rows, BLOCK_SIZE // 2), np.uint8), np.zeros((rows, 2), dtype_named("float8_e4m3fn"))
    yield ScaledArray(codes, scales, "E2M1", tile=(1, BLOCK_SIZE // 2), second=1.0)


def _decode(array: BlockArray, dtype: DecodedName) -> None:
    """Decode whole rows and parts of them, a little and much, as they are and transposed."""
    memory = aligned_empty((array.size,), decoded_dtype(dtype))
    for part in (array, array[:FEW], array[:, 1:], array[:FEW, 1:]):
        rows, columns = part.shape
        for transpose in (False, True):
            shape = (columns, rows) if transpose else (rows, columns)
            part.decode(dtype, out=memory[: part.size].reshape(shape), transpose=transpose, backend="cpu")
