"""Text: names chosen by patterns and made safe to print, sizes, counts and tables.

It knows nothing of tensors or files, so that rewriting and the command line can both use it.
"""

from __future__ import annotations

import html
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from fnmatch import translate
from typing import Any, Final

LINE_WIDTH: Final = 1000
"""Most characters of a line that is printed."""

CELL_WIDTH: Final = 100
"""Most characters of a cell of a table."""

TABLE_ROWS: Final = 200
"""Most rows of a table that a notebook shows."""

MAX_PATTERNS, MAX_PATTERN_CHARACTERS = 1000, 20_000
"""Most patterns with wildcards that are matched with each name, and most characters that they have together."""

_WILDCARD: Final = re.compile(r"[*?\[]")


def patterns(given: str | Iterable[str]) -> list[str]:
    """Return one shell-style pattern or several as a sorted list."""
    return [given] if isinstance(given, str) else sorted(given)


def has_wildcard(pattern: str) -> bool:
    """Return whether a pattern may match several names."""
    return _WILDCARD.search(pattern) is not None


def matcher(given: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches any of several shell-style patterns.

    Raises
    ------
    ValueError
        If there are too many.

    Examples
    --------
    >>> matcher(["layers.*", "head"])("layers.0.w")
    True
    """
    given = list(given)
    names = {pattern for pattern in given if not has_wildcard(pattern)}
    wild = [pattern for pattern in given if pattern not in names]
    check_patterns(wild)
    matches = [re.compile(translate(_closed(pattern))).match for pattern in wild]
    return lambda name: name in names or any(match(name) for match in matches)


def check_patterns(wild: Sequence[str]) -> None:
    """Refuse so many patterns with wildcards that to match them would take long."""
    characters = sum(map(len, wild))
    if len(wild) > MAX_PATTERNS or characters > MAX_PATTERN_CHARACTERS:
        raise ValueError(
            f"expected at most {MAX_PATTERNS:,} patterns with wildcards, of {MAX_PATTERN_CHARACTERS:,} characters, "
            f"found {len(wild):,}, of {characters:,}"
        )


def _closed(pattern: str) -> str:
    """Return a pattern with brackets that are never closed as sets of one: `translate` looks for the end of each."""
    at = pattern.find("[")
    while at >= 0:
        first = at + 1 + pattern.startswith("!", at + 1)
        end = pattern.find("]", first + pattern.startswith("]", first))
        if end < 0:
            return pattern[:at] + pattern[at:].replace("[", "[[]")
        at = pattern.find("[", end)
    return pattern


def select(names: Iterable[str], include: str | Iterable[str], exclude: str | Iterable[str] = ()) -> list[str]:
    """Return the names that match any of the patterns to include, if there are any, and none of those to exclude."""
    wanted, unwanted = matcher(patterns(include) or ["*"]), matcher(patterns(exclude))
    return [name for name in names if wanted(name) and not unwanted(name)]


def shorten(text: str, width: int) -> str:
    """Return the text, or its beginning and its end if it has more characters.

    Examples
    --------
    >>> shorten("layers.0.self_attn.q_proj.weight", 15)
    'layers...weight'
    """
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


def escape(text: str, width: int = LINE_WIDTH) -> str:
    """Return the text with every character that a terminal would not print as such escaped, shortened to a width."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shorten(text, width))
    return shorten(escaped, width)


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

    Cells are made safe to print, and of bounded width.

    Examples
    --------
    >>> align([("NAME", "BYTES"), ("w", "17")], left=1)
    ['NAME  BYTES', 'w        17']
    """
    rows = [[escape(cell, CELL_WIDTH) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = []
    for cells in rows:
        aligned = [cell.ljust(width) for cell, width in zip(cells[:left], widths[:left], strict=True)]
        aligned += [cell.rjust(width) for cell, width in zip(cells[left:], widths[left:], strict=True)]
        lines.append("  ".join(aligned).rstrip())
    return lines


def html_table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), caption: str = "") -> str:
    """Return rows of cells as a table for notebooks; without a head, the first cell of each row is its heading.

    Cells are made safe to print, and of bounded width; of many rows, the first are shown.

    Examples
    --------
    >>> html_table([("shape", "2x32"), ("file", "<a>")])
    '<table><tr><th>shape</th><td>2x32</td></tr><tr><th>file</th><td>&lt;a&gt;</td></tr></table>'
    """

    def cell(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(escape(text, CELL_WIDTH))}</{tag}>"

    lines = ["".join(cell("th", text) for text in head)] if head else []
    for first, *others in rows[:TABLE_ROWS]:
        lines.append(cell("td" if head else "th", first) + "".join(cell("td", text) for text in others))
    if len(rows) > TABLE_ROWS:
        lines.append(f"<td>and {len(rows) - TABLE_ROWS:,} more</td>")
    title = f"<caption>{html.escape(escape(caption))}</caption>" if caption else ""
    return f"<table>{title}" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape for a table.

    Examples
    --------
    >>> shape_text((32, 5760)), shape_text(())
    ('32x5760', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"
