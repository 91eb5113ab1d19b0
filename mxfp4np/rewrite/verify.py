"""Check a checkpoint: alone, or against the one that it was made from. Whatever is wrong becomes a finding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..backends import get_backend
from ..blocks import BlockArray
from ..checkpoint import Checkpoint
from ..codec import encode
from ..errors import CheckpointError, CheckpointWarning, LayoutError, TensorNotFoundError
from ..format import BLOCK_SIZE, RULES, SCALE_NAN, Rule, decoded_dtype
from ..format import DTYPES as DECODED
from ..layouts.packed import TensorInfo
from ..layouts.table import TRANSPOSE, Transpose, wants_transpose
from ..scaled import ScaledArray
from ..shapes import place_in_whole, split, swapped
from ..storage.discover import Location, PathLike, as_path, is_one, repository_hint
from ..storage.tensorfile import DTYPES, StoredTensor, element
from ..text import select
from .choose import FORMS, Choice, is_transposed
from .cluster import Engine, RayWorkers, pool_of, running
from .config import is_folder
from .contents import contents_of
from .findings import Verification
from .health import health
from .run import read_record
from .workers import Progress, Workers

Stored = tuple[StoredTensor, ...]

CHUNK_BYTES: Final = 4 << 20
"""Decoded bytes that a thread compares at a time. The reference backend takes about twenty times as much memory."""


def verify(
    source: Location | Sequence[Location],
    target: PathLike | None = None,
    *,
    rule: Rule | None = None,
    transpose: Transpose | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    layout: str | None = None,
    num_threads: int | None = None,
    engine: Engine = "threads",
    progress: Callable[[Progress], object] = lambda _: None,
) -> Verification:
    """Check a checkpoint by itself or, given what it was converted or encoded to, every byte of that.

    Parameters
    ----------
    source : path, or sequence of paths
        A checkpoint, as for `Checkpoint`.
    target : path, optional
        What it was converted or encoded to. Packed tensors of the source are decoded again, and plain ones that are
        packed in the target encoded again, by the reference backend; all others are compared byte for byte.
    rule : {"even", "floor", "rceil", "ceil"}, optional
        As for `encode_checkpoint`; by default, that which the target was encoded with.
    transpose : {"auto", "yes", "no"}, optional
        As for `convert`; by default, that which the target was written with.
    include, exclude : str or iterable of str
        Shell-style patterns of the names of tensors to check, and of those not to.
    layout : str, optional
        Of the source; see `Checkpoint`.
    num_threads : int, optional
        At most this many threads. By default as many as decoding uses.
    engine : {"threads", "ray"}
        As for `convert`.
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
        if is_one(source) and not as_path(source).exists():
            raise FileNotFoundError(f"{source}: no such file or folder{repository_hint(source)}")
        try:
            checkpoint = _open(source, layout)
        except (CheckpointError, LayoutError, FileNotFoundError) as error:
            if layout is not None and isinstance(error, LayoutError):
                raise
            return Verification(findings=[str(error)])
        with checkpoint, running(engine):
            names = select(checkpoint, include, exclude)
            return health(checkpoint, names, num_threads, progress, engine, with_config=is_folder(checkpoint, source))
    options = read_record(Path(target))
    transpose = transpose or options.get("transpose", TRANSPOSE[0])
    rule = rule or options.get("rule", RULES[0])
    try:
        opened = _open(target)
    except FileNotFoundError as error:
        if not options:
            raise
        return Verification(findings=[f"{target}: files are missing, finish with --resume: {error}"])
    with opened as theirs, _open(source, layout) as ours, running(engine):
        names = select(ours, include, exclude)
        patterns = options.get("include", ()), options.get("exclude", ())
        if (written := options.get("layout")) in FORMS:
            encoded = Choice(ours, written, options.get("transpose", TRANSPOSE[0]), *patterns).chosen
            copied = {name: ours.stored_tensors(name) for name in names if name not in encoded}
        else:
            encoded = {name for name in names if name in theirs and _is_packed(ours, theirs, name)}
            contents = contents_of(ours, *patterns)
            copied = {name: info.stored for name, info in contents.copied.items()}
            names = [name for name in names if name in contents.decoded or name in copied]
        unfinished = _unfinished(theirs, options)
        if unfinished:
            names = [name for name in names if name in theirs]
            copied = only(copied, theirs.stored)
        rest = [name for name in names if name not in encoded]
        result = compare(ours, theirs, rest, copied, transpose, num_threads, progress, engine)
        names = [name for name in names if name in encoded]
        result.add(compare_encoded(ours, theirs, names, rule, transpose, num_threads, progress, engine))
        extra = sorted(set(theirs) - set(ours))
        result.findings += [f"tensor {name!r}: in {theirs.folder}, but not in {ours.folder}" for name in extra]
        result.findings[:0] = unfinished
        return result


def _is_packed(source: Checkpoint, target: Checkpoint, name: str) -> bool:
    """Tell whether a tensor is packed in the target and was not before."""
    try:
        return source.info(name).layout is None and target.info(name).layout is not None
    except LayoutError:
        return False


def _unfinished(target: Checkpoint, options: Mapping[str, Any]) -> list[str]:
    """Return what a checkpoint lacks because the run that writes it has not finished, if so."""
    hint = ": finish with --resume" if options else ""
    if target.incomplete:
        return [f"{finding}{hint}" for finding in target.findings]
    if options and target.index is None and len(target.files) > 1:
        return [f"{target.folder}: all {len(target.files)} files are there, but no index{hint}"]
    return []


def _open(path: Location | Sequence[Location], layout: str | None = None) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # these are findings
        return Checkpoint(path, layout=layout)


def only(copied: Mapping[str, Stored], there: Container[str]) -> dict[str, Stored]:
    """Return copied tensors without the parts that other shards hold: a scale that several tensors share."""
    return {name: tuple(tensor for tensor in stored if tensor.name in there) for name, stored in copied.items()}


def compare(
    source: Checkpoint,
    target: Checkpoint,
    names: Iterable[str],
    copied: Mapping[str, Stored],
    transpose: str,
    num_threads: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
    engine: Engine = "threads",
) -> Verification:
    """Compare tensors of a checkpoint with what the reference backend decodes from its source; see `verify`.

    Those that were ``copied`` are compared as they are stored, with these tensors of the source.
    """
    result = Verification()
    copies: dict[str, tuple[Stored, Stored]] = {}
    decoded: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    for name in names:
        result.tensors += 1
        try:
            theirs = target.stored_tensors(name)
            if name in copied:
                ours = copied[name]
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
    sizes = {name: sum(x.nbytes for x in theirs) for name, (_, theirs) in copies.items()}
    sizes |= {name: found.nbytes for name, (_, found) in decoded.items()}
    pool = pool_of(engine, num_threads, sum(sizes.values()), progress)

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
            nan_blocks += _count_nan_blocks(chunk)
            if difference is None:
                difference = _first_difference(index, expected, target.get(name, index=index or ...), equal_nan=True)
            pool.advance(file.name, name, expected.nbytes)
        return nan_blocks, overflow, difference and f"{file}: tensor {name!r}{difference}"

    get_backend("numpy")  # imported before threads start: see `Workers`
    decoded_dtype("bfloat16")
    for nan_blocks, overflow, difference in pool.map(check, list(sizes), sizes.__getitem__):
        result.nan_blocks += nan_blocks
        result.overflow += overflow
        result.findings += [difference] if difference else []
    result.nbytes = pool.done
    return result


def compare_encoded(
    source: Checkpoint,
    target: Checkpoint,
    names: Iterable[str],
    rule: Rule,
    transpose: str,
    num_threads: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
    engine: Engine = "threads",
) -> Verification:
    """Compare packed tensors with what the reference backend encodes from their source; see `verify`."""
    result = Verification()
    pairs: list[tuple[TensorInfo, bool]] = []
    shapes = {name: source.info(name).shape for name in source}
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
        transposed = found.layout is not None and is_transposed(info, shapes, found.layout, transpose)
        shape = swapped(info.shape) if transposed else info.shape
        problem = None
        if found.layout is None:
            problem = f"expected it packed, found {found.dtype}"
        elif element(info.dtype)[1] not in DECODED:
            problem = f"is packed, but {info.dtype} in the source"
        elif shape != found.shape:
            problem = f"expected shape {list(shape)}, found {list(found.shape)}"
        if problem is None:
            pairs.append((found, transposed))
        else:
            result.findings.append(f"{found.stored[0].file.path}: tensor {name!r}: {problem}")
    pool = pool_of(engine, num_threads, sum(found.nbytes for found, _ in pairs), progress)

    def check(pair: tuple[TensorInfo, bool]) -> tuple[int, str | None]:
        """Return the number of NaN blocks, and the first difference."""
        found, transposed = pair
        nan_blocks, difference, file = 0, None, found.stored[0].file.path
        for index, chunk in target.pieces(found.name, CHUNK_BYTES):
            nan_blocks += int(np.count_nonzero(chunk.scales == SCALE_NAN))
            if difference is None:
                place = (*index[:-2], index[-1], index[-2]) if transposed else index
                values = source.get(found.name, index=place)
                rows = transposed and isinstance(index[-2], slice)
                expected = encode(values.swapaxes(-1, -2) if rows else values, rule, backend="numpy")
                difference = _first_block(index, expected, chunk.in_pairs())
            pool.advance(file.name, found.name, chunk.nbytes)
        return nan_blocks, difference and f"{file}: tensor {found.name!r} {difference}"

    get_backend("numpy")  # imported before threads start: see `Workers`
    decoded_dtype("bfloat16")
    for nan_blocks, difference in pool.map(check, pairs, lambda pair: pair[0].nbytes):
        result.nan_blocks += nan_blocks
        result.findings += [difference] if difference else []
    result.nbytes = pool.done
    return result


def _first_block(index: tuple[int | slice, ...], expected: MXFP4Array, found: MXFP4Array) -> str | None:
    """Compare the bytes of packed chunks; return the place and the bytes of the first block that differs."""
    differs = (expected.scales != found.scales) | (expected.blocks != found.blocks).any(axis=-1)
    if not differs.any():
        return None
    at = np.unravel_index(int(differs.argmax()), differs.shape)
    *rows, first = place_in_whole(index, (*at[:-1], BLOCK_SIZE * at[-1]))
    one, other = (f"scale {array.scales[at]}, codes {array.blocks[at].tobytes().hex()}" for array in (expected, found))
    return f"block [{', '.join(map(str, (*rows, first // BLOCK_SIZE)))}]: expected {one}, found {other}"


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


def _difference_of_copies(ours: Stored, theirs: Stored, pool: Workers | RayWorkers) -> str | None:
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


def _count_nan_blocks(packed: BlockArray) -> int:
    """Return how many blocks have a scale that is NaN; larger tiles are no blocks."""
    if isinstance(packed, MXFP4Array):
        return int(np.count_nonzero(packed.scales == SCALE_NAN))
    if isinstance(packed, ScaledArray) and packed.block_size <= BLOCK_SIZE:
        return int(np.count_nonzero(packed.exponents() == SCALE_NAN))
    return 0


def count_overflow(packed: BlockArray, values: NDArray[Any]) -> int:
    """Return how many decoded values were too large for their dtype."""
    if not isinstance(packed, MXFP4Array):
        infinite = int(np.count_nonzero(np.isinf(values)))
        return infinite - packed.count_infinite() if infinite and isinstance(packed, ScaledArray) else infinite
    # No code overflows up to these scales: 6 * 2**13 in float16, 6 * 2**125 in the others.
    most = 140 if values.dtype == np.float16 else 252
    large = (packed.scales > most) & (packed.scales != SCALE_NAN)
    return int(np.count_nonzero(np.isinf(values))) if large.any() else 0


def _first_difference(
    index: tuple[int | slice, ...], expected: NDArray[Any], actual: NDArray[Any], *, equal_nan: bool = False
) -> str | None:
    """Compare the bytes of a chunk; return the place and the values of the first difference.

    With ``equal_nan``, NaN may have any bits.
    """
    theirs, ours = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (expected, actual))
    if np.array_equal(theirs, ours):
        return None
    differs = (theirs != ours).reshape(-1, expected.itemsize).any(axis=-1)
    if equal_nan:
        differs &= ~(np.isnan(expected) & np.isnan(actual)).reshape(-1)
    if not differs.any():
        return None
    at = int(differs.argmax())
    place = place_in_whole(index, np.unravel_index(at, expected.shape))
    return f"[{', '.join(map(str, place))}]: expected {expected.flat[at]!s}, found {actual.flat[at]!s}"
