"""Products with packed weights on the CPU, beside reading their bytes, ggml, and NumPy with decoded weights.

`read` loads the packed bytes and multiplies nothing. ggml is compared where it has been built; see `benchmarks.ggml`.
After a product of NumPy's, all runs wait: the threads of its BLAS stay busy for a while.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

import mxfp4np
from benchmarks import ggml
from benchmarks.timing import Row, Subject, compare, repeated
from mxfp4np.backends.cpu.products import read
from mxfp4np.cli.timing import Run, machine

ROWS, COLUMNS = 5760, 2880  # an expert of gpt-oss-20b
MANY = 512


def measure(options: Namespace) -> Iterator[Row]:
    """Yield rows for one and the given number of threads; those of BLAS, which takes all of them, only once."""
    rng = np.random.default_rng(0)
    shape = options.experts * ROWS, COLUMNS // 32
    packed = mxfp4np.MXFP4Array(rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(118, 126, shape, np.uint8))
    for threads in dict.fromkeys((1, options.threads)):
        yield from of_one_vector(packed, options, threads)
        yield from of_some_vectors(packed[: 4 * ROWS], options, threads)
        yield from of_a_file(packed, options, threads)
    yield from of_many_vectors(packed[: 4 * ROWS], options)


def product(packed: mxfp4np.MXFP4Array, vectors: int, threads: int | None = None, activations: str = "float32") -> Run:
    """Return a run that multiplies by normally distributed numbers."""
    x = np.random.default_rng(1).standard_normal((vectors, packed.shape[1]), np.float32)
    return partial(mxfp4np.linear, x, packed, activations=activations, num_threads=threads)


def of_one_vector(packed: mxfp4np.MXFP4Array, options: Namespace, threads: int) -> Iterator[Row]:
    """Compare with `read`; and one expert with a large matrix, by packed bytes."""
    limit = partial(read, packed.blocks, packed.scales, num_threads=threads), packed.nbytes
    wide = machine()["code"] == "avx512"
    floors = {"float32": 0.8 if wide and threads >= 16 else 0.25, "int16": 0.6}
    subjects = [
        Subject("one vector : `read`", name, product(packed, 1, threads, name), packed.nbytes, floor)
        for name, floor in floors.items()
    ]
    yield from compare(limit, subjects, options.rounds, threads)
    yield from of_ggml(packed, options, threads)
    expert = packed[ROWS : 2 * ROWS]
    for name in floors:
        whole = product(packed, 1, threads, name), packed.nbytes
        run = repeated(product(expert, 1, threads, name), options.experts)
        subject = Subject("one expert : many, per byte", name, run, options.experts * expert.nbytes, floor=1 / 1.3)
        yield from compare(whole, [subject], options.rounds, threads)


def of_ggml(packed: mxfp4np.MXFP4Array, options: Namespace, threads: int) -> Iterator[Row]:
    """Compare with ggml's kernel for repacked weights, whose activations have 8 bits."""
    x = np.random.default_rng(1).standard_normal((1, COLUMNS), np.float32)
    try:
        peer = ggml.Product([packed], x, threads=threads, repack=True)
    except ImportError:
        return
    for name, floor in (("float32", None), ("int16", 1.1)):
        subject = Subject("one vector : ggml, repacked", name, product(packed, 1, threads, name), packed.nbytes, floor)
        yield from compare((peer, packed.nbytes), [subject], options.rounds, threads)


def of_some_vectors(packed: mxfp4np.MXFP4Array, options: Namespace, threads: int) -> Iterator[Row]:
    """Compare with one vector, by multiplications."""
    subjects = [
        Subject(f"{n} vectors : one, per product", "float32", product(packed, n, threads), n * packed.size, floor)
        for n, floor in ((2, None), (4, None), (8, 4.0), (16, None), (31, None))
    ]
    yield from compare((product(packed, 1, threads), packed.size), subjects, options.rounds, threads)


def of_a_file(packed: mxfp4np.MXFP4Array, options: Namespace, threads: int) -> Iterator[Row]:
    """Compare a mapped file that is cached with memory."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        mxfp4np.save_file({"w": packed}, path)
        with mxfp4np.Checkpoint(path) as checkpoint:
            mapped = checkpoint.packed("w")
            for name in ("float32", "int16"):
                run, memory = product(mapped, 1, threads, name), product(packed, 1, threads, name)
                subject = Subject("mapped file, cached : memory", name, run, packed.nbytes, floor=0.9)
                yield from compare((memory, packed.nbytes), [subject], options.rounds, threads)


def of_many_vectors(packed: mxfp4np.MXFP4Array, options: Namespace) -> Iterator[Row]:
    """Compare with NumPy's product of decoded weights."""
    weights = packed.decode("float32")
    for vectors, floor in ((16, None), (32, None), (64, None), (MANY, 0.8)):
        x = np.random.default_rng(1).standard_normal((vectors, COLUMNS), np.float32)
        out = np.empty((vectors, len(packed)), np.float32)
        work = vectors * packed.size
        limit: Run = partial(np.matmul, x, weights.T, out=out)
        subject = Subject(f"{vectors} vectors : NumPy, decoded", "float32", product(packed, vectors), work, floor)
        wait = partial(time.sleep, 0.1)
        yield from compare((limit, work), [subject], options.rounds, options.threads, before=wait)
