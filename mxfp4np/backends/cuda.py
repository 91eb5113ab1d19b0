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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, DeviceMemoryError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, name_of, split
from . import cuda_kernels
from .cuda_kernels import ROWS, THREADS, VALUES, VECTORS
from .memory import is_transposed, merged_axes
from .threads import default_num_threads, in_order

SLOT_BYTES: Final = 4 << 20
"""Bytes that are copied to a device at a time."""

STAGED_BYTES: Final = 32 << 20
"""Packed bytes that are decoded at a time, where they come from the host; a device keeps memory for two times that."""

PINNED_VARIABLE: Final = "MXFP4NP_PINNED_BYTES"
PINNED_BYTES: Final = 256 << 20
"""Pinned memory of a process at most, if the environment variable does not say."""

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
            _transfer(_loads(array, target), default_num_threads())
            if target is not out:
                out[...] = target

    def check_out(self, out: Any, *inputs: Any) -> None:
        cupy = self._cupy
        if not isinstance(out, cupy.ndarray):
            raise TypeError(f"out must be a cupy.ndarray, found {type(out).__module__}.{type(out).__name__}")
        if self._ordinal not in (None, out.device.id):
            raise ValueError(f"out must be on 'cuda:{self._ordinal}', found one on 'cuda:{out.device.id}'")
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
        stream = self._cupy.cuda.get_current_stream()
        parts = list(split(scales.shape, 1 + BYTES_PER_BLOCK, STAGED_BYTES, (ROWS, 1)))
        largest = max(scales[part].size for part in parts)
        buffers = [
            (self.empty((largest * BYTES_PER_BLOCK,), _UINT8), self.empty((largest,), _UINT8), _event())
            for _ in parts[:2]
        ]

        def decode(part: Any, codes: Any, factors: Any, decoded: Any) -> None:
            span = part[-1]
            begin, end = BLOCK_SIZE * span.start - start, BLOCK_SIZE * span.stop - start
            target = out[(*part[:-1], slice(max(0, begin), min(end, out.shape[-1])))]
            _decode(codes, factors, target, max(0, -begin), halves)
            decoded.record(stream)

        def loads() -> Iterator[_Load]:
            for i, part in enumerate(parts):
                *memory, decoded = buffers[i % 2]
                sources = blocks[part], scales[part]
                codes, factors = (
                    buffer[: source.size].reshape(source.shape) for buffer, source in zip(memory, sources, strict=True)
                )
                first, *others = [*_loads(sources[0], codes), *_loads(sources[1], factors)]
                yield first._replace(behind=decoded if i > 1 else None)
                yield from others[:-1]
                yield others[-1]._replace(then=partial(decode, part, codes, factors, decoded))

        _transfer(loads(), threads)

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


def _launch(kernel: Callable[[str], Any], dtype: np.dtype[Any], *arguments: Any, threads: int | None = None) -> None:
    """Queue a kernel, built if it has not been used before: for so many threads, or as many as elements."""
    options = {} if threads is None else {"size": -(-threads // THREADS) * THREADS, "block_size": THREADS}
    try:
        kernel(name_of(dtype))(*arguments, **options)
    except (RuntimeError, ImportError, OSError) as error:  # what its compiler, or the lack of one, comes as
        from cupy.cuda.compiler import CompileException

        if isinstance(error, RuntimeError) and not isinstance(error, CompileException | NotImplementedError):
            raise
        raise BackendUnavailableError(
            f"CuPy cannot compile for this device ({_first_line(error)}): install the extra cuda12 or cuda13, which "
            "brings CUDA's compiler; device='cpu' works without it"
        ) from error


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
        _decode_rows(blocks, scales, out, [], halves)
        return
    transposed = is_transposed(out)
    lead = scales.ndim - 1 - transposed
    vectors = out.swapaxes(-1, -2) if transposed else out
    outer = merged_axes(out.shape[:lead], out.strides[:lead])
    if len(outer) > 1 or vectors.shape[-1] * out.itemsize % 16 or not _is_dense(vectors, 1, 16):
        _decode_any(blocks, scales, out, start, halves)
        return
    # What does not lie as the kernel wants it is copied: it is half as large as the output at most.
    if not _is_dense(blocks, 2, 16 if transposed else 4) or not _is_dense(scales, 1, 1):
        blocks, scales = blocks.copy(), scales.copy()
    for _ in range(2):
        axes = merged_axes(out.shape[:lead], *(array.strides[:lead] for array in (blocks, scales, out)))
        if len(axes) > 1:
            blocks, scales = blocks.copy(), scales.copy()
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
    """Decode where at most one axis, of rows, is not contiguous; its length and strides are given."""
    if not axes:
        vectors = out.nbytes // 16
        arguments = _raw(blocks), _raw(scales), halves, vectors, 0, 0, 0, 0, 0, 0, _raw(out)
        _launch(cuda_kernels.decode, out.dtype, *arguments, threads=-(-vectors // VECTORS))
        return
    ((rows, *steps),) = axes
    per_row = out.nbytes // 16 // rows
    # Division by multiplication (Granlund and Montgomery, 1994): exact for dividends below 2**31.
    shift = (per_row - 1).bit_length() - 1
    reciprocal = -(-(1 << 32 + shift) // per_row)
    most = ((1 << 31) - 1) // per_row
    for first in range(0, rows, most):
        vectors = min(most, rows - first) * per_row
        raw = [_raw(array, first * step) for array, step in zip((blocks, scales, out), steps, strict=True)]
        arguments = *raw[:2], halves, vectors, per_row, reciprocal, shift, *steps, raw[2]
        _launch(cuda_kernels.decode, out.dtype, *arguments, threads=-(-vectors // VECTORS))


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
    _launch(cuda_kernels.encode, x.dtype, *arguments, threads=units)
    for array, written in ((blocks, codes), (scales, factors)):
        if array is not written:
            array[...] = written


def _new_like(array: Any) -> Any:
    import cupy

    return cupy.empty(array.shape, array.dtype)


# Over the bus


class _Load(NamedTuple):
    """What is copied at a time."""

    source: NDArray[Any]
    """On the host, of any strides."""
    dtype: np.dtype[Any]
    """To be converted to."""
    address: int
    """On the device."""
    behind: Any = None
    """An event that has to come first."""
    then: Callable[[], None] | None = None
    """What to do when this, and all before it, is on the device."""


def _loads(source: NDArray[Any], target: Any) -> Iterator[_Load]:
    """Cut an array to be copied into a contiguous one."""
    for part in split(source.shape, target.itemsize, SLOT_BYTES):
        yield _Load(source[part], target.dtype, target[part].data.ptr)


class _Slot(NamedTuple):
    """Pinned memory, for one copy at a time."""

    memory: NDArray[np.uint8]
    address: int
    owner: Any


class _Pinned:
    """The pinned memory of this process: slots that are kept from one call to the next."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._free: list[_Slot] = []
        self._count = 0

    def take(self, wanted: int) -> list[_Slot]:
        """Return at least one slot, and as many as are wanted where the bound allows."""
        bound = _pinned_slots()
        with self._condition:
            self._condition.wait_for(lambda: self._free or self._count < bound)
            taken = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
            new = max(0, min(wanted - len(taken), bound - self._count))
            self._count += new
        try:
            for _ in range(new):
                taken.append(_new_slot())
                new -= 1
        except Exception as error:
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
        """Let others have the slots."""
        with self._condition:
            self._free += slots
            self._condition.notify_all()

    def release(self) -> None:
        """Return all memory that is not in use to the system."""
        with self._condition:
            self._count -= len(self._free)
            self._free.clear()
            self._condition.notify_all()


_pinned = _Pinned()


def _pinned_slots() -> int:
    text = os.environ.get(PINNED_VARIABLE, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{PINNED_VARIABLE} must be a number of bytes, found {text!r}")
    return max(1, (int(text) if text else PINNED_BYTES) // SLOT_BYTES)


def _new_slot() -> _Slot:
    import cupy

    owner = cupy.cuda.PinnedMemory(SLOT_BYTES)
    memory = np.frombuffer(cupy.cuda.PinnedMemoryPointer(owner, 0), np.uint8, SLOT_BYTES)
    return _Slot(memory, owner.ptr, owner)


def _event(*, block: bool = False) -> Any:
    import cupy

    return cupy.cuda.Event(block=block, disable_timing=True)


@functools.cache
def _copies(device: int) -> Any:
    """Return the stream of a device for copies from the host."""
    import cupy

    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)


def _transfer(loads: Iterator[_Load], threads: int) -> None:
    """Copy to the current device: several threads fill slots, and this one queues their copies in order.

    Returns when everything has left the host; what comes later on the caller's stream comes after it.
    """
    import cupy

    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    stream, copies = cupy.cuda.get_current_stream(), _copies(device.id)
    ready = _event()
    ready.record(stream)
    copies.wait_event(ready)  # whoever used the memory before has finished with it
    slots = _pinned.take(threads + 2)
    copied = [_event(block=True) for _ in slots]

    def fill(item: tuple[_Load, int]) -> tuple[_Load, int, int]:
        load, i = item
        with device:
            copied[i].synchronize()
        nbytes = load.source.size * load.dtype.itemsize
        np.copyto(slots[i].memory[:nbytes].view(load.dtype).reshape(load.source.shape), load.source, casting="unsafe")
        return load, i, nbytes

    try:
        for load, i, nbytes in in_order(fill, zip(loads, itertools.cycle(range(len(slots))), strict=False), len(slots)):
            if load.behind is not None:
                copies.wait_event(load.behind)
            runtime.memcpyAsync(load.address, slots[i].address, nbytes, runtime.memcpyHostToDevice, copies.ptr)
            copied[i].record(copies)
            if load.then is not None:
                stream.wait_event(copied[i])
                load.then()
        ready.record(copies)
        stream.wait_event(ready)
    finally:
        copies.synchronize()
        _pinned.give_back(slots)
