"""Convert a checkpoint into an ordinary one: packed tensors decoded, all else as it is, config.json to match."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

from ..backends import as_numpy
from ..checkpoint import Checkpoint
from ..cli.report import count, escape
from ..errors import CheckpointError
from ..format import decoded_dtype
from ..info import TensorInfo
from ..layouts.table import LAYOUTS, METADATA
from ..layouts.table import wants_transpose as is_turned
from ..selection import patterns, select
from ..shapes import swapped
from ..storage.discover import PathLike
from ..storage.dtypes import DTYPES, SAFETENSORS_DTYPES
from .plan import MAX_SHARD_SIZE, RECORD, Item, Output, Pieces, Plan, Progress, Run, Scratch, Task, make_shards
from .verify import Verification, compare, count_overflow

PIECE_BYTES: Final = 32 << 20
"""Decoded bytes that a thread has in memory at a time. One expert of gpt-oss-20b fits, and can be transposed whole."""

WEIGHTS: Final = (".safetensors", ".uqff", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold weights, which are not copied."""

QUANTIZATION_KEYS: Final = ("quantization_config", "quantization")
"""What says in a config.json how weights are packed; the second one is mlx's."""

STALE: Final = frozenset(
    {"dtypes.json"} | {says.source for layout in LAYOUTS for says in layout.evidence} - {METADATA, "config.json"}
)
"""Files that describe packed tensors."""


@dataclass(frozen=True, slots=True)
class Single:
    """A tensor that becomes one tensor of the same name."""

    output: Output

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.output.name

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The one tensor."""
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Decoded(Single):
    """A packed tensor to be decoded."""

    transpose: bool

    def pieces(self, checkpoint: Checkpoint, scratch: Scratch) -> Pieces:
        """Yield the values; return how many of them are infinite, which MXFP4 has no code for."""
        dtype, begin, overflow = decoded_dtype(DTYPES[self.output.dtype][1]), 0, 0
        parts = checkpoint.pieces(self.name, PIECE_BYTES, dtype=dtype, transpose=self.transpose)
        for _, part in parts:
            shape = swapped(part.shape) if self.transpose else part.shape
            out = scratch.empty(shape, dtype)
            if checkpoint.device == "cpu":
                part.decode(out=out, transpose=self.transpose, num_threads=1)
            else:
                as_numpy(part.decode(dtype, transpose=self.transpose, device=checkpoint.device, num_threads=1), out)
            overflow += count_overflow(part, out)
            yield 0, begin, out
            begin += out.nbytes
        return overflow


@dataclass(frozen=True, slots=True)
class Copied(Single):
    """A tensor that stays as it is."""

    def pieces(self, checkpoint: Checkpoint, scratch: Scratch) -> Pieces:  # noqa: ARG002
        """Yield its bytes."""
        begin = 0
        for _, part in checkpoint.pieces(self.name, PIECE_BYTES):
            yield 0, begin, np.ascontiguousarray(part)
            begin += part.nbytes


def copied(info: TensorInfo) -> Copied:
    """Return the item of a tensor that stays as it is; what has no dtype in safetensors, as in GGUF, becomes bytes."""
    return Copied(Output(info.name, info.dtype if info.dtype in DTYPES else "U8", info.shape))


def plan_conversion(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    beside: Path | None = None,
    dtype: DTypeLike = "bfloat16",
    transpose: str = "auto",
    max_shard_size: int = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Plan:
    """Return what `convert` is going to write, from headers alone.

    Parameters
    ----------
    checkpoint : Checkpoint
        The source.
    folder : Path
        The target.
    beside : Path, optional
        A folder whose other files go with the weights.
    dtype, transpose, max_shard_size, include, exclude
        As for `convert`.

    Raises
    ------
    LayoutError
        If a tensor is a broken pair, or could be in several layouts.
    ValueError
        If an argument does not fit.
    """
    wanted = decoded_dtype(dtype).name
    include, exclude = patterns(include), patterns(exclude)
    items: list[Item] = []
    layouts: set[str] = set()
    for name in select(checkpoint, include, exclude):
        info = checkpoint.info(name)
        shape = info.shape
        if info.layout is None:
            items.append(copied(info))
        else:
            layouts.add(info.layout)
            turned = is_turned(info.layout, shape, transpose)
            shape = swapped(shape) if turned else shape
            items.append(Decoded(Output(name, SAFETENSORS_DTYPES[wanted], shape), turned))
    if not items:
        raise ValueError(f"{checkpoint.folder}: no tensor is left to convert: see --include and --exclude")
    keep = bool(untouched(items))
    files = small_files(checkpoint, beside, folder, lambda config: plain_config(config, wanted, keep=keep))
    about = {
        "dtype": wanted,
        "transpose": transpose,
        "include": include,
        "exclude": exclude,
        "layouts": sorted(layouts),  # a forced one changes values without changing a header
    }
    return Plan(folder, make_shards(items, max_shard_size), *files, about, checkpoint)


def untouched(items: Iterable[Item]) -> list[str]:
    """Return the names of tensors that are quantised in another way, and stay so."""
    outputs = (item.output for item in items if isinstance(item, Copied))
    return [
        output.name
        for output in outputs
        if len(output.shape) > 1
        and (output.dtype.startswith(("F8", "F6", "F4")) or output.dtype in ("U8", "I8", "U32"))
    ]


def plain_config(config: dict[str, Any], dtype: str, *, keep: bool) -> dict[str, Any]:
    """Return a config.json without what says that weights are packed.

    Parameters
    ----------
    config : dict
    dtype : str
        Of the decoded weights.
    keep : bool
        Whether to keep what it says, for tensors that stay quantised in another way.
    """
    plain: dict[str, Any] = _without(config, ("expert_dtype", *(() if keep else QUANTIZATION_KEYS)))
    for part in (plain, plain.get("text_config")):
        if isinstance(part, dict):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    if "model_type" in plain and "torch_dtype" not in plain:
        plain["dtype"] = dtype
    return plain


def small_files(
    checkpoint: Checkpoint,
    beside: Path | None,
    target: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """Return what goes with weights: a changed config.json to be written, and files to be copied."""
    copies = {} if beside is None else _files_beside(beside, target)
    if not copies.pop("config.json", None):
        return {}, copies
    try:
        text = json.dumps(change(checkpoint.config), indent=2, ensure_ascii=False) + "\n"
        return {"config.json": text.encode()}, copies
    except (RecursionError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: cannot be written again: {error}") from error


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without(part, keys) for name, part in value.items() if name not in keys}


def _files_beside(folder: Path, target: Path) -> dict[str, Path]:
    """Return the files that go with weights, tokenizers for instance; folders that hold other weights do not."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in STALE:
            continue
        if path.is_dir():
            if not path.is_symlink() and not _is_other(path.resolve(), target.resolve()):
                found.update((f"{path.name}/{name}", inner) for name, inner in _files_beside(path, target).items())
        elif not _is_weights(path) and stat.S_ISREG(path.stat().st_mode):  # a link to nothing is an error
            found[path.name] = path
    return found


def _is_other(folder: Path, target: Path) -> bool:
    """Tell whether a folder is the target, or is becoming or holds another checkpoint."""
    inside = (path for path in folder.rglob("*") if not path.is_relative_to(target))
    return folder == target or any(_is_weights(path) or path.name == RECORD for path in inside)


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or path.name.endswith(".index.json")


def folder_beside(source: PathLike | Sequence[PathLike], checkpoint: Checkpoint) -> Path | None:
    """Return the folder whose other files go with a checkpoint: none if it was opened by the names of its files."""
    whole = isinstance(source, str | os.PathLike) and (checkpoint.index is not None or Path(source).is_dir())
    return checkpoint.folder if whole else None


@dataclass(frozen=True)
class Conversion(Run):
    """What `convert` did, or is going to do."""

    packed: int
    """Count of tensors that are decoded."""
    untouched: list[str]
    """Tensors that are quantised in another way, and were copied."""
    loader: str
    """Python code that loads the result."""
    verification: Verification | None

    @property
    def overflow(self) -> Mapping[str, int]:
        """Count of values too large for the dtype, by tensor, in what this run wrote."""
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
        """Yield what a person should know even if nothing else is to be shown."""
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
    max_shard_size: int = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    layout: str | None = None,
    io: str = "mmap",
    device: str = "cpu",
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Conversion:
    """Write a checkpoint with its packed tensors decoded, in bounded memory; a killed run can be gone on with.

    Parameters
    ----------
    source : path, or sequence of paths
        As for `Checkpoint`. Of a folder or an index, the small files beside the weights are copied as well, and
        config.json no longer says that the weights are packed.
    target : path
        A new or empty folder, not one around the source.
    dtype : str, type or numpy.dtype
        bfloat16, float16 or float32, of what was packed. All other tensors stay as they are.
    transpose : {"auto", "yes", "no"}
        Whether to swap the last two axes of what was packed. ``"auto"`` does it for the experts of gpt-oss under
        Hugging Face's names, ``[expert, in, out]``, as transformers wants them.
    max_shard_size : int
        Bytes of a file, as huggingface_hub counts them.
    include, exclude : str or iterable of str
        Shell-style patterns of logical names: those to write, all by default, and those to leave out.
    layout, io : str, optional
        See `Checkpoint`.
    device : str
        Where to decode. What is decoded comes back over the bus to be written, so that ``"cpu"`` is rarely slower.
    workers : int, optional
        Threads, each of which writes a shard at a time. By default as many as decoding uses.
    task : (int, int), optional
        ``(i, n)`` writes the i-th of n parts, counted from 1: for many processes or machines over one folder, in any
        order and any number of times. The last to finish writes the index.
    resume : bool
        Go on with what an earlier run with the same arguments left in the folder.
    force : bool
        Start over in a folder that holds an earlier run, or other files, of which those with the same names are
        replaced. Weights that no earlier run wrote are refused.
    verify : bool
        Decode again by the reference backend, and compare every byte.
    dry_run : bool
        Return the plan and write nothing.
    progress : callable
        Called with a `mxfp4np.shards.Progress` by one thread at a time; raising stops the conversion.

    Returns
    -------
    Conversion

    Raises
    ------
    FileNotFoundError, FileExistsError
        If the source is missing, or the target holds something.
    CheckpointError, LayoutError
        If the source is malformed, or the target was begun with other arguments.
    OSError
        If the disk is full. No shard that looks finished is left behind.
    ValueError
        If an argument does not fit.

    Notes
    -----
    What has its final name is complete and on disk; ``model.safetensors.index.json`` comes last. Same arguments, same
    bytes, whatever the workers.

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
        plan = plan_conversion(
            checkpoint,
            Path(target).absolute(),
            beside=folder_beside(source, checkpoint),
            dtype=dtype,
            transpose=transpose,
            max_shard_size=max_shard_size,
            include=include,
            exclude=exclude,
        )
        run = plan.run(part=task, resume=resume, force=force, dry_run=dry_run, workers=workers, progress=progress)
        verification = None
        if verify and not dry_run:
            verification = _verify(checkpoint, plan.tasks(task or (1, 1)), transpose, workers, progress)
    items = [item for shard in plan.shards for item in shard.items]
    return Conversion(
        **vars(run),
        packed=sum(isinstance(item, Decoded) for item in items),
        untouched=untouched(items),
        loader=_loader(plan),
        verification=verification,
    )


def _verify(
    checkpoint: Checkpoint,
    tasks: list[Task],
    transpose: str,
    workers: int | None,
    progress: Callable[[Progress], object],
) -> Verification:
    names = [output.name for task in tasks for item in task.shard.items for output in item.outputs]
    if not tasks:
        return Verification()
    with Checkpoint([task.path for task in tasks]) as written:
        return compare(checkpoint, written, names, transpose, workers=workers, progress=progress)


def _loader(plan: Plan) -> str:
    """Return Python code that loads what was converted."""
    config = json.loads(plan.documents.get("config.json", b"{}"))
    if "architectures" in config and "model_type" in config:
        return f"transformers.AutoModelForCausalLM.from_pretrained({str(plan.folder)!r}, dtype={plan.about['dtype']!r})"
    return f"mxfp4np.Checkpoint({str(plan.folder)!r})"
