"""Host memory for outputs: aligned to a cache line, which wide stores need and `numpy.empty` does not promise."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes."""


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised C-contiguous array whose first byte is on a multiple of `ALIGNMENT`.

    Examples
    --------
    >>> aligned_empty((3, 64), np.dtype("float16")).ctypes.data % ALIGNMENT
    0
    """
    nbytes = dtype.itemsize * math.prod(shape)
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    skew = -ctypes.addressof(ctypes.c_char.from_buffer(memory.data)) % ALIGNMENT
    return np.ndarray(shape, dtype, memory.data, skew)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address
