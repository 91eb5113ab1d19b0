"""Run kernels over the units of a job, in the calling thread or in several: what all of the driver's work shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..memory import address_of
from ..threads import default_num_threads
from .compiler import BuilderBusyError, build_once, check_numba, compiled_kernel
from .geometry import make_job
from .tables import MANTISSA_BITS, NORMAL_SCALES, decode_table, encode_table

if TYPE_CHECKING:
    from .pool import Pool

ALONE_BLOCKS: Final = 1 << 15
"""Jobs of at most this many blocks, 2 MiB of bfloat16, run in the calling thread: waking others would take as long."""

THREAD_BLOCKS: Final = 1 << 13
"""Larger jobs have at most one thread for each this many blocks, 0.5 MiB of bfloat16."""

CHUNK_BLOCKS: Final = 1 << 11, 1 << 18
"""Fewest and most blocks that a thread claims at a time, 0.125 to 16 MiB of bfloat16."""


def instruction_set() -> str:
    """Return the instruction set that kernels are compiled to: what Numba's code generator reports."""
    return _target()[0]


def _target() -> tuple[str, bool]:
    """Return the instruction set, and whether it widens float16 to float32. Numba takes 0.1 ms to report it."""
    check_numba()

    def find() -> tuple[str, bool]:
        from numba.core.registry import cpu_target

        from .simd import target_of

        name: str = target_of(cpu_target.target_context)  # type: ignore[no-untyped-call]
        _, _, features = cpu_target.target_context.codegen().magic_tuple()
        return name, name == "neon" or "+f16c" in features.split(",")

    target: tuple[str, bool] = build_once("target", find)
    return target


def worker_pool() -> Pool:
    """Return the worker pool of this process."""

    def make() -> Pool:
        from .pool import Pool

        return Pool()

    pool: Pool = build_once("pool", make)
    return pool


def has_half_precision() -> bool:
    """Tell whether the processor widens float16 to float32, as the kernels for elements with scales need."""
    try:
        return _target()[1]
    except BuilderBusyError:
        return False


def table_fields(name: str, rule: str | None = None) -> dict[str, int]:
    """Return the fields of a job that describe its table: for decoding, or for encoding by a rule."""

    def make() -> tuple[NDArray[np.uint8], dict[str, int]]:
        table = decode_table(name) if rule is None else encode_table(name, rule)
        least, most = NORMAL_SCALES[name]
        fields = {"table": address_of(table), "least_scale": least, "most_scale": most}
        return table, fields | {"mantissa_bits": MANTISSA_BITS[name]}

    fields: dict[str, int] = build_once(("table", name, rule), make)[1]
    return fields


def run_units(
    kernel: tuple[Any, ...],
    fields: dict[str, int],
    record: np.dtype[Any],
    units: int,
    unit_blocks: int,
    num_threads: int | None,
    table: tuple[str, ...] | None = None,
) -> bool:
    """Run a kernel over all units of a job; return whether there is compiled code, without which nothing is done.

    Parameters
    ----------
    kernel : tuple
        The arguments of `compiled_kernel`.
    fields : dict of str to int
        Those of the record, without the table's if there is one.
    record : numpy.dtype
    units, unit_blocks : int
        Number of units, and of blocks in each.
    num_threads : int or None
    table : tuple of str, optional
        The arguments of `table_fields`.
    """
    blocks = units * unit_blocks
    try:
        compiled = compiled_kernel(*kernel)
        if compiled is None:
            return False
        job = make_job(fields if table is None else fields | table_fields(*table), record)
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
