"""Read the header of a safetensors file.

The Rust parser of the safetensors package validates it: it refuses overlaps, gaps, wrong sizes and oversized headers.
Tensor data is never read through that package; see `tensorfile`.
"""

from __future__ import annotations

import json
import math
import os
from typing import BinaryIO, Final

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .dtypes import nbytes_of
from .tensorfile import StoredTensor, TensorFile

LFS_POINTER: Final = b"version https://git-lfs"
HEADER_LIMIT: Final = 100_000_000  # of the format

MAX_AXES: Final = 64
MAX_ELEMENTS: Final = 1 << 56
"""What NumPy can hold, decoded sizes included; files can claim more if an axis is empty."""


class SafetensorsFile(TensorFile):
    """A safetensors file: its header, checked and read when it is opened."""

    def _read_header(self, file: BinaryIO) -> None:
        try:
            with safe_open(self.path, framework="np") as handle:
                offset = 8 + int.from_bytes(file.read(8), "little")
                names = handle.offset_keys()
                self.metadata = handle.metadata() or {}
                self._refuse_duplicates(file.read(offset - 8), len(names))
                kinds: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}
                for name in names:
                    entry = handle.get_slice(name)
                    kind = entry.get_dtype(), tuple(entry.get_shape())
                    # Tensors of one kind share these objects: most of the memory that half a million tensors take.
                    dtype, shape, nbytes = kinds.get(kind) or kinds.setdefault(kind, (*kind, nbytes_of(*kind)))
                    if len(shape) > MAX_AXES or (not nbytes and math.prod(n for n in shape if n) > MAX_ELEMENTS):
                        raise CheckpointError(f"{self.path}: tensor {name!r}: no array can have shape {list(shape)}")
                    self.tensors[name] = StoredTensor(name, dtype, shape, self, offset, nbytes)
                    offset += nbytes
        except SafetensorError as error:
            reason = _what_is_wrong(file) or str(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(f"{self.path}: not a valid safetensors file: {reason}") from error
        if not all(tensor.nbytes for tensor in self.tensors.values()):
            # A tensor without bytes has the same offset as the next one: sort, so that all processes agree.
            ordered = sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes, tensor.name))
            self.tensors = {tensor.name: tensor for tensor in ordered}
        if offset != os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{self.path}: changed while it was being opened: open it again")

    def _refuse_duplicates(self, header: bytes, tensors: int) -> None:
        # The parser lets a later entry replace an earlier one of the same name. An entry has at least two lists, its
        # shape and its offsets, so that only a header with more than two for each tensor can have a duplicate.
        if header.count(b"[") <= 2 * tensors:
            return
        seen: set[str] = set()
        for name, _ in json.loads(header, object_pairs_hook=list):
            if name in seen:
                raise CheckpointError(f"{self.path}: the header has two tensors called {name!r}")
            seen.add(name)


def _what_is_wrong(file: BinaryIO) -> str | None:
    """Return why a file that cannot be parsed has the wrong size, or what else it is; None if neither is known."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    beginning = file.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        return "it is a pointer of Git LFS: get the file itself with git lfs pull"
    expected = 8 + int.from_bytes(beginning[:8], "little")
    if expected > 8 + HEADER_LIMIT:
        return f"it begins with {beginning[:8]!r}, which is not the length of a header: it is a file of another kind"
    if expected <= size:
        file.seek(8)
        try:
            entries = json.loads(file.read(expected - 8)).items()
            ranges = [entry["data_offsets"] for name, entry in entries if name != "__metadata__"]
            end = max((end for _, end in ranges), default=0)
            if end != sum(end - begin for begin, end in ranges):
                return None  # the offsets are wrong
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return None
        expected += end
    if size < expected:
        return f"it ends after {size:,} of at least {expected:,} bytes: download or copy it again"
    if size > expected:
        return f"it has {size:,} bytes, and its header accounts for {expected:,}: download or copy it again"
    return None
