"""The kernel that gathers bytes: from runs that lie a stride apart to memory that a device copies from."""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from typing import Final

import numpy as np
from numba import carray

from .simd import copy_run, store_fence

GATHER: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("source", "run_bytes", "run_stride"),  # the first run, how long runs are, and how far apart
            "skip",  # bytes of the runs to leave out
            "target",  # where the others follow each other
        )
    ]
)

RECORD = GATHER
"""What the kernel reads."""


def gather():
    """Return the kernel. Its units are bytes of the target."""

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        while start < stop:
            run, offset = divmod(job.skip + start, job.run_bytes)
            count = min(stop - start, job.run_bytes - offset)
            copy_run(job.source + run * job.run_stride + offset, job.target + start, count, False)
            start += count
        store_fence()

    return kernel
