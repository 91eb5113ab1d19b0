"""What ``mxfp4np inspect`` shows: the tensors of a checkpoint in a table, and histograms of packed ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..checkpoint import Checkpoint
from ..format import BLOCK_SIZE, FP4_VALUES, SCALE_BIAS, SCALE_NAN
from ..layouts.packed import Reader, TensorInfo
from ..layouts.table import wants_transpose
from ..scaled import ScaledArray
from ..summary import Row, label
from ..text import align, count, format_bytes, shape_text

STATS_BYTES: Final = 4 << 20
"""Packed bytes that are counted at a time; counting takes about eight times as much memory."""


Packed = TypeVar("Packed", MXFP4Array, ScaledArray)

MOST_EXPERTS: Final = 4096
"""Longest first axis, of three or more, whose indices are counted one by one."""

AXES: Final = "[.., out, in]"
SWAPPED: Final = "[.., in, out]"
"""The axes of packed matrices as they are stored and decoded, and transposed."""


def parts_of(
    array: MXFP4Array | ScaledArray, index: Sequence[int | slice], chunk: Packed
) -> Iterator[tuple[int, Packed]]:
    """Yield the parts of a chunk by their number along the array's first axis, of three or more: that of experts."""
    first = index[0] if index else slice(0, None)
    if array.ndim < 3 or len(array) > MOST_EXPERTS:
        yield 0, chunk
    elif isinstance(first, int):
        yield first, chunk
    else:
        yield from enumerate(chunk, first.start)


def no_cells(array: MXFP4Array | ScaledArray) -> NDArray[np.int64]:
    """Return the counts by expert of an array of which nothing is counted yet."""
    return np.zeros((len(array) if array.ndim > 2 and len(array) <= MOST_EXPERTS else 1, 4), np.int64)


def cell(used: NDArray[np.int64], zeros: int) -> NDArray[np.int64]:
    """Return what is kept of an expert: number and sum of ``used`` scales by their bytes, zeros, and NaN scales."""
    numbers = used[:SCALE_NAN]
    return np.array([numbers.sum(), numbers @ np.arange(SCALE_NAN), zeros, used[SCALE_NAN]])


@dataclass
class Stats:
    """Counts over packed blocks."""

    bytes_: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    scales: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    zero_blocks: int = 0
    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    """By expert, of one tensor: blocks that are not zero, the sum of their scales, zero blocks, NaN blocks."""

    def add(self, source: MXFP4Array | Reader, progress: Callable[[int], object] = lambda _: None) -> None:
        """Count the blocks of a packed array, or of what is read.

        ``progress`` is called with the number of packed bytes counted since the last call.
        """
        array = source.array if isinstance(source, Reader) else source
        self.cells = no_cells(array)
        for index, chunk in source.iter_chunks(4 * STATS_BYTES):
            for expert, part in parts_of(array, index, chunk):
                self.bytes_ += np.bincount(part.blocks.reshape(-1), minlength=256)
                scales = np.bincount(part.scales.reshape(-1), minlength=256)
                zero = ~(part.blocks & 0x77).any(axis=-1) & (part.scales != SCALE_NAN)
                zeros = np.bincount(part.scales[zero], minlength=256)
                self.scales += scales
                self.zero_blocks += int(zeros.sum())
                self.cells[expert] += cell(scales - zeros, int(zeros.sum()))
            progress(chunk.nbytes)

    @classmethod
    def merged(cls, several: Iterable[Stats]) -> Stats:
        """Return the sum of several counts."""
        total = cls()
        for one in several:
            total.bytes_ += one.bytes_
            total.scales += one.scales
            total.zero_blocks += one.zero_blocks
        return total

    @property
    def codes(self) -> NDArray[np.int64]:
        """Count of each of the 16 codes."""
        table = self.bytes_.reshape(16, 16)
        counts: NDArray[np.int64] = table.sum(axis=0) + table.sum(axis=1)
        return counts

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain numbers."""
        return {
            "blocks": int(self.scales.sum()),
            "zero_blocks": self.zero_blocks,
            "nan_scales": int(self.scales[SCALE_NAN]),
            "negative_zeros": int(self.codes[8]),
            "codes": self.codes.tolist(),
            "scales": {int(scale): int(self.scales[scale]) for scale in np.flatnonzero(self.scales)},
        }

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        blocks, elements = max(1, int(self.scales.sum())), max(1, int(self.codes.sum()))
        yield (
            f"zero blocks {self.zero_blocks / blocks:.2%}, NaN scales {self.scales[SCALE_NAN] / blocks:.2%}, "
            f"-0.0 {self.codes[8] / elements:.2%}"
        )
        yield from _scale_lines(self.scales)
        for code, value in enumerate(FP4_VALUES):
            yield _bar("value", f"{value:+g}" if code else "0", int(self.codes[code]), elements)


@dataclass
class ScaleStats:
    """Counts of the scales of FP8, MXFP8 and NVFP4, by their powers of two."""

    scales: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    zeros: int = 0
    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    """By expert, of one tensor: scales that are not zero, the sum of their exponents, zero scales, NaN scales."""

    def add(self, source: ScaledArray | Reader, progress: Callable[[int], object] = lambda _: None) -> None:
        """Count the scales of an array; see `Stats.add`."""
        array = source.array if isinstance(source, Reader) else source
        self.cells = no_cells(array)
        for index, chunk in source.iter_chunks(4 * STATS_BYTES) if array.block_size <= BLOCK_SIZE else [((), array)]:
            for expert, part in parts_of(array, index, chunk):
                exponents, count = part.exponents(), part.count_scales()
                self.cells[expert] += cell(np.bincount(exponents, minlength=256), count - exponents.size)
            exponents, count = chunk.exponents(), chunk.count_scales()
            self.scales += np.bincount(exponents, minlength=256)
            self.zeros += count - exponents.size
            progress(chunk.nbytes)

    @classmethod
    def merged(cls, several: Iterable[ScaleStats]) -> ScaleStats:
        """Return the sum of several counts."""
        total = cls()
        for one in several:
            total.scales += one.scales
            total.zeros += one.zeros
        return total

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain numbers; scales by their exponents, with the bias of E8M0."""
        return {
            "zero_scales": self.zeros,
            "nan_scales": int(self.scales[SCALE_NAN]),
            "scales": {int(scale): int(self.scales[scale]) for scale in np.flatnonzero(self.scales)},
        }

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        total = max(1, int(self.scales.sum()) + self.zeros)
        yield (
            f"{count(total, 'scale')}, zero {self.zeros / total:.2%}, "
            f"NaN or infinite {self.scales[SCALE_NAN] / total:.2%}"
        )
        yield from _scale_lines(self.scales)


def stats_of(source: Any, progress: Callable[[int], object]) -> Stats | ScaleStats:
    """Return what is counted of a packed array, or by a `Reader`, of one."""
    array = source.array if isinstance(source, Reader) else source
    stats = Stats() if isinstance(array, MXFP4Array) else ScaleStats()
    stats.add(source, progress)
    return stats


def countable(table: Iterable[Row]) -> list[tuple[Row, TensorInfo]]:
    """Return the packed tensors of which something is counted."""
    infos = ((row, row.info) for row in table if row.info is not None)
    return [(row, info) for row, info in infos if info.format == "MXFP4" or info.layout not in (None, "gguf")]


def _scale_lines(counts: NDArray[np.int64]) -> Iterator[str]:
    """Yield a histogram of scales by their exponents."""
    used, total = np.flatnonzero(counts), int(counts.sum())
    for scale in range(used[0], used[-1] + 1) if len(used) else ():
        if counts[scale] or len(used) > 1:
            yield _bar("scale", "NaN" if scale == SCALE_NAN else f"2^{scale - SCALE_BIAS}", int(counts[scale]), total)


def _bar(what: str, label: str, count: int, total: int) -> str:
    share = count / total
    return f"{what} {label:>6} {share:7.2%} {'#' * math.ceil(50 * share)}"


def table_lines(groups: dict[tuple[Any, ...], list[Row]]) -> list[str]:
    """Return one line for each group, and the totals."""
    lines: list[tuple[str, ...]] = [("NAME", "", "SHAPE", "DTYPE", "LAYOUT", "STORED", "DECODED")]
    problems = []
    reasons: dict[str, None] = {}
    formats = Counter(MXFP4=0)
    total = stored = decoded = 0
    for kind, group in groups.items():
        name, times = label(group), f"x{len(group)}" if len(group) > 1 else ""
        infos = [row.info for row in group if row.info is not None]
        total += len(group)
        if not infos:
            problems.append(kind[1])
            lines.append((name, times, "", "broken", "", "", ""))
            continue
        shape, dtype, layout = kind[1:]
        sizes = sum(info.nbytes for info in infos), sum(info.decoded_nbytes() for info in infos)
        stored, decoded = stored + sizes[0], decoded + sizes[1]
        formats.update(info.format for info in infos if info.format)
        if layout:
            reasons |= dict.fromkeys(f"layout {layout}: {info.reason}{_orientation(info)}" for info in infos)
        cells = shape_text(shape), dtype, layout or "-"
        lines.append((name, times, *cells, *map(format_bytes, sizes)))
    kinds = ", ".join(f"{number:,} of them {name}" for name, number in formats.items())
    summary = f"{count(total, 'tensor')}, {kinds}: {format_bytes(stored)} stored, "
    summary += f"{format_bytes(decoded)} with packed ones decoded to bfloat16"
    return [*align(lines), *problems, *reasons, summary]


def file_lines(checkpoint: Checkpoint) -> list[str]:
    """Return what is doubtful about the choice of files, and which weights beside them are not part of it."""
    lines = [*checkpoint.findings, *checkpoint.notes]
    if checkpoint.beside:
        lines.append(f"not part of it: {', '.join(file.name for file in checkpoint.beside)}")
    return lines


def to_json(checkpoint: Checkpoint, table: Sequence[Row], stats: Mapping[str, Stats | ScaleStats]) -> dict[str, Any]:
    """Return everything as plain objects."""
    infos = [row.info for row in table if row.info is not None]
    return {
        "files": [str(file) for file in checkpoint.files],
        "beside": [str(file) for file in checkpoint.beside],
        "findings": checkpoint.findings,
        "notes": checkpoint.notes,
        "tensors": [_row_json(row, stats) for row in table],
        "totals": {
            "tensors": len(table),
            "packed": sum(info.layout is not None for info in infos),
            "nbytes": sum(info.nbytes for info in infos),
            "decoded_nbytes": sum(info.decoded_nbytes() for info in infos),
        },
    }


def _axes(info: TensorInfo) -> dict[str, str]:
    """Return which axes a packed matrix has as it is stored, and after `convert`."""
    if info.layout is None or len(info.shape) < 2:
        return {}
    return {"axes": AXES, "converted_axes": SWAPPED if wants_transpose(info.layout, info.shape, "auto") else AXES}


def _orientation(info: TensorInfo) -> str:
    axes = _axes(info)
    converted = f", {SWAPPED} after convert" if SWAPPED in axes.values() else ""
    return f"; axes {AXES}{converted}" if axes else ""


def _row_json(row: Row, stats: Mapping[str, Stats | ScaleStats]) -> dict[str, Any]:
    if row.info is None:
        return {"name": row.name, "problem": row.problem}
    return {
        "name": row.name,
        "shape": row.info.shape,
        "dtype": row.info.dtype,
        "layout": row.info.layout,
        "format": row.info.format,
        "reason": row.info.reason,
        **_axes(row.info),
        "nbytes": row.info.nbytes,
        "decoded_nbytes": row.info.decoded_nbytes(),
        "stored": [{**half._asdict(), "file": str(half.file.path)} for half in row.info.stored],
        **({"stats": stats[row.name].to_json()} if row.name in stats else {}),
    }
