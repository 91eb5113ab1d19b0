"""Results as Markdown and as a plot. `TABLES` says how the rows of each section are shown."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.peers import REFERENCE
from mxfp4np.cli.timing import describe
from mxfp4np.text import count

Row = dict[str, Any]
Cell = Callable[[Row, list[Row]], str]
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def _rate(unit: float, digits: int) -> Cell:
    return lambda row, _: f"{median(row['rates']) / unit:,.{digits}f}" if row["rates"] else row["missing"]


def _spread(unit: float, digits: int) -> Cell:
    return lambda row, _: (
        f"{row['rates'][0] / unit:,.{digits}f} to {row['rates'][-1] / unit:,.{digits}f}" if row["rates"] else ""
    )


def _times_reference(row: Row, rows: list[Row]) -> str:
    reference = next(other["rates"] for other in rows if other["name"] == REFERENCE)
    return f"{median(row['rates']) / median(reference):,.1f}" if row["rates"] and reference else ""


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >> 20 else f"{nbytes >> 10} KiB"


TABLES: dict[str, dict[str, Cell]] = {
    "peers": {
        "decoder": lambda row, _: row["name"],
        "output": lambda row, _: row["dtype"],
        "million values/s": _rate(1e6, 0),
        "lowest to highest": _spread(1e6, 0),
        "times the reference loader": _times_reference,
    },
    "limits": {
        "what : against": lambda row, _: row["what"],
        "threads": lambda row, _: str(row["threads"]),
        "GB/s": lambda row, _: f"{row['rate']:.1f}",
        "against, GB/s": lambda row, _: f"{row['other']:.1f}",
        "ratio": lambda row, _: f"{row['ratio']:.2f}",
        "lowest to highest": lambda row, _: f"{row['lowest']:.2f} to {row['highest']:.2f}",
    },
    "latency": {
        "what": lambda row, _: row["what"],
        "microseconds": lambda row, _: f"{median(row['microseconds']):.1f}",
        "lowest to highest": lambda row, _: f"{row['microseconds'][0]:.1f} to {row['microseconds'][-1]:.1f}",
    },
    "cuda": {
        "what": lambda row, _: row["what"],
        "microseconds": lambda row, _: f"{row['microseconds']:,.0f}",
        "GB/s moved": _rate(1, 0),
        "G values/s": lambda row, _: f"{row['values'] / 1e9:,.1f}" if row["values"] else "",
        "of the limit": lambda row, _: f"{median(row['shares']):.2f}",
        "lowest to highest": lambda row, _: f"{row['shares'][0]:.2f} to {row['shares'][-1]:.2f}",
    },
    "sizes": {
        "output": lambda row, _: _size(row["bytes"]),
        "run": lambda row, _: row["what"],
        "GB/s": _rate(1, 1),
        "lowest to highest": _spread(1, 1),
    },
    "threads": {
        "threads": lambda row, _: str(row["threads"]),
        "run": lambda row, _: row["what"],
        "GB/s": _rate(1, 1),
        "lowest to highest": _spread(1, 1),
    },
}
"""The columns of each section: how a row, among all rows, fills them."""

TEXT = {"decoder", "output", "run", "what", "what : against"}
"""Columns that are not numbers."""

TITLES = {
    "peers": "Peers",
    "limits": "Against the limits of memory",
    "latency": "Latency",
    "sizes": "By size of output, bfloat16",
    "threads": "By threads, bfloat16",
    "cuda": "On a CUDA device",
}


def table(section: str, rows: list[Row]) -> str:
    """Return the rows of a section as a Markdown table."""
    columns = TABLES[section]
    rules = ("---" if name in TEXT else "---:" for name in columns)
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(cell(row, rows) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines)


def caption(section: dict[str, Any]) -> str:
    """Return how and where a section was measured."""
    device = f"{section['device']}; " if "device" in section else ""
    return (
        f"{section['date']}, {count(section['threads'], 'thread')}, medians of {section['rounds']} rounds in turn; "
        f"{device}{describe(section['machine'])}"
    )


def markdown(results: dict[str, Any]) -> str:
    """Return all sections."""
    parts = ["# Figures\n\nWritten by `python -m benchmarks`.\n\n![plot](results.png)\n"]
    for name, section in results.items():
        parts.append(f"## {TITLES[name]}\n\n{caption(section)}\n\n{table(name, section['rows'])}\n")
    return "\n".join(parts)


def with_table(text: str, results: dict[str, Any]) -> str:
    """Return a text with the table of peers between its markers.

    Raises
    ------
    ValueError
        If it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"expected {BEGIN!r} and, behind it, {END!r}")
    section = results["peers"]
    return f"{before}{begin}\n{table('peers', section['rows'])}\n\n{caption(section)}.\n{end}{after}"
