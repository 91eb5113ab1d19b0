"""The tables that kernels read. The reference backend computes them, so that kernels give the same bits as it does."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...format import BLOCK_SIZE, BYTES_PER_BLOCK, FP4_BOUNDS, SCALE_BIAS, SCALE_NAN, decoded_dtype
from ..memory import aligned_empty
from ..reference import ReferenceBackend

MANTISSA_BITS: Final = {"bfloat16": 7, "float16": 10}
EXPONENT_BIAS: Final = {"bfloat16": 127, "float16": 15}

NORMAL_SCALES: Final = {"bfloat16": (2, 252), "float16": (114, 140)}
"""The first and last scale with which no value is subnormal, infinite or NaN."""

LINE_VALUES: Final = {"E2M1": 16, "E4M3": 128, "E5M2": 128}
"""Values of a line of `mxfp4np.backends.cpu.lookup`: of all codes, or of those without a sign."""


def line_codes(element: str) -> NDArray[np.uint8]:
    """Return the codes whose values are a line: those of E2M1 two to a byte.

    Examples
    --------
    >>> [hex(code) for code in line_codes("E2M1")[:3]]
    ['0x10', '0x32', '0x54']
    """
    codes = np.arange(LINE_VALUES[element], dtype=np.uint8)
    return codes[::2] | (codes[1::2] << np.uint8(4)) if element == "E2M1" else codes


def word_name(dtype: np.dtype[Any]) -> str:
    """Return the dtype of the words that tables hold for a dtype: of a float32, these are its upper 16 bits."""
    return "float16" if dtype == np.float16 else "bfloat16"


def decode_table(name: str) -> NDArray[np.uint8]:
    """Return the table that `mxfp4np.backends.cpu.decode` describes, of bfloat16 or float16."""
    blocks = np.broadcast_to(np.tile(line_codes("E2M1"), 2), (256, 1, BYTES_PER_BLOCK))
    values = np.empty((256, BLOCK_SIZE), decoded_dtype(name))
    ReferenceBackend().decode(blocks, np.arange(256, dtype=np.uint8)[:, None], values)
    words = values[:, :16].copy().view("<u2")
    table = aligned_empty((256, 64), np.dtype(np.uint8))
    table[:, :32] = words.view(np.uint8)
    table[:, 32:48], table[:, 48:] = words & 255, words >> 8
    return table


def value_table() -> NDArray[np.float32]:
    """Return the 16 values of each scale."""
    table = aligned_empty((256, 16), np.dtype(np.float32))
    words = decode_table("bfloat16")[:, :32].copy().view("<u2")
    table.view(np.uint32)[...] = words.astype(np.uint32) << 16
    return table


def encode_table(name: str, rule: str) -> NDArray[np.uint8]:
    """Return the table that `mxfp4np.backends.cpu.encode` describes, for values of bfloat16 or float16."""
    magnitudes = np.arange(1 << 15, dtype=np.uint16).view(decoded_dtype(name))
    values = np.zeros((magnitudes.size, BLOCK_SIZE), magnitudes.dtype)
    values[:, 0] = magnitudes
    blocks, scales = np.empty((magnitudes.size, 1, BYTES_PER_BLOCK), np.uint8), np.empty((magnitudes.size, 1), np.uint8)
    ReferenceBackend().encode(values, blocks, scales, rule=rule)

    finite = magnitudes[scales[:, 0] != SCALE_NAN].astype(np.float64)
    exponents = np.arange(256) - SCALE_BIAS
    bounds = np.ldexp(FP4_BOUNDS, exponents[:, None])
    lines = np.empty((256, 8), np.uint16)
    lines[:, 0:7:2] = np.searchsorted(finite, bounds[:, 0::2], side="right") - 1  # these bounds round down
    lines[:, 1:7:2] = np.searchsorted(finite, bounds[:, 1::2], side="left") - 1  # and these up, to an even code

    bits = MANTISSA_BITS[name]
    smallest = (exponents - 2 + EXPONENT_BIAS[name]) << bits  # the word of the smallest bound, if it is normal
    bases = 2 * smallest - (1 << (bits - 1)) + 1
    lines[:, 7] = np.where((smallest > 0) & (bases < 1 << 16), bases, 0)
    lines[SCALE_NAN] = [0x7FFF] * 7 + [0xFFFF]  # all magnitudes get code 0

    table = aligned_empty((scales.size + lines.nbytes,), np.dtype(np.uint8))
    table[: scales.size] = scales[:, 0]
    table[scales.size :] = lines.view(np.uint8).ravel()
    return table
