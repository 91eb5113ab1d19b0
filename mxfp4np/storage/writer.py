"""Write safetensors files: whole, or tensor by tensor, and each under its name only when it is complete.

It takes names, dtypes, shapes and bytes, and knows nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from .dtypes import nbytes_of

_DISK_FULL: Final = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to ``path`` when it is complete and on disk, and removed on an error."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno in _DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Write a new name to disk too, if the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> bytes:
    """Return the header of a file of these tensors, in this order, its length included.

    Parameters
    ----------
    tensors : mapping of name to (dtype, shape)
        As the format spells them.
    metadata : mapping of str to str, optional
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
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Iterable[NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are known, from data that comes in chunks.

    Parameters
    ----------
    path : Path
        Replaced only when the new file is complete: maps of an old file of this name stay valid.
    tensors : mapping of name to (dtype, shape)
        As the format spells them.
    data : iterable of C-contiguous arrays
        All bytes of all tensors, in the order of ``tensors``. A chunk may begin and end inside a tensor.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        If the data has not as many bytes as the tensors.
    """
    expected = sum(nbytes_of(dtype, shape) for dtype, shape in tensors.values())
    written = 0
    with atomic_file(path) as file:
        file.write(header_bytes(tensors, metadata))
        for chunk in data:
            written += file.write(bytes_of(chunk))
        if written != expected:
            raise ValueError(f"{path}: expected {expected:,} bytes of tensor data, was given {written:,}")


HEADER_ROOM: Final = 1 << 20
"""Bytes reserved for a header that is written last; enough for about ten thousand tensors."""


def stream_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[NDArray[Any]]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are not known in advance: data first, header last.

    Parameters
    ----------
    path : Path
        Replaced only when the new file is complete.
    tensors : iterable of (name, dtype, shape, data)
        The dtype as the format spells it, the data as chunks: C-contiguous arrays.
    metadata : mapping of str to str, optional
    """
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    with atomic_file(path) as file:
        file.seek(HEADER_ROOM)
        for name, dtype, shape, data in tensors:
            if name in specs:
                raise ValueError(f"two tensors would both be called {name!r}")
            specs[name] = dtype, shape
            for chunk in data:
                file.write(bytes_of(chunk))
        end, header = file.tell(), header_bytes(specs, metadata)
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
