"""Speed by the size of the output and by the number of threads: decoding to bfloat16, and its limits."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import numpy as np

import mxfp4np
from benchmarks.timing import Row, repeated
from mxfp4np.backends.cpu.driver import stream
from mxfp4np.backends.threads import usable_cpus
from mxfp4np.cli.timing import Run, fill, in_turn

GROUPS = 90  # 2880 values in a row, as in gpt-oss
SMALLEST, STEP = 1 << 16, 4  # bytes of output
RUN_BYTES = 1 << 26  # small outputs are decoded repeatedly up to this size


def packed(nbytes: int) -> mxfp4np.MXFP4Array:
    """Return random data that decodes to about ``nbytes`` of bfloat16."""
    rng = np.random.default_rng(0)
    shape = nbytes // (64 * GROUPS), GROUPS
    return mxfp4np.MXFP4Array(rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(118, 126, shape, np.uint8))


def sizes(options: Namespace) -> list[Row]:
    """Return rates in GB/s of output for each size and run."""
    rows: list[Row] = []
    size = SMALLEST
    while size <= options.experts << 26:
        data = packed(size)
        out = data.decode()
        runs: dict[str, Run] = {
            "output reused": partial(data.decode, out=out, num_threads=options.threads),
            "new output": partial(data.decode, num_threads=options.threads),
            "limit: stream": partial(stream, data.blocks, data.scales, out, num_threads=options.threads),
            "np.copyto": partial(np.copyto, out, out.copy()),
        }
        times = max(1, RUN_BYTES // size)
        seconds = in_turn([repeated(run, times) for run in runs.values()], options.rounds)
        for what, taken in zip(runs, seconds, strict=True):
            rows.append({"what": what, "bytes": size, "rates": sorted(times * out.nbytes / s / 1e9 for s in taken)})
        size *= STEP
    return rows


def threads(options: Namespace) -> list[Row]:
    """Return rates in GB/s of output for each number of threads and run."""
    data = packed(options.experts << 25)
    out = data.decode()
    cpus = usable_cpus()
    runs: dict[tuple[str, int], Run] = {}
    for n in sorted({cpus, *(1 << i for i in range(cpus.bit_length()))}):
        runs["output reused", n] = partial(data.decode, out=out, num_threads=n)
        runs["new output", n] = partial(data.decode, num_threads=n)
        runs["limit: stream", n] = partial(stream, data.blocks, data.scales, out, num_threads=n)
        runs["limit: memset", n] = partial(fill, out, n)
    seconds = in_turn(list(runs.values()), options.rounds)
    return [
        {"what": what, "threads": n, "rates": sorted(out.nbytes / s / 1e9 for s in taken)}
        for (what, n), taken in zip(runs, seconds, strict=True)
    ]
