"""Shapes and indices of arrays: transposed shapes, indices with lists and masks, and indices that split an array.

Pure functions on tuples; they know nothing of MXFP4 but that the last axis may have to be cut at whole blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

import numpy as np

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


def is_advanced(index: Any) -> bool:
    """Return whether an index has lists or masks, so that NumPy copies what it selects."""
    items = index if isinstance(index, tuple) else (index,)
    return any(
        not (item is None or item is Ellipsis or isinstance(item, slice) or np.ndim(item) == 0) for item in items
    )


def full_index(index: Any, ndim: int) -> tuple[Any, ...]:
    """Return an index of integers, slices, integer or boolean arrays, one '...' at most, with slices for all axes.

    Lists become arrays; a mask stands for as many axes as it has.

    Raises
    ------
    IndexError
        If there is anything else, or there are too many items.

    Examples
    --------
    >>> full_index(([0, 2], ..., slice(5)), 3)
    (array([0, 2]), slice(None, None, None), slice(None, 5, None))
    """
    items = [_index_item(item) for item in (index if isinstance(index, tuple) else (index,))]
    dots = [i for i, item in enumerate(items) if item is Ellipsis] or [len(items)]
    if len(dots) > 1:
        raise IndexError("an index can have one '...' only")
    head, tail = items[: dots[0]], items[dots[0] + 1 :]
    indexed = sum(_axes_of(item) for item in (*head, *tail))
    if indexed > ndim:
        raise IndexError(f"{ndim} axes, but {indexed} were indexed")
    return (*head, *[slice(None)] * (ndim - indexed), *tail)


def _index_item(item: Any) -> Any:
    if item is Ellipsis or isinstance(item, slice):
        return item
    if type(item) is int:
        return item
    if hasattr(item, "__index__") and not isinstance(item, bool | np.bool_) and not np.ndim(item):
        with contextlib.suppress(TypeError):  # an array of one float
            return operator.index(item)
    try:
        array = np.asarray(item)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if not array.size and isinstance(item, list | tuple):
        array = array.astype(np.intp)
    if not array.ndim or array.dtype.kind not in "iub":
        raise IndexError(
            "packed arrays take integers, slices and one '...' as an index, and on leading axes lists or masks, "
            f"found {item!r}"
        )
    return array


def _axes_of(item: Any) -> int:
    return item.ndim if isinstance(item, np.ndarray) and item.dtype == bool else 1


def basic_indices(
    index: tuple[Any, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], list[tuple[Any, tuple[Any, ...]]]]:
    """Return what an index with lists or masks selects as basic indices, for readers that need views.

    Parameters
    ----------
    index : tuple
        As from `full_index`.
    shape : tuple of int
        Of the indexed array.

    Returns
    -------
    shape : tuple of int
        Of the selection.
    pairs : list of tuple
        For each place in its leading axes the basic index of what belongs there: ``selection[place] = array[basic]``.

    Examples
    --------
    >>> basic_indices((np.array([2, 0]), slice(None)), (3, 5))
    ((2, 5), [((0,), (2, slice(None, None, None))), ((1,), (0, slice(None, None, None)))])
    """
    head = 1 + max((i for i, item in enumerate(index) if not isinstance(item, slice)), default=-1)
    axes = shape[: sum(_axes_of(item) for item in index[:head])]
    chosen = np.arange(math.prod(axes)).reshape(axes)[index[:head]]
    places = np.unravel_index(chosen, axes)
    pairs = [(place, (*(int(axis[place]) for axis in places), *index[head:])) for place in np.ndindex(chosen.shape)]
    rest = (len(range(size)[item]) for item, size in zip(index[head:], shape[len(axes) :], strict=True))
    return (*chosen.shape, *rest), pairs


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
