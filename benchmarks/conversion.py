"""Convert a checkpoint and copy the result with `cp`, in turn, on the same file system; beside transformers.

    python -m benchmarks.conversion --folder /dev/shm

Without --folder, a temporary one: the page cache in front of a disk, whose own speed an fsync of each shard waits for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

import mxfp4np
from mxfp4np.cli.timing import describe, machine

HIDDEN, EXPERTS, VOCABULARY, HEADS, KEYS = 2880, 32, 4096, 64, 8  # gpt-oss-20b, but for the vocabulary

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
how = Mxfp4Config(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=how, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="2GB")
"""


def make(folder: Path, layers: int) -> None:
    """Write a checkpoint shaped like gpt-oss-20b that transformers can load."""
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
    """Make them up, one by one."""
    rng = np.random.default_rng(0)

    def plain(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / 50).astype(ml_dtypes.bfloat16)

    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", plain(VOCABULARY, HIDDEN)
    yield "model.norm.weight", plain(HIDDEN)
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        yield stem + "input_layernorm.weight", plain(HIDDEN)
        yield stem + "post_attention_layernorm.weight", plain(HIDDEN)
        yield stem + "self_attn.sinks", plain(HEADS)
        for name, rows, columns in (
            ("self_attn.q_proj", 64 * HEADS, HIDDEN),
            ("self_attn.k_proj", 64 * KEYS, HIDDEN),
            ("self_attn.v_proj", 64 * KEYS, HIDDEN),
            ("self_attn.o_proj", HIDDEN, 64 * HEADS),
            ("mlp.router", EXPERTS, HIDDEN),
        ):
            yield f"{stem}{name}.weight", plain(rows, columns)
            yield f"{stem}{name}.bias", plain(rows)
        for name, rows in (("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)):
            scales = (EXPERTS, rows, HIDDEN // 32)
            yield f"{stem}mlp.experts.{name}_bias", plain(EXPERTS, rows)
            yield f"{stem}mlp.experts.{name}_blocks", rng.integers(0, 256, (*scales, 16), np.uint8)
            yield f"{stem}mlp.experts.{name}_scales", rng.integers(118, 126, scales, np.uint8)


def measured(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak anonymous memory in bytes."""
    peak = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                peak = max(peak, int(fields["RssAnon"].split()[0]) << 10)
            except (OSError, KeyError):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make(work / "source", args.layers)
        rows: dict[str, list[tuple[float, int]]] = {}
        convert = [
            sys.executable,
            "-m",
            "mxfp4np",
            "convert",
            "--quiet",
            f"--workers={args.workers}",
            "--max-shard-size=2GB",
        ]
        commands = {
            "cp": ["cp", "-r", "--reflink=never", work / "plain", work / "out"],
            "convert": [*convert, work / "source", work / "out"],
            "convert --transpose no": [*convert, "--transpose=no", work / "source", work / "out"],
            "convert --io pread": [*convert, "--io=pread", work / "source", work / "out"],
        }
        if importlib.util.find_spec("transformers"):
            commands["transformers"] = [sys.executable, "-c", TRANSFORMERS, work / "source", work / "out"]
        measured(list(map(str, [*convert, work / "source", work / "plain"])))
        size = sum(file.stat().st_size for file in (work / "plain").iterdir())
        for _ in range(args.rounds):
            for name, command in commands.items():
                rows.setdefault(name, []).append(measured(list(map(str, command))))
                shutil.rmtree(work / "out")
        where = args.folder or "a disk"
        print(f"{describe(machine('torch', 'transformers'))}\n\n{size / 1e9:.2f} GB, to {where}:\n")
        print("| what | GB/s | of `cp` | lowest to highest | peak anonymous MB |\n|---|---:|---:|---:|---:|")
        for name, runs in rows.items():
            ratios = [theirs[0] / ours[0] for theirs, ours in zip(rows["cp"], runs, strict=True)]
            rate = size / statistics.median(seconds for seconds, _ in runs) / 1e9
            print(
                f"| `{name}` | {rate:.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
                f"| {max(peak for _, peak in runs) / 1e6:.0f} |"
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
