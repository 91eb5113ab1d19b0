"""The CPU decoder compared with what the memory allows, in pairs of runs.

`stream` loads the packed bytes and stores as many bytes as the output has, past the cache, and decodes nothing.
"""

from __future__ import annotations

import os
import tempfile
import timeit
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mxfp4np
from benchmarks.timing import Row, Subject, amount, compare, repeated
from mxfp4np.backends.cpu.driver import stream
from mxfp4np.backends.memory import aligned_empty
from mxfp4np.cli.timing import Run, fill, machine
from mxfp4np.format import DTYPES, decoded_dtype

ROWS, GROUPS = 5760, 90  # gpt-oss-20b: mlp1 is [32, 5760, 90, 16]
CALLS = 200  # of 1 MiB in a run, so that a clock can time them


class Bench:
    """Packed experts in memory, and the rows measured so far."""

    def __init__(self, options: Namespace) -> None:
        rng = np.random.default_rng(0)
        shape = 2 * options.experts, ROWS, GROUPS
        self.packed = mxfp4np.MXFP4Array(
            rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(118, 126, shape, np.uint8)
        )
        self.rounds, self.threads, self.folder = options.rounds, options.threads, options.folder
        self.rows: list[Row] = []

    def compare(self, *subjects: Subject, to: Run, nbytes: float, **options: Any) -> None:
        """Compare subjects with a run that moves ``nbytes`` bytes."""
        self.rows += compare((to, nbytes), subjects, self.rounds, self.threads, **options)

    def decode(self, array: mxfp4np.MXFP4Array, out: np.ndarray, *, transpose: bool = False) -> Run:
        return lambda: array.decode(out=out, transpose=transpose, num_threads=self.threads)

    def whole(self) -> None:
        """Compare decoding into a reused output with `stream`, and transposed with not, in every dtype."""
        for dtype in DTYPES:
            out, transposed = self.packed.decode(dtype), self.packed.decode(dtype, transpose=True)
            nbytes = out.nbytes
            decode = self.decode(self.packed, out)
            limit = partial(stream, self.packed.blocks, self.packed.scales, out, num_threads=self.threads)
            whole = Subject("whole, output reused : `stream`", dtype, decode, nbytes, floor=0.95)
            self.compare(whole, to=limit, nbytes=nbytes)
            slow = machine()["code"] == "avx2" and dtype == "bfloat16" and self.threads == 1
            run = self.decode(self.packed, transposed, transpose=True)
            subject = Subject("transposed : not transposed", dtype, run, nbytes, floor=0.5 if slow else 0.6)
            self.compare(subject, to=decode, nbytes=nbytes)

    def new_output(self) -> None:
        """Compare new outputs with allocating and filling them."""
        nbytes = 2 * self.packed.size
        run = partial(self.packed.decode, num_threads=self.threads)
        limit = lambda: fill(aligned_empty(self.packed.shape, decoded_dtype("bfloat16")), self.threads)  # noqa: E731
        subject = Subject("new output : allocate and fill", "bfloat16", run, nbytes, floor=0.85)
        self.compare(subject, to=limit, nbytes=nbytes)

    def files(self) -> None:
        """Compare a mapped file with memory when it is cached, and with reading it when it is not."""
        out = self.packed.decode()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
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
                opened.append(mxfp4np.Checkpoint(path))  # a new map, none of whose pages has been accessed

            def get() -> None:
                opened[0].get("w", out=out, num_threads=self.threads)

            def read() -> None:
                buffer = bytearray(1 << 23)
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

            subject = Subject("mapped file, cached : memory", "bfloat16", get, out.nbytes, floor=0.9)
            self.compare(subject, to=self.decode(self.packed, out), nbytes=out.nbytes, before=reopen)
            if hasattr(os, "posix_fadvise"):
                size = self.packed.nbytes
                subject = Subject("mapped file, cold : sequential read", "bfloat16", get, size, floor=0.85)
                self.compare(subject, to=read, nbytes=size, before=partial(reopen, cold=True))
            opened.pop().close()

    def parts(self) -> None:
        """Compare parts, and 17-byte blocks, with the whole, by bytes moved."""
        packed, whole = self.packed, self.packed.decode()
        memory = np.concatenate([packed.scales[..., None], packed.blocks], axis=-1)
        moved = whole.nbytes + packed.nbytes
        for case, floor, array in (
            ("one expert", 0.75, packed[1]),
            ("every second row", 0.65, packed[:, ::2]),
            ("columns of whole blocks", 0.65, packed[..., 320:1600]),
            ("blocks of 17 bytes, as in GGUF", None, mxfp4np.MXFP4Array(memory[..., 1:], memory[..., 0], "halves")),
        ):
            out = array.decode()
            run = self.decode(array, out)
            subject = Subject(f"{case} : whole, per byte", "bfloat16", run, out.nbytes + array.nbytes, floor)
            self.compare(subject, to=self.decode(packed, whole), nbytes=moved)
        mid_block, rounded = packed[..., 325:1590], packed[..., 320:1600]
        for dtype in DTYPES:
            outs = mid_block.decode(dtype), rounded.decode(dtype)
            run, nbytes = self.decode(mid_block, outs[0]), outs[1].nbytes
            subject = Subject("columns from mid-block : rounded to whole blocks", dtype, run, nbytes, floor=0.5)
            self.compare(subject, to=self.decode(rounded, outs[1]), nbytes=nbytes)

    def small(self) -> None:
        """Compare 1 MiB of output, which one thread decodes, with a copy in the cache."""
        for dtype in DTYPES:
            count = (1 << 20) // decoded_dtype(dtype).itemsize // 32
            blocks, scales = self.packed.blocks.reshape(-1, 16)[:count], self.packed.scales.reshape(-1)[:count]
            out = mxfp4np.decode(blocks, scales, dtype)
            run = repeated(partial(mxfp4np.decode, blocks, scales, out=out), CALLS)
            subject = Subject("1 MiB : `np.copyto` in the cache", dtype, run, CALLS << 20, floor=0.5)
            self.compare(subject, to=repeated(partial(np.copyto, out, out.copy()), CALLS), nbytes=CALLS << 20)


def measure(options: Namespace) -> list[Row]:
    """Return all rows with the given threads, and those that depend on them most with one thread too."""
    bench = Bench(options)
    bench.whole()
    bench.new_output()
    bench.files()
    bench.parts()
    if bench.threads > 1:
        bench.threads = 1
        bench.whole()
        bench.parts()
    bench.small()
    return bench.rows


def latency(options: Namespace) -> list[Row]:
    """Time the decoding of one block, in microseconds."""
    one = np.zeros((1, 16), np.uint8), np.zeros(1, np.uint8)
    seconds = timeit.repeat(lambda: mxfp4np.decode(*one), number=2000, repeat=3 * options.rounds)
    return [amount("one block", "", 1, [s / 2000 * 1e6 for s in seconds], "us", ceiling=12)]
