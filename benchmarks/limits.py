"""Hold the CPU decoder against the memory it runs on: each row is a pair of runs in turn, and the ratio of their rates.

    python -m benchmarks.limits --threads 2

`stream` loads the packed bytes and streams as many output bytes, with no decoding between the two: the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mxfp4np
from benchmarks.compare import machine
from mxfp4np.backends.cpu import stream
from mxfp4np.backends.memory import aligned_empty
from mxfp4np.bench import fill
from mxfp4np.format import DTYPES, decoded_dtype

ROWS, GROUPS = 5760, 90  # gpt-oss-20b: mlp1 is [32, 5760, 90, 16]


Run = Callable[[], Any]


class Bench:
    """Data of one shape, and pairs of runs over it."""

    def __init__(self, experts: int, rounds: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.shape = (experts, ROWS, GROUPS)
        self.blocks = rng.integers(0, 256, (*self.shape, 16), np.uint8)
        self.scales = rng.integers(118, 126, self.shape, np.uint8)
        self.packed = mxfp4np.MXFP4Array(self.blocks, self.scales)
        self.rounds, self.threads = rounds, threads
        self.rows: list[dict[str, Any]] = []

    def pair(self, what: str, a: Run, b: Run, bytes_a: float, bytes_b: float, *, before: Run = lambda: None) -> None:
        """Run two functions in turn, and keep their rates and the median of their ratios, round by round."""
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.rounds + 1):
            for run, nbytes, kept in ((a, bytes_a, rates[0]), (b, bytes_b, rates[1])):
                before()
                begin = time.perf_counter()
                result = run()
                kept.append(nbytes / (time.perf_counter() - begin) / 1e9)
                del result
        ratios = sorted(x / y for x, y in zip(*(kept[1:] for kept in rates), strict=True))
        row = {
            "what": what,
            "threads": self.threads,
            "rate": statistics.median(rates[0][1:]),
            "other": statistics.median(rates[1][1:]),
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
        }
        self.rows.append(row)
        print(
            "| {what} | {threads} | {rate:.1f} | {other:.1f} | {ratio:.2f} | {lowest:.2f} to {highest:.2f} |".format(
                **row
            )
        )

    def decode(self, out: np.ndarray | None, dtype: str = "bfloat16", **options: Any) -> Run:
        return lambda: self.packed.decode(dtype, out=out, num_threads=self.threads, **options)

    def reused(self) -> None:
        """Compare with the limits, and transposed with untransposed, in every dtype."""
        for dtype in DTYPES:
            out = self.packed.decode(dtype)

            def limit(out: np.ndarray = out) -> None:
                stream(self.blocks, self.scales, out, num_threads=self.threads)

            decode = self.decode(out, dtype)
            self.pair(f"{dtype}, output reused : stream", decode, limit, out.nbytes, out.nbytes)
            if dtype == "bfloat16":
                self.pair(f"{dtype} : memset", decode, lambda out=out: fill(out, self.threads), out.nbytes, out.nbytes)
            turned = self.packed.decode(dtype, transpose=True)
            self.pair(
                f"{dtype} transposed : not", self.decode(turned, dtype, transpose=True), decode, out.nbytes, out.nbytes
            )

    def fresh(self) -> None:
        """Compare new outputs with allocating and filling the same."""
        dtype = decoded_dtype("bfloat16")

        def allocate_and_fill() -> np.ndarray:
            out = aligned_empty(self.packed.shape, dtype)
            fill(out, self.threads)
            return out

        nbytes = 2 * self.packed.size
        self.pair("new output : allocate and fill", self.decode(None), allocate_and_fill, nbytes, nbytes)

    def files(self) -> None:
        """Compare a mapped file with memory, cached, and with the disk, cold."""
        out = self.packed.decode()
        packed, decoded = self.packed.nbytes, out.nbytes
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            path = Path(folder) / "model.safetensors"
            mxfp4np.save_file({"w": self.packed}, path)

            def get() -> None:
                with mxfp4np.Checkpoint(path) as checkpoint:
                    checkpoint.get("w", out=out, num_threads=self.threads)

            def read() -> None:
                buffer = bytearray(1 << 23)
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

            def forget() -> None:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

            self.pair("mapped cached file : memory", get, self.decode(out), decoded, decoded)
            if hasattr(os, "posix_fadvise"):
                self.pair("cold file : sequential read, packed bytes", get, read, packed, packed, before=forget)

    def slices(self) -> None:
        """Compare parts with the whole, per byte moved."""
        whole = self.packed.decode()
        for what, index in (
            ("one expert", np.s_[1]),
            ("every second row", np.s_[:, ::2]),
            ("a range of columns of whole blocks", np.s_[..., 320:1600]),
        ):
            part = self.packed[index]
            out = part.decode()
            moved, total = out.nbytes + part.nbytes, whole.nbytes + self.packed.nbytes
            run = lambda part=part, out=out: part.decode(out=out, num_threads=self.threads)  # noqa: E731
            self.pair(f"{what} : whole, per byte", run, self.decode(whole), moved, total)
        ragged, rounded = self.packed[..., 325:1590], self.packed[..., 320:1600]
        outs = ragged.decode(), rounded.decode()
        self.pair(
            "columns from mid-block : rounded out, per call",
            lambda: ragged.decode(out=outs[0], num_threads=self.threads),
            lambda: rounded.decode(out=outs[1], num_threads=self.threads),
            outs[1].nbytes,
            outs[1].nbytes,
        )

    def small(self) -> None:
        """Compare 1 MiB with a copy in the cache, and time one block."""
        for dtype in DTYPES:
            count = (1 << 20) // decoded_dtype(dtype).itemsize // 32
            blocks, scales = self.blocks.reshape(-1, 16)[:count].copy(), self.scales.reshape(-1)[:count].copy()
            out = mxfp4np.decode(blocks, scales, dtype)
            source = out.copy()

            def many(run: Run) -> Run:
                return lambda: [run() for _ in range(200)]

            self.pair(
                f"1 MiB of {dtype} : np.copyto in the cache",
                many(lambda blocks=blocks, scales=scales, out=out: mxfp4np.decode(blocks, scales, out=out)),
                many(lambda source=source, out=out: np.copyto(out, source)),
                200 << 20,
                200 << 20,
            )
        one = self.blocks.reshape(-1, 16)[:1].copy(), self.scales.reshape(-1)[:1].copy()
        micros = sorted(s / 2000 * 1e6 for s in timeit.repeat(lambda: mxfp4np.decode(*one), number=2000, repeat=9))
        print(f"\none block through mxfp4np.decode: {micros[4]:.1f} microseconds ({micros[0]:.1f} to {micros[-1]:.1f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32, help="of 5760 x 2880 elements each (default: 32, 1.06 GB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["reused", "fresh", "files", "slices", "small"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args()
    print(f"{machine()}\n\n| what : against | threads | GB/s | against, GB/s | ratio | lowest to highest |")
    print("|---|---:|---:|---:|---:|---:|")
    bench = Bench(args.experts, args.rounds, args.threads)
    for name in args.only:
        getattr(bench, name)()
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": bench.rows}))


if __name__ == "__main__":
    main()
