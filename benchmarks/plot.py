"""A plot of three panels: speed by peer, by size of the output, by threads; and one of products."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, LIMIT, PEER = "#0b6e99", "#9a9a9a", "#d08c60"
STYLES = {
    "output reused": {"color": OURS, "marker": "o"},
    "new output": {"color": OURS, "marker": "o", "linestyle": ":", "markerfacecolor": "white"},
    "limit: stream": {"color": LIMIT, "marker": "s", "linestyle": "--"},
    "limit: memset": {"color": LIMIT, "marker": "^", "linestyle": ":"},
    "np.copyto": {"color": PEER, "marker": "^", "linestyle": "--"},
}


def write(results: dict[str, Any], path: Path) -> None:
    """Write a panel for each section that was measured."""
    panels = {name: panel for name, panel in PANELS.items() if name in results}
    if not panels:
        return
    widths = [1.5 if name == "peers" else 1.0 for name in panels]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * sum(widths), 4.8), width_ratios=widths, layout="constrained", squeeze=False
    )
    for ax, (name, panel) in zip(axes[0], panels.items(), strict=True):
        panel(ax, results[name]["rows"])
        ax.spines[["top", "right"]].set_visible(False)
    section = next(iter(results.values()))
    figure.suptitle(
        f"Decoding MXFP4 on {section['machine']['cpu']}, {section['machine']['cpus']} CPUs, {section['date']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _peers(ax: Axes, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["rates"]]
    names = [f"{row['name'].replace('*', '').replace('`', '')}, {row['dtype']}" for row in rows]
    rates = [median(row["rates"]) / 1e6 for row in rows]
    colors = [OURS if "mxfp4np" in name else LIMIT if name.startswith("limit") else PEER for name in names]
    bars = ax.barh(names, rates, color=colors)
    ax.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.set(xscale="log", title="Million values per second, log scale")
    ax.set_xlim(left=10, right=4 * max(rates))
    ax.tick_params(axis="y", labelsize=8, length=0)


def _lines(ax: Axes, rows: list[dict[str, Any]], x: str) -> None:
    for what in dict.fromkeys(row["what"] for row in rows):
        line = [row for row in rows if row["what"] == what]
        xs = [row[x] for row in line]
        lowest, highest = ([row["rates"][i] for row in line] for i in (0, -1))
        ax.plot(xs, [median(row["rates"]) for row in line], label=what, markersize=5, **STYLES[what])
        ax.fill_between(xs, lowest, highest, color=STYLES[what]["color"], alpha=0.12, lw=0)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8, frameon=False)


def _sizes(ax: Axes, rows: list[dict[str, Any]]) -> None:
    _lines(ax, rows, "bytes")
    sizes = sorted({row["bytes"] for row in rows})
    ax.set_xscale("log", base=2)
    labels = [f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB" for size in sizes]
    ax.set_xticks(sizes, labels, rotation=40, ha="right", fontsize=8)
    ax.set(title="GB/s of bfloat16, by size of output")


def _threads(ax: Axes, rows: list[dict[str, Any]]) -> None:
    _lines(ax, rows, "threads")
    ax.set_xticks(sorted({row["threads"] for row in rows}))
    ax.set(title="GB/s of bfloat16, by threads")


def products(section: dict[str, Any], path: Path) -> None:
    """Write a plot of products of one vector: bars of each kind and of its limit, for each number of threads."""
    rows = [row for row in section["rows"] if row["case"].startswith("one vector : ")]
    threads = sorted({row["threads"] for row in rows})
    figure, axes = plt.subplots(1, len(threads), figsize=(3.6 * len(threads), 2.4), layout="constrained", squeeze=False)
    for ax, n in zip(axes[0], threads, strict=True):
        bars: dict[str, tuple[float, str]] = {}
        for row in (row for row in rows if row["threads"] == n):
            name, color = ("reading alone", LIMIT) if "read" in row["case"] else ("ggml, int8", PEER)
            bars[name] = row["other"], color
            bars.setdefault(f"mxfp4np, {row['variant']}", (row["rate"], OURS))
        drawn = ax.barh(list(bars), [rate for rate, _ in bars.values()], color=[color for _, color in bars.values()])
        ax.bar_label(drawn, [f"{rate:.1f}" for rate, _ in bars.values()], padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.set_title(f"{n} thread{'s' * (n > 1)}", fontsize=9)
        ax.tick_params(axis="y", labelsize=8, length=0)
        ax.spines[["top", "right"]].set_visible(False)
    cpu, date = section["machine"]["cpu"], section["date"]
    figure.suptitle(f"One vector times packed weights, GB/s of packed bytes; {cpu}, {date}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PANELS = {"peers": _peers, "sizes": _sizes, "threads": _threads}
