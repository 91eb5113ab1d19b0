"""Check a checkpoint, alone or against the one it was converted from; whatever does not hold is a finding."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..checkpoint import Checkpoint
from ..cli.report import count, escape, format_bytes
from ..errors import CheckpointError, LayoutError, TensorNotFoundError
from ..format import DTYPES as DECODED
from ..format import SCALE_BIAS, SCALE_NAN
from ..info import TensorInfo
from ..layouts.table import TRANSPOSE
from ..layouts.table import wants_transpose as is_turned
from ..selection import select
from ..shapes import place_in_whole, swapped
from ..storage.discover import PathLike, read_json, weight_map_of
from ..storage.dtypes import DTYPES, element
from .plan import RECORD, Crew, Progress

PIECE_BYTES: Final = 4 << 20
"""Decoded bytes that a thread compares at a time; the reference needs some twenty times as many for itself."""

PLAUSIBLE: Final = range(SCALE_BIAS - 64, SCALE_BIAS + 33)
"""Scales of weights. Where the middle one is outside, bytes were converted that should have been viewed."""

_NUMBERED: Final = re.compile(r"(.+)-(\d+)-of-(\d+)\.(?:safetensors|uqff|gguf)")
"""Names of files that say how many there are."""


@dataclass
class Verification:
    """What was checked, and what was found."""

    tensors: int = 0
    nbytes: int = 0
    """Bytes compared, or looked at."""
    nan_blocks: int = 0
    """Blocks whose scale is NaN."""
    overflow: int = 0
    """Values too large for their dtype, infinite therefore."""
    findings: list[str] = field(default_factory=list)
    """What does not hold, a sentence each."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "nan_blocks": self.nan_blocks,
            "overflow": self.overflow,
            "findings": self.findings,
        }

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        yield from map(escape, self.findings)
        found = count(len(self.findings), "finding") if self.findings else "nothing wrong"
        nan = f"; {count(self.nan_blocks, 'NaN block')}" if self.nan_blocks else ""
        overflow = f"; {count(self.overflow, 'value')} too large for the dtype, and infinite" if self.overflow else ""
        yield f"verified {count(self.tensors, 'tensor')}, {format_bytes(self.nbytes)} read: {found}{nan}{overflow}"


def verify(
    source: PathLike | Sequence[PathLike],
    target: PathLike | None = None,
    *,
    transpose: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    layout: str | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Verification:
    """Check a checkpoint: its own health, or, given what it was converted to, every byte of that.

    Parameters
    ----------
    source : path, or sequence of paths
        A checkpoint with packed tensors, as for `Checkpoint`.
    target : path, optional
        The converted checkpoint. The packed tensors are decoded again, by the reference backend.
    transpose, include, exclude : optional
        As for `convert`; by default those the target was converted with.
    layout : str, optional
        Of the source; see `Checkpoint`.
    workers : int, optional
        Threads.
    progress : callable
        Called by one thread at a time.

    Returns
    -------
    Verification
        With a finding for each tensor that differs, is missing or broken.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> packed = mxfp4np.MXFP4Array(np.zeros((2, 16), np.uint8), np.full(2, 127, np.uint8))
    >>> mxfp4np.save_file({"w": packed}, path)
    >>> mxfp4np.verify(path).findings
    []
    """
    if target is None:
        return _health(source, layout, include or (), exclude or (), workers, progress)
    record = Path(target) / RECORD
    asked = read_json(record) if record.exists() else {}
    with Checkpoint(source, layout=layout) as ours, Checkpoint(target) as theirs:
        names = select(
            ours,
            asked.get("include", ()) if include is None else include,
            asked.get("exclude", ()) if exclude is None else exclude,
        )
        result = compare(
            ours, theirs, names, transpose or asked.get("transpose", TRANSPOSE[0]), workers=workers, progress=progress
        )
        extra = sorted(set(theirs) - set(ours))
        result.findings += [f"tensor {name!r}: in {theirs.folder}, but not in {ours.folder}" for name in extra]
        return result


def compare(
    source: Checkpoint,
    target: Checkpoint,
    names: Iterable[str],
    transpose: str,
    *,
    workers: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Verification:
    """Compare tensors of a checkpoint with what the reference decodes from its source.

    Parameters
    ----------
    source, target : Checkpoint
    names : iterable of str
    transpose : {"auto", "yes", "no"}
    workers, progress
        As for `verify`.
    """
    result = Verification()
    pairs: list[tuple[TensorInfo, TensorInfo, bool]] = []
    for name in names:
        info = source.info(name)
        result.tensors += 1
        try:
            found = target.info(name)
        except TensorNotFoundError:
            result.findings.append(f"no tensor {name!r} in {target.folder}")
            continue
        except LayoutError as error:
            result.findings.append(str(error))
            continue
        turned = info.layout is not None and is_turned(info.layout, info.shape, transpose)
        if (problem := _mismatch(info, found, turned=turned)) is not None:
            result.findings.append(f"{found.stored[0].file.path}: tensor {name!r}: {problem}")
        else:
            pairs.append((info, found, turned))

    crew = Crew(sum(found.nbytes for _, found, _ in pairs), progress)
    compared: list[tuple[int, int, int, str | None]] = []

    def run(number: int) -> None:
        info, found, turned = pairs[number]
        path, nan_blocks, overflow, difference = found.stored[0].file.path, 0, 0, None
        for index, expected, nan, infinite in _expected(source, info, found, turned=turned):
            if difference is None:
                difference = _first_difference(index, expected, target.get(found.name, index=index or ...))
            nan_blocks, overflow = nan_blocks + nan, overflow + infinite
            crew.advance(path.name, found.name, expected.nbytes)
        finding = None if difference is None else f"{path}: tensor {found.name!r}{difference}"
        compared.append((number, nan_blocks, overflow, finding))

    crew.run(run, len(pairs), workers)
    result.nbytes = crew.done
    for _, nan_blocks, overflow, finding in sorted(compared, key=itemgetter(0)):
        result.nan_blocks += nan_blocks
        result.overflow += overflow
        result.findings += [finding] if finding is not None else []
    return result


def _mismatch(info: TensorInfo, found: TensorInfo, *, turned: bool) -> str | None:
    shape = swapped(info.shape) if turned else info.shape
    if found.layout is not None:
        return f"is packed, as {found.layout}: give the packed checkpoint first, and then what it was converted to"
    if info.layout is None:
        raw = info.dtype if info.dtype in DTYPES else "U8"
        if found.dtype != raw:
            return f"expected {raw} as in the source, found {found.dtype}"
    elif element(found.dtype)[1] not in DECODED:
        return f"expected {', '.join(DECODED)}, found {found.dtype}"
    return f"expected shape {list(shape)}, found {list(found.shape)}" if shape != found.shape else None


def _expected(
    source: Checkpoint, info: TensorInfo, found: TensorInfo, *, turned: bool
) -> Iterator[tuple[tuple[int | slice, ...], NDArray[Any], int, int]]:
    """Yield what should be where, and how many NaN blocks and overflowing values it has."""
    if info.layout is None:
        yield from ((index, part, 0, 0) for index, part in source.pieces(info.name, PIECE_BYTES))
        return
    dtype = DTYPES[found.dtype][1]
    for index, part in source.pieces(info.name, PIECE_BYTES, dtype=dtype, transpose=turned):
        values = part.decode(dtype, transpose=turned, backend="numpy")
        yield index, values, int(np.count_nonzero(part.scales == SCALE_NAN)), count_overflow(part, values)


def count_overflow(part: MXFP4Array, values: NDArray[Any]) -> int:
    """Return how many decoded values were too large for their dtype."""
    # No code overflows up to these scales: 6 * 2**13 in float16, 6 * 2**125 in the others.
    most = 140 if values.dtype == np.float16 else 252
    if not ((part.scales > most) & (part.scales != SCALE_NAN)).any():
        return 0
    return int(np.count_nonzero(np.isinf(values)))


def _first_difference(index: tuple[int | slice, ...], expected: NDArray[Any], actual: NDArray[Any]) -> str | None:
    """Compare the bytes of a piece; say where the first one is that differs."""
    theirs, ours = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (expected, actual))
    if np.array_equal(theirs, ours):
        return None
    at = int(np.flatnonzero(theirs != ours)[0]) // expected.itemsize
    place = place_in_whole(index, np.unravel_index(at, expected.shape))
    return f"[{', '.join(map(str, place))}]: expected {expected.flat[at]!s}, found {actual.flat[at]!s}"


def _health(
    source: PathLike | Sequence[PathLike],
    layout: str | None,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    workers: int | None,
    progress: Callable[[Progress], object],
) -> Verification:
    """Look for pairs that are not whole, an index that does not agree, and scales that no weights have."""
    result = Verification()
    if isinstance(source, str | os.PathLike) and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    try:
        checkpoint = Checkpoint(source, layout=layout)
    except (CheckpointError, LayoutError, FileNotFoundError) as error:
        result.findings.append(str(error))
        return result
    with checkpoint:
        result.findings += _missing_shards(checkpoint)
        if checkpoint.index is not None:
            listed = weight_map_of(checkpoint.index)
            missing = [name for name in checkpoint.stored if name not in listed]
            result.findings += [
                f"{checkpoint.index}: tensor {name!r} is in a file, but not in the index" for name in missing
            ]
        packed: list[TensorInfo] = []
        for name in select(checkpoint, include, exclude):
            result.tensors += 1
            try:
                info = checkpoint.info(name)
            except LayoutError as error:
                result.findings.append(str(error))
            else:
                packed += [info] if info.layout is not None else []

        crew = Crew(sum(info.nbytes for info in packed), progress)
        counted: list[tuple[int, NDArray[np.int64]]] = []

        def run(number: int) -> None:
            info, scales = packed[number], np.zeros(256, np.int64)
            for _, part in checkpoint.pieces(info.name, 8 * PIECE_BYTES):
                # A block of zeros may have any scale.
                used = part.scales[(part.blocks & 0x77).any(axis=-1) | (part.scales == SCALE_NAN)]
                scales += np.bincount(used.reshape(-1), minlength=256)
                crew.advance(info.stored[0].file.path.name, info.name, part.nbytes)
            counted.append((number, scales))

        crew.run(run, len(packed), workers)
        result.nbytes = crew.done
        for number, scales in sorted(counted, key=itemgetter(0)):
            result.nan_blocks += int(scales[SCALE_NAN])
            result.findings += [f"tensor {packed[number].name!r}: {problem}" for problem in _implausible(scales)]
    return result


def _missing_shards(checkpoint: Checkpoint) -> Iterator[str]:
    """Compare the files with how many there should be by their names."""
    there: dict[tuple[str, int], set[int]] = {}
    for path in checkpoint.files:
        if match := _NUMBERED.fullmatch(path.name):
            there.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, number), found in there.items():
        if missing := sorted(set(range(1, number + 1)) - found):
            files = f"{len(missing):,} of {number:,} files {stem}-*"
            yield f"{checkpoint.folder}: {files} are missing, number {missing[0]} is the first"


def _implausible(scales: NDArray[np.int64]) -> Iterator[str]:
    if scales[SCALE_NAN]:
        yield f"{scales[SCALE_NAN]:,} of its blocks are NaN"
    if scales.any():
        middle = int(np.searchsorted(np.cumsum(scales), math.ceil(scales.sum() / 2)))
        if middle not in PLAUSIBLE and middle != SCALE_NAN:
            yield (
                f"half of its scales are {'below' if middle < SCALE_BIAS else 'above'} 2**{middle - SCALE_BIAS}: no "
                "weights are, scale bytes may have been converted instead of viewed"
            )
