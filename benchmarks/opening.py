"""Open a checkpoint with as many tensors as Kimi-K3 has, 497,220 in 96 files, and print seconds and memory.

    python -m benchmarks.opening
    python -m benchmarks.opening --names compressed-tensors

The files are sparse: their size is that of the data they claim, and nothing but headers is on disk. Names and shapes
are Kimi-K3's; pairs are named as gpt-oss or as compressed-tensors names them, which is what Kimi-K3 does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mxfp4np.storage.writer import header_bytes

TENSORS, FILES = 497_220, 96
OPEN = """
import json, resource, sys, time
import numpy, mxfp4np, mxfp4np.checkpoint
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, begin = rss(), time.perf_counter()
checkpoint = mxfp4np.Checkpoint(sys.argv[1], io=sys.argv[2])
seconds = time.perf_counter() - begin
name = next(iter(checkpoint))
print(json.dumps([seconds, rss() - before, len(checkpoint), checkpoint.info(name).shape]))
"""


NAMES = {
    "gpt-oss": ((".blocks", (3072, 224, 16)), (".scales", (3072, 224))),
    "compressed-tensors": ((".weight_packed", (3072, 3584)), (".weight_scale", (3072, 224))),
}
"""The endings of names, and the shapes, of a pair."""


def write(folder: Path, tensors: int, files: int, names: str) -> None:
    """Write so many tensors, half of them blocks and half of them scales."""
    pairs = tensors // 2
    for f in range(files):
        specs = {}
        for i in range(f * pairs // files, (f + 1) * pairs // files):
            stem = f"language_model.model.layers.{i // 1152}.block_sparse_moe.experts.{i // 3 % 384}.w{i % 3 + 1}"
            for suffix, shape in NAMES[names]:
                specs[f"{stem}.{i}{suffix}"] = ("U8", shape)
        path = folder / f"model-{f + 1:05}-of-{files:05}.safetensors"
        header = header_bytes(specs, {"format": "pt"})
        path.write_bytes(header)
        os.truncate(path, len(header) + len(specs) // 2 * 3072 * 224 * 17)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--names", choices=NAMES, default="gpt-oss")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), TENSORS, FILES, args.names)
        for _ in range(args.rounds):
            command = [sys.executable, "-c", OPEN, name, "mmap"]
            results.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    seconds, memory = [r[0] for r in results], [r[1] for r in results]
    figures = {"seconds": sorted(seconds), "bytes": sorted(memory), "tensors": TENSORS, "logical": results[0][2]}
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"{TENSORS:,} tensors in {FILES} files: {statistics.median(seconds):.2f} s "
            f"({min(seconds):.2f} to {max(seconds):.2f}), {statistics.median(memory) / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
