"""BlockArray: an array of values in blocks along its last axis, still encoded, that indexes like one array.

What the formats have in common; a subclass adds what its blocks hold, and decodes them. This module knows no file and
no tensor name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .backends import Backend, device_of
from .format import DTYPES, DecodedDType, TorchDType, as_dtype, decoded_dtype
from .products import Factor, left_matmul, matmul
from .shapes import full_index, split, swapped
from .text import format_bytes, html_table, parse_bytes, shape_text
from .transposed import TransposedArray

_Array = TypeVar("_Array", bound="BlockArray")


class BlockArray(Factor):
    """An array of values in blocks. Its attributes cannot be set: other arrays make another one.

    Attributes
    ----------
    blocks : (..., G, bytes of a block) numpy.ndarray of uint8
    block_size : int
        Values of a block.
    shape : tuple of int
        Of the values: ``(..., block_size * G)``, or less if a slice began or ended inside a block.
    start : int
        Elements of each row's first block that are not part of the array: 0 unless a slice began inside a block.
    """

    __slots__ = ("_blocks", "_shape", "_start")

    _blocks: NDArray[np.uint8]
    _shape: tuple[int, ...]
    _start: int

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """The blocks, uint8."""
        return self._blocks

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self._shape

    @property
    def start(self) -> int:
        """Elements of each row's first block that are not part of the array."""
        return self._start

    @property
    def block_size(self) -> int:
        """Values of a block."""
        raise NotImplementedError

    @property
    def format(self) -> str:
        """The name of the format, for messages."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype[Any]:
        """bfloat16: what `decode`, NumPy and other libraries make of the values unless another dtype is asked for."""
        return decoded_dtype("bfloat16")

    @property
    def T(self) -> TransposedArray | NDArray[Any]:  # noqa: N802 - NumPy's name
        """A matrix with its axes swapped, still packed, as factor of a product; of other arrays the values, decoded."""
        return TransposedArray(self) if self.ndim == 2 else self.decode().T

    @property
    def mT(self) -> TransposedArray:  # noqa: N802 - NumPy's name
        """The array with its last two axes swapped, still packed, as factor of a product."""
        return TransposedArray(self)

    def __matmul__(self, x: Any) -> NDArray[Any]:
        """Multiply by a vector or matrices, see `mxfp4np.linear` for precision; the result is float32."""
        return matmul(self, x)

    def __rmatmul__(self, x: Any) -> NDArray[Any]:
        """Multiply a vector or matrices by this array, whose rows are decoded tile by tile; the result is float32."""
        return left_matmul(x, self)

    @property
    def inputs(self) -> tuple[NDArray[np.uint8], ...]:
        """The arrays that are decoded, which an output may not overlap."""
        return (self.blocks,)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed blocks, scales included."""
        return sum(array.nbytes for array in self.inputs)

    def _repr_html_(self) -> str:
        facts = {
            "format": f"{self.format}, blocks of {self.block_size:,}",
            "shape": shape_text(self.shape),
            "packed": format_bytes(self.nbytes),
            "decoded": f"{format_bytes(self.size * self.dtype.itemsize)} of {self.dtype}",
            "device": device_of(self.blocks),
        }
        return html_table(list(facts.items()), caption=type(self).__name__)

    def _of_blocks(self, span: tuple[Any, ...]) -> Self:
        """Return what an index of the leading axes and of whole blocks selects."""
        raise NotImplementedError

    @staticmethod
    def _cut(part: _Array, start: int, shape: tuple[int, ...]) -> _Array:
        """Return a new array as one of this shape, which begins inside its first block."""
        part._start, part._shape = start, shape  # noqa: SLF001
        return part

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
        """Return the values; see `MXFP4Array.decode`."""
        raise NotImplementedError

    @property
    def multiple(self) -> int:
        """Values along the last axis at multiples of which the array is best cut."""
        return self.block_size

    @property
    def device(self) -> str:
        """Where the packed bytes are: ``"cpu"``, or ``"cuda:0"`` or another."""
        return device_of(self.blocks)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Self:
        """Return a view, or a copy of what lists or masks select, still packed; nothing is decoded.

        Parameters
        ----------
        index : int, slice, Ellipsis, list or array of int or bool, or a tuple of them
            As in NumPy for the leading axes. The last axis, along which values share scales, takes a slice of step 1,
            which may begin and end inside a block.

        Raises
        ------
        IndexError
            If it is out of range, or of another kind.
        """
        lead, (begin, end) = self._split_index(index)
        begin, end = begin + self.start, end + self.start
        first = begin // self.block_size
        part = self._of_blocks((*lead, slice(first, -(-end // self.block_size) if end > begin else first)))
        return self._cut(part, begin % self.block_size, (*part.shape[:-1], end - begin))

    def _split_index(self, index: Any) -> tuple[tuple[Any, ...], tuple[int, int]]:
        """Split an index into items for the leading axes, and begin and end along the last."""
        *lead, last = full_index(index, self.ndim)
        if not isinstance(last, slice):
            use = f"use [{last}:{last} + 1], or decode first" if isinstance(last, int) else "decode first, then index"
            raise IndexError(f"the last axis takes a slice, found {last!r}: {use}")
        begin, end, step = last.indices(self.shape[-1])
        if step != 1:
            raise IndexError(f"the last axis takes slices of step 1, found step {step}: decode first, then index")
        if self.device != "cpu":  # CuPy takes lists, but no arrays of the host
            lead = [item.tolist() if isinstance(item, np.ndarray) else item for item in lead]
        return tuple(lead), (begin, max(begin, end))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Decode for NumPy: to bfloat16, or through float32 to any other dtype."""
        if self.device != "cpu":
            raise TypeError(
                f"{self.format} values on {self.device!r} do not become a numpy.ndarray unasked: use decode()"
            )
        if copy is False:
            raise ValueError(f"packed {self.format} values cannot become an array without a copy")
        return self.astype("bfloat16" if dtype is None else dtype)

    def astype(self, dtype: DTypeLike, *, copy: bool = True) -> NDArray[Any]:  # noqa: ARG002
        """Return the values in any dtype, as NumPy's method: decoded to it, or through float32.

        Parameters
        ----------
        dtype : str, type or numpy.dtype
        copy : bool
            Of no effect: decoded values are always new.
        """
        dtype = as_dtype(dtype)
        return self.decode(dtype) if dtype.name in DTYPES and dtype.isnative else self.decode("float32").astype(dtype)

    def prepare_out(
        self,
        dtype: DTypeLike | TorchDType | None,
        out: NDArray[Any] | None,
        *,
        transpose: bool,
        impl: Backend,
        shape: tuple[int, ...] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the output of `decode`, checked or new, and a view of it that has the shape of this array.

        ``shape`` is that of this array, unless only a part of it is decoded.
        """
        shape = self.shape if shape is None else shape
        shape = swapped(shape) if transpose else shape
        if out is None:
            out = impl.empty(shape, decoded_dtype("bfloat16" if dtype is None else dtype))
        else:
            impl.check_out(out, *self.inputs)
            expected = decoded_dtype(out.dtype if dtype is None else dtype)
            if out.dtype != expected:
                raise ValueError(f"out must have dtype {expected}, found {out.dtype}")
            if out.shape != shape:
                raise ValueError(f"out must have shape {shape}, found {out.shape}")
        return out, out.swapaxes(-1, -2) if transpose else out

    def tiles(self, impl: Backend, num_threads: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Decode a matrix to float32, some rows at a time, in memory that is used again for the next ones.

        Yields
        ------
        begin : int
            The first row.
        tile : (rows, K) array of float32
        """
        rows, columns = self.shape
        step = max(1, min(rows, impl.tile_bytes // max(1, 4 * columns)))
        memory = impl.empty((step, columns), np.dtype(np.float32))
        for begin in range(0, rows, step):
            part = self[begin : begin + step]
            yield begin, part.decode(out=memory[: len(part)], num_threads=num_threads)

    def multiply(
        self,
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        activations: str,  # noqa: ARG002
        num_threads: int | None,
        impl: Backend,
    ) -> None:
        """Multiply this matrix by vectors: ``out = values @ x``, by NumPy's or CuPy's product of decoded tiles.

        Parameters
        ----------
        x : (K, M) array of float32
        out : (N, M) array of float32
            No axis is empty.
        activations, num_threads
            As for `mxfp4np.linear`.
        impl : Backend
            That of x and out.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            for begin, tile in self.tiles(impl, num_threads):
                out[begin : begin + len(tile)] = tile @ x

    def iter_chunks(
        self, max_bytes: int | str, dtype: DecodedDType = "bfloat16"
    ) -> Iterator[tuple[tuple[int | slice, ...], Self]]:
        """Split the array into views that each decode to at most ``max_bytes``.

        Parameters
        ----------
        max_bytes : int or str
            At least one block of the decoded dtype; text is for instance ``"1GB"`` or ``"512MiB"``.
        dtype : str, type or numpy.dtype
            Of the decoded chunk.

        Yields
        ------
        index : tuple of int and slice
            The view is ``self[index]``; in C order, together they are the whole array.
        chunk : BlockArray

        Examples
        --------
        >>> import numpy as np
        >>> from mxfp4np import MXFP4Array
        >>> packed = MXFP4Array(np.zeros((3, 2, 16), np.uint8), np.zeros((3, 2), np.uint8))
        >>> [index for index, chunk in packed.iter_chunks(256)]
        [(slice(0, 2, None), slice(0, 64, None)), (slice(2, 3, None), slice(0, 64, None))]
        """
        for index in split(self.shape, decoded_dtype(dtype).itemsize, parse_bytes(max_bytes), (self.multiple,)):
            yield index, self[index]
