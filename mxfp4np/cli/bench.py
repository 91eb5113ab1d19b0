"""What ``mxfp4np bench`` measures: how fast this machine decodes, beside the limits that its memory sets.

Rates count bytes of output. The share of a limit that decoding reached is the median of the ratios of each round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..backends import get_backend
from ..backends.cpu.driver import stream
from ..backends.memory import aligned_empty
from ..backends.threads import default_num_threads
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, decoded_dtype
from ..text import align, count, format_bytes
from .progress import ProgressBar
from .report import rows
from .timing import Run, available_memory, describe, fill, in_turn, machine

ROUNDS: Final = 9
SECONDS: Final = 4.0
"""Rounds for each dtype, and the seconds for all dtypes together after which three rounds are enough."""

TIMES_ON_DEVICE: Final = 8
"""How often a device repeats what is timed, so that it does not wait for the host in between."""

PINNED_BYTES: Final = 64 << 20
"""Bytes that are copied from pinned memory to a device at a time."""

ROW_BLOCKS: Final = 90
"""Blocks in a row of random data: 2880 values, as in gpt-oss."""


@dataclass
class Source:
    """Packed arrays to be decoded."""

    what: str
    """A description."""
    arrays: list[MXFP4Array]
    names: list[str] = field(default_factory=list)
    """Names of the arrays, if they are tensors of a checkpoint."""

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(array.size for array in self.arrays)


@dataclass
class Row:
    """One kind of run, timed in several rounds."""

    dtype: str
    what: str
    """Name of the run."""
    nbytes: int
    """Bytes of output."""
    seconds: list[float]
    """Of each round."""
    decoding: Row | None = None
    """The row that this is a limit of, None for a way of decoding."""

    @property
    def rates(self) -> list[float]:
        """GB/s of the rounds, from the slowest to the fastest."""
        return sorted(self.nbytes / 1e9 / seconds for seconds in self.seconds)

    @property
    def reached(self) -> float | None:
        """The share of this limit that decoding reached: the median of the rounds' ratios."""
        if self.decoding is None:
            return None
        return median(limit / decode for limit, decode in zip(self.seconds, self.decoding.seconds, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain objects."""
        return {
            "dtype": self.dtype,
            "what": self.what,
            "rounds": len(self.seconds),
            "gb_per_second": median(self.rates),
            "lowest": self.rates[0],
            "highest": self.rates[-1],
            "gvalues_per_second": median(self.rates) / decoded_dtype(self.dtype).itemsize,
            "limit_of": self.decoding and self.decoding.what,
            "reached": self.reached,
        }

    def cells(self) -> tuple[str, ...]:
        """Return the figures for a person."""
        spread = f"{self.rates[0]:.1f} to {self.rates[-1]:.1f}" if len(self.seconds) > 1 else ""
        rate = f"{median(self.rates):.1f}"
        if self.decoding is None:
            values = median(self.rates) / decoded_dtype(self.dtype).itemsize
            return self.dtype, self.what, rate, spread, f"{values:.2f}", ""
        return "", f"  limit: {self.what}", rate, spread, "", f"{self.reached:.0%}"


@dataclass
class Result:
    """What was measured."""

    source: Source
    threads: int
    device: str
    size: int
    """Bytes of bfloat16 that were asked for."""
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain objects."""
        return {
            "machine": machine(),
            "threads": self.threads,
            "device": self.device,
            "source": self.source.what,
            "tensors": self.source.names,
            "values": self.source.size,
            "rows": [row.to_json() for row in self.rows],
        }

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        yield describe(machine())
        size, threads = 2 * self.source.size, count(self.threads, "thread")
        if self.device != "cpu":
            yield f"{self.device}: {_Device(self.device).name}"
        rounds = max(len(row.seconds) for row in self.rows)
        yield f"{self.source.what}: {format_bytes(size)} of bfloat16; {threads}, medians of {rounds} rounds in turn"
        if size < 0.9 * self.size:
            yield f"less than the {format_bytes(self.size)} asked for: there is no more, or no memory for more"
        yield ""
        header = ("OUTPUT", "RUN", "GB/S", "SPREAD", "G VALUES/S", "REACHED")
        yield from align([header, *(row.cells() for row in self.rows)], left=2)
        yield ""
        yield "GB/s of output. Below each way of decoding: its limits, and the share of them that it reached."
        if self.device == "cpu":
            yield "stream: load the same packed bytes, store the output past the cache, and decode nothing."
        else:
            yield "copy: move as many bytes within the device; pinned memory: the packed bytes to the device."


def run(
    path: Path | None,
    *,
    layout: str | None,
    size: int,
    dtypes: Sequence[str],
    threads: int | None,
    device: str,
    bar: ProgressBar,
) -> Result:
    """Measure decoding to several dtypes, and its limits.

    Parameters
    ----------
    path : path, optional
        A checkpoint: its largest packed tensors are decoded, from the mapped files. Random data by default.
    size : int
        Bytes of bfloat16 to decode; fewer where the checkpoint or free memory is smaller.
    layout, threads, device
        As for `mxfp4np.Checkpoint` and its `get`.
    bar : callable
        ``bar(total, what)`` shows progress: see `byte_bar`.
    """
    threads = threads or default_num_threads()
    memory = available_memory() if device == "cpu" else min(available_memory(), _Device(device).free)
    # Half of the free memory holds the packed bytes, the output, and a second output while new ones are measured.
    value_bytes = (BYTES_PER_BLOCK + 1) / BLOCK_SIZE + 2 * max(decoded_dtype(dtype).itemsize for dtype in dtypes)
    values = memory / 2 / value_bytes
    room = int(min(size, 2 * values))

    if path is None:
        source = random_source(room)
        return Result(source, threads, device, size, measure(source, dtypes, threads, device, bar))
    with Checkpoint(path, layout=layout) as checkpoint:
        source = checkpoint_source(checkpoint, room)
        return Result(source, threads, device, size, measure(source, dtypes, threads, device, bar))


def random_source(size: int) -> Source:
    """Return random codes and scales that decode to about ``size`` bytes of bfloat16, but to one row at least."""
    rng = np.random.default_rng(0)
    shape = max(1, size // (2 * BLOCK_SIZE * ROW_BLOCKS)), ROW_BLOCKS
    blocks = rng.integers(0, 256, (*shape, BYTES_PER_BLOCK), np.uint8)
    return Source("random data in memory", [MXFP4Array(blocks, rng.integers(118, 126, shape, np.uint8))])


def checkpoint_source(checkpoint: Checkpoint, size: int) -> Source:
    """Return the largest packed tensors that decode to at most ``size`` bytes of bfloat16, or a part of one."""
    packed = [row.info for row in rows(checkpoint) if row.info is not None and row.info.layout and row.info.nbytes]
    if not packed:
        raise CheckpointError(
            f"{checkpoint.files[0].parent}: no packed tensor that could be decoded: see mxfp4np inspect"
        )
    packed.sort(key=lambda info: -info.decoded_nbytes())
    names, left = [], size
    for info in packed:
        if info.decoded_nbytes() <= left:
            names.append(info.name)
            left -= info.decoded_nbytes()
    if names:
        what = f"{len(names)} of {len(packed)} packed tensors"
        return Source(what, [checkpoint.packed(name) for name in names], names)
    name = packed[0].name
    _, array = next(checkpoint.packed(name).chunks(max(size, 2 * BLOCK_SIZE)))
    return Source(f"part of 1 of {len(packed)} packed tensors", [array], [name])


def measure(source: Source, dtypes: Sequence[str], threads: int, device: str, bar: ProgressBar) -> list[Row]:
    """Return rows for each dtype: ways of decoding, each followed by its limits."""
    found: list[Row] = []
    sizes = {dtype: decoded_dtype(dtype).itemsize * source.size for dtype in dtypes}
    memory = get_backend(device=device).empty((max(sizes.values()),), np.dtype(np.uint8))
    runs_of, times = (_runs, 1) if device == "cpu" else (_runs_on_device, TIMES_ON_DEVICE)
    with bar(sum(sizes.values()), "measuring") as progress:
        for dtype, nbytes in sizes.items():
            runs, decoding = runs_of(source, memory[:nbytes], dtype, threads), None
            timed = in_turn(list(runs.values()), ROUNDS, SECONDS / len(dtypes))
            for name, seconds in zip(runs, timed, strict=True):
                if name.startswith("decode"):
                    decoding = Row(dtype, name, times * nbytes, seconds)
                    found.append(decoding)
                else:
                    found.append(Row(dtype, name, times * nbytes, seconds, decoding))
            progress(nbytes)
    return found


def _runs(source: Source, memory: NDArray[np.uint8], dtype: str, threads: int) -> dict[str, Run]:
    """Return what is run in each round: ways of decoding, each followed by its limits."""
    outs = _outputs(source, memory, dtype)

    def decode_new() -> None:
        for array in source.arrays:
            array.decode(dtype, num_threads=threads)

    def stream_all() -> None:
        for array, out in zip(source.arrays, outs, strict=True):
            stream(array.blocks, array.scales, out, num_threads=threads)

    def fill_new() -> None:
        for out in outs:
            fill(aligned_empty(out.shape, out.dtype), threads)

    return {
        "decode, from the file" if source.names else "decode": partial(_decode, source.arrays, outs, threads),
        "stream": stream_all,
        "memset": lambda: fill(memory, threads),
        "decode, new output": decode_new,
        "allocate and fill": fill_new,
    }


def _runs_on_device(source: Source, memory: Any, dtype: str, threads: int) -> dict[str, Run]:
    """Return what is run in each round on a CUDA device: packed bytes are there, or in the file or on the host."""
    device = _Device(f"cuda:{memory.device.id}")
    outs = _outputs(source, memory, dtype)
    packed = sum(array.nbytes for array in source.arrays)
    there = [array.replace(device.copied(array.blocks), device.copied(array.scales)) for array in source.arrays]
    return {
        "decode": device.finishing(partial(_decode, there, outs, threads)),
        "copy": device.finishing(device.copying((packed + memory.nbytes) // 2)),
        f"decode, from the {'file' if source.names else 'host'}": device.finishing(
            partial(_decode, source.arrays, outs, threads)
        ),
        "pinned memory": device.finishing(device.copying_pinned(packed)),
    }


def _decode(arrays: list[MXFP4Array], outs: list[Any], threads: int) -> None:
    for array, out in zip(arrays, outs, strict=True):
        array.decode(out=out, num_threads=threads)


class _Device:
    """A CUDA device, and the copies that limit how fast it decodes."""

    def __init__(self, device: str) -> None:
        get_backend(device=device)  # raises an error that says what is missing
        import cupy

        self._cupy, self._device = cupy, cupy.cuda.Device(int(device.partition(":")[2] or cupy.cuda.Device().id))
        self.name = cupy.cuda.runtime.getDeviceProperties(self._device.id)["name"].decode()
        self.free = self._device.mem_info[0]

    def copied(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device."""
        with self._device:
            return self._cupy.asarray(array)

    def copying(self, nbytes: int) -> Run:
        """Return a function that copies ``nbytes`` within the memory of the device."""
        with self._device:
            source, target = (self._cupy.zeros(nbytes, np.uint8) for _ in range(2))
        return lambda: target.data.copy_from_device_async(source.data, nbytes)

    def copying_pinned(self, nbytes: int) -> Run:
        """Return a function that copies ``nbytes`` from pinned memory to the device."""
        size = min(nbytes, PINNED_BYTES)
        with self._device:
            source = np.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
            target = self._cupy.empty(size, np.uint8)

        def copy() -> None:
            for begin in range(0, nbytes, size):
                count = min(size, nbytes - begin)
                target[:count].set(source[:count])

        return copy

    def finishing(self, run: Run) -> Run:
        """Return a function that repeats a run `TIMES_ON_DEVICE` times, and waits until the device is done."""

        def finish() -> None:
            with self._device:
                for _ in range(TIMES_ON_DEVICE):
                    run()
            self._device.synchronize()

        return finish


def _outputs(source: Source, memory: Any, dtype: str) -> list[Any]:
    """Return parts of memory as the outputs of the arrays."""
    outs, begin = [], 0
    for array in source.arrays:
        nbytes = decoded_dtype(dtype).itemsize * array.size
        outs.append(memory[begin : begin + nbytes].view(decoded_dtype(dtype)).reshape(array.shape))
        begin += nbytes
    return outs
