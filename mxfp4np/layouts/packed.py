"""Tensors of a known layout: what is known of them from the headers, and how packed ones become an `MXFP4Array`.

The array is a view of the files, or read into memory. Which layout a tensor has is decided by `resolve`; no value is
decoded here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..array import MXFP4Array
from ..backends.threads import starting_threads
from ..blocks import BlockArray
from ..errors import LayoutError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, DecodedDType, TorchDType, as_dtype, decoded_dtype, dtype_named
from ..shapes import basic_indices, full_index, is_advanced
from ..storage.tensorfile import DTYPES, StoredTensor
from ..text import format_bytes, html_table, shape_text
from .gguf import GGUFArray
from .table import Layout, Shape


class TensorInfo(NamedTuple):
    """What is known of a logical tensor without reading it."""

    name: str
    shape: tuple[int, ...]
    """Of the values."""
    dtype: str
    """``"MXFP4"``, or as the file's header spells it."""
    layout: str | None
    """Name of the layout of a packed tensor, None for a plain one."""
    stored: tuple[StoredTensor, ...]
    """The tensors in the files that hold it."""
    reason: str | None = None
    """Why a packed tensor has this layout."""
    format: str | None = None
    """How values are quantised: ``"MXFP4"``, or another name, such as ``"FP8"``. None for plain numbers, and for what
    belongs to codes of another format, such as their scales."""
    unit: tuple[int, int] | None = None
    """Rows and columns of a packed tensor that are best not divided: those that share a scale. Where all columns do, a
    multiple of 32 columns; where all rows do, one."""

    @property
    def nbytes(self) -> int:
        """Bytes in the files; of the whole tensor if the name stands for half of its rows."""
        return sum(tensor.nbytes for tensor in self.stored)

    def decoded_nbytes(self, dtype: DecodedDType = "bfloat16") -> int:
        """Return the bytes of the decoded array; for a plain tensor, those in the files."""
        return self.nbytes if self.layout is None else math.prod(self.shape) * decoded_dtype(dtype).itemsize

    @property
    def label(self) -> str:
        """The dtype, and the format if that is another: ``"U8 (NVFP4)"``."""
        return self.dtype if self.format in (None, self.dtype) else f"{self.dtype} ({self.format})"

    def __repr__(self) -> str:
        kind = self.label if self.layout is None else f"{self.label} as {self.layout}"
        files = ", ".join(dict.fromkeys(str(tensor.file.path) for tensor in self.stored))
        stored = f"{format_bytes(self.nbytes)} in {files}"
        return f"<TensorInfo of {self.name!r}: {shape_text(self.shape)} {kind}, {stored}>"

    def _repr_html_(self) -> str:
        facts = {"shape": shape_text(self.shape), "dtype": self.label, "layout": self.layout, "because": self.reason}
        lines = [(key, text) for key, text in facts.items() if text]
        lines.append(("stored", f"{format_bytes(self.nbytes)}, decoded {format_bytes(self.decoded_nbytes())}"))
        for tensor in self.stored:
            where = f"{shape_text(tensor.shape)} {tensor.dtype} in {tensor.file.path.name}"
            lines.append((tensor.name, where))
        return html_table(lines, caption=self.name)

    def check_values(self, dtype: DTypeLike | TorchDType | None) -> None:
        """Refuse codes that are not decoded in any dtype but their stored one, in which they are no values.

        Raises
        ------
        LayoutError
        """
        if self.format is None or self.layout is not None:
            return
        known = DTYPES.get(self.dtype)
        if known is None or (dtype is not None and as_dtype(dtype) != dtype_named(known[1])):
            raise LayoutError(
                f"{self.stored[0].file.path}: tensor {self.name!r} is {self.format}, which is not decoded: its bytes "
                "are in .stored"
            )


class PackedTensor(NamedTuple):
    """A logical tensor of a known layout: codes and scales of consistent shapes."""

    layout: Layout
    codes: StoredTensor
    scales: StoredTensor | None
    """None if they are in the blocks."""
    blocks: Shape
    """``[..., G, bytes of a block]``."""
    reason: str
    """Why it has this layout; empty if nothing shows that it does."""
    format: str = "MXFP4"
    """Or one of GGUF's types."""

    @property
    def shape(self) -> Shape:
        """Of the values."""
        *lead, groups, _ = self.blocks
        return self.codes.shape if self.format != "MXFP4" else (*lead, groups * BLOCK_SIZE)

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return 1, self.shape[-1] // max(1, self.blocks[-2])

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors it consists of."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    def reader(self, rows: slice | None = None) -> Reader:
        """Return a reader of the tensor, or of some of its rows."""
        return PackedReader(self, rows)


class Reader:
    """Reads a tensor, or ``rows`` of its last axis but one: index `array`, then `load` the part that is needed.

    Attributes
    ----------
    array : BlockArray, or numpy.ndarray of a plain tensor
        The whole tensor, or its ``rows``: a view of the map, or of reserved memory that is never read.
    copies : bool
        Whether `load` reads into new memory, not from a map.
    ahead : int
        See `TensorFile.ahead`.
    """

    array: Any
    copies: bool
    ahead: int

    def views(self, index: Any) -> tuple[Shape, list[tuple[Any, BlockArray]]]:
        """Return what an index selects of `array`: its shape, and views of it by their places in the selection.

        It is one view, unless the index has lists or masks.
        """
        if index is None or not is_advanced(index):
            view = self.array[() if index is None else index]
            return view.shape, [((), view)]
        shape, pairs = basic_indices(full_index(index, self.array.ndim), self.array.shape)
        return shape, [(place, self.array[basic]) for place, basic in pairs]

    def load(self, part: Any) -> Any:
        """Return ``part``, any view of `array`, with its bytes in memory or in a map."""
        raise NotImplementedError

    def iter_chunks(self, max_bytes: int | str, dtype: DTypeLike = "bfloat16") -> Iterator[tuple[Any, Any]]:
        """Yield `array` in chunks as `BlockArray.iter_chunks` does, each loaded."""
        return self.load_each(self.array.iter_chunks(max_bytes, dtype))

    def load_each(self, views: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield places and views of `array`, each loaded; of remote files, the next ones meanwhile."""
        if not self.ahead:
            for place, view in views:
                yield place, self.load(view)
            return
        executor, waiting = ThreadPoolExecutor(self.ahead, "mxfp4np-ahead"), deque[tuple[Any, Future[Any]]]()
        try:
            for place, view in views:
                with starting_threads():
                    waiting.append((place, executor.submit(self.load, view)))
                if len(waiting) > self.ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


class PlainReader(Reader):
    """Reads a plain tensor, or ``rows`` of its last axis."""

    def __init__(self, tensor: StoredTensor, rows: slice | None = None) -> None:
        self._tensor = tensor
        self._memory, array = tensor.view()
        self.array = array if rows is None else array[..., rows]
        self.copies, self.ahead = tensor.file.io == "pread", tensor.file.ahead

    def load(self, part: Any) -> Any:
        """Return ``part``, any view of `array`, with its bytes in memory or in a map."""
        return self._tensor.file.read(self._tensor, self._memory, part)


class PackedReader(Reader):
    """Reads a tensor of MXFP4, or of one of GGUF's types."""

    def __init__(self, tensor: PackedTensor, rows: slice | None = None) -> None:
        codes, scales, layout = tensor.codes, tensor.scales, tensor.layout
        self._tensor = tensor
        self._codes = codes.file.view(codes)
        blocks = self._codes.reshape(tensor.blocks)
        if tensor.format != "MXFP4":
            self.array = GGUFArray(blocks, tensor.format)
        elif scales is None:
            self.array = MXFP4Array(blocks[..., 1:], blocks[..., 0], layout.order)
        else:
            self._scales = scales.file.view(scales)
            if layout.swizzled:
                ordered = unswizzle(scales.file.read(scales, self._scales, self._scales), tensor.blocks[:-1])
            else:
                ordered = self._scales.reshape(tensor.blocks[:-1])
            self.array = MXFP4Array(blocks, ordered, layout.order)
        if rows is not None:
            self.array = self.array[..., rows, :]
        self.copies, self.ahead = codes.file.io == "pread", codes.file.ahead

    def load(self, part: Any) -> Any:
        """Return ``part``, any view of `array`, with its bytes in memory or in a map, and its scales as E8M0."""
        codes, scales, layout = self._tensor.codes, self._tensor.scales, self._tensor.layout
        if isinstance(part, GGUFArray):
            return part.replace(codes.file.read(codes, self._codes, part.blocks))
        part_blocks, part_scales = part.blocks, part.scales
        if scales is not None:
            part_blocks = codes.file.read(codes, self._codes, part_blocks)
            if not layout.swizzled:
                part_scales = scales.file.read(scales, self._scales, part_scales)
        elif self.copies:  # scales and codes of a block in one read
            shape, strides = (*part_scales.shape, 1 + BYTES_PER_BLOCK), (*part_scales.strides, 1)
            both = np.lib.stride_tricks.as_strided(part_scales, shape, strides)
            both = codes.file.read(codes, self._codes, both)
            part_blocks, part_scales = both[..., 1:], both[..., 0]
        if layout.bias:
            part_scales = part_scales + np.uint8(layout.bias)  # modulo 256: the stored exponent is signed
        return part.replace(part_blocks, part_scales)


# Swizzled scales lie in tiles of 128 rows and 4 columns, as the tensor cores of NVIDIA's Blackwell read them. Byte
# 16 * r + 4 * q + c of a tile is the scale of its row 32 * q + r, column c. Tiles are stored in C order; rows and
# columns are padded to whole tiles. The source is cuBLAS's "1D block scaling factors layout"; torchao writes it.


def swizzled_shape(shape: Shape) -> Shape:
    """Return the shape in which torchao stores the swizzled form of ``[..., rows, columns]`` or ``[columns]`` scales.

    Examples
    --------
    >>> swizzled_shape((300, 9))
    (96, 48)
    """
    *lead, rows, columns = shape if len(shape) > 1 else (1, *shape)
    return (*lead, 32 * -(-rows // 128), 16 * -(-columns // 4))


def unswizzle(flat: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Return a copy of swizzled scales, in any shape, as rows and columns of this shape."""
    *lead, down, across = swizzled_shape(shape)
    # From [.., down, across, r, q, c] to [.., down, q, r, across, c].
    tiles = flat.reshape(*lead, down // 32, across // 16, 32, 4, 4)
    whole = np.moveaxis(tiles, (-2, -4), (-4, -2)).reshape(*lead, 4 * down, across // 4)
    *_, rows, columns = (1, *shape)
    return whole[..., :rows, :columns].reshape(shape)
