"""Products with packed weights on a CUDA device, compared with reading the packed bytes.

A product of up to 16 vectors is two launches. What is between them counts, above all for one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import cupy
import numpy as np

import mxfp4np
from benchmarks.timing import Row, Subject, compare
from mxfp4np.cli.timing import Run

ROWS, GROUPS = 5760, 90  # of an expert of gpt-oss
EXPERTS = 32
VECTORS = 1, 2, 4, 8, 16, 64

_READ = """
const uint4* words = reinterpret_cast<const uint4*>(&data[0]);
const ptrdiff_t first = (i - threadIdx.x) * 8 + threadIdx.x;
unsigned bits = 0;
#pragma unroll
for (int n = 0; n < 8; ++n)
    if (first + n * blockDim.x < count) {
        const uint4 word = __ldcs(words + first + n * blockDim.x);
        bits ^= word.x ^ word.y ^ word.z ^ word.w;
    }
if (bits == 0x12345678u)  // so that nothing is left out
    out[0] = bits;
"""


def read(data: cupy.ndarray) -> Run:
    """Return a run that reads a contiguous array and does nothing with it."""
    kernel = cupy.ElementwiseKernel("raw uint8 data, int64 count", "raw uint32 out", _READ, "read", no_return=True)
    count, out = data.nbytes // 16, cupy.empty(1, np.uint32)
    return lambda: kernel(data, count, out, size=-(-count // 1024) * 128, block_size=128)


def products(rounds: int, threads: int, clock: Callable[[Run], float]) -> Iterator[Row]:
    """Yield a row for each number of experts and vectors."""
    blocks = cupy.random.randint(0, 256, (EXPERTS * ROWS, GROUPS, 16), np.uint8)
    scales = cupy.random.randint(110, 130, (EXPERTS * ROWS, GROUPS), np.uint8)
    inline = cupy.concatenate([scales[..., None], blocks], axis=-1)
    subjects = []
    for count in VECTORS:
        x = cupy.random.standard_normal((count, 32 * GROUPS), np.float32)
        for experts in (EXPERTS, 4, 1):
            rows = slice(0, experts * ROWS)
            packed = mxfp4np.MXFP4Array(blocks[rows], scales[rows])
            case = f"CUDA product, {experts} expert{'s'[: experts > 1]} : reading the packed bytes"
            floor = 0.6 if experts == EXPERTS and count <= 16 else None
            subjects.append(Subject(case, f"{count} vectors", partial(mxfp4np.linear, x, packed), packed.nbytes, floor))
        packed = mxfp4np.MXFP4Array(inline[..., 1:], inline[..., 0], "halves")
        case = f"CUDA product, {EXPERTS} experts, blocks of 17 bytes : reading the packed bytes"
        subjects.append(Subject(case, f"{count} vectors", partial(mxfp4np.linear, x, packed), packed.nbytes))
    subjects.sort(key=lambda subject: subject.case)
    yield from compare((read(blocks), blocks.nbytes), subjects, rounds, threads, clock=clock)
