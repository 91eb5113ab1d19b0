"""TransposedArray: a packed array with its last two axes swapped, for products such as ``x @ packed.T``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .format import DecodedDType
from .products import Factor, left_matmul, matmul
from .shapes import swapped

if TYPE_CHECKING:
    from .blocks import BlockArray


class TransposedArray(Factor):
    """A packed array with its last two axes swapped: what ``packed.T`` of a matrix is, and ``packed.mT``.

    Parameters
    ----------
    packed : BlockArray
        With two axes or more.

    Attributes
    ----------
    packed : BlockArray
        As given; also ``T`` of a matrix, and ``mT``.
    shape : tuple of int
    dtype : numpy.dtype
        bfloat16, as that of ``packed``.

    Raises
    ------
    ValueError
        If there are fewer than two axes.

    Examples
    --------
    >>> import numpy as np
    >>> from mxfp4np import encode
    >>> packed = encode(np.ones((2, 32), np.float32))
    >>> packed.T.shape
    (32, 2)
    >>> np.ones(32, np.float32) @ packed.T
    array([32., 32.], dtype=float32)
    """

    __slots__ = ("packed", "shape")

    def __init__(self, packed: BlockArray) -> None:
        self.packed = packed
        self.shape = swapped(packed.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """bfloat16."""
        return self.packed.dtype

    @property
    def T(self) -> BlockArray | NDArray[Any]:  # noqa: N802 - NumPy's name
        """Of a matrix the packed array itself; of other arrays the values, decoded, with all axes reversed."""
        return self.packed if self.ndim == 2 else self.decode().T

    @property
    def mT(self) -> BlockArray:  # noqa: N802 - NumPy's name
        """The packed array itself."""
        return self.packed

    def __repr__(self) -> str:
        return f"{self.packed!r}.mT"

    def __len__(self) -> int:
        return self.shape[0]

    def decode(self, dtype: DecodedDType | None = None, **options: Any) -> NDArray[Any]:
        """Return the values; see `mxfp4np.MXFP4Array.decode`."""
        return self.packed.decode(dtype, transpose=True, **options)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.ascontiguousarray(self.packed.__array__(dtype, copy).swapaxes(-1, -2))

    def __matmul__(self, x: Any) -> NDArray[Any]:
        return left_matmul(x, self.packed, swapped=True)

    def __rmatmul__(self, x: Any) -> NDArray[Any]:
        return matmul(self.packed, x, swapped=True)
