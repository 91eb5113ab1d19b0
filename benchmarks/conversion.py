"""Convert a checkpoint and copy the result with `cp`, in turn, on the same file system; beside transformers.

    python -m benchmarks.conversion --folder /dev/shm

Without --folder, a temporary one: the page cache in front of a disk, whose own speed an fsync of each shard waits for.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import mxfp4np
from benchmarks.compare import machine

HIDDEN, EXPERTS = 2880, 32  # gpt-oss-20b


def make(folder: Path, layers: int) -> None:
    """Write a checkpoint of gpt-oss-20b's experts, one file a layer."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for layer in range(layers):
        tensors = {}
        for name, rows in (("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)):
            blocks = rng.integers(0, 256, (EXPERTS, rows, HIDDEN // 32, 16), np.uint8)
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            tensors |= {f"{stem}_blocks": blocks, f"{stem}_scales": rng.integers(118, 126, blocks.shape[:-1], np.uint8)}
        mxfp4np.save_file(tensors, folder / f"model-{layer + 1:05}-of-{layers:05}.safetensors")


def measured(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak anonymous memory in bytes."""
    peak = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                peak = max(peak, int(fields["RssAnon"].split()[0]) << 10)
            except (OSError, KeyError):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make(work / "source", args.layers)
        rows: dict[str, list[tuple[float, int]]] = {}
        convert = [
            sys.executable,
            "-m",
            "mxfp4np",
            "convert",
            "--quiet",
            f"--workers={args.workers}",
            "--max-shard-size=2GB",
        ]
        commands = {
            "cp": ["cp", "-r", "--reflink=never", work / "plain", work / "out"],
            "convert": [*convert, work / "source", work / "out"],
            "convert --transpose no": [*convert, "--transpose=no", work / "source", work / "out"],
            "convert --io pread": [*convert, "--io=pread", work / "source", work / "out"],
        }
        measured(list(map(str, [*convert, work / "source", work / "plain"])))
        size = sum(file.stat().st_size for file in (work / "plain").iterdir())
        for _ in range(args.rounds):
            for name, command in commands.items():
                rows.setdefault(name, []).append(measured(list(map(str, command))))
                shutil.rmtree(work / "out")
        print(f"{machine()}, {size / 1e9:.2f} GB to {args.folder or chr(97) + ' disk'}\n")
        print("| what | GB/s | of `cp` | lowest to highest | peak anonymous MB |\n|---|---:|---:|---:|---:|")
        for name, runs in rows.items():
            ratios = [theirs[0] / ours[0] for theirs, ours in zip(rows["cp"], runs, strict=True)]
            rate = size / statistics.median(seconds for seconds, _ in runs) / 1e9
            print(
                f"| `{name}` | {rate:.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
                f"| {max(peak for _, peak in runs) / 1e6:.0f} |"
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
