"""What packed rows are multiplied by, in the form and order that the kernels of `matmul` read.

Orders are lists of nibbles of a block: 0 to 15 are the low nibbles of its bytes, 16 to 31 the high ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...format import BLOCK_SIZE
from ..memory import aligned_empty

LARGEST: Final = 32512
"""The largest integer of 16 bits that is used: the sum of 8 products with 256 * 12 fits 32 bits."""

FACTOR_EXPONENT: Final = 24
"""The exponent of the largest magnitude after scaling: it keeps factors normal, times any but the smallest scales."""

EXPONENTS: Final = (-100, 100)
"""Between these exponents of the largest magnitude, factors are normal numbers."""


WORD_ORDER: Final = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
"""Order of words that keeps each half of a register to itself, as the instructions that interleave bytes do."""


@functools.cache
def value_elements(target: str, order: str) -> NDArray[np.intp]:
    """Return which elements of a block come out of its registers, one after another, on an instruction set."""
    if target == "avx512":  # nibble after nibble of four words of 32 bits
        nibbles = [4 * word + place // 2 + 16 * (place % 2) for place in range(8) for word in range(4)]
    else:
        nibbles = WORD_ORDER[0::2] + WORD_ORDER[1::2]
    return elements_of(nibbles, order)


@functools.cache
def integer_elements(order: str) -> NDArray[np.intp]:
    """Return which of the elements of two blocks the integers are."""
    nibbles = [
        32 * block + half + first + i for half in (0, 16) for first in (0, 8) for block in (0, 1) for i in range(8)
    ]
    return elements_of(nibbles, order)


def elements_of(nibbles: Sequence[int], order: str) -> NDArray[np.intp]:
    """Return which elements of blocks some nibbles are.

    Examples
    --------
    >>> elements_of([0, 1, 16, 17], "pairs"), elements_of([0, 1, 16, 17], "halves")
    (array([0, 2, 1, 3]), array([ 0,  1, 16, 17]))
    """
    places = np.array(nibbles)
    return places if order == "halves" else places // 32 * 32 + 2 * (places % 16) + places % 32 // 16


def in_order(x: NDArray[np.float32], elements: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return vectors, of shape (M, G, 32), from x, (32 * G, M), with the elements of each block in another order."""
    return np.ascontiguousarray(x.T).reshape(x.shape[1], -1, BLOCK_SIZE)[:, :, elements]


def together(vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return vectors, of shape (M, G, 32), block by block: (G, count, 32), with zeros for those that are missing."""
    out = aligned_empty((vectors.shape[1], count, BLOCK_SIZE), np.dtype(np.float32))
    out[:, : len(vectors)] = vectors.swapaxes(0, 1)
    out[:, len(vectors) :] = 0
    return out


def integers(
    x: NDArray[np.float32], elements: NDArray[np.intp]
) -> tuple[NDArray[np.int16], NDArray[np.float32], float] | None:
    """Round a vector to integers of 16 bits with a factor for each block; return None if it is not finite or tiny.

    Parameters
    ----------
    x : (32 * G,) float32
    elements : (64,) int
        The order of the elements of two blocks.

    Returns
    -------
    integers : (ceil(G / 2), 64) int16
    factors : (G,) float32
        Block ``g`` of x is its integers, times ``factors[g]``, times ``512 * power``.
    power : float
        A power of two that the kernel's result, of values times 512, is multiplied by.
    """
    blocks = x.reshape(-1, BLOCK_SIZE)
    magnitudes = np.abs(blocks).max(axis=1)
    largest = magnitudes.max()
    exponent = int(np.frexp(largest)[1])
    if not np.isfinite(largest) or not EXPONENTS[0] < exponent < EXPONENTS[1]:
        return None
    inverses = np.zeros_like(magnitudes)  # of blocks that are as good as zero
    np.divide(LARGEST, magnitudes, out=inverses, where=magnitudes > largest * np.float32(2.0**-60))
    rounded = np.zeros((len(blocks) + len(blocks) % 2, BLOCK_SIZE), np.int16)
    np.rint(blocks * inverses[:, None], out=rounded[: len(blocks)], casting="unsafe")
    out = aligned_empty((len(rounded) // 2, 2 * BLOCK_SIZE), np.dtype(np.int16))
    out[...] = rounded.reshape(-1, 2 * BLOCK_SIZE)[:, elements]
    power = 2.0 ** (exponent - FACTOR_EXPONENT)
    return out, magnitudes / np.float32(LARGEST * power), power / 512
