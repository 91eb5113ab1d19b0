"""The CPU backend: describe arrays as jobs, and run kernels over them in one or several threads.

All policy is here: how arrays of any strides become jobs, which kernel runs, when stores are streaming, and how work is
split. Kernels and Numba are imported when something is first decoded or encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError
from ...format import BLOCK_SIZE, BYTES_PER_BLOCK
from ..memory import ALIGNMENT, HostBackend, address_of, is_transposed, merged_axes
from ..reference import ReferenceBackend
from ..threads import default_num_threads
from .compiler import BuilderBusyError, build_once, check_numba, compiled_kernel
from .geometry import GROUP_ROWS, make_job
from .tables import MANTISSA_BITS, NORMAL_SCALES, decode_table, encode_table, word_name

if TYPE_CHECKING:
    from .pool import Pool

ALONE_BLOCKS: Final = 1 << 15
"""Jobs of at most this many blocks, 2 MiB of bfloat16, run in the calling thread: waking others would take as long."""

THREAD_BLOCKS: Final = 1 << 13
"""Larger jobs have at most one thread for each this many blocks, 0.5 MiB of bfloat16."""

CHUNK_BLOCKS: Final = 1 << 11, 1 << 18
"""Fewest and most blocks that a thread claims at a time, 0.125 to 16 MiB of bfloat16."""

STREAMING_BYTES: Final = 8 << 20
"""Outputs from this size on are written with streaming stores, since they do not fit into the cache.

Rows in new memory are written by ordinary stores: the system has just cleared its pages, which are then in the cache.
That is 1.4 times as fast with one thread (Emerald Rapids), 0.9 times with 16. Columns are streamed: 1.5 times as fast.
"""

PREFETCH_BYTES: Final = 8192
"""The prefetch distance where rows of codes have no gaps."""

PREFETCH_ROWS, PREFETCH_BLOCKS = 4, 128
"""The prefetch distance where rows have gaps: this many rows, or as many short rows as hold this many blocks."""


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


def instruction_set() -> str:
    """Return the instruction set that kernels are compiled to: what Numba's code generator reports."""
    check_numba()
    from numba.core.registry import cpu_target

    from .simd import target_of

    target: str = target_of(cpu_target.target_context)  # type: ignore[no-untyped-call]
    return target


def worker_pool() -> Pool:
    """Return the worker pool of this process."""

    def make() -> Pool:
        from .pool import Pool

        return Pool()

    pool: Pool = build_once("pool", make)
    return pool


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


def _table(name: str, rule: str | None = None) -> dict[str, int]:
    """Return the fields of a job that describe its table: for decoding, or for encoding by a rule."""

    def make() -> tuple[NDArray[np.uint8], dict[str, int]]:
        table = decode_table(name) if rule is None else encode_table(name, rule)
        least, most = NORMAL_SCALES[name]
        fields = {"table": address_of(table), "least_scale": least, "most_scale": most}
        return table, fields | {"mantissa_bits": MANTISSA_BITS[name]}

    fields: dict[str, int] = build_once(("table", name, rule), make)[1]
    return fields


def _run(
    kernel: tuple[Any, ...],
    fields: dict[str, int],
    table: tuple[str, ...],
    num_threads: int | None,
    *,
    columns: bool = False,
) -> bool:
    """Run a kernel over all units of a job; return whether there is compiled code, without which nothing is done.

    ``kernel`` and ``table`` are the arguments of `compiled_kernel` and `_table`. With ``columns``, a unit is one block
    of each row in a group of rows.
    """
    rows, unit_blocks = fields["rows"], 1
    if columns:
        rows, unit_blocks = -(-rows // GROUP_ROWS), GROUP_ROWS
    units = fields["matrices"] * rows * fields["blocks_per_row"]
    blocks = units * unit_blocks
    try:
        compiled = compiled_kernel(*kernel)
        if compiled is None:
            return False
        job = make_job(fields | _table(*table))
        pool = None if blocks <= ALONE_BLOCKS else worker_pool()
    except BuilderBusyError:
        return False
    address, _ = job.buffer_info()
    if pool is None:
        compiled.call(address, 0, units)
        return True
    threads = min(num_threads or default_num_threads(), -(-blocks // THREAD_BLOCKS))
    fewest, most = CHUNK_BLOCKS
    chunk = max(1, fewest // unit_blocks), max(1, most // unit_blocks)
    pool.run(compiled.address, address, units, chunk, threads)
    return True
