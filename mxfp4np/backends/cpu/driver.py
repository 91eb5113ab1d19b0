"""The CPU backend: drives the kernels of `mxfp4np.backends.cpu_kernels` with Numba.

Decides what the kernels must not: how strided arrays become rows, when several threads pay, which compiled form to
use, and what happens where Numba cannot compile or keep its cache. Numba is imported on the first call.
"""

from __future__ import annotations

import functools
import math
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError
from ...format import BLOCK_SIZE, BYTES_PER_BLOCK, FP4_BOUNDS, SCALE_BIAS, SCALE_NAN, blocks_in, decoded_dtype, name_of
from ..memory import ALIGNMENT, HostBackend, address_of, aligned_empty, is_mapped, is_transposed, merged_axes
from ..reference import ReferenceBackend
from ..threads import default_num_threads
from .pool import kernel_address, run, shared_crew

PIECE_BLOCKS = 1 << 11, 1 << 18
"""Fewest and most blocks that a thread claims at a time: 0.125 to 16 MiB of bfloat16.

The most first, so that threads seldom start anew, and the fewest at last, so that they end at the same time.
"""

PAGE_BYTES = 4096
"""What a processor takes for one sequence at most."""

FRESH_FACTOR = 16
"""In memory that is new, the fewest are so many times as many: threads would clear one and the same huge page."""

ALONE_BLOCKS = 1 << 15
"""Up to so many blocks, 2 MiB of bfloat16, a thread is alone: others that sleep take as long to wake."""

THREAD_BLOCKS = 1 << 13
"""Of more, one thread for so many at most, 0.5 MiB of bfloat16: it takes a while to call another one."""

GAPS_FACTOR = 2.5
"""From row to row, at most so many times the bytes of a row where the gap between them is read too."""

CROSSWISE_BLOCKS = 5, 224
"""Rows of so many blocks are asked for crosswise: shorter ones have one line, longer ones lie in too many pages.

Those that are asked for together have to have 128 blocks at least, since memory takes as long to answer, and to leave
two thirds of the second-level cache to those before them and to others.
"""

GROUP_BLOCKS, GROUP_SHARE = 128, 1 / 3

GROUPS_ABREAST = 4
"""The fewest groups of 32 rows, where these are transposed: so many are worked on together."""

STREAMING_BYTES = 8 << 20
"""Outputs from this size on are written past the cache: they do not fit into it, and need not be read first.

Unless they are new: the system has just cleared their pages, which then are in the cache.
"""


class CPUBackend(HostBackend):
    """Numba on all cores."""

    name = "cpu"

    def decode(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        out: NDArray[Any],
        *,
        start: int = 0,
        order: str = "pairs",
        fresh: bool = False,
        num_threads: int | None = None,
    ) -> None:
        if out.size == 0:
            return
        transposed = is_transposed(out)
        if blocks.strides[-1] != 1:  # the bytes of a block lie apart: gather them, at most half the size of `out`
            blocks = np.ascontiguousarray(blocks)
        streaming = out.nbytes >= STREAMING_BYTES and not fresh
        arrays, units = _arrays(blocks, scales, out, start, transposed=transposed, streaming=streaming)
        name = "transpose_pieces" if transposed else _kernel_for(arrays)
        kernel, arrays[TABLE_ADDRESS] = _decoder(name, out.dtype, order)
        if kernel is None:
            return ReferenceBackend().decode(blocks, scales, out, start=start, order=order)
        _run(kernel, arrays, units, num_threads, fresh=fresh)

    def encode(
        self,
        x: NDArray[Any],
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        *,
        rule: str,
        num_threads: int | None = None,
    ) -> None:
        if x.size == 0:
            return
        word = _ENCODED_WORDS[name_of(x.dtype)]
        columns = is_transposed(x) and x.shape[-2] >= BLOCK_SIZE
        kernel = kernel_address("encode_columns_pieces" if columns else "encode_pieces", word)
        if kernel is None:
            return ReferenceBackend().encode(x, blocks, scales, rule=rule)
        # Where the bytes of a block lie apart, they are scattered from an array of their own.
        codes = blocks if blocks.strides[-1] == 1 else np.empty(blocks.shape, np.uint8)
        arrays, units = _arrays(codes, scales, x, transposed=columns)
        arrays[TABLE_ADDRESS] = _table_address(_table_name(x.dtype), rule)
        _run(kernel, arrays, units, num_threads)
        if codes is not blocks:
            blocks[...] = codes


def stream(
    blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[Any], *, num_threads: int | None = None
) -> None:
    """Move the bytes that decoding moves, past the cache, and decode nothing: the limit to hold decoding against.

    Parameters
    ----------
    blocks : (..., G, 16) uint8
    scales : (..., G) uint8
    out : (..., 32 * G) bfloat16, float16 or float32
        Aligned to 64 bytes. Filled with bytes of no meaning. The rows of all three follow each other without gaps.
    num_threads : int, optional
        As for decoding.

    Raises
    ------
    BackendUnavailableError
        If Numba's compiler is switched off.
    ValueError
        If there are gaps.
    """
    word = _WORDS["pairs", out.itemsize]
    kernel = kernel_address("stream_pieces", word)
    if kernel is None:
        raise BackendUnavailableError("the limit of memory is measured by compiled code: unset NUMBA_DISABLE_JIT")
    arrays, units = _arrays(blocks, scales, out, streaming=True)
    if arrays[BLOCKS_PER_ROW] != scales.size:
        raise ValueError("expected arrays whose rows follow each other without gaps")
    _run(kernel, arrays, units, num_threads)


@functools.cache
def machine_code() -> str:
    """Return the name of the form of machine code that Numba's code generator is given for this processor."""
    from numba.core.registry import cpu_target

    from .kernels import simd

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    form: str = simd(triple, features)
    return form


def _run(
    kernel: int,
    arrays: list[int],
    counts: tuple[int, int],
    num_threads: int | None,
    *,
    fresh: bool = False,
) -> None:
    """Run a kernel over all units of so many blocks: in pieces, in several threads, where that pays."""
    units, unit_blocks = counts
    blocks = units * unit_blocks
    if blocks <= ALONE_BLOCKS:
        sharing = 0, 0, units, 0, units, units, 1, 0, 0
    else:
        threads = min(num_threads or default_num_threads(), -(-blocks // THREAD_BLOCKS))
        fewest, most = PIECE_BLOCKS[0] // unit_blocks, PIECE_BLOCKS[1] // unit_blocks
        if fresh:
            fewest *= FRESH_FACTOR
        fewest = max(1 if unit_blocks == 1 else GROUPS_ABREAST, fewest)
        crew, helpers = shared_crew(min(threads, -(-units // fewest)) - 1)
        sharing = crew, helpers, units, 0, fewest, max(fewest, most), 3 * threads, 0, 0
    run(array("q", [ARRAYS + len(arrays), kernel, *sharing, *arrays]))


ARRAYS = 11  # numbers of a job before those that describe arrays, as in `cpu_kernels`
OUT_ADDRESS, TABLE_ADDRESS, OUT_STEP, BLOCKS_PER_ROW, START, LENGTH = 2, 3, 6, 7, 8, 9  # and of those
ITEMSIZE, STREAMING, ROW_AXIS_OUT, AXIS_NUMBERS = 10, 11, 21, 4

_WORDS = {("pairs", 2): "uint16", ("pairs", 4): "uint32", ("halves", 2): "int16", ("halves", 4): "int32"}
_ENCODED_WORDS = {"bfloat16": "uint16", "float16": "int16", "float32": "uint32"}


def _arrays(
    blocks: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    out: NDArray[Any],
    start: int = 0,
    *,
    transposed: bool = False,
    streaming: bool = False,
) -> tuple[list[int], tuple[int, int]]:
    """Describe the arrays to a kernel, in the order that `cpu_kernels` names, with as few row axes as strides allow.

    Returns
    -------
    arrays : list of int
        The part of a geometry that says where the arrays are, with room for the address of a table.
    units, unit_blocks : tuple of int
        What the kernel counts, blocks, or groups of 32 rows if it transposes, and how many blocks that is.
    """
    units, unit_blocks, matrix = scales.size, 1, (1, 0, 0)
    rows, gaps_too, apart = [1, 0, 0, 0], False, 0
    per_row, length = scales.shape[-1], out.shape[-1]
    whole = start == 0 and length == BLOCK_SIZE * per_row
    if whole and blocks.flags.c_contiguous and scales.flags.c_contiguous and out.flags.c_contiguous:
        per_row, length = units, out.size
        steps = BYTES_PER_BLOCK, 1, out.itemsize  # strides of single blocks mean nothing
    else:
        steps = blocks.strides[-2], scales.strides[-1], out.strides[-1] if length > 1 else out.itemsize
        lead = scales.ndim - 1
        if transposed:
            lead -= 1
            matrix = out.shape[lead], blocks.strides[lead], scales.strides[lead]
            units, unit_blocks = math.prod(out.shape[:lead]) * blocks_in(out.shape[lead]), BLOCK_SIZE * per_row
        axes = merged_axes(out.shape[:lead], blocks.strides[:lead], scales.strides[:lead], out.strides[:lead])
        in_turn = per_row * steps[0], per_row * steps[1], length * steps[2]
        if whole and not transposed and axes and axes[-1][1:] == in_turn:
            per_row *= axes.pop()[0]
            length = BLOCK_SIZE * per_row
        rows = [number for axis in reversed(axes) for number in axis] or rows
        row_bytes = per_row * steps[0]
        if row_bytes < rows[1]:
            reading = _reading()
            gaps_too = reading == "in sequence" and rows[1] <= GAPS_FACTOR * row_bytes
            if reading == "crosswise" and streaming and steps[0] == BYTES_PER_BLOCK:
                apart = _crosswise(per_row, rows[1])
    mapped = units * unit_blocks > ALONE_BLOCKS and is_mapped(blocks)
    addresses = address_of(blocks), address_of(scales), address_of(out)
    arrays = [*addresses, 0, *steps, per_row, start, length, out.itemsize, streaming, mapped, gaps_too, apart]
    arrays += [*matrix, *rows]
    return arrays, (units, unit_blocks)


def _kernel_for(arrays: list[int]) -> str:
    """Return which kernel decodes to rows that lie as described: of whole blocks or not, past the cache or not."""
    size, length = arrays[ITEMSIZE], arrays[LENGTH]
    whole = arrays[START] == 0 and length == BLOCK_SIZE * arrays[BLOCKS_PER_ROW]
    if arrays[OUT_STEP] != size:
        return "ragged_pieces"
    if not arrays[STREAMING]:
        return "decode_pieces" if whole else "ragged_pieces"
    alignment = math.gcd(ALIGNMENT, arrays[OUT_ADDRESS], *arrays[ROW_AXIS_OUT::AXIS_NUMBERS])
    if whole and alignment == ALIGNMENT:
        return "decode_pieces"
    if length * size < ALIGNMENT:
        return "ragged_pieces"
    return "join_pieces" if alignment >= size and machine_code() == "avx512" else "ring_pieces"


def _crosswise(per_row: int, row_stride: int) -> int:
    """Return how many rows apart those are that are asked for crosswise, or 0 if none are: see `CROSSWISE_BLOCKS`."""
    lines = -(-per_row // 4)
    apart = 1 + max(PAGE_BYTES // row_stride, GROUP_BLOCKS // (per_row * lines))
    fits = lines * apart * per_row * BYTES_PER_BLOCK <= GROUP_SHARE * _second_level_bytes()
    return apart if fits and CROSSWISE_BLOCKS[0] <= per_row <= CROSSWISE_BLOCKS[1] else 0


@functools.cache
def _second_level_bytes() -> int:
    """Return the size of the second-level cache as Linux gives it, or of the smallest of this century."""
    try:
        kibibytes = int(Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().removesuffix("K\n"))
    except (OSError, ValueError):
        kibibytes = 256
    return kibibytes << 10


@functools.cache
def _reading() -> str:
    """Tell how this processor reads rows with gaps best: "in sequence", "crosswise", or else "row by row"."""
    from llvmlite.binding import get_host_cpu_name, get_process_triple

    name: str = get_host_cpu_name()
    if name.startswith("znver"):
        return "in sequence"
    return "crosswise" if get_process_triple().startswith("x86_64") else "row by row"


def decode_table(name: str) -> NDArray[np.uint8]:
    """Return the table that `cpu_kernels` describes, as the reference decodes to bfloat16 or float16."""
    codes = np.arange(0, 16, 2, dtype=np.uint8) | (np.arange(1, 16, 2, dtype=np.uint8) << 4)
    blocks = np.broadcast_to(np.tile(codes, 2), (256, 1, BYTES_PER_BLOCK))
    values = np.empty((256, BLOCK_SIZE), decoded_dtype(name))
    ReferenceBackend().decode(blocks, np.arange(256, dtype=np.uint8)[:, None], values)
    words = values[:, :16].copy().view("<u2")
    table = aligned_empty((256, 64), np.dtype(np.uint8))
    table[:, :32] = words.view(np.uint8)
    table[:, 32:48], table[:, 48:] = words & 255, words >> 8
    return table


def encode_table(name: str, rule: str) -> NDArray[np.uint8]:
    """Return the table that `cpu_kernels` describes, for values of bfloat16 or float16."""
    dtype = decoded_dtype(name)
    magnitudes = np.arange(1 << 15, dtype=np.uint16).view(dtype)
    values = np.zeros((1 << 15, BLOCK_SIZE), dtype)
    values[:, 0] = magnitudes
    blocks, scales = np.empty((1 << 15, 1, BYTES_PER_BLOCK), np.uint8), np.empty((1 << 15, 1), np.uint8)
    ReferenceBackend().encode(values, blocks, scales, rule=rule)
    finite = magnitudes[scales[:, 0] != SCALE_NAN].astype(np.float64)
    bounds = np.ldexp(FP4_BOUNDS, np.arange(256)[:, None] - SCALE_BIAS)
    lines = np.empty((256, 8), np.uint16)
    lines[:, 0:7:2] = np.searchsorted(finite, bounds[:, 0::2], side="right") - 1  # half way is still the even code
    lines[:, 1:7:2] = np.searchsorted(finite, bounds[:, 1::2], side="left") - 1
    one, two = np.array([1, 2], dtype).view(np.uint16)
    lines[:, 7] = np.count_nonzero(scales[one:two] > scales[one])  # from where on it rounds up
    lines[SCALE_NAN, :7] = 0x7FFF
    table = aligned_empty((scales.size + 2 * lines.nbytes,), np.dtype(np.uint8))
    table[: scales.size] = scales[:, 0]
    table[scales.size :] = lines.repeat(2).view(np.uint8)
    return table


_making = threading.Lock()
_tables: dict[tuple[str, ...], tuple[int, NDArray[np.uint8]]] = {}


def _table_address(*key: str) -> int:
    """Return where the table lies that decodes to a dtype, or that encodes from a dtype by a rule."""
    if key not in _tables:
        with _making:
            if key not in _tables:  # never another one: threads are using the first
                table = encode_table(*key) if len(key) == 2 else decode_table(*key)
                _tables[key] = address_of(table), table
    return _tables[key][0]


def _table_name(dtype: np.dtype[Any]) -> str:
    return "float16" if dtype == np.float16 else "bfloat16"  # float32 values are bfloat16 ones, and 16 bits more


@functools.cache
def _decoder(name: str, dtype: np.dtype[Any], order: str) -> tuple[int | None, int]:
    """Return where the kernel is, if there can be one, and where the table that it looks values up in."""
    kernel = kernel_address(name, _WORDS[order, dtype.itemsize])
    return kernel, 0 if kernel is None else _table_address(_table_name(dtype))
