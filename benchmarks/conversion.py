"""Convert a checkpoint of gpt-oss-20b's shapes, compared with a copy of the result by `cp`, and transformers.

Whole processes are timed, start included. On a disk, `convert` waits until each shard is written; `cp` does not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np

import mxfp4np
from benchmarks.timing import Row, Subject, compare

HIDDEN, EXPERTS, VOCABULARY, HEADS, KEYS = 2880, 32, 4096, 64, 8  # gpt-oss-20b, but for the vocabulary
EXPERTS_PER_LAYER = 16  # of the command's option: 1.7 GB of bfloat16 in all for 16

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
how = Mxfp4Config(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=how, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="2GB")
"""


def make(folder: Path, layers: int) -> None:
    """Write a checkpoint that transformers can load."""
    folder.mkdir()
    mxfp4np.save_file(tensors(layers), folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "vocab_size": VOCABULARY,
        "num_local_experts": EXPERTS,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def tensors(layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield random tensors, one by one."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{stem}{name}.weight"] = (HIDDEN,)
        shapes[f"{stem}self_attn.sinks"] = (HEADS,)
        for name, rows, columns in (
            ("self_attn.q_proj", 64 * HEADS, HIDDEN),
            ("self_attn.k_proj", 64 * KEYS, HIDDEN),
            ("self_attn.v_proj", 64 * KEYS, HIDDEN),
            ("self_attn.o_proj", HIDDEN, 64 * HEADS),
            ("mlp.router", EXPERTS, HIDDEN),
        ):
            shapes |= {f"{stem}{name}.weight": (rows, columns), f"{stem}{name}.bias": (rows,)}
        for name, rows in (("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)):
            shapes[f"{stem}mlp.experts.{name}_bias"] = EXPERTS, rows
            shapes[f"{stem}mlp.experts.{name}_blocks"] = EXPERTS, rows, HIDDEN // 32, 16
            shapes[f"{stem}mlp.experts.{name}_scales"] = EXPERTS, rows, HIDDEN // 32
    for name, shape in shapes.items():
        if name.endswith(("_blocks", "_scales")):
            yield name, rng.integers(*((0, 256) if name.endswith("_blocks") else (118, 126)), shape, np.uint8)
        else:
            yield name, (rng.standard_normal(shape, np.float32) / 50).astype(ml_dtypes.bfloat16)


def peak_memory(command: list[object]) -> int:
    """Run a command and return its peak of anonymous memory in bytes."""
    peak = 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peak = max(peak, int(fields.get("RssAnon", "0 kB").split()[0]) << 10)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3])
    return peak


def measure(options: Namespace) -> list[Row]:
    """Return a row for each way to convert, with its peak of memory."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, plain, out = (Path(folder, name) for name in ("source", "plain", "out"))
        make(source, max(1, options.experts // EXPERTS_PER_LAYER))
        convert = [sys.executable, "-m", "mxfp4np", "convert", "--quiet", f"--workers={options.threads}"]
        convert += ["--max-shard-size=2GB"]
        commands = {
            "`convert`": [*convert, source, out],
            "`convert --transpose no`": [*convert, "--transpose=no", source, out],
            "`convert --io pread`": [*convert, "--io=pread", source, out],
        }
        if find_spec("transformers"):
            commands["transformers"] = [sys.executable, "-c", TRANSFORMERS, source, out]
        peak_memory([*convert, source, plain])
        size = sum(file.stat().st_size for file in plain.iterdir())
        peaks = defaultdict(int)

        def run(name: str) -> None:
            peaks[name] = max(peaks[name], peak_memory(commands[name]))

        subjects = [Subject("convert a checkpoint : `cp`", name, partial(run, name), size) for name in commands]
        copy = ["cp", "-r", "--reflink=never", plain, out]
        before = partial(shutil.rmtree, out, ignore_errors=True)
        rows = compare((lambda: peak_memory(copy), size), subjects, options.rounds, options.threads, before=before)
        return [row | {"peak": peaks[row["variant"]]} for row in rows]
