"""Check a checkpoint: alone, or against the one that it was converted from. Whatever is wrong becomes a finding."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..backends import get_backend
from ..blocks import BlockArray
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, CheckpointWarning, LayoutError, TensorNotFoundError
from ..format import DTYPES as DECODED
from ..format import SCALE_BIAS, SCALE_NAN, decoded_dtype
from ..layouts.packed import TensorInfo
from ..layouts.table import TRANSPOSE, wants_transpose
from ..shapes import place_in_whole, split, swapped
from ..storage.discover import PathLike, repository_hint
from ..storage.tensorfile import DTYPES, StoredTensor, element
from ..text import count, escape, format_bytes, select
from .contents import choose
from .run import read_record
from .workers import Progress, Workers

Stored = tuple[StoredTensor, ...]

CHUNK_BYTES: Final = 4 << 20
"""Decoded bytes that a thread compares at a time. The reference backend takes about twenty times as much memory."""

PLAUSIBLE: Final = range(SCALE_BIAS - 64, SCALE_BIAS + 33)
"""Scales of weights. A median outside comes from scale bytes that were converted instead of viewed."""


@dataclass
class Verification:
    """What was checked, and what was found."""

    tensors: int = 0
    nbytes: int = 0
    """Bytes that were compared or inspected."""
    nan_blocks: int = 0
    """Blocks whose scale is NaN."""
    overflow: int = 0
    """Values that were too large for their dtype, and are infinite."""
    findings: list[str] = field(default_factory=list)
    """What is wrong, a sentence each."""

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
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    layout: str | None = None,
    num_threads: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Verification:
    """Check a checkpoint by itself or, given what it was converted to, every byte of that.

    Parameters
    ----------
    source : path, or sequence of paths
        A checkpoint with packed tensors, as for `Checkpoint`.
    target : path, optional
        The converted checkpoint. Packed tensors are decoded again, by the reference backend.
    transpose : {"auto", "yes", "no"}, optional
        As for `convert`; by default as the target was converted.
    include, exclude : str or iterable of str
        Shell-style patterns of the names of tensors to check, and of those not to.
    layout : str, optional
        Of the source; see `Checkpoint`.
    num_threads : int, optional
        At most this many threads. By default as many as decoding uses.
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
        if isinstance(source, str | os.PathLike) and not Path(source).exists():
            raise FileNotFoundError(f"{source}: no such file or folder{repository_hint(source)}")
        try:
            checkpoint = _open(source, layout)
        except (CheckpointError, LayoutError, FileNotFoundError) as error:
            return Verification(findings=[str(error)])
        with checkpoint:
            return _health(checkpoint, select(checkpoint, include, exclude), num_threads, progress)
    options = read_record(Path(target))
    with _open(source, layout) as ours, _open(target) as theirs:
        contents = choose(ours, options.get("include", ()), options.get("exclude", ()))
        there = contents.decoded.keys() | contents.copied.keys()
        names = [name for name in select(ours, include, exclude) if name in there]
        transpose = transpose or options.get("transpose", TRANSPOSE[0])
        result = compare(ours, theirs, names, contents.copied, transpose, num_threads, progress)
        extra = sorted(set(theirs) - set(ours))
        result.findings += [f"tensor {name!r}: in {theirs.folder}, but not in {ours.folder}" for name in extra]
        return result


def _open(path: PathLike | Sequence[PathLike], layout: str | None = None) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # these are findings
        return Checkpoint(path, layout=layout)


def compare(
    source: Checkpoint,
    target: Checkpoint,
    names: Iterable[str],
    copied: Container[str],
    transpose: str,
    num_threads: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Verification:
    """Compare tensors of a checkpoint with what the reference backend decodes from its source; see `verify`.

    Those that were ``copied`` are compared as they are stored.
    """
    result = Verification()
    copies: dict[str, tuple[Stored, Stored]] = {}
    decoded: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    for name in names:
        result.tensors += 1
        try:
            theirs = target.stored_tensors(name)
            if name in copied:
                ours = source.stored_tensors(name)
                problem = _copy_mismatch(ours, theirs)
                copies[name] = ours, theirs
            else:
                decoded[name] = source.info(name), target.info(name)
                problem = _mismatch(*decoded[name], transpose)
        except TensorNotFoundError:
            result.findings.append(f"no tensor {name!r} in {target.folder}")
        except LayoutError as error:
            result.findings.append(str(error))
        else:
            if problem is not None:
                result.findings.append(f"{theirs[0].file.path}: tensor {name!r}: {problem}")
                copies.pop(name, None)
                decoded.pop(name, None)
    nbytes = sum(x.nbytes for _, theirs in copies.values() for x in theirs)
    pool = Workers(num_threads, nbytes + sum(found.nbytes for _, found in decoded.values()), progress)

    def check(name: str) -> tuple[int, int, str | None]:
        """Return the numbers of NaN blocks and of values that overflow, and the first difference."""
        if name in copies:
            return 0, 0, _difference_of_copies(*copies[name], pool)
        info, found = decoded[name]
        nan_blocks, overflow, difference, file = 0, 0, None, found.stored[0].file.path
        dtype, transposed = DTYPES[found.dtype][1], wants_transpose(info.layout, info.shape, transpose)
        for index, chunk in source.pieces(name, CHUNK_BYTES, dtype=dtype, transpose=transposed):
            expected = chunk.decode(dtype, transpose=transposed, backend="numpy")
            overflow += count_overflow(chunk, expected)
            if isinstance(chunk, MXFP4Array):
                nan_blocks += int(np.count_nonzero(chunk.scales == SCALE_NAN))
            if difference is None:
                difference = _first_difference(index, expected, target.get(name, index=index or ...))
            pool.advance(file.name, name, expected.nbytes)
        return nan_blocks, overflow, difference and f"{file}: tensor {name!r}{difference}"

    get_backend("numpy")  # imported before threads start: see `Workers`
    decoded_dtype("bfloat16")
    for nan_blocks, overflow, difference in pool.map(check, [*copies, *decoded]):
        result.nan_blocks += nan_blocks
        result.overflow += overflow
        result.findings += [difference] if difference else []
    result.nbytes = pool.done
    return result


def _mismatch(info: TensorInfo, found: TensorInfo, transpose: str) -> str | None:
    """Return how the headers of a tensor and of what it was decoded to do not fit each other, if they do not."""
    shape = swapped(info.shape) if wants_transpose(info.layout, info.shape, transpose) else info.shape
    if found.layout is not None:
        return f"is packed, as {found.layout}: expected it decoded, unless it was excluded"
    if element(found.dtype)[1] not in DECODED:
        return f"expected {', '.join(DECODED)}, found {found.dtype}"
    return f"expected shape {list(shape)}, found {list(found.shape)}" if shape != found.shape else None


def _copy_mismatch(ours: Stored, theirs: Stored) -> str | None:
    """Return how the headers of a tensor and its copy differ, if they do."""
    before, after = ([f"{x.name} {x.dtype} {list(x.shape)}" for x in side] for side in (ours, theirs))
    return f"expected {', '.join(before)} as in the source, found {', '.join(after)}" if before != after else None


def _difference_of_copies(ours: Stored, theirs: Stored, pool: Workers) -> str | None:
    """Compare stored tensors byte for byte; return the first difference."""
    difference = None
    for original, copy in zip(ours, theirs, strict=True):
        file = copy.file.path
        for index in split(original.array_shape, max(1, element(original.dtype)[0] // 8), CHUNK_BYTES):
            expected = original.array(index)
            if difference is None and (place := _first_difference(index, expected, copy.array(index))):
                difference = f"{file}: tensor {copy.name!r}{place}"
            pool.advance(file.name, copy.name, expected.nbytes)
    return difference


def count_overflow(packed: BlockArray, values: NDArray[Any]) -> int:
    """Return how many decoded values were too large for their dtype."""
    if not isinstance(packed, MXFP4Array):
        return int(np.count_nonzero(np.isinf(values)))
    # No code overflows up to these scales: 6 * 2**13 in float16, 6 * 2**125 in the others.
    most = 140 if values.dtype == np.float16 else 252
    large = (packed.scales > most) & (packed.scales != SCALE_NAN)
    return int(np.count_nonzero(np.isinf(values))) if large.any() else 0


def _first_difference(index: tuple[int | slice, ...], expected: NDArray[Any], actual: NDArray[Any]) -> str | None:
    """Compare the bytes of a chunk; return the place and the values of the first difference."""
    theirs, ours = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (expected, actual))
    if np.array_equal(theirs, ours):
        return None
    at = int(np.flatnonzero(theirs != ours)[0]) // expected.itemsize
    place = place_in_whole(index, np.unravel_index(at, expected.shape))
    return f"[{', '.join(map(str, place))}]: expected {expected.flat[at]!s}, found {actual.flat[at]!s}"


def _health(
    checkpoint: Checkpoint, names: Iterable[str], num_threads: int | None, progress: Callable[[Progress], object]
) -> Verification:
    """Look for broken pairs, missing shards, an index that does not match, and implausible scales."""
    result = Verification(findings=[*checkpoint.findings])
    for name in checkpoint.unlisted:
        result.findings.append(f"{checkpoint.index}: tensor {name!r} is in a file, but not in the index")
    packed: list[TensorInfo] = []
    for name in names:
        result.tensors += 1
        try:
            info = checkpoint.info(name)
        except LayoutError as error:
            result.findings.append(str(error))
        else:
            packed += [info] if info.format == "MXFP4" else []
    pool = Workers(num_threads, sum(info.nbytes for info in packed), progress)

    def count_scales(info: TensorInfo) -> NDArray[np.int64]:
        counts = np.zeros(256, np.int64)
        for _, chunk in checkpoint.pieces(info.name, 8 * CHUNK_BYTES):
            # A block of zeros may have any scale.
            used = chunk.scales[(chunk.blocks & 0x77).any(axis=-1) | (chunk.scales == SCALE_NAN)]
            counts += np.bincount(used.reshape(-1), minlength=256)
            pool.advance(info.stored[0].file.path.name, info.name, chunk.nbytes)
        return counts

    decoded_dtype("bfloat16")  # imported before threads start: see `Workers`
    for info, counts in zip(packed, pool.map(count_scales, packed), strict=True):
        result.nan_blocks += int(counts[SCALE_NAN])
        result.findings += [f"tensor {info.name!r}: {problem}" for problem in _implausible(counts)]
    result.nbytes = pool.done
    return result


def _implausible(counts: NDArray[np.int64]) -> Iterator[str]:
    """Yield what no weights have, given how often each scale occurs."""
    if counts[SCALE_NAN]:
        yield f"{counts[SCALE_NAN]:,} of its blocks are NaN"
    if counts.any():
        middle = int(np.searchsorted(np.cumsum(counts), math.ceil(counts.sum() / 2)))
        if middle not in PLAUSIBLE and middle != SCALE_NAN:
            yield (
                f"half of its scales are {'below' if middle < SCALE_BIAS else 'above'} 2**{middle - SCALE_BIAS}: no "
                "weights are, scale bytes may have been converted instead of viewed"
            )
