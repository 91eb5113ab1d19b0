"""The CUDA backend: drives the kernels of `mxfp4np.backends.cuda_kernels` with CuPy.

Decides what the kernels must not: which of them fits an array, on which device and stream it runs, and how packed bytes
get there from host memory. CuPy is imported when a CUDA device or array is first used.

Work is queued on the caller's current stream, and results are ready for whatever comes later on it. Bytes from the host
are gathered by several threads in pinned memory, and copied on a stream of their own while earlier ones are decoded.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, DeviceMemoryError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, name_of, split
from . import cuda_kernels
from .cpu import compiled
from .cpu_kernels import FIRST_SLOT, GOING_ON, PIECE_BYTES, PIECES_OF_SLOT, SLOT_NUMBERS, SLOTS_TAKEN
from .cuda_kernels import ROW_AXES, ROWS, THREADS, VALUES, VECTORS
from .memory import address_of, is_transposed, merged_axes, type_of
from .threads import default_num_threads, in_threads

SLOT_BYTES: Final = 8 << 20
"""Bytes that are copied to a device at a time."""

SLOTS: Final = 8
"""Slots that are in use at a time: full ones wait for the bus while others are filled."""

FILL_BYTES: Final = 256 << 10
"""Bytes that a thread puts into a slot at a time: they stay in its cache until the device has them."""

STAGED_BYTES: Final = 64 << 20
"""Packed bytes that are decoded at a time, where they come from the host; a device keeps memory for two times that."""

PINNED_VARIABLE: Final = "MXFP4NP_PINNED_BYTES"
PINNED_BYTES: Final = 256 << 20
"""Pinned memory of a process at most, if the environment variable does not say."""

MOST_VECTORS: Final = (1 << 31) - 1
"""Vectors that rows with gaps are decoded to at a time: what a kernel counts in 32 bits."""

OLDEST_CUPY: Final = 14

_UINT8: Final = np.dtype(np.uint8)

_ROUND_UP: Final = {"floor": 0, "even": 0x200000, "rceil": 0x3FFFFF, "ceil": 0x7FFFFF}
"""What carries into the exponent of a float32 whose scale a rule rounds up."""


class CUDABackend:
    """CuPy on one NVIDIA GPU.

    Parameters
    ----------
    ordinal : int, optional
        Of the device; without it, whichever is the current one.

    Raises
    ------
    BackendUnavailableError
        If CuPy, a driver or a device is missing.
    ValueError
        If there is no such device.
    """

    name = "cuda"

    def __init__(self, ordinal: int | None = None) -> None:
        self._cupy, count = _working_cupy()
        if ordinal is not None and ordinal >= count:
            there = ", ".join(repr(f"cuda:{i}") for i in range(count))
            raise ValueError(f"no device 'cuda:{ordinal}': this machine has {there}")
        self._ordinal = ordinal

    def available(self) -> bool:
        return True

    def _device(self) -> Any:
        return self._cupy.cuda.Device(self._ordinal)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        with self._device() as device:
            nbytes = math.prod(shape) * dtype.itemsize
            try:
                return self._cupy.empty(shape, dtype)
            except MemoryError as error:
                raise DeviceMemoryError(_memory_needed(self._cupy, device, nbytes)) from error
            except (TypeError, ValueError) as error:
                raise BackendUnavailableError(
                    f"CuPy {self._cupy.__version__} with NumPy {np.__version__} has no dtype {dtype} (bfloat16 needs "
                    "NumPy 2.1.2): use device='cpu'"
                ) from error

    def asarray(self, array: NDArray[Any]) -> Any:
        out = self.empty(array.shape, array.dtype)
        self.store(array, out)
        return out

    def store(self, array: NDArray[Any], out: Any) -> None:
        if not out.size:
            return
        with out.device:
            target = out if out.flags.c_contiguous else self.empty(out.shape, out.dtype)
            _Transfer(_parts(array, target), target.nbytes).run(default_num_threads())
            if target is not out:
                out[...] = target

    def check_out(self, out: Any, *inputs: Any) -> None:
        cupy = self._cupy
        if not isinstance(out, cupy.ndarray):
            raise TypeError(f"out must be a cupy.ndarray, found {type_of(out)}")
        if self._ordinal not in (None, out.device.id):
            raise ValueError(f"out must be on 'cuda:{self._ordinal}', found one on 'cuda:{out.device.id}'")
        _check_aligned(out, "out")
        for array in inputs:
            if isinstance(array, cupy.ndarray) and cupy.may_share_memory(out, array):
                raise ValueError("out must not overlap what it is made from")

    def release(self) -> None:
        _pinned.release()

    def decode(
        self,
        blocks: Any,
        scales: Any,
        out: Any,
        *,
        start: int = 0,
        order: str = "pairs",
        fresh: bool = False,  # noqa: ARG002
        num_threads: int | None = None,
    ) -> None:
        if not out.size:
            return
        halves = order == "halves"
        with out.device:
            if not isinstance(blocks, np.ndarray):
                _same_device(out, blocks, scales)
                _decode(blocks, scales, out, start, halves)
            else:
                self._decode_staged(blocks, scales, out, start, halves, num_threads or default_num_threads())

    def _decode_staged(
        self, blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: Any, start: int, halves: bool, threads: int
    ) -> None:
        """Decode from host memory: part by part, through two buffers on the device in turn."""
        indices = list(split(scales.shape, 1 + BYTES_PER_BLOCK, STAGED_BYTES, (ROWS, 1)))
        largest = max(scales[index].size for index in indices)
        sizes = largest * BYTES_PER_BLOCK, largest
        buffers = [[self.empty((size,), _UINT8) for size in sizes] for _ in indices[:2]]

        def decode(index: Any, codes: Any, factors: Any) -> None:
            span = index[-1]
            begin, end = BLOCK_SIZE * span.start - start, BLOCK_SIZE * span.stop - start
            target = out[(*index[:-1], slice(max(0, begin), min(end, out.shape[-1])))]
            _decode(codes, factors, target, max(0, -begin), halves)

        def parts() -> Iterator[_Part]:
            before: list[Any] = [None, None]  # when those are done whose buffers are used again
            for index, buffer in zip(indices, itertools.cycle(buffers), strict=False):
                sources = blocks[index], scales[index]
                targets = [b[: s.size].reshape(s.shape) for b, s in zip(buffer, sources, strict=True)]
                loads = [load for s, t in zip(sources, targets, strict=True) for load in _loads(s, _UINT8, t.data.ptr)]
                done = _event()
                yield _Part(loads, done, partial(decode, index, *targets), before.pop(0))
                before.append(done)

        _Transfer(parts(), blocks.nbytes + scales.nbytes).run(threads)

    def encode(
        self,
        x: Any,
        blocks: Any,
        scales: Any,
        *,
        rule: str,
        num_threads: int | None = None,  # noqa: ARG002
    ) -> None:
        if not x.size:
            return
        with blocks.device:
            if isinstance(x, np.ndarray):
                x = self.asarray(x)
            _same_device(blocks, x, scales)
            _check_aligned(x, "x")
            _encode(x, blocks, scales, rule)


# Which CuPy, and what it says when something is missing


def as_cupy(array: Any) -> NDArray[Any]:
    """Return a view as a CuPy array of an array that some library has on a CUDA device."""
    view: NDArray[Any] = _working_cupy()[0].asarray(array)
    return view


@functools.cache
def _working_cupy() -> tuple[Any, int]:
    """Return CuPy and the number of devices."""
    instead = "device='cpu' works without it"
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailableError(
            "CUDA arrays need CuPy: python -m pip install 'mxfp4np[cuda12]' (or cuda13, to match the driver); "
            f"{instead}" + ("" if isinstance(error, ModuleNotFoundError) else f" ({_first_line(error)})")
        ) from error
    if int(cupy.__version__.split(".")[0]) < OLDEST_CUPY:
        raise BackendUnavailableError(
            f"CUDA arrays need CuPy {OLDEST_CUPY} or newer, found {cupy.__version__}: python -m pip install --upgrade "
            f"'mxfp4np[cuda12]' (or cuda13); {instead}"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise BackendUnavailableError(
            f"CuPy {cupy.__version__} finds no NVIDIA driver or device that it can use ({_first_line(error)}): install "
            "the driver, or the extra that matches it, cuda12 or cuda13; device='cpu' works without one"
        ) from error
    return cupy, count


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _memory_needed(cupy: Any, device: Any, nbytes: int) -> str:
    free = device.mem_info[0] + cupy.get_default_memory_pool().free_bytes()
    return (
        f"cuda:{device.id} is out of memory: {nbytes:,} bytes are needed, {free:,} are free: ask for a part with "
        "index=, or for chunks()"
    )


def _same_device(out: Any, *inputs: Any) -> None:
    for array in inputs:
        if array.device != out.device:
            raise ValueError(f"arrays must be on one device, found 'cuda:{array.device.id}' and 'cuda:{out.device.id}'")


def _check_aligned(array: Any, what: str) -> None:
    """Refuse elements at addresses that are no multiples of their size, which a device cannot load or store."""
    size = array.itemsize
    strides = [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    if array.data.ptr % size or any(stride % size for stride in strides):
        raise ValueError(f"{what} must have its elements of {size} bytes at multiples of {size}: copy it first")


def _launch(kernel: Callable[[str], Any], dtype: np.dtype[Any], *arguments: Any, threads: int | None = None) -> None:
    """Queue a kernel, built if it has not been used before: for so many threads, or as many as elements."""
    options = {} if threads is None else {"size": threads, "block_size": THREADS}
    try:
        kernel(name_of(dtype))(*arguments, **options)
    except Exception as error:
        from cupy.cuda.compiler import CompileException

        if not isinstance(error, CompileException | NotImplementedError | ImportError | OSError):
            raise  # not what its compiler, or the lack of one, comes as
        raise BackendUnavailableError(
            f"CuPy cannot compile for this device ({_first_line(error)}): install the extra cuda12 or cuda13, which "
            "brings CUDA's compiler; device='cpu' works without it"
        ) from error


def _in_blocks(threads: int) -> int:
    """Return so many threads, or a few more that fill up CUDA blocks."""
    return -(-threads // THREADS) * THREADS


def _raw(array: Any, offset: int = 0) -> Any:
    """Return an array of one byte, so many bytes behind the address of another: a kernel finds the rest."""
    import cupy

    return cupy.ndarray((1,), cupy.uint8, array.data + offset)


# Decoding and encoding what is on the current device


def _decode(blocks: Any, scales: Any, out: Any, start: int, halves: bool) -> None:
    if start or out.shape[-1] != BLOCK_SIZE * scales.shape[-1]:
        _decode_any(blocks, scales, out, start, halves)
        return
    contiguous = blocks.flags.c_contiguous and scales.flags.c_contiguous and out.flags.c_contiguous
    if contiguous and blocks.data.ptr % 4 == 0 == out.data.ptr % 16:
        vectors = out.nbytes // 16
        arguments = _raw(blocks), _raw(scales), halves, vectors, _raw(out)
        _launch(cuda_kernels.decode, out.dtype, *arguments, threads=_in_blocks(-(-vectors // VECTORS)))
        return
    transposed = is_transposed(out)
    lead, most = (scales.ndim - 2, 1) if transposed else (scales.ndim - 1, ROW_AXES)
    lines = out.swapaxes(-1, -2) if transposed else out
    outer = merged_axes(out.shape[:lead], out.strides[:lead])
    if len(outer) > most or lines.shape[-1] * out.itemsize % 16 or not _is_dense(lines, 1, 16):
        _decode_any(blocks, scales, out, start, halves)
        return
    axes = merged_axes(out.shape[:lead], *(array.strides[:lead] for array in (blocks, scales, out)))
    if len(axes) > most or not _is_dense(blocks, 2, 16 if transposed else 4) or not _is_dense(scales, 1, 1):
        # What does not lie as the kernel wants it is copied: it is half as large as the output at most.
        blocks, scales = blocks.copy(), scales.copy()
        axes = merged_axes(out.shape[:lead], *(array.strides[:lead] for array in (blocks, scales, out)))
    (_decode_columns if transposed else _decode_rows)(blocks, scales, out, axes, halves)


def _is_dense(array: Any, inner: int, grain: int) -> bool:
    """Tell whether the innermost axes are contiguous, and address and other strides multiples of so many bytes."""
    step = array.itemsize
    for n, stride in zip(array.shape[: -inner - 1 : -1], array.strides[: -inner - 1 : -1], strict=True):
        if n > 1 and stride != step:
            return False
        step *= n
    outer = zip(array.shape[:-inner], array.strides[:-inner], strict=True)
    return array.data.ptr % grain == 0 and all(n <= 1 or stride % grain == 0 for n, stride in outer)


def _decode_rows(blocks: Any, scales: Any, out: Any, axes: list[tuple[int, ...]], halves: bool) -> None:
    """Decode rows along a few axes, whose lengths and strides are given."""
    per_row = out.shape[-1] * out.itemsize // 16
    sizes, *steps = zip(*axes, *[(1, 0, 0, 0)] * (ROW_AXES - len(axes)), strict=True)
    each = math.prod(sizes[1:]) * per_row  # vectors for a step along the first axis
    most = MOST_VECTORS // each
    if not most:
        _decode_any(blocks, scales, out, 0, halves)
        return
    for first in range(0, sizes[0], most):
        vectors = min(most, sizes[0] - first) * each
        raw = [_raw(array, first * step[0]) for array, step in zip((blocks, scales, out), steps, strict=True)]
        arguments = *raw[:2], halves, vectors, per_row, *sizes[1:], *itertools.chain(*steps), raw[2]
        _launch(cuda_kernels.decode_rows, out.dtype, *arguments, threads=_in_blocks(-(-vectors // VECTORS)))


def _decode_columns(blocks: Any, scales: Any, out: Any, axes: list[tuple[int, ...]], halves: bool) -> None:
    """Decode matrices that follow each other along at most one axis to columns."""
    ((matrices, *steps),) = axes or [(1, 0, 0, 0)]
    rows, groups = scales.shape[-2:]
    chunks = -(-rows // ROWS)
    shape = rows, groups, chunks, *steps, blocks.strides[-3], scales.strides[-2], out.strides[-1]
    arguments = _raw(blocks), _raw(scales), halves, *shape, _raw(out)
    _launch(cuda_kernels.transpose, out.dtype, *arguments, threads=32 * matrices * chunks * groups)


def _decode_any(blocks: Any, scales: Any, out: Any, start: int, halves: bool) -> None:
    """Decode from any strides to any strides."""
    words = out.view(f"u{out.itemsize}")
    _launch(cuda_kernels.decode_any, out.dtype, blocks, scales, halves, start, out.shape[-1], scales.shape[-1], words)


def _encode(x: Any, blocks: Any, scales: Any, rule: str) -> None:
    if not x.flags.c_contiguous or x.data.ptr % 16:
        x = x.copy()
    codes = blocks if blocks.flags.c_contiguous and blocks.data.ptr % 16 == 0 else _new_like(blocks)
    factors = scales if scales.flags.c_contiguous else _new_like(scales)
    units = x.size // VALUES[name_of(x.dtype)]
    arguments = _raw(x), units, np.uint32(_ROUND_UP[rule]), _raw(codes), _raw(factors)
    _launch(cuda_kernels.encode, x.dtype, *arguments, threads=_in_blocks(units))
    for array, written in ((blocks, codes), (scales, factors)):
        if array is not written:
            array[...] = written


def _new_like(array: Any) -> Any:
    import cupy

    return cupy.empty(array.shape, array.dtype)


# Over the bus


class _Load(NamedTuple):
    """What is copied at a time: consecutive bytes of an array."""

    source: NDArray[Any]
    """On the host."""
    run: int
    """Bytes that follow each other without a gap."""
    step: int
    """From one run to the next."""
    begin: int
    """The first of the bytes, counted without the gaps."""
    nbytes: int
    address: int
    """On the device."""


def _loads(source: NDArray[Any], dtype: np.dtype[Any], address: int) -> Iterator[_Load]:
    """Cut an array of any strides that is to be copied, as a dtype, to an address."""
    axes = merged_axes(source.shape, source.strides)
    if source.dtype != dtype or len(axes) > 2 or (axes and axes[-1][1] != source.itemsize):
        source = np.ascontiguousarray(source.astype(dtype))
        axes = [(source.size, source.itemsize)]
    *outer, (count, _) = axes or [(1, 0)]
    run, step = count * source.itemsize, outer[0][1] if outer else 0
    for begin in range(0, source.nbytes, SLOT_BYTES):
        yield _Load(source, run, step, begin, min(SLOT_BYTES, source.nbytes - begin), address + begin)


class _Part(NamedTuple):
    """Loads, and what is done when all of them are on the device."""

    loads: list[_Load]
    done: Any
    """An event, recorded when that has been queued."""
    then: Callable[[], object] = lambda: None
    """Queues it on the caller's stream."""
    behind: Any = None
    """An event that comes before: that of an earlier part, which uses the same memory."""


def _parts(source: NDArray[Any], target: Any) -> Iterator[_Part]:
    """Cut an array that is to be copied to a contiguous one, so that little is converted at a time."""
    address = target.data.ptr
    for index in split(source.shape, target.itemsize, STAGED_BYTES):
        piece = np.asarray(source[index])
        yield _Part(list(_loads(piece, target.dtype, address)), _event())
        address += piece.size * target.itemsize


class _Slot:
    """Pinned memory, for one copy at a time."""

    def __init__(self) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._memory = cupy.cuda.PinnedMemory(SLOT_BYTES)
        self._source: Any = None  # kept until it has been read
        self._copied: Any = None
        self._device = -1

    def take(self, load: _Load) -> tuple[int, ...]:
        """Return the numbers that `cpu_kernels` wants, to fill it by."""
        self._source = load.source
        return address_of(load.source), load.run, load.step, load.begin, load.nbytes, self._memory.ptr

    def copy(self, load: _Load, copies: Any, device: int) -> None:
        """Queue the copy of what it has been filled with, to the current device."""
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(load.address, self._memory.ptr, load.nbytes, kind, copies.ptr)
        if self._device != device:  # events belong to devices
            self._copied, self._device = _event(), device
        self._copied.record(copies)
        self.forget()

    def forget(self) -> None:
        """Let go of what it is filled from."""
        self._source = None

    def copied(self, *, wait: bool) -> bool:
        """Return whether what was in it has been copied, and wait until it has if that is wanted."""
        if self._copied is None or self._copied.done:
            return True
        if wait:
            self._copied.synchronize()
        return wait


class _Pinned:
    """The pinned memory of this process: slots that are kept from one call to the next."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._free: deque[_Slot] = deque()
        self._count = 0

    def take(self, wanted: int) -> list[_Slot]:
        """Return at least one slot, and as many as are wanted where the bound allows."""
        bound = _pinned_slots()
        with self._condition:
            self._condition.wait_for(lambda: self._free or self._count < bound)
            taken = [self._free.popleft() for _ in range(min(wanted, len(self._free)))]
            new = max(0, min(wanted - len(taken), bound - self._count))
            self._count += new
        try:
            for _ in range(new):
                taken.append(_Slot())
                new -= 1
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt
                self.give_back(taken)
                raise
            if not taken:
                raise DeviceMemoryError(
                    f"the system grants no pinned memory ({_first_line(error)}): {SLOT_BYTES:,} bytes are needed"
                ) from error
        finally:
            if new:
                with self._condition:
                    self._count -= new
                    self._condition.notify_all()
        return taken

    def give_back(self, slots: list[_Slot]) -> None:
        """Let others have the slots, whose copies may still be under way."""
        for slot in slots:
            slot.forget()
        with self._condition:
            self._free += slots
            self._condition.notify_all()

    def release(self) -> None:
        """Return all memory that is not in use to the system."""
        with self._condition:
            slots = list(self._free)
            self._free.clear()
            self._count -= len(slots)
            self._condition.notify_all()
        for slot in slots:
            slot.copied(wait=True)


_pinned = _Pinned()


def _pinned_slots() -> int:
    text = os.environ.get(PINNED_VARIABLE, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{PINNED_VARIABLE} must be a number of bytes, found {text!r}")
    return max(1, (int(text) if text else PINNED_BYTES) // SLOT_BYTES)


def _event() -> Any:
    """Return an event of the current device that a thread can wait for without using its CPU."""
    import cupy

    return cupy.cuda.Event(block=True, disable_timing=True)


@functools.cache
def _copies(device: int) -> Any:
    """Return the stream of a device for copies from the host."""
    import cupy

    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)


class _Transfer:
    """Copies to the current device: several threads fill slots, and the calling one queues their copies.

    The others never leave compiled code, so that nobody has to wait for the interpreter.
    """

    def __init__(self, parts: Iterable[_Part], nbytes: int) -> None:
        import cupy

        self._fill, self._open = compiled("fill_slots", "boolean"), compiled("open_slot")
        if self._fill is None:
            raise BackendUnavailableError(
                "bytes of the host are brought to a device by compiled code: unset NUMBA_DISABLE_JIT"
            )
        self._device, self._stream = cupy.cuda.Device().id, cupy.cuda.get_current_stream()
        self._copies = _copies(self._device)
        self._loads = ((part, i, load) for part in parts for i, load in enumerate(part.loads))
        self._nbytes = nbytes
        self._slots: list[_Slot] = []

    def run(self, threads: int) -> None:
        """Return when nothing is left to read from the host; what comes later on the current stream comes after it."""
        ready = _event()
        ready.record(self._stream)
        self._copies.wait_event(ready)  # whoever used the memory before has finished with it
        self._slots = _pinned.take(min(SLOTS, 2 + self._nbytes // SLOT_BYTES))
        try:
            self._run(threads)
        except BaseException:
            self._copies.synchronize()  # the memory that is copied to may be let go of
            raise
        finally:
            _pinned.give_back(self._slots)

    def _run(self, threads: int) -> None:
        numbers = np.zeros(FIRST_SLOT + SLOT_NUMBERS * len(self._slots), np.int64)
        numbers[[PIECES_OF_SLOT, PIECE_BYTES, GOING_ON]] = -(-SLOT_BYTES // FILL_BYTES), FILL_BYTES, 1
        leader = threading.get_ident()

        def work() -> None:
            if threading.get_ident() != leader:
                self._fill(numbers, False)
            else:
                self._lead(numbers)
                close()

        def close() -> None:
            numbers[GOING_ON] = 0

        in_threads(work, min(threads, -(-self._nbytes // FILL_BYTES)), close)

    def _lead(self, numbers: NDArray[np.int64]) -> None:
        """Open slots that are free, and queue what is full, in the same order, until nothing is left."""
        opened: deque[tuple[_Part, int, _Load]] = deque()
        taken = 0
        following = next(self._loads, None)
        while following or opened:
            while following and len(opened) < len(self._slots):
                place = (taken + len(opened)) % len(self._slots)
                if not self._slots[place].copied(wait=not opened):
                    break
                described = *self._slots[place].take(following[2]), numbers[PIECES_OF_SLOT]
                first = FIRST_SLOT + SLOT_NUMBERS * place
                numbers[first : first + len(described)] = described
                self._open(numbers)
                opened.append(following)
                following = next(self._loads, None)
            self._fill(numbers, True)
            self._queue(self._slots[taken % len(self._slots)], *opened.popleft())
            taken += 1
            numbers[SLOTS_TAKEN] = taken

    def _queue(self, slot: _Slot, part: _Part, i: int, load: _Load) -> None:
        """Queue the copy of a slot, and what comes behind the last of a part."""
        if i == 0 and part.behind is not None:
            self._copies.wait_event(part.behind)
        slot.copy(load, self._copies, self._device)
        if i + 1 == len(part.loads):
            part.done.record(self._copies)
            self._stream.wait_event(part.done)
            part.then()
            part.done.record(self._stream)
