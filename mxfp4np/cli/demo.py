"""What ``mxfp4np demo`` does: write, inspect, decode and check a random checkpoint shaped like gpt-oss."""

from __future__ import annotations

import json
import math
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..backends.memory import aligned_empty
from ..backends.threads import default_num_threads
from ..checkpoint import Checkpoint
from ..files import save_file
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, dtype_named
from ..storage.tensorfile import nbytes_of
from ..summary import collapse, rows
from ..text import count, escape, format_bytes
from .decode import Selection
from .report import table_lines
from .timing import in_turn

EXPERTS: Final = 8
MAX_WIDTH: Final = 1440
CHUNK_BYTES: Final = 8 << 20
"""Decoded bytes that are checked at a time."""

ROUNDS: Final = 5

DECODED: Final = "decoded/model.safetensors"

Specs = dict[str, tuple[str, tuple[int, ...]]]


def prepare(folder: Path | None) -> Path:
    """Return the folder to write to, and make it if it does not exist; refuse one that is not empty."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="mxfp4np-demo-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, found something in it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(folder: Path, size: int, bar: Callable[[int, str], Any]) -> dict[str, Any]:
    """Write, decode and check a checkpoint in an empty folder; return the figures as plain objects.

    Its packed tensors decode to about ``size`` bytes of bfloat16. ``bar`` is `Reporter.bytes`.
    """
    shards = plan(*shape_for(size))
    with bar(sum(map(_nbytes, shards)), "writing") as progress:
        _write(folder, shards, progress)
    with Checkpoint(folder) as checkpoint:
        packed = [name for name in checkpoint if checkpoint.info(name).layout is not None]
        selection = Selection(checkpoint, list(checkpoint))
        (folder / DECODED).parent.mkdir()
        with bar(selection.nbytes, "decoding") as progress:
            selection.write(folder / DECODED, progress)
        decode_seconds, copy_seconds = _measure(checkpoint, packed)
        with Checkpoint(folder / DECODED) as decoded, bar(selection.nbytes, "checking") as progress:
            checked, differences = _compare(checkpoint, decoded, progress)
        elements = sum(math.prod(checkpoint.info(name).shape) for name in packed)
    return {
        "folder": str(folder),
        "elements": elements,
        "threads": default_num_threads(),
        "decode_elements_per_second": elements / decode_seconds,
        "decode_bytes_per_second": 2 * elements / decode_seconds,
        "copy_bytes_per_second": 2 * elements / copy_seconds,
        "checked": checked,
        "differences": differences,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield a report of what `run` returned for a person."""
    with Checkpoint(found["folder"]) as checkpoint:
        yield from table_lines(collapse(rows(checkpoint)))
    yield ""
    yield (
        f"decoded to bfloat16 with {count(found['threads'], 'thread')}: "
        f"{found['decode_elements_per_second'] / 1e6:,.0f} million elements/s, "
        f"{format_bytes(found['decode_bytes_per_second'])}/s; "
        f"a plain memory copy: {format_bytes(found['copy_bytes_per_second'])}/s"
    )
    yield from wrong(found)
    if not found["differences"]:
        yield f"checked {found['checked']:,} values against the reference decoder: all equal"
    folder = shlex.quote(escape(found["folder"]))
    yield ""
    yield f"The checkpoint is in {folder}, and {DECODED} in it holds the decoded tensors. Try:"
    yield f"  mxfp4np inspect {folder} --stats '*.layers.0.*'"
    options = "--index '3, :64' --dtype float32 -o part.npy"
    yield f"  mxfp4np decode {folder} model.layers.0.mlp.experts.down_proj {options}"
    yield "and on a real checkpoint, a folder of .safetensors files such as gpt-oss-20b:"
    yield "  mxfp4np inspect path/to/gpt-oss-20b"
    yield "to remove all of it:"
    yield f"  {'rmdir /s /q' if os.name == 'nt' else 'rm -r'} {folder}"


def wrong(found: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong in what `run` returned."""
    if found["differences"]:
        yield f"DIFFERENT from the reference: {', '.join(found['differences'])}"


def shape_for(size: int) -> tuple[int, int]:
    """Return the width and number of layers whose packed tensors decode to about ``size`` bytes of bfloat16."""
    elements = size // 2
    width = BLOCK_SIZE * max(1, math.isqrt(elements // (2 * 3 * EXPERTS)) // BLOCK_SIZE)
    width = min(width, MAX_WIDTH)
    return width, max(2, round(elements / (3 * EXPERTS * width * width)))


def plan(width: int, layers: int) -> list[Specs]:
    """Return the tensors of each shard: one for each layer, whose packed scales are in the shard of the next layer."""
    shards: list[Specs] = [{} for _ in range(layers)]
    shards[0]["model.embed_tokens.weight"] = ("BF16", (1024, width))
    shards[-1]["model.norm.weight"] = ("BF16", (width,))
    for i in range(layers):
        layer = f"model.layers.{i}."
        shards[i][layer + "input_layernorm.weight"] = ("BF16", (width,))
        shards[i][layer + "mlp.router.weight"] = ("BF16", (EXPERTS, width))
        for name, rows_ in (("gate_up_proj", 2 * width), ("down_proj", width)):
            scales = (EXPERTS, rows_, width // BLOCK_SIZE)
            expert = f"{layer}mlp.experts.{name}"
            shards[i][expert + "_bias"] = ("BF16", (EXPERTS, rows_))
            shards[i][expert + "_blocks"] = ("U8", (*scales, BYTES_PER_BLOCK))
            shards[(i + 1) % layers][expert + "_scales"] = ("U8", scales)
    return [dict(sorted(specs.items(), key=lambda item: item[1][0])) for specs in shards]


def _write(folder: Path, shards: list[Specs], progress: Callable[[int], object]) -> None:
    rng = np.random.default_rng(0)
    weight_map = {}
    for i, specs in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, *spec, rng) for name, spec in specs.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(specs, file))
        progress(_nbytes(specs))
    index = {"metadata": {"total_size": sum(map(_nbytes, shards))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _random(name: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    if dtype == "BF16":
        return rng.standard_normal(shape, np.float32).astype(dtype_named("bfloat16"))
    low, high = (118, 126) if name.endswith("_scales") else (0, 256)  # 2**-9 to 2**-2, as in trained weights
    return rng.integers(low, high, shape, np.uint8)


def _nbytes(specs: Specs) -> int:
    return sum(nbytes_of(dtype, shape) for dtype, shape in specs.values())


def _measure(checkpoint: Checkpoint, names: list[str]) -> tuple[float, float]:
    """Return the median seconds to decode all tensors, and to copy as many bytes, into memory that is reused."""
    infos = [checkpoint.info(name) for name in names]
    largest = max(info.decoded_nbytes() for info in infos)
    memory, source = (aligned_empty((largest,), np.dtype("uint8")) for _ in range(2))

    def decode() -> None:
        for info in infos:
            out = memory[: info.decoded_nbytes()].view(dtype_named("bfloat16"))
            checkpoint.get(info.name, out=out.reshape(info.shape))

    def copy() -> None:
        for info in infos:
            np.copyto(memory[: info.decoded_nbytes()], source[: info.decoded_nbytes()])

    source[:] = 0
    decoding, copying = in_turn([decode, copy], ROUNDS)
    return median(decoding), median(copying)


def _compare(checkpoint: Checkpoint, decoded: Checkpoint, progress: Callable[[int], object]) -> tuple[int, list[str]]:
    """Compare ``decoded`` with what the reference decodes; return the number of values, and which chunks differ."""
    checked, differences = 0, []
    for name in checkpoint:
        actual = decoded[name]
        for index, expected in checkpoint.chunks(name, CHUNK_BYTES, backend="numpy"):
            checked += expected.size
            if expected.tobytes() != actual[index].tobytes():
                differences.append(f"{name}[{index}]")
            progress(expected.nbytes)
    return checked, differences
