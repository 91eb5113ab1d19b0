"""What ``mxfp4np decode`` writes: tensors of a checkpoint, or a part of each, decoded to one file in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..blocks import BlockArray
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..format import as_dtype, decoded_dtype
from ..layouts.table import wants_transpose
from ..shapes import full_index, split, split_both, swapped
from ..storage.atomic import atomic_file
from ..storage.named import named
from ..storage.safetensors import bytes_of, write_safetensors
from ..storage.tensorfile import SAFETENSORS_DTYPES

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes in memory at a time."""


class Selection:
    """Tensors of a checkpoint, or the same part of each, to be written decoded to one file.

    ``names`` are logical names, ``dtype`` is that of `Checkpoint.get`, and ``index`` a basic index that is applied to
    every tensor. ``transpose`` means what it means for `convert`: packed tensors are transposed, after they are
    indexed. ``nbytes`` counts the bytes of decoded data.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Sequence[str],
        *,
        dtype: DTypeLike | None = None,
        index: Any = None,
        transpose: str = "no",
    ) -> None:
        tensors = {name: _selected(checkpoint, name, dtype, index, transpose) for name in names}
        # Widest elements first, so that every tensor is aligned.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        self._checkpoint = checkpoint
        self.nbytes = sum(tensor.array.size * tensor.dtype.itemsize for tensor in self._tensors.values())

    def write(self, path: Path, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write a ``.safetensors`` or ``.npy`` file, which appears when it is complete.

        A ``.npy`` file holds one tensor, and not bfloat16. ``progress`` is called with the number of bytes written
        since the last call.
        """
        with named(path, "written"):
            if path.exists() and any(isinstance(x, Path) and path.samefile(x) for x in self._checkpoint.files):
                raise ValueError(f"{path}: is part of the checkpoint that is being read: choose another name")
            if path.is_dir():
                raise ValueError(f"{path}: is a folder: expected the name of a file")
        if path.suffix == ".safetensors":
            specs = {
                name: (SAFETENSORS_DTYPES[tensor.dtype.name], tensor.shape) for name, tensor in self._tensors.items()
            }
            write_safetensors(path, specs, self._chunks(progress), {"format": "pt"})
        elif path.suffix == ".npy":
            self._write_npy(path, progress)
        else:
            raise ValueError(f"{path}: expected a name that ends in .safetensors or .npy")

    def _write_npy(self, path: Path, progress: Callable[[int], object]) -> None:
        if len(self._tensors) != 1:
            raise ValueError(f"{path}: a .npy file holds one tensor, not {len(self._tensors)}: use .safetensors")
        ((*_, dtype, shape, _),) = self._tensors.values()
        if dtype.isbuiltin != 1:  # 2 for the types of ml_dtypes
            raise ValueError(f"{path}: the .npy format cannot name {dtype}: use --dtype float32, or .safetensors")
        with atomic_file(path) as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in self._chunks(progress):
                file.write(bytes_of(chunk))

    def _chunks(self, progress: Callable[[int], object]) -> Iterator[NDArray[Any]]:
        """Yield the values of all tensors in C order."""
        for load, array, dtype, _, transpose in self._tensors.values():
            if isinstance(array, BlockArray):
                size = array.multiple
                pairs = split_both(array.shape, dtype.itemsize, CHUNK_BYTES, transpose=transpose, multiple=size)
                chunks = (load(array[stored]).decode(dtype, transpose=transpose) for _, stored in pairs)
            else:
                indices = split(array.shape, dtype.itemsize, CHUNK_BYTES)
                chunks = (np.ascontiguousarray(load(array[(*index, ...)]), dtype=dtype) for index in indices)
            for chunk in chunks:
                yield chunk
                progress(chunk.nbytes)
        for path in self._checkpoint.changed_files():
            raise CheckpointError(f"{path}: was replaced or changed while it was read: decode it again")


class _Selected(NamedTuple):
    """A tensor, or a part of it, as it is stored, and what loads it; and the dtype and shape to write it in."""

    load: Callable[[Any], Any]
    array: BlockArray | NDArray[Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    transpose: bool


def _selected(checkpoint: Checkpoint, name: str, dtype: DTypeLike | None, index: Any, transpose: str) -> _Selected:
    info = checkpoint.info(name)
    info.check_values(dtype)
    layout = info.layout
    reader = checkpoint.reader(name)
    array = reader.array
    if isinstance(array, BlockArray):
        array = array if index is None else array[index]
        transposed = wants_transpose(layout, array.shape, transpose)
        shape = swapped(array.shape) if transposed else array.shape
        return _Selected(reader.load, array, decoded_dtype("bfloat16" if dtype is None else dtype), shape, transposed)
    if index is not None:
        array = array[(*full_index(index, array.ndim), ...)]  # a view, of a single value too
    wanted = array.dtype if dtype is None else as_dtype(dtype)
    if array.dtype.kind == "c" and wanted.kind != "c":
        raise ValueError(f"tensor {name!r}: complex values cannot become {wanted}")
    return _Selected(reader.load, array, wanted, array.shape, False)
