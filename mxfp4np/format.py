"""What MXFP4 is: block geometry, E2M1 values, E8M0 scales, the rules that choose a scale, the dtypes of values.

Constants and pure functions. All other modules take these facts from here; this one knows nothing of files, tensor
names, threads or devices.

The source is the OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (FP4), 5.4.1 (E8M0) and
6.3 (MXFP4): an element is ``E2M1[code] * 2**(scale - 127)``.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

BLOCK_SIZE: Final = 32
"""Elements that share one scale."""

BYTES_PER_BLOCK: Final = 16
"""Bytes that hold the codes of one block, two codes to a byte."""

Order = Literal["pairs", "halves"]

ORDERS: Final[tuple[Order, ...]] = get_args(Order)
"""Order of a block's elements in its bytes.

``"pairs"``, in all safetensors layouts: element ``2j`` is the low nibble of byte ``j``, ``2j + 1`` the high one.
``"halves"``, in GGUF: element ``j`` is the low nibble of byte ``j``, element ``16 + j`` the high one.
"""

SCALE_BIAS: Final = 127
"""A scale byte ``s`` stands for the factor ``2**(s - SCALE_BIAS)``."""

SCALE_NAN: Final = 255
"""The scale byte that makes every element of its block NaN."""

OVERFLOW: Final = 1.75 * 2.0**127
"""The smallest magnitude that scales above `OVERFLOW_SCALE` would round to 2**128, infinity in bfloat16 and float32."""

OVERFLOW_SCALE: Final = 252
"""The scale byte that encoding gives to finite blocks with such magnitudes: they saturate at 6 * 2**125."""

FP4_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each four-bit E2M1 code: one sign bit, two exponent bits (bias 1), one mantissa bit."""

FP4_BOUNDS: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring E2M1 magnitudes; a midpoint rounds to the even code."""

Rule = Literal["even", "floor", "rceil", "ceil"]

RULES: Final[tuple[Rule, ...]] = get_args(Rule)
"""Rules by which an encoder chooses a block's scale; see `mxfp4np.encode`."""

DecodedName = Literal["bfloat16", "float16", "float32"]

DTYPES: Final[tuple[DecodedName, ...]] = get_args(DecodedName)
"""Names of the dtypes that MXFP4 decodes to, and is encoded from."""


ShortName = Literal["bf16", "fp16", "f16", "half", "fp32", "f32"]

SHORT_NAMES: Final[dict[str, DecodedName]] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
}
"""Other names of `DTYPES`, in any case. NumPy reads ``"f16"`` as 16 bytes: nothing here does."""


class TorchDType(Protocol):
    """A ``torch.dtype``, for annotations: torch is never imported."""

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are floats."""
        raise NotImplementedError


DecodedDType = DecodedName | ShortName | type[Any] | np.dtype[Any] | TorchDType
"""What names one of `DTYPES` in an annotation."""

ELEMENTS: Final = {
    "E2M1": None,
    "E4M3": "float8_e4m3fn",
    "E5M2": "float8_e5m2",
    "E4M3FNUZ": "float8_e4m3fnuz",
    "E5M2FNUZ": "float8_e5m2fnuz",
}
"""Element formats of weights that have scales, and the dtype of ml_dtypes that defines each; E2M1 is four bits wide."""

FLOAT8: Final = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Names of the one-byte dtypes of ml_dtypes that checkpoints use."""


@functools.cache
def dtype_named(name: str) -> np.dtype[Any]:
    """Return the dtype of this name, of NumPy or, if NumPy lacks it, of ml_dtypes."""
    if name in ("bfloat16", *FLOAT8):
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype
    return np.dtype(name)


@functools.cache
def element_values(element: str) -> NDArray[np.float32]:
    """Return the value of each code of an element format: 16 of E2M1, 256 of the others.

    Examples
    --------
    >>> element_values("E4M3")[[1, 0x38, 0x7E, 0x80]]
    array([ 1.953125e-03,  1.000000e+00,  4.480000e+02, -0.000000e+00],
          dtype=float32)
    """
    name = ELEMENTS[element]
    if name is None:
        return np.array(FP4_VALUES, np.float32)
    return np.arange(256, dtype=np.uint8).view(dtype_named(name)).astype(np.float32)


@functools.cache
def scale_values(dtype: str) -> NDArray[np.float32]:
    """Return the value of each byte of a scale: of uint8 as E8M0, of float8_e4m3fn as that.

    Examples
    --------
    >>> scale_values("uint8")[[0, 127, 254]]
    array([5.8774718e-39, 1.0000000e+00, 1.7014118e+38], dtype=float32)
    """
    if dtype == "uint8":
        values = np.ldexp(np.ones(256, np.float32), np.minimum(np.arange(256), 254) - SCALE_BIAS)
        values[SCALE_NAN] = np.nan
        return np.asarray(values, np.float32)
    return np.arange(256, dtype=np.uint8).view(dtype_named(dtype)).astype(np.float32)


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Return ``dtype.name``, cached: NumPy computes it on each access."""
    return dtype.name


def as_dtype(dtype: DTypeLike | TorchDType) -> np.dtype[Any]:
    """Return the dtype, which may be given by a name of ml_dtypes, such as bfloat16, by a short one, or as torch's.

    Examples
    --------
    >>> as_dtype("fp16"), as_dtype("int8")
    (dtype('float16'), dtype('int8'))
    """
    dtype = _full_name(dtype)
    return dtype_named(dtype) if isinstance(dtype, str) else np.dtype(dtype)  # type: ignore[arg-type]


def decoded_dtype(dtype: DTypeLike | TorchDType) -> np.dtype[Any]:
    """Return the NumPy dtype to decode to: bfloat16 of ml_dtypes, float16 or float32, in native byte order.

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


def _full_name(dtype: Any) -> Any:
    """Return the name of a dtype of torch, or of one given by a short name, anything else as it is."""
    if isinstance(dtype, str):
        return SHORT_NAMES.get(dtype.lower(), dtype)
    return str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype


@functools.cache
def _decoded_dtype(dtype: Hashable) -> np.dtype[Any]:
    dtype = _full_name(dtype)
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    if name not in DTYPES:
        raise ValueError(f"packed values decode to {', '.join(DTYPES)}, not to {dtype!r}")
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        raise ValueError(f"packed values decode to native byte order, not to {dtype!r}")
    return dtype_named(name)


def blocks_in(elements: int) -> int:
    """Return the number of blocks that hold this many consecutive elements.

    Examples
    --------
    >>> blocks_in(33)
    2
    """
    return -(-elements // BLOCK_SIZE)
