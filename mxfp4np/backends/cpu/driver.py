"""The CPU backend: describe arrays as jobs, and run kernels over them in one or several threads.

How arrays of any strides become jobs, which kernel runs, and when stores are streaming. Products are in `products`, and
how work is split in `launch`. Kernels and Numba are imported when something is first decoded, encoded or multiplied.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError
from ...format import BLOCK_SIZE, BYTES_PER_BLOCK, name_of
from ..memory import (
    ALIGNMENT,
    HostBackend,
    address_of,
    aligned_empty,
    check_factors,
    check_shapes,
    is_transposed,
    merged_axes,
    scales_by_row,
)
from ..reference import ReferenceBackend
from .geometry import COLUMN_ROWS, GROUP_ROWS, JOB, SCALED_JOB
from .launch import has_half_precision, instruction_set, run_units
from .products import multiply
from .tables import LINE_VALUES, line_codes, word_name

STREAMING_BYTES: Final = 8 << 20
"""Outputs from this size on are written with streaming stores, since they do not fit into the cache.

Rows in new memory are written by ordinary stores: the system has just cleared its pages, which are then in the cache.
That is 1.4 times as fast with one thread (Emerald Rapids), 0.9 times with 16. Columns are streamed: 1.5 times as fast.
"""

LOOKUP_VALUES, LOOKUP_TIMES = 1 << 20, 16
"""Elements with scales are looked up if they are at least this many, and so many times as many as the table has."""

PREFETCH_BYTES: Final = 8192
"""The prefetch distance where rows of codes have no gaps."""

PREFETCH_ROWS, PREFETCH_BLOCKS = 4, 128
"""The prefetch distance where rows have gaps: this many rows, or as many short rows as hold this many blocks."""


KERNEL_ELEMENTS: Final = ("E2M1", "E4M3", "E5M2")
"""Element formats that kernels decode; the reference decodes the others, which no published file has."""


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
        check_shapes(blocks, scales, out, start)
        if blocks.strides[-1] != 1:  # kernels load whole blocks
            blocks = np.ascontiguousarray(blocks)
        columns = is_transposed(out)
        job = _describe(blocks, scales, out, start, columns=columns)
        if job is None:
            for part in zip(blocks, scales, out, strict=True):
                self.decode(*part, start=start, order=order, fresh=fresh, num_threads=num_threads)
            return
        streaming = out.nbytes >= STREAMING_BYTES and (columns or not fresh)
        if columns:
            name, streaming = "decode_columns", streaming and _is_aligned(job, "values_step")
        else:
            name = _decoder(job, streaming=streaming)
        kernel = "decode", name, out.itemsize, order == "halves", streaming
        if not _run(kernel, job, (word_name(out.dtype),), num_threads, columns=columns):
            ReferenceBackend().decode(blocks, scales, out, start=start, order=order)

    def decode_scaled(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        out: NDArray[Any],
        *,
        element: str,
        width: int,
        tile_rows: int = 1,
        first_row: int = 0,
        table: NDArray[np.float32] | None = None,
        start: int = 0,
        fresh: bool = False,
        num_threads: int | None = None,
    ) -> None:
        if out.size == 0:
            return
        if codes.strides[-1] != 1:
            codes = np.ascontiguousarray(codes)
        rows = out.shape[-2] if out.ndim > 1 else 1
        columns = is_transposed(out)
        lines = self._lines(element, scales, table, out, num_threads)
        read, read_table = (scales, table) if lines is None else lines
        read = scales_by_row(read, rows, tile_rows, first_row)
        job = _describe_scaled(codes, read, out, element, width, start, columns=columns)
        if job is None and out.ndim > 2 and element in KERNEL_ELEMENTS:
            for part in zip(codes, scales_by_row(scales, rows, tile_rows, first_row), out, strict=True):
                self.decode_scaled(
                    *part, element=element, width=width, table=table, start=start, num_threads=num_threads
                )
            return
        if job is not None and has_half_precision():
            streaming = out.nbytes >= STREAMING_BYTES and not fresh
            name = "decode_scaled_columns" if columns else _scaled_decoder(job, streaming=streaming)
            constants = element, name_of(out.dtype), table is not None, lines is not None
            kernel = "scaled", name, *constants, *(() if columns else (streaming,))
            job["table"] = 0 if read_table is None else address_of(read_table)
            group = COLUMN_ROWS if columns else 1
            if run_units(kernel, job, SCALED_JOB, _units_of(job, group), group, num_threads):
                return
        scales = scales_by_row(scales, rows, tile_rows, first_row)
        reference = ReferenceBackend()
        reference.decode_scaled(codes, scales, out, element=element, width=width, table=table, start=start)

    def _lines(
        self,
        element: str,
        scales: NDArray[Any],
        table: NDArray[np.float32] | None,
        out: NDArray[Any],
        num_threads: int | None,
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return numbers of lines and the table of `mxfp4np.backends.cpu.lookup`, or None where it would not pay."""
        if element not in KERNEL_ELEMENTS or out.itemsize != 2:
            return None
        factors = scales if table is None else table
        codes, values = line_codes(element), LINE_VALUES[element]
        if out.size < max(LOOKUP_VALUES, LOOKUP_TIMES * values * factors.size):
            return None
        if not has_half_precision() or instruction_set() != "avx512":
            return None
        lines = aligned_empty((factors.size, values), out.dtype)
        codes = np.broadcast_to(codes, (factors.size, codes.size))
        self.decode_scaled(codes, factors.reshape(-1, 1), lines, element=element, width=values, num_threads=num_threads)
        numbers = scales if table is not None else np.arange(scales.size, dtype=np.uint32).reshape(scales.shape)
        return numbers, lines

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
        check_shapes(blocks, scales, x)
        columns = is_transposed(x) and x.shape[-2] >= BLOCK_SIZE
        codes = blocks if blocks.strides[-1] == 1 else np.empty(blocks.shape, np.uint8)  # kernels store whole blocks
        job = _describe(codes, scales, x, columns=columns)
        if job is None:
            for part in zip(x, codes, scales, strict=True):
                self.encode(*part, rule=rule, num_threads=num_threads)
        else:
            kernel = "encode", "encode_columns" if columns else "encode_rows", x.itemsize
            if not _run(kernel, job, (word_name(x.dtype), rule), num_threads, columns=columns):
                return ReferenceBackend().encode(x, blocks, scales, rule=rule)
        if codes is not blocks:
            blocks[...] = codes

    most_vectors = sys.maxsize

    def matmul(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        order: str = "pairs",
        activations: str = "float32",
        num_threads: int | None = None,
    ) -> None:
        check_factors(blocks, scales, x, out)
        if blocks.strides[-1] != 1:
            blocks = np.ascontiguousarray(blocks)
        if not multiply(blocks, scales, x, out, order=order, activations=activations, num_threads=num_threads):
            ReferenceBackend().matmul(blocks, scales, x, out, order=order)


def stream(
    blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[Any], *, num_threads: int | None = None
) -> None:
    """Move the bytes that decoding moves, with streaming stores, and decode nothing: the limit of decoding.

    Parameters
    ----------
    blocks : (..., G, 16) uint8
    scales : (..., G) uint8
    out : (..., 32 * G) bfloat16, float16 or float32
        Aligned to 64 bytes. Filled with bytes of no meaning. All three are C-contiguous.
    num_threads : int, optional
        As for decoding.

    Raises
    ------
    BackendUnavailableError
        If Numba's compiler is switched off.
    ValueError
        If an array is not contiguous.
    """
    job = _describe(blocks, scales, out)
    if job is None or job["blocks_per_row"] != scales.size:
        raise ValueError("expected arrays whose rows follow each other without gaps")
    if not _run(("decode", "move_blocks", out.itemsize), job, (word_name(out.dtype),), num_threads):
        raise BackendUnavailableError("the limit of memory is measured by compiled code: unset NUMBA_DISABLE_JIT")


def stream_elements(codes: NDArray[np.uint8], out: NDArray[Any], *, num_threads: int | None = None) -> None:
    """Move the bytes that decoding elements with scales moves, and decode nothing: the limit of that.

    Parameters
    ----------
    codes : (..., B) uint8
    out : (..., B) or (..., 2 * B) bfloat16, float16 or float32
        Aligned to 64 bytes. Filled with bytes of no meaning. Both are C-contiguous.
    num_threads : int, optional
        As for decoding.

    Raises
    ------
    BackendUnavailableError
        If Numba's compiler is switched off.
    """
    step = BLOCK_SIZE * codes.size // out.size
    job = dict.fromkeys(SCALED_JOB.names or (), 0)
    job |= {"codes": address_of(codes), "values": address_of(out), "prefetch_distance": PREFETCH_BYTES}
    job |= {"matrices": 1, "rows": 1, "blocks_per_row": out.size // BLOCK_SIZE}
    kernel = "scaled", "move_scaled", step, out.itemsize
    if not run_units(kernel, job, SCALED_JOB, out.size // BLOCK_SIZE, 1, num_threads):
        raise BackendUnavailableError("the limit of memory is measured by compiled code: unset NUMBA_DISABLE_JIT")


def _describe(
    codes: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    values: NDArray[Any],
    start: int = 0,
    *,
    columns: bool = False,
) -> dict[str, int] | None:
    """Describe arrays as a stack of matrices, or return None if their strides need more axes than that.

    Returns
    -------
    dict of str to int
        The fields of a job, except those of the table. With ``columns``, the last axis but one of the values is the
        matrix's axis of rows. Otherwise axes are merged where strides allow, even to a single row.
    """
    per_row, length = scales.shape[-1], values.shape[-1]
    whole = start == 0 and length == BLOCK_SIZE * per_row
    axes: list[tuple[int, ...]] = []
    if whole and codes.flags.c_contiguous and scales.flags.c_contiguous and values.flags.c_contiguous:
        per_row, length = scales.size, values.size
        steps = BYTES_PER_BLOCK, 1, values.itemsize  # NumPy's stride of an axis of length 1 may be anything
    else:
        steps = codes.strides[-2], scales.strides[-1], values.strides[-1] if length > 1 else values.itemsize
        lead = scales.ndim - 1 - columns
        axes = merged_axes(values.shape[:lead], codes.strides[:lead], scales.strides[:lead], values.strides[:lead])
        if columns:
            axes.append((values.shape[lead], codes.strides[lead], scales.strides[lead], values.strides[lead]))
        elif whole and axes and axes[-1][1:] == (per_row * steps[0], per_row * steps[1], length * steps[2]):
            per_row *= axes.pop()[0]
            length = BLOCK_SIZE * per_row
    if len(axes) > 2:
        return None
    distance = PREFETCH_BYTES
    if axes and axes[-1][1] != per_row * steps[0]:
        distance = max(PREFETCH_ROWS, PREFETCH_BLOCKS // per_row) * axes[-1][1]
    job = {
        "codes": address_of(codes),
        "scales": address_of(scales),
        "values": address_of(values),
        "blocks_per_row": per_row,
        "skip": start,
        "length": length,
        "itemsize": values.itemsize,
        "prefetch_distance": distance,
    }
    axes = [(1, 0, 0, 0)] * (2 - len(axes)) + axes
    job["matrices"], job["codes_matrix"], job["scales_matrix"], job["values_matrix"] = axes[0]
    job["rows"], job["codes_row"], job["scales_row"], job["values_row"] = axes[1]
    job["codes_step"], job["scales_step"], job["values_step"] = steps
    return job


def _decoder(job: dict[str, int], *, streaming: bool) -> str:
    """Return the name of the kernel that decodes a job to rows."""
    is_whole = job["skip"] == 0 and job["length"] == BLOCK_SIZE * job["blocks_per_row"]
    is_direct = is_whole and job["values_step"] == job["itemsize"]
    return "decode_rows" if is_direct and (not streaming or _is_aligned(job, "values_row")) else "decode_any_rows"


def _is_aligned(job: dict[str, int], stride: str) -> bool:
    """Tell whether all rows, or columns, begin on a cache line. ``stride`` is the name of their stride's field."""
    return (job["values"] | job[stride] | job["values_matrix"]) % ALIGNMENT == 0


def _run(
    kernel: tuple[Any, ...],
    fields: dict[str, int],
    table: tuple[str, ...],
    num_threads: int | None,
    *,
    columns: bool = False,
) -> bool:
    """Run a kernel over all units of a `JOB`; see `run_units`. ``table`` are the arguments of `table_fields`.

    With ``columns``, a unit is one block of each row in a group of rows.
    """
    rows = GROUP_ROWS if columns else 1
    return run_units(kernel, fields, JOB, _units_of(fields, rows), rows, num_threads, table)


def _units_of(fields: dict[str, int], group_rows: int) -> int:
    """Return the number of units of a job, each of which is a block of each of ``group_rows`` rows."""
    return fields["matrices"] * -(-fields["rows"] // group_rows) * fields["blocks_per_row"]


# Elements with scales


def _describe_scaled(
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    values: NDArray[Any],
    element: str,
    width: int,
    start: int,
    *,
    columns: bool,
) -> dict[str, int] | None:
    """Describe arrays as a stack of matrices, a `SCALED_JOB`; return None if there are no kernels for them."""
    length = values.shape[-1]
    if width >= start + length:  # one scale: its group may be as wide as is convenient
        width = BLOCK_SIZE * max(1, -(-(start + length) // BLOCK_SIZE))
    if element not in KERNEL_ELEMENTS or (width % BLOCK_SIZE and width != BLOCK_SIZE // 2):
        return None
    first, skip = divmod(start, BLOCK_SIZE)
    step = BYTES_PER_BLOCK if element == "E2M1" else BLOCK_SIZE
    if width < BLOCK_SIZE:  # whole groups before the start have no scales
        assert first == 0
    codes = codes[..., first * step :]
    lead = values.ndim - 1 - columns
    axes = merged_axes(values.shape[:lead], codes.strides[:lead], scales.strides[:lead], values.strides[:lead])
    if columns:
        axes.append((values.shape[lead], codes.strides[lead], scales.strides[lead], values.strides[lead]))
    if len(axes) > 2:
        return None
    job = {
        "codes": address_of(codes),
        "scales": address_of(scales),
        "values": address_of(values),
        "codes_step": step,
        "scales_step": scales.strides[-1],
        "values_step": values.strides[-1] if length > 1 else values.itemsize,
        "blocks_per_row": -(-(skip + length) // BLOCK_SIZE),
        "skip": skip,
        "length": length,
        "itemsize": values.itemsize,
        "blocks_per_scale": width // BLOCK_SIZE,
        "first_block": first,
        "row_bytes": codes.shape[-1],
        "prefetch_distance": PREFETCH_BYTES,
    }
    axes = [(1, 0, 0, 0)] * (2 - len(axes)) + axes
    job["matrices"], job["codes_matrix"], job["scales_matrix"], job["values_matrix"] = axes[0]
    job["rows"], job["codes_row"], job["scales_row"], job["values_row"] = axes[1]
    return job


def _scaled_decoder(job: dict[str, int], *, streaming: bool) -> str:
    """Return the name of the kernel that decodes a job to rows."""
    is_whole = job["skip"] == 0 and job["length"] == BLOCK_SIZE * job["blocks_per_row"]
    is_direct = is_whole and job["values_step"] == job["itemsize"]
    aligned = not streaming or _is_aligned(job, "values_row")
    return "decode_scaled_rows" if is_direct and aligned else "decode_scaled_any_rows"
