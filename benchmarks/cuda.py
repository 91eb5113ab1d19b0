"""The CUDA backend against the memory of its device, the bus, and its peers, all in turn.

Times on the device are taken with CUDA events, those that begin on the host by the clock. Peers that are not installed
are left out: torch, and gpt-oss.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np

import mxfp4np
from mxfp4np.backends.memory import address_of
from mxfp4np.cli.timing import Run, in_threads
from mxfp4np.format import DTYPES

ROWS, GROUPS = 5760, 90  # gpt-oss-20b: mlp1 is [32, 5760, 90, 16], mlp2 [32, 2880, 90, 16]
EXPERTS, LAYERS = 64, 4
PINNED_BYTES = 4 << 20


class Subject(NamedTuple):
    """Something to run, the bytes that it moves, and the values that it decodes or encodes."""

    run: Run
    nbytes: float
    values: float = 0


class Clock:
    """Seconds of runs: between CUDA events, or by the clock."""

    def __init__(self) -> None:
        self.before = cupy.empty(1 << 30, np.uint8)

    def on_device(self, run: Run) -> float:
        """Return the seconds between two events around what a run queues, behind work that clears the cache."""
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        self.before.fill(0)  # while it runs, the host gets ahead
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return cupy.cuda.get_elapsed_time(begin, end) / 1e3

    def from_host(self, run: Run) -> float:
        """Return the seconds by the clock until a run is done on the device too."""
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        result = run()
        cupy.cuda.Device().synchronize()
        seconds = time.perf_counter() - begin
        del result
        return seconds


def in_turn(subjects: dict[str, Subject], seconds: Callable[[Run], float], rounds: int) -> list[dict[str, Any]]:
    """Time subjects, and rate them by bytes a second, of the rate of the first one, the limit."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(rounds + 2):
        for name, subject in subjects.items():
            taken = seconds(subject.run)
            if i >= 2:
                times[name].append(taken)
    limit, *_ = subjects
    rows = []
    for name, subject in subjects.items():
        rates = [subject.nbytes / s / 1e9 for s in times[name]]
        limits = [subjects[limit].nbytes / s / 1e9 for s in times[limit]]
        median = statistics.median(times[name])
        rows.append(
            {
                "what": name,
                "microseconds": median * 1e6,
                "rates": sorted(rates),
                "values": subject.values / median,
                "shares": sorted(rate / other for rate, other in zip(rates, limits, strict=True)),
            }
        )
    return rows


def resident(clock: Clock, rounds: int) -> Iterator[dict[str, Any]]:
    """Decode and encode what is on the device."""
    blocks = cupy.random.randint(0, 256, (EXPERTS, ROWS, GROUPS, 16), np.uint8)
    scales = cupy.random.randint(110, 135, (EXPERTS, ROWS, GROUPS), np.uint8)
    packed = mxfp4np.MXFP4Array(blocks, scales)
    source, target = cupy.random.randint(0, 256, (2 << 30,), np.uint8), cupy.empty(2 << 30, np.uint8)

    def copy(nbytes: int) -> Subject:
        return Subject(lambda: target.data.copy_from_device_async(source.data, nbytes), 2 * nbytes)

    subjects = {"limit: copy on the device": copy(source.nbytes)}
    outs = {dtype: packed.decode(dtype) for dtype in DTYPES}
    for dtype, out in outs.items():
        turned, moved = out.reshape(EXPERTS, 32 * GROUPS, ROWS), packed.nbytes + out.nbytes
        subjects[f"decode, {dtype}"] = Subject(lambda out=out: packed.decode(out=out), moved, packed.size)
        subjects[f"decode transposed, {dtype}"] = Subject(
            lambda turned=turned: packed.decode(out=turned, transpose=True), moved, packed.size
        )
    half, gaps = packed[:, ::2], outs["bfloat16"][:, : ROWS // 2]
    subjects["decode every second row to rows with gaps, bfloat16"] = Subject(
        lambda: half.decode(out=gaps), half.nbytes + gaps.nbytes, half.size
    )
    for dtype, out in outs.items():
        x = cupy.random.standard_normal(1 << 28, np.float32).astype(out.dtype)
        for rule in ("even", "floor"):
            encoded = mxfp4np.encode(x, rule)
            subjects[f"encode, {dtype}, {rule}"] = Subject(
                lambda x=x, rule=rule, encoded=encoded: mxfp4np.encode(x, rule, out=encoded),
                x.nbytes + encoded.nbytes,
                x.size,
            )
    for what, run in torch_runs(blocks, scales).items():
        subjects[f"gpt-oss's formula, {what}, bfloat16"] = Subject(
            run, packed.nbytes + outs["bfloat16"].nbytes, packed.size
        )
    yield from in_turn(subjects, clock.on_device, rounds)
    one = packed[0]
    out = one.decode()
    moved = one.nbytes + out.nbytes
    subjects = {
        "limit: copy of as many bytes as one expert": copy(moved // 2),
        "decode one expert, output reused": Subject(lambda: one.decode(out=out), moved, one.size),
        "decode one expert, new output": Subject(one.decode, moved, one.size),
    }
    yield from in_turn(subjects, clock.on_device, 3 * rounds)
    subjects = {f"{name}, by the clock": subject for name, subject in subjects.items()}
    yield from in_turn(subjects, clock.from_host, 3 * rounds)


def torch_runs(blocks: cupy.ndarray, scales: cupy.ndarray) -> dict[str, Run]:
    """Return the formula of gpt-oss's loader, in eager mode and compiled, over the same memory, if torch is there."""
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

    return {"torch eager": eager, "torch.compile": lambda: formula(codes, factors)}


def from_file(clock: Clock, rounds: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Decode from files in the page cache to the device."""
    rng = np.random.default_rng(0)
    for i in range(LAYERS):
        for j, rows in enumerate((ROWS, ROWS // 2)):
            shape = 32, rows, GROUPS
            tensor = mxfp4np.MXFP4Array(
                rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(110, 135, shape, np.uint8)
            )
            mxfp4np.save_file({f"block.{i}.mlp.mlp{j + 1}_weight": tensor}, folder / f"{i}-{j}.safetensors")
    there, here = mxfp4np.Checkpoint(folder, "cuda:0"), mxfp4np.Checkpoint(folder)
    names = list(here)
    packed = {name: here.packed(name) for name in names}

    def load(checkpoint: Any, names: list[str]) -> None:
        for name in names:
            checkpoint.get(name)

    def open_and_load() -> None:
        with mxfp4np.Checkpoint(folder, "cuda:0") as checkpoint:
            load(checkpoint, names)

    def subject(run: Run, names: list[str]) -> Subject:
        return Subject(run, sum(packed[name].nbytes for name in names), sum(packed[name].size for name in names))

    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(256 << 20), np.uint8, 256 << 20)
    target = cupy.empty(256 << 20, np.uint8)
    subjects = {
        "limit: pinned memory to the device": Subject(lambda: target.set(pinned), pinned.nbytes),
        "the same bytes of the files to pinned memory, no bus": subject(
            lambda: copy_to_pinned(list(packed.values()), pinned, threads), names
        ),
        "files to device, layer by layer": subject(lambda: load(there, names), names),
        "the largest tensor alone": subject(lambda: there.get(names[0]), names[:1]),
        "decode on the CPU, then copy": subject(lambda: [cupy.asarray(here[name]) for name in names[:2]], names[:2]),
    }
    try:
        import torch
        from gpt_oss.torch.weights import Checkpoint
    except ImportError:
        pass
    else:
        peer = Checkpoint(str(folder), torch.device("cuda:0"))
        subjects["gpt-oss `Checkpoint(device='cuda').get`"] = subject(lambda: load(peer, names[:2]), names[:2])
    rows = in_turn(subjects, clock.from_host, rounds)
    subjects = {name: subjects[name] for name in list(subjects)[:1]}
    subjects["files to device, opened and closed, pinned memory made anew"] = subject(open_and_load, names)
    return rows + in_turn(subjects, clock.from_host, rounds)[1:]


def copy_to_pinned(arrays: list[mxfp4np.MXFP4Array], pinned: np.ndarray, threads: int) -> None:
    """Copy packed blocks to pinned memory, over and over to the same, in several threads."""
    step, count = PINNED_BYTES, min(2 * threads, pinned.nbytes // PINNED_BYTES)
    for array in arrays:
        source, target = address_of(array.blocks), address_of(pinned)
        in_threads(
            lambda i, j, source=source, target=target: ctypes.memmove(
                target + i // step % count * step, source + i, j - i
            ),
            array.blocks.nbytes,
            step,
            threads,
        )


def measure(options: Namespace) -> list[dict[str, Any]]:
    """Return rows for what is on the device, and for what comes from files."""
    clock = Clock()
    rows = list(resident(clock, options.rounds))
    cupy.get_default_memory_pool().free_all_blocks()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rows += from_file(clock, options.rounds, options.threads, Path(folder))
    return rows


def device() -> str:
    """Return the name of the device, and the CUDA that its driver is for."""
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{name}, driver for CUDA {cupy.cuda.runtime.driverGetVersion() / 1000:.1f}"
