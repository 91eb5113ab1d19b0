"""Hold the CPU encoder against the memory it runs on, and against torchao: pairs of runs in turn, and their ratios.

    python -m benchmarks.encode --threads 2

`stream` loads the values and stores as many bytes as their blocks and scales have, with no encoding between the two:
the limit. Figures are of bytes read and written, or, with torchao, of values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

import mxfp4np
from benchmarks.limits import Bench
from benchmarks.report import table
from mxfp4np.backends.memory import address_of, aligned_empty
from mxfp4np.cli.timing import describe, in_threads, machine
from mxfp4np.format import DTYPES, RULES, decoded_dtype

PIECE = 1 << 15
"""Blocks that a thread claims at a time."""


@intrinsic
def stream_block(typingctx, block, codes, scale, word):  # noqa: ARG001
    """Load 32 words, and write 17 bytes made of them."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        block, codes, scale, word = args
        vector = ir.VectorType(ir.IntType(8), 16)
        lanes = ir.VectorType(ir.IntType(8), 64)
        folded = ir.Constant(lanes, None)
        for offset in range(0, 4 * word.type.width, 64):
            address = builder.add(block, ir.Constant(block.type, offset))
            folded = builder.xor(folded, builder.load(builder.inttoptr(address, lanes.as_pointer()), align=1))
        parts = [
            builder.shuffle_vector(
                folded, folded, ir.Constant(ir.VectorType(ir.IntType(32), 16), [ir.IntType(32)(i) for i in part])
            )
            for part in (range(16), range(16, 32), range(32, 48), range(48, 64))
        ]
        both = builder.xor(builder.xor(parts[0], parts[1]), builder.xor(parts[2], parts[3]))
        builder.store(both, builder.inttoptr(codes, vector.as_pointer()), align=1)
        first = builder.extract_element(both, ir.IntType(32)(0))
        builder.store(first, builder.inttoptr(scale, first.type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, word), codegen


@njit(nogil=True)
def stream(values, codes, scales, size, word, start, stop):
    """Do what encoding does to memory, for a range of blocks."""
    for i in range(start, stop):
        stream_block(values + 32 * size * i, codes + 16 * i, scales + i, word)


class EncodeBench(Bench):
    """Normally distributed values, and pairs of runs over them."""

    def __init__(self, rows: int, rounds: int, threads: int) -> None:
        self.values = np.random.default_rng(0).standard_normal((rows, 2880), np.float32)
        self.rounds, self.threads = rounds, threads
        self.rows: list[dict[str, Any]] = []

    def limits(self) -> None:
        """Compare with the limit, in every dtype."""
        for dtype in DTYPES:
            x = aligned_empty(self.values.shape, decoded_dtype(dtype))
            x[...] = self.values
            out = mxfp4np.encode(x)
            word = (np.uint16 if x.itemsize == 2 else np.uint32)(0)
            addresses = address_of(x), address_of(out.blocks), address_of(out.scales), x.itemsize, word

            def limit(addresses: tuple[Any, ...] = addresses, count: int = out.scales.size) -> None:
                in_threads(lambda i, j: stream(*addresses, i, j), count, PIECE, self.threads)

            nbytes = x.nbytes + out.nbytes
            for rule in RULES if dtype == "float32" else ("even",):
                self.pair(
                    f"{dtype}, {rule} : stream",
                    lambda x=x, rule=rule, out=out: mxfp4np.encode(x, rule, out=out, num_threads=self.threads),
                    limit,
                    nbytes,
                    nbytes,
                )
        for dtype in DTYPES:
            x = self.values.astype(decoded_dtype(dtype))
            turned = np.ascontiguousarray(x.T).T
            out, nbytes = mxfp4np.encode(turned), turned.nbytes + out.nbytes
            contiguous = lambda x=x, out=out: mxfp4np.encode(x, out=out, num_threads=self.threads)  # noqa: E731
            columns = lambda x=turned, out=out: mxfp4np.encode(x, out=out, num_threads=self.threads)  # noqa: E731
            self.pair(f"{dtype}, columns as rows : rows", columns, contiguous, nbytes, nbytes)

    def torchao(self) -> None:
        """Compare with `to_mx`, on fewer values, new outputs on both sides, if torchao is installed."""
        try:
            import torch
            from torchao.prototype.mx_formats.config import ScaleCalculationMode
            from torchao.prototype.mx_formats.mx_tensor import to_mx
        except ImportError as error:
            print(f"without torchao: {error}", file=sys.stderr)
            return

        torch.set_num_threads(self.threads)
        for dtype in ("bfloat16", "float32"):  # it takes no float16
            values = self.values[: len(self.values) // 4]
            x = values.astype(decoded_dtype(dtype))
            tensor = torch.from_numpy(values).to(getattr(torch, dtype))
            for rule in RULES if dtype == "float32" else ("even",):
                mode = ScaleCalculationMode[rule.upper()]
                self.pair(
                    f"{dtype}, {rule} : torchao",
                    lambda x=x, rule=rule: mxfp4np.encode(x, rule, num_threads=self.threads),
                    lambda tensor=tensor, mode=mode: to_mx(tensor, torch.float4_e2m1fn_x2, 32, mode),
                    x.size,
                    x.size,
                    before=lambda: time.sleep(0.05),  # torch's threads go on for a while, waiting for more
                )

    def first(self) -> None:
        """Print how long the first call takes; with NUMBA_CACHE_DIR set to an empty folder, its compiler included."""
        begin = time.perf_counter()
        mxfp4np.encode(self.values[:1])
        print(f"first call: {time.perf_counter() - begin:.2f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768, help="of 2880 values each (default: 32768, 94 million)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=["first", "limits", "torchao"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bench = EncodeBench(args.rows, args.rounds, args.threads)
    for what in args.only or ["first", "limits", "torchao"]:
        getattr(bench, what)()
    found = machine("torch", "torchao")
    if args.json:
        print(json.dumps({"machine": found, "rows": bench.rows}))
    else:
        print(f"{describe(found)}\n\n{table('limits', bench.rows)}")


if __name__ == "__main__":
    main()
