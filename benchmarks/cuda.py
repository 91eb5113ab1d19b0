"""The CUDA backend compared with copies by its device, the bus, and peers.

What is on the device is timed by CUDA events, what begins on the host by the host's clock. Peers that are not
installed, torch and gpt-oss, are left out.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import cupy
import numpy as np

import mxfp4np
from benchmarks.cuda_products import products
from benchmarks.timing import Row, Subject, compare
from mxfp4np.cli.timing import Run
from mxfp4np.format import DTYPES

ROWS, GROUPS = 5760, 90  # gpt-oss-20b: mlp1 is [32, 5760, 90, 16], mlp2 [32, 2880, 90, 16]
EXPERTS, LAYERS = 64, 4
VALUES = 1 << 28  # that are encoded
CACHE_BYTES = 1 << 30
PINNED_BYTES = 256 << 20


def event_clock() -> Callable[[Run], float]:
    """Return a clock that takes the seconds between two CUDA events around what a run queues."""
    memory = cupy.empty(CACHE_BYTES, np.uint8)

    def clock(run: Run) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        memory.fill(0)  # clears the cache; while it runs, the host queues what follows
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return cupy.cuda.get_elapsed_time(begin, end) / 1e3

    return clock


def host_clock(run: Run) -> float:
    """Return the seconds by the host's clock until what a run queues is done."""
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    result = run()
    cupy.cuda.Device().synchronize()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def on_device(rounds: int, threads: int) -> Iterator[Row]:
    """Decode and encode what is on the device, compared with copying as many bytes there."""
    blocks = cupy.random.randint(0, 256, (EXPERTS, ROWS, GROUPS, 16), np.uint8)
    scales = cupy.random.randint(110, 135, (EXPERTS, ROWS, GROUPS), np.uint8)
    packed = mxfp4np.MXFP4Array(blocks, scales)
    source, target = cupy.random.randint(0, 256, (2 << 30,), np.uint8), cupy.empty(2 << 30, np.uint8)

    def copy(nbytes: int) -> tuple[Run, float]:
        return partial(target.data.copy_from_device_async, source.data, nbytes), 2 * nbytes

    subjects = []
    outs = {dtype: packed.decode(dtype) for dtype in DTYPES}
    for dtype, out in outs.items():
        transposed, moved = out.reshape(EXPERTS, 32 * GROUPS, ROWS), packed.nbytes + out.nbytes
        decode = partial(packed.decode, out=out)
        subjects.append(Subject("CUDA decode : copy on the device", dtype, decode, moved, floor=0.95))
        decode = partial(packed.decode, out=transposed, transpose=True)
        subjects.append(Subject("CUDA decode, transposed : copy on the device", dtype, decode, moved, floor=0.85))
        x = cupy.random.standard_normal(VALUES, np.float32).astype(out.dtype)
        encoded = mxfp4np.encode(x)
        encode, moved = partial(mxfp4np.encode, x, out=encoded), x.nbytes + encoded.nbytes
        subjects.append(Subject("CUDA encode : copy on the device", dtype, encode, moved, floor=0.7))
    half, gaps = packed[:, ::2], outs["bfloat16"][:, : ROWS // 2]
    decode, moved = partial(half.decode, out=gaps), half.nbytes + gaps.nbytes
    subjects.append(Subject("CUDA decode, every second row : copy on the device", "bfloat16", decode, moved))
    moved = packed.nbytes + outs["bfloat16"].nbytes
    for how, run in torch_runs(blocks, scales).items():
        subjects.append(Subject("gpt-oss's formula in torch : copy on the device", f"bfloat16, {how}", run, moved))
    clock = event_clock()
    yield from compare(copy(source.nbytes), sorted(subjects, key=itemgetter(0)), rounds, threads, clock=clock)
    one = packed[0]
    out = one.decode()
    moved = one.nbytes + out.nbytes
    for what, by in (("CUDA events", clock), ("the host's clock", host_clock)):
        case = f"CUDA decode of one expert, by {what} : copy"
        reused = Subject(case, "output reused", partial(one.decode, out=out), moved)
        subjects = [reused, Subject(case, "new output", one.decode, moved)]
        yield from compare(copy(moved // 2), subjects, 3 * rounds, threads, clock=by)


def torch_runs(blocks: cupy.ndarray, scales: cupy.ndarray) -> dict[str, Run]:
    """Return the formula of gpt-oss's loader, eager and compiled, on the same memory, if torch is installed."""
    try:
        import torch
    except ImportError:
        return {}
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

    return {"eager": eager, "torch.compile": lambda: formula(codes, factors)}


def from_files(rounds: int, threads: int, folder: Path) -> Iterator[Row]:
    """Decode from files in the page cache to the device, compared with copying as many bytes of pinned memory."""
    rng = np.random.default_rng(0)
    for i in range(LAYERS):
        for j, rows in enumerate((ROWS, ROWS // 2)):
            shape = 32, rows, GROUPS
            tensor = mxfp4np.MXFP4Array(
                rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(110, 135, shape, np.uint8)
            )
            mxfp4np.save_file({f"block.{i}.mlp.mlp{j + 1}_weight": tensor}, folder / f"{i}-{j}.safetensors")
    to_device, to_host = mxfp4np.Checkpoint(folder, "cuda:0"), mxfp4np.Checkpoint(folder)
    names = list(to_host)

    def load(checkpoint: Any, names: list[str]) -> None:
        for name in names:
            checkpoint.get(name)

    def open_and_load() -> None:
        with mxfp4np.Checkpoint(folder, "cuda:0") as checkpoint:
            load(checkpoint, names)

    def subject(variant: str, run: Run, names: list[str], floor: float | None = None) -> Subject:
        nbytes = sum(to_host.packed(name).nbytes for name in names)
        return Subject("files to device : pinned memory to device", variant, run, nbytes, floor)

    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(PINNED_BYTES), np.uint8, PINNED_BYTES)
    target = cupy.empty(PINNED_BYTES, np.uint8)
    subjects = [
        subject("all tensors", partial(load, to_device, names), names, floor=0.7),
        subject("largest tensor", partial(load, to_device, names[:1]), names[:1], floor=0.7),
        subject("decoded by the CPU", lambda: [cupy.asarray(to_host[name]) for name in names[:2]], names[:2]),
    ]
    try:
        import torch
        from gpt_oss.torch.weights import Checkpoint
    except ImportError:
        pass
    else:
        peer = Checkpoint(str(folder), torch.device("cuda:0"))
        subjects.append(subject("gpt-oss's own loader", partial(load, peer, names[:2]), names[:2]))
    bus = partial(target.set, pinned), pinned.nbytes
    yield from compare(bus, subjects, rounds, threads, clock=host_clock)
    subjects = [subject("all tensors, opened and closed", open_and_load, names)]
    yield from compare(bus, subjects, rounds, threads, clock=host_clock)


def measure(options: Namespace) -> list[Row]:
    """Return rows for what is on the device, products among it, and for what comes from files."""
    rows = list(on_device(options.rounds, options.threads))
    rows += products(options.rounds, options.threads, event_clock())
    cupy.get_default_memory_pool().free_all_blocks()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return rows + list(from_files(options.rounds, options.threads, Path(folder)))


def device() -> str:
    """Return the name of the device and the CUDA version of its driver."""
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{name}, driver for CUDA {cupy.cuda.runtime.driverGetVersion() / 1000:.1f}"
