"""TensorInfo: what is known of a tensor from the headers alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.typing import DTypeLike

from .format import decoded_dtype
from .storage.tensorfile import StoredTensor


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

    @property
    def nbytes(self) -> int:
        """Bytes in the files; of the whole tensor if the name stands for half of its rows."""
        return sum(tensor.nbytes for tensor in self.stored)

    def decoded_nbytes(self, dtype: DTypeLike = "bfloat16") -> int:
        """Return the bytes of the decoded array; for a plain tensor, those in the files."""
        return self.nbytes if self.layout is None else math.prod(self.shape) * decoded_dtype(dtype).itemsize
