"""The CUDA backend: drives the kernels of `mxfp4np.backends.cuda_kernels` with CuPy.

Decides what the kernels must not: which of them fits an array, on which device and stream it runs, and how packed bytes
get there from host memory. CuPy is imported when a CUDA device or array is first used.

Work is queued on the caller's current stream, and results are ready for whatever comes later on it. Bytes from the host
are gathered by several threads in pinned memory, and copied on streams of their own while earlier ones are decoded.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError, DeviceMemoryError
from ...format import BLOCK_SIZE, BYTES_PER_BLOCK, name_of
from ...shapes import split
from ..cpu.kernels import (
    CONTEXT,
    CUDA_ERROR_NOT_READY,
    EVENT,
    FIRST_PART,
    FIRST_SLOT,
    GOING_ON,
    HELPERS,
    MEMORY,
    PART_NUMBERS,
    PARTS,
    SLOT_NUMBERS,
)
from ..cpu.pool import compiled, kernel_address, shared_crew
from ..memory import address_of, is_transposed, merged_axes, type_of
from ..threads import default_num_threads
from . import kernels as cuda_kernels
from .kernels import ROW_AXES, ROWS, THREADS, VALUES, VECTORS

SLOT_BYTES: Final = 1 << 20
"""Bytes that are copied to a device at a time, at most: the bus rests for some microseconds between copies."""

PIECE_BYTES: Final = 256 << 10
"""And at least. So many a thread puts into a slot before it looks whether something else is to be done."""

SLOTS: Final = 36
"""Slots that are in use at a time."""

SLOTS_EACH: Final = 3
"""Slots that a thread fills in turn, and no other: more than the processor's nearest cache has room for."""

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
            _Transfer(_parts(array, target), target.nbytes, default_num_threads()).run()
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
        largest = scales[indices[0]].size * (BYTES_PER_BLOCK + 1)
        buffers = [self.empty((largest,), _UINT8) for _ in indices[:2]]

        def decode(index: Any, shape: tuple[int, ...], buffer: Any) -> None:
            span, count = index[-1], math.prod(shape)
            codes = buffer[: BYTES_PER_BLOCK * count].reshape(*shape, BYTES_PER_BLOCK)
            factors = buffer[BYTES_PER_BLOCK * count :][:count].reshape(shape)
            begin, end = BLOCK_SIZE * span.start - start, BLOCK_SIZE * span.stop - start
            target = out[(*index[:-1], slice(max(0, begin), min(end, out.shape[-1])))]
            _decode(codes, factors, target, max(0, -begin), halves)

        def parts() -> Iterator[_Part]:
            for index, buffer in zip(indices, itertools.cycle(buffers), strict=False):
                codes, factors = blocks[index], scales[index]
                address = buffer.data.ptr
                copies = [_Copy.to(address, codes, _UINT8), _Copy.to(address + codes.nbytes, factors, _UINT8)]
                yield _Part(copies, partial(decode, index, factors.shape, buffer))

        _Transfer(parts(), blocks.nbytes + scales.nbytes, threads).run()

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


class _Copy(NamedTuple):
    """An array on the host that is to be copied: in runs, a step apart, to consecutive bytes on a device."""

    source: NDArray[Any]
    run: int
    step: int
    address: int

    @classmethod
    def to(cls, address: int, source: NDArray[Any], dtype: np.dtype[Any]) -> Self:
        """Return how to copy an array of any strides, as a dtype, to an address."""
        if source.flags.c_contiguous and source.dtype == dtype:
            return cls(source, source.nbytes, 0, address)
        axes = merged_axes(source.shape, source.strides)
        if source.dtype != dtype or len(axes) > 2 or (axes and axes[-1][1] != source.itemsize):
            source = np.ascontiguousarray(source.astype(dtype))
            axes = [(source.size, source.itemsize)]
        *outer, (count, _) = axes or [(1, 0)]
        return cls(source, count * source.itemsize, outer[0][1] if outer else 0, address)


class _Part(NamedTuple):
    """One or two copies that belong together. Every other part may use the same memory on the device."""

    copies: list[_Copy]
    then: Callable[[], object] = lambda: None
    """Called when all of it has been queued: queues what comes behind on the caller's stream."""


def _parts(source: NDArray[Any], target: Any) -> Iterator[_Part]:
    """Cut an array that is to be copied to a contiguous one, so that little is converted at a time."""
    address = target.data.ptr
    for index in split(source.shape, target.itemsize, STAGED_BYTES):
        piece = np.asarray(source[index])
        yield _Part([_Copy.to(address, piece, target.dtype)])
        address += piece.size * target.itemsize


class _Slot:
    """Pinned memory, for one copy at a time."""

    def __init__(self) -> None:
        import cupy

        self._memory = cupy.cuda.PinnedMemory(SLOT_BYTES)
        self._copied: Any = None
        self._device, self._addresses = -1, (0, 0)

    def addresses(self, device: int) -> tuple[int, int]:
        """Return where it is, and the event that what was in it has been copied to a device, the current one."""
        if self._device != device:  # events belong to devices
            self.wait()
            self._copied = _event()
            self._device, self._addresses = device, (self._memory.ptr, self._copied.ptr)
        return self._addresses

    def wait(self) -> None:
        """Wait until what was in it has been copied."""
        if self._copied is not None:
            self._copied.synchronize()


class _Pinned:
    """The pinned memory of this process: slots that are kept from one call to the next."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._free: deque[_Slot] = deque()
        self._all: weakref.WeakSet[_Slot] = weakref.WeakSet()

    def take(self, wanted: int) -> list[_Slot]:
        """Return at least one slot, and as many as are wanted where the bound allows."""
        bound = _pinned_slots()
        taken: list[_Slot] = []
        with self._condition:
            while not self._condition.wait_for(lambda: self._free or len(self._all) < bound, timeout=1):
                pass  # nobody tells of slots that an interrupt has lost
            try:
                while len(taken) < wanted and (self._free or len(self._all) < bound):
                    taken.append(self._free.popleft() if self._free else self._new())
            except Exception as error:
                if not taken:
                    raise DeviceMemoryError(
                        f"the system grants no pinned memory ({_first_line(error)}): {SLOT_BYTES:,} bytes are needed"
                    ) from error
            except BaseException:  # an interrupt
                self._free += taken
                raise
        return taken

    def _new(self) -> _Slot:
        slot = _Slot()
        self._all.add(slot)
        return slot

    def give_back(self, slots: list[_Slot]) -> None:
        """Let others have the slots, whose copies may still be under way."""
        with self._condition:
            self._free += slots
            self._condition.notify_all()

    def release(self) -> None:
        """Return all memory that is not in use to the system."""
        with self._condition:
            slots = list(self._free)
            self._free.clear()
            self._all.difference_update(slots)
            self._condition.notify_all()
        for slot in slots:
            slot.wait()


_pinned = _Pinned()


def _pinned_slots() -> int:
    text = os.environ.get(PINNED_VARIABLE, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{PINNED_VARIABLE} must be a number of bytes, found {text!r}")
    return max(1, (int(text) if text else PINNED_BYTES) // SLOT_BYTES)


def _event() -> Any:
    """Return an event of the current device."""
    import cupy

    return cupy.cuda.Event(disable_timing=True)


@functools.cache
def _copies(device: int) -> list[Any]:
    """Return the streams of a device for copies from the host, of every other part."""
    import cupy

    with cupy.cuda.Device(device):
        return [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]


@functools.cache
def _driver() -> tuple[int, ...]:
    """Return the addresses of the functions of CUDA's driver that compiled code calls.

    CuPy works, so it is there; its streams and events are CuPy's too.
    """
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    names = "cuMemcpyHtoDAsync_v2", "cuMemcpyBatchAsync", "cuEventRecord", "cuEventQuery", "cuCtxSetCurrent"
    functions: list[Any] = [getattr(library, name, None) for name in names]  # batches came with CUDA 12.8
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


class _Transfer:
    """Copies of so many bytes to the current device: several threads fill slots, and queue their copies.

    They do so in compiled code, so that nobody has to wait for the interpreter. The calling thread leaves it when all
    of a part have been queued, and queues what comes behind.
    """

    def __init__(self, parts: Iterable[_Part], nbytes: int, threads: int) -> None:
        import cupy

        helper = kernel_address("help_to_load", "int64")
        if helper is None:
            raise BackendUnavailableError(
                "bytes of the host are brought to a device by compiled code: unset NUMBA_DISABLE_JIT"
            )
        self._helper, self._load, self._tell = helper, compiled("load_part", 2), compiled("tell_pieces", 3)
        self._device, self._stream = cupy.cuda.Device().id, cupy.cuda.get_current_stream()
        self._copies = _copies(self._device)
        self._parts = iter(parts)
        self._threads, self._fillers = threads, min(threads, SLOTS // SLOTS_EACH, -(-nbytes // PIECE_BYTES))

    def run(self) -> None:
        """Return when nothing is left to read from the host; what comes later on the current stream comes after it."""
        ready = _event()
        ready.record(self._stream)
        for copies in self._copies:
            copies.wait_event(ready)  # whoever used the memory before has finished with it
        slots = _pinned.take(SLOTS_EACH * self._fillers)
        try:
            self._run(slots)
        except BaseException:
            first, second = self._copies
            try:
                first.synchronize()  # the memory that is copied to may be let go of
            finally:
                second.synchronize()
            raise
        finally:
            _pinned.give_back(slots)

    def _run(self, slots: list[_Slot]) -> None:
        import cupy

        loading = np.zeros(FIRST_SLOT + SLOT_NUMBERS * len(slots), np.int64)
        helpers = min(self._threads - 1, -(-len(slots) // SLOTS_EACH))
        loading[: HELPERS + 1] = loading.size, self._helper, *shared_crew(helpers)
        sizes = PIECE_BYTES, SLOT_BYTES // PIECE_BYTES, SLOTS_EACH, len(slots)
        loading[GOING_ON : CONTEXT + 1] = 1, *sizes, *_driver(), cupy.cuda.driver.ctxGetCurrent()
        table = loading[FIRST_SLOT:].reshape(-1, SLOT_NUMBERS)
        table[:, MEMORY : EVENT + 1] = [slot.addresses(self._device) for slot in slots]
        address = address_of(loading)
        start, dismiss_crew = compiled("start_to_load"), compiled("dismiss_crew")
        try:
            start(address)
            self._lead(loading)
        finally:
            loading[GOING_ON] = 0
            dismiss_crew(address)  # at once: what interrupts it has to wait until it returns

    def _lead(self, loading: NDArray[np.int64]) -> None:
        """Tell compiled code of parts, and queue what comes behind each when it has been queued itself.

        Two parts are open at a time, and threads know of one more: its pieces are loaded but not yet copied.
        """
        import cupy

        known: deque[tuple[_Part, int]] = deque()  # which keeps what they are read from; and the pieces up to each
        ring = loading[FIRST_PART:FIRST_SLOT].reshape(PARTS, PART_NUMBERS)
        pieces = 0

        def tell() -> None:
            self._tell(address_of(loading), pieces, known[min(len(known), 2) - 1][1])

        for number in itertools.count():
            for part in itertools.islice(self._parts, 3 - len(known)):
                place = number + len(known)
                counts = [-(-copy.source.nbytes // PIECE_BYTES) for copy in part.copies]
                described = [sum(counts), pieces, self._copies[place % 2].ptr]
                for count, (source, run, step, address) in zip(counts, part.copies, strict=True):
                    described += count, source.nbytes, address_of(source), run, step, address
                ring[place % PARTS, : len(described)] = described
                pieces += sum(counts)
                known.append((part, pieces))
                tell()
            if not known:
                break
            while (status := self._load(address_of(loading), number % PARTS)) == CUDA_ERROR_NOT_READY:
                pass  # but be interrupted
            if status:
                raise cupy.cuda.driver.CUDADriverError(status)
            copies, event = self._copies[number % 2], _event()
            event.record(copies)
            self._stream.wait_event(event)
            part, _ = known.popleft()
            part.then()
            event.record(self._stream)  # the memory of every other part may be used again
            copies.wait_event(event)
            if known:
                tell()  # that one more is open
