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
blocks, scales = np.zeros((1000, 16), np.uint8), np.zeros(1000, np.uint8)
begin = time.perf_counter()
mxfp4np.decode(blocks, scales)
print(time.perf_counter() - begin)
"""
IMPORT = "import time, numpy; begin = time.perf_counter(); import mxfp4np; print(time.perf_counter() - begin)"


def seconds(script: str, cache: str) -> float:
    """Run a script that prints seconds."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    return float(
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    )


def main() -> None:
    """Measure and print."""
    cold = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(seconds(DECODE, cache))
            warm = [seconds(DECODE, cache) for _ in range(5)]
            imports = [seconds(IMPORT, cache) for _ in range(5)]
    for what, values in (("first decode, empty cache", cold), ("first decode, warm cache", warm), ("import", imports)):
        print(f"{what}: {statistics.median(values):.4f} s ({min(values):.4f} to {max(values):.4f})")


if __name__ == "__main__":
    main()
