"""What Ray costs past start-up, on this machine: it runs before, and so do its processes.

64 tasks that only wait, as long as a shard of 1 GB takes, show what it adds, whatever else the machine does. The
conversion of a checkpoint into 64 small shards is compared with as many threads of one process.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import ray

import mxfp4np
from benchmarks.timing import Row, Subject, compare
from mxfp4np.rewrite.cluster import RayWorkers
from mxfp4np.rewrite.workers import Workers

SHARDS = 64
ROWS_PER_EXPERT = 5760  # of 2,880 values: 33 MB of bfloat16
SECONDS = 0.5  # of a task: a core writes about 2 GB/s of bfloat16 to memory


def wait(workers: type[Workers | RayWorkers], threads: int) -> None:
    """Run the tasks that wait."""
    workers(threads, 0, lambda _: None).map(lambda _: time.sleep(SECONDS), range(SHARDS))


def measure(options: Namespace) -> Iterator[Row]:
    """Yield a row for tasks that wait, and one for a conversion."""
    rows = max(1, ROWS_PER_EXPERT * options.experts // 16)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        source.mkdir()
        rng = np.random.default_rng(0)
        scales = rng.integers(118, 126, (rows, 90), np.uint8)
        packed = mxfp4np.MXFP4Array(rng.integers(0, 256, (rows, 90, 16), np.uint8), scales)
        mxfp4np.save_file({f"layers.{i}.weight": packed for i in range(SHARDS)}, source / "model.safetensors")

        def run(engine: str) -> None:
            threads = options.threads if engine == "threads" else None  # Ray has as many CPUs
            result = mxfp4np.convert(source, out, max_shard_size=2 * packed.size, num_threads=threads, engine=engine)
            assert len(result.shards) == SHARDS

        ray.init(num_cpus=options.threads, log_to_driver=False, include_dashboard=False)
        try:
            waiting = Subject(
                "64 tasks of 0.5 s : threads", "Ray", partial(wait, RayWorkers, options.threads), SHARDS * 1e9, 0.98
            )
            yield from compare((partial(wait, Workers, options.threads), SHARDS * 1e9), [waiting], 3, options.threads)
            size = SHARDS * 2 * packed.size
            subject = Subject("convert into 64 shards of 33 MB : threads", "Ray", partial(run, "ray"), size)
            before = partial(shutil.rmtree, out, ignore_errors=True)
            yield from compare(
                (partial(run, "threads"), size), [subject], options.rounds, options.threads, before=before
            )
        finally:
            ray.shutdown()
