"""Swizzled scales: tiles of 128 rows and 4 columns, as the tensor cores of NVIDIA's Blackwell read them.

Byte ``16 * r + 4 * q + c`` of a tile is the scale of its row ``32 * q + r``, column ``c``. Tiles are stored in C order;
rows and columns are padded to whole tiles. The source is cuBLAS's "1D block scaling factors layout"; torchao writes it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]


def swizzled_shape(shape: Shape) -> Shape:
    """Return the shape in which torchao stores the swizzled form of ``[..., rows, columns]`` or ``[columns]`` scales.

    Examples
    --------
    >>> swizzled_shape((300, 9))
    (96, 48)
    """
    *lead, rows, columns = _at_least_2d(shape)
    return (*lead, 32 * -(-rows // 128), 16 * -(-columns // 4))


def unswizzle(flat: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Return a copy of swizzled scales in rows and columns.

    Parameters
    ----------
    flat : array of uint8
        As many bytes as `swizzled_shape` has, in any shape.
    shape : tuple of int
        Of the result.
    """
    *lead, rows, columns = _at_least_2d(shape)
    down, across = -(-rows // 128), -(-columns // 4)
    # From [.., down, across, r, q, c] to [.., down, q, r, across, c].
    tiles = flat.reshape(*lead, down, across, 32, 4, 4)
    whole = np.moveaxis(tiles, (-2, -4), (-4, -2)).reshape(*lead, 128 * down, 4 * across)
    return whole[..., :rows, :columns].reshape(shape)


def _at_least_2d(shape: Shape) -> Shape:
    return (1, *shape) if len(shape) == 1 else shape
