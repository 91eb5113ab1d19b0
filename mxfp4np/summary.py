"""What a checkpoint holds, as rows of a table: one for each tensor, or for each kind of tensor that its layers repeat.

The command line prints it, and notebooks show it. It knows only names and what `Checkpoint.info` says of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from .errors import CheckpointError, LayoutError
from .layouts.packed import TensorInfo
from .text import format_bytes, html_table, shape_text

MAX_RANGES: Final = 4
"""Most ranges that a label shows of the numbers that stand in one place."""

_NUMBER: Final = re.compile(r"(?<![^.])\d{1,9}(?![^.])", re.ASCII)


class Source(Protocol):
    """A checkpoint, as far as it is looked at here."""

    def __iter__(self) -> Any:
        """Iterate over the names."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Return what the headers say of a tensor."""
        ...


class Row(NamedTuple):
    """One logical tensor, or what is wrong with it."""

    name: str
    info: TensorInfo | None
    problem: str | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for tensors that a collapsed table shows as one line."""
        name = _NUMBER.sub("#", self.name)
        if self.info is None:
            return name, str(self.problem).replace(self.name, name)
        return (name, self.info.shape, self.info.label, self.info.layout)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers within the name: of the layer, and of the expert."""
        return tuple(_NUMBER.findall(self.name))


def rows(checkpoint: Source, names: Iterable[str] | None = None) -> list[Row]:
    """Return a row for each of these logical tensors, by default for all."""
    found = []
    for name in checkpoint if names is None else names:
        try:
            found.append(Row(name, checkpoint.info(name), None))
        except (CheckpointError, LayoutError) as error:
            found.append(Row(name, None, str(error)))
    return found


def collapse(table: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows that differ only in the numbers within their names, as the layers of a model do."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in table:
        groups.setdefault(row.kind, []).append(row)
    return groups


def label(group: Sequence[Row]) -> str:
    """Return the name of a group of rows, with ranges for the numbers that differ.

    Examples
    --------
    >>> label([Row(f"layers.{i}.experts.{j}.w", None, "") for i in (3, 5) for j in range(8)])
    'layers.3,5.experts.0-7.w'
    """
    parts = zip(*(row.name.split(".") for row in group), strict=True)
    return ".".join(several[0] if len(set(several)) == 1 else _ranges(set(map(int, several))) for several in parts)


def _ranges(numbers: set[int]) -> str:
    """Return numbers as ranges; of more than `MAX_RANGES` the first ones and the last."""
    ends: list[list[int]] = []
    for number in sorted(numbers):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ends]
    return ",".join(texts if len(texts) <= MAX_RANGES else [*texts[: MAX_RANGES - 1], "..", texts[-1]])


def table_of(checkpoint: Source, caption: str) -> str:
    """Return a table for notebooks, layers collapsed."""
    lines = []
    for group in collapse(rows(checkpoint)).values():
        name, times = label(group), f"x{len(group)}" if len(group) > 1 else ""
        info = group[0].info
        if info is None:
            lines.append((name, times, "", "broken", "", str(group[0].problem)))
        else:
            stored = sum(row.info.nbytes for row in group if row.info is not None)
            lines.append((name, times, shape_text(info.shape), info.label, info.layout or "-", format_bytes(stored)))
    return html_table(lines, ("name", "", "shape", "dtype", "layout", "stored"), caption)
