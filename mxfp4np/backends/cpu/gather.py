"""The kernel that gathers bytes from runs, which begin a stride apart, to contiguous memory."""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from typing import Final

import numpy as np
from numba import carray

from .simd import copy_run

GATHER: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("source", "run_bytes", "run_stride"),  # address of the first run; length and stride of runs
            "skip",  # bytes to leave out at the start of the runs
            "target",  # address that the bytes after them are copied to
        )
    ]
)

RECORD = GATHER
"""The record that the kernel of this file reads."""


def gather():
    """Return the kernel. A unit is one byte of the target."""

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        while start < stop:
            run, offset = divmod(job.skip + start, job.run_bytes)
            count = min(stop - start, job.run_bytes - offset)
            copy_run(job.source + run * job.run_stride + offset, job.target + start, count, False)
            start += count

    return kernel
