"""Files that appear under their names only when they are complete and on disk.

Until then a file has a temporary name in the same folder. It does not contain the final name, which may be as long as
a name can be, but a digest of it, by which the files that killed processes left are found.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from .named import NamedFile, named

_TEMPORARY: Final = re.compile(r"(\.mxfp4np-[0-9a-f]{16})-\d+-[0-9a-f]{8}\.tmp")

_NO_LINKS: Final = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems without hard links say."""

_LOST: Final = (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Errors of `os.fsync` that say that something is not on disk. Some systems cannot open or write folders."""


def temporary_path(path: Path) -> Path:
    """Return a name for a file that is going to be called ``path`` when it is complete."""
    return path.with_name(f"{_stem(path.name)}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def is_temporary(name: str) -> bool:
    """Tell whether a file of this name is not complete."""
    return _TEMPORARY.fullmatch(name) is not None


def _stem(name: str) -> str:
    return f".mxfp4np-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def leftovers(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Return the temporary files of each of these files that there are; each folder is listed once."""
    found: dict[Path, list[Path]] = {}
    wanted = {path.with_name(_stem(path.name)): path for path in paths}
    for folder in {path.parent for path in wanted}:
        for path in folder.glob(".mxfp4np-*.tmp"):
            match = _TEMPORARY.fullmatch(path.name)
            if match and (of := wanted.get(folder / match[1])):
                found.setdefault(of, []).append(path)
    return found


def remove(paths: Iterable[Path]) -> None:
    """Remove temporary files. A process that is still writing one gets a `FileNotFoundError` when it renames it."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path, *, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes ``path`` when it is complete and on disk, and is removed on an error.

    Raises
    ------
    FileExistsError
        If there is such a file when the new one is complete, and the new one is ``exclusive``. Otherwise it replaces
        the old one: maps of that stay valid.
    """
    with named(path, "written"):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    temporary = temporary_path(path)
    try:
        with NamedFile(temporary, "x+b", path, "written") as raw, io.BufferedRandom(raw) as file:
            yield file
            file.flush()
            with named(path, "written"):
                os.fsync(file.fileno())
        with named(path, "written"):
            if exclusive:
                _link(temporary, path)
            else:
                temporary.replace(path)
    except BaseException:
        remove([temporary])
        raise
    _sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Rename a file if nothing has the new name."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # takes the name
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise
    else:
        remove([temporary])


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, all of them on disk."""
    with named(folder, "written"):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk, where a folder can be opened."""
    with named(folder, "written"):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _LOST:
                raise
