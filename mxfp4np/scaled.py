"""ScaledArray: elements of FP8, FP4 and their kin with the scales that they are multiplied by, still encoded.

MXFP8, NVFP4 and FP8 with a scale for a tile, a channel or a tensor differ in the element format, in the tile of values
that shares a scale, in the type of the scales, and in a second scale above them. This module knows no file and no
tensor name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .backends import as_array, backend_for
from .backends.threads import check_num_threads
from .blocks import BlockArray
from .errors import LayoutError
from .format import BLOCK_SIZE, ELEMENTS, scale_values

SCALE_DTYPES = ("uint8", "float8_e8m0fnu", "float8_e4m3fn", "float32", "bfloat16", "float16")
"""Of the scales; uint8 is E8M0."""


class ScaledArray(BlockArray):
    """An array of elements with scales, still encoded.

    Parameters
    ----------
    codes : (..., N, B) uint8, or of a float8 dtype
        Rows of codes: a byte each or, of E2M1, two to a byte, the low one first.
    scales : (..., ceil(N / tile[0]), ceil(K / tile[1])) uint8, float8, float32, bfloat16 or float16
        uint8 and float8_e8m0fnu are E8M0.
    element : {"E4M3", "E5M2", "E2M1", "E4M3FNUZ", "E5M2FNUZ"}
    tile : (int, int)
        Rows and columns that share a scale; at the edges there may be fewer.
    second : float or array, optional
        A scale above the scales: for all of them, or for each index of the axes before the rows.
    divide : bool
        Whether scales are divided by the second scale, not multiplied.

    Attributes
    ----------
    shape : tuple of int
        Of the values: ``(..., N, K)``.

    Raises
    ------
    LayoutError
        If dtypes or shapes do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> ones = np.full((2, 4), 0x38, np.uint8)
    >>> array = ScaledArray(ones, np.array([[0.5], [3.0]], np.float32), "E4M3", tile=(1, 4))
    >>> array[1, 1:].decode("float32")
    array([3., 3., 3.], dtype=float32)
    """

    __slots__ = ("block_size", "divide", "element", "first_row", "scales", "second", "tile_rows")

    def __init__(
        self,
        codes: ArrayLike,
        scales: ArrayLike,
        element: str,
        tile: tuple[int, int] = (1, BLOCK_SIZE),
        second: ArrayLike | None = None,
        *,
        divide: bool = False,
    ) -> None:
        codes, scales = as_array(codes), as_array(scales)
        if element not in ELEMENTS:
            raise LayoutError(f"element must be one of {', '.join(ELEMENTS)}, found {element!r}")
        if codes.dtype.itemsize != 1 or codes.ndim < 2:
            raise LayoutError(f"codes must be bytes with 2 axes or more, found {codes.dtype} {list(codes.shape)}")
        if scales.dtype.name not in SCALE_DTYPES:
            raise LayoutError(f"scales must be {', '.join(SCALE_DTYPES)}, found {scales.dtype}")
        *lead, rows, nbytes = codes.shape
        columns = nbytes * 2 if element == "E2M1" else nbytes
        expected = (*lead, -(-rows // tile[0]), -(-columns // tile[1]))
        if scales.shape != expected:
            raise LayoutError(
                f"scales must be {list(expected)}, one for a tile of {list(tile)} values of {[*lead, rows, columns]}, "
                f"found {list(scales.shape)}"
            )
        self.blocks: NDArray[np.uint8] = codes.view(np.uint8)
        self.element, self.divide, self.start = element, divide, 0
        self.block_size, self.shape = max(1, tile[1]), (*lead, rows, columns)
        self.scales: NDArray[Any] = scales.view(np.uint8) if scales.dtype.name == "float8_e8m0fnu" else scales
        self.second: NDArray[np.float32] | None = None if second is None else np.asarray(second, np.float32)
        self.tile_rows, self.first_row = tile[0], 0  # of the first tile, the rows that are left out
        if expected[-2] == 1:
            self.tile_rows, self.scales = 1, np.broadcast_to(self.scales, (*lead, rows, expected[-1]))
        if self.second is not None and self.second.ndim:
            self.second = np.broadcast_to(self.second, (*self.scales.shape[:-1], 1))

    @property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """The arrays that are decoded."""
        return self.blocks, self.scales

    @property
    def multiple(self) -> int:
        """Where rows are best cut: at 32 values, or at those that share a scale."""
        return min(self.block_size, BLOCK_SIZE)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def __repr__(self) -> str:
        return f"ScaledArray(shape={self.shape}, element={self.element!r}, nbytes={self.nbytes})"

    def _with(self, codes: NDArray[np.uint8], scales: NDArray[Any]) -> ScaledArray:
        """Return the same kind of array, of other codes and scales."""
        part = object.__new__(ScaledArray)
        part.element, part.divide, part.second = self.element, self.divide, self.second
        part.block_size, part.blocks, part.scales = self.block_size, codes, scales
        part.tile_rows, part.first_row = self.tile_rows, self.first_row
        part.start, part.shape = self.start, self.shape
        return part

    def _of_blocks(self, span: tuple[Any, ...]) -> ScaledArray:
        *lead, blocks = span
        per_byte = 2 if self.element == "E2M1" else 1
        size = self.block_size // per_byte
        codes = self.blocks[(*lead, slice(blocks.start * size, blocks.stop * size))]
        part = self._with(codes, self.scales)
        part.shape = (*codes.shape[:-1], codes.shape[-1] * per_byte)
        rows = self._scale_rows(part, lead)
        part.scales = rows(self.scales)[..., blocks]
        if self.second is not None and self.second.ndim:
            part.second = rows(self.second)
        return part

    def _scale_rows(self, part: ScaledArray, lead: list[Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Return what selects the rows of scales that an index needs, and set where those of a part begin."""
        if self.tile_rows == 1:
            return lambda array: array[(*lead, ...)]
        *outer, rows = lead
        numbers = np.arange(self.first_row, self.first_row + self.shape[-2])[rows]
        part.first_row, part.tile_rows = 0, 1
        if not isinstance(rows, slice):  # lists go along with those of other axes
            return lambda array: array[(*outer, numbers // self.tile_rows, ...)]
        if rows.step in (None, 1) and numbers.size:
            first, last = int(numbers[0]), int(numbers[-1])
            part.first_row, part.tile_rows = first % self.tile_rows, self.tile_rows
            tiles = slice(first // self.tile_rows, last // self.tile_rows + 1)
            return lambda array: array[(*outer, tiles, ...)]
        return lambda array: array[(*outer, ...)][..., numbers // self.tile_rows, :]

    def replace(self, codes: NDArray[np.uint8], scales: NDArray[Any]) -> ScaledArray:
        """Return the same view of other arrays, which have the same shapes."""
        return self._with(codes, scales)

    def decode(
        self,
        dtype: DTypeLike | None = None,
        *,
        out: NDArray[Any] | None = None,
        transpose: bool = False,
        backend: str | None = None,
        device: Any = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Return the values; arguments and errors are those of `MXFP4Array.decode`.

        Notes
        -----
        ``value = float32(code) * float32(scale)``, in float32, rounded once to the dtype. With a second scale, the
        scale is the float32 product ``float32(scale) * second``, or their quotient. E4M3 and E5M2: OCP 8-bit Floating
        Point Specification v1.0; E8M0: OCP Microscaling Formats (MX) v1.0, section 5.4.1.
        """
        check_num_threads(num_threads)
        impl = backend_for(self.blocks, out, backend, device)
        fresh = out is None
        out, target = self.prepare_out(dtype, out, transpose=transpose, impl=impl)
        scales, table = self._factors()
        impl.decode_scaled(
            self.blocks,
            scales,
            target,
            element=self.element,
            width=self.block_size,
            tile_rows=self.tile_rows,
            first_row=self.first_row,
            table=table,
            start=self.start,
            fresh=fresh,
            num_threads=num_threads,
        )
        return out

    def _factors(self) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Return the scales, as bytes and a table of their factors, or as factors."""
        scales, second = self.scales, self.second
        is_bytes = scales.dtype.itemsize == 1
        values = scale_values(scales.dtype.name) if is_bytes else scales.astype(np.float32, copy=False)
        if second is not None and second.ndim and is_bytes:
            values, is_bytes = values[scales.view(np.uint8)], False
        if second is not None:
            with np.errstate(all="ignore"):
                values = values / second if self.divide else values * second
        return (scales.view(np.uint8), values) if is_bytes else (values, None)
