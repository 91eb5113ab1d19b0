"""Documents that say which tool wrote a checkpoint: JSON files beside it, and the metadata of its headers.

They are read when they are first needed, and matched with the evidence that a layout names. This module knows no
tensor but by its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..errors import CheckpointError
from .table import METADATA, Layout


class Documents:
    """The documents of one checkpoint.

    Parameters
    ----------
    metadata : mapping of str to str
        Of the headers.
    read : callable
        Returns the JSON object in a file beside the checkpoint, or None if there is no such file.

    Attributes
    ----------
    problem : str
        What was wrong with a file that could not be read, empty if nothing was.
    """

    def __init__(self, metadata: Mapping[str, str], read: Callable[[str], Mapping[str, Any] | None]) -> None:
        self._metadata, self._read = metadata, read
        self._files: dict[str, Any] = {}
        self._values: dict[tuple[str, str], set[str]] = {}
        self.problem = ""

    def support(self, layout: Layout, name: str) -> str | None:
        """Return the evidence for a layout of a logical tensor, in words, or None if there is none."""
        for evidence in layout.evidence:
            if self._document(evidence.source, name) is not None:
                matches = [self._match(evidence.source, name, *item) for item in evidence.values.items()]
                if None not in matches:
                    return f"{evidence.source}: {', '.join(filter(None, matches)) or 'is there'}"
        return None

    def contradict(self, layout: Layout, name: str) -> bool:
        """Return whether the header has metadata of this tensor that does not match a layout."""
        return layout.has_metadata and self._document(METADATA, name) is not None and self.support(layout, name) is None

    def values(self, source: str, name: str, key: str) -> set[str]:
        """Return all values under a key of a document, at any depth, as lower-case text."""
        place = (source if source != METADATA else METADATA + name, key)
        if place not in self._values:
            self._values[place] = set(_values_under(self._document(source, name), key))
        return self._values[place]

    def _match(self, source: str, name: str, key: str, patterns: tuple[str | None, ...]) -> str | None:
        """Return which value matches; if the key is missing, empty text if it may be; otherwise None."""
        values = self.values(source, name, key)
        if not values:
            return "" if None in patterns else None
        return next((f"{key} {v}" for v in sorted(values) if any(p and fnmatchcase(v, p) for p in patterns)), None)

    def _document(self, source: str, name: str) -> Any:
        if source == METADATA:
            try:
                return json.loads(self._metadata[name])
            except (KeyError, ValueError, RecursionError):
                return None
        if source not in self._files:
            try:
                self._files[source] = self._read(source)
            except CheckpointError as error:
                self._files[source] = None
                self.problem = f" ({error})"
        return self._files[source]


def _values_under(document: Any, key: str, *, inside: bool = False) -> Iterator[str]:
    if isinstance(document, dict):
        for name, value in document.items():
            yield from _values_under(value, key, inside=inside or name == key)
    elif isinstance(document, list):
        for value in document:
            yield from _values_under(value, key, inside=inside)
    elif inside:
        yield str(document).lower()
