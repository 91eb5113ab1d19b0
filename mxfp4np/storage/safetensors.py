"""One safetensors file: a validated header in, stored tensors and views of their bytes out; and a writer.

The header is checked by the Rust parser of the safetensors package, which refuses overlaps, gaps, wrong sizes and
oversized headers. Tensor data is never read through that package: it is mapped, or read where the file system makes
maps unsafe. This module knows nothing of MXFP4 or of how models name their tensors.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..backends.memory import address_of, aligned_empty
from ..errors import CheckpointError
from ..format import dtype_named

DTYPES: Final = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "uint8"),
    "F6_E2M3": (6, "uint8"),
    "F6_E3M2": (6, "uint8"),
}
"""Bits of an element, and the NumPy or ml_dtypes type to view it as, for each dtype of the format.

NumPy has no type for elements below a byte: their packed bytes are given as uint8.
"""

LFS_POINTER: Final = b"version https://git-lfs"
HEADER_LIMIT: Final = 100_000_000  # of the format

MAX_AXES: Final = 64
MAX_ELEMENTS: Final = 1 << 56
"""What NumPy can hold, decoded sizes included; files can claim more where an axis is empty."""

SAFETENSORS_DTYPES: Final = {numpy: name for name, (bits, numpy) in DTYPES.items() if bits >= 8}
"""The format's name of each NumPy or ml_dtypes type."""


def element(dtype: str) -> tuple[int, str]:
    """Return the bits of an element and the name of its NumPy type; other formats' dtypes are raw bytes."""
    return DTYPES.get(dtype, (8, "uint8"))


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of the format."""
    return math.prod(shape) * DTYPES[dtype][0] // 8


class StoredTensor(NamedTuple):
    """Where one tensor lies: its header entry, and its place in the file."""

    name: str
    dtype: str
    """As the header spells it, for instance ``"BF16"``; of a GGUF file also ``"MXFP4"`` or ``"Q8_0"``."""
    shape: tuple[int, ...]
    """As in the header; F4 and F6 dtypes count elements, GGUF's own dtypes bytes."""
    file: TensorFile
    offset: int
    """Bytes from the beginning of the file."""
    nbytes: int


class TensorFile:
    """One file of tensors, header read and validated, data untouched; a subclass for each format.

    Parameters
    ----------
    path : Path
    io : {"mmap", "pread"}
        Map the file, or read each tensor when it is asked for. A mapped file that someone truncates kills the process
        that looks at it; a read one gives an error.

    Attributes
    ----------
    tensors : dict of str to StoredTensor
        In the order of their bytes.
    metadata : dict of str to str
    stamp : tuple of int
        Size and time of change in nanoseconds.

    Raises
    ------
    CheckpointError
        If this is not a valid file of the format.
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: Path, io: str = "mmap") -> None:
        self.path, self.io = path, io
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self._map: NDArray[np.uint8] | None = None
        self._file: BinaryIO | None = None
        self._closed = False
        self._lock = threading.Lock()
        with open_regular(path) as file:
            self.stamp = _stamp(file)
            self._read_header(file)

    def _read_header(self, file: BinaryIO) -> None:
        """Set `tensors` and `metadata`."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file. The map lives on as long as any view of it."""
        with self._lock:
            self._closed, self._map = True, None
            if self._file is not None:
                self._file.close()
                self._file = None

    def view(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """Return the tensor's bytes, flat: a view of the map, or of memory that stands in for it (see `read`)."""
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.path}: this checkpoint is closed")
            if self.io == "pread":
                if self._file is None:
                    self._file = self._reopen()
                # Pages that are reserved and never touched: only their addresses matter.
                length = max(1, tensor.nbytes)
                if hasattr(mmap, "MAP_PRIVATE"):  # so that they count against no limit
                    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                    memory = mmap.mmap(-1, length, flags=private, prot=mmap.PROT_READ)
                else:
                    memory = mmap.mmap(-1, length)
                return np.frombuffer(memory, np.uint8)[: tensor.nbytes]
            if self._map is None:
                with self._reopen() as file:  # the map keeps the file open
                    try:
                        self._map = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
                    except (OSError, ValueError) as error:
                        raise CheckpointError(f"{self.path}: cannot be mapped ({error}): try io='pread'") from error
            return self._map[tensor.offset : tensor.offset + tensor.nbytes]

    def _reopen(self) -> BinaryIO:
        # A checkpoint may have more files than a process may keep open: each opens again when it is first needed.
        file = open_regular(self.path)
        if _stamp(file) != self.stamp:
            file.close()
            raise CheckpointError(f"{self.path}: was replaced or changed after it was opened: open it again")
        return file

    def prefetch(self, part: NDArray[Any]) -> None:
        """Begin to read the pages of a view of the map that is about to be used whole, where the system can."""
        if self.io == "pread" or not hasattr(mmap.mmap, "madvise") or not part.size:
            return
        with self._lock:
            if self._map is None or not np.may_share_memory(part, self._map):
                return
            low, high = np.lib.array_utils.byte_bounds(part)
            begin = (low - address_of(self._map)) & -mmap.PAGESIZE
            length = high - address_of(self._map) - begin
            if length <= 2 * part.nbytes + mmap.PAGESIZE:  # what lies between is not worth reading
                memory: mmap.mmap = self._map.base.obj  # type: ignore[union-attr]
                memory.madvise(mmap.MADV_WILLNEED, begin, length)

    def read(self, tensor: StoredTensor, base: NDArray[np.uint8], part: NDArray[Any]) -> NDArray[Any]:
        """Return ``part``, which is any view of ``base``, with the bytes of the file in it.

        ``base`` is what `view` returned. A view of a map holds its bytes already, and is returned as it is. In place
        of a view of reserved memory, what lies at the same places of the file, and nothing else, is read into a new
        array.
        """
        if self.io != "pread":
            return part
        out = aligned_empty(part.shape, part.dtype)
        axis, run = part.ndim, part.itemsize
        while axis and (part.shape[axis - 1] == 1 or part.strides[axis - 1] == run):
            axis -= 1
            run *= part.shape[axis]
        if out.size:
            begin = tensor.offset + address_of(part) - address_of(base)
            target = bytes_of(out)
            strides = part.strides[:axis]
            for i, outer in enumerate(np.ndindex(part.shape[:axis])):
                offset = begin + sum(map(int.__mul__, outer, strides))
                self._read_into(target[i * run : (i + 1) * run], offset, tensor)
        return out

    def _read_into(self, target: memoryview, offset: int, tensor: StoredTensor) -> None:
        while target:
            count = self._pread(target, offset)
            if not count:
                raise CheckpointError(
                    f"{self.path}: truncated after it was opened: tensor {tensor.name!r} goes on to byte "
                    f"{tensor.offset + tensor.nbytes:,}, the file ends at {offset:,}"
                )
            target, offset = target[count:], offset + count

    def _pread(self, target: memoryview, offset: int) -> int:
        if self._file is None:
            raise CheckpointError(f"{self.path}: this checkpoint is closed")
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(target)  # type: ignore[attr-defined, no-any-return]


class SafetensorsFile(TensorFile):
    """A safetensors file."""

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
                    # Tensors of a kind share these objects, which are most of the memory of half a million tensors.
                    dtype, shape, nbytes = kinds.get(kind) or kinds.setdefault(kind, (*kind, nbytes_of(*kind)))
                    if len(shape) > MAX_AXES or (not nbytes and math.prod(n for n in shape if n) > MAX_ELEMENTS):
                        raise CheckpointError(f"{self.path}: tensor {name!r}: no array can have shape {list(shape)}")
                    self.tensors[name] = StoredTensor(name, dtype, shape, self, offset, nbytes)
                    offset += nbytes
        except SafetensorError as error:
            reason = _what_is_wrong(file) or str(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(f"{self.path}: not a valid safetensors file: {reason}") from error
        if not all(tensor.nbytes for tensor in self.tensors.values()):
            # Tensors without bytes share their offset with the next one; give them one order in all processes.
            ordered = sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes, tensor.name))
            self.tensors = {tensor.name: tensor for tensor in ordered}
        if offset != os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{self.path}: changed while it was being opened: open it again")

    def _refuse_duplicates(self, header: bytes, tensors: int) -> None:
        # The parser lets a later entry replace an earlier one of the same name. An entry has two lists at least, its
        # shape and its offsets, so that only a header with more of them than that can hide one.
        if header.count(b"[") <= 2 * tensors:
            return
        seen: set[str] = set()
        for name, _ in json.loads(header, object_pairs_hook=list):
            if name in seen:
                raise CheckpointError(f"{self.path}: the header has two tensors called {name!r}")
            seen.add(name)


def _what_is_wrong(file: BinaryIO) -> str | None:
    """Say why a file that cannot be parsed is not as long as it should be, or that it is something else."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    beginning = file.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        return "it is a pointer of Git LFS: get what it stands for with git lfs pull"
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
                return None  # it is the offsets that are wrong
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return None
        expected += end
    if size < expected:
        return f"it ends after {size:,} of at least {expected:,} bytes: download or copy it again"
    if size > expected:
        return f"it has {size:,} bytes, and its header accounts for {expected:,}: download or copy it again"
    return None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, unbuffered; refuse pipes and devices."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _stamp(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def array_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """Return the shape of a tensor as an array.

    Elements below a byte stay packed, as uint8: along the last axis where that is a whole number of bytes, flat
    otherwise.
    """
    bits, _ = element(tensor.dtype)
    if bits >= 8:
        return tensor.shape
    *rows, length = tensor.shape
    return (*rows, length * bits // 8) if length * bits % 8 == 0 else (tensor.nbytes,)


def as_array(flat: NDArray[np.uint8], tensor: StoredTensor) -> NDArray[Any]:
    """View a tensor's flat bytes in its dtype and shape."""
    return flat.view(dtype_named(element(tensor.dtype)[1])).reshape(array_shape(tensor))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name when it is complete and on disk, and leaves nothing behind if it never is."""
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
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


_FULL: Final = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def _sync_folder(folder: Path) -> None:
    """Put a new name on disk too, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> bytes:
    """Return the length and the header of a file that holds these tensors, in this order.

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
    """Write a safetensors file whose data arrives piece by piece.

    Parameters
    ----------
    path : Path
        Replaced only when the new file is complete, so that maps of an old file of this name stay valid.
    tensors : mapping of name to (dtype, shape)
        As the format spells them.
    data : iterable of C-contiguous arrays
        All bytes of all tensors, in the order of ``tensors``, cut anywhere.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        If the data is not as long as the tensors are.
    """
    expected = sum(nbytes_of(dtype, shape) for dtype, shape in tensors.values())
    written = 0
    with atomic_file(path) as file:
        file.write(header_bytes(tensors, metadata))
        for piece in data:
            written += file.write(bytes_of(piece))
        if written != expected:
            raise ValueError(f"{path}: expected {expected:,} bytes of tensor data, was given {written:,}")


HEADER_ROOM: Final = 1 << 20
"""Left in front of data whose header is written last; enough for some ten thousand tensors."""


def stream_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[NDArray[Any]]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are not known before they come.

    Parameters
    ----------
    path : Path
        Replaced only when the new file is complete.
    tensors : iterable of (name, dtype, shape, data)
        The dtype as the format spells it, the data as C-contiguous arrays, cut anywhere.
    metadata : mapping of str to str, optional
    """
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    with atomic_file(path) as file:
        file.seek(HEADER_ROOM)
        for name, dtype, shape, data in tensors:
            if name in specs:
                raise ValueError(f"two tensors would both be called {name!r}")
            specs[name] = dtype, shape
            for piece in data:
                file.write(bytes_of(piece))
        end, header = file.tell(), header_bytes(specs, metadata)
        if len(header) > HEADER_ROOM or end < 16 * HEADER_ROOM:
            _move(file, HEADER_ROOM, len(header), end - HEADER_ROOM)
        else:  # the format lets a header end in spaces
            header = (HEADER_ROOM - 8).to_bytes(8, "little") + header[8:].ljust(HEADER_ROOM - 8)
        file.seek(0)
        file.write(header)


def _move(file: BinaryIO, begin: int, to: int, nbytes: int) -> None:
    """Move the end of a file, in pieces; what is read next is never overwritten."""
    step = 16 << 20
    offsets = range(0, nbytes, step)
    for offset in offsets if to < begin else reversed(offsets):
        file.seek(begin + offset)
        piece = file.read(min(step, nbytes - offset))
        file.seek(to + offset)
        file.write(piece)
    file.truncate(to + nbytes)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data
