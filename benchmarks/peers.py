"""This library, its limits and its peers, decoding the same tensor in one process.

A peer that is not installed keeps its row, without figures.
"""

from __future__ import annotations

import functools
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import mxfp4np
from benchmarks.timing import Row
from mxfp4np.backends.cpu.driver import stream
from mxfp4np.backends.memory import aligned_empty
from mxfp4np.cli.timing import Run, fill, in_threads, in_turn
from mxfp4np.format import decoded_dtype

ROW = (5760, 90)  # one expert of gpt-oss-20b's mlp1: 5760 rows of 90 blocks
PACKAGES = (
    *("safetensors", "ml_dtypes", "torch", "gpt-oss", "transformers", "compressed-tensors", "mlx", "gguf"),
    *("cupy-cuda12x", "cupy-cuda13x"),
)
REFERENCE = "gpt-oss `Checkpoint.get`"


class Data:
    """Random codes and scales of some experts, in memory and in a checkpoint."""

    def __init__(self, experts: int, folder: Path, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.threads = threads
        self.blocks = rng.integers(0, 256, (experts, *ROW, 16), np.uint8)
        self.scales = rng.integers(118, 126, (experts, *ROW), np.uint8)
        self.folder = folder / str(experts)
        self.folder.mkdir()
        self.name = "block.0.mlp.mlp1_weight"
        packed = mxfp4np.MXFP4Array(self.blocks, self.scales)
        mxfp4np.save_file({self.name: packed}, self.folder / "model.safetensors")
        self.shape, self.size = packed.shape, packed.size

    @functools.cache  # noqa: B019
    def out(self, dtype: str) -> np.ndarray:
        """Return memory for the output whose pages exist."""
        out = aligned_empty(self.shape, decoded_dtype(dtype))
        fill(out, self.threads)
        return out


@dataclass
class Subject:
    """One row of the table."""

    name: str
    dtype: str
    prepare: Callable[[Data], Run]
    share: float = 1.0
    """The part of the experts that it decodes: slow peers get fewer, since rates are compared."""


def ours(dtype: str, *, reuse: bool, threads: int | None = None) -> Callable[[Data], Run]:
    def prepare(data: Data) -> Run:
        checkpoint = mxfp4np.Checkpoint(data.folder)
        out = data.out(dtype) if reuse else None
        return lambda: checkpoint.get(data.name, dtype=dtype, out=out, num_threads=threads or data.threads)

    return prepare


def numba_loop(data: Data) -> Run:
    import numba

    @numba.njit(nogil=True)
    def kernel(blocks, scales, table, out, start, stop):
        for i in range(start, stop):
            factor = np.float32(2.0) ** (np.int32(scales[i]) - 127)
            for j in range(16):
                out[32 * i + 2 * j] = table[blocks[16 * i + j] & 15] * factor
                out[32 * i + 2 * j + 1] = table[blocks[16 * i + j] >> 4] * factor

    table = np.array(mxfp4np.format.FP4_VALUES, np.float32)
    arguments = data.blocks.reshape(-1), data.scales.reshape(-1), table, data.out("float32").reshape(-1)
    return lambda: in_threads(lambda i, j: kernel(*arguments, i, j), data.scales.size, 1 << 15, data.threads)


def numpy_ml_dtypes(data: Data) -> Run:
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    pairs = np.stack([table[np.arange(256) & 15], table[np.arange(256) >> 4]], axis=-1)

    def run() -> np.ndarray:
        factors = data.scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        return (pairs[data.blocks].reshape(*data.scales.shape, 32) * factors[..., None]).reshape(data.shape)

    return run


def torch_arrays(data: Data) -> tuple[Any, Any, Any]:
    """Return torch, and its views of the blocks and the scales."""
    import torch

    torch.set_num_threads(data.threads)
    return torch, torch.from_numpy(data.blocks), torch.from_numpy(data.scales)


def gpt_oss(data: Data) -> Run:
    torch, _, _ = torch_arrays(data)
    from gpt_oss.torch.weights import Checkpoint

    return partial(Checkpoint(str(data.folder), torch.device("cpu")).get, data.name)


def gpt_oss_compiled(data: Data) -> Run:
    torch, blocks, scales = torch_arrays(data)

    @torch.compile(dynamic=False)
    def formula(blocks, scales, table):
        exponents = scales.to(torch.int32).unsqueeze(-1) - 127
        low, high = table[(blocks & 15).to(torch.long)], table[(blocks >> 4).to(torch.long)]
        return torch.ldexp(torch.stack([low, high], -1).flatten(-2), exponents).flatten(-2)

    return partial(formula, blocks, scales, torch.tensor(mxfp4np.format.FP4_VALUES, dtype=torch.bfloat16))


def transformers(data: Data) -> Run:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return partial(convert_moe_packed_tensors, *torch_arrays(data)[1:])


def compressed_tensors(data: Data) -> Run:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    torch, blocks, scales = torch_arrays(data)
    rows = data.shape[0] * data.shape[1]

    def run() -> Any:
        values = unpack_fp4_from_uint8(blocks.reshape(rows, -1), rows, data.shape[-1], dtype=torch.bfloat16)
        factors = torch.exp2(scales.to(torch.float32) - 127).to(torch.bfloat16)
        return values.reshape(*scales.shape, 32) * factors.unsqueeze(-1)

    return run


def gguf(data: Data) -> Run:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.concatenate([data.scales[..., None], data.blocks], axis=-1).reshape(-1, 17 * 90)
    return lambda: dequantize(rows, GGMLQuantizationType.MXFP4)


def mlx(data: Data) -> Run:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    rows = data.shape[0] * data.shape[1]
    words = mx.array(data.blocks.reshape(rows, -1).view("<u4"))
    scales = mx.array(data.scales.reshape(rows, -1))
    return lambda: mx.eval(mx.dequantize(words, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.bfloat16))


def limit_of_memory(data: Data) -> Run:
    return partial(stream, data.blocks, data.scales, data.out("bfloat16"), num_threads=data.threads)


def memset(data: Data) -> Run:
    return partial(fill, data.out("bfloat16"), data.threads)


def allocate_and_fill(data: Data) -> Run:
    return lambda: fill(aligned_empty(data.shape, decoded_dtype("bfloat16")), data.threads)


def copy(data: Data) -> Run:
    out = data.out("bfloat16").reshape(-1).view(np.uint8)
    source = np.ones_like(out)
    return lambda: in_threads(lambda i, j: np.copyto(out[i:j], source[i:j]), len(out), 1 << 21, data.threads)


OURS = [
    Subject("**mxfp4np**, output reused", "bfloat16", ours("bfloat16", reuse=True)),
    Subject("**mxfp4np**, output reused, 1 thread", "bfloat16", ours("bfloat16", reuse=True, threads=1)),
    Subject("**mxfp4np**, new output", "bfloat16", ours("bfloat16", reuse=False)),
    Subject("**mxfp4np**, output reused", "float16", ours("float16", reuse=True)),
    Subject("**mxfp4np**, output reused", "float32", ours("float32", reuse=True)),
    Subject("limit: `stream`, loading and storing as much", "bfloat16", limit_of_memory),
    Subject("limit: memset of the same output", "bfloat16", memset),
    Subject("limit: allocating the same output and filling it", "bfloat16", allocate_and_fill),
    Subject("limit: copy of the same output", "bfloat16", copy),
]
PEERS = [
    Subject("Numba, plain loop, output reused", "float32", numba_loop),
    Subject("NumPy with ml_dtypes' table", "float32", numpy_ml_dtypes, 0.25),
    Subject(REFERENCE, "bfloat16", gpt_oss),
    Subject("its formula under torch.compile", "bfloat16", gpt_oss_compiled, 0.25),
    Subject("transformers `convert_moe_packed_tensors`", "bfloat16", transformers, 0.25),
    Subject("compressed-tensors", "bfloat16", compressed_tensors, 0.25),
    Subject("MLX `dequantize`, CPU", "bfloat16", mlx, 0.25),
    Subject("gguf-py `dequantize`", "float32", gguf, 0.0625),
]
GROUPS = OURS, PEERS
"""What is run interleaved. Peers are separate: after they release much memory, new outputs are slow."""


def measure(options: Namespace) -> list[Row]:
    """Return a row for each subject: its values per second, or why there are none."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = functools.cache(lambda experts: Data(experts, Path(folder), options.threads))
        for group in GROUPS:
            runs: dict[int, Run] = {}
            for subject in group:
                subset = data(max(1, round(options.experts * subject.share)))
                row: Row = {"name": subject.name, "dtype": subject.dtype, "values": subset.size}
                row |= {"rates": [], "missing": None}
                try:
                    run = subject.prepare(subset)
                    run()
                except ImportError:
                    row["missing"] = "not installed"
                except Exception as error:
                    row["missing"] = f"{type(error).__name__}: {error}".splitlines()[0]
                else:
                    runs[len(rows)] = run
                rows.append(row)
            for i, seconds in zip(runs, in_turn(list(runs.values()), options.rounds), strict=True):
                rows[i]["rates"] = sorted(rows[i]["values"] / s for s in seconds)
    return rows
