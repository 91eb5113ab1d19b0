"""What MXFP4 is: block geometry, the E2M1 values, the E8M0 scale, the rules that choose one, the dtypes of values.

Constants and pure functions only. Every other module takes these facts from here, and this module knows
nothing of files, tensor names, threads or devices.

The source is the OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (FP4), 5.4.1 (E8M0) and
6.3 (MXFP4): an element is ``E2M1[code] * 2**(scale - 127)``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

BLOCK_SIZE: Final = 32
"""Elements that share one scale."""

BYTES_PER_BLOCK: Final = 16
"""Bytes that hold the codes of one block, two codes to a byte."""

ORDERS: Final = ("pairs", "halves")
"""How the elements of a block lie in its bytes.

In ``"pairs"``, which is what all safetensors layouts have, element ``2j`` is the low nibble of byte ``j`` and element
``2j + 1`` the high one. In ``"halves"``, GGUF's, element ``j`` is the low nibble of byte ``j``, element ``16 + j`` the
high one.
"""

SCALE_BIAS: Final = 127
"""A scale byte ``s`` stands for the factor ``2**(s - SCALE_BIAS)``."""

SCALE_NAN: Final = 255
"""The scale byte that makes every element of its block NaN."""

FP4_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each four-bit E2M1 code: one sign bit, two exponent bits (bias 1), one mantissa bit."""

FP4_BOUNDS: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Half way between one magnitude of E2M1 and the next: what lies there rounds to the even code of the two."""

RULES: Final = ("even", "floor", "rceil", "ceil")
"""How an encoder chooses the exponent that a block shares; see `mxfp4np.encode`."""

ENCODED_LAYOUTS: Final = ("gpt-oss-hf", "gpt-oss", "compressed-tensors", "mlx")
"""The layouts that whole checkpoints are encoded to."""

DTYPES: Final = ("bfloat16", "float16", "float32")
"""Names of the dtypes that MXFP4 decodes to, and is encoded from."""

TRANSPOSE: Final = ("auto", "yes", "no")
"""Whether a converted checkpoint has its matrices transposed; ``"auto"`` if the model that loads it wants them so."""

FLOAT8: Final = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Names of the dtypes of one byte that checkpoints use and ml_dtypes brings."""


@functools.cache
def dtype_named(name: str) -> np.dtype[Any]:
    """Return the dtype that NumPy, or ml_dtypes for what NumPy lacks, calls ``name``."""
    if name in ("bfloat16", *FLOAT8):
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype
    return np.dtype(name)


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name, which NumPy puts together anew each time."""
    return dtype.name


def as_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return any NumPy dtype, bfloat16 by name included, which NumPy alone does not know."""
    return dtype_named(dtype) if isinstance(dtype, str) else np.dtype(dtype)


def decoded_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the NumPy dtype to decode to.

    Parameters
    ----------
    dtype : str, type or numpy.dtype
        bfloat16 (the one of ``ml_dtypes``), float16 or float32, by name or as a dtype.

    Returns
    -------
    numpy.dtype
        In native byte order.

    Raises
    ------
    ValueError
        If MXFP4 does not decode to this dtype.

    Examples
    --------
    >>> decoded_dtype("float16")
    dtype('float16')
    """
    return _decoded_dtype(dtype)  # type: ignore[arg-type]


@functools.cache
def _decoded_dtype(dtype: Hashable) -> np.dtype[Any]:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    if name not in DTYPES:
        raise ValueError(f"MXFP4 decodes to {', '.join(DTYPES)}, not to {dtype!r}")
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        raise ValueError(f"MXFP4 decodes to native byte order, not to {dtype!r}")
    return dtype_named(name)


def blocks_in(elements: int) -> int:
    """Return how many blocks hold this many consecutive elements.

    Examples
    --------
    >>> blocks_in(33)
    2
    """
    return -(-elements // BLOCK_SIZE)


def split(
    shape: tuple[int, ...], itemsize: int, max_bytes: int, units: tuple[int, ...] = (1,)
) -> Iterator[tuple[int | slice, ...]]:
    """Yield indices, in C order, that cut an array into parts of at most ``max_bytes``.

    Parameters
    ----------
    shape, itemsize
        Of the array.
    max_bytes : int
        Of one part; at least one unit of the last axis.
    units : tuple of int
        The last axes are cut at multiples of these many elements, the very last one always, others where that fits.

    Yields
    ------
    tuple of int and slice
        Integers for the axes that are walked through, one cut slice, whole slices for the rest.

    Raises
    ------
    ValueError
        If not even one unit of the last axis fits.
    """
    if max_bytes < units[-1] * itemsize:
        raise ValueError(f"max_bytes must be at least {units[-1] * itemsize}, found {max_bytes}")
    if 0 in shape:
        return
    axis, inner = len(shape), itemsize  # `inner`: bytes of one step along the axis before
    while axis and inner * shape[axis - 1] <= max_bytes:
        axis -= 1
        inner *= shape[axis]
    whole = tuple(slice(0, size) for size in shape)
    if axis == 0:
        yield whole
        return
    step = max_bytes // inner
    unit = (*[1] * len(shape), *units)[axis - 1 - len(shape)]
    if step >= unit:
        step -= step % unit
    for outer in itertools.product(*(range(size) for size in shape[: axis - 1])):
        for begin in range(0, shape[axis - 1], step):
            yield (*outer, slice(begin, min(begin + step, shape[axis - 1])), *whole[axis:])
