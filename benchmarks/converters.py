"""Convert a layer of DeepSeek-V4-Flash's shapes, compared with the converters of compressed-tensors.

They do not read the form in which DeepSeek stores it, so the same layer is stored in three forms that they do read.
Every run is a process of its own, whose conversion is timed, not the imports before it; on a disk, only `convert` waits
until everything is written. Results are compared bit for bit. No shape has partial tiles: theirs cannot write their
columns.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import mxfp4np
from benchmarks.process import Finished, watch
from benchmarks.timing import Row
from mxfp4np.cli.timing import in_turn

ALL_EXPERTS = 256
EXPERT = {"w1": (2048, 4096), "w2": (4096, 2048), "w3": (2048, 4096)}
FP8 = {
    "attn.wq_a": (1024, 4096),
    "attn.wq_b": (32768, 1024),
    "attn.wkv": (512, 4096),
    "attn.wo_a": (8192, 4096),
    "attn.wo_b": (4096, 8192),
    "attn.indexer.wq_b": (8192, 1024),
    **{f"ffn.shared_experts.{name}": shape for name, shape in EXPERT.items()},
}
BFLOAT16 = {
    "attn_norm": (4096,),
    "ffn_norm": (4096,),
    "attn.q_norm": (1024,),
    "attn.kv_norm": (512,),
    "attn.compressor.norm": (512,),
    "attn.compressor.wkv": (1024, 4096),
    "attn.compressor.wgate": (1024, 4096),
    "attn.indexer.compressor.norm": (128,),
    "attn.indexer.compressor.wkv": (256, 4096),
    "attn.indexer.compressor.wgate": (256, 4096),
    "attn.indexer.weights_proj": (64, 4096),
    "ffn.gate": (256, 4096),
}
FLOAT32 = {
    "attn.attn_sink": (64,),
    "attn.compressor.ape": (4, 1024),
    "attn.indexer.compressor.ape": (4, 256),
    "ffn.gate.bias": (256,),
    **{f"hc_{part}_base": (24,) for part in ("attn", "ffn")},
    **{f"hc_{part}_fn": (24, 16384) for part in ("attn", "ffn")},
    **{f"hc_{part}_scale": (3,) for part in ("attn", "ffn")},
}
"""Shapes in a layer with compressed sparse attention; the experts are in FP4."""

Shape = tuple[int, int]
Tensors = dict[str, NDArray[Any]]
RNG = np.random.default_rng(0)


def nibbles(shape: Shape) -> NDArray[np.uint8]:
    """Return random codes of FP4, two to a byte."""
    return RNG.integers(0, 256, (shape[0], shape[1] // 2), np.uint8)


def exponents(*shape: int) -> NDArray[np.uint8]:
    """Return scales as weights have them, as bytes of E8M0."""
    return RNG.integers(116, 122, shape, np.uint8)


def codes(shape: Shape) -> NDArray[Any]:
    """Return random codes of E4M3 below 2, no NaN."""
    return (RNG.integers(0, 256, shape, np.uint8) & 0xBF).view(ml_dtypes.float8_e4m3fn)


def tiles(shape: Shape) -> Shape:
    """Return the shape of scales of 128 x 128 values."""
    return -(-shape[0] // 128), -(-shape[1] // 128)


def floats(shape: Shape) -> NDArray[np.float32]:
    """Return scales as weights have them."""
    return RNG.uniform(1e-3, 2e-3, shape).astype(np.float32)


E8M0 = ml_dtypes.float8_e8m0fnu


def deepseek_fp4(name: str, shape: Shape) -> Tensors:
    scales = exponents(shape[0], shape[1] // 32).view(E8M0)
    return {f"{name}.weight": nibbles(shape).view(np.int8), f"{name}.scale": scales}


def deepseek_fp8(name: str, shape: Shape) -> Tensors:
    return {f"{name}.weight": codes(shape), f"{name}.scale": exponents(*tiles(shape)).view(E8M0)}


def mxfp4(name: str, shape: Shape) -> Tensors:
    return {f"{name}.weight_packed": nibbles(shape), f"{name}.weight_scale": exponents(shape[0], shape[1] // 32)}


def nvfp4(name: str, shape: Shape) -> Tensors:
    scales = RNG.integers(0x30, 0x48, (shape[0], shape[1] // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    second = np.full(1, 1000, np.float32)
    return {
        f"{name}.weight_packed": nibbles(shape),
        f"{name}.weight_scale": scales,
        f"{name}.weight_global_scale": second,
    }


def compressed_fp8(name: str, shape: Shape) -> Tensors:
    return {f"{name}.weight": codes(shape), f"{name}.weight_scale": floats(tiles(shape))}


def transformers_fp8(name: str, shape: Shape) -> Tensors:
    return {f"{name}.weight": codes(shape), f"{name}.weight_scale_inv": floats(tiles(shape))}


def compressed_tensors(form: str, **experts: object) -> dict[str, Any]:
    """Return what compressed-tensors writes into config.json, given how experts are stored."""
    common = {"type": "float", "symmetric": True, "dynamic": False}
    fp8 = common | {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
    fp4 = common | {"num_bits": 4, **experts}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": [r"re:.*\.experts\..*"], "weights": fp4, "format": form},
            "group_1": {
                "targets": [r"re:.*(attn\.w|indexer\.wq_b|shared_experts).*"],
                "weights": fp8,
                "format": "float-quantized",
            },
        },
    }


FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


class Form(NamedTuple):
    """How experts and other matrices are stored, what config.json says, and the converter of compressed-tensors."""

    experts: Callable[[str, Shape], Tensors]
    others: Callable[[str, Shape], Tensors]
    config: dict[str, Any]
    converter: str = ""


FORMS = {
    "DeepSeek's own: MXFP4, FP8": Form(
        deepseek_fp4,
        deepseek_fp8,
        {"expert_dtype": "fp4", "quantization_config": FP8_BLOCKS | {"scale_fmt": "ue8m0"}},
    ),
    "compressed-tensors: MXFP4, FP8": Form(
        mxfp4,
        compressed_fp8,
        {
            "quantization_config": compressed_tensors(
                "mxfp4-pack-quantized", strategy="group", group_size=32, scale_dtype="torch.uint8"
            )
        },
        "CompressedTensorsDequantizer",
    ),
    "compressed-tensors: NVFP4, FP8": Form(
        nvfp4,
        compressed_fp8,
        {
            "quantization_config": compressed_tensors(
                "nvfp4-pack-quantized", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
            )
        },
        "CompressedTensorsDequantizer",
    ),
    "FP8, float32 scales": Form(
        transformers_fp8, transformers_fp8, {"quantization_config": FP8_BLOCKS}, "FP8BlockDequantizer"
    ),
}

OURS = """
import sys, time, mxfp4np
begin = time.perf_counter()
mxfp4np.convert(*sys.argv[1:3], num_threads=int(sys.argv[3]), max_shard_size="500MB")
print(time.perf_counter() - begin)
"""
"""Small shards: each is written by one thread."""

THEIRS = """
import sys, time, torch
from compressed_tensors.entrypoints.convert import CONVERTER as Converter, convert_checkpoint
torch.set_num_threads(int(sys.argv[3]))
begin = time.perf_counter()
converter = getattr(Converter, "from_pretrained", Converter)(sys.argv[1])
convert_checkpoint(*sys.argv[1:3], converter, device="cpu")
print(time.perf_counter() - begin)
"""


def layer(form: Form, experts: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the tensors of a layer, one by one."""
    for number in range(experts):
        for name, shape in EXPERT.items():
            yield from form.experts(f"layers.0.ffn.experts.{number}.{name}", shape).items()
    for name, shape in FP8.items():
        yield from form.others(f"layers.0.{name}", shape).items()
    for name, shape in BFLOAT16.items():
        yield f"layers.0.{name}.weight", RNG.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    for name, shape in FLOAT32.items():
        yield f"layers.0.{name}", RNG.standard_normal(shape, np.float32)


def measure(options: Namespace) -> Iterator[Row]:
    """Yield rows for two numbers of experts in each form."""
    for form in FORMS:
        for experts in (max(1, options.experts // 2), 2 * options.experts):
            yield from convert(form, experts, options)


def whole_layer(options: Namespace) -> Iterator[Row]:
    """Yield the row of the whole layer, which takes 17 GB of disk."""
    yield from convert(next(iter(FORMS)), ALL_EXPERTS, options)


def convert(name: str, experts: int, options: Namespace) -> Iterator[Row]:
    """Yield a row for each converter; compressed-tensors has one for most forms.

    Raises
    ------
    ValueError
        If their results differ.
    """
    form = FORMS[name]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder, "source")
        source.mkdir()
        mxfp4np.save_file(layer(form, experts), source / "model.safetensors", {"format": "pt"})
        (source / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", **form.config}))
        scripts = {"`convert`": OURS}
        if form.converter and find_spec("compressed_tensors"):
            scripts[form.converter] = THEIRS.replace("CONVERTER", form.converter)
        finished: dict[str, list[Finished]] = {converter: [] for converter in scripts}
        targets = {converter: Path(folder, str(number)) for number, converter in enumerate(scripts)}

        def seconds(converter: str) -> float:
            shutil.rmtree(targets[converter], ignore_errors=True)
            command = [sys.executable, "-c", scripts[converter], source, targets[converter], options.threads]
            finished[converter].append(watch(command))
            return float(finished[converter][-1].output.split()[-1])

        taken = in_turn([lambda x=x: x for x in scripts], options.rounds, clock=lambda run: seconds(str(run())))
        stored, *results = (
            sum(x.stat().st_size for x in path.glob("*.safetensors")) for path in (source, *targets.values())
        )
        for other in list(targets.values())[1:]:
            compare(targets["`convert`"], other)
        for converter, times, nbytes in zip(scripts, taken, results, strict=True):
            last = finished[converter][1:]
            yield {
                "case": name,
                "experts": experts,
                "variant": converter,
                "stored": stored,
                "bytes": nbytes,
                "seconds": sorted(times),
                "ratio": median(a / b for a, b in zip(times, taken[0], strict=True)),
                "anonymous": max(x.anonymous for x in last),
                "resident": max(x.resident for x in last),
            }


def compare(ours: Path, theirs: Path) -> None:
    """Compare all tensors of two checkpoints, bit for bit."""
    with mxfp4np.Checkpoint(ours) as left, mxfp4np.Checkpoint(theirs) as right:
        if set(left.stored) != set(right.stored):
            raise ValueError(f"{ours} and {theirs}: different tensors")
        for name in left.stored:
            a, b = left.stored[name], right.stored[name]
            if a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
                raise ValueError(f"{ours} and {theirs}: tensor {name!r} differs")
