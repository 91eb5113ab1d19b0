"""Convert a checkpoint into an ordinary one: packed tensors are decoded, all others copied, config.json adapted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

from ..array import MXFP4Array
from ..backends import as_numpy
from ..backends.memory import aligned_empty
from ..checkpoint import Checkpoint
from ..format import BYTES_PER_BLOCK, decoded_dtype
from ..layouts.table import LAYOUTS, wants_transpose
from ..shapes import swapped
from ..storage.discover import PathLike
from ..storage.tensorfile import DTYPES, SAFETENSORS_DTYPES
from ..text import count, escape, patterns, select
from .config import Source, decoded_config, kept_metadata, small_files
from .findings import Verification
from .plan import MAX_SHARD_SIZE, Chunks, Copied, Item, Output, Plan, make_shards
from .run import Run, refuse_incomplete, run_plan, tasks_of
from .verify import compare, count_overflow
from .workers import Progress

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes that a thread has in memory at a time. One expert of gpt-oss-20b fits, and can be transposed whole."""


@dataclass(frozen=True)
class Decoded(Item):
    """A packed tensor to be decoded."""

    transpose: bool

    def chunks(self, checkpoint: Checkpoint, reports: dict[str, Any]) -> Chunks:
        """Yield the values; report how many overflowed to infinity, which MXFP4 has no code for."""
        dtype, overflow, memory = decoded_dtype(DTYPES[self.outputs[0].dtype][1]), 0, None
        for _, packed in checkpoint.pieces(self.name, CHUNK_BYTES, dtype=dtype, transpose=self.transpose):
            if memory is None:  # no other chunk is larger than the first
                memory = aligned_empty((packed.size,), dtype)
            out = memory[: packed.size].reshape(swapped(packed.shape) if self.transpose else packed.shape)
            if checkpoint.device == "cpu":
                packed.decode(out=out, transpose=self.transpose, num_threads=1)
            else:
                values = packed.decode(dtype, transpose=self.transpose, device=checkpoint.device, num_threads=1)
                as_numpy(values, out)
            overflow += count_overflow(packed, out)
            yield 0, out
        if overflow:
            reports[self.name] = overflow


def _warm_up(dtype: str, device: str, orders: Iterable[str], transposes: Iterable[bool]) -> None:
    """Decode one block in each way that `Decoded` does."""
    for order, transpose in product(orders, transposes):
        block = MXFP4Array(np.zeros((1, 1, BYTES_PER_BLOCK), np.uint8), np.zeros((1, 1), np.uint8), order)
        as_numpy(block.decode(dtype, transpose=transpose, device=device, num_threads=1))


def plan_conversion(
    checkpoint: Checkpoint,
    folder: Path,
    source: Source = None,
    dtype: DTypeLike = "bfloat16",
    transpose: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Plan:
    """Return what `convert` is going to write to ``folder``, from headers alone.

    The arguments are those of `convert`; without ``source`` no small files are copied.
    """
    wanted = decoded_dtype(dtype).name
    include, exclude = patterns(include), patterns(exclude)
    items: list[Item] = []
    layouts: set[str] = set()
    for name in select(checkpoint, include, exclude):
        info = checkpoint.info(name)
        if info.layout is None:
            items.append(Copied.of(info))
        else:
            layouts.add(info.layout)
            transposed = wants_transpose(info.layout, info.shape, transpose)
            shape = swapped(info.shape) if transposed else info.shape
            items.append(Decoded(name, (Output(name, SAFETENSORS_DTYPES[wanted], shape),), transposed))
    if not items:
        raise ValueError(f"{checkpoint.folder}: no tensor is left to convert: see --include and --exclude")
    keep = bool(untouched(items))
    files = small_files(checkpoint, source, folder, lambda config: decoded_config(config, wanted, keep=keep))
    options = {
        "dtype": wanted,
        "transpose": transpose,
        "include": include,
        "exclude": exclude,
        "layouts": sorted(layouts),  # a forced one changes values without changing a header
    }
    orders = {known.order for known in LAYOUTS if known.name in layouts}
    transposes = {item.transpose for item in items if isinstance(item, Decoded)}
    warm_up = partial(_warm_up, wanted, checkpoint.device, orders, transposes)
    shards = make_shards(items, max_shard_size, kept_metadata(checkpoint, items))
    return Plan(folder, shards, files.written, files.copied, options, checkpoint, warm_up, files.left_out)


def untouched(items: Iterable[Item]) -> list[str]:
    """Return the names of copied tensors that are quantised in another way."""
    dtypes = [dtype for dtype in DTYPES if dtype.startswith(("F8", "F6", "F4")) or dtype in ("U8", "I8", "U32")]
    outputs = [item.outputs[0] for item in items if isinstance(item, Copied)]
    return [output.name for output in outputs if len(output.shape) > 1 and output.dtype in dtypes]


@dataclass(frozen=True)
class Conversion(Run):
    """What `convert` did, or is going to do."""

    packed: int
    """Number of tensors that are decoded."""
    untouched: list[str]
    """Names of copied tensors that are quantised in another way."""
    loader: str
    """Python code that loads the result."""
    verification: Verification | None

    @property
    def overflow(self) -> Mapping[str, int]:
        """Number of values that were too large for the dtype, by tensor, in what this run wrote."""
        return self.reports

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            **super().to_json(),
            "packed": self.packed,
            "overflow": dict(self.overflow),
            "untouched": self.untouched,
            "verification": None if self.verification is None else self.verification.to_json(),
        }

    def warnings(self) -> Iterator[str]:
        """Yield what a person should know even if nothing else is shown."""
        yield from super().warnings()
        if not self.packed:
            yield "no tensor of the source is packed: all of them are copied"
        if self.untouched:
            yield (
                "quantised in another way, and left so with what config.json says of it: "
                f"{count(len(self.untouched), 'tensor')}, {escape(self.untouched[0])} first"
            )
        if self.overflow:
            yield (
                f"too large for the dtype, and infinite now: {count(sum(self.overflow.values()), 'value')} in "
                f"{count(len(self.overflow), 'tensor')}, {escape(next(iter(self.overflow)))} first"
            )

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        yield from super().lines()
        if self.verification is not None:
            yield from self.verification.lines()
        if self.verification is not None and self.verification.findings:
            yield "a file that differs can be removed, and written again with --resume"
        elif self.complete:
            yield f"load it: {escape(self.loader)}"


def convert(
    source: PathLike | Sequence[PathLike],
    target: PathLike,
    *,
    dtype: DTypeLike = "bfloat16",
    transpose: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    layout: str | None = None,
    io: str = "mmap",
    device: str = "cpu",
    num_threads: int | None = None,
    task: tuple[int, int] | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Conversion:
    """Write a checkpoint with its packed tensors decoded, in bounded memory; a killed run can be resumed.

    Parameters
    ----------
    source : path, or sequence of paths
        As for `Checkpoint`. Of a folder or an index, the small files beside the weights are copied as well, and
        config.json no longer says that the weights are packed. A folder that lacks parts is refused.
    target : path
        A new or empty folder that does not contain the source.
    dtype : str, type or numpy.dtype
        Of packed tensors: bfloat16, float16 or float32. All other tensors are copied as they are.
    transpose : {"auto", "yes", "no"}
        Whether to swap the last two axes of packed tensors. ``"auto"`` does it for the experts of gpt-oss under
        Hugging Face's names: transformers expects them as ``[expert, in, out]``.
    max_shard_size : int or str
        Bytes of a file, as huggingface_hub counts them; or text, ``"5GB"`` or ``"5GiB"``.
    include, exclude : str or iterable of str
        Shell-style patterns of logical names: those to write, all by default, and those to leave out.
    layout, io : str, optional
        See `Checkpoint`.
    device : str
        Where to decode. Decoded values come back over the bus to be written, so that ``"cpu"`` is rarely slower.
    num_threads : int, optional
        At most this many threads, each of which writes a shard at a time. By default as many as decoding uses.
    task : (int, int), optional
        ``(i, n)`` writes the i-th of n parts, counted from 1: for several processes or machines that share the target,
        in any order and any number of times. The last one to finish writes the index.
    resume : bool
        Keep the finished shards of an earlier run with the same arguments, and write the others.
    force : bool
        Start over in a folder that holds an earlier run, or other files, of which those with the same names are
        replaced. Weights that no earlier run wrote are refused.
    verify : bool
        Decode again by the reference backend, and compare every byte.
    dry_run : bool
        Return the plan and write nothing.
    progress : callable
        Called with a `Progress` by one thread at a time. What it raises stops the conversion, and is raised.

    Returns
    -------
    Conversion

    Raises
    ------
    FileNotFoundError, FileExistsError
        If the source is missing, or the target is not empty.
    CheckpointError, LayoutError
        If the source is malformed, or the target was begun with other arguments.
    OSError
        If the disk is full. No shard that looks finished is left behind.
    ValueError
        If an argument does not fit.

    Notes
    -----
    A file that has its final name is complete and on disk; ``model.safetensors.index.json`` is written last. The same
    arguments give the same bytes, for any number of threads.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> folder = tempfile.mkdtemp()
    >>> packed = mxfp4np.MXFP4Array(np.full((2, 1, 16), 0x21, np.uint8), np.full((2, 1), 127, np.uint8))
    >>> mxfp4np.save_file({"w": packed}, folder + "/model.safetensors")
    >>> mxfp4np.convert(folder, folder + "/bf16").complete
    True
    >>> mxfp4np.Checkpoint(folder + "/bf16").info("w").dtype
    'BF16'
    """
    with Checkpoint(source, device, io=io, layout=layout) as checkpoint:
        refuse_incomplete(checkpoint)
        target = Path(target).absolute()
        plan = plan_conversion(checkpoint, target, source, dtype, transpose, max_shard_size, include, exclude)
        run = run_plan(plan, task, num_threads, progress, resume=resume, force=force, dry_run=dry_run)
        verification = Verification() if verify and not dry_run else None
        tasks = tasks_of(plan, task)
        if verification is not None and tasks:
            names = [output.name for task in tasks for item in task.shard.items for output in item.outputs]
            with Checkpoint([task.path for task in tasks]) as written:
                verification = compare(checkpoint, written, names, transpose, num_threads, progress)
    return Conversion(
        **vars(run),
        packed=sum(isinstance(item, Decoded) for item in plan.items),
        untouched=untouched(plan.items),
        loader=_loader(plan),
        verification=verification,
    )


def _loader(plan: Plan) -> str:
    """Return Python code that loads the result."""
    config = json.loads(plan.documents.get("config.json", b"{}"))
    if "architectures" in config and "model_type" in config:
        arguments = f"{str(plan.folder)!r}, dtype={plan.options['dtype']!r}"
        return f"transformers.AutoModelForCausalLM.from_pretrained({arguments})"
    return f"mxfp4np.Checkpoint({str(plan.folder)!r})"
