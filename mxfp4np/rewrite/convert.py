"""Convert a checkpoint into an ordinary one: packed tensors are decoded, all others copied, config.json adapted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ..backends import as_numpy
from ..backends.memory import aligned_empty
from ..checkpoint import Checkpoint
from ..format import DecodedDType, decoded_dtype
from ..layouts.table import Transpose, wants_transpose
from ..shapes import swapped
from ..storage.discover import IO, Location, PathLike
from ..storage.tensorfile import DTYPES, SAFETENSORS_DTYPES
from ..text import count, escape, patterns
from .cluster import Engine, running
from .config import QUANTIZERS_FILES, Change, Source, config_of, decoded_config, kept_metadata, small_files
from .contents import Contents, contents_of
from .findings import Verification
from .plan import MAX_SHARD_SIZE, Chunks, Copied, Item, Output, Plan, make_shards
from .quantization import loads_quantized, transforms
from .run import Run, refuse_incomplete, run_plan, tasks_of
from .verify import compare, count_overflow, only
from .workers import Progress

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes that a thread has in memory at a time. One expert of gpt-oss-20b fits, and can be transposed whole."""

WARM_BYTES: Final = 4096
"""Decoded bytes of a tensor of each kind that are decoded before threads start."""


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


def _warm_up(checkpoint: Checkpoint, dtype: str, ways: Iterable[tuple[str, bool]]) -> None:
    """Decode a little of some tensors, as `Decoded` does: ``ways`` are their names, and whether they are transposed."""
    for name, transpose in ways:
        pieces = checkpoint.pieces(name, WARM_BYTES, dtype=dtype, transpose=transpose)
        for _, packed in islice(pieces, 1):
            as_numpy(packed.decode(dtype, transpose=transpose, device=checkpoint.device, num_threads=1))


@dataclass(frozen=True)
class ConversionPlan(Plan):
    """A plan, and what becomes of each tensor of the source."""

    contents: Contents = field(kw_only=True)


def plan_conversion(
    checkpoint: Checkpoint,
    folder: Path,
    source: Source = None,
    dtype: DecodedDType = "bfloat16",
    transpose: Transpose = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    drop: str | Iterable[str] = (),
) -> ConversionPlan:
    """Return what `convert` is going to write to ``folder``, from headers alone.

    The arguments are those of `convert`; without ``source`` no small files are copied.
    """
    wanted = decoded_dtype(dtype).name
    include, exclude, drop = patterns(include), patterns(exclude), patterns(drop)
    contents = contents_of(checkpoint, include, exclude, drop, config_of(checkpoint, source))
    items: list[Item] = []
    written: set[str] = set()
    ways: dict[tuple[object, ...], tuple[str, bool]] = {}
    for name in checkpoint:
        if info := contents.decoded.get(name):
            transposed = wants_transpose(info.layout, info.shape, transpose)
            shape = swapped(info.shape) if transposed else info.shape
            items.append(Decoded(name, (Output(name, SAFETENSORS_DTYPES[wanted], shape),), transposed))
            ways.setdefault((info.layout, transposed, *(x.dtype for x in info.stored)), (name, transposed))
        elif info := contents.copied.get(name):
            copied = Copied.of(info)
            outputs = [x for x in copied.outputs if x.name not in written]  # several tensors may share a scale
            written |= {x.name for x in outputs}
            items.append(replace(copied, outputs=tuple(outputs)))
    if not items:
        raise ValueError(f"{checkpoint.folder}: no tensor is left to convert: see --drop")
    changes: dict[str, Change] = {"config.json": lambda config: decoded_config(config, wanted, contents.modules)}
    changes |= {name: partial(change, modules=contents.modules) for name, change in QUANTIZERS_FILES.items()}
    files = small_files(checkpoint, source, folder, changes)
    layouts = {info.layout for info in contents.decoded.values() if info.layout}
    options = {
        "dtype": wanted,
        "transpose": transpose,
        "include": include,
        "exclude": exclude,
        "drop": drop,
        "layouts": sorted(layouts),  # a forced one changes values without changing a header
    }
    warm_up = partial(_warm_up, checkpoint, wanted, list(ways.values()))
    shards = make_shards(items, max_shard_size, kept_metadata(checkpoint, items))
    return ConversionPlan(
        folder,
        shards,
        files.written,
        files.copied,
        options,
        checkpoint,
        warm_up,
        files.left_out,
        files.notes,
        contents=contents,
    )


@dataclass(frozen=True, repr=False)
class Conversion(Run):
    """What `convert` did, or is going to do."""

    contents: Contents
    """What became of each tensor."""
    loader: str
    """Python code that loads the result."""
    problem: str | None
    """Why no known loader takes the result for a whole model, None if one does."""
    verification: Verification | None

    @property
    def packed(self) -> int:
        """Number of tensors that are decoded."""
        return len(self.contents.decoded)

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
            "quantized": self.contents.quantized,
            "dropped": self.contents.dropped,
            "unneeded": self.contents.unneeded,
            "loader": self.loader,
            "problem": self.problem,
            "verification": None if self.verification is None else self.verification.to_json(),
        }

    def facts(self) -> list[tuple[str, str]]:
        """Return what a notebook shows: headings and texts."""
        decoded = f"{count(self.packed, 'tensor')}; {len(self.contents.copied):,} copied"
        verified = [] if self.verification is None else [("verification", self.verification.summary)]
        return [("decoded", decoded), *super().facts(), *verified, ("load it", self.loader)]

    def warnings(self) -> Iterator[str]:
        """Yield what a person should know even if nothing else is shown."""
        yield from super().warnings()
        contents = self.contents
        if not self.packed:
            yield "no tensor of the source is decoded: all of them are copied"
        if contents.quantized:
            first = contents.copied[contents.quantized[0]]
            yield (
                f"still quantised, as config.json says if it did before: {count(len(contents.quantized), 'tensor')}, "
                f"{escape(first.name)} first, which is {first.format}"
            )
        if contents.unneeded:
            yield (
                "left out with the quantisation that they belonged to: "
                f"{count(len(contents.unneeded), 'tensor')}, {escape(contents.unneeded[0])} first"
            )
        if self.problem is not None:
            yield f"no known loader takes the result for a whole model: {escape(self.problem)}"
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
    source: Location | Sequence[Location],
    target: PathLike,
    *,
    dtype: DecodedDType = "bfloat16",
    transpose: Transpose = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    drop: str | Iterable[str] = (),
    layout: str | None = None,
    io: IO = "mmap",
    device: str = "cpu",
    num_threads: int | None = None,
    engine: Engine = "threads",
    task: tuple[int, int] | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Conversion:
    """Write a checkpoint with its packed tensors decoded, in bounded memory; a killed run can be resumed.

    What a quantiser wrote beside the weights, config.json above all, then says what is true of the result. Scales of
    activations and caches are left out with the quantisation that they belong to.

    Parameters
    ----------
    source : path, or sequence of paths
        As for `Checkpoint`. Of a folder or an index, the small files beside the weights are copied as well. A folder
        that lacks parts is refused.
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
        Shell-style patterns of logical names: the tensors to decode, all packed ones by default, and those to copy as
        they are stored.
    drop : str or iterable of str
        Patterns of names of tensors to leave out. The result is then no whole model.
    layout, io : str, optional
        See `Checkpoint`.
    device : str
        Where to decode. Decoded values come back over the bus to be written, so that ``"cpu"`` is rarely slower.
    num_threads : int, optional
        At most this many threads, each of which writes a shard at a time. By default as many as decoding uses; on Ray
        one for each CPU of the cluster.
    engine : {"threads", "ray"}
        ``"ray"``, with the extra ray, writes shards in the processes of a Ray cluster, whose machines share the source
        and the target: that which a caller is connected to, or ``RAY_ADDRESS`` names, or one on this machine, which is
        started if none runs. A shard whose process or machine is lost is written again, elsewhere.
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
    if engine == "ray" and device != "cpu":
        raise ValueError(f"engine 'ray' decodes on CPUs, found device {device!r}: leave one of the two out")
    with Checkpoint(source, device, io=io, layout=layout) as checkpoint, running(engine):
        refuse_incomplete(checkpoint)
        target = Path(target).absolute()
        plan = plan_conversion(checkpoint, target, source, dtype, transpose, max_shard_size, include, exclude, drop)
        run = run_plan(plan, task, num_threads, progress, engine, resume=resume, force=force, dry_run=dry_run)
        verification = Verification() if verify and not dry_run else None
        tasks = tasks_of(plan, task)
        if verification is not None and tasks:
            items = [item for task in tasks for item in task.shard.items]
            here = {output.name for item in items for output in item.outputs}
            copied = only({name: info.stored for name, info in plan.contents.copied.items()}, here)
            names = [item.name for item in items]
            with Checkpoint([task.path for task in tasks]) as written:
                verification = compare(checkpoint, written, names, copied, transpose, num_threads, progress, engine)
        problem = _problem(plan, config_of(checkpoint, source))
    return Conversion(
        **vars(run),
        contents=plan.contents,
        loader=_loader(plan, problem),
        problem=problem,
        verification=verification,
    )


def _config_of(plan: Plan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(plan.documents.get("config.json", b"{}"))
    return config


def _problem(plan: ConversionPlan, before: Mapping[str, Any]) -> str | None:
    """Return why no known loader takes the result for a whole model, given config.json as it was, or None."""
    contents, transpose = plan.contents, plan.options["transpose"]
    if contents.dropped:
        return f"{count(len(contents.dropped), 'tensor')} dropped, {contents.dropped[0]} first"
    if contents.changing:
        return f"{contents.changing[0]} changes what the weights mean, and is not applied to them"
    if contents.decoded and transforms(before):
        return "config.json had a transform_config: the weights are rotated, and still are"
    if contents.modules.mixed:
        return f"one part of {contents.modules.mixed[0]} is decoded and another is not"
    for info in contents.decoded.values():
        if wants_transpose(info.layout, info.shape, transpose) != wants_transpose(info.layout, info.shape, "auto"):
            return f"with transpose {transpose!r}, {info.name} is not as the model expects it"
    config = _config_of(plan)
    if contents.quantized and "model_type" in config and not loads_quantized(config, contents.modules):
        return f"transformers does not load {contents.quantized[0]} as config.json describes it"
    return None


def _loader(plan: ConversionPlan, problem: str | None) -> str:
    """Return Python code that loads the result."""
    config, folder, dtype = _config_of(plan), repr(str(plan.folder)), repr(plan.options["dtype"])
    found, model_type = config.get("architectures"), config.get("model_type")
    name = found[0] if isinstance(found, list) and found else None
    if problem is not None or not isinstance(name, str) or not name.isidentifier() or model_type is None:
        return f"mxfp4np.Checkpoint({folder})"
    if any(info.layout == "mlx" for info in plan.contents.decoded.values()):
        return f"mlx_lm.load({folder})"
    if "auto_map" in config:
        return f"transformers.AutoModelForCausalLM.from_pretrained({folder}, dtype={dtype}, trust_remote_code=True)"
    model = "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name
    return f"transformers.{model}.from_pretrained({folder}, dtype={dtype})"
