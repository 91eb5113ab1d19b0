"""Compare the rate of reading U32 words and 17-byte blocks with that of the plain layout, from mapped files in memory.

    python -m benchmarks.layouts

All hold the same codes and scales. Rounds are interleaved, each divided by the plain layout's rate of its own round,
and the median of those is printed: it should be 0.8 at least. GGUF is measured without its file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import mxfp4np
from mxfp4np.storage.writer import write_safetensors

ROWS, GROUPS = 8192, 256


def write(folder: Path) -> dict[str, tuple[mxfp4np.Checkpoint, str]]:
    """Write the layouts and return a checkpoint and a name of each."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (ROWS, GROUPS, 16), np.uint8)
    scales = rng.integers(110, 140, (ROWS, GROUPS), np.uint8)
    inline = np.concatenate([(scales - np.uint8(127))[..., None], blocks], axis=-1)
    codes = {
        "plain": {"w.blocks": ("U8", blocks.shape), "w.scales": ("U8", scales.shape)},
        "U32 words": {"w.weight": ("U32", (ROWS, 4 * GROUPS)), "w.scales": ("U8", scales.shape)},
        "17-byte blocks": {"w.weight": ("U8", (ROWS, 17 * GROUPS))},
    }
    found = {}
    for name, specs in codes.items():
        path = folder / f"{name}.safetensors"
        write_safetensors(path, specs, [inline] if len(specs) == 1 else [blocks, scales])
        checkpoint = mxfp4np.Checkpoint(path, layout="quark-mx" if len(specs) == 1 else None)
        found[name] = checkpoint, next(iter(checkpoint))
    return found


def halves(plain: mxfp4np.MXFP4Array) -> mxfp4np.MXFP4Array:
    """Return the blocks of GGUF: 17 bytes to each, nibbles in halves."""
    memory = np.concatenate([plain.scales[..., None], plain.blocks], axis=-1)
    return mxfp4np.MXFP4Array(memory[..., 1:], memory[..., 0], "halves")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = write(Path(folder))
        tasks = {name: partial(ckpt.get, tensor) for name, (ckpt, tensor) in checkpoints.items()}
        ckpt, tensor = checkpoints["plain"]
        tasks["GGUF"] = halves(ckpt.packed(tensor)).decode
        out = np.empty(
            (ROWS, 32 * GROUPS), mxfp4np.decode(np.zeros((1, 16), "u1"), np.zeros(1, "u1"), args.dtype).dtype
        )
        rates: dict[str, list[float]] = {name: [] for name in tasks}
        for i in range(args.rounds + 1):
            for name, task in tasks.items():
                begin = time.perf_counter()
                task(out=out, num_threads=args.threads)
                if i:  # the first round compiles and touches
                    rates[name].append(out.nbytes / (time.perf_counter() - begin) / 1e9)
    figures = {
        name: {
            "GB/s": round(statistics.median(rate), 2),
            "of plain": round(statistics.median(r / p for r, p in zip(rate, rates["plain"], strict=True)), 3),
        }
        for name, rate in rates.items()
    }
    if args.json:
        print(json.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name:<16}{figure['GB/s']:8.2f} GB/s of output{figure['of plain']:8.2f} of plain")


if __name__ == "__main__":
    main()
