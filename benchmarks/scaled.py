"""FP8, MXFP8 and NVFP4 on the CPU, compared with what the memory allows, and with other ways to decode FP8.

`stream_elements` loads the codes and stores as many bytes as the output has, past the cache, and decodes nothing.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import ml_dtypes
import numpy as np

from benchmarks.timing import Row, Subject, compare
from mxfp4np.backends.cpu.driver import stream_elements
from mxfp4np.cli.timing import Run
from mxfp4np.format import DTYPES, element_values
from mxfp4np.scaled import ScaledArray

SHAPE = 4096, 7168  # a matrix of DeepSeek-V3
PEER_ROWS = 512  # that peers decode, a thousandth as fast


def measure(options: Namespace) -> Iterator[Row]:
    """Yield a row for each format and dtype, and for each peer."""
    rng = np.random.default_rng(0)
    rows, columns = options.experts * SHAPE[0] // 8, SHAPE[1]
    part = (100 * rng.standard_normal((64, columns), np.float32)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    codes = np.tile(part.view(np.uint8), (rows // 64, 1))
    nibbles = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    exponents = rng.integers(118, 126, (rows, columns // 32), np.uint8)
    e4m3 = rng.integers(40, 120, (rows, columns // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    arrays = {
        "FP8, blocks of 128 x 128": ScaledArray(codes, random(rng, rows // 128, columns // 128), "E4M3", (128, 128)),
        "FP8, channels": ScaledArray(codes, random(rng, rows, 1), "E4M3", (1, columns)),
        "FP8 E5M2, channels": ScaledArray(codes, random(rng, rows, 1), "E5M2", (1, columns)),
        "MXFP8": ScaledArray(codes, exponents, "E4M3"),
        "NVFP4": ScaledArray(nibbles, e4m3, "E2M1", (1, 16), 0.01),
    }
    for threads in dict.fromkeys((1, options.threads)):
        for name, array in arrays.items():
            for dtype in DTYPES:
                out = array.decode(dtype)
                limit = partial(stream_elements, array.blocks, out, num_threads=threads)
                run = partial(array.decode, out=out, num_threads=threads)
                subject = Subject(f"{name} : `stream_elements`", dtype, run, out.nbytes, floor=0.9)
                yield from compare((limit, out.nbytes), [subject], options.rounds, threads)
    array = arrays["FP8, channels"]
    out = array.decode()
    ours = partial(array.decode, out=out, num_threads=options.threads)
    others = [
        Subject(f"{name} : this library, values", "bfloat16", run, PEER_ROWS * columns)
        for name, run in peers(array[:PEER_ROWS]).items()
    ]
    yield from compare((ours, out.size), others, options.rounds, options.threads)


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return scales as weights have them."""
    return rng.uniform(1e-4, 2e-4, shape).astype(np.float32)


def peers(array: ScaledArray) -> dict[str, Run]:
    """Return other ways to decode FP8 with a scale for a channel, in one thread; torch only if it is installed."""
    codes, scales, table = array.blocks, array.scales, element_values("E4M3")
    float8, bfloat16 = codes.view(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
    found: dict[str, Run] = {
        "ml_dtypes": lambda: (float8.astype(np.float32) * scales).astype(bfloat16),
        "a table in NumPy": lambda: (table[codes] * scales).astype(bfloat16),
    }
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(1)
    tensor = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    factors = torch.from_numpy(np.array(scales))
    return {**found, "torch": lambda: (tensor.to(torch.float32) * factors).to(torch.bfloat16)}
