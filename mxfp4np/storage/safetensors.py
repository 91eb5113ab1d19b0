"""Safetensors files: read their headers, and write them whole or tensor by tensor.

The Rust parser of the safetensors package validates headers: it refuses overlaps, gaps, wrong sizes and oversized ones.
Tensor data is never read through that package; see `tensorfile`. This module knows names, dtypes, shapes and bytes,
and nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .atomic import atomic_file
from .jsonfile import parse_json
from .regular import read_up_to, size_of
from .remote import AnyPath
from .tensorfile import StoredTensor, TensorFile, is_possible, nbytes_of, wrong_beginning

HEADER_LIMIT: Final = 100_000_000
"""Largest header that the format allows, in bytes."""

HEADER_ROOM: Final = 1 << 20
"""Bytes reserved for a header that is written last; enough for about ten thousand tensors."""

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

Spec = tuple[str, tuple[int, ...]]
"""Dtype, as the format spells it, and shape of a tensor."""


class SafetensorsFile(TensorFile):
    """A safetensors file: its header, checked and read when it is opened."""

    def _read_header(self, file: BinaryIO) -> None:
        if not self.stamp[0]:  # the parser cannot map all files that say so
            raise CheckpointError(f"{self.path}: not a valid safetensors file: {_what_is_wrong(file)}")
        try:
            with self._to_parse(file) as path, safe_open(path, framework="np") as handle:
                file.seek(0)
                offset = 8 + int.from_bytes(read_up_to(file, 8), "little")
                names = handle.offset_keys()
                self.metadata = handle.metadata() or {}
                self._refuse_duplicates(read_up_to(file, offset - 8), len(names))
                kinds: dict[Spec, tuple[str, tuple[int, ...], int]] = {}
                for name in names:
                    entry = handle.get_slice(name)
                    kind = entry.get_dtype(), tuple(entry.get_shape())
                    # Tensors of one kind share these objects: most of the memory that half a million tensors take.
                    dtype, shape, nbytes = kinds.get(kind) or kinds.setdefault(kind, (*kind, nbytes_of(*kind)))
                    if not is_possible(shape):
                        raise CheckpointError(f"{self.path}: tensor {name!r}: no array can have shape {list(shape)}")
                    self.tensors[name] = StoredTensor(name, dtype, shape, self, offset, nbytes)
                    offset += nbytes
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.EIO, f"cannot be read: the parser reports: {error}", str(self.path)) from error
        except SafetensorError as error:
            reason = _what_is_wrong(file) or str(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(f"{self.path}: not a valid safetensors file: {reason}") from error
        if not all(tensor.nbytes for tensor in self.tensors.values()):
            # A tensor without bytes has the same offset as the next one: sort, so that all processes agree.
            ordered = sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes, tensor.name))
            self.tensors = {tensor.name: tensor for tensor in ordered}
        if offset != size_of(file):
            raise CheckpointError(f"{self.path}: changed while it was being opened: open it again")

    @contextlib.contextmanager
    def _to_parse(self, file: BinaryIO) -> Iterator[AnyPath]:
        """Yield what the parser is to open, which maps it: the file or, if it is not to be mapped, a stand-in.

        That has the same header, and says that it has the same size. It is in memory on Linux, which has such files.
        """
        is_local, has_memory_files = isinstance(self.path, Path), hasattr(os, "memfd_create")
        if is_local and (self.io != "pread" or not has_memory_files):
            yield self.path
            return
        with contextlib.ExitStack() as stack:
            if has_memory_files:
                copy = stack.enter_context(os.fdopen(os.memfd_create("header"), "wb", buffering=0))
                path = Path(f"/proc/self/fd/{copy.fileno()}")
            else:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "header")
                copy = stack.enter_context(path.open("wb", buffering=0))
            beginning = read_up_to(file, 8)
            copy.write(beginning)
            length = int.from_bytes(beginning, "little")
            copy.write(read_up_to(file, length if length <= HEADER_LIMIT else 0))  # at once: one request of a server
            copy.truncate(size_of(file))
            yield path

    def _refuse_duplicates(self, header: bytes, tensors: int) -> None:
        # The parser lets a later entry replace an earlier one of the same name. An entry has at least two lists, its
        # shape and its offsets, so that only a header with more than two for each tensor can have a duplicate.
        if header.count(b"[") <= 2 * tensors:
            return

        def check(pairs: list[tuple[str, None]]) -> None:  # of each object; values of objects become None
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise CheckpointError(f"{self.path}: the header has two tensors called {name!r}")
                seen.add(name)

        json.loads(header, object_pairs_hook=check)


def _what_is_wrong(file: BinaryIO) -> str | None:
    """Return why a file that cannot be parsed has the wrong size, or what else it is; None if neither is known."""
    size = size_of(file)
    file.seek(0)
    beginning = read_up_to(file, 8)
    expected = 8 + int.from_bytes(beginning, "little")
    if expected > 8 + HEADER_LIMIT or beginning == bytes(8):
        return wrong_beginning(beginning, "the length of a header")
    if expected <= size:
        try:
            entries = parse_json(read_up_to(file, expected - 8)).items()
            ranges = [entry["data_offsets"] for name, entry in entries if name != "__metadata__"]
            end = max((end for _, end in ranges), default=0)
            if end != sum(end - begin for begin, end in ranges):
                return None  # the offsets are wrong
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None
        expected += end
    if size < expected:
        return f"it ends after {size:,} of at least {expected:,} bytes: download or copy it again"
    if size > expected:
        return f"it has {size:,} bytes, and its header accounts for {expected:,}: download or copy it again"
    return None


def header_bytes(
    tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None, file: Path | str = "a safetensors file"
) -> bytes:
    """Return the header of a file of these tensors, in this order, its length included.

    Raises
    ------
    ValueError
        If the format allows no such header; the message names the ``file``.
    """
    for item in (metadata or {}).items():
        if not all(isinstance(text, str) for text in item):
            raise ValueError(f"metadata must be strings, found {item!r}")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        if name == "__metadata__":
            raise ValueError("a tensor cannot be called '__metadata__': the format reserves the name")
        end = begin + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = _ENCODER.encode(header).encode()
    text += b" " * (-len(text) % 8)
    _check_header(len(text), file)
    return len(text).to_bytes(8, "little") + text


def _check_header(nbytes: int, file: Path | str) -> None:
    if nbytes > HEADER_LIMIT:
        raise ValueError(
            f"{file}: the header would have {nbytes:,} bytes, and the format allows {HEADER_LIMIT:,}: write fewer "
            "tensors to a file, or give them shorter names"
        )


def header_room(metadata: Mapping[str, str] | None) -> int:
    """Return how many bytes of a header are left for tensors; see `entry_size`."""
    return HEADER_LIMIT - len(header_bytes({}, metadata))


def entry_size(name: str, spec: Spec, end: int) -> int:
    """Return how many bytes a tensor takes in a header at most, given the largest offset in the file."""
    dtype, shape = spec
    fixed = len(':{"dtype":"","shape":[],"data_offsets":[]},') + len(dtype) + len(_ENCODER.encode(name).encode())
    return fixed + sum(len(str(number)) + 1 for number in (*shape, end, end))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Spec],
    data: Iterable[NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are known, from data that comes in chunks.

    The chunks are C-contiguous arrays: all bytes of all tensors, in the order of ``tensors``. A chunk may begin and end
    inside a tensor. An old file is replaced only when the new one is complete: maps of it stay valid.

    Raises
    ------
    ValueError
        If the data has not as many bytes as the tensors.
    """
    expected = sum(nbytes_of(dtype, shape) for dtype, shape in tensors.values())
    written = 0
    with atomic_file(path) as file:
        file.write(header_bytes(tensors, metadata, path))
        for chunk in data:
            written += file.write(bytes_of(chunk))
        if written != expected:
            raise ValueError(f"{path}: expected {expected:,} bytes of tensor data, was given {written:,}")


def stream_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, Spec, Iterable[NDArray[Any]]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are not known in advance: data first, header last.

    The data of a tensor comes as chunks: C-contiguous arrays.
    """
    specs: dict[str, Spec] = {}
    smallest = 0
    with atomic_file(path) as file:
        file.seek(HEADER_ROOM)
        for name, spec, data in tensors:
            if name in specs:
                raise ValueError(f"two tensors would both be called {name!r}")
            specs[name] = spec
            smallest += entry_size(name, spec, 0)
            _check_header(smallest, path)  # before all data is written
            for chunk in data:
                file.write(bytes_of(chunk))
        end, header = file.tell(), header_bytes(specs, metadata, path)
        if len(header) > HEADER_ROOM or end < 16 * HEADER_ROOM:
            _move(file, HEADER_ROOM, len(header), end - HEADER_ROOM)
        else:  # the format allows spaces at the end of a header
            header = (HEADER_ROOM - 8).to_bytes(8, "little") + header[8:].ljust(HEADER_ROOM - 8)
        file.seek(0)
        file.write(header)


def _move(file: BinaryIO, begin: int, to: int, nbytes: int) -> None:
    """Move the last ``nbytes`` of a file from ``begin`` to ``to``; the two ranges may overlap."""
    step = 16 << 20
    offsets = range(0, nbytes, step)
    for offset in offsets if to < begin else reversed(offsets):
        file.seek(begin + offset)
        chunk = file.read(min(step, nbytes - offset))
        file.seek(to + offset)
        file.write(chunk)
    file.truncate(to + nbytes)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data
