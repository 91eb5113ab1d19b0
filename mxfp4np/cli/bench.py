"""What ``mxfp4np bench`` measures: how fast this machine decodes and multiplies, beside the limits of its memory.

Rates count bytes of output, or packed bytes for products. The share of a limit that was reached is the median of the
ratios of each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..backends import get_backend
from ..backends.cpu.driver import stream
from ..backends.cpu.products import read
from ..backends.memory import aligned_empty
from ..backends.threads import default_num_threads
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, decoded_dtype
from ..products import Activations, linear
from ..summary import rows
from ..text import align, count, format_bytes
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


class Source(NamedTuple):
    """Packed arrays to be decoded: what they are, and their names if they are tensors of a checkpoint."""

    what: str
    arrays: list[MXFP4Array]
    names: list[str]


def run(
    path: Path | None,
    layout: str | None,
    size: int,
    dtypes: Sequence[str],
    threads: int | None,
    device: str,
    bar: Callable[[int, str], Any],
) -> dict[str, Any]:
    """Measure decoding to several dtypes, and its limits; return the figures as plain objects.

    The largest packed tensors of the checkpoint at ``path`` are decoded, from the mapped files, or else random data:
    ``size`` bytes of bfloat16, or fewer where the checkpoint or free memory is smaller. ``bar`` is `Reporter.bytes`.
    """
    if path is None and layout is not None:
        raise ValueError(f"layout {layout!r} is that of a checkpoint: expected its path, found none")
    threads = threads or default_num_threads()
    memory = available_memory() if device == "cpu" else min(available_memory(), _cuda_device(device).mem_info[0])
    # Half of the free memory holds the packed bytes, the output, and a second output while new ones are measured.
    value_bytes = (BYTES_PER_BLOCK + 1) / BLOCK_SIZE + 2 * max(decoded_dtype(dtype).itemsize for dtype in dtypes)
    room = int(min(size, memory / value_bytes))
    with ExitStack() as stack:
        if path is None:
            source = random_source(room)
        else:
            source = checkpoint_source(stack.enter_context(Checkpoint(path, layout=layout)), room)
        measured = measure(source, dtypes, threads, device, bar)
        multiplied = products(source, threads) if device == "cpu" else []
    return {
        "machine": machine(),
        "threads": threads,
        "device": device,
        "source": source.what,
        "tensors": source.names,
        "values": sum(array.size for array in source.arrays),
        "rows": measured,
        "products": multiplied,
    }


def lines(found: dict[str, Any], asked: int) -> Iterator[str]:
    """Yield a report of what `run` returned for a person; ``asked`` is the ``size`` it was given."""
    yield describe(found["machine"])
    size, threads, device = 2 * found["values"], count(found["threads"], "thread"), found["device"]
    if device != "cpu":
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(_cuda_device(device).id)
        yield f"{device}: {properties['name'].decode()}"
    rounds = max(row["rounds"] for row in found["rows"])
    yield f"{found['source']}: {format_bytes(size)} of bfloat16; {threads}, medians of {rounds} rounds in turn"
    if size < 0.9 * asked:
        yield f"less than the {format_bytes(asked)} asked for: there is no more, or no memory for more"
    yield ""
    cells: list[tuple[str, ...]] = [("OUTPUT", "RUN", "GB/S", "SPREAD", "G VALUES/S", "REACHED")]
    for row in (*found["rows"], *found["products"]):
        rate = f"{row['gb_per_second']:.1f}", f"{row['lowest']:.1f} to {row['highest']:.1f}"
        if row["limit_of"] is None:
            cells.append((row.get("dtype", "product"), row["what"], *rate, f"{row['gvalues_per_second']:.2f}", ""))
        else:
            cells.append(("", f"  limit: {row['what']}", *rate, "", f"{row['reached']:.0%}"))
    yield from align(cells, left=2)
    yield ""
    yield "GB/s of output. Below each way of decoding: its limits, and the share of them that it reached."
    if device == "cpu":
        yield "stream: load the same packed bytes, store the output past the cache, and decode nothing."
        yield "Products are of one vector, in GB/s of packed bytes. read: load the packed bytes, and multiply nothing."
    else:
        yield "copy: move as many bytes within the device; pinned memory: the packed bytes to the device."


def random_source(size: int) -> Source:
    """Return random codes and scales that decode to about ``size`` bytes of bfloat16, but to one row at least."""
    rng = np.random.default_rng(0)
    shape = max(1, size // (2 * BLOCK_SIZE * ROW_BLOCKS)), ROW_BLOCKS
    blocks = rng.integers(0, 256, (*shape, BYTES_PER_BLOCK), np.uint8)
    return Source("random data in memory", [MXFP4Array(blocks, rng.integers(118, 126, shape, np.uint8))], [])


def checkpoint_source(checkpoint: Checkpoint, size: int) -> Source:
    """Return the largest packed tensors that decode to at most ``size`` bytes of bfloat16, or a part of one."""
    packed = [
        row.info for row in rows(checkpoint) if row.info is not None and row.info.format == "MXFP4" and row.info.nbytes
    ]
    if not packed:
        raise CheckpointError(
            f"{checkpoint.files[0].parent}: no MXFP4 tensor that could be decoded: see mxfp4np inspect"
        )
    packed.sort(key=lambda info: -info.decoded_nbytes())
    names, left = [], size
    for info in packed:
        if info.decoded_nbytes() <= left:
            names.append(info.name)
            left -= info.decoded_nbytes()
    if names:
        what = f"{len(names)} of {len(packed)} packed tensors"
        return Source(what, [checkpoint.blocks(name) for name in names], names)
    name = packed[0].name
    _, array = next(checkpoint.blocks(name).iter_chunks(max(size, 2 * BLOCK_SIZE)))
    return Source(f"part of 1 of {len(packed)} packed tensors", [array], [name])


def measure(
    source: Source, dtypes: Sequence[str], threads: int, device: str, bar: Callable[[int, str], Any]
) -> list[dict[str, Any]]:
    """Return the figures of each dtype: ways of decoding, each followed by its limits."""
    measured: list[dict[str, Any]] = []
    sizes = {dtype: sum(array.size for array in source.arrays) * decoded_dtype(dtype).itemsize for dtype in dtypes}
    memory = get_backend(device=device).empty((max(sizes.values()),), np.dtype(np.uint8))
    runs_of, times = (_runs, 1) if device == "cpu" else (_runs_on_device, TIMES_ON_DEVICE)
    with bar(sum(sizes.values()), "measuring") as progress:
        for dtype, nbytes in sizes.items():
            outs, begin = [], 0
            for array in source.arrays:
                end = begin + array.size * decoded_dtype(dtype).itemsize
                outs.append(memory[begin:end].view(decoded_dtype(dtype)).reshape(array.shape))
                begin = end
            runs = runs_of(source, outs, memory[:nbytes], threads)
            figures = _figures(runs, times * nbytes, SECONDS / len(dtypes), decoded_dtype(dtype).itemsize)
            measured += ({"dtype": dtype} | row for row in figures)
            progress(nbytes)
    return measured


def products(source: Source, threads: int) -> list[dict[str, Any]]:
    """Return the figures of products of all rows with one vector: each kind, followed by its limit."""
    arrays = [array[index] for array in source.arrays for index in np.ndindex(array.shape[:-2]) if array.ndim > 1]
    vectors = [np.random.default_rng(0).standard_normal(array.shape[1], np.float32) for array in arrays]
    packed, values = sum(array.nbytes for array in arrays), sum(array.size for array in arrays)
    if not values:
        return []

    def multiply(activations: Activations) -> None:
        for array, x in zip(arrays, vectors, strict=True):
            linear(x, array, activations=activations, num_threads=threads)

    def read_all() -> None:
        for array in arrays:
            read(array.blocks, array.scales, num_threads=threads)

    runs: dict[str, Run] = {"multiply": partial(multiply, "float32"), "read": read_all}
    runs |= {"multiply, int16": partial(multiply, "int16"), "read ": read_all}
    return list(_figures(runs, packed, SECONDS / 4, packed / values))


def _figures(runs: dict[str, Run], nbytes: int, seconds: float, itemsize: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of runs: what decodes or multiplies ``nbytes`` bytes, followed by its limits."""
    subject, subject_seconds = "", list[float]()
    for what, taken in zip(runs, in_turn(list(runs.values()), ROUNDS, seconds), strict=True):
        is_limit = not what.startswith(("decode", "multiply"))
        if not is_limit:
            subject, subject_seconds = what, taken
        rates = sorted(nbytes / 1e9 / s for s in taken)
        ratios = (limit / own for limit, own in zip(taken, subject_seconds, strict=True))
        yield {
            "what": what.strip(),
            "rounds": len(taken),
            "gb_per_second": median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "gvalues_per_second": median(rates) / itemsize,
            "limit_of": subject if is_limit else None,
            "reached": median(ratios) if is_limit else None,
        }


def _runs(source: Source, outs: list[Any], memory: NDArray[np.uint8], threads: int) -> dict[str, Run]:
    """Return what is run in each round: ways of decoding, each followed by its limits."""

    def decode_new() -> None:
        for array, out in zip(source.arrays, outs, strict=True):
            array.decode(out.dtype, num_threads=threads)

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


def _runs_on_device(source: Source, outs: list[Any], memory: Any, threads: int) -> dict[str, Run]:
    """Return what is run in each round on a CUDA device: packed bytes are there, or in the file or on the host."""
    import cupy

    packed = sum(array.nbytes for array in source.arrays)
    size, moved = min(packed, PINNED_BYTES), (packed + memory.nbytes) // 2
    with memory.device:
        arrays = [array.replace(cupy.asarray(array.blocks), cupy.asarray(array.scales)) for array in source.arrays]
        pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
        original, copied = cupy.zeros(moved, np.uint8), cupy.zeros(moved, np.uint8)

    def copy_pinned() -> None:
        for begin in range(0, packed, size):
            part = copied[: min(size, packed - begin)]
            part.set(pinned[: part.size])

    runs: dict[str, Run] = {
        "decode": partial(_decode, arrays, outs, threads),
        "copy": lambda: copied.data.copy_from_device_async(original.data, moved),
        f"decode, from the {'file' if source.names else 'host'}": partial(_decode, source.arrays, outs, threads),
        "pinned memory": copy_pinned,
    }
    return {what: partial(_repeat, memory.device, run) for what, run in runs.items()}


def _repeat(device: Any, run: Run) -> None:
    """Repeat a run `TIMES_ON_DEVICE` times, and wait until the device is done."""
    with device:
        for _ in range(TIMES_ON_DEVICE):
            run()
    device.synchronize()


def _decode(arrays: list[MXFP4Array], outs: list[Any], threads: int) -> None:
    for array, out in zip(arrays, outs, strict=True):
        array.decode(out=out, num_threads=threads)


def _cuda_device(device: str) -> Any:
    get_backend(device=device)  # raises an error that says what is missing
    import cupy

    return cupy.cuda.Device(int(device.partition(":")[2] or cupy.cuda.Device().id))
