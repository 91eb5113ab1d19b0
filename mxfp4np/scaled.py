"""ScaledArray: elements of FP8, FP4 and their kin with the scales that they are multiplied by, still encoded.

MXFP8, NVFP4 and FP8 with a scale for a tile, a channel or a tensor differ in the element format, in the tile of values
that shares a scale, in the type of the scales, and in a second scale above them. This module knows no file and no
tensor name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backends import as_array, backend_for, device_of
from .backends.threads import check_num_threads
from .blocks import BlockArray
from .errors import LayoutError
from .format import BLOCK_SIZE, ELEMENTS, DecodedDType, scale_values

SCALE_DTYPES = ("uint8", "float8_e8m0fnu", "float8_e4m3fn", "float32", "bfloat16", "float16")
"""Of the scales; uint8 is E8M0."""


class ScaledArray(BlockArray):
    """An array of elements with scales, still encoded: FP8, MXFP8 or NVFP4.

    Parameters
    ----------
    codes : (..., N, B) uint8, or of a float8 dtype
        Rows of codes: a byte each or, of E2M1, two to a byte, the low one first. Codes and scales may be tensors of
        torch on the CPU, of which the array is a view.
    scales : (..., ceil(N / tile[0]), ceil(K / tile[1])) uint8, float8, float32, bfloat16 or float16
        uint8 and float8_e8m0fnu are E8M0.
    element : {"E4M3", "E5M2", "E2M1", "E4M3FNUZ", "E5M2FNUZ"}
        The format of the codes.
    tile : (int, int)
        Rows and columns that share a scale; at the edges there may be fewer.
    second : float or array, optional
        A scale above the scales: for all of them, or ``(..., 1, 1)`` for each index of the axes before the rows.
    divide : bool
        Whether scales are divided by the second scale, not multiplied.

    Attributes
    ----------
    blocks : numpy.ndarray of uint8
        The codes, a view of the argument.
    scales : numpy.ndarray
        A view of the argument, E8M0 as uint8.
    second : numpy.ndarray of float32, or None
    element : str
    divide : bool
        As given.
    block_size : int
        Columns that share a scale.
    tile_rows, first_row : int
        Rows that share a scale, and how many rows of the first tile are not part of the array.
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
    >>> array
    ScaledArray(shape=(2, 4), element='E4M3', nbytes=16)
    >>> array[1, 1:].decode("float32")
    array([3., 3., 3.], dtype=float32)
    """

    __slots__ = ("_block_size", "_divide", "_element", "_first_row", "_scales", "_second", "_tile_rows")

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
        if codes.ndim < 2 or codes.dtype.name not in ("uint8", ELEMENTS[element]):
            expected_dtype = " or ".join(filter(None, ("uint8", ELEMENTS[element])))
            raise LayoutError(
                f"codes of {element} must be {expected_dtype} with 2 axes or more, found {codes.dtype} "
                f"{list(codes.shape)}"
            )
        if scales.dtype.name not in SCALE_DTYPES:
            raise LayoutError(f"scales must be {', '.join(SCALE_DTYPES)}, found {scales.dtype}")
        per_byte = 2 if element == "E2M1" else 1
        if min(tile) < 1 or tile[1] % per_byte:
            raise LayoutError(f"tile must be rows and columns of whole bytes, found {tile}")
        *lead, rows, nbytes = codes.shape
        columns = nbytes * per_byte
        expected = (*lead, -(-rows // tile[0]), -(-columns // tile[1]))
        if scales.shape != expected:
            raise LayoutError(
                f"scales must be {list(expected)}, one for a tile of {list(tile)} values of {[*lead, rows, columns]}, "
                f"found {list(scales.shape)}"
            )
        if device_of(codes) != device_of(scales):
            raise LayoutError(f"codes are on {device_of(codes)!r} and scales on {device_of(scales)!r}: copy one")
        self._blocks, self._start, self._shape = codes.view(np.uint8), 0, (*lead, rows, columns)
        self._element, self._divide, self._block_size = element, divide, tile[1]
        self._scales: NDArray[Any] = scales.view(np.uint8) if scales.dtype.name == "float8_e8m0fnu" else scales
        self._tile_rows, self._first_row = tile[0], 0
        if expected[-2] == 1:
            self._tile_rows, self._scales = 1, np.broadcast_to(self._scales, (*lead, rows, expected[-1]))
        self._second: NDArray[np.float32] | None = None
        if second is not None:
            self._second = np.asarray(second, np.float32)
            if self._second.shape not in ((), (*lead, 1, 1)):
                raise LayoutError(f"second must be one number or {[*lead, 1, 1]}, found {list(self._second.shape)}")
            if self._second.ndim:
                self._second = np.broadcast_to(self._second, (*self._scales.shape[:-1], 1))

    @property
    def scales(self) -> NDArray[Any]:
        """The scales; of rows that share them all, a view that repeats them."""
        return self._scales

    @property
    def second(self) -> NDArray[np.float32] | None:
        """The scales above the scales."""
        return self._second

    @property
    def element(self) -> str:
        """The format of the codes."""
        return self._element

    @property
    def divide(self) -> bool:
        """Whether scales are divided by the second scale."""
        return self._divide

    @property
    def block_size(self) -> int:
        """Columns that share a scale."""
        return self._block_size

    @property
    def tile_rows(self) -> int:
        """Rows that share a scale."""
        return self._tile_rows

    @property
    def first_row(self) -> int:
        """Rows of the first tile that are not part of the array."""
        return self._first_row

    @property
    def format(self) -> str:
        """The format of the codes."""
        return self._element

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
        """Bytes of codes and scales, each counted once."""
        return self.blocks.nbytes + self.count_scales() * self.scales.itemsize

    def __repr__(self) -> str:
        return f"ScaledArray(shape={self.shape}, element={self.element!r}, nbytes={self.nbytes})"

    def __getitem__(self, index: Any) -> Self:
        part = super().__getitem__(index)
        if part.scales.shape[-1] != 1:
            return part
        per_byte = 2 if self.element == "E2M1" else 1  # of a wide tile, only what was asked for
        begin, end = part.start // per_byte, -(-(part.start + part.shape[-1]) // per_byte)
        codes = part.blocks[..., begin:end]
        return self._cut(part.replace(codes, part.scales), part.start % per_byte, part.shape)

    def _of_blocks(self, span: tuple[Any, ...]) -> Self:
        *lead, blocks = span
        lead = [y for x in lead for y in (x.nonzero() if isinstance(x, np.ndarray) and x.dtype == bool else (x,))]
        per_byte = 2 if self.element == "E2M1" else 1
        size = self.block_size // per_byte
        codes = self.blocks[(*lead, slice(blocks.start * size, blocks.stop * size))]
        rows, tile_rows, first_row = self._scale_rows(lead)
        second = self.second if self.second is None or not self.second.ndim else rows(self.second)
        part = self._with(codes, rows(self.scales)[..., blocks], second, tile_rows, first_row)
        return self._cut(part, 0, (*codes.shape[:-1], codes.shape[-1] * per_byte))

    def _scale_rows(self, lead: list[Any]) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], int, int]:
        """Return what selects the rows of scales that an index needs, and `tile_rows` and `first_row` of these."""
        if self.tile_rows == 1:
            return (lambda array: array[(*lead, ...)]), 1, 0
        *outer, rows = lead
        numbers = np.arange(self.first_row, self.first_row + self.shape[-2])[rows]
        if not isinstance(rows, slice):  # lists go along with those of other axes
            return (lambda array: array[(*outer, numbers // self.tile_rows, ...)]), 1, 0
        if rows.step in (None, 1) and numbers.size:
            first, last = int(numbers[0]), int(numbers[-1])
            tiles = slice(first // self.tile_rows, last // self.tile_rows + 1)
            return (lambda array: array[(*outer, tiles, ...)]), self.tile_rows, first % self.tile_rows
        return (lambda array: array[(*outer, ...)][..., numbers // self.tile_rows, :]), 1, 0

    def _with(self, codes: Any, scales: Any, second: Any, tile_rows: int, first_row: int) -> Self:
        """Return the same kind of array, of other codes and scales."""
        part = object.__new__(type(self))
        part._element, part._divide, part._block_size = self.element, self.divide, self.block_size
        part._blocks, part._scales, part._second = codes, scales, second
        part._tile_rows, part._first_row = tile_rows, first_row
        return part

    def replace(self, codes: NDArray[np.uint8], scales: NDArray[Any]) -> Self:
        """Return the same view of other arrays, which have the same shapes."""
        part = self._with(codes, scales, self.second, self.tile_rows, self.first_row)
        return self._cut(part, self.start, self.shape)

    def decode(
        self,
        dtype: DecodedDType | None = None,
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

    def exponents(self) -> NDArray[np.uint8]:
        """Return the exponents of the scales that are not zero, flat, with the bias of E8M0: 255 is NaN or infinity.

        The second scale is applied. Of rows that share all scales, each is counted once.

        Examples
        --------
        >>> import numpy as np
        >>> ScaledArray(np.zeros((1, 96), np.uint8), np.array([[1, 0, 0.3]], np.float32), "E4M3").exponents()
        array([127, 125], dtype=uint8)
        """
        once = tuple(slice(None) if step else slice(1) for step in self.scales.strides)
        second = self.second if self.second is None or not self.second.ndim else self.second[(*once[:-1], ...)]
        scales, table = self._with(self.blocks, self.scales[once], second, 1, 0)._factors()  # noqa: SLF001
        factors = scales if table is None else table
        exponents: NDArray[np.uint8] = (factors.view(np.uint32) >> np.uint32(23)).astype(np.uint8)
        used: NDArray[np.bool_] = factors != 0
        if table is not None:
            exponents, used = exponents[scales], used[scales]
        return exponents[used]

    def count_scales(self) -> int:
        """Return how many scales there are, counted as in `exponents`."""
        return math.prod(size if step else 1 for size, step in zip(self.scales.shape, self.scales.strides, strict=True))

    def any_code(self) -> bool:
        """Tell whether any code is not zero; those of the last blocks are counted as a whole."""
        mask = {"E2M1": 0x77, "E4M3": 0x7F, "E5M2": 0x7F}.get(self.element, 0xFF)
        return bool(np.any(self.blocks & np.uint8(mask)))

    def count_infinite(self) -> int:
        """Return how many values are infinite since their codes or scales are, and not because they are too large."""
        ones = np.full_like(self.blocks, {"E2M1": 0x22, "E4M3": 0x38, "E5M2": 0x3C}.get(self.element, 0x40))
        elements = self._with(
            self.blocks, np.broadcast_to(np.float32(1), self.scales.shape), None, self.tile_rows, self.first_row
        )
        factors = self.replace(ones, self.scales)
        both = [self._cut(x, self.start, self.shape).decode("float32", backend="numpy") for x in (elements, factors)]
        with np.errstate(all="ignore"):
            return int(np.count_nonzero(np.isinf(both[0] * both[1]) & (np.isinf(both[0]) | np.isinf(both[1]))))

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
            values[np.isnan(values)] = np.nan  # of no other bits
        return (scales.view(np.uint8), values) if is_bytes else (values, None)
