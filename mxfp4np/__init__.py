"""Open checkpoints whose weights are stored as MXFP4, and read them as NumPy arrays.

Importing this package imports NumPy and nothing heavier: each public name is imported when it is first used. Which
names there are, and where each is, is in ``__init__.pyi`` alone, which type checkers read as well.
"""

import re
from importlib import import_module
from pkgutil import get_data
from typing import Any

import numpy  # noqa: ICN001, F401  (the one dependency that importing the package loads)

__version__ = "0.1.0"

_STUB = (get_data(__name__, "__init__.pyi") or b"").decode()
_MODULES = {name: module for module, name in re.findall(r"^from \.(\S+) import (\w+) as", _STUB, re.MULTILINE)}

__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
