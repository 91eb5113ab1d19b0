"""Copy arrays of the host to a device, through pinned memory.

The worker pool gathers bytes in one of two pinned buffers while the other is copied. Copies are asynchronous, on a
stream of their own. Kernels that use the copies are queued on the caller's stream, and wait for them by events. So
gathering, copying and decoding overlap. This module does not know what the bytes are.
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
from ...text import parse_bytes
from ..cpu.compiler import CompiledFunction, compiled_kernel
from ..cpu.launch import worker_pool
from ..memory import address_of, merged_axes
from .cupy import first_line

BUFFER_BYTES: Final = 32 << 20
"""Largest size of a pinned buffer. Between two copies, the bus and the pool are idle for some microseconds."""

MIN_COPY_BYTES: Final = 8 << 20
"""A part of at least twice this size is split into two copies or more. Smaller copies would wake the pool too often."""

CHUNK_BYTES: Final = 64 << 10
"""Bytes that a worker claims at a time."""

PINNED_VARIABLE: Final = "MXFP4NP_PINNED_BYTES"
PINNED_BYTES: Final = 256 << 20
"""Bound of the pinned memory of a process, if the environment variable is not set. One pair of buffers is always
granted, with buffers of at least `CHUNK_BYTES`."""

POLL: Final = 2e-5
"""Seconds to sleep between polls. Unlike a wait inside CUDA, a sleep can be interrupted."""

SPINS: Final = 1000
"""Polls before the first sleep, for about as long as a copy takes: the shortest sleep takes 70 microseconds."""

HOST_TO_DEVICE: Final = 1  # cudaMemcpyHostToDevice
NOT_READY: Final = 600  # cudaErrorNotReady


class Part(NamedTuple):
    """Arrays that are copied to consecutive bytes of a device.

    Parts may alternate between two areas of the device: each may reuse the memory of the part before the previous one.
    """

    address: int
    sources: list[NDArray[Any]]
    then: Callable[[], object] = lambda: None
    """Called when all copies of the part are queued, to queue the work that uses them on the caller's stream."""


def parts_of(source: NDArray[Any], target: Any) -> Iterator[Part]:
    """Split the copy of an array to a contiguous one of any dtype, so that little is converted at a time."""
    address = target.data.ptr
    for index in split(source.shape, target.itemsize, BUFFER_BYTES):
        array = np.asarray(source[index])
        yield Part(address, [array.astype(target.dtype, copy=False)])
        address += array.size * target.itemsize


def transfer(parts: Iterable[Part], num_threads: int) -> None:
    """Copy parts to the current device, one after the other.

    Returns when all sources have been read. Whatever is queued on the current stream afterwards runs after the copies.
    """
    import cupy

    kernel = compiled_kernel("gather", "gather")
    if kernel is None:
        raise BackendUnavailableError("copying from the host to a device needs compiled code: unset NUMBA_DISABLE_JIT")
    stream, copy_stream = cupy.cuda.get_current_stream(), _copy_stream(cupy.cuda.Device().id)
    pair = pinned.take()
    try:
        # A part may reuse the memory of the part before the previous one, once the caller's stream is done with that.
        before_previous = previous = _record(stream)
        for part in parts:
            copy_stream.wait_event(before_previous)
            sources = [_Runs.of(source) for source in part.sources]
            total = sum(source.nbytes for source in part.sources)
            copies = max(1, -(-total // (pair.nbytes // 2)), min(2, total // MIN_COPY_BYTES))
            copy_bytes = max(1, -(-total // copies))
            for begin in range(0, total, copy_bytes):
                count = min(copy_bytes, total - begin)
                buffer = next(pair.in_turn)
                buffer.wait()
                _gather(kernel, sources, begin, count, buffer.address, num_threads)
                address = part.address + begin
                cupy.cuda.runtime.memcpyAsync(address, buffer.address, count, HOST_TO_DEVICE, copy_stream.ptr)
                buffer.copied = _record(copy_stream)
            stream.wait_event(_record(copy_stream))
            part.then()
            before_previous, previous = previous, _record(stream)
    except BaseException:
        copy_stream.synchronize()  # the caller may free the memory that is copied to
        pinned.give_back(pair)
        raise
    pinned.give_back(pair)


class _Runs(NamedTuple):
    """An array as runs of contiguous bytes, which begin a stride apart."""

    source: NDArray[Any]
    run_bytes: int
    run_stride: int

    @classmethod
    def of(cls, source: NDArray[Any]) -> Self:
        """Describe an array, or a contiguous copy of it if its strides need more axes."""
        axes = merged_axes(source.shape, source.strides)
        if len(axes) > 2 or (axes and axes[-1][1] != source.itemsize):
            source = np.ascontiguousarray(source)
            axes = [(source.size, source.itemsize)]
        *outer, (count, _) = axes or [(1, 0)]
        return cls(source, count * source.itemsize, outer[0][1] if outer else 0)


def _gather(
    kernel: CompiledFunction, sources: list[_Runs], skip: int, count: int, target: int, num_threads: int
) -> None:
    """Copy ``count`` bytes of the sources, after ``skip`` bytes of them, to an address of the host."""
    from ..cpu.gather import GATHER

    for runs in sources:
        here = min(count, runs.source.nbytes - skip)
        if here > 0:
            job = np.array((address_of(runs.source), runs.run_bytes, runs.run_stride, skip, target), GATHER)
            worker_pool().run(kernel.address, address_of(job), here, (CHUNK_BYTES, CHUNK_BYTES), num_threads)
            target, count = target + here, count - here
        skip = max(0, skip - runs.source.nbytes)


class _Buffer:
    """Pinned memory, for one copy at a time."""

    def __init__(self, nbytes: int) -> None:
        import cupy

        self._memory = cupy.cuda.PinnedMemory(nbytes)
        self.address = self._memory.ptr
        self.copied: Any = None
        """The event after the last copy from this buffer."""

    def wait(self) -> None:
        """Wait until the last copy from this buffer is done, or raise the error of the device."""
        import cupy

        if self.copied is None:
            return
        polls = 0
        while cupy.cuda.runtime.eventQuery(self.copied.ptr) == NOT_READY:
            time.sleep(POLL if polls > SPINS else 0)
            polls += 1
        self.copied.synchronize()  # raises an error, which a query only returns


class _Pair:
    """Two buffers of one size, which are used in turn."""

    def __init__(self, nbytes: int) -> None:
        self.buffers = _Buffer(nbytes), _Buffer(nbytes)
        self.in_turn = itertools.cycle(self.buffers)
        self.nbytes = 2 * nbytes


class _Pinned:
    """The pinned memory of this process: pairs of buffers, which are kept from one transfer to the next.

    An interrupted transfer may not give its pair back, which is then freed: `_all` holds weak references only.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may need a pair too
        self._free: list[_Pair] = []
        self._all: weakref.WeakSet[_Pair] = weakref.WeakSet()

    def take(self) -> _Pair:
        """Return a pair that is not in use, or a new one; wait for one if the bound allows no new one."""
        bound = _pinned_bytes()
        nbytes = max(CHUNK_BYTES, min(BUFFER_BYTES, bound // 2))
        while True:
            with self._lock:
                if self._free:
                    return self._free.pop()
                if not self._all or sum(pair.nbytes for pair in self._all) + 2 * nbytes <= bound:
                    return self._new(nbytes)
            time.sleep(POLL)

    def _new(self, nbytes: int) -> _Pair:
        try:
            pair = _Pair(nbytes)
        except Exception as error:
            raise DeviceMemoryError(
                f"the system grants no pinned memory ({first_line(error)}): {2 * nbytes:,} bytes are needed"
            ) from error
        self._all.add(pair)
        return pair

    def give_back(self, pair: _Pair) -> None:
        """Make a pair available to others. Copies from it may still be running."""
        with self._lock:
            self._free.append(pair)

    def release(self) -> None:
        """Return all memory that is not in use to the system."""
        with self._lock:
            pairs, self._free = self._free, []
        for pair in pairs:
            for buffer in pair.buffers:
                buffer.wait()


pinned = _Pinned()


def _pinned_bytes() -> int:
    text = os.environ.get(PINNED_VARIABLE, "").strip()
    try:
        return parse_bytes(text) if text else PINNED_BYTES
    except ValueError as error:
        raise ValueError(f"{PINNED_VARIABLE}: {error}") from error


def _record(stream: Any) -> Any:
    """Return a new event of the current device, recorded on a stream of it."""
    import cupy

    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


@functools.cache
def _copy_stream(device: int) -> Any:
    """Return the stream of a device on which all copies from the host run."""
    import cupy

    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)
