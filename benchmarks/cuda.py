"""The CUDA backend against the memory it runs on, the bus, and its peers, all in turn.

    python -m benchmarks.cuda [--json FILE]

Times on the device are taken with CUDA events, those that begin on the host by the clock. Peers that are not installed
are left out: torch, and gpt-oss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

import mxfp4np
from mxfp4np.backends.threads import default_num_threads
from mxfp4np.bench import describe, machine
from mxfp4np.format import DTYPES

ROWS, GROUPS = 5760, 90  # gpt-oss-20b: mlp1 is [32, 5760, 90, 16], mlp2 [32, 2880, 90, 16]
EXPERTS = 64
Run = Callable[[], object]
before: cupy.ndarray | None = None


def device_seconds(run: Run) -> float:
    """Return the seconds between two events around what a run queues, behind work that clears the cache."""
    global before  # noqa: PLW0603
    if before is None:
        before = cupy.empty(1 << 30, np.uint8)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    before.fill(0)  # while it runs, the host gets ahead
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return cupy.cuda.get_elapsed_time(begin, end) / 1e3


def clock_seconds(run: Run) -> float:
    """Return the seconds by the clock until a run is done on the device too."""
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    result = run()
    cupy.cuda.Device().synchronize()
    seconds = time.perf_counter() - begin
    del result
    return seconds


class Table:
    """Runs of several subjects in turn, each rated by bytes a second, of the first one's rate."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.rows: list[dict[str, Any]] = []

    def add(self, subjects: dict[str, tuple[Run, float]], seconds: Callable[[Run], float], elements: float) -> None:
        """Time subjects, given with the bytes that they move; the first is the limit."""
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for i in range(self.rounds + 2):
            for name, (run, _) in subjects.items():
                taken = seconds(run)
                if i >= 2:
                    times[name].append(taken)
        limit = next(iter(subjects))
        for name, (_, nbytes) in subjects.items():
            shares = sorted(
                nbytes / t / (subjects[limit][1] / s) for t, s in zip(times[name], times[limit], strict=True)
            )
            median = statistics.median(times[name])
            row = {
                "what": name,
                "microseconds": median * 1e6,
                "GB/s": nbytes / median / 1e9,
                "Gelem/s": 0 if name == limit else elements / median / 1e9,
                "share": statistics.median(shares),
                "lowest": shares[0],
                "highest": shares[-1],
            }
            self.rows.append(row)
            print(
                f"| {name} | {row['microseconds']:,.0f} | {row['GB/s']:,.1f} | {row['Gelem/s']:,.1f} | "
                f"{row['share']:.2f} | {row['lowest']:.2f} to {row['highest']:.2f} |",
                flush=True,
            )


def resident(table: Table) -> None:
    """Decode and encode what is on the device."""
    blocks = cupy.random.randint(0, 256, (EXPERTS, ROWS, GROUPS, 16), np.uint8)
    scales = cupy.random.randint(110, 135, (EXPERTS, ROWS, GROUPS), np.uint8)
    packed = mxfp4np.MXFP4Array(blocks, scales)
    copied, copy = cupy.random.randint(0, 256, (2 << 30,), np.uint8), cupy.empty(2 << 30, np.uint8)
    limit = lambda: copy.data.copy_from_device_async(copied.data, copied.nbytes)  # noqa: E731
    subjects: dict[str, tuple[Run, float]] = {"limit: copy on the device": (limit, 2 * copied.nbytes)}
    outs = {dtype: packed.decode(dtype) for dtype in DTYPES}
    turned = {dtype: out.reshape(EXPERTS, 32 * GROUPS, ROWS) for dtype, out in outs.items()}
    back = mxfp4np.encode(outs["bfloat16"])
    for dtype, out in outs.items():
        moved = packed.nbytes + out.nbytes
        subjects[f"decode, {dtype}"] = lambda out=out: packed.decode(out=out), moved
        t = turned[dtype]
        subjects[f"decode transposed, {dtype}"] = lambda t=t: packed.decode(out=t, transpose=True), moved
    half, strided = packed[:, ::2], outs["bfloat16"][:, : ROWS // 2]
    moved = half.nbytes + strided.nbytes
    subjects["decode every second row to rows with gaps, bfloat16"] = lambda: half.decode(out=strided), moved
    floats = {dtype: cupy.random.standard_normal(1 << 28, np.float32).astype(out.dtype) for dtype, out in outs.items()}
    encoded = {dtype: mxfp4np.encode(x) for dtype, x in floats.items()}
    for dtype, x in floats.items():
        for rule in ("even", "floor"):
            e = encoded[dtype]
            run = lambda x=x, e=e, rule=rule: mxfp4np.encode(x, rule, out=e)  # noqa: E731
            subjects[f"encode, {dtype}, {rule}"] = run, x.nbytes + e.nbytes
    moved = packed.nbytes + outs["bfloat16"].nbytes
    try:
        import torch
    except ImportError:
        pass
    else:
        eager, compiled = torch_runs(torch, blocks, scales)
        subjects["gpt-oss's formula, torch eager, bfloat16"] = eager, moved
        subjects["gpt-oss's formula, torch.compile, bfloat16"] = compiled, moved
    table.add(subjects, device_seconds, packed.size)
    del back
    one = packed[0]
    out = one.decode()
    subjects = {
        "limit: copy of as many bytes": (
            lambda: copy.data.copy_from_device_async(copied.data, (one.nbytes + out.nbytes) // 2),
            one.nbytes + out.nbytes,
        ),
        "decode one expert, output reused": (lambda: one.decode(out=out), one.nbytes + out.nbytes),
        "decode one expert, new output": (one.decode, one.nbytes + out.nbytes),
    }
    table.add(subjects, device_seconds, one.size)
    table.add({f"{name}, by the clock": subject for name, subject in subjects.items()}, clock_seconds, one.size)


def torch_runs(torch: Any, blocks: cupy.ndarray, scales: cupy.ndarray) -> tuple[Run, Run]:
    """Return the formula of gpt-oss's loader, in eager mode and compiled, over the same memory."""
    values = torch.tensor(mxfp4np.format.FP4_VALUES, dtype=torch.bfloat16, device="cuda")
    codes, factors = torch.from_dlpack(blocks).reshape(-1, 16), torch.from_dlpack(scales).reshape(-1, 1)

    def eager() -> Any:
        out = torch.empty(len(codes), 32, dtype=torch.bfloat16, device="cuda")
        exponents = factors.to(torch.int32) - 127
        step = 16384 * 512
        for i in range(0, len(codes), step):
            part = out[i : i + step]
            part[:, 0::2] = values[(codes[i : i + step] & 0x0F).to(torch.long)]
            part[:, 1::2] = values[(codes[i : i + step] >> 4).to(torch.long)]
            torch.ldexp(part, exponents[i : i + step], out=part)
        return out

    @torch.compile(dynamic=False)
    def formula(codes: Any, factors: Any) -> Any:
        low, high = values[(codes & 15).to(torch.long)], values[(codes >> 4).to(torch.long)]
        exponents = factors.to(torch.int32) - 127
        return torch.ldexp(torch.stack([low, high], -1).flatten(-2), exponents)

    return eager, lambda: formula(codes, factors)


def from_file(table: Table, folder: Path) -> None:
    """Decode from a cached file to the device."""
    rng = np.random.default_rng(0)
    layers = 4
    for i in range(layers):
        for j, rows in enumerate((ROWS, ROWS // 2)):
            shape = 32, rows, GROUPS
            tensor = mxfp4np.MXFP4Array(
                rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(110, 135, shape, np.uint8)
            )
            mxfp4np.save_file({f"block.{i}.mlp.mlp{j + 1}_weight": tensor}, folder / f"{i}-{j}.safetensors")
    there, here = mxfp4np.Checkpoint(folder, "cuda:0"), mxfp4np.Checkpoint(folder)
    nbytes = sum(here.packed(name).nbytes for name in here)
    elements = sum(here.packed(name).size for name in here)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(256 << 20), np.uint8, 256 << 20)
    target = cupy.empty(256 << 20, np.uint8)

    def open_and_load() -> None:
        with mxfp4np.Checkpoint(folder, "cuda:0") as ckpt:
            for name in ckpt:
                ckpt[name]

    subjects: dict[str, tuple[Run, float]] = {
        "limit: pinned memory to the device": (lambda: target.set(pinned), pinned.nbytes),
        "file to device, opened anew, layer by layer": (open_and_load, nbytes),
        "file to device, layer by layer": (lambda: [there[name].shape for name in there], nbytes),
        "the largest tensor alone": (
            lambda: there["block.0.mlp.mlp1_weight"],
            here.packed("block.0.mlp.mlp1_weight").nbytes,
        ),
        "decode on the CPU, then copy": (
            lambda: [cupy.asarray(here[name]).shape for name in list(here)[:2]],
            nbytes / layers,
        ),
    }
    try:
        import torch
        from gpt_oss.torch.weights import Checkpoint
    except ImportError:
        pass
    else:
        peer = Checkpoint(str(folder), torch.device("cuda:0"))
        subjects["gpt-oss `Checkpoint(device='cuda').get`"] = (
            lambda: [peer.get(name).shape for name in list(here)[:2]],
            nbytes / layers,
        )
    begin = time.perf_counter()
    _ = there["block.0.mlp.mlp2_weight"].shape
    cupy.cuda.Device().synchronize()
    print(f"first tensor of the process: {time.perf_counter() - begin:.3f} s")
    table.add(subjects, clock_seconds, elements)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["resident", "file"], help="what to measure (default: both)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write a checkpoint of 1.7 GB for a while")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    where = machine("cupy-cuda12x", "cupy-cuda13x", "torch", "gpt-oss")
    print(f"{name}, driver for CUDA {cupy.cuda.runtime.driverGetVersion()}; {describe(where)}")
    print(f"{default_num_threads()} threads\n")
    print("| what | us | GB/s | Gelem/s | share of limit | lowest to highest |\n|---|---:|---:|---:|---:|---:|")
    table = Table(options.rounds)
    if options.only != "file":
        resident(table)
        cupy.get_default_memory_pool().free_all_blocks()
    if options.only != "resident":
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            from_file(table, Path(folder))
    if options.json:
        options.json.write_text(json.dumps({"device": name, "machine": where, "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
