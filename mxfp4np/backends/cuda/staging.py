"""Host to device: bytes are gathered in pinned memory, copied asynchronously, and used behind the copy.

Two pinned buffers take turns: while one is copied, the worker pool fills the other. Copies have a stream of their own,
and what uses them is queued on the caller's, so that both go on while the host gathers what comes next. Nothing here
knows what the bytes are.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError, DeviceMemoryError
from ...shapes import split
from ..cpu.compiler import CompiledFunction, compiled_kernel, worker_pool
from ..memory import address_of, merged_axes
from .cupy import first_line

BUFFER_BYTES: Final = 32 << 20
"""Bytes of a pinned buffer, at most: the bus and the pool rest for some microseconds in between."""

PIECE_BYTES: Final = 1 << 20
"""Bytes that are copied at a time, at least, unless there are fewer."""

PIECES: Final = 8
"""Pieces that a small transfer is cut into, so that gathering and copying overlap."""

CHUNK_BYTES: Final = 256 << 10
"""Bytes that a thread gathers at a time."""

PINNED_VARIABLE: Final = "MXFP4NP_PINNED_BYTES"
PINNED_BYTES: Final = 256 << 20
"""Pinned memory of a process at most, if the environment variable does not say."""

POLL: Final = 2e-5
"""Seconds between looks whether a copy is done: waiting in CUDA could not be interrupted."""

HOST_TO_DEVICE: Final = 1  # cudaMemcpyHostToDevice


class Part(NamedTuple):
    """Arrays that are copied to consecutive bytes of a device. Every other part may use the same memory there."""

    address: int
    sources: list[NDArray[Any]]
    then: Callable[[], object] = lambda: None
    """Called when all copies are queued; queues what uses them on the caller's stream."""


def parts_of(source: NDArray[Any], target: Any) -> Iterator[Part]:
    """Cut an array that is to be copied to a contiguous one, so that little is converted at a time."""
    address = target.data.ptr
    for index in split(source.shape, target.itemsize, BUFFER_BYTES):
        piece = np.asarray(source[index])
        yield Part(address, [piece.astype(target.dtype, copy=False)])
        address += piece.size * target.itemsize


def transfer(parts: Iterable[Part], nbytes: int, num_threads: int) -> None:
    """Copy parts, of so many bytes together, to the current device.

    Returns when nothing is left to read from the host; what comes later on the current stream comes after it.
    """
    import cupy

    kernel = compiled_kernel("gather", "gather")
    if kernel is None:
        raise BackendUnavailableError(
            "bytes of the host are brought to a device by compiled code: unset NUMBA_DISABLE_JIT"
        )
    stream, copying = cupy.cuda.get_current_stream(), _copy_stream(cupy.cuda.Device().id)
    pair = pinned.take()
    turns = itertools.cycle(pair.buffers)
    piece_bytes = min(pair.nbytes // 2, max(PIECE_BYTES, nbytes // PIECES))
    try:
        before_last = last = _recorded(stream)  # whoever used the memory of a part before
        for part in parts:
            copying.wait_event(before_last)
            address = part.address
            for source in part.sources:
                runs = _Runs.of(source)
                for begin in range(0, source.nbytes, piece_bytes):
                    count = min(piece_bytes, source.nbytes - begin)
                    buffer = next(turns)
                    buffer.wait()
                    _gather(kernel, runs, begin, count, buffer.address, num_threads)
                    cupy.cuda.runtime.memcpyAsync(address, buffer.address, count, HOST_TO_DEVICE, copying.ptr)
                    buffer.copied = _recorded(copying)
                    address += count
            stream.wait_event(_recorded(copying))
            part.then()
            before_last, last = last, _recorded(stream)
    except BaseException:
        copying.synchronize()  # the memory that is copied to may be freed
        raise
    finally:
        pinned.give_back(pair)


class _Runs(NamedTuple):
    """Where the bytes of an array lie: in runs, a stride apart."""

    source: NDArray[Any]
    nbytes: int
    stride: int

    @classmethod
    def of(cls, source: NDArray[Any]) -> Self:
        """Describe an array, or a copy of it if its strides are less simple."""
        axes = merged_axes(source.shape, source.strides)
        if len(axes) > 2 or (axes and axes[-1][1] != source.itemsize):
            source = np.ascontiguousarray(source)
            axes = [(source.size, source.itemsize)]
        *outer, (count, _) = axes or [(1, 0)]
        return cls(source, count * source.itemsize, outer[0][1] if outer else 0)


def _gather(kernel: CompiledFunction, runs: _Runs, skip: int, count: int, target: int, num_threads: int) -> None:
    """Gather ``count`` bytes at an address, by the worker pool where that pays."""
    from ..cpu.gather import GATHER

    job = np.array((address_of(runs.source), runs.nbytes, runs.stride, skip, target), GATHER)
    if count <= PIECE_BYTES // 2:
        kernel.call(address_of(job), 0, count)
        return
    worker_pool().run(kernel.address, address_of(job), count, (CHUNK_BYTES, CHUNK_BYTES), num_threads)


class _Buffer:
    """Pinned memory, for one copy at a time."""

    def __init__(self, nbytes: int) -> None:
        import cupy

        self._memory = cupy.cuda.PinnedMemory(nbytes)
        self.nbytes, self.address = nbytes, self._memory.ptr
        self.copied: Any = None
        """The event that what is in it has been copied."""

    def wait(self) -> None:
        """Wait until what is in it has been copied."""
        while self.copied is not None and not self.copied.done:
            time.sleep(POLL)


class _Pair:
    """Two buffers of one size."""

    def __init__(self, nbytes: int) -> None:
        self.buffers = _Buffer(nbytes), _Buffer(nbytes)
        self.nbytes = 2 * nbytes


class _Pinned:
    """The pinned memory of this process: pairs of buffers that are kept from one transfer to the next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free: list[_Pair] = []
        self._all: weakref.WeakSet[_Pair] = weakref.WeakSet()

    def take(self) -> _Pair:
        """Return a pair that nobody uses, or a new one; wait for one where the bound allows no more."""
        bound = _pinned_bytes()
        nbytes = max(1, min(BUFFER_BYTES, bound // 2))
        with self._changed:
            while not self._free and self._all and sum(pair.nbytes for pair in self._all) + 2 * nbytes > bound:
                self._changed.wait(timeout=1)  # nobody tells of a pair that an interrupt has lost
            if self._free:
                return self._free.pop()
            try:
                pair = _Pair(nbytes)
            except Exception as error:
                raise DeviceMemoryError(
                    f"the system grants no pinned memory ({first_line(error)}): {2 * nbytes:,} bytes are needed"
                ) from error
            self._all.add(pair)
            return pair

    def give_back(self, pair: _Pair) -> None:
        """Let others have a pair, whose copies may still be under way."""
        with self._changed:
            self._free.append(pair)
            self._changed.notify()

    def release(self) -> None:
        """Return all memory that is not in use to the system."""
        with self._changed:
            pairs, self._free = self._free, []
            self._all.difference_update(pairs)
            self._changed.notify_all()
        for pair in pairs:
            for buffer in pair.buffers:
                buffer.wait()


pinned = _Pinned()


def _pinned_bytes() -> int:
    text = os.environ.get(PINNED_VARIABLE, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{PINNED_VARIABLE} must be a number of bytes, found {text!r}")
    return int(text) if text else PINNED_BYTES


def _recorded(stream: Any) -> Any:
    """Return an event that is recorded on a stream of the current device."""
    import cupy

    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


@functools.cache
def _copy_stream(device: int) -> Any:
    """Return the stream of a device, the current one, for copies from the host."""
    import cupy

    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)
