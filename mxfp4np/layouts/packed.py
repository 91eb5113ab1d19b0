"""Packed tensors of a known layout, and how they become an `MXFP4Array`: a view of the files, or read into memory.

Which layout a tensor has is decided by `resolve`; no value is decoded here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..array import MXFP4Array
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK
from ..storage.tensorfile import StoredTensor
from .swizzle import unswizzle
from .table import Layout, Shape


class PackedTensor(NamedTuple):
    """A logical tensor of a known layout: codes and scales of consistent shapes."""

    name: str
    layout: Layout
    codes: StoredTensor
    scales: StoredTensor | None
    """None if they are in the blocks."""
    blocks: Shape
    """``[..., G, bytes of a block]``."""
    reason: str
    """Why it has this layout; empty if nothing shows that it does."""

    @property
    def shape(self) -> Shape:
        """Of the values."""
        *lead, groups, _ = self.blocks
        return (*lead, groups * BLOCK_SIZE)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors it consists of."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)


class PackedReader:
    """Reads a packed tensor: index `array`, then `load` the part that is needed.

    Parameters
    ----------
    tensor : PackedTensor
    rows : slice, optional
        Of the last axis but one.

    Attributes
    ----------
    array : MXFP4Array
        The whole tensor, or its ``rows``: a view of the map, or of reserved memory that is never read.
    copies : bool
        Whether `load` reads into new memory, not from a map.
    """

    def __init__(self, tensor: PackedTensor, rows: slice | None = None) -> None:
        codes, scales, layout = tensor.codes, tensor.scales, tensor.layout
        self._tensor = tensor
        self._codes = codes.file.view(codes)
        blocks = self._codes.reshape(tensor.blocks)
        if scales is None:
            self.array = MXFP4Array(blocks[..., 1:], blocks[..., 0], layout.order)
        else:
            self._scales = scales.file.view(scales)
            if layout.swizzled:
                flat = scales.file.read(scales, self._scales, self._scales)
                ordered = unswizzle(flat, tensor.blocks[:-1])
            else:
                ordered = self._scales.reshape(tensor.blocks[:-1])
            self.array = MXFP4Array(blocks, ordered, layout.order)
        if rows is not None:
            self.array = self.array[..., rows, :]
        self.copies = codes.file.io == "pread"

    def load(self, part: MXFP4Array) -> MXFP4Array:
        """Return ``part``, any view of `array`, with its bytes in memory or in a map, and its scales as E8M0."""
        codes, scales, layout = self._tensor.codes, self._tensor.scales, self._tensor.layout
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
