"""What a new process takes: for its import and its first decode, and to open a checkpoint of many tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.timing import Row, amount
from mxfp4np.storage.safetensors import header_bytes

IMPORT = "import time, numpy; begin = time.perf_counter(); import mxfp4np; print(time.perf_counter() - begin)"
DECODE = """
import sys, time, numpy as np, mxfp4np
count, threads = map(int, sys.argv[1:])
blocks, scales = np.zeros((count, 16), np.uint8), np.zeros(count, np.uint8)
begin = time.perf_counter()
mxfp4np.decode(blocks, scales, num_threads=threads)
print(time.perf_counter() - begin)
"""
BLOCKS = {"1,000 blocks": 1000, "200,000 blocks, with worker threads": 200_000}
CEILINGS = {"empty cache": 2.5, "warm cache": 0.5}

TENSORS, FILES = 497_220, 96  # Kimi-K3's
OPEN = """
import json, resource, sys, time, numpy, mxfp4np, mxfp4np.checkpoint
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
before, begin = memory(), time.perf_counter()
checkpoint = mxfp4np.Checkpoint(sys.argv[1])
seconds = time.perf_counter() - begin
checkpoint.info(next(iter(checkpoint)))
print(json.dumps([seconds, memory() - before]))
"""


def printed(script: str, *arguments: object, cache: str = "") -> Any:
    """Run a script in a new process, with a cache folder for compiled kernels; return the JSON that it prints."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache} if cache else None
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def startup(options: Namespace) -> list[Row]:
    """Time the import, and the first decode with an empty and with a warm cache of compiled kernels."""
    seconds = defaultdict(list)
    for _ in range(options.rounds):
        for blocks, count in BLOCKS.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in CEILINGS:
                    seconds[state, blocks].append(printed(DECODE, count, options.threads, cache=cache))
        seconds["", ""].append(printed(IMPORT))
    imports = seconds.pop(("", ""))
    rows = [
        amount(f"first decode of a process, {state}", blocks, options.threads, taken, "s", CEILINGS[state])
        for (state, blocks), taken in sorted(seconds.items())
    ]
    return [*rows, amount("`import mxfp4np` after NumPy", "", 1, [1e3 * s for s in imports], "ms")]


def write_many(folder: Path) -> dict[str, str]:
    """Write sparse files with as many tensors as Kimi-K3; return the file of each tensor."""
    weight_map: dict[str, str] = {}
    for f in range(FILES):
        specs = {}
        for i in range(f * TENSORS // 2 // FILES, (f + 1) * TENSORS // 2 // FILES):
            stem = f"language_model.model.layers.{i // 1152}.block_sparse_moe.experts.{i // 3 % 384}.w{i % 3 + 1}"
            specs[f"{stem}.{i}.weight_packed"] = ("U8", (3072, 3584))
            specs[f"{stem}.{i}.weight_scale"] = ("U8", (3072, 224))
        path, header = folder / f"model-{f + 1:05}-of-{FILES:05}.safetensors", header_bytes(specs, None)
        path.write_bytes(header)
        os.truncate(path, len(header) + len(specs) // 2 * 3072 * 224 * 17)
        weight_map |= dict.fromkeys(specs, path.name)
    return weight_map


def opening(options: Namespace) -> list[Row]:
    """Time the opening of a checkpoint with as many tensors as Kimi-K3, whose sparse files hold nothing but headers."""
    with tempfile.TemporaryDirectory() as name:
        write_many(Path(name))
        seconds, memory = zip(*(printed(OPEN, name) for _ in range(options.rounds)), strict=True)
    case = f"open {TENSORS:,} tensors in {FILES} files"
    return [amount(case, "time", 1, seconds, "s"), amount(case, "memory", 1, memory, "MB")]
