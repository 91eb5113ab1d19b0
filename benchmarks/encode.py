"""The CPU encoder compared with the rate at which its values can be loaded, and with torchao."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial, reduce

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

import mxfp4np
from benchmarks.timing import Row, Subject, compare
from mxfp4np.backends.cpu.simd import I8, I32, load, offset, shuffle, store, vector
from mxfp4np.backends.memory import address_of, aligned_empty
from mxfp4np.cli.timing import Run, in_threads
from mxfp4np.format import DTYPES, RULES, decoded_dtype

ROWS = 2048  # of 2880 values for each expert that is asked for: 12 MB of bfloat16
CHUNK_BLOCKS = 1 << 15


@intrinsic(prefer_literal=True)
def load_block(typingctx, values, codes, scale, itemsize):  # noqa: ARG001
    """Load 32 values, and store 17 bytes that are made of all of them."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        values, codes, scale, _ = args
        nbytes = 32 * itemsize.literal_value
        lines = [load(builder, offset(builder, values, i), vector(I8, 64)) for i in range(0, nbytes, 64)]
        line = reduce(builder.xor, lines)
        block = reduce(builder.xor, [shuffle(builder, line, line, range(i, i + 16)) for i in range(0, 64, 16)])
        store(builder, block, codes)
        store(builder, builder.extract_element(block, I32(0)), scale)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, itemsize), codegen


def load_limit(x: np.ndarray, out: mxfp4np.MXFP4Array, threads: int) -> Run:
    """Return a run that loads as many values and stores as many bytes as encoding does, and encodes nothing."""
    values, codes, scales, itemsize = address_of(x), address_of(out.blocks), address_of(out.scales), x.itemsize

    @njit(nogil=True)
    def kernel(start, stop):
        for i in range(start, stop):
            load_block(values + 32 * itemsize * i, codes + 16 * i, scales + i, itemsize)

    return lambda: in_threads(kernel, out.scales.size, CHUNK_BLOCKS, threads)


def encode(x: np.ndarray, out: mxfp4np.MXFP4Array, threads: int, rule: str = "even") -> Run:
    return lambda: mxfp4np.encode(x, rule, out=out, num_threads=threads)


def measure(options: Namespace) -> list[Row]:
    """Return rows for each dtype with the given threads and with one."""
    values = np.random.default_rng(0).standard_normal((ROWS * options.experts, 2880), np.float32)
    rows: list[Row] = []
    for threads in sorted({options.threads, 1}, reverse=True):
        floor = 0.7 if threads <= 2 else None
        for dtype in DTYPES:
            x = aligned_empty(values.shape, decoded_dtype(dtype))
            x[...] = values
            out, columns = mxfp4np.encode(x), np.ascontiguousarray(x.T).T
            nbytes = x.nbytes + out.nbytes
            rules = [
                Subject("encode : load limit", f"{dtype}, {rule}", encode(x, out, threads, rule), nbytes, floor)
                for rule in (RULES if dtype == "float32" else ("even",))
            ]
            rows += compare((load_limit(x, out, threads), nbytes), rules, options.rounds, threads)
            subject = Subject("encode columns : encode rows", dtype, encode(columns, out, threads), nbytes)
            rows += compare((encode(x, out, threads), nbytes), [subject], options.rounds, threads)
        rows += torchao(values[: len(values) // 4], threads, options.rounds)
    return rows


def torchao(values: np.ndarray, threads: int, rounds: int) -> Iterator[Row]:
    """Compare with `to_mx` if torchao is installed, new outputs on both sides."""
    try:
        import torch
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    except ImportError as error:
        print(f"encode is not compared with torchao: {error}", file=sys.stderr)
        return
    torch.set_num_threads(threads)
    for dtype in ("bfloat16", "float32"):  # it takes no float16
        x, tensor = values.astype(decoded_dtype(dtype)), torch.from_numpy(values).to(getattr(torch, dtype))
        ours = partial(mxfp4np.encode, x, num_threads=threads)
        theirs = partial(to_mx, tensor, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
        subject = Subject("encode, new output : torchao `to_mx`", dtype, ours, x.nbytes)
        # Torch's threads keep the processor busy for a while after a call.
        yield from compare((theirs, x.nbytes), [subject], rounds, threads, before=lambda: time.sleep(0.05))
