"""Encode a checkpoint: chosen tensors are packed in a layout, all others copied, config.json adapted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..checkpoint import Checkpoint
from ..codec import encode
from ..errors import LayoutError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, RULES, SCALE_NAN, Rule, dtype_named
from ..layouts.packed import TensorInfo
from ..layouts.table import ENCODED_LAYOUTS, EncodedLayout, Transpose
from ..shapes import place_in_whole, swapped
from ..storage.discover import IO, Location, PathLike
from ..storage.tensorfile import DTYPES, element
from ..text import count, escape, format_bytes, patterns
from .choose import FORMS, LAYOUT_NAMED, Choice, Left
from .cluster import Engine, running
from .config import Change, Source, encoded_config, kept_metadata, small_files
from .findings import Verification
from .plan import MAX_SHARD_SIZE, Chunks, Copied, Item, Output, Plan, make_shards
from .quantization import module_of
from .run import Run, refuse_incomplete, run_plan, tasks_of
from .verify import compare, compare_encoded
from .workers import Progress

CHUNK_BYTES: Final = 8 << 20
"""Bytes of values that a thread has in memory at a time. Computing the errors takes about ten times as much memory."""


SHOWN_ERRORS: Final = 8
"""Tensors whose errors a notebook shows: those with the largest."""


class Errors(NamedTuple):
    """How far the encoded values of a tensor are from the original ones."""

    error: float
    """Sum of squared differences."""
    norm: float
    """Sum of squared values."""
    worst: float
    """Largest relative error of a block, by its root sums of squares."""
    worst_block: tuple[int, ...]
    """Which block: the index of its row, and its number in the row."""
    nan_blocks: int
    """Blocks that had a NaN or an infinity, and are NaN now. The other figures leave them out."""

    @property
    def relative(self) -> float:
        """The relative Frobenius error."""
        return relative_error([self])

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "relative_error": self.relative,
            "worst_block_error": self.worst,
            "worst_block": list(self.worst_block),
            "nan_blocks": self.nan_blocks,
        }


def relative_error(several: Collection[Errors]) -> float:
    """Return the relative Frobenius error of several tensors together."""
    norm = sum(errors.norm for errors in several)
    return math.sqrt(sum(errors.error for errors in several) / norm) if norm else 0.0


@dataclass(frozen=True)
class Encoded(Item):
    """A plain tensor to be packed; its outputs are codes and scales."""

    transpose: bool
    rule: Rule

    def chunks(self, checkpoint: Checkpoint, reports: dict[str, Any]) -> Chunks:
        """Yield codes and scales; report the `Errors`."""
        total = Errors(0.0, 0.0, 0.0, (), 0)
        for index, values in checkpoint.pieces(self.name, CHUNK_BYTES, transpose=self.transpose):
            packed = encode(values, self.rule, num_threads=1)
            total = _add_errors(total, index, values, packed)
            yield from enumerate((packed.blocks, packed.scales))
        reports[self.name] = total


def _warm_up(rule: Rule, dtypes: Iterable[str]) -> None:
    """Encode one block in each way that `Encoded` does."""
    for dtype in dtypes:
        encode(np.zeros(BLOCK_SIZE, dtype_named(dtype)), rule, num_threads=1).decode("float32", num_threads=1)


def _add_errors(total: Errors, index: tuple[int | slice, ...], values: NDArray[Any], packed: MXFP4Array) -> Errors:
    """Add the errors of the chunk that lies at ``index``."""
    blocks = (*packed.scales.shape, BLOCK_SIZE)
    wanted = values.astype(np.float32).reshape(blocks)
    with np.errstate(invalid="ignore"):  # NaN blocks are left out below
        difference = packed.decode("float32", num_threads=1).reshape(blocks) - wanted
        error = np.einsum("...i,...i->...", difference, difference, dtype=np.float64)
        norm = np.einsum("...i,...i->...", wanted, wanted, dtype=np.float64)
    nan = packed.scales == SCALE_NAN
    error[nan] = norm[nan] = 0
    relative = np.sqrt(np.divide(error, norm, out=np.zeros_like(error), where=norm > 0))
    worst, place = total.worst, total.worst_block
    if relative.max(initial=0) > worst:
        worst = float(relative.max())
        *within, block = np.unravel_index(int(relative.argmax()), relative.shape)
        *rows, element = place_in_whole(index, (*within, BLOCK_SIZE * block))
        place = (*rows, element // BLOCK_SIZE)
    nan_blocks = total.nan_blocks + int(np.count_nonzero(nan))
    return Errors(total.error + float(error.sum()), total.norm + float(norm.sum()), worst, place, nan_blocks)


def plan_encoding(
    checkpoint: Checkpoint,
    folder: Path,
    source: Source = None,
    rule: Rule = RULES[0],
    layout: EncodedLayout = ENCODED_LAYOUTS[0],
    transpose: Transpose = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Plan:
    """Return what `encode_checkpoint` is going to write to ``folder``, from headers alone.

    The arguments are those of `encode_checkpoint`; without ``source`` no small files are copied.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, found {rule!r}")
    if layout not in FORMS:
        raise ValueError(f"layout must be one of {', '.join(FORMS)}, found {layout!r}")
    include, exclude = patterns(include), patterns(exclude)
    choice = Choice(checkpoint, layout, transpose, include, exclude)
    if not choice.chosen:
        names = ", ".join(include or FORMS[layout].include)
        raise ValueError(
            f"{checkpoint.folder}: no tensor called {names} that {layout} could pack: see --layout and --include"
        )
    items: list[Item] = []
    for name, info in choice.infos.items():
        obstacle = choice.obstacle(info) if name in choice.chosen else None
        if info.format is not None:
            how = f"as {info.layout}" if info.format == "MXFP4" else f"it is {info.format}"
            obstacle = f"is quantised already, {how}: convert the checkpoint first"
        if obstacle is not None:
            raise LayoutError(f"{info.stored[0].file.path}: tensor {name!r} {obstacle}")
        transposed = choice.is_transposed(info)
        items.append(_encoded(info, layout, rule, transposed=transposed) if name in choice.chosen else Copied.of(info))
    plain = [module_of(x.name) for x in choice.infos.values() if x.name not in choice.chosen and len(x.shape) > 1]
    changes: dict[str, Change] = {"config.json": lambda config: encoded_config(config, layout, plain)}
    files = small_files(checkpoint, source, folder, changes)
    options = {
        "rule": rule,
        "layout": layout,
        "transpose": transpose,
        "include": include,
        "exclude": exclude,
    }
    warm_up = partial(_warm_up, rule, {element(choice.infos[name].dtype)[1] for name in choice.chosen})
    shards = make_shards(items, max_shard_size, kept_metadata(checkpoint, items))
    return Plan(folder, shards, files.written, files.copied, options, checkpoint, warm_up, files.left_out, files.notes)


def _encoded(info: TensorInfo, layout: str, rule: Rule, *, transposed: bool) -> Encoded:
    known = LAYOUT_NAMED[layout]
    *rows, size = swapped(info.shape) if transposed else info.shape
    scales, dtype = (*rows, size // BLOCK_SIZE), known.codes_dtypes[0]
    codes = (*scales, BYTES_PER_BLOCK) if known.blocks_axis else (*rows, size * 4 // DTYPES[dtype][0])
    stem = info.name.removesuffix(known.weight)
    outputs = (
        Output(f"{stem}{known.codes}", dtype, codes),
        Output(f"{stem}{known.scales}", known.scales_dtypes[0], scales),
    )
    return Encoded(info.name, outputs, transposed, rule)


@dataclass(frozen=True, repr=False)
class Encoding(Run):
    """What `encode_checkpoint` did, or is going to do."""

    packed: list[str]
    """Names of the tensors that are packed."""
    left: list[Left]
    """Matrices of floats that are not packed although the caller did not exclude them, largest first."""
    largest: int
    """Bytes of the largest tensor that is packed, before."""
    verification: Verification | None

    @property
    def errors(self) -> Mapping[str, Errors]:
        """The errors of each tensor that this run packed, by its name."""
        return self.reports

    @property
    def relative_error(self) -> float:
        """The relative Frobenius error of all these tensors together."""
        return relative_error(self.errors.values())

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            **super().to_json(),
            "packed": self.packed,
            "left": [matrix._asdict() for matrix in self.left],
            "verification": None if self.verification is None else self.verification.to_json(),
            "relative_error": self.relative_error,
            "errors": {name: errors.to_json() for name, errors in self.errors.items()},
        }

    def plan_lines(self) -> Iterator[str]:
        """Yield what is going to be written, for a person."""
        yield from (f"packed: {escape(name)}" for name in self.packed)
        yield from super().plan_lines()
        yield from self._left_lines()

    def _left_lines(self) -> Iterator[str]:
        """Yield what was left as it is, if any of it is as large as all that is packed."""
        if self.left and self.left[0].nbytes >= self.largest:
            name, _, reason = self.left[0]
            nbytes = format_bytes(sum(matrix.nbytes for matrix in self.left))
            yield (
                f"left as they are: {count(len(self.left), 'tensor')}, {nbytes}, the largest {escape(name)}, which "
                f"{escape(reason)}; --include chooses others"
            )

    def facts(self) -> list[tuple[str, str]]:
        """Return what a notebook shows: headings and texts; of errors, the largest."""
        largest = sorted(self.errors.items(), key=lambda item: item[1].relative, reverse=True)[:SHOWN_ERRORS]
        verified = [] if self.verification is None else [("verification", self.verification.summary)]
        return [
            ("packed", count(len(self.packed), "tensor")),
            *super().facts(),
            *verified,
            ("relative error", f"{self.relative_error:.4f}; the largest:"),
            *((name, f"{errors.relative:.4f}, worst block {errors.worst:.4f}") for name, errors in largest),
        ]

    def warnings(self) -> Iterator[str]:
        """Yield what a person should know even if nothing else is shown."""
        yield from super().warnings()
        broken = {name: errors.nan_blocks for name, errors in sorted(self.errors.items()) if errors.nan_blocks}
        if broken:
            yield (
                f"had NaN or infinity, and decode to NaN: {count(sum(broken.values()), 'block')} in "
                f"{count(len(broken), 'tensor')}, {escape(next(iter(broken)))} first"
            )

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        for name, errors in sorted(self.errors.items()):
            worst = f", worst block {errors.worst:.4f} at {list(errors.worst_block)}" if errors.worst else ""
            nan = f", {count(errors.nan_blocks, 'NaN block')}" if errors.nan_blocks else ""
            yield f"{escape(name)}: relative error {errors.relative:.4f}{worst}{nan}"
        yield from super().lines()
        packed = count(len(self.packed), "tensor")
        yield f"{packed} packed; relative error of those written now: {self.relative_error:.4f}"
        yield from self._left_lines()
        if self.verification is not None:
            yield from self.verification.lines()


def encode_checkpoint(
    source: Location | Sequence[Location],
    target: PathLike,
    *,
    rule: Rule = RULES[0],
    layout: EncodedLayout = ENCODED_LAYOUTS[0],
    transpose: Transpose = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    io: IO = "mmap",
    num_threads: int | None = None,
    engine: Engine = "threads",
    task: tuple[int, int] | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Encoding:
    """Write a checkpoint with its weights packed as MXFP4, in bounded memory; a killed run can be resumed.

    Parameters
    ----------
    source : path, or sequence of paths
        As for `Checkpoint`, not packed. Of a folder or an index, the small files beside the weights are copied as well,
        and config.json then says how the weights are packed.
    target : path
        A new or empty folder that does not contain the source.
    rule : {"even", "floor", "rceil", "ceil"}
        How the scale of a block is chosen from its largest magnitude; see `encode`.
    layout : {"gpt-oss-hf", "gpt-oss", "compressed-tensors", "mlx"}
        How packed weights are named and stored.
    transpose : {"auto", "yes", "no"}
        Whether to swap the last two axes before packing, which goes along the last one: that of the inputs.
        ``"auto"`` does it for stacked experts that are ``[expert, in, out]``, as their shapes show; without that, for
        ``"gpt-oss-hf"``. What would be packed along its outputs is refused, and so is, with ``"auto"``, what may be
        either.
    include, exclude : str or iterable of str
        Shell-style patterns of names: those to pack, and those to copy. By default, the experts of gpt-oss are packed;
        in the other layouts all matrices called ``weight`` with a multiple of 32 inputs, except heads, embeddings,
        routers and gates, norms, positions, convolutions and low-rank adapters, by their names.
    verify : bool
        Encode again by the reference backend, and compare every byte, as `verify` does later.
    max_shard_size, io, num_threads, engine, task, resume, force, dry_run, progress
        As for `convert`.

    Returns
    -------
    Encoding

    Raises
    ------
    FileNotFoundError, FileExistsError
        If the source is missing, or the target is not empty.
    CheckpointError, LayoutError
        If the source is malformed, packed already, or has an included tensor that cannot be packed; or if the target
        was begun with other arguments.
    OSError
        If the disk is full. No shard that looks finished is left behind.
    ValueError
        If an argument does not fit.

    Notes
    -----
    The relative error of a tensor or block is the Frobenius norm of the difference between decoded and original values,
    divided by the Frobenius norm of the original values. Blocks with NaN or infinity are counted, and left out.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> folder = tempfile.mkdtemp()
    >>> mxfp4np.save_file({"m.experts.down_proj": np.ones((2, 64, 3), np.float16)}, folder + "/model.safetensors")
    >>> result = mxfp4np.encode_checkpoint(folder, folder + "/mxfp4")
    >>> result.complete, result.packed, result.relative_error
    (True, ['m.experts.down_proj'], 0.0)
    >>> mxfp4np.Checkpoint(folder + "/mxfp4").info("m.experts.down_proj").shape
    (2, 3, 64)
    """
    with Checkpoint(source, io=io) as checkpoint, running(engine):
        refuse_incomplete(checkpoint)
        target = Path(target).absolute()
        plan = plan_encoding(checkpoint, target, source, rule, layout, transpose, max_shard_size, include, exclude)
        run = run_plan(plan, task, num_threads, progress, engine, resume=resume, force=force, dry_run=dry_run)
        tasks = tasks_of(plan, task)
        verification = Verification() if verify and not dry_run else None
        if verification is not None and tasks:
            items = [item for task in tasks for item in task.shard.items]
            with Checkpoint([task.path for task in tasks]) as written:
                names = [item.name for item in items if not isinstance(item, Encoded)]
                copied = {name: checkpoint.stored_tensors(name) for name in names}
                verification = compare(checkpoint, written, names, copied, transpose, num_threads, progress, engine)
                names = [item.name for item in items if isinstance(item, Encoded)]
                encoded = compare_encoded(checkpoint, written, names, rule, transpose, num_threads, progress, engine)
                verification.add(encoded)
        packed = [item.name for item in plan.items if isinstance(item, Encoded)]
        left = [] if patterns(include) else Choice(checkpoint, layout, transpose, (), patterns(exclude)).left
        largest = max(checkpoint.info(name).nbytes for name in packed)
    return Encoding(**vars(run), packed=packed, left=left, largest=largest, verification=verification)
