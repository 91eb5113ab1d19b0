"""Time the first decode of a new process, with an empty kernel cache and with a warm one, and the import alone.

python -m benchmarks.startup
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

DECODE = """
import time, numpy as np, mxfp4np
blocks, scales = np.zeros(({count}, 16), np.uint8), np.zeros({count}, np.uint8)
begin = time.perf_counter()
mxfp4np.decode(blocks, scales, num_threads=2)
print(time.perf_counter() - begin)
"""
COUNTS = {"alone": 1000, "with another thread": 200_000}
IMPORT = "import time, numpy; begin = time.perf_counter(); import mxfp4np; print(time.perf_counter() - begin)"


def seconds(script: str, cache: str) -> float:
    """Run a script that prints seconds."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    return float(
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    )


def main() -> None:
    """Measure and print."""
    found: dict[str, list[float]] = {}
    for _ in range(5):
        for who, count in COUNTS.items():
            script = DECODE.format(count=count)
            with tempfile.TemporaryDirectory() as cache:
                found.setdefault(f"first decode {who}, empty cache", []).append(seconds(script, cache))
                found.setdefault(f"first decode {who}, warm cache", []).append(seconds(script, cache))
        found.setdefault("import", []).append(seconds(IMPORT, ""))
    for what, values in found.items():
        print(f"{what}: {statistics.median(values):.4f} s ({min(values):.4f} to {max(values):.4f})")


if __name__ == "__main__":
    main()
