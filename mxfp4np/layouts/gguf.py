"""GGUFArray: tensors of GGUF's own types, decoded by the gguf package.

The package gives float32 values. It is slow, and needs memory for several copies of what it decodes, so that arrays are
decoded in chunks. It is imported only when it is needed.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..backends import backend_for
from ..backends.threads import check_num_threads
from ..blocks import BlockArray
from ..format import DecodedDType

CHUNK_BYTES: Final = 1 << 20
"""Bytes of float32 values that are decoded at a time."""


@functools.cache
def block_of(kind: str) -> tuple[int, int] | None:
    """Return the values and the bytes of a block of a type, None if the package does not decode it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        known = GGMLQuantizationType[kind]
        size, nbytes = GGML_QUANT_SIZES[known]
        dequantize(np.zeros((1, nbytes), np.uint8), known)
    except (KeyError, NotImplementedError):
        return None
    return size, nbytes


class GGUFArray(BlockArray):
    """An array of values of one of GGUF's types, still in blocks.

    Parameters
    ----------
    blocks : (..., G, bytes of a block) uint8
    kind : str
        The name of the type, for instance ``"Q8_0"``.
    """

    __slots__ = ("_block_size", "_kind")

    def __init__(self, blocks: NDArray[np.uint8], kind: str) -> None:
        self._blocks, self._kind, self._start = blocks, kind, 0
        block = block_of(kind)
        assert block is not None
        self._block_size = block[0]
        self._shape = (*blocks.shape[:-2], blocks.shape[-2] * self.block_size)

    @property
    def block_size(self) -> int:
        """Values of a block."""
        return self._block_size

    @property
    def format(self) -> str:
        """The name of the type."""
        return self._kind

    def _of_blocks(self, span: tuple[Any, ...]) -> GGUFArray:
        return GGUFArray(self.blocks[span], self._kind)

    def replace(self, blocks: NDArray[np.uint8]) -> GGUFArray:
        """Return the same view of another array, which has the same shape."""
        return self._cut(GGUFArray(blocks, self._kind), self.start, self.shape)

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
        """Return the values: those of the package, rounded once. They are decoded on the host, in this thread."""
        check_num_threads(num_threads)
        impl = backend_for(self.blocks, out, backend, device)
        out, target = self.prepare_out(dtype, out, transpose=transpose, impl=impl)
        for index, chunk in self.iter_chunks(CHUNK_BYTES, "float32"):
            with np.errstate(over="ignore"):  # too large for float16 is infinity
                impl.store(chunk._values(), target[index])  # noqa: SLF001
        return out

    def _values(self) -> NDArray[np.float32]:
        from gguf import GGMLQuantizationType, dequantize

        blocks = np.ascontiguousarray(self.blocks)
        with np.errstate(all="ignore"):  # any bytes may be there
            # As one row: the package decodes 16 rows at a time, which takes fifteen times as long if they are short.
            values = dequantize(blocks.reshape(1, -1), GGMLQuantizationType[self._kind])
        rows: NDArray[np.float32] = values.reshape(*blocks.shape[:-2], -1)
        return rows[..., self.start : self.start + self.shape[-1]]
