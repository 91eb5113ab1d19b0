"""Open and read files of others: regular ones only, without waiting, and no more bytes than the file says it has.

Everything that is read from a checkpoint, or from the folder of a conversion, is opened here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePath
from typing import BinaryIO, Final, cast

from ..errors import CheckpointError
from .named import NamedFile, named
from .remote import AnyPath, RemoteFile
from .stores import RemoteStat

_LFS_POINTER: Final = b"version https://git-lfs"


class LFSPointerError(CheckpointError):
    """A file is the pointer that Git LFS puts in its place."""


def open_regular(path: AnyPath, *, pointers: bool = False) -> BinaryIO:
    """Open a file to read, unbuffered; refuse pipes and devices, and ``pointers`` of Git LFS that stand for a file."""
    file = _open_on_disk(path) if isinstance(path, Path) else cast(BinaryIO, path.open())
    try:
        is_pointer = not pointers and read_up_to(file, len(_LFS_POINTER)) == _LFS_POINTER
        file.seek(0)
    except BaseException:
        file.close()
        raise
    if is_pointer:
        file.close()
        raise LFSPointerError(f"{path}: it is a pointer of Git LFS: get the file itself with git lfs pull")
    return file


def _open_on_disk(path: Path) -> BinaryIO:
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    with named(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            file: BinaryIO | None = NamedFile(descriptor, "rb", path, "read") if is_regular else None
        except BaseException:
            os.close(descriptor)
            raise
    if file is None:
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    return file


def read_up_to(file: BinaryIO, count: int) -> bytes:
    """Return the next ``count`` bytes of a file from `open_regular`, or fewer where it ends.

    Files of the kernel, such as /proc/kmsg, say that they are empty. They are not read, as that may wait.
    """
    parts: list[bytes] = []
    left = min(count, size_of(file) - file.tell())
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_regular(path: AnyPath, limit: int) -> bytes:
    """Return all bytes of a file; refuse one that has more than ``limit``."""
    with open_regular(path) as file:
        size = size_of(file)
        if size > limit:
            raise CheckpointError(f"{path}: expected a file of at most {limit:,} bytes, found one of {size:,}")
        return read_up_to(file, limit)


def size_of(file: BinaryIO) -> int:
    """Return the size of a file in bytes."""
    return file.size() if isinstance(file, NamedFile | RemoteFile) else os.fstat(file.fileno()).st_size


def stat_of(file: BinaryIO) -> os.stat_result | RemoteStat:
    """Return the state of a file from `open_regular`."""
    return file.found if isinstance(file, RemoteFile) else os.fstat(file.fileno())


def is_below(name: str) -> bool:
    """Tell whether a file of this name is below the folder that the name is relative to, by this system's rules."""
    return bool(name) and not PurePath(name).anchor and ".." not in PurePath(name).parts
