"""Results as Markdown: a table for each section, and one of all floors. It knows the rows' keys, not how they came."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.peers import REFERENCE
from benchmarks.timing import Row
from mxfp4np.cli.timing import describe
from mxfp4np.text import count

Cell = Callable[[Row, list[Row]], str]
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
DIGITS = {"us": 1, "ms": 1, "s": 2, "MB": 0}


def _rate(unit: float, digits: int) -> Cell:
    return lambda row, _: f"{median(row['rates']) / unit:,.{digits}f}" if row["rates"] else row["missing"]


def _spread(unit: float, digits: int) -> Cell:
    return lambda row, _: _range(row["rates"][0] / unit, row["rates"][-1] / unit, digits) if row["rates"] else ""


def _range(low: float, high: float, digits: int) -> str:
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def _times_reference(row: Row, rows: list[Row]) -> str:
    reference = next(other["rates"] for other in rows if other["name"] == REFERENCE)
    return f"{median(row['rates']) / median(reference):,.1f}" if row["rates"] and reference else ""


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >> 20 else f"{nbytes >> 10} KiB"


def bound(row: Row) -> tuple[str, str]:
    """Return the floor or ceiling of a row and whether its median, as printed, meets it; empty strings without one."""
    if row.get("floor") is not None:
        return f"{row['floor']}", "met" if round(row["ratio"], 2) >= row["floor"] else "below"
    if row.get("ceiling") is not None:
        return f"{row['ceiling']} {row['unit']}", "met" if row["value"] <= row["ceiling"] else "above"
    return "", ""


def _bound(row: Row, _: list[Row]) -> str:
    return " ".join(bound(row)).strip()


RATIOS: dict[str, Cell] = {
    "what : compared with": lambda row, _: row["case"],
    "variant": lambda row, _: row["variant"],
    "threads": lambda row, _: str(row["threads"]),
    "GB/s": lambda row, _: f"{row['rate']:,.1f}",
    "compared with, GB/s": lambda row, _: f"{row['other']:,.1f}",
    "ratio": lambda row, _: f"{row['ratio']:.2f}",
    "lowest to highest": lambda row, _: _range(row["lowest"], row["highest"], 2),
    "floor": _bound,
}
AMOUNTS: dict[str, Cell] = {
    "what": lambda row, _: row["case"],
    "variant": lambda row, _: row["variant"],
    "threads": lambda row, _: str(row["threads"]),
    "median": lambda row, _: f"{row['value']:,.{DIGITS[row['unit']]}f} {row['unit']}",
    "lowest to highest": lambda row, _: _range(row["lowest"], row["highest"], DIGITS[row["unit"]]),
    "at most": _bound,
}
RATES: dict[str, Cell] = {
    "run": lambda row, _: row["what"],
    "GB/s": _rate(1, 1),
    "lowest to highest": _spread(1, 1),
}
PEERS: dict[str, Cell] = {
    "decoder": lambda row, _: row["name"],
    "output": lambda row, _: row["dtype"],
    "million values/s": _rate(1e6, 0),
    "lowest to highest": _spread(1e6, 0),
    "times the reference loader": _times_reference,
}
CONVERTERS: dict[str, Cell] = {
    "stored as": lambda row, _: row["case"],
    "experts": lambda row, _: str(row["experts"]),
    "converter": lambda row, _: row["variant"],
    "stored, result, GB": lambda row, _: f"{row['stored'] / 1e9:.1f}, {row['bytes'] / 1e9:.1f}",
    "seconds": lambda row, _: f"{median(row['seconds']):.1f}",
    "lowest to highest": lambda row, _: _range(row["seconds"][0], row["seconds"][-1], 1),
    "times `convert`": lambda row, _: f"{row['ratio']:.1f}",
    "peak anonymous MB": lambda row, _: f"{row['anonymous'] / 1e6:,.0f}",
    "peak resident MB": lambda row, _: f"{row['resident'] / 1e6:,.0f}",
}
SECTIONS: dict[str, tuple[str, dict[str, Cell]]] = {
    "peers": ("Peers", PEERS),
    "limits": ("Decoding compared with the limits of memory", RATIOS),
    "latency": ("Latency", AMOUNTS),
    "encode": ("Encoding", RATIOS),
    "startup": ("A new process", AMOUNTS),
    "opening": ("Opening a checkpoint", AMOUNTS),
    "conversion": (
        "Converting a checkpoint",
        RATIOS | {"peak anonymous MB": lambda row, _: f"{row['peak'] / 1e6:,.0f}"},
    ),
    "converters": ("Converting a part of a layer of DeepSeek-V4-Flash", CONVERTERS),
    "layer": ("Converting a whole layer of DeepSeek-V4-Flash", CONVERTERS),
    "ray": ("On a Ray cluster of this machine", RATIOS | {"ratio": lambda row, _: f"{row['ratio']:.3f}"}),
    "sizes": ("By size of output, bfloat16", {"output": lambda row, _: _size(row["bytes"]), **RATES}),
    "threads": ("By threads, bfloat16", {"threads": lambda row, _: str(row["threads"]), **RATES}),
    "scaled": ("FP8, MXFP8 and NVFP4", RATIOS | {"ratio": lambda row, _: f"{row['ratio']:.3f}"}),
    "products": (
        "Products with packed weights: GB/s of packed bytes, or billion products/s",
        {name.replace("GB/s", "G/s"): cell for name, cell in RATIOS.items()},
    ),
    "model": (
        "One layer of gpt-oss-20b",
        {name: cell for name, cell in AMOUNTS.items() if name != "at most"}
        | {"times the limit": lambda row, _: f"{row['times']:.2f}" if row["times"] else ""},
    ),
    "remote": ("Reading from a web server", RATIOS),
    "remote opening": ("Opening a checkpoint from a web server", AMOUNTS),
    "cuda": ("On a CUDA device", RATIOS),
}
"""The title of each section, and the columns of its table: how a row, among all rows, fills them."""

TEXT = {"converter", "decoder", "output", "run", "stored as", "what", "what : compared with", "variant"}
"""Columns that are not numbers."""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    rules = ("---" if name in TEXT else "---:" for name in columns)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def table(section: str, rows: list[Row]) -> str:
    """Return the rows of a section as a Markdown table."""
    columns = SECTIONS[section][1]
    return _table(list(columns), [[cell(row, rows) for cell in columns.values()] for row in rows])


def floors(rows: list[Row]) -> str:
    """Return a table of the cases that have a floor or a ceiling, with their medians for each number of threads."""
    rows = [row for row in rows if bound(row)[0]]
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    threads = sorted({row["threads"] for row in rows})
    if not rows:
        return ""

    def figures(rows: list[Row]) -> str:
        if not rows:
            return ""
        texts = [f"{row['value']:.{DIGITS[row['unit']]}f}" if "unit" in row else f"{row['ratio']:.2f}" for row in rows]
        low, high = (select(texts, key=float) for select in (min, max))
        verdict = next((bound(row)[1] for row in rows if bound(row)[1] != "met"), "met")
        return f"{low} {verdict}" if low == high else f"{low} to {high} {verdict}"

    return _table(
        ["what : compared with", "floor", *(count(n, "thread") for n in threads)],
        [
            [case, ", ".join(sorted({bound(row)[0] for row in found}))]
            + [figures([row for row in found if row["threads"] == n]) for n in threads]
            for case, found in cases.items()
        ],
    )


def caption(section: dict[str, Any]) -> str:
    """Return how and where a section was measured."""
    device = f"{section['device']}; " if "device" in section else ""
    return (
        f"{section['date']}, {count(section['threads'], 'thread')}, medians of {section['rounds']} interleaved rounds; "
        f"{device}{describe(section['machine'])}"
    )


def markdown(results: dict[str, Any]) -> str:
    """Return the floors and all sections."""
    parts = ["# Figures\n\nWritten by `python -m benchmarks`.\n\n![plot](results.png)\n"]
    if table_of_floors := floors([row for section in results.values() for row in section["rows"]]):
        parts.append(f"## Floors\n\n{table_of_floors}\n")
    for name, section in results.items():
        parts.append(f"## {SECTIONS[name][0]}\n\n{caption(section)}\n\n{table(name, section['rows'])}\n")
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
        raise ValueError(f"expected {BEGIN!r} followed by {END!r}")
    section = results["peers"]
    return f"{before}{begin}\n{table('peers', section['rows'])}\n\n{caption(section)}.\n{end}{after}"
