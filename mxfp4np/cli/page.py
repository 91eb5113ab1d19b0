"""What ``--html`` writes: one file that shows a checkpoint, or the errors of an encoding, in a browser, offline.

This module decides what is shown, and bounds it; ``page.html`` draws it. Names come from files of strangers: here they
become printable text, then JSON without a character that ends a script, and the page makes text of them, never HTML.
What a browser may run or load is bound by a policy to the one script of the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from pkgutil import get_data
from typing import Any, Final

from .. import __version__
from ..checkpoint import Checkpoint
from ..format import FP4_VALUES, SCALE_BIAS, SCALE_NAN
from ..rewrite.encode import Encoding, Errors, relative_error
from ..rewrite.findings import Verification
from ..storage.atomic import atomic_file
from ..summary import Row, collapse, label
from ..text import count, escape, format_bytes, shape_text
from .report import ScaleStats, Stats, file_lines

MOST_GROUPS: Final = 4000
"""Most rows of tensors: the largest groups, after which one row sums up the others."""

MOST_PICTURES: Final = 40
"""Most heat maps, and most histograms."""

MOST_CELLS: Final = 1 << 19
"""Most cells of all heat maps together."""

MOST_FINDINGS: Final = 1000

NAME_WIDTH: Final = 300
"""Most characters of a name."""

Kind = tuple[Any, ...]
Cell = Sequence[float | None]


def check_path(path: Path) -> None:
    """Refuse a name that no browser opens as a page, before anything is read: it may be that of the checkpoint.

    Raises
    ------
    ValueError
    FileNotFoundError
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: expected a name that ends in .html")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: expected the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")


class Counts:
    """What was counted of packed tensors, added up by group; of each tensor, only the means of its experts are kept."""

    def __init__(self) -> None:
        self.groups: dict[Kind, tuple[list[Row], Stats | ScaleStats]] = {}
        self.cells: dict[str, list[Cell]] = {}

    def add(self, row: Row, stats: Stats | ScaleStats) -> None:
        """Add the counts of a tensor."""
        members, total = self.groups.setdefault(row.kind, ([], type(stats)()))
        members.append(row)
        self.groups[row.kind] = members, type(stats).merged([total, stats])  # type: ignore[list-item]
        self.cells[row.name] = [
            (round(total / number - SCALE_BIAS, 1) if number else None, zeros, nan)
            for number, total, zeros, nan in stats.cells.tolist()
        ]


def of_checkpoint(
    checkpoint: Checkpoint, table: Sequence[Row], counts: Counts, verification: Verification
) -> dict[str, Any]:
    """Return what the page of a checkpoint shows."""
    infos = [row.info for row in table if row.info is not None]
    formats = dict.fromkeys(info.format for info in infos if info.format)
    facts = {
        "tensors": f"{len(table):,}",
        "stored": format_bytes(sum(info.nbytes for info in infos)),
        "decoded to bfloat16": format_bytes(sum(info.decoded_nbytes() for info in infos)),
        "quantised": ", ".join(formats) or "nothing",
        "files": f"{len(checkpoint.files):,}",
    }
    metrics = ("mean exponent of scales", "zero blocks or scales", "NaN blocks or scales")
    groups = {kind: members for kind, (members, _) in counts.groups.items()}
    return {
        "title": _text(checkpoint.folder.name or str(checkpoint.folder)),
        "place": _text(str(checkpoint.folder)),
        "facts": _facts(facts),
        "notes": [escape(line) for line in file_lines(checkpoint)],
        "findings": _findings(verification),
        **_groups(table),
        "pictures": _pictures(groups, counts.cells, metrics),
        "histograms": _histograms(counts),
    }


def of_encoding(result: Encoding) -> dict[str, Any]:
    """Return what the page of an encoding shows: the errors of what this run packed."""
    groups = collapse(Row(name, None, "") for name in result.errors)
    cells = {name: [(errors.relative, errors.worst, errors.nan_blocks)] for name, errors in result.errors.items()}
    facts = {
        "packed": count(len(result.packed), "tensor"),
        "relative error": f"{result.relative_error:.4f}",
        "written": format_bytes(result.written),
        "left as they are": count(len(result.left), "tensor"),
    }
    return {
        "title": _text(f"Errors of {result.folder.name}"),
        "place": _text(str(result.folder)),
        "facts": _facts(facts),
        "notes": [escape(warning) for warning in result.warnings()],
        "findings": None if result.verification is None else _findings(result.verification),
        "layers": _layers(groups.values(), result.errors),
        "pictures": _pictures(groups, cells, ("relative error", "error of the worst block", "NaN blocks")),
        "errors": [_error_row(group, result.errors) for group in list(groups.values())[:MOST_GROUPS]],
    }


def write(path: Path, page: Mapping[str, Any]) -> int:
    """Write the page that shows this, and return its bytes."""
    template = (get_data(__package__ or "", "page.html") or b"").decode()
    data = json.dumps(page, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
        for tag in ("style", "script")
        if (found := re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL))
    ]
    policy = f"default-src 'none'; style-src {digests[0]}; script-src {digests[1]}"
    values = {"policy": policy, "title": html.escape(page["title"]), "version": __version__, "data": data}
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template).encode()
    with atomic_file(path) as file:
        file.write(text)
    return len(text)


def _text(text: str) -> str:
    return escape(text, NAME_WIDTH)


def _facts(facts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, _text(text)) for name, text in facts.items()]


def _findings(verification: Verification) -> dict[str, Any]:
    shown = [escape(finding) for finding in verification.findings[:MOST_FINDINGS]]
    return {"summary": verification.summary, "list": shown}


def _path(group: Sequence[Row]) -> list[str]:
    """Return the parts of the name of a group; the dots within a list of ranges separate none."""
    return re.split(r"(?<![,.])\.(?![.,])", _text(label(group)))


def _groups(table: Iterable[Row]) -> dict[str, Any]:
    """Return a row for each group of tensors, in the checkpoint's order: the largest, and the sum of the others."""
    groups = list(collapse(table).values())
    sizes = [sum(row.info.nbytes for row in group if row.info is not None) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (groups[i][0].info is not None, -sizes[i]))[:MOST_GROUPS]
    rest = set(range(len(groups))).difference(order)
    return {
        "groups": [_group_row(groups[i], sizes[i]) for i in sorted(order)],
        "others": {
            "groups": len(rest),
            "tensors": sum(len(groups[i]) for i in rest),
            "stored": sum(sizes[i] for i in rest),
        },
    }


def _group_row(group: Sequence[Row], stored: int) -> dict[str, Any]:
    info = group[0].info
    found: dict[str, Any] = {"path": _path(group), "tensors": len(group), "stored": stored}
    if info is None:
        return {**found, "problem": escape(str(group[0].problem)), "format": "broken"}
    return {
        **found,
        "decoded": sum(row.info.decoded_nbytes() for row in group if row.info is not None),
        "shape": shape_text(info.shape),
        "format": _text(info.label),
        "layout": info.layout or "",
    }


def _pictures(
    groups: Mapping[Kind, Sequence[Row]], cells: Mapping[str, Sequence[Cell]], metrics: Sequence[str]
) -> dict[str, Any]:
    """Return heat maps: of each group one with a row for each layer and a column for each expert.

    Groups without experts share one, with a column for each of them.
    """
    pictures: list[dict[str, Any]] = []
    single: dict[tuple[str, str], Cell] = {}
    room, left_out = MOST_CELLS, 0
    for group in groups.values():
        found: dict[tuple[str, str], Cell] = {}
        for row in group:
            layer, *others = row.numbers or ("",)
            values = cells[row.name]
            for number, value in enumerate(values):
                found[layer, ".".join([*others, str(number)] if len(values) > 1 else others)] = value
        if all(column == "" for _, column in found):
            name = ".".join(part for part in _path(group) if not re.fullmatch(r"[\d#,.-]+", part))
            single |= {(layer, name): value for (layer, _), value in found.items()}
            continue
        picture = _picture(".".join(_path(group)), "expert", found, metrics, room)
        if picture is None or len(pictures) == MOST_PICTURES:
            left_out += 1
        else:
            room -= len(picture["rows"]) * len(picture["columns"])
            pictures.append(picture)
    if single:
        picture = _picture("", "tensor", single, metrics, room)
        left_out += picture is None
        pictures += [] if picture is None else [picture]
    return {"metrics": metrics, "list": pictures, "left_out": left_out}


def _picture(
    name: str, what: str, found: Mapping[tuple[str, str], Cell], metrics: Sequence[str], room: int
) -> dict[str, Any] | None:
    """Return a heat map, or None if there is no room for its cells."""
    rows = sorted({row for row, _ in found}, key=_order)
    columns = list(dict.fromkeys(column for _, column in found))
    if what == "expert":
        columns.sort(key=_order)
    if len(rows) * len(columns) > room:
        return None
    missing: Cell = [None] * len(metrics)
    values = list(zip(*(found.get((row, column), missing) for row in rows for column in columns), strict=True))
    return {
        "name": name,
        "what": what,
        "rows": rows,
        "columns": columns,
        "values": [_rounded(metric) if any(metric) else None for metric in values],
    }


def _order(text: str) -> tuple[Any, ...]:
    """Return what numbers separated by dots are sorted by; they may be longer than any integer is read."""
    return tuple((len(part), part) for part in text.split("."))


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    """Return the values in few digits; infinity and NaN, which JSON has no form for, as none."""
    return [None if x is None or not math.isfinite(x) else float(f"{x:.4g}") if x % 1 else int(x) for x in values]


def _histograms(counts: Counts) -> dict[str, Any]:
    """Return counts of codes and scales: of all MXFP4 tensors, and of each group."""
    shown = [(".".join(_path(group)), stats) for group, stats in counts.groups.values()]
    shown = shown[:MOST_PICTURES]
    mxfp4 = [stats for _, stats in counts.groups.values() if isinstance(stats, Stats)]
    if len(mxfp4) > 1:
        shown.insert(0, ("all MXFP4 tensors", Stats.merged(mxfp4)))
    return {
        "codes": [f"{value:g}" for value in FP4_VALUES],
        "bias": SCALE_BIAS,
        "nan": SCALE_NAN,
        "list": [{"name": name, **stats.to_json()} for name, stats in shown],
        "left_out": max(0, len(counts.groups) - MOST_PICTURES),
    }


def _layers(groups: Iterable[Sequence[Row]], errors: Mapping[str, Errors]) -> dict[str, Any]:
    """Return the relative error of all tensors of each layer together."""
    layers: dict[str, list[Errors]] = {}
    for row in chain.from_iterable(groups):
        if row.numbers:
            layers.setdefault(row.numbers[0], []).append(errors[row.name])
    names = sorted(layers, key=_order)[:MOST_GROUPS]
    return {"names": names, "errors": [relative_error(layers[name]) for name in names]}


def _error_row(group: Sequence[Row], errors: Mapping[str, Errors]) -> dict[str, Any]:
    """Return the errors of a group: of all its tensors together, and of the worst one."""
    several = {row.name: errors[row.name] for row in group}
    worst = max(several, key=lambda name: several[name].relative)
    return {
        "name": ".".join(_path(group)),
        "tensors": len(group),
        "error": relative_error(several.values()),
        "worst": several[worst].relative,
        "worst_tensor": _text(worst),
        "block": max(one.worst for one in several.values()),
        "nan_blocks": sum(one.nan_blocks for one in several.values()),
    }
