"""Encode a checkpoint: chosen tensors are packed in a layout, all others copied, config.json adapted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, RULES, SCALE_NAN, dtype_named
from ..format import DTYPES as FLOATS
from ..layouts.packed import TensorInfo
from ..layouts.table import ENCODED_LAYOUTS, LAYOUTS, wants_transpose
from ..shapes import place_in_whole, swapped
from ..storage.discover import PathLike
from ..storage.tensorfile import DTYPES, element
from ..text import count, escape, patterns, select
from .config import Source, encoded_config, kept_metadata, small_files
from .plan import MAX_SHARD_SIZE, Chunks, Copied, Item, Output, Plan, make_shards
from .run import Run, refuse_incomplete, run_plan
from .workers import Progress

CHUNK_BYTES: Final = 8 << 20
"""Bytes of values that a thread has in memory at a time. Computing the errors takes about ten times as much memory."""


class Form(NamedTuple):
    """Which tensors a layout packs."""

    include: tuple[str, ...]
    """Patterns of their names, unless the caller gives some."""
    exclude: tuple[str, ...] = ()
    axes: tuple[int, ...] = (2, 3)
    """Numbers of axes that a packed tensor can have."""
    exact: bool = False
    """Whether models of this layout pack all of the included tensors and no others."""


_NOT_PACKED: Final = ("*embed*", "*lm_head*", "*norm*", "*router*", "*.gate.weight", "*.wte.*", "*.wpe.*")

FORMS: Final = {
    "gpt-oss-hf": Form(("*.experts.gate_up_proj", "*.experts.down_proj"), axes=(3,), exact=True),
    "gpt-oss": Form(("*.mlp1_weight", "*.mlp2_weight"), axes=(3,), exact=True),
    "compressed-tensors": Form(("*.weight",), _NOT_PACKED, axes=(2,)),
    "mlx": Form(("*.weight",), _NOT_PACKED),
}
"""The layouts that checkpoints are encoded to."""

_LAYOUTS: Final = {layout.name: layout for layout in LAYOUTS}


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
        return math.sqrt(self.error / self.norm) if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "relative_error": self.relative,
            "worst_block_error": self.worst,
            "worst_block": list(self.worst_block),
            "nan_blocks": self.nan_blocks,
        }


@dataclass(frozen=True)
class Encoded(Item):
    """A plain tensor to be packed; its outputs are codes and scales."""

    transpose: bool
    rule: str

    def chunks(self, checkpoint: Checkpoint, reports: dict[str, Any]) -> Chunks:
        """Yield codes and scales; report the `Errors`."""
        total = Errors(0.0, 0.0, 0.0, (), 0)
        for index, values in checkpoint.pieces(self.name, CHUNK_BYTES, transpose=self.transpose):
            packed = encode(values, self.rule, num_threads=1)
            total = _add_errors(total, index, values, packed)
            yield from enumerate((packed.blocks, packed.scales))
        reports[self.name] = total


def _warm_up(rule: str, dtypes: Iterable[str]) -> None:
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
    rule: str = RULES[0],
    layout: str = ENCODED_LAYOUTS[0],
    transpose: str = "auto",
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
    form, include, exclude = FORMS[layout], patterns(include), patterns(exclude)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    if include:
        chosen = set(select(infos, include, exclude))
    else:
        chosen = set(select(infos, form.include, (*form.exclude, *exclude)))
        if not form.exact:
            chosen = {name for name in chosen if _obstacle(infos[name], layout, transpose) is None}
    if not chosen:
        names = ", ".join(include or form.include)
        raise ValueError(
            f"{checkpoint.folder}: no tensor called {names} that {layout} could pack: see --layout and --include"
        )
    items: list[Item] = []
    for name, info in infos.items():
        obstacle = _obstacle(info, layout, transpose) if name in chosen else None
        if info.layout is not None:
            obstacle = f"is packed already, as {info.layout}: convert the checkpoint first"
        if obstacle is not None:
            raise LayoutError(f"{info.stored[0].file.path}: tensor {name!r} {obstacle}")
        items.append(_encoded(info, layout, transpose, rule) if name in chosen else Copied.of(info))
    matrices = (name for name, info in infos.items() if name.endswith(".weight") and len(info.shape) == 2)
    plain = [name for name in matrices if name not in chosen]
    files = small_files(checkpoint, source, folder, lambda config: encoded_config(config, layout, plain))
    options = {"rule": rule, "layout": layout, "transpose": transpose, "include": include, "exclude": exclude}
    warm_up = partial(_warm_up, rule, {element(infos[name].dtype)[1] for name in chosen})
    shards = make_shards(items, max_shard_size, kept_metadata(checkpoint, items))
    return Plan(folder, shards, files.written, files.copied, options, checkpoint, warm_up, files.left_out)


def _obstacle(info: TensorInfo, layout: str, transpose: str) -> str | None:
    """Return why a tensor cannot be packed in this layout, or None."""
    known, form = _LAYOUTS[layout], FORMS[layout]
    shape = swapped(info.shape) if wants_transpose(layout, info.shape, transpose) else info.shape
    if info.layout is None and info.format is not None:
        return f"is {info.format} already"
    if info.layout is None and element(info.dtype)[1] not in FLOATS:
        return f"is {info.dtype}: expected BF16, F16 or F32"
    if not info.name.endswith(known.weight):
        return f"cannot be named as {layout} names packed ones: expected a name that ends in {known.weight!r}"
    if form.exact and not select([info.name], form.include, ()):
        return f"is none that {layout} packs: those are {' and '.join(form.include)}"
    if len(shape) not in form.axes:
        return f"has shape {list(info.shape)}: expected {' or '.join(map(str, form.axes))} axes"
    if shape[-1] % BLOCK_SIZE:
        return f"has shape {list(info.shape)}: expected a multiple of {BLOCK_SIZE} inputs, found {shape[-1]}"
    return None


def _encoded(info: TensorInfo, layout: str, transpose: str, rule: str) -> Encoded:
    known, transposed = _LAYOUTS[layout], wants_transpose(layout, info.shape, transpose)
    *rows, size = swapped(info.shape) if transposed else info.shape
    scales, dtype = (*rows, size // BLOCK_SIZE), known.codes_dtypes[0]
    codes = (*scales, BYTES_PER_BLOCK) if known.blocks_axis else (*rows, size * 4 // DTYPES[dtype][0])
    stem = info.name.removesuffix(known.weight)
    outputs = (
        Output(f"{stem}{known.codes}", dtype, codes),
        Output(f"{stem}{known.scales}", known.scales_dtypes[0], scales),
    )
    return Encoded(info.name, outputs, transposed, rule)


@dataclass(frozen=True)
class Encoding(Run):
    """What `encode_checkpoint` did, or is going to do."""

    packed: list[str]
    """Names of the tensors that are packed."""

    @property
    def errors(self) -> Mapping[str, Errors]:
        """The errors of each tensor that this run packed, by its name."""
        return self.reports

    @property
    def relative_error(self) -> float:
        """The relative Frobenius error of all these tensors together."""
        norm = sum(errors.norm for errors in self.errors.values())
        return math.sqrt(sum(errors.error for errors in self.errors.values()) / norm) if norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            **super().to_json(),
            "packed": self.packed,
            "relative_error": self.relative_error,
            "errors": {name: errors.to_json() for name, errors in self.errors.items()},
        }

    def plan_lines(self) -> Iterator[str]:
        """Yield what is going to be written, for a person."""
        yield from (f"packed: {escape(name)}" for name in self.packed)
        yield from super().plan_lines()

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


def encode_checkpoint(
    source: PathLike | Sequence[PathLike],
    target: PathLike,
    *,
    rule: str = RULES[0],
    layout: str = ENCODED_LAYOUTS[0],
    transpose: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    io: str = "mmap",
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    resume: bool = False,
    force: bool = False,
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
        Whether to swap the last two axes before packing, which goes along the last one. ``"auto"`` does it for
        ``"gpt-oss-hf"``, whose experts are ``[expert, in, out]`` before and ``[expert, out, in]`` after.
    include, exclude : str or iterable of str
        Shell-style patterns of names: those to pack, and those to copy. By default, the experts of gpt-oss are packed;
        in the other layouts all matrices called ``weight`` with a multiple of 32 inputs, except embeddings,
        ``lm_head``, norms and routers.
    max_shard_size, io, workers, task, resume, force, dry_run, progress
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
    with Checkpoint(source, io=io) as checkpoint:
        refuse_incomplete(checkpoint)
        target = Path(target).absolute()
        plan = plan_encoding(checkpoint, target, source, rule, layout, transpose, max_shard_size, include, exclude)
        run = run_plan(plan, task, workers, progress, resume=resume, force=force, dry_run=dry_run)
    return Encoding(**vars(run), packed=[item.name for item in plan.items if isinstance(item, Encoded)])
