"""What a check of a checkpoint found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..text import count, escape, format_bytes, html_table


@dataclass(repr=False)
class Verification:
    """What was checked, and what was found."""

    tensors: int = 0
    nbytes: int = 0
    """Bytes that were compared or inspected."""
    nan_blocks: int = 0
    """Blocks whose scale is NaN."""
    overflow: int = 0
    """Values that were too large for their dtype, and are infinite."""
    findings: list[str] = field(default_factory=list)
    """What is wrong, a sentence each."""

    def __repr__(self) -> str:
        return f"<Verification: {self.summary}>"

    def _repr_html_(self) -> str:
        return html_table([(finding,) for finding in self.findings], ("findings",), self.summary)

    def add(self, other: Verification) -> None:
        """Add what another check found."""
        self.tensors += other.tensors
        self.nbytes += other.nbytes
        self.nan_blocks += other.nan_blocks
        self.overflow += other.overflow
        self.findings += other.findings

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "nan_blocks": self.nan_blocks,
            "overflow": self.overflow,
            "findings": self.findings,
        }

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        yield from map(escape, self.findings)
        yield self.summary

    @property
    def summary(self) -> str:
        """All of it in a line, without what the findings say."""
        found = count(len(self.findings), "finding") if self.findings else "nothing wrong"
        nan = f"; {count(self.nan_blocks, 'NaN block')}" if self.nan_blocks else ""
        overflow = f"; {count(self.overflow, 'value')} too large for the dtype, and infinite" if self.overflow else ""
        return f"verified {count(self.tensors, 'tensor')}, {format_bytes(self.nbytes)} read: {found}{nan}{overflow}"
