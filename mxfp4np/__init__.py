"""Open checkpoints whose weights are stored as MXFP4, and read them as NumPy arrays.

Importing this package imports NumPy and nothing heavier: every name below is resolved when it is first used.
"""

from typing import TYPE_CHECKING, Any

import numpy  # noqa: ICN001, F401  (the one dependency that importing the package loads)

if TYPE_CHECKING:
    from .array import MXFP4Array as MXFP4Array
    from .array import decode as decode
    from .array import encode as encode
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import TensorInfo as TensorInfo
    from .checkpoint import load_file as load_file
    from .checkpoint import save_file as save_file
    from .errors import BackendUnavailableError as BackendUnavailableError
    from .errors import CheckpointError as CheckpointError
    from .errors import DeviceMemoryError as DeviceMemoryError
    from .errors import LayoutError as LayoutError
    from .errors import MXFP4Error as MXFP4Error
    from .errors import TensorNotFoundError as TensorNotFoundError
    from .rewrite.convert import convert as convert
    from .rewrite.encode import encode_checkpoint as encode_checkpoint
    from .rewrite.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "MXFP4Array": "array",
    "decode": "array",
    "encode": "array",
    "Checkpoint": "checkpoint",
    "TensorInfo": "checkpoint",
    "load_file": "checkpoint",
    "save_file": "checkpoint",
    "convert": "rewrite.convert",
    "encode_checkpoint": "rewrite.encode",
    "verify": "rewrite.verify",
    "BackendUnavailableError": "errors",
    "CheckpointError": "errors",
    "DeviceMemoryError": "errors",
    "LayoutError": "errors",
    "MXFP4Error": "errors",
    "TensorNotFoundError": "errors",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
