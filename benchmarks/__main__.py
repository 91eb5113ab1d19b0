"""Measure everything, and write JSON, Markdown and a plot.

    python -m pip install '.[bench]'
    python -m pip install --no-deps --ignore-requires-python gpt-oss
    python -m benchmarks --write README.md

Sections that are not measured anew keep what the JSON has: ``--only`` alone writes the reports again. So does ``cuda``
where there is no CuPy, and the plot where there is no matplotlib.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import limits, peers, report, scaling
from mxfp4np.backends.threads import default_num_threads
from mxfp4np.cli.timing import machine


def cuda(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a CUDA device, which needs CuPy."""
    from benchmarks.cuda import measure

    return measure(options)


SECTIONS = {
    "peers": peers.measure,
    "limits": limits.measure,
    "latency": limits.latency,
    "sizes": scaling.sizes,
    "threads": scaling.threads,
    "cuda": cuda,
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--experts", type=int, default=16, help="of 33 MB of bfloat16 each (default: 16)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=default_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table of peers between its markers")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    results = {}
    for name, measure in SECTIONS.items():
        if name in options.only and (name != "cuda" or find_spec("cupy")):
            print(f"measuring {name}", file=sys.stderr)
            results[name] = {
                "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
                "machine": machine(*peers.PACKAGES),
                "threads": options.threads,
                "rounds": options.rounds,
                "rows": measure(options),
            }
            if name == "cuda":
                from benchmarks.cuda import device

                results[name]["device"] = device()
            print(report.table(name, results[name]["rows"]), end="\n\n")
        elif name in old:
            results[name] = old[name]
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(results))
    if find_spec("matplotlib"):
        from benchmarks import plot

        plot.write(results, path.with_suffix(".png"))
    if options.write:
        options.write.write_text(report.with_table(options.write.read_text(), results))


if __name__ == "__main__":
    main()
