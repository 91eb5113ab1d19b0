"""Measure sections, and write JSON, Markdown and a plot.

    python -m pip install '.[bench]'
    python -m pip install --no-deps --ignore-requires-python gpt-oss
    python -m benchmarks --write docs/speed.md
    python -m benchmarks --only limits latency encode startup --threads 16 --out DIR

Sections that are not measured keep what the JSON has: ``--only`` alone writes the reports again. `cuda` needs CuPy, the
plot matplotlib, `ray` Ray; without them they are left out.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks import report
from benchmarks.peers import PACKAGES
from mxfp4np.backends.threads import default_num_threads
from mxfp4np.cli.timing import machine

SECTIONS = {
    "peers": "peers.measure",
    "limits": "limits.measure",
    "latency": "limits.latency",
    "encode": "encode.measure",
    "startup": "startup.startup",
    "opening": "startup.opening",
    "conversion": "conversion.measure",
    "converters": "converters.measure",
    "layer": "converters.whole_layer",
    "ray": "cluster.measure",
    "sizes": "scaling.sizes",
    "threads": "scaling.threads",
    "scaled": "scaled.measure",
    "products": "products.measure",
    "model": "model.measure",
    "remote": "remote.measure",
    "remote opening": "remote.opening",
    "cuda": "cuda.measure",
}
"""The module and the function that measure each section: called with the options, they return rows."""

NEEDS = {"cuda": "cupy", "ray": "ray"}
"""Sections that are left out without a package."""


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--experts", type=int, default=16, help="size of the data: of 33 MB of bfloat16 (default: 16)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=default_num_threads(), help="limits and encode: and one too")
    parser.add_argument(
        "--folder", type=Path, default=Path.cwd(), help="for temporary files; layer: 17 GB (default: here)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table of peers between its markers")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only:
        if name in NEEDS and not find_spec(NEEDS[name]):
            print(f"{name} is not measured: {NEEDS[name]} is not installed", file=sys.stderr)
            continue
        print(f"measuring {name}", file=sys.stderr)
        module, function = SECTIONS[name].split(".")
        measure = import_module(f"benchmarks.{module}")
        results[name] = {
            "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
            "machine": machine(*PACKAGES),
            "threads": options.threads,
            "rounds": options.rounds,
            "rows": list(getattr(measure, function)(options)),
        }
        if name == "cuda":
            results[name]["device"] = measure.device()
        print(report.table(name, results[name]["rows"]), end="\n\n", flush=True)
    results = {name: results[name] for name in SECTIONS if name in results}
    if floors := report.floors([row for name in options.only if name in results for row in results[name]["rows"]]):
        print(floors)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(results))
    if find_spec("matplotlib"):
        from benchmarks import plot

        plot.write(results, path.with_suffix(".png"))
        if "products" in results:
            plot.products(results["products"], path.with_name("products.png"))
    if options.write:
        options.write.write_text(report.with_table(options.write.read_text(), results))


if __name__ == "__main__":
    main()
