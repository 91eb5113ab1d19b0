"""One file of tensors: their dtypes as headers spell them, where each lies, and views of the bytes, mapped or read.

The header of a format is read by a subclass (`safetensors`, `gguf`). This module knows nothing of MXFP4 or of how
models name their tensors.
"""

from __future__ import annotations

import math
import mmap
import operator
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..backends.memory import address_of, aligned_empty
from ..errors import CheckpointError
from ..format import dtype_named
from ..shapes import basic_indices, full_index, is_advanced
from .named import named
from .regular import open_regular, stat_of
from .remote import AnyPath, RemotePath
from .stores import RemoteStat

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
"""Bits of an element and the type to view it as, for each dtype of safetensors.

NumPy has no type for elements below a byte: their packed bytes are viewed as uint8.
"""

Stamp = tuple[int, int, int] | RemoteStat

AHEAD: Final = 4
"""Chunks of a remote tensor that are read ahead."""

MAX_AXES: Final = 64
MAX_ELEMENTS: Final = 1 << 56
"""What NumPy can hold, decoded sizes included; files can claim more if an axis is empty."""

SAFETENSORS_DTYPES: Final = {numpy: name for name, (bits, numpy) in DTYPES.items() if bits >= 8}
"""The name in safetensors of each NumPy or ml_dtypes type."""


def element(dtype: str) -> tuple[int, str]:
    """Return the bits of an element and the name of its NumPy type; dtypes of other formats are raw bytes."""
    return DTYPES.get(dtype, (8, "uint8"))


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of a safetensors dtype."""
    return math.prod(shape) * DTYPES[dtype][0] // 8


def is_possible(shape: tuple[int, ...]) -> bool:
    """Tell whether an array can have this shape, which may be any if it has no elements."""
    return len(shape) <= MAX_AXES and math.prod(n for n in shape if n) <= MAX_ELEMENTS


class StoredTensor(NamedTuple):
    """One tensor as its file describes it: a header entry, and a place in the file."""

    name: str
    dtype: str
    """As the header spells it, for instance ``"BF16"``; of a GGUF file also ``"MXFP4"`` or ``"Q8_0"``."""
    shape: tuple[int, ...]
    """As in the header: of elements."""
    file: TensorFile
    offset: int
    """In bytes, from the beginning of the file."""
    nbytes: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape as bytes, along the last axis; flat if a row is not a whole number of bytes."""
        *rows, length = self.shape or (1,)
        if self.dtype not in DTYPES:  # in blocks
            count = math.prod(rows)
            return (*rows, self.nbytes // count) if count and self.nbytes % count == 0 else (self.nbytes,)
        bits = length * element(self.dtype)[0]
        return (*rows, bits // 8) if bits % 8 == 0 else (self.nbytes,)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape as an array; elements below a byte, and blocks of them, stay packed in bytes."""
        return self.shape if self.dtype in DTYPES and element(self.dtype)[0] >= 8 else self.byte_shape

    def view(self) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Return the memory that `TensorFile.view` returns, and a view of it in the stored dtype and shape."""
        memory = self.file.view(self)
        return memory, memory.view(dtype_named(element(self.dtype)[1])).reshape(self.array_shape)

    def array(self, index: Any = None, out: Any = None) -> Any:
        """Return the tensor in its stored dtype, or the part of it that a NumPy index selects.

        A mapped file gives a read-only view, or a copy if the index has lists or masks. Of a file that is read, only
        what the index selects is read: into ``out``, which is returned, if that is an array that it fits.
        """
        memory, whole = self.view()
        if index is None:
            return self.file.read(self, memory, whole, out)
        if self.file.io != "pread":
            return whole[index]
        if not is_advanced(index):
            part = whole[index]
            if isinstance(part, np.ndarray) and np.may_share_memory(part, memory):
                return self.file.read(self, memory, part, out)
        try:
            shape, pairs = basic_indices(full_index(index, whole.ndim), whole.shape)
        except IndexError:  # NumPy raises its own, or knows more kinds of items
            return self.file.read(self, memory, whole)[index]
        out = aligned_empty(shape, whole.dtype)
        for place, basic in pairs:
            out[place] = self.file.read(self, memory, whole[(*basic, ...)])
        return out[()]  # a scalar if it has no axes


class StoredArrays(Mapping[str, Any]):
    """The arrays of stored tensors by name, each made when it is asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name].array()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        return f"<{len(self)} stored tensors>"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class TensorFile:
    """One file of tensors, header read and validated, data untouched; a subclass for each format.

    With ``io="mmap"`` the file is mapped; with ``io="pread"``, and always if it is remote, each tensor is read when it
    is asked for. If a mapped file is truncated, the process that reads it is killed; ``"pread"`` raises an error.

    Attributes
    ----------
    tensors : dict of str to StoredTensor
        In the order of their bytes.
    metadata : dict of str to str
    parts : int
        Number of files that the checkpoint is split into, if the header says so.
    stamp : tuple of int, or RemoteStat
        See `stamp_of`.
    """

    def __init__(self, path: AnyPath, io: str = "mmap") -> None:
        self.path, self.io = path, "pread" if isinstance(path, RemotePath) else io
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self.parts = 1
        self._map: NDArray[np.uint8] | None = None
        self._descriptor: _Descriptor | None = None
        self._closed = False
        self._lock = threading.Lock()
        with named(path, "read"), open_regular(path) as file:
            self.stamp = stamp_of(stat_of(file))
            self._read_header(file)

    def _read_header(self, file: BinaryIO) -> None:
        """Set `tensors` and `metadata`."""
        raise NotImplementedError

    @property
    def ahead(self) -> int:
        """How many chunks of a tensor are best read ahead of the one that is used: answers of servers take a while."""
        return AHEAD if isinstance(self.path, RemotePath) else 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, io={self.io!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (other.path, other.stamp) == (self.path, self.stamp)

    def __hash__(self) -> int:
        return hash((self.path, self.stamp))

    def __getstate__(self) -> dict[str, Any]:
        """Return the name and the stamp of the file, without its header: a `StoredTensor` is pickled with its file."""
        return {"path": self.path, "io": self.io, "stamp": self.stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            state, tensors={}, metadata={}, _map=None, _descriptor=None, _closed=False, _lock=threading.Lock()
        )

    def close(self) -> None:
        """Release the file. A map stays as long as there is a view of it, a descriptor until reads that began end."""
        with self._lock:
            self._closed, self._map, self._descriptor = True, None, None

    def view(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """Return the tensor's bytes, flat: a view of the map, or of reserved memory that stands for it (see `read`)."""
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.path}: this checkpoint is closed")
            if self.io == "pread":
                if self._descriptor is None and isinstance(self.path, Path):
                    with self._reopen() as file:
                        self._descriptor = _Descriptor(os.dup(file.fileno()))
                return _reserved(tensor.nbytes)
            if self._map is None:
                with self._reopen() as file:  # the map keeps the file open
                    try:
                        self._map = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
                    except (OSError, ValueError) as error:
                        raise CheckpointError(f"{self.path}: cannot be mapped ({error}): try io='pread'") from error
            return self._map[tensor.offset : tensor.offset + tensor.nbytes]

    def is_unchanged(self) -> bool:
        """Tell whether the file is still the one that was opened."""
        with named(self.path, "read"):
            return stamp_of(self.path.stat()) == self.stamp

    def _reopen(self) -> BinaryIO:
        # A checkpoint may have more files than a process may keep open, so each is opened again when first needed.
        file = open_regular(self.path)
        with named(self.path, "read"):
            stamp = stamp_of(stat_of(file))
        if stamp != self.stamp:
            file.close()
            raise CheckpointError(f"{self.path}: was replaced or changed after it was opened: open it again")
        return file

    def read(
        self, tensor: StoredTensor, memory: NDArray[np.uint8], part: NDArray[Any], out: Any = None
    ) -> NDArray[Any]:
        """Return ``part``, any view of the ``memory`` that `view` returned, with the bytes of the file in it.

        It is ``part`` itself if the file is mapped, otherwise ``out``, if that is an array that it fits, or a new one,
        into which only the bytes of ``part`` are read.
        """
        if self.io != "pread":
            return part
        target: NDArray[Any] = out if _fits(part, out) else aligned_empty(part.shape, part.dtype)
        if not target.size:
            return target
        axis, nbytes = part.ndim, part.itemsize  # the axes from `axis` on are contiguous: nbytes to one read
        while axis and (part.shape[axis - 1] == 1 or part.strides[axis - 1] == nbytes):
            axis -= 1
            nbytes *= part.shape[axis]
        begin = tensor.offset + address_of(part) - address_of(memory)
        flat = target.reshape(-1).view(np.uint8)
        steps = part.strides[:axis]
        spans = (
            (begin + sum(map(operator.mul, index, steps)), flat[i * nbytes : (i + 1) * nbytes])
            for i, index in enumerate(np.ndindex(part.shape[:axis]))
        )
        descriptor = self._descriptor
        if isinstance(self.path, RemotePath) and isinstance(self.stamp, RemoteStat) and not self._closed:
            self.path.read_spans(self.stamp, spans)
        elif descriptor is not None:
            for offset, place in spans:
                self._read_into(place.data, offset, tensor, descriptor)
        else:
            raise CheckpointError(f"{self.path}: this checkpoint is closed")
        return target

    def _read_into(self, target: memoryview, offset: int, tensor: StoredTensor, descriptor: _Descriptor) -> None:
        while target:
            if hasattr(os, "preadv"):
                with named(self.path, "read"):
                    count = os.preadv(descriptor.number, [target], offset)
            else:
                with self._lock:
                    os.lseek(descriptor.number, offset, os.SEEK_SET)
                    data = os.read(descriptor.number, len(target))
                count = len(data)
                target[:count] = data
            if not count:
                raise CheckpointError(
                    f"{self.path}: truncated after it was opened: tensor {tensor.name!r} ends at byte "
                    f"{tensor.offset + tensor.nbytes:,}, the file at {offset:,}"
                )
            target, offset = target[count:], offset + count


def _fits(part: NDArray[Any], out: Any) -> TypeGuard[NDArray[Any]]:
    """Tell whether an array can be read into ``out`` as it is."""
    is_alike = isinstance(out, np.ndarray) and (out.shape, out.dtype) == (part.shape, part.dtype)
    return is_alike and out.flags.c_contiguous and out.flags.writeable


class _Descriptor:
    """A file descriptor that is closed when nothing refers to it any more: never during a read.

    The number of one that is closed may be that of another file a moment later.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _reserved(nbytes: int) -> NDArray[np.uint8]:
    """Return pages that are reserved and never touched: only their addresses matter."""
    options = {}
    if hasattr(mmap, "MAP_PRIVATE"):  # private and read-only, so that they count against no limit
        options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, "prot": mmap.PROT_READ}
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes), **options), np.uint8)[:nbytes]


def wrong_beginning(beginning: bytes, expected: str) -> str:
    """Return what is wrong with a file that begins with other bytes than its format has."""
    if not any(beginning):
        return f"it {'begins with zeros' if beginning else 'is empty'}: it is damaged, download or copy it again"
    return f"it begins with {beginning!r}, which is not {expected}: it is a file of another kind"


def stamp_of(found: os.stat_result | RemoteStat) -> Stamp:
    """Return by what a file that has changed is known: its size, and the times of changes of its bytes and its inode.

    The last one cannot be set, unlike that of the bytes. Numbers of inodes are left out: some network file systems give
    a file another one after a while. A remote file has a size, the time of its last change, and an ETag.
    """
    if isinstance(found, RemoteStat):
        return found
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
