"""Shapes and indices of arrays: transposed shapes, and indices that split an array into chunks of bounded size.

Pure functions on tuples; they know nothing of MXFP4 but that the last axis may have to be cut at whole blocks.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

Index = tuple[int | slice, ...]


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array whose last two axes are swapped; raise `ValueError` if it has fewer.

    Examples
    --------
    >>> swapped((4, 3, 2))
    (4, 2, 3)
    """
    if len(shape) < 2:
        raise ValueError(f"transpose needs two axes or more, found shape {shape}")
    return (*shape[:-2], shape[-1], shape[-2])


def split(shape: tuple[int, ...], itemsize: int, max_bytes: int, multiples: tuple[int, ...] = (1,)) -> Iterator[Index]:
    """Yield indices, in C order, that split an array into chunks of at most ``max_bytes``.

    An index has integers for the leading axes, then one slice that cuts an axis, then slices of whole axes. The last
    axes are cut at multiples of ``multiples``: the very last axis always, others if the chunk is large enough.

    Raises
    ------
    ValueError
        If ``max_bytes`` is too small for one multiple of the last axis.

    Examples
    --------
    >>> list(split((2, 5), 4, 12))
    [(0, slice(0, 3, None)), (0, slice(3, 5, None)), (1, slice(0, 3, None)), (1, slice(3, 5, None))]
    """
    if max_bytes < multiples[-1] * itemsize:
        raise ValueError(f"max_bytes must be at least {multiples[-1] * itemsize}, found {max_bytes}")
    if 0 in shape:
        return
    axis, nbytes = len(shape), itemsize  # nbytes of one step along the axis before `axis`
    while axis and nbytes * shape[axis - 1] <= max_bytes:
        axis -= 1
        nbytes *= shape[axis]
    whole = tuple(slice(0, size) for size in shape)
    if axis == 0:
        yield whole
        return
    step = max_bytes // nbytes
    multiple = (*[1] * len(shape), *multiples)[axis - 1 - len(shape)]
    if step >= multiple:
        step -= step % multiple
    for lead in itertools.product(*(range(size) for size in shape[: axis - 1])):
        for begin in range(0, shape[axis - 1], step):
            yield (*lead, slice(begin, min(begin + step, shape[axis - 1])), *whole[axis:])


def split_both(
    shape: tuple[int, ...], itemsize: int, max_bytes: int, *, transpose: bool, multiple: int = 1
) -> Iterator[tuple[Index, Index]]:
    """Yield pairs of indices that split an array as it is wanted, transposed or not, and as it is stored.

    The last axis of the stored array is cut at multiples of ``multiple``.

    Examples
    --------
    >>> next(split_both((4, 3), 4, 16, transpose=True))
    ((slice(0, 1, None), slice(0, 4, None)), (slice(0, 4, None), slice(0, 1, None)))
    """
    if not transpose:
        yield from ((index, index) for index in split(shape, itemsize, max_bytes, (multiple,)))
        return
    for *lead, i, j in split(swapped(shape), itemsize, max_bytes, (multiple, 1)):
        rows = i if isinstance(i, slice) else slice(i, i + 1)
        yield (*lead, rows, j), (*lead, j, rows)


def place_in_whole(index: Index, within: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return where the element at ``within`` of a chunk is in the array that `split` cut by this index.

    Examples
    --------
    >>> place_in_whole((3, slice(64, 96), slice(0, 10)), (2, 5))
    (3, 66, 5)
    """
    places = iter(within)
    return tuple(k.start + operator.index(next(places)) if isinstance(k, slice) else k for k in index)
