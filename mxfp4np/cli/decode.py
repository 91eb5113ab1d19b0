"""What ``mxfp4np decode`` writes: tensors of a checkpoint, or a part of each, decoded to one file in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..blocks import BlockArray
from ..checkpoint import Checkpoint
from ..format import as_dtype, decoded_dtype
from ..shapes import split
from ..storage.safetensors import atomic_file, bytes_of, write_safetensors
from ..storage.tensorfile import SAFETENSORS_DTYPES

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes in memory at a time."""


class Selection:
    """Tensors of a mapped checkpoint, or the same part of each, to be written decoded to one file.

    ``names`` are logical names, ``dtype`` is that of `Checkpoint.get`, and ``index`` a basic index that is applied to
    every tensor. ``nbytes`` counts the bytes of decoded data.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Sequence[str], *, dtype: DTypeLike | None = None, index: Any = None
    ) -> None:
        tensors = {name: _stored(checkpoint, name, dtype, index) for name in names}
        # Widest elements first, so that every tensor is aligned.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))
        self._files = checkpoint.files
        self.nbytes = sum(array.size * dtype.itemsize for array, dtype in self._tensors.values())

    def write(self, path: Path, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write a ``.safetensors`` or ``.npy`` file, which appears when it is complete.

        A ``.npy`` file holds one tensor, and not bfloat16. ``progress`` is called with the number of bytes written
        since the last call.
        """
        if path.exists() and any(path.samefile(file) for file in self._files):
            raise ValueError(f"{path}: is part of the checkpoint that is being read: choose another name")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder: expected the name of a file")
        if path.suffix == ".safetensors":
            specs = {
                name: (SAFETENSORS_DTYPES[dtype.name], array.shape) for name, (array, dtype) in self._tensors.items()
            }
            write_safetensors(path, specs, self._chunks(progress), {"format": "pt"})
        elif path.suffix == ".npy":
            self._write_npy(path, progress)
        else:
            raise ValueError(f"{path}: expected a name that ends in .safetensors or .npy")

    def _write_npy(self, path: Path, progress: Callable[[int], object]) -> None:
        if len(self._tensors) != 1:
            raise ValueError(f"{path}: a .npy file holds one tensor, not {len(self._tensors)}: use .safetensors")
        ((array, dtype),) = self._tensors.values()
        if dtype.isbuiltin != 1:  # 2 for the types of ml_dtypes
            raise ValueError(f"{path}: the .npy format cannot name {dtype}: use --dtype float32, or .safetensors")
        with atomic_file(path) as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in self._chunks(progress):
                file.write(bytes_of(chunk))

    def _chunks(self, progress: Callable[[int], object]) -> Iterator[NDArray[Any]]:
        """Yield the values of all tensors in C order."""
        for array, dtype in self._tensors.values():
            if isinstance(array, BlockArray):
                chunks = (chunk.decode(dtype) for _, chunk in array.iter_chunks(CHUNK_BYTES, dtype))
            else:
                indices = split(array.shape, dtype.itemsize, CHUNK_BYTES)
                chunks = (np.ascontiguousarray(array[index], dtype=dtype) for index in indices)
            for chunk in chunks:
                yield chunk
                progress(chunk.nbytes)


def _stored(
    checkpoint: Checkpoint, name: str, dtype: DTypeLike | None, index: Any
) -> tuple[BlockArray | NDArray[Any], np.dtype[Any]]:
    """Return a tensor, or a part of it, as it is stored, and the dtype to write it in."""
    info = checkpoint.info(name)
    info.check_values(dtype)
    packed = info.layout is not None
    array = checkpoint.blocks(name) if packed else checkpoint.get(name)
    if index is not None:
        array = array[index]
    if packed:
        return array, decoded_dtype("bfloat16" if dtype is None else dtype)
    array = np.asarray(array)
    wanted = array.dtype if dtype is None else as_dtype(dtype)
    if array.dtype.kind == "c" and wanted.kind != "c":
        raise ValueError(f"tensor {name!r}: complex values cannot become {wanted}")
    return array, wanted
