"""Remote files: paths that behave as those of disks, and ranges of bytes that are read into memory.

A `RemotePath` has the methods of `pathlib.Path` that this package uses, so that what finds, opens and copies files is
the same for both. Whatever a server sends is checked: it must be of the object that was opened, and have as many bytes
as were asked for. This module knows nothing of tensors.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import RemoteError
from .stores import FILE, Folder, NoRangesError, RemoteStat, changed, folder_of, map_requests, reported

FIRST_BYTES: Final = 64 << 10
"""Asked for when a file is opened: most headers are shorter."""

AHEAD_BYTES: Final = 8 << 20
"""Most that is read ahead of what was asked for, or kept, of a file that is read as a stream."""

WHOLE_BYTES: Final = 32 << 20
"""Largest file that is opened although the server does not send parts of it: whole."""

RANGE_BYTES: Final = 16 << 20
"""Largest range of one request for tensor data."""

GAP_BYTES: Final = 16 << 10
"""Largest gap between ranges that become one request: to read it takes less time than a request."""

CHUNK_BYTES: Final = 2 << 20
"""Least that is taken from an answer at a time, unless it ends."""

_URL: Final = re.compile(r"(?:s3a?|gs|az|azure|abfss?|https?|hf)://.*", re.DOTALL)

Span = tuple[int, NDArray[np.uint8]]
"""Where bytes lie in a file, and the memory to read them into."""


class RemotePath:
    """A file or folder in a store, on a web server or on the Hub.

    Parameters
    ----------
    folder : Folder
    key : str
        The file or folder in it, empty for itself.
    """

    def __init__(self, folder: Folder, key: str = "") -> None:
        self.folder, self.key = folder, key

    @classmethod
    def of(cls, source: Any) -> RemotePath:
        """Return the path that a URL or a store means."""
        return source if isinstance(source, RemotePath) else cls(*folder_of(source))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.key)

    def __str__(self) -> str:
        return f"{self.folder}/{self.key}" if self.key else str(self.folder)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (other.folder, other.key) == (self.folder, self.key)

    def __hash__(self) -> int:
        return hash((self.folder, self.key))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.folder, f"{self.key}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in; of the outermost folder, itself."""
        return RemotePath(self.folder, self.key.rpartition("/")[0])

    def absolute(self) -> RemotePath:
        """Return the path itself."""
        return self

    resolve = absolute

    @property
    def parents(self) -> list[RemotePath]:
        """The folders that it is in, innermost first."""
        parts = self.key.split("/") if self.key else []
        return [RemotePath(self.folder, "/".join(parts[:end])) for end in reversed(range(len(parts)))]

    def is_symlink(self) -> bool:
        """Return False."""
        return False

    def exists(self) -> bool:
        """Tell whether it is there, as far as that is known before it is opened."""
        return not self.key or self.folder.may_have(self.parent.key, self.name)

    def is_dir(self) -> bool:
        """Tell whether it is a folder; no request is made for what is named as weights or JSON are."""
        if not self.key or FILE.fullmatch(self.name):
            return not self.key
        return self.folder.names(self.parent.key).get(self.name, False)

    def is_file(self) -> bool:
        """Tell whether it is a file."""
        return bool(self.key) and self.folder.names(self.parent.key).get(self.name) is False

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in the folder."""
        return (self / name for name in self.folder.names(self.key))

    def stat(self) -> RemoteStat:
        """Ask for the size and for the state of the file."""
        return self.folder.stat(self.key)

    def open(self) -> RemoteFile:
        """Return the file, to be read as a stream."""
        return RemoteFile(self)

    def read_spans(self, known: RemoteStat, spans: Iterable[Span]) -> None:
        """Read bytes of the file, which must still be ``known``, into memory: large ranges in parallel.

        Raises
        ------
        CheckpointError
            If the file has changed.
        RemoteError
            If the server does not send what is asked for.
        """
        map_requests(lambda spans: self.request(spans, known), list(_requests(spans)))

    def request(self, spans: Sequence[Span], known: RemoteStat | None) -> RemoteStat:
        """Read spans, in the order of their offsets, by one request; without ``known``, up to the end of the file."""
        begin, end = spans[0][0], spans[-1][0] + spans[-1][1].size
        options = {"range": (begin, end), **({} if known is None else self.folder.condition(known))}
        with reported(self):
            answer = self.folder.store.get(self.key, options=options)
            found = self.folder.stat_of(answer.meta)
            if known is not None and found != known:
                raise changed(self)
            end = min(end, found.st_size)
            got = _scatter(answer.stream(min_chunk_size=CHUNK_BYTES), begin, spans)
        if got != end:
            raise RemoteError(f"{self}: expected bytes {begin:,} to {end:,}, the server sent them up to {got:,}")
        return found

    def read_whole(self) -> tuple[RemoteStat, NDArray[np.uint8]]:
        """Read a small file from a server that does not send parts of files."""
        with reported(self):
            answer = self.folder.store.get(self.key)
            found = self.folder.stat_of(answer.meta)
            if found.st_size > WHOLE_BYTES:
                raise NoRangesError(f"{self}: the server does not send parts of a file: download it")
            data = np.empty(found.st_size, np.uint8)
            got = _scatter(answer.stream(min_chunk_size=CHUNK_BYTES), 0, [(0, data)])
        if got != found.st_size:
            raise RemoteError(f"{self}: expected {found.st_size:,} bytes, the server sent {got:,}")
        return found, data


class RemoteFile(io.RawIOBase):
    """A remote file that is opened, to be read as a stream: what is read ahead doubles with each request.

    Attributes
    ----------
    found : RemoteStat
        The state of the file when it was opened. What is read later is of the same state.
    """

    def __init__(self, path: RemotePath) -> None:
        self._path, self._at, self._begin = path, 0, 0
        self._data = np.empty(FIRST_BYTES, np.uint8)
        try:
            self.found = self._request(0, self._data, None)
            self._data = self._data[: self.found.st_size]
        except NoRangesError:
            self.found, self._data = path.read_whole()
        except RemoteError:
            self.found = path.stat()
            if self.found.st_size:  # a range of an empty file is an error
                raise
            self._data = self._data[:0]

    def size(self) -> int:
        """Return the size in bytes."""
        return self.found.st_size

    def _request(self, begin: int, memory: NDArray[np.uint8], known: RemoteStat | None) -> RemoteStat:
        (found,) = map_requests(lambda spans: self._path.request(spans, known), [[(begin, memory)]])
        return found

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set where the next read begins."""
        self._at = offset + (0, self._at, self.found.st_size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; with fewer bytes only where the file ends."""
        target = np.frombuffer(buffer, np.uint8)
        begin, end = self._at, min(self._at + target.size, self.found.st_size)
        if begin >= end:
            return 0
        have = self._begin + self._data.size
        if not self._begin <= begin <= have or (end > have and self._data.size > AHEAD_BYTES):
            self._begin, self._data = begin, self._data[:0]
            have = begin
        if end > have:
            ahead = min(max(self._data.size, FIRST_BYTES), AHEAD_BYTES)
            more = np.empty(min(max(end, have + ahead), self.found.st_size) - have, np.uint8)
            self._request(have, more, self.found)
            self._data = np.concatenate((self._data, more))
        target[: end - begin] = self._data[begin - self._begin : end - self._begin]
        self._at = end
        return end - begin


AnyPath: TypeAlias = Path | RemotePath


def is_remote(path: object) -> bool:
    """Tell whether what a caller gives as a path is remote: a URL, or a store."""
    if isinstance(path, str):
        return _URL.fullmatch(path) is not None
    return isinstance(path, RemotePath) or (not isinstance(path, os.PathLike) and hasattr(path, "list_with_delimiter"))


def _requests(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Divide spans among requests, in the order of their offsets: large ones are split, close ones are merged."""
    request: list[Span] = []
    end = 0
    for offset, memory in sorted(spans, key=lambda span: span[0]):
        for at in range(0, memory.size, RANGE_BYTES):
            part = offset + at, memory[at : at + RANGE_BYTES]
            last = part[0] + part[1].size
            if request and (part[0] - end > GAP_BYTES or last - request[0][0] > RANGE_BYTES):
                yield request
                request = []
            request.append(part)
            end = last
    if request:
        yield request


def _scatter(chunks: Iterable[Any], at: int, spans: Sequence[Span]) -> int:
    """Copy what an answer holds from offset ``at`` on to where it belongs; return where it ends, if not too late."""
    end, number = spans[-1][0] + spans[-1][1].size, 0
    for chunk in chunks:
        data = np.frombuffer(chunk, np.uint8)
        last = at + data.size
        while number < len(spans) and spans[number][0] < last:
            offset, memory = spans[number]
            begin, stop = max(at, offset), min(last, offset + memory.size)
            memory[begin - offset : stop - offset] = data[begin - at : stop - at]
            if offset + memory.size > last:
                break
            number += 1
        at = last
        if at > end:  # more than was asked for: no more of it is received
            break
    return at
