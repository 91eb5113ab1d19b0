"""Convert a checkpoint of gpt-oss-20b's shapes, compared with a copy of the result by `cp`.

Whole processes are timed, start included. On a disk, `convert` waits until each shard is written; `cp` does not.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

import mxfp4np
from benchmarks.process import watch
from benchmarks.timing import Row, Subject, compare

SHAPES = {"gate_up_proj": (32, 5760, 90), "down_proj": (32, 2880, 90)}  # of the experts' scales in a layer
PLAIN = 27_000_000, 2  # about as many plain values as there are in a layer
EXPERTS_PER_LAYER = 16  # of the command's option: 1.7 GB of bfloat16 for 16


def tensors(layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield random tensors under gpt-oss's names, one by one."""
    rng = np.random.default_rng(0)
    for stem in (f"model.layers.{i}." for i in range(layers)):
        yield f"{stem}self_attn.weight", rng.standard_normal(PLAIN, np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in SHAPES.items():
            yield f"{stem}mlp.experts.{name}_blocks", rng.integers(0, 256, (*shape, 16), np.uint8)
            yield f"{stem}mlp.experts.{name}_scales", rng.integers(118, 126, shape, np.uint8)


def measure(options: Namespace) -> list[Row]:
    """Return a row for each way to convert, with its peak of memory."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, plain, out = (Path(folder, name) for name in ("source", "plain", "out"))
        source.mkdir()
        layers = max(1, options.experts // EXPERTS_PER_LAYER)
        mxfp4np.save_file(tensors(layers), source / "model.safetensors", {"format": "pt"})
        config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
        (source / "config.json").write_text(json.dumps(config))
        convert = [sys.executable, "-m", "mxfp4np", "convert", "--quiet", f"--threads={options.threads}"]
        convert += ["--max-shard-size=2GB"]
        commands = {
            "`convert`": [*convert, source, out],
            "`convert --transpose no`": [*convert, "--transpose=no", source, out],
            "`convert --io pread`": [*convert, "--io=pread", source, out],
        }
        watch([*convert, source, plain])
        size = sum(file.stat().st_size for file in plain.iterdir())
        peaks = defaultdict(int)

        def run(name: str) -> None:
            peaks[name] = max(peaks[name], watch(commands[name]).anonymous)

        subjects = [Subject("convert a checkpoint : `cp`", name, partial(run, name), size) for name in commands]
        copy = ["cp", "-r", "--reflink=never", plain, out]
        before = partial(shutil.rmtree, out, ignore_errors=True)
        rows = compare((lambda: watch(copy), size), subjects, options.rounds, options.threads, before=before)
        return [row | {"peak": peaks[row["variant"]]} for row in rows]
