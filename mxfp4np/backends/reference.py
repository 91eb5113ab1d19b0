"""The reference backend: NumPy, slow and obvious, the definition of correct.

It follows the formulas of `mxfp4np.format` and `mxfp4np.encode` in float64, where every product is exact, so that the
only rounding is the one into the output dtype or into codes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..format import (
    BLOCK_SIZE,
    FP4_BOUNDS,
    FP4_VALUES,
    OVERFLOW,
    OVERFLOW_SCALE,
    SCALE_BIAS,
    SCALE_NAN,
    element_values,
)
from .memory import HostBackend, scales_by_row

BLOCKS_AT_ONCE = 1 << 15
"""Bounds the float64 temporaries to a few tens of MB."""


class ReferenceBackend(HostBackend):
    """The formula, spelled out."""

    name = "numpy"

    def decode(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        out: NDArray[Any],
        *,
        start: int = 0,
        order: str = "pairs",
        fresh: bool = False,  # noqa: ARG002
        num_threads: int | None = None,  # noqa: ARG002
    ) -> None:
        # A group is as many blocks of one row as fit, or as many whole slabs of the first axis.
        if scales.size <= BLOCKS_AT_ONCE:
            _decode(blocks, scales, out, start, order)
        elif scales.ndim > 1:
            step = max(1, BLOCKS_AT_ONCE * len(scales) // scales.size)
            for i in range(0, len(scales), step):
                if step == 1:
                    self.decode(blocks[i], scales[i], out[i], start=start, order=order)
                else:
                    _decode(blocks[i : i + step], scales[i : i + step], out[i : i + step], start, order)
        else:
            for g in range(0, len(scales), BLOCKS_AT_ONCE):
                begin, skip = (BLOCK_SIZE * g - start, 0) if g else (0, start)
                end = BLOCK_SIZE * (g + BLOCKS_AT_ONCE) - start
                _decode(blocks[g : g + BLOCKS_AT_ONCE], scales[g : g + BLOCKS_AT_ONCE], out[begin:end], skip, order)

    def decode_scaled(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        out: NDArray[Any],
        *,
        element: str,
        width: int,
        tile_rows: int = 1,
        first_row: int = 0,
        table: NDArray[np.float32] | None = None,
        start: int = 0,
        fresh: bool = False,  # noqa: ARG002
        num_threads: int | None = None,  # noqa: ARG002
    ) -> None:
        scales = scales_by_row(scales, out.shape[-2] if out.ndim > 1 else 1, tile_rows, first_row)
        if out.size > BLOCK_SIZE * BLOCKS_AT_ONCE and out.ndim > 1:
            step = max(1, BLOCK_SIZE * BLOCKS_AT_ONCE * len(out) // out.size)
            for i in range(0, len(out), step):
                part = i if step == 1 else slice(i, i + step)
                rows = codes[part], scales[part], out[part]
                self.decode_scaled(*rows, element=element, width=width, table=table, start=start)
            return
        if element == "E2M1":
            codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        places = np.arange(start, start + out.shape[-1])
        values = element_values(element)[codes[..., places]]
        factors = scales if table is None else table[scales]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            values *= factors[..., places // width]
            out[...] = values.astype(out.dtype)

    most_vectors = sys.maxsize

    def matmul(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        order: str = "pairs",
        activations: str = "float32",  # noqa: ARG002
        num_threads: int | None = None,  # noqa: ARG002
    ) -> None:
        wide = x.astype(np.float64)
        step = max(1, BLOCKS_AT_ONCE // max(1, scales.shape[1]))
        for begin in range(0, len(scales), step):
            rows = slice(begin, begin + step)
            weights = np.empty((len(scales[rows]), len(x)), np.float32)
            self.decode(blocks[rows], scales[rows], weights, order=order)
            with np.errstate(over="ignore", invalid="ignore"):
                out[rows] = weights.astype(np.float64) @ wide

    def encode(
        self,
        x: NDArray[Any],
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        *,
        rule: str,
        num_threads: int | None = None,  # noqa: ARG002
    ) -> None:
        if scales.size <= BLOCKS_AT_ONCE:
            _encode(x, blocks, scales, rule)
        elif scales.ndim > 1:
            step = max(1, BLOCKS_AT_ONCE * len(scales) // scales.size)
            for i in range(0, len(scales), step):
                j = i if step == 1 else slice(i, i + step)
                self.encode(x[j], blocks[j], scales[j], rule=rule)
        else:
            for g in range(0, len(scales), BLOCKS_AT_ONCE):
                h = g + BLOCKS_AT_ONCE
                _encode(x[BLOCK_SIZE * g : BLOCK_SIZE * h], blocks[g:h], scales[g:h], rule)


def _decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[Any], start: int, order: str) -> None:
    nibbles = [blocks & 0x0F, blocks >> 4]
    if order == "pairs":
        codes = np.stack(nibbles, axis=-1).reshape(*scales.shape, BLOCK_SIZE)
    else:
        codes = np.concatenate(nibbles, axis=-1)
    values = np.ldexp(np.array(FP4_VALUES)[codes], scales[..., None].astype(np.intc) - SCALE_BIAS)
    values[scales == SCALE_NAN] = np.nan
    rows = values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE)
    with np.errstate(over="ignore"):  # overflow to infinity is part of the definition
        out[...] = rows[..., start : start + out.shape[-1]].astype(out.dtype)


def _shared_scales(largest: NDArray[np.float64], rule: str) -> NDArray[np.uint8]:
    """Return the scale that a rule gives to blocks by their largest magnitudes."""
    mantissa, exponent = np.frexp(largest)  # largest = mantissa * 2**exponent, mantissa in [1/2, 1)
    rounded_up = {
        "floor": np.False_,
        "even": mantissa >= 0.875,
        "rceil": mantissa > 0.75,
        "ceil": mantissa > 0.5,
    }[rule]
    scales = np.maximum(exponent - 3 + rounded_up, -SCALE_BIAS) + SCALE_BIAS
    scales[largest == 0] = 0
    scales[largest >= OVERFLOW] = OVERFLOW_SCALE
    scales[~np.isfinite(largest)] = SCALE_NAN
    chosen: NDArray[np.uint8] = scales.astype(np.uint8)
    return chosen


@np.errstate(invalid="ignore")  # signalling NaNs are as good as any
def _encode(x: NDArray[Any], blocks: NDArray[np.uint8], scales: NDArray[np.uint8], rule: str) -> None:
    values = x.astype(np.float64).reshape(*scales.shape, BLOCK_SIZE)
    magnitudes = np.abs(values)
    chosen = _shared_scales(magnitudes.max(axis=-1), rule)
    magnitudes[chosen == SCALE_NAN] = 0
    magnitudes = np.ldexp(magnitudes, SCALE_BIAS - chosen[..., None].astype(np.intc))
    codes = np.searchsorted(FP4_BOUNDS, magnitudes)  # how many bounds are below
    tied = magnitudes == np.array([*FP4_BOUNDS, np.inf])[codes]
    codes += tied & (codes % 2 == 1)
    codes += 8 * np.signbit(values)
    blocks[...] = codes[..., 0::2] | codes[..., 1::2] << 4
    scales[...] = chosen
