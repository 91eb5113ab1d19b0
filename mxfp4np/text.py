"""Text: names chosen by patterns and made safe to print, sizes, counts and tables.

It knows nothing of tensors or files, so that rewriting and the command line can both use it.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any


def patterns(given: str | Iterable[str]) -> list[str]:
    """Return one shell-style pattern or several as a sorted list."""
    return [given] if isinstance(given, str) else sorted(given)


def select(names: Iterable[str], include: str | Iterable[str], exclude: str | Iterable[str] = ()) -> list[str]:
    """Return the names that match any of the patterns to include, if there are any, and none of those to exclude."""
    wanted, unwanted = patterns(include) or ["*"], patterns(exclude)
    return [name for name in names if _matches(name, wanted) and not _matches(name, unwanted)]


def _matches(name: str, several: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in several)


def escape(text: str) -> str:
    """Return the text with every character that a terminal would not print as such escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_bytes(count: float) -> str:
    """Return a size in decimal units.

    Examples
    --------
    >>> format_bytes(1_560_000_000_000)
    '1.56 TB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes, which may be text: decimal units, or binary ones with an ``i``.

    Examples
    --------
    >>> parse_bytes("5GB"), parse_bytes("1.5 KiB"), parse_bytes(7)
    (5000000000, 1536, 7)
    """
    if not isinstance(size, str):
        return operator.index(size)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", size.strip().lower())
    if match is None:
        raise ValueError(f"{size!r} is not a size: expected for instance 200MB, 5GB or 5GiB")
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


def as_json(value: Any) -> str:
    """Return strict JSON: NaN and the infinities, which it has no form for, become null.

    Examples
    --------
    >>> as_json({"error": float("inf"), "codes": [1, 2]})
    '{"error": null, "codes": [1, 2]}'
    """

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(value), allow_nan=False)


def count(number: int, what: str) -> str:
    """Return for instance ``"1 shard"`` or ``"1,234 shards"``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def align(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Return rows of cells as lines with columns aligned: the first ``left``, or all, to the left, others to the right.

    Examples
    --------
    >>> align([("NAME", "BYTES"), ("w", "17")], left=1)
    ['NAME  BYTES', 'w        17']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = []
    for cells in rows:
        aligned = [cell.ljust(width) for cell, width in zip(cells[:left], widths[:left], strict=True)]
        aligned += [cell.rjust(width) for cell, width in zip(cells[left:], widths[left:], strict=True)]
        lines.append("  ".join(aligned).rstrip())
    return lines
