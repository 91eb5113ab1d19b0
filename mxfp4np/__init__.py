"""Open checkpoints whose weights are stored as MXFP4, and read them as NumPy arrays.

Importing this package imports NumPy and nothing heavier: each public name is imported when it is first used. The types
of the names are in ``__init__.pyi``.
"""

from importlib import import_module
from typing import Any

import numpy  # noqa: ICN001, F401  (the one dependency that importing the package loads)

__version__ = "0.1.0"

_PUBLIC = {
    "array": ("MXFP4Array",),
    "scaled": ("ScaledArray",),
    "codec": ("decode", "encode"),
    "checkpoint": ("Checkpoint",),
    "files": ("load_file", "save_file"),
    "layouts.packed": ("TensorInfo",),
    "rewrite.convert": ("convert",),
    "rewrite.encode": ("encode_checkpoint",),
    "rewrite.verify": ("verify",),
    "errors": (
        "BackendUnavailableError",
        "CheckpointError",
        "CheckpointWarning",
        "DeviceMemoryError",
        "LayoutError",
        "MXFP4Error",
        "RemoteError",
        "TensorNotFoundError",
    ),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
