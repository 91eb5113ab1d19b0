"""Products with packed weights on the CPU: which kernel runs, and what it reads."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError
from ...format import BYTES_PER_BLOCK
from ..memory import address_of
from . import activations as prepared
from .compiler import BuilderBusyError, build_once
from .geometry import PRODUCT_JOB, READ_BYTES
from .launch import instruction_set, run_units
from .tables import decode_table, value_table

PREFETCH_BYTES: Final = {"float32": 4096, "int16": 2048}
"""The prefetch distance, by activations: what is best on Sapphire Rapids with many threads, and on Zen 4 with one."""

READ_AHEAD: Final = 4096
"""The prefetch distance of `read`, which is faster than any product."""

VECTORS_AT_ONCE: Final = {"avx512": 8}
"""Vectors that are multiplied in registers, by instruction set; 4 with the others."""


def multiply(
    blocks: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    x: NDArray[np.float32],
    out: NDArray[np.float32],
    *,
    order: str,
    activations: str,
    num_threads: int | None,
) -> bool:
    """Multiply; see `mxfp4np.backends.Backend.matmul`. Return whether there is compiled code for it."""
    job = {
        "codes": address_of(blocks),
        "codes_row": blocks.strides[0],
        "codes_step": blocks.strides[1],
        "scales": address_of(scales),
        "scales_row": scales.strides[0],
        "scales_step": scales.strides[1],
        "rows": scales.shape[0],
        "blocks_per_row": scales.shape[1],
        "factors": 0,
        "table": 0,
        "values_row": out.strides[0],
        "values_step": out.strides[1],
        "prefetch_distance": PREFETCH_BYTES["float32"],
    }
    if activations == "int16" and x.shape[1] == 1 and _multiply_integers(job, x, out, order, num_threads):
        return True
    try:
        target = instruction_set()
        table = build_once("value table", lambda: value_table() if target == "avx512" else decode_table("bfloat16"))
    except BuilderBusyError:
        return False
    everything = prepared.in_order(x, prepared.value_elements(target, order))
    step = VECTORS_AT_ONCE.get(target, 4)
    for begin in range(0, x.shape[1], step):
        some = everything[begin : begin + step]
        vectors = 1 << (len(some) - 1).bit_length()
        rows_at_once, lanes = (1, 32) if vectors == 1 else (2, 16 if target == "avx512" else 8)
        padded = np.empty((len(out), vectors), np.float32) if vectors > len(some) else out[:, begin : begin + vectors]
        ready = prepared.together(some, vectors)
        job |= {"x": address_of(ready), "values": address_of(padded), "table": address_of(table)}
        job |= {"values_row": padded.strides[0], "values_step": padded.strides[1]}
        kernel = "matmul", "multiply", rows_at_once, vectors, lanes
        units, blocks_of_unit = -(-job["rows"] // rows_at_once), rows_at_once * job["blocks_per_row"]
        if not run_units(kernel, job, PRODUCT_JOB, units, blocks_of_unit, num_threads):
            return False
        if vectors > len(some):
            out[:, begin : begin + step] = padded[:, : len(some)]
    return True


def _multiply_integers(
    job: dict[str, int], x: NDArray[np.float32], out: NDArray[np.float32], order: str, num_threads: int | None
) -> bool:
    """Multiply by integers of 16 bits, if x and the result are in their range; return whether that was done."""
    ready = prepared.integers(x[:, 0], prepared.integer_elements(order))
    if ready is None:
        return False
    integers, factors, power = ready
    job = job | {"x": address_of(integers), "factors": address_of(factors), "values": address_of(out)}
    job["prefetch_distance"] = PREFETCH_BYTES["int16"]
    kernel = "matmul", "multiply_integers", job["codes_step"] == BYTES_PER_BLOCK
    if not run_units(kernel, job, PRODUCT_JOB, job["rows"], job["blocks_per_row"], num_threads):
        return False
    out *= np.float32(power)
    return bool(np.isfinite(out.sum()))  # scales of 255 and weights beyond float32 are left to the other kernel


def read(*arrays: NDArray[np.uint8], num_threads: int | None = None) -> None:
    """Read bytes, and do nothing with them: the limit of a product of one vector.

    Parameters
    ----------
    *arrays : uint8
        C-contiguous. What is left after whole units of `READ_BYTES` is not read.
    num_threads : int, optional
        As for products.

    Raises
    ------
    BackendUnavailableError
        If Numba's compiler is switched off.
    """
    anything = np.empty(1, np.float32)
    for array in arrays:
        job = dict.fromkeys(PRODUCT_JOB.names or (), 0)
        job |= {"codes": address_of(array), "values": address_of(anything), "prefetch_distance": READ_AHEAD}
        units = array.nbytes // READ_BYTES
        if not run_units(("matmul", "read"), job, PRODUCT_JOB, units, READ_BYTES // BYTES_PER_BLOCK, num_threads):
            raise BackendUnavailableError("reading is measured by compiled code: unset NUMBA_DISABLE_JIT")
