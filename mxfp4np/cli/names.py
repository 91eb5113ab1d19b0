"""Names of tensors that a user gives to a command: exact ones, or shell-style patterns, each of which has to match."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

from ..checkpoint import Checkpoint
from ..errors import TensorNotFoundError
from ..text import count, has_wildcard, select

MAX_NAMES, MAX_PART = 5000, 50
"""Most names, and most characters of a part of a name, that are compared with a pattern that matches nothing."""


def matching(checkpoint: Checkpoint, patterns: Iterable[str]) -> list[str]:
    """Return the names that match any of the patterns, by pattern and then as the checkpoint orders them.

    Raises
    ------
    TensorNotFoundError
        If a pattern matches nothing; the message says which would.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [pattern] if pattern in checkpoint else select(checkpoint, pattern) if has_wildcard(pattern) else []
        if not names:
            hint = _similar(checkpoint, pattern)
            if hint is None and not has_wildcard(pattern):
                checkpoint.info(pattern)  # raises, with the closest names
            hint = f"did you mean {hint!r}?" if hint else f"it has {count(len(checkpoint), 'tensor')}"
            raise TensorNotFoundError(f"no tensor is called like {pattern!r} in {checkpoint.folder}: {hint}")
        found |= dict.fromkeys(names)
    return list(found)


def _similar(checkpoint: Checkpoint, pattern: str) -> str | None:
    """Return a pattern that matches something: this one anywhere in a name, or with one part of it spelled anew."""
    if not has_wildcard(pattern):
        others = [f"*{pattern}*"]
    else:
        parts = {part for name in islice(checkpoint, MAX_NAMES) for part in name.split(".") if len(part) < MAX_PART}
        words = [word for word in re.split(r"[.*?]+", pattern) if word and word not in parts]
        others = [pattern.replace(word, near) for word in words for near in get_close_matches(word, parts, 1)]
    return next((other for other in others if select(checkpoint, other)), None)
