"""Speed by the size of the output, and by the number of threads: decoding to bfloat16, beside its limits."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import numpy as np

import mxfp4np
from mxfp4np.backends.cpu.driver import stream
from mxfp4np.backends.threads import usable_cpus
from mxfp4np.cli.timing import Run, fill, in_turn

GROUPS = 90  # 2880 values in a row, as in gpt-oss
SMALLEST, STEP = 1 << 16, 4  # bytes of output
ROUND_BYTES = 1 << 26  # what small outputs are repeated up to, so that a clock can time them


def packed(nbytes: int) -> mxfp4np.MXFP4Array:
    """Return random data that decodes to about so many bytes."""
    rng = np.random.default_rng(0)
    shape = nbytes // (64 * GROUPS), GROUPS
    return mxfp4np.MXFP4Array(rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(118, 126, shape, np.uint8))


def repeated(run: Run, times: int) -> Run:
    """Return a function that makes a run several times."""

    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def sizes(options: Namespace) -> list[dict[str, Any]]:
    """Return rates in GB/s of output for each size and way."""
    rows: list[dict[str, Any]] = []
    size = SMALLEST
    while size <= options.experts << 26:
        data = packed(size)
        out = data.decode()
        source = out.copy()
        runs: dict[str, Run] = {
            "output reused": partial(data.decode, out=out, num_threads=options.threads),
            "new output": partial(data.decode, num_threads=options.threads),
            "limit: stream": partial(stream, data.blocks, data.scales, out, num_threads=options.threads),
            "np.copyto": partial(np.copyto, out, source),
        }
        times = max(1, ROUND_BYTES // size)
        seconds = in_turn([repeated(run, times) for run in runs.values()], options.rounds)
        for what, each in zip(runs, seconds, strict=True):
            rates = sorted(times * out.nbytes / s / 1e9 for s in each)
            rows.append({"what": what, "bytes": size, "rates": rates})
        size *= STEP
    return rows


def threads(options: Namespace) -> list[dict[str, Any]]:
    """Return rates in GB/s of output for each number of threads and way."""
    data = packed(options.experts << 25)
    out = data.decode()
    cpus = usable_cpus()
    counts = sorted({cpus, *(1 << i for i in range(cpus.bit_length()))})
    runs: dict[tuple[str, int], Run] = {}
    for n in counts:
        runs["output reused", n] = partial(data.decode, out=out, num_threads=n)
        runs["new output", n] = partial(data.decode, num_threads=n)
        runs["limit: stream", n] = partial(stream, data.blocks, data.scales, out, num_threads=n)
        runs["limit: memset", n] = partial(fill, out, n)
    seconds = in_turn(list(runs.values()), options.rounds)
    return [
        {"what": what, "threads": n, "rates": sorted(out.nbytes / s / 1e9 for s in each)}
        for (what, n), each in zip(runs, seconds, strict=True)
    ]
