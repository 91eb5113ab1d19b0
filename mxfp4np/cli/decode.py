"""What ``mxfp4np decode`` writes: tensors of a checkpoint, or a part of each, decoded to one file in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..array import MXFP4Array
from ..checkpoint import Checkpoint
from ..format import as_dtype, decoded_dtype
from ..shapes import split
from ..storage.safetensors import atomic_file, bytes_of, write_safetensors
from ..storage.tensorfile import SAFETENSORS_DTYPES

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes in memory at a time."""


class _Source:
    """One tensor to be written: its final shape and dtype, and its values in chunks."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: DTypeLike | None, index: Any) -> None:
        array = checkpoint.get(name) if checkpoint.info(name).layout is None else checkpoint.packed(name)
        if index is not None:
            array = array[index]
        self._array = array if isinstance(array, MXFP4Array) else np.asarray(array)
        self.shape: tuple[int, ...] = self._array.shape
        if isinstance(self._array, MXFP4Array):
            self.dtype = decoded_dtype("bfloat16" if dtype is None else dtype)
        else:
            self.dtype = self._array.dtype if dtype is None else as_dtype(dtype)
            if self._array.dtype.kind == "c" and self.dtype.kind != "c":
                raise ValueError(f"tensor {name!r}: complex values cannot become {self.dtype}")

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Yield the values in C order."""
        if isinstance(self._array, MXFP4Array):
            for _, chunk in self._array.chunks(CHUNK_BYTES, self.dtype):
                yield chunk.decode(self.dtype)
        else:
            for index in split(self.shape, self.dtype.itemsize, CHUNK_BYTES):
                yield np.ascontiguousarray(self._array[index], dtype=self.dtype)


class Selection:
    """Tensors of a checkpoint, or the same part of each, to be written decoded to one file.

    Parameters
    ----------
    checkpoint : Checkpoint
        Opened with ``io="mmap"``.
    names : sequence of str
        Logical names.
    dtype : str, type or numpy.dtype, optional
        As for `Checkpoint.get`.
    index : optional
        A basic index, applied to every tensor.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Sequence[str], *, dtype: DTypeLike | None = None, index: Any = None
    ) -> None:
        sources = {name: _Source(checkpoint, name, dtype, index) for name in names}
        # Widest elements first, so that every tensor is aligned.
        self._sources = dict(sorted(sources.items(), key=lambda item: -item[1].dtype.itemsize))
        self._files = checkpoint.files

    @property
    def nbytes(self) -> int:
        """Bytes of decoded data."""
        return sum(math.prod(source.shape) * source.dtype.itemsize for source in self._sources.values())

    def write(self, path: Path, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write a ``.safetensors`` or ``.npy`` file, which appears when it is complete.

        Parameters
        ----------
        path : Path
            Must not be one of the checkpoint's own files. ``.npy`` holds one tensor, and not bfloat16.
        progress : callable
            Called with the number of bytes written since the last call.

        Raises
        ------
        ValueError
            If the file cannot hold what was selected.
        """
        if path.exists() and any(path.samefile(file) for file in self._files):
            raise ValueError(f"{path}: is part of the checkpoint that is being read: choose another name")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder: expected the name of a file")
        if path.suffix == ".safetensors":
            specs = {
                name: (SAFETENSORS_DTYPES[source.dtype.name], source.shape) for name, source in self._sources.items()
            }
            write_safetensors(path, specs, self._chunks(progress), {"format": "pt"})
        elif path.suffix == ".npy":
            self._write_npy(path, progress)
        else:
            raise ValueError(f"{path}: expected a name that ends in .safetensors or .npy")

    def _chunks(self, progress: Callable[[int], object]) -> Iterator[NDArray[Any]]:
        for source in self._sources.values():
            for chunk in source.chunks():
                yield chunk
                progress(chunk.nbytes)

    def _write_npy(self, path: Path, progress: Callable[[int], object]) -> None:
        if len(self._sources) != 1:
            raise ValueError(f"{path}: a .npy file holds one tensor, not {len(self._sources)}: use .safetensors")
        (source,) = self._sources.values()
        if source.dtype.isbuiltin != 1:  # 2 for the types of ml_dtypes
            raise ValueError(
                f"{path}: the .npy format cannot name {source.dtype}: use --dtype float32, or .safetensors"
            )
        with atomic_file(path) as file:
            header = {"descr": source.dtype.str, "fortran_order": False, "shape": source.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in self._chunks(progress):
                file.write(bytes_of(chunk))
