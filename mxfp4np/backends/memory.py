"""Host memory for outputs: aligned to a cache line, which wide stores need and `numpy.empty` does not promise."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LayoutError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK

ALIGNMENT = 64
"""Bytes."""


class HostBackend:
    """What backends share whose arrays are NumPy's."""

    tile_bytes = 4 << 20  # they stay in the cache

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return aligned_empty(shape, dtype)

    def asarray(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def store(self, array: NDArray[Any], out: NDArray[Any]) -> None:
        np.copyto(out, array, casting="unsafe")

    def check_out(self, out: NDArray[Any], *inputs: NDArray[Any]) -> None:
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a numpy.ndarray, found {type_of(out)}")
        if not out.flags.writeable:
            raise ValueError("out must be writable, found a read-only array")
        for array in inputs:
            if np.may_share_memory(out, array):
                raise ValueError("out must not overlap what it is made from")

    def release(self) -> None:
        pass


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised C-contiguous array whose first byte is on a multiple of `ALIGNMENT`.

    Examples
    --------
    >>> aligned_empty((3, 64), np.dtype("float16")).ctypes.data % ALIGNMENT
    0
    """
    nbytes = dtype.itemsize * math.prod(shape)
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory.data, -address_of(memory) % ALIGNMENT)


def scales_by_row(scales: Any, rows: int, tile_rows: int, first_row: int) -> Any:
    """Return the scales of each row, where ``tile_rows`` rows share them; see `Backend.decode_scaled`.

    Examples
    --------
    >>> scales_by_row(np.array([[5], [7]]), 4, 3, 1).ravel()
    array([5, 5, 7, 7])
    """
    if tile_rows == 1:
        return scales
    return scales[..., np.arange(first_row, first_row + rows) // tile_rows, :]


def type_of(value: object) -> str:
    """Return the name of a value's type, with its module.

    Examples
    --------
    >>> type_of([]), type_of(np.zeros(1))
    ('list', 'numpy.ndarray')
    """
    found = type(value)
    return found.__name__ if found.__module__ == "builtins" else f"{found.__module__}.{found.__name__}"


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first element.

    It is what follows the header of all objects in NumPy's `PyArrayObject`, which its C API lays down. Its
    `__array_interface__` says the same after a microsecond, the best part of the time for a few blocks.
    """
    return ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


def check_shapes(blocks: Any, scales: Any, values: Any, start: int = 0) -> None:
    """Refuse arrays that do not fit each other, whose addresses a kernel would follow beyond their ends.

    Shapes were checked before, but those of NumPy's arrays can be set at any time.

    Parameters
    ----------
    blocks : (..., G, 16) array
    scales : (..., G) array
    values : (..., L) array
    start : int
        Elements of each row's first block to skip.

    Raises
    ------
    LayoutError
    """
    *lead, groups = scales.shape
    fitting = 0 <= start < BLOCK_SIZE and -(-(start + values.shape[-1]) // BLOCK_SIZE) == groups
    if not fitting or blocks.shape != (*lead, groups, BYTES_PER_BLOCK) or values.shape[:-1] != tuple(lead):
        raise LayoutError(
            f"shapes do not fit each other: blocks {list(blocks.shape)}, scales {list(scales.shape)}, values "
            f"{list(values.shape)} from element {start} on: do not change the shapes of packed arrays"
        )


def check_factors(blocks: Any, scales: Any, x: Any, out: Any) -> None:
    """Refuse factors of a product that do not fit each other, as `check_shapes` does.

    Parameters
    ----------
    blocks : (N, G, 16) array
    scales : (N, G) array
    x : (32 * G, M) array
    out : (N, M) array

    Raises
    ------
    LayoutError
    """
    rows, groups = scales.shape
    if blocks.shape != (rows, groups, BYTES_PER_BLOCK) or x.shape[0] != BLOCK_SIZE * groups:
        raise LayoutError(
            f"shapes do not fit each other: blocks {list(blocks.shape)}, scales {list(scales.shape)}, vectors "
            f"{list(x.shape)}: do not change the shapes of packed arrays"
        )
    assert out.shape == (rows, x.shape[1])


def is_transposed(out: NDArray[Any]) -> bool:
    """Tell whether it is the last axis but one whose elements are next to each other."""
    return out.ndim > 1 and out.strides[-2] == out.itemsize != out.strides[-1] and out.shape[-1] > 1 < out.shape[-2]


def merged_axes(shape: tuple[int, ...], *strides: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the length and the strides of as few axes as walk through several arrays of one shape together.

    Examples
    --------
    >>> merged_axes((2, 3, 5), (60, 20, 4), (15, 5, 1))
    [(30, 4, 1)]
    >>> merged_axes((2, 3, 5), (60, 20, 4), (100, 5, 1))
    [(2, 60, 100), (15, 4, 1)]
    """
    axes: list[tuple[int, ...]] = []
    for axis in zip(shape, *strides, strict=True):
        if axes and all(a == axis[0] * b for a, b in zip(axes[-1][1:], axis[1:], strict=True)):
            axes[-1] = (axes[-1][0] * axis[0], *axis[1:])
        elif axis[0] != 1:
            axes.append(axis)
    return axes
