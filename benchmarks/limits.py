"""The CPU decoder against the memory it runs on: each row is a pair of runs in turn, and the ratio of their rates.

`stream` loads the packed bytes and streams as many output bytes, with no decoding between the two: the limit.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import timeit
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mxfp4np
from mxfp4np.backends.cpu.driver import stream
from mxfp4np.backends.memory import aligned_empty
from mxfp4np.cli.timing import Run, fill, in_turn
from mxfp4np.format import DTYPES, decoded_dtype

ROWS, GROUPS = 5760, 90  # gpt-oss-20b: mlp1 is [32, 5760, 90, 16]


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

    def pair(self, what: str, a: Run, b: Run, bytes_a: float, bytes_b: float, **options: Any) -> None:
        """Run two functions in turn, and keep their rates and the median of their ratios, round by round."""
        seconds = in_turn([a, b], self.rounds, **options)
        rates = [[n / s / 1e9 for s in times] for n, times in zip((bytes_a, bytes_b), seconds, strict=True)]
        ratios = sorted(x / y for x, y in zip(*rates, strict=True))
        self.rows.append(
            {
                "what": what,
                "threads": self.threads,
                "rate": statistics.median(rates[0]),
                "other": statistics.median(rates[1]),
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
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

            opened: list[mxfp4np.Checkpoint] = []

            def reopen(*, cold: bool = False) -> None:
                while opened:
                    opened.pop().close()
                if cold:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                opened.append(mxfp4np.Checkpoint(path))  # a new map, none of whose pages has been touched

            def get() -> None:
                opened[0].get("w", out=out, num_threads=self.threads)

            def read() -> None:
                buffer = bytearray(1 << 23)
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

            self.pair("mapped cached file : memory", get, self.decode(out), decoded, decoded, before=reopen)
            if hasattr(os, "posix_fadvise"):
                cold = partial(reopen, cold=True)
                self.pair("cold file : sequential read, packed bytes", get, read, packed, packed, before=cold)
            opened.pop().close()

    def slices(self) -> None:
        """Compare parts with the whole, per byte moved."""
        whole = self.packed.decode()
        total = whole.nbytes + self.packed.nbytes
        for what, index in (
            ("one expert", np.s_[1]),
            ("every second row", np.s_[:, ::2]),
            ("a range of columns of whole blocks", np.s_[..., 320:1600]),
        ):
            part = self.packed[index]
            out = part.decode()
            moved = out.nbytes + part.nbytes
            run = lambda part=part, out=out: part.decode(out=out, num_threads=self.threads)  # noqa: E731
            self.pair(f"{what} : whole, per byte", run, self.decode(whole), moved, total)

        def one_by_one() -> None:
            for expert, out in zip(self.packed, whole, strict=True):
                expert.decode(out=out, num_threads=self.threads)

        self.pair("experts, one by one : whole, per byte", one_by_one, self.decode(whole), total, total)
        ragged, rounded = self.packed[..., 325:1590], self.packed[..., 320:1600]
        for dtype in DTYPES:
            outs = ragged.decode(dtype), rounded.decode(dtype)
            self.pair(
                f"columns from mid-block, {dtype} : rounded out, per call",
                lambda out=outs[0]: ragged.decode(out=out, num_threads=self.threads),
                lambda out=outs[1]: rounded.decode(out=out, num_threads=self.threads),
                outs[1].nbytes,
                outs[1].nbytes,
            )

    def small(self) -> None:
        """Compare 1 MiB with a copy in the cache."""
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


def measure(options: Namespace) -> list[dict[str, Any]]:
    """Return all pairs with the threads that were asked for, and those that depend on them most with one."""
    bench = Bench(2 * options.experts, options.rounds, options.threads)
    bench.reused()
    bench.fresh()
    bench.files()
    bench.slices()
    bench.small()
    bench.threads = 1
    bench.reused()
    bench.slices()
    return bench.rows


def latency(options: Namespace) -> list[dict[str, Any]]:
    """Time the decoding of one block, in microseconds."""
    one = np.zeros((1, 16), np.uint8), np.zeros(1, np.uint8)
    times = timeit.repeat(lambda: mxfp4np.decode(*one), number=2000, repeat=3 * options.rounds)
    return [{"what": "one block through `mxfp4np.decode`", "microseconds": sorted(s / 2000 * 1e6 for s in times)}]
