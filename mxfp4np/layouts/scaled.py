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
from ..format import BLOCK_SIZE, FLOAT8, dtype_named
from ..scaled import ScaledArray
from ..storage.tensorfile import DTYPES, StoredTensor
from .find import Documents
from .packed import Reader, swizzled_shape, unswizzle
from .table import METADATA, ScaledLayout, Shape

DECODED: Final = ("FP8", "MXFP8", "NVFP4")
"""Formats that are decoded here."""

GROUPS: Final = {"MXFP8": 32, "NVFP4": 16}
"""Values along a row that share a scale."""

TILE: Final = (128, 128)
"""Values that share a scale of FP8, if no document says otherwise."""

FLOATS: Final = ("F32", "BF16", "F16")
"""Dtypes of scales that are numbers."""

SCALES: Final = {"FP8": (*FLOATS, "F8_E8M0", "U8"), "MXFP8": ("F8_E8M0", "U8"), "NVFP4": ("F8_E4M3", "U8")}
"""Dtypes of the scales of each format."""


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
    def unit(self) -> tuple[int, int]:
        """Rows and columns of a tile; see `TensorInfo`."""
        (rows, columns), shape = self.tile, self.shape
        wide = self.format not in GROUPS and columns >= shape[-1]
        return 1 if rows >= shape[-2] else rows, BLOCK_SIZE if wide else columns

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
    comfyui: bool
    """Whether ComfyUI wrote it: scales are swizzled, and the high four bits of a byte come first."""
    rivals: list[str]
    """Names of other tensors that could be the scales."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        return (self.codes, self.scales) if self.second is None else (self.codes, self.scales, self.second)

    def resolve(self, documents: Documents) -> ScaledTensor:
        """Return the tensor with the tile that shares a scale.

        Raises
        ------
        LayoutError
            If dtypes do not fit, if a second scale is missing, or if shapes fit no reading, or several.
        """
        self._check(documents)
        readings = self._of_groups(documents) if self.format in GROUPS else self._of_tiles(documents)
        if len(readings) != 1:
            if readings:
                fits = " and ".join(f"{x.tile[0]} x {x.tile[1]}" for x in readings)
                found = f"{list(self.scales.shape)}, which fits tiles of {fits} values"
            else:
                found = f"{list(self.scales.shape)}{self._advice(documents)}"
            raise self._mismatch(self.scales, f"{self._expected(documents)}", found)
        return readings[0]

    def _check(self, documents: Documents) -> None:
        """Check what does not depend on how the shapes are read."""
        if self.rivals:
            names = " or ".join(map(repr, (self.scales.name, *self.rivals)))
            raise self._mismatch(self.codes, "one tensor of scales", f"that it could be {names}")
        if self.scales.dtype not in SCALES[self.format]:
            expected = " or ".join(SCALES[self.format])
            raise self._mismatch(self.scales, f"dtype {expected}, for {self.format}", self.scales.dtype)
        if self.format != "NVFP4":
            return
        said = documents.values(METADATA, self.logical, "_tensor_data_names")  # torchao's
        if self.second is None and (self.layout.needs_second or "per_tensor_scale" in said):
            name = self.codes.name.removesuffix(self.layout.codes) + self.layout.second
            raise self._mismatch(
                self.codes, f"{name!r}, the second scale of NVFP4", "none; open the folder that holds all shards"
            )
        if self.second is not None and self.second.dtype not in FLOATS:
            raise self._mismatch(self.second, f"dtype {' or '.join(FLOATS)}", self.second.dtype)
        if self.second is not None and math.prod(self.second.shape) not in (1, math.prod(self.codes.shape[:-2])):
            lead = list(self.codes.shape[:-2])
            raise self._mismatch(self.second, f"one value, or shape {lead}", f"shape {list(self.second.shape)}")

    def _expected(self, documents: Documents) -> str:
        """Return which shapes the scales could have, in words."""
        if self.format in GROUPS:
            return f"a scale for {GROUPS[self.format]} values of each row of {list(self.codes.shape)}"
        tiles = " or ".join(f"{rows} x {columns}" for rows, columns in documents.tiles or [TILE])
        said = ", as config.json says," if documents.tiles else ""
        return f"one scale for the tensor, for each row, or for {tiles} values{said} of {list(self.codes.shape)}"

    def _advice(self, documents: Documents) -> str:
        """Return what to do about scales of tiles whose size nothing says."""
        if self.format in GROUPS or documents.tiles:
            return ""
        return ": if a scale is for other tiles, put the config.json with their 'weight_block_size' beside the file"

    def _mismatch(self, tensor: StoredTensor, expected: str, found: str) -> LayoutError:
        return LayoutError(f"{tensor.file.path}: tensor {tensor.name!r}: expected {expected}, found {found}")

    def _of_groups(self, documents: Documents) -> list[ScaledTensor]:
        """Return the readings that the shapes fit, of a format whose scales are for groups along a row."""
        *lead, rows, nbytes = self.codes.byte_shape
        size = GROUPS[self.format]
        found: list[ScaledTensor] = []
        if not self.layout.transposed:
            columns = nbytes * 2 if self.format == "NVFP4" else nbytes
            plain = (*lead, rows, -(-columns // size))
            said = self.comfyui or documents.is_swizzled(self.logical)
            is_plain = self.scales.shape == plain and said is not True
            if is_plain or (self.scales.shape in _swizzled_shapes(plain) and said is not False):
                found.append(self._tensor((*lead, rows, columns), (1, size), swizzled=not is_plain))
        if self.format == "NVFP4" and is_transposed(self.codes, self.scales):
            found.append(self._tensor((*lead, nbytes, 2 * rows), (1, size), transposed=True))
        return found

    def _of_tiles(self, documents: Documents) -> list[ScaledTensor]:
        """Return the readings that the shapes fit, without those that mean the same."""
        *_, rows, columns = shape = self.codes.shape
        tiles = dict.fromkeys((max(1, min(a, rows)), max(1, min(b, columns))) for a, b in self._tiles(shape, documents))
        return [self._tensor(shape, tile) for tile in tiles]

    @property
    def logical(self) -> str:
        """The logical name."""
        return self.codes.name.removesuffix(self.layout.codes) + self.layout.weight

    def _tensor(self, shape: Shape, tile: tuple[int, int], **options: Any) -> ScaledTensor:
        reason = f"suffix pair, {'/'.join(x.dtype for x in self.stored)}"
        high_first = self.comfyui and self.format == "NVFP4"
        return ScaledTensor(
            self.layout,
            self.codes,
            self.scales,
            self.second,
            self.format,
            shape,
            tile,
            reason,
            high_first=high_first,
            **options,
        )

    def _tiles(self, shape: Shape, documents: Documents) -> list[tuple[int, int]]:
        """Return the tiles of FP8 whose scales have this shape."""
        *lead, rows, columns = shape
        scales = self.scales.shape
        if len(scales) == len(shape) + 2 and scales[-3] == scales[-1] == 1:  # ModelOpt's blocks: [.., N, 1, K, 1]
            scales = (*lead, scales[-4], scales[-2])
        found: list[tuple[int, int]] = []
        if math.prod(scales) == 1 or (lead and math.prod(scales) == math.prod(lead)):
            found.append((rows, columns))
        if scales in ((*lead, rows), (*lead, rows, 1)):
            found.append((1, columns))
        if len(scales) == len(shape):
            tiles = documents.tiles or [TILE]
            found += [x for x in tiles if scales == (*lead, -(-rows // x[0]), -(-columns // x[1]))]
        return found


def is_transposed(codes: StoredTensor, scales: StoredTensor) -> bool:
    """Tell whether NVFP4 is packed along the axis before the last, ``[.., in / 2, out]``, by its shapes."""
    *lead, rows, columns = (1, *codes.byte_shape)
    return (1, *scales.shape) == (*lead, 2 * rows // GROUPS["NVFP4"], columns) and 2 * rows % GROUPS["NVFP4"] == 0


def _swizzled_shapes(plain: Shape) -> tuple[Shape, Shape]:
    """Return the shapes in which torchao and ComfyUI store swizzled scales."""
    *lead, down, across = swizzled_shape(plain)
    return (*lead, down, across), (*lead, 4 * down, across // 4)


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
        self.copies, self.ahead = codes.file.io == "pread", codes.file.ahead

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
        axes = (-1, -2) if tensor.transposed and codes.ndim > 1 else (-1, -1)  # as they are stored
        codes = tensor.codes.file.read(tensor.codes, self._codes, codes.swapaxes(*axes)).swapaxes(*axes)
        if self._scales is not None:
            scales = tensor.scales.file.read(tensor.scales, self._scales, scales.swapaxes(*axes)).swapaxes(*axes)
        if tensor.high_first:
            codes = (codes << np.uint8(4)) | (codes >> np.uint8(4))
        return part.replace(codes, scales)
