"""The CUDA backend: runs the kernels of `mxfp4np.backends.cuda.kernels` through CuPy.

All policy is here: which kernel fits an array, on which device and stream it runs, and in which parts packed bytes of
the host are copied to the device. CuPy is imported when a CUDA device or array is first used.

Work is queued on the caller's current stream, so that what the caller queues there afterwards finds the results. Bytes
of the host are copied part by part, and each part is decoded after its copy, while the next one is copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError, DeviceMemoryError
from ...format import BLOCK_SIZE, BYTES_PER_BLOCK, name_of, scale_values
from ...shapes import split
from ..cpu.driver import KERNEL_ELEMENTS
from ..memory import ALIGNMENT, check_factors, check_shapes, is_transposed, merged_axes, scales_by_row, type_of
from ..threads import default_num_threads
from . import kernels, matmul, scaled
from .cupy import first_line, working_cupy
from .kernels import ROW_AXES, ROWS, THREADS, VALUES, VECTORS
from .matmul import BYTES_PER_STEP, MOST_VECTORS, STEP, THREADS_PER_STEP, TILE
from .scaled import SCALED_VECTORS
from .staging import Part, parts_of, pinned, transfer

STAGED_BYTES: Final = 128 << 20
"""Packed bytes of the host that are decoded at a time. The device needs memory for twice that."""

TILE_BYTES: Final = 256 << 20
"""Bytes of decoded rows that cuBLAS multiplies at a time: much longer than it takes to launch a kernel."""

MAX_VECTORS: Final = (1 << 31) - 1
"""Vectors that `decode_rows` writes at most, since it counts them in 32 bits."""

_UINT8: Final = np.dtype(np.uint8)

_ROUND_UP: Final = {"floor": 0, "even": 0x200000, "rceil": 0x3FFFFF, "ceil": 0x7FFFFF}
"""Added to the bits of the largest float32 of a block: carries into the exponent where the rule rounds the scale up."""


class CUDABackend:
    """CuPy on one NVIDIA GPU.

    Parameters
    ----------
    ordinal : int, optional
        Number of the device. By default, the current device at each call.

    Raises
    ------
    BackendUnavailableError
        If CuPy, a driver or a device is missing.
    ValueError
        If there is no such device.
    """

    name = "cuda"

    def __init__(self, ordinal: int | None = None) -> None:
        self._cupy, count = working_cupy()
        if ordinal is not None and ordinal >= count:
            there = ", ".join(repr(f"cuda:{i}") for i in range(count))
            raise ValueError(f"no device 'cuda:{ordinal}': this machine has {there}")
        self._ordinal = ordinal

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
            transfer(parts_of(array, target), default_num_threads())
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
        pinned.release()

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
        check_shapes(blocks, scales, out, start)
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
        """Decode from host memory, part by part."""

        def decode(index: Any, codes: Any, scale_bytes: Any) -> None:
            begin, end = (BLOCK_SIZE * at - start for at in (index[-1].start, index[-1].stop))
            target = out[(*index[:-1], slice(max(0, begin), min(end, out.shape[-1])))]
            _decode(codes, scale_bytes, target, max(0, -begin), halves)

        indices = list(split(scales.shape, 1 + BYTES_PER_BLOCK, STAGED_BYTES, (ROWS, 1)))
        self._use_staged(blocks, scales, indices, decode, threads)

    def _use_staged(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        indices: list[Any],
        use: Callable[[Any, Any, Any], None],
        threads: int,
    ) -> None:
        """Queue the use of packed bytes of the host, part by part, through two buffers on the device in turn."""
        largest = scales[indices[0]].size * (BYTES_PER_BLOCK + 1)
        buffers = [self.empty((largest,), _UINT8) for _ in indices[:2]]

        def queue(index: Any, shape: tuple[int, ...], buffer: Any) -> None:
            count = math.prod(shape)
            codes = buffer[: BYTES_PER_BLOCK * count].reshape(*shape, BYTES_PER_BLOCK)
            use(index, codes, buffer[BYTES_PER_BLOCK * count :][:count].reshape(shape))

        def parts() -> Iterator[Part]:
            for index, buffer in zip(indices, itertools.cycle(buffers), strict=False):
                codes, scale_bytes = blocks[index], scales[index]
                yield Part(buffer.data.ptr, [codes, scale_bytes], partial(queue, index, scale_bytes.shape, buffer))

        transfer(parts(), threads)

    def decode_scaled(
        self,
        codes: Any,
        scales: Any,
        out: Any,
        *,
        element: str,
        width: int,
        tile_rows: int = 1,
        first_row: int = 0,
        table: NDArray[np.float32] | None = None,
        start: int = 0,
        fresh: bool = False,  # noqa: ARG002
        num_threads: int | None = None,
    ) -> None:
        if not out.size:
            return
        if element not in KERNEL_ELEMENTS:
            raise ValueError(f"elements {element} are decoded on the CPU only: use device='cpu'")
        with out.device:
            kind = "float32" if table is None else "E8M0" if table is scale_values("uint8") else "table"
            decode = partial(_decode_scaled, element=element, width=width, table=self._table(table), kind=kind)
            if isinstance(codes, np.ndarray):
                scales = scales_by_row(scales, out.shape[-2] if out.ndim > 1 else 1, tile_rows, first_row)
                self._decode_scaled_staged(codes, scales, out, start, decode, num_threads or default_num_threads())
            else:
                scales = scales if isinstance(scales, self._cupy.ndarray) else self._cupy.asarray(scales)
                _same_device(out, codes, scales)
                decode(codes, scales, out, start, tile_rows, first_row)

    def _table(self, table: NDArray[np.float32] | None) -> Any:
        return None if table is None else self._cupy.asarray(table)

    def _decode_scaled_staged(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        out: Any,
        start: int,
        decode: Callable[[Any, Any, Any, int], None],
        threads: int,
    ) -> None:
        """Decode rows of the host, part by part, through two buffers on the device that are used in turn."""
        row_bytes = codes.shape[-1] + scales.shape[-1] * scales.itemsize
        indices = list(split(out.shape[:-1], row_bytes, max(STAGED_BYTES, row_bytes)))
        codes_room = -(-codes[indices[0]].size // ALIGNMENT) * ALIGNMENT
        room = codes_room + scales[indices[0]].nbytes
        buffers = [self.empty((room,), _UINT8) for _ in indices[:2]]

        def queue(index: Any, buffer: Any) -> None:
            part, factors = codes[index], scales[index]
            on_device = buffer[: part.size].reshape(part.shape)
            those = buffer[codes_room:][: factors.nbytes].view(factors.dtype).reshape(factors.shape)
            decode(on_device, those, out[index], start)

        def parts() -> Iterator[Part]:
            for index, buffer in zip(indices, itertools.cycle(buffers), strict=False):
                address = buffer.data.ptr
                yield Part(address, [codes[index]])
                yield Part(address + codes_room, [scales[index]], partial(queue, index, buffer))

        transfer(parts(), threads)

    tile_bytes = TILE_BYTES
    most_vectors = MOST_VECTORS

    def matmul(
        self,
        blocks: Any,
        scales: Any,
        x: Any,
        out: Any,
        *,
        order: str = "pairs",
        activations: str = "float32",  # noqa: ARG002
        num_threads: int | None = None,
    ) -> None:
        check_factors(blocks, scales, x, out)
        with out.device:
            _same_device(out, x)
            _check_aligned(out, "out")
            _check_aligned(x, "x")
            vectors = self._split(x, order == "halves")

            def multiply(index: Any, codes: Any, scale_bytes: Any) -> None:
                _multiply(codes, scale_bytes, vectors, out[index])

            if isinstance(blocks, np.ndarray):
                row_bytes = scales.shape[1] * (1 + BYTES_PER_BLOCK)
                indices = list(split(scales.shape[:1], row_bytes, max(STAGED_BYTES, row_bytes)))
                self._use_staged(blocks, scales, indices, multiply, num_threads or default_num_threads())
            else:
                _same_device(out, blocks, scales)
                multiply(slice(None), blocks, scales)

    def _split(self, x: Any, halves: bool) -> SplitVectors:
        """Split x into bfloat16 numbers, on the current device."""
        groups, vectors = x.shape[0] // BLOCK_SIZE, x.shape[1]
        tiles, chain = matmul.tiles_of(vectors)
        steps = -(-groups // STEP)
        parts = self.empty((tiles * (chain * steps * BYTES_PER_STEP + 4 * TILE),), _UINT8)
        per_vector = _in_blocks(steps * THREADS_PER_STEP)
        arguments = _raw(x), *x.strides, groups, steps, per_vector, halves, _raw(parts)
        kernel = partial(matmul.split, tiles=tiles, chain=chain)
        _launch(kernel, x.dtype, *arguments, threads=vectors * per_vector)
        return SplitVectors(x, parts, halves)

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
        check_shapes(blocks, scales, x)
        with blocks.device:
            if isinstance(x, np.ndarray):
                x = self.asarray(x)
            _same_device(blocks, x, scales)
            _check_aligned(x, "x")
            _encode(x, blocks, scales, rule)


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
    """Refuse elements whose addresses are not multiples of their size: a device cannot load or store them."""
    size = array.itemsize
    strides = [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    if array.data.ptr % size or any(stride % size for stride in strides):
        raise ValueError(f"{what} must have its elements of {size} bytes at multiples of {size}: copy it first")


def _launch(kernel: Callable[[str], Any], dtype: np.dtype[Any], *arguments: Any, threads: int | None = None) -> None:
    """Queue a kernel, with one thread for each element by default. It is compiled when it is first used."""
    options = {} if threads is None else {"size": threads, "block_size": THREADS}
    try:
        kernel(name_of(dtype))(*arguments, **options)
    except Exception as error:
        from cupy.cuda.compiler import CompileException

        if not isinstance(error, CompileException | NotImplementedError | ImportError | OSError):
            raise  # not an error of the compiler, nor of a missing one
        raise BackendUnavailableError(
            f"CuPy cannot compile for this device ({first_line(error)}): install the extra cuda12 or cuda13, which "
            "brings CUDA's compiler; device='cpu' works without it"
        ) from error


def _in_blocks(threads: int) -> int:
    """Round a number of threads up to whole CUDA blocks."""
    return -(-threads // THREADS) * THREADS


def _raw(array: Any, offset: int = 0) -> Any:
    """Return an array of one byte, at an offset in bytes from another: it passes an address to a kernel."""
    import cupy

    return cupy.ndarray((1,), cupy.uint8, array.data + offset)


# Decoding and encoding on the current device


def _decode(blocks: Any, scales: Any, out: Any, start: int, halves: bool) -> None:
    if start or out.shape[-1] != BLOCK_SIZE * scales.shape[-1]:
        _decode_any(blocks, scales, out, start, halves)
        return
    contiguous = blocks.flags.c_contiguous and scales.flags.c_contiguous and out.flags.c_contiguous
    if contiguous and blocks.data.ptr % 4 == 0 == out.data.ptr % 16:
        vectors = out.nbytes // 16
        arguments = _raw(blocks), _raw(scales), halves, vectors, _raw(out)
        _launch(kernels.decode, out.dtype, *arguments, threads=_in_blocks(-(-vectors // VECTORS)))
        return
    transposed = is_transposed(out)
    lead, max_axes = (scales.ndim - 2, 1) if transposed else (scales.ndim - 1, ROW_AXES)
    rows = out.swapaxes(-1, -2) if transposed else out
    outer = merged_axes(out.shape[:lead], out.strides[:lead])
    if len(outer) > max_axes or rows.shape[-1] * out.itemsize % 16 or not _is_dense(rows, 1, 16):
        _decode_any(blocks, scales, out, start, halves)
        return
    axes = merged_axes(out.shape[:lead], *(array.strides[:lead] for array in (blocks, scales, out)))
    if len(axes) > max_axes or not _is_dense(blocks, 2, 16 if transposed else 4) or not _is_dense(scales, 1, 1):
        # The kernel does not support these strides: copy the packed bytes, at most half as many as the output's.
        blocks, scales = blocks.copy(), scales.copy()
        axes = merged_axes(out.shape[:lead], *(array.strides[:lead] for array in (blocks, scales, out)))
    (_decode_columns if transposed else _decode_rows)(blocks, scales, out, axes, halves)


def _is_dense(array: Any, inner: int, alignment: int) -> bool:
    """Return whether the innermost axes are contiguous, and the address and all other strides are aligned."""
    step = array.itemsize
    for n, stride in zip(array.shape[: -inner - 1 : -1], array.strides[: -inner - 1 : -1], strict=True):
        if n > 1 and stride != step:
            return False
        step *= n
    outer = zip(array.shape[:-inner], array.strides[:-inner], strict=True)
    return array.data.ptr % alignment == 0 and all(n <= 1 or stride % alignment == 0 for n, stride in outer)


def _decode_rows(blocks: Any, scales: Any, out: Any, axes: list[tuple[int, ...]], halves: bool) -> None:
    """Decode rows along axes whose lengths and strides are given."""
    per_row = out.shape[-1] * out.itemsize // 16
    sizes, *steps = zip(*axes, *[(1, 0, 0, 0)] * (ROW_AXES - len(axes)), strict=True)
    per_step = math.prod(sizes[1:]) * per_row  # vectors of a step along the first axis
    steps_at_once = MAX_VECTORS // per_step
    if not steps_at_once:
        _decode_any(blocks, scales, out, 0, halves)
        return
    for first in range(0, sizes[0], steps_at_once):
        vectors = min(steps_at_once, sizes[0] - first) * per_step
        raw = [_raw(array, first * step[0]) for array, step in zip((blocks, scales, out), steps, strict=True)]
        arguments = *raw[:2], halves, vectors, per_row, *sizes[1:], *itertools.chain(*steps), raw[2]
        _launch(kernels.decode_rows, out.dtype, *arguments, threads=_in_blocks(-(-vectors // VECTORS)))


def _decode_columns(blocks: Any, scales: Any, out: Any, axes: list[tuple[int, ...]], halves: bool) -> None:
    """Decode a stack of matrices, along one axis at most, to a transposed output."""
    ((matrices, *steps),) = axes or [(1, 0, 0, 0)]
    rows, per_row = scales.shape[-2:]
    row_groups = -(-rows // ROWS)
    shape = rows, per_row, row_groups, *steps, blocks.strides[-3], scales.strides[-2], out.strides[-1]
    arguments = _raw(blocks), _raw(scales), halves, *shape, _raw(out)
    _launch(kernels.transpose, out.dtype, *arguments, threads=32 * matrices * row_groups * per_row)


def _decode_any(blocks: Any, scales: Any, out: Any, start: int, halves: bool) -> None:
    """Decode arrays of any strides."""
    words = out.view(f"u{out.itemsize}")
    _launch(kernels.decode_any, out.dtype, blocks, scales, halves, start, out.shape[-1], scales.shape[-1], words)


def _decode_scaled(
    codes: Any,
    scales: Any,
    out: Any,
    start: int,
    tile_rows: int = 1,
    first_row: int = 0,
    *,
    element: str,
    width: int,
    table: Any,
    kind: str,
) -> None:
    """Decode elements with scales: rows by vectors if all is aligned, or else one element at a time."""
    count, length, has_table = 16 // out.itemsize, out.shape[-1], table is not None
    aligned = count // 2 if element == "E2M1" else count
    shift = 31 if width >= length else width.bit_length() - 1
    axes, row_shift = _axes_of_tiles(codes, scales, out, tile_rows), tile_rows.bit_length() - 1
    if axes is None:
        scales, row_shift, first_row = scales_by_row(scales, out.shape[-2], tile_rows, first_row), 0, 0
        axes = merged_axes(out.shape[:-1], *(array.strides[:-1] for array in (codes, scales, out)))
    is_regular = start == 0 and length % count == 0 and (shift == 31 or (width % count == 0 and width == 1 << shift))
    if not is_regular or len(axes) > 2 or not _is_dense(out, 1, 16) or not _is_dense(codes, 1, aligned):
        kernel = partial(scaled.decode_scaled_any, element=element, has_table=has_table)
        scales = scales_by_row(scales, out.shape[-2] if out.ndim > 1 else 1, 1 << row_shift, first_row)
        words = out.view(f"u{out.itemsize}")
        shape = start, length, codes.shape[-1], scales.shape[-1], width
        _launch(kernel, out.dtype, codes, scales, table if has_table else scales, *shape, words)
        return
    per_row = length // count
    per_step = -(-per_row // SCALED_VECTORS)
    sizes, *steps = zip(*[(1, 0, 0, 0)] * (2 - len(axes)), *axes, strict=True)
    at_once = max(1, MAX_VECTORS // (per_step * sizes[1]))
    kernel = partial(scaled.decode_scaled, element=element, scales=kind)
    for first in range(0, sizes[0], at_once):
        outer = min(at_once, sizes[0] - first)
        threads = outer * sizes[1] * per_step
        raw = [_raw(array, first * step[0]) for array, step in zip((codes, scales, out), steps, strict=True)]
        shape = threads, per_row, per_step, sizes[1] if outer > 1 else 0, *itertools.chain(*steps)
        shifts = scales.strides[-1], shift, row_shift, first_row
        arguments = *raw[:2], _raw(table) if has_table else raw[1], *shape, *shifts, raw[2]
        _launch(kernel, out.dtype, *arguments, threads=_in_blocks(threads))


class SplitVectors(NamedTuple):
    """Vectors, (K, M) float32, and their parts as `matmul.multiply` takes them; the order of blocks' elements."""

    x: Any
    parts: Any
    halves: bool


def _multiply(blocks: Any, scales: Any, vectors: SplitVectors, out: Any) -> None:
    """Multiply rows by vectors."""
    x, parts, halves = vectors
    if blocks.strides[-1] != 1:
        blocks = blocks.copy()
    rows, groups = scales.shape
    tiles, chain = matmul.tiles_of(x.shape[1])
    aligned = _is_dense(blocks, 1, BYTES_PER_BLOCK)
    kernel = partial(matmul.multiply, tiles=tiles, chain=chain, aligned=aligned)
    strides = *blocks.strides[:2], *scales.strides, *x.strides, *out.strides
    shape = rows, groups, -(-groups // STEP), *strides, x.shape[1], halves
    arguments = _raw(blocks), _raw(scales), _raw(parts), _raw(x), *shape, _raw(out)
    _launch(kernel, out.dtype, *arguments, threads=THREADS * -(-rows // matmul.ROWS))


def _axes_of_tiles(codes: Any, scales: Any, out: Any, tile_rows: int) -> list[tuple[int, ...]] | None:
    """Return the lengths and strides of the axes before the last, or None if they do not suit rows that share scales.

    The axis of rows that share scales stays one of its own; its stride of scales is that of a tile.
    """
    if tile_rows == 1:
        return merged_axes(out.shape[:-1], *(array.strides[:-1] for array in (codes, scales, out)))
    outer = merged_axes(out.shape[:-2], *(array.strides[:-2] for array in (codes, scales, out)))
    if tile_rows & (tile_rows - 1) or len(outer) > 1:
        return None
    return [*outer, (out.shape[-2], codes.strides[-2], scales.strides[-2], out.strides[-2])]


def _encode(x: Any, blocks: Any, scales: Any, rule: str) -> None:
    if not x.flags.c_contiguous or x.data.ptr % 16:
        x = x.copy()
    codes = blocks if blocks.flags.c_contiguous and blocks.data.ptr % 16 == 0 else _new_like(blocks)
    scale_bytes = scales if scales.flags.c_contiguous else _new_like(scales)
    threads = x.size // VALUES[name_of(x.dtype)]
    arguments = _raw(x), threads, np.uint32(_ROUND_UP[rule]), _raw(codes), _raw(scale_bytes)
    _launch(kernels.encode, x.dtype, *arguments, threads=_in_blocks(threads))
    for array, written in ((blocks, codes), (scales, scale_bytes)):
        if array is not written:
            array[...] = written


def _new_like(array: Any) -> Any:
    import cupy

    return cupy.empty(array.shape, array.dtype)
