"""Decode the same tensor with this library, its limits and its peers, in one process, in turn; print a table.

    python -m pip install '.[bench]'
    python -m pip install --no-deps --ignore-requires-python gpt-oss
    python -m benchmarks.compare

`SUBJECTS` is the one list that drives the runs, the report and the table in the README (``--write README.md``). A peer
that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import datetime as dt
import functools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import mxfp4np
from mxfp4np.backends.memory import aligned_empty
from mxfp4np.backends.threads import parallel_for

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROW = (5760, 90)  # one expert of gpt-oss-20b's mlp1: 5760 rows of 90 blocks
PACKAGES = ["numpy", "numba", "safetensors", "ml_dtypes", "torch", "transformers", "compressed-tensors", "mlx", "gguf"]
REFERENCE = "gpt-oss `Checkpoint.get`"


class Data:
    """Random codes and scales, in memory and in a checkpoint, for so many experts."""

    def __init__(self, experts: int, folder: Path, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.threads = threads
        self.blocks = rng.integers(0, 256, (experts, *ROW, 16), np.uint8)
        self.scales = rng.integers(118, 126, (experts, *ROW), np.uint8)
        self.folder = folder / str(experts)
        self.folder.mkdir()
        self.name = "block.0.mlp.mlp1_weight"
        packed = mxfp4np.MXFP4Array(self.blocks, self.scales)
        mxfp4np.save_file({self.name: packed}, self.folder / "model.safetensors")
        self.shape, self.size = packed.shape, packed.size

    @functools.cache  # noqa: B019
    def out(self, dtype: str) -> np.ndarray:
        """Return memory for the output that has been touched."""
        out = aligned_empty(self.shape, np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16)
        out.view(f"u{out.itemsize}")[...] = 0
        return out


Run = Callable[[], Any]


@dataclass
class Subject:
    """One row of the table."""

    name: str
    dtype: str
    prepare: Callable[[Data], Run]
    share: float = 1.0
    """Of the elements: slow peers get fewer, their rate being what counts."""


def ours(dtype: str, *, reuse: bool, threads: int | None = None) -> Callable[[Data], Run]:
    def prepare(data: Data) -> Run:
        checkpoint = mxfp4np.Checkpoint(data.folder)
        out = data.out(dtype) if reuse else None
        return lambda: checkpoint.get(data.name, dtype=dtype, out=out, num_threads=threads or data.threads)

    return prepare


def numba_loop(data: Data) -> Run:
    import numba

    @numba.njit(nogil=True)
    def kernel(blocks, scales, table, out, start, stop):
        for i in range(start, stop):
            factor = np.float32(2.0) ** (np.int32(scales[i]) - 127)
            for j in range(16):
                out[32 * i + 2 * j] = table[blocks[16 * i + j] & 15] * factor
                out[32 * i + 2 * j + 1] = table[blocks[16 * i + j] >> 4] * factor

    table = np.array(mxfp4np.format.FP4_VALUES, np.float32)
    arguments = data.blocks.reshape(-1), data.scales.reshape(-1), table, data.out("float32").reshape(-1)
    return lambda: parallel_for(lambda i, j: kernel(*arguments, i, j), data.scales.size, 1 << 15, data.threads)


def numpy_ml_dtypes(data: Data) -> Run:
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    pairs = np.stack([table[np.arange(256) & 15], table[np.arange(256) >> 4]], axis=-1)

    def run() -> np.ndarray:
        factors = data.scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        return (pairs[data.blocks].reshape(*data.scales.shape, 32) * factors[..., None]).reshape(data.shape)

    return run


def gpt_oss(data: Data) -> Run:
    import torch
    from gpt_oss.torch.weights import Checkpoint

    torch.set_num_threads(data.threads)
    checkpoint = Checkpoint(str(data.folder), torch.device("cpu"))
    return lambda: checkpoint.get(data.name)


def gpt_oss_compiled(data: Data) -> Run:
    import torch
    from gpt_oss.torch.weights import FP4_VALUES

    torch.set_num_threads(data.threads)

    @torch.compile(dynamic=False)
    def formula(blocks, scales, table):
        exponents = scales.to(torch.int32).unsqueeze(-1) - 127
        low, high = table[(blocks & 15).to(torch.long)], table[(blocks >> 4).to(torch.long)]
        return torch.ldexp(torch.stack([low, high], -1).flatten(-2), exponents).flatten(-2)

    blocks, scales = torch.from_numpy(data.blocks), torch.from_numpy(data.scales)
    table = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    return lambda: formula(blocks, scales, table)


def transformers(data: Data) -> Run:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.set_num_threads(data.threads)
    blocks, scales = torch.from_numpy(data.blocks), torch.from_numpy(data.scales)
    return lambda: convert_moe_packed_tensors(blocks, scales)


def compressed_tensors(data: Data) -> Run:
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    torch.set_num_threads(data.threads)
    rows = data.shape[0] * data.shape[1]
    packed = torch.from_numpy(data.blocks.reshape(rows, -1))
    scales = torch.from_numpy(data.scales.reshape(rows, -1))

    def run() -> Any:
        values = unpack_fp4_from_uint8(packed, rows, data.shape[-1], dtype=torch.bfloat16)
        factors = torch.exp2(scales.to(torch.float32) - 127).to(torch.bfloat16)
        return values.reshape(*scales.shape, 32) * factors.unsqueeze(-1)

    return run


def gguf(data: Data) -> Run:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.concatenate([data.scales[..., None], data.blocks], axis=-1).reshape(-1, 17 * 90)
    return lambda: dequantize(rows, GGMLQuantizationType.MXFP4)


def mlx(data: Data) -> Run:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    rows = data.shape[0] * data.shape[1]
    words = mx.array(data.blocks.reshape(rows, -1).view("<u4"))
    scales = mx.array(data.scales.reshape(rows, -1))
    return lambda: mx.eval(mx.dequantize(words, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.bfloat16))


def memset(data: Data) -> Run:
    out = data.out("bfloat16").reshape(-1).view(np.uint8)
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    address = out.ctypes.data
    return lambda: parallel_for(lambda i, j: libc.memset(address + i, 1, j - i), len(out), 1 << 21, data.threads)


def copy(data: Data) -> Run:
    out = data.out("bfloat16").reshape(-1).view(np.uint8)
    source = np.ones_like(out)
    return lambda: parallel_for(lambda i, j: np.copyto(out[i:j], source[i:j]), len(out), 1 << 21, data.threads)


SUBJECTS = [
    Subject("**mxfp4np**, output reused", "bfloat16", ours("bfloat16", reuse=True)),
    Subject("**mxfp4np**, output reused, 1 thread", "bfloat16", ours("bfloat16", reuse=True, threads=1)),
    Subject("**mxfp4np**, new output", "bfloat16", ours("bfloat16", reuse=False)),
    Subject("**mxfp4np**, output reused", "float16", ours("float16", reuse=True)),
    Subject("**mxfp4np**, output reused", "float32", ours("float32", reuse=True)),
    Subject("limit: libc memset of the same output", "bfloat16", memset),
    Subject("limit: copy of the same output", "bfloat16", copy),
    Subject("Numba, plain loop, output reused", "float32", numba_loop),
    Subject("NumPy with ml_dtypes' table", "float32", numpy_ml_dtypes, 0.25),
    Subject(REFERENCE, "bfloat16", gpt_oss),
    Subject("its formula under torch.compile", "bfloat16", gpt_oss_compiled, 0.25),
    Subject("transformers `convert_moe_packed_tensors`", "bfloat16", transformers, 0.25),
    Subject("compressed-tensors", "bfloat16", compressed_tensors, 0.25),
    Subject("MLX `dequantize`, CPU", "bfloat16", mlx, 0.25),
    Subject("gguf-py `dequantize`", "float32", gguf, 0.0625),
]


@dataclass
class Measured:
    """What one subject did."""

    subject: Subject
    elements: int
    seconds: list[float]

    @property
    def rates(self) -> list[float]:
        """Elements per second of each run."""
        return sorted(self.elements / s for s in self.seconds)

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


def measure(experts: int, rounds: int, threads: int, pattern: str) -> tuple[list[Measured], dict[str, str]]:
    """Run every subject once per round, in turn; return the figures, and why others were left out."""
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        data: dict[int, Data] = {}
        ready: list[tuple[Measured, Run]] = []
        for subject in SUBJECTS:
            if not re.search(pattern, subject.name):
                continue
            size = max(1, round(experts * subject.share))
            if size not in data:
                data[size] = Data(size, Path(folder), threads)
            try:
                run = subject.prepare(data[size])
                run()
            except Exception as error:
                missing[subject.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            ready.append((Measured(subject, data[size].size, []), run))
        for i in range(rounds):
            for measured, run in ready:
                begin = time.perf_counter()
                result = run()
                measured.seconds.append(time.perf_counter() - begin)
                del result
            print(f"round {i + 1} of {rounds}", file=sys.stderr)
    return [measured for measured, _ in ready], missing


def table(results: list[Measured]) -> str:
    """Return the figures as a Markdown table."""
    base = next((result.rate for result in results if result.subject.name == REFERENCE), None)
    lines = [
        "| decoder | output | million elements/s | lowest to highest | times the reference loader |",
        "|---|---|---:|---:|---:|",
    ]
    for result in results:
        low, high = result.rates[0] / 1e6, result.rates[-1] / 1e6
        ratio = f"{result.rate / base:,.1f}" if base else "-"
        lines.append(
            f"| {result.subject.name} | {result.subject.dtype} | {result.rate / 1e6:,.0f} | {low:,.0f} to {high:,.0f} "
            f"| {ratio} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Return the processor, the versions and the date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() + "\nmodel name : unknown")[1]
    packages = []
    for name in (
        "numpy",
        "numba",
        "safetensors",
        "ml_dtypes",
        "torch",
        "transformers",
        "compressed-tensors",
        "mlx",
        "gguf",
    ):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {model} with {cpus} CPUs, Python {platform.python_version()}, "
        + ", ".join(packages)
    )


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experts", type=int, default=16, help="of 5760 x 2880 elements each (default: 16, 265 million)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", metavar="REGEX", help="subjects to run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table between its markers in this file")
    args = parser.parse_args()
    results, missing = measure(args.experts, args.rounds, args.threads, args.only)
    if args.json:
        rows = [{"name": r.subject.name, "dtype": r.subject.dtype, "rates": r.rates} for r in results]
        print(json.dumps({"machine": machine(), "threads": args.threads, "results": rows, "missing": missing}))
        return
    size = f"{results[0].elements / 1e6:,.0f} million elements"
    caption = f"{size}, {args.threads} threads, medians of {args.rounds} runs in turn"
    text = f"{caption} ({machine()}):\n\n{table(results)}"
    print(text)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    if args.write:
        old = args.write.read_text()
        new = re.sub(r"(?s)(<!-- table -->\n).*?(\n<!-- end of table -->)", lambda m: m[1] + text + m[2], old)
        args.write.write_text(new)


if __name__ == "__main__":
    main()
