"""Errors of the operating system that name the file, and say whether it was being read or written.

Most calls leave one or both out: a read knows a descriptor only, and what is being written has a temporary name.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_PREFIX: Final = "cannot be "


@contextlib.contextmanager
def named(path: object, what: str) -> Iterator[None]:
    """Make errors of the operating system in the block say that ``path`` cannot be ``what``: "read" or "written".

    Without a path, those that already name a file say it of that one, unless it is missing: whoever looks at many files
    knows no more.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if path is None else path
        said = error.errno is None or (error.strerror or "").startswith(_PREFIX)
        if said or name is None or (path is None and isinstance(error, FileNotFoundError)):
            raise
        raise OSError(error.errno, f"{_PREFIX}{what}: {error.strerror}", str(name)) from error


class NamedFile(io.FileIO):
    """A file, unbuffered, whose errors are `named`; ``path`` is the name in messages."""

    def __init__(self, file: Path | int, mode: str, path: Path, what: str) -> None:
        self._error = path, what
        with named(*self._error):
            super().__init__(file, mode)

    def read(self, size: int | None = -1, /) -> Any:
        """Read ``size`` bytes or, if that is negative, all; fewer only where the file ends."""
        parts: list[bytes] = []
        with named(*self._error):
            if size is None or size < 0:
                return super().read()
            while size > 0 and (part := super().read(size)):
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    def size(self) -> int:
        """Return the size in bytes."""
        with named(*self._error):
            return os.fstat(self.fileno()).st_size

    def readinto(self, buffer: Any, /) -> Any:
        """Read into a buffer; see `io.RawIOBase`."""
        with named(*self._error):
            return super().readinto(buffer)

    def write(self, data: Any, /) -> Any:
        """Write bytes; see `io.RawIOBase`."""
        with named(*self._error):
            return super().write(data)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the size; see `io.RawIOBase`."""
        with named(*self._error):
            return super().truncate(size)

    def close(self) -> None:
        """Close the file: some file systems report here what could not be written."""
        with named(*self._error):
            super().close()
