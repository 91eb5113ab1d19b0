"""Shell-style patterns that choose among the names of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def patterns(given: str | Iterable[str]) -> list[str]:
    """Return one pattern or several as a sorted list."""
    return [given] if isinstance(given, str) else sorted(given)


def select(names: Iterable[str], include: str | Iterable[str], exclude: str | Iterable[str] = ()) -> list[str]:
    """Return the names that match any of the patterns to include, if there are any, and none of those to exclude."""
    wanted, unwanted = patterns(include), patterns(exclude)
    return [
        name
        for name in names
        if (not wanted or any(fnmatchcase(name, pattern) for pattern in wanted))
        and not any(fnmatchcase(name, pattern) for pattern in unwanted)
    ]
