"""JSON that others wrote, bounded in bytes, values and depth, so that parsing it takes little time and memory."""

from __future__ import annotations

import json
from typing import Any, Final

from ..errors import CheckpointError
from .regular import read_regular
from .remote import AnyPath

MAX_BYTES: Final = 100_000_000
"""Largest file."""

MAX_VALUES: Final = 1_500_000
"""Most commas and brackets. Python's objects for a million short values take about 150 MB."""

MAX_DEPTH: Final = 64
"""Deepest nesting. Files of models have a depth of ten; some later steps take time for each level of each value."""


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises
    ------
    ValueError
        If it is not valid, has too many values, or is nested too deeply.

    Examples
    --------
    >>> parse_json('{"bits": [4]}')
    {'bits': [4]}
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES:,} values, found about {values:,}")
    too_deep = f"nested more than {MAX_DEPTH} deep"
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [x for y in level if isinstance(y, dict | list) for x in (y.values() if isinstance(y, dict) else y)]
    if level:
        raise ValueError(too_deep)
    return value


def read_json(path: AnyPath) -> dict[str, Any]:
    """Return the JSON object in a file; refuse anything else."""
    data = read_regular(path, MAX_BYTES)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
