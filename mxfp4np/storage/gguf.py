"""Read the header of a GGUF file: scalar metadata and the table of tensors; see `tensorfile` for its data.

Arrays of metadata, such as vocabularies, are skipped. Names and sizes of types are those of the gguf package, which is
imported only when such a file is opened. Tensors of types that it does not know are listed, so that all others can be
read.
"""

from __future__ import annotations

import io
import math
import struct
from itertools import pairwise
from typing import Any, BinaryIO, Final, NamedTuple

from ..errors import BackendUnavailableError, CheckpointError
from .regular import read_up_to
from .tensorfile import MAX_AXES, StoredTensor, TensorFile, is_possible, wrong_beginning

GGUF_MAGIC: Final = b"GGUF"
"""The first bytes of such a file."""

_VERSIONS: Final = (2, 3)
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata that are numbers, as `struct` spells them."""

_STRING, _ARRAY = 8, 9


class GGUFFile(TensorFile):
    """A GGUF file. Shapes are NumPy's, outermost axis first."""

    def _read_header(self, file: BinaryIO) -> None:
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise BackendUnavailableError(
                f"{self.path}: GGUF files need the gguf package: python -m pip install 'mxfp4np[gguf]'"
            ) from error
        beginning, size = read_up_to(file, 8), self.stamp[0]
        if not beginning.startswith(GGUF_MAGIC):
            problem = wrong_beginning(beginning, repr(GGUF_MAGIC))
            raise CheckpointError(f"{self.path}: not a valid GGUF file: {problem}")
        try:
            self.metadata = {"GGUF.version": str(_version_of(beginning[4:]))}
            with io.BufferedReader(file, 1 << 18) as buffered:  # type: ignore[type-var]
                reader = _Reader(buffered, size)
                tensors, values = reader.number("Q"), reader.number("Q")
                alignment = self._read_metadata(reader, values)
                entries = [reader.entry() for _ in range(tensors)]
            self.parts = int(self.metadata.get("split.count", 1))
            self._place(entries, -(-reader.at // alignment) * alignment, alignment, size)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: not a valid GGUF file: {error}") from error

    def _read_metadata(self, reader: _Reader, count: int) -> int:
        """Keep the scalars as text, and return the alignment of tensors."""
        keys, alignment = set(), 32
        for _ in range(count):
            key, kind = reader.text(), reader.number("I")
            if key in keys:
                raise ValueError(f"two values are called {key!r}")
            keys.add(key)
            if kind == _ARRAY:
                reader.skip_array()
                continue
            value = reader.scalar(kind)
            self.metadata[key] = str(value)
            if key == "general.alignment":
                alignment = value
                if not isinstance(value, int) or value < 1 or value & (value - 1):
                    raise ValueError(f"expected a power of two as {key}, found {value!r}")
        return alignment

    def _place(self, entries: list[_Entry], begin: int, alignment: int, size: int) -> None:
        """Set `tensors`, in the order of their bytes; refuse those that overlap, or lie elsewhere than they should."""
        names = set()
        for entry in entries:
            if entry.name in names:
                raise ValueError(f"two tensors are called {entry.name!r}")
            names.add(entry.name)
        entries = sorted(entries, key=lambda entry: (entry.offset, entry.nbytes != 0))
        last = _Entry("", "", (), 0, size - begin)
        for entry, following in pairwise([*entries, last]):
            name, dtype, shape, nbytes, offset = entry
            nbytes = max(0, following.offset - offset) if nbytes is None else nbytes
            if offset % alignment:
                raise ValueError(f"tensor {name!r}: expected an offset of a multiple of {alignment}, found {offset:,}")
            if begin + offset + nbytes > size:
                raise ValueError(
                    f"tensor {name!r}: expected bytes up to {begin + offset + nbytes:,}, found a file of {size:,}"
                )
            if offset + nbytes > following.offset:
                raise ValueError(f"tensors {name!r} and {following.name!r} overlap")
            self.tensors[name] = StoredTensor(name, dtype, shape, self, begin + offset, nbytes)


class _Entry(NamedTuple):
    """A tensor, as the table describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    """None if the package does not know the type: the tensor then ends where the next one begins."""
    offset: int
    """From the beginning of the data."""


class _Reader:
    """Reads numbers and texts one after the other. Whatever they claim, no more is read or kept than the file has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.at = file.tell()

    def _advance(self, count: int) -> None:
        self.at += count
        if self.at > self._size:
            raise ValueError(f"its header goes on after the end of the file, at byte {self._size:,}: download it again")

    def _take(self, count: int) -> bytes:
        self._advance(count)
        data = self._file.read(count)
        if len(data) < count:
            raise ValueError("it was truncated while it was read")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self._take(self.number("Q")).decode()

    def scalar(self, kind: int) -> Any:
        return self.text() if kind == _STRING else self.number(_form(kind))

    def skip_array(self) -> None:
        arrays = 1  # still to be skipped: those inside an array follow its beginning
        while arrays:
            kind, count = self.number("I"), self.number("Q")
            arrays -= 1
            if kind == _ARRAY:
                arrays += count
            elif kind == _STRING:
                self._skip_texts(count)
            else:
                self._advance(count * struct.calcsize(f"<{_form(kind)}"))
                self._file.seek(self.at)

    def _skip_texts(self, count: int) -> None:
        read, seek, at, size = self._file.read, self._file.seek, self.at, self._size
        while count and at < size:
            at += 8 + int.from_bytes(read(8), "little")
            if at < size:
                seek(at)
            count -= 1
        self._advance(at - self.at + 8 * count)

    def entry(self) -> _Entry:
        name, axes = self.text(), self.number("I")
        if axes > MAX_AXES:
            raise ValueError(f"tensor {name!r}: expected at most {MAX_AXES} axes, found {axes:,}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        if not is_possible(shape):
            raise ValueError(f"tensor {name!r}: no array can have shape {list(shape)}")
        return _Entry(name, *_type_of(name, self.number("I"), shape), self.number("Q"))


def _version_of(data: bytes) -> int:
    version = int.from_bytes(data, "little")
    if version & 0xFFFF == 0 != version:
        raise ValueError("expected a little-endian file, found a big-endian one")
    if version not in _VERSIONS:
        raise ValueError(f"expected version 2 or 3, found {version}")
    return version


def _form(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"expected a type of metadata, found number {kind}")
    return _NUMBERS[kind]


def _type_of(name: str, number: int, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], int | None]:
    """Return the name of a type, the shape, and the bytes of a tensor, None if the package does not know the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(number)
        size, nbytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        return f"GGML type {number}", shape, None
    if size > 1 and ((shape or (1,))[-1] % size or 0 in shape):
        raise ValueError(
            f"tensor {name!r}: rows of {known.name} have a multiple of {size} values, found shape {list(shape)}"
        )
    return known.name, shape, math.prod(shape) // size * nbytes
