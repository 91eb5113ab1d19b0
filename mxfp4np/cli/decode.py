"""What ``mxfp4np decode`` writes: tensors of a checkpoint, or a part of each, decoded to one file in bounded memory."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, NamedTuple

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
from ..storage.safetensors import bytes_of, header_bytes
from ..storage.tensorfile import SAFETENSORS_DTYPES

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes in memory at a time."""


MAX_MEMBER: Final = 60_000
"""Most bytes of a name in a .npz file, which is a ZIP archive."""

FORMATS: Final = ("safetensors", "npy", "npz")


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

    def write(self, path: Path, progress: Callable[[int], object] = lambda _: None, format_: str | None = None) -> None:
        """Write a file, which appears when it is complete; ``format_`` is one of `FORMATS`, by default as it is called.

        A ``.npy`` file holds one tensor, and neither it nor ``.npz`` bfloat16. ``progress`` is called with the number
        of bytes written since the last call.
        """
        with named(path, "written"):
            if path.exists() and any(isinstance(x, Path) and path.samefile(x) for x in self._checkpoint.files):
                raise ValueError(f"{path}: is part of the checkpoint that is being read: choose another name")
            if path.is_dir():
                raise ValueError(f"{path}: is a folder: expected the name of a file")
        format_ = format_ or path.suffix.removeprefix(".")
        if format_ not in FORMATS:
            raise ValueError(f"{path}: expected a name that ends in .safetensors, .npy or .npz, or --format")
        self._check(path, format_)
        with atomic_file(path) as file:
            self._write(file, path, format_, progress)

    def write_to(self, file: BinaryIO, progress: Callable[[int], object], format_: str) -> None:
        """Write to a stream that need not be seekable; see `write`."""
        self._check("standard output", format_)
        self._write(file, "standard output", format_, progress)

    def _check(self, path: Path | str, format_: str) -> None:
        """Refuse what a format cannot hold."""
        if format_ == "safetensors":
            return
        if format_ == "npy" and len(self._tensors) != 1:
            raise ValueError(
                f"{path}: the .npy format holds one tensor, not {len(self._tensors)}: use .npz or .safetensors"
            )
        for name, tensor in self._tensors.items():
            if format_ == "npz" and ("\0" in name or len(name.encode()) > MAX_MEMBER):
                raise ValueError(f"{path}: tensor {name!r}: a .npz file cannot hold this name: use .safetensors")
            if tensor.dtype.isbuiltin != 1:  # 2 for the types of ml_dtypes
                raise ValueError(
                    f"{path}: tensor {name!r}: the .{format_} format cannot name {tensor.dtype}: use --dtype float32, "
                    "or .safetensors"
                )

    def _write(self, file: BinaryIO, path: Path | str, format_: str, progress: Callable[[int], object]) -> None:
        if format_ == "npz":
            with zipfile.ZipFile(file, "w") as archive:
                for name, tensor in self._tensors.items():
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                        _write_npy(member, tensor, progress)
        elif format_ == "npy":
            for tensor in self._tensors.values():
                _write_npy(file, tensor, progress)
        else:
            specs = {name: (SAFETENSORS_DTYPES[x.dtype.name], x.shape) for name, x in self._tensors.items()}
            file.write(header_bytes(specs, {"format": "pt"}, path))
            for tensor in self._tensors.values():
                file.writelines(bytes_of(chunk) for chunk in tensor.chunks(progress))
        for changed in self._checkpoint.changed_files():
            raise CheckpointError(f"{changed}: was replaced or changed while it was read: decode it again")


class _Selected(NamedTuple):
    """A tensor, or a part of it, as it is stored, and what loads it; and the dtype and shape to write it in."""

    load: Callable[[Any], Any]
    array: BlockArray | NDArray[Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    transpose: bool

    def chunks(self, progress: Callable[[int], object]) -> Iterator[NDArray[Any]]:
        """Yield the values in C order."""
        load, array, dtype, _, transpose = self
        if isinstance(array, BlockArray):
            pairs = split_both(array.shape, dtype.itemsize, CHUNK_BYTES, transpose=transpose, multiple=array.multiple)
            chunks = (load(array[stored]).decode(dtype, transpose=transpose) for _, stored in pairs)
        else:
            indices = split(array.shape, dtype.itemsize, CHUNK_BYTES)
            chunks = (np.ascontiguousarray(load(array[(*index, ...)]), dtype=dtype) for index in indices)
        for chunk in chunks:
            yield chunk
            progress(chunk.nbytes)


def _write_npy(file: BinaryIO | IO[bytes], tensor: _Selected, progress: Callable[[int], object]) -> None:
    header = {"descr": tensor.dtype.str, "fortran_order": False, "shape": tensor.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for chunk in tensor.chunks(progress):
        file.write(bytes_of(chunk))


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
