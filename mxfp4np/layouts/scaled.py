"""Tensors of FP8, MXFP8 and NVFP4: which tile of values shares a scale, and how they become a `ScaledArray`.

`others` finds codes and scales by their names, and names their format. Here their shapes are checked against each
other: what fits no reading is refused, and so is what fits two.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import LayoutError
from ..format import FLOAT8, dtype_named
from ..scaled import ScaledArray
from ..storage.tensorfile import DTYPES, StoredTensor
from .find import Documents
from .packed import Reader, swizzled_shape, unswizzle
from .table import ScaledLayout, Shape

DECODED: Final = ("FP8", "MXFP8", "NVFP4")
"""Formats that are decoded here."""

GROUPS: Final = {"MXFP8": 32, "NVFP4": 16}
"""Values along a row that share a scale."""

TILE: Final = (128, 128)
"""Values that share a scale of FP8, if no document says otherwise."""


class ScaledTensor(NamedTuple):
    """A logical tensor of codes and scales of consistent shapes."""

    layout: ScaledLayout
    codes: StoredTensor
    scales: StoredTensor
    second: StoredTensor | None
    format: str
    shape: Shape
    """Of the values."""
    tile: tuple[int, int]
    reason: str
    swizzled: bool = False
    transposed: bool = False
    """Whether codes and scales are stored transposed, ``[.., in, out]``."""
    high_first: bool = False
    """Whether the high four bits of a byte come first."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors it consists of."""
        return (self.codes, self.scales) if self.second is None else (self.codes, self.scales, self.second)

    def reader(self, rows: slice | None = None) -> Reader:
        """Return a reader of the tensor, or of some of its rows."""
        return ScaledReader(self, rows)

    @property
    def element(self) -> str:
        """The format of the codes; see `mxfp4np.format.ELEMENTS`."""
        if self.format == "NVFP4":
            return "E2M1"
        return self.codes.dtype.removeprefix("F8_") if self.codes.dtype.startswith("F8_") else "E4M3"

    @property
    def scales_shape(self) -> Shape:
        """The shape of the scales, a scale for a tile."""
        *lead, rows, columns = self.shape
        return (*lead, -(-rows // self.tile[0]), -(-columns // self.tile[1]))

    @property
    def scales_dtype(self) -> np.dtype[Any]:
        """The type of the scales: bytes may hold E8M0 or, of NVFP4, E4M3."""
        if self.format == "NVFP4":
            return dtype_named(FLOAT8[0])
        name = DTYPES[self.scales.dtype][1]
        return dtype_named("uint8" if name == "float8_e8m0fnu" else name)


class ScaledCandidate(NamedTuple):
    """Codes and what lies beside them, by their names; shapes are not checked yet."""

    layout: ScaledLayout
    format: str
    codes: StoredTensor
    scales: StoredTensor
    second: StoredTensor | None
    high_first: bool

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        return (self.codes, self.scales) if self.second is None else (self.codes, self.scales, self.second)

    def resolve(self, documents: Documents) -> ScaledTensor:
        """Return the tensor with the tile that shares a scale.

        Raises
        ------
        LayoutError
            If a second scale is missing, or if shapes fit no reading, or several.
        """
        if self.layout.needs_second and self.format == "NVFP4" and self.second is None:
            stem = self.codes.name.removesuffix(self.layout.codes)
            raise LayoutError(
                f"{self.codes.file.path}: tensor {self.codes.name!r} is NVFP4: expected its second scale "
                f"{stem + self.layout.second!r}, found none; open the folder that holds all shards"
            )
        readings = self._readings(documents)
        if len(readings) != 1:
            shape, scales = list(self.codes.shape), list(self.scales.shape)
            found = " or ".join(f"one for {list(x.tile)} values" for x in readings) or "no tile that fits"
            raise LayoutError(
                f"{self.scales.file.path}: tensor {self.scales.name!r}: expected scales {self.scales.dtype} for "
                f"{self.format} codes {shape} of {self.codes.name!r}, found shape {scales}: {found}"
            )
        return readings[0]

    def _readings(self, documents: Documents) -> list[ScaledTensor]:
        """Return the readings that the shapes fit, without those that mean the same."""
        codes = self.codes.byte_shape
        if len(codes) < 2:
            return []
        *lead, rows, nbytes = codes
        reason = f"suffix pair, {'/'.join(x.dtype for x in self.stored)}"
        common = {"high_first": self.high_first, "reason": reason}
        found: list[ScaledTensor] = []
        if self.format in GROUPS:
            tile, columns = (1, GROUPS[self.format]), nbytes * (2 if self.format == "NVFP4" else 1)
            plain = (*lead, rows, -(-columns // tile[1]))
            flat = math.prod(swizzled_shape(plain)), math.prod(self.scales.shape)
            is_swizzled = self.high_first or documents.is_swizzled(self.logical) or self.scales.shape != plain
            if self.scales.shape == plain or (is_swizzled and flat[0] == flat[1] and not lead):
                found.append(self._tensor((*lead, rows, columns), tile, swizzled=is_swizzled, **common))
            turned = (*lead, 2 * rows // tile[1], nbytes)
            if self.format == "NVFP4" and self.scales.shape == turned and (2 * rows) % tile[1] == 0:
                found.append(self._tensor((*lead, nbytes, 2 * rows), tile, transposed=True, **common))
            return found
        shape = (*lead, rows, nbytes)
        for tile in self._tiles(shape, documents):
            same = min(tile[0], rows), min(tile[1], nbytes)
            if not any(same == x.tile for x in found):
                found.append(self._tensor(shape, same, **common))
        return found

    @property
    def logical(self) -> str:
        """The logical name."""
        return self.codes.name.removesuffix(self.layout.codes) + self.layout.weight

    def _tensor(self, shape: Shape, tile: tuple[int, int], **options: Any) -> ScaledTensor:
        return ScaledTensor(self.layout, self.codes, self.scales, self.second, self.format, shape, tile, **options)

    def _tiles(self, shape: Shape, documents: Documents) -> list[tuple[int, int]]:
        """Return the tiles of FP8 whose scales have this shape."""
        *lead, rows, columns = shape
        scales = self.scales.shape
        if len(scales) == len(shape) + 2 and scales[-3] == scales[-1] == 1:  # ModelOpt's blocks: [.., N, 1, K, 1]
            scales = (*lead, scales[-4], scales[-2])
        fits = {
            (rows, columns): math.prod(scales) in (1, math.prod(lead)) and (math.prod(scales) == 1 or bool(lead)),
            (1, columns): scales in ((*lead, rows), (*lead, rows, 1)),
        }
        for tile in documents.tiles or [TILE]:
            fits.setdefault(tile, scales == (*lead, -(-rows // tile[0]), -(-columns // tile[1])))
        return [tile for tile, fit in fits.items() if fit]


class ScaledReader(Reader):
    """Reads a tensor of codes and scales."""

    def __init__(self, tensor: ScaledTensor, rows: slice | None = None) -> None:
        self._tensor = tensor
        codes, scales = tensor.codes, tensor.scales
        self._codes = codes.file.view(codes)
        viewed = self._codes.reshape(codes.byte_shape)
        self._scales: NDArray[Any] | None = None
        if tensor.tile[0] == 1 and not tensor.swizzled and tensor.format in GROUPS:
            self._scales = scales.file.view(scales)
            ordered = self._scales.view(tensor.scales_dtype).reshape(scales.shape)
        else:  # few, or to be reordered
            flat = scales.file.read(scales, view := scales.file.view(scales), view)
            if tensor.swizzled:
                flat = unswizzle(flat, tensor.scales_shape)
            ordered = np.broadcast_to(flat.view(tensor.scales_dtype).reshape(self._expanded(flat)), tensor.scales_shape)
        if tensor.transposed:
            viewed, ordered = viewed.swapaxes(-1, -2), ordered.swapaxes(-1, -2)
        second = None if tensor.second is None else np.asarray(tensor.second.array(), np.float32)
        if second is not None:
            second = second.reshape(()) if second.size == 1 else second.reshape(*tensor.shape[:-2], 1, 1)
        self.array = ScaledArray(viewed, ordered, tensor.element, tensor.tile, second, divide=tensor.layout.divide)
        if rows is not None:
            self.array = self.array[..., rows, :]
        self.copies = codes.file.io == "pread"

    def _expanded(self, flat: NDArray[Any]) -> Shape:
        """Return a shape for the stored scales that broadcasts to one scale for a tile."""
        expected = self._tensor.scales_shape
        count = flat.nbytes // self._tensor.scales_dtype.itemsize
        if count == math.prod(expected):
            return expected
        return (1,) * len(expected) if count == 1 else (*expected[:-2], 1, 1)

    def load(self, part: ScaledArray) -> ScaledArray:
        """Return ``part``, any view of `array`, with its bytes in memory or in a map."""
        tensor, codes, scales = self._tensor, part.blocks, part.scales
        axes = (-1, -2) if tensor.transposed else (-1, -1)  # as they are stored
        codes = tensor.codes.file.read(tensor.codes, self._codes, codes.swapaxes(*axes)).swapaxes(*axes)
        if self._scales is not None:
            scales = tensor.scales.file.read(tensor.scales, self._scales, scales.swapaxes(*axes)).swapaxes(*axes)
        if tensor.high_first:
            codes = (codes << np.uint8(4)) | (codes >> np.uint8(4))
        return part.replace(codes, scales)
