"""Convert a checkpoint into 64 shards on Ray, on this machine, compared with as many threads of one process.

Ray runs before, and so do its processes: what is measured is what it costs past start-up. The first run, which is not
counted, imports and compiles what they need.
"""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import ray

import mxfp4np
from benchmarks.timing import Row, Subject, compare

SHARDS = 64
ROWS_PER_EXPERT = 5760  # of 2,880 values: 33 MB of bfloat16
FLOOR = 0.98


def measure(options: Namespace) -> Iterator[Row]:
    """Yield a row: how fast Ray converts, compared with threads."""
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
            size = SHARDS * 2 * packed.size
            subject = Subject("convert into 64 shards : threads", "Ray", partial(run, "ray"), size, FLOOR)
            before = partial(shutil.rmtree, out, ignore_errors=True)
            yield from compare(
                (partial(run, "threads"), size), [subject], options.rounds, options.threads, before=before
            )
        finally:
            ray.shutdown()
