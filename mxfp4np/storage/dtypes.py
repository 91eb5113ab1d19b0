"""Element types as headers spell them: bits of an element, and the NumPy or ml_dtypes type to view it as.

One table, from which shapes in bytes and dtypes are derived. It knows no file.
"""

from __future__ import annotations

import math
from typing import Final

DTYPES: Final = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "uint8"),
    "F6_E2M3": (6, "uint8"),
    "F6_E3M2": (6, "uint8"),
}
"""Bits of an element and the type to view it as, for each dtype of safetensors.

NumPy has no type for elements below a byte: their packed bytes are viewed as uint8.
"""

SAFETENSORS_DTYPES: Final = {numpy: name for name, (bits, numpy) in DTYPES.items() if bits >= 8}
"""The name in safetensors of each NumPy or ml_dtypes type."""


def element(dtype: str) -> tuple[int, str]:
    """Return the bits of an element and the name of its NumPy type; dtypes of other formats are raw bytes."""
    return DTYPES.get(dtype, (8, "uint8"))


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of a safetensors dtype."""
    return math.prod(shape) * DTYPES[dtype][0] // 8
