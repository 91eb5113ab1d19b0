"""Coverage-guided fuzzing of everything that reads the files of others: ``python tests/fuzz.py --seconds 3600``.

Each target runs in a process of its own. Inputs that found new paths are kept in ``--corpus``, and what went wrong in
``crash-*`` beside them.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["mxfp4np"]):
    import mxfp4np
    from mxfp4np import MXFP4Error
    from mxfp4np.layouts import find, names, others, packed, resolve  # noqa: F401
    from mxfp4np.rewrite import config, convert, quantization, run, verify  # noqa: F401
    from mxfp4np.storage import gguf, safetensors  # noqa: F401

import hostile

SEEDS = 300
"""Files from `hostile` that a target begins with."""

NAMES = {
    "safetensors": "m.safetensors",
    "gguf": "m.gguf",
    "index": "model.safetensors.index.json",
    "config": "config.json",
    "record": ".mxfp4np.json",
}
"""The name under which each target has its input."""


def prepare(target, folder):
    """Put beside the input what makes it matter."""
    if target in ("config", "record"):
        sample = hostile.DATA / ("quark" if target == "config" else "gpt_oss_hf")
        for path in sample.glob("*.safetensors*"):
            (folder / path.name).write_bytes(path.read_bytes())
    if target == "index":
        mxfp4np.save_file({"w": mxfp4np.encode(np.ones((2, 64), np.float32))}, folder / "a.safetensors")


def one(folder, name, data):
    """Read one input in every way that its kind is read."""
    (folder / name).write_bytes(data)
    path = folder / name if name in ("m.safetensors", "m.gguf") else folder
    calls = [
        lambda: hostile.read_all(path, "pread" if len(data) % 2 else "mmap"),
        lambda: mxfp4np.convert(path, folder.parent / "target", dry_run=True),
    ]
    if name == ".mxfp4np.json":
        calls = [lambda: verify.verify(folder, folder)]
    for call in calls:
        with contextlib.suppress(MXFP4Error, ValueError, OSError):
            call()


def seeds(target, corpus):
    """Write the first inputs."""
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            hostile.make(Path(folder), seed)
            for path in Path(folder).rglob("*"):
                same = path.name == NAMES[target] or (target in ("gguf", "safetensors") and path.suffix == f".{target}")
                if same and path.stat().st_size < 1 << 14:
                    (corpus / f"seed-{seed}").write_bytes(path.read_bytes())


def dictionary(path):
    """Write words that headers and documents have, which mutations then use."""
    words = {*filter(None, map(str, hostile.DTYPES)), '"shape":[', '"data_offsets":[', "quark", "mxfp4", "quant_method"}
    words |= {suffix for codes, scales, *_ in hostile.PARTS for suffix in (codes, scales)}
    words |= {"weight_map", "include", "transpose", "general.alignment", "split.count", "exclude_modules"}
    path.write_text("".join(f"{json.dumps(word.replace(chr(0), ''))}\n" for word in sorted(words)))
    return path


def fuzz(target, seconds, corpus):
    """Fuzz one target; this does not return."""
    corpus.mkdir(parents=True, exist_ok=True)
    seeds(target, corpus)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "case")
        folder.mkdir()
        prepare(target, folder)
        options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=16384"]
        options += [f"-dict={dictionary(Path(temporary, 'words'))}", f"-artifact_prefix={corpus.parent}/{target}-"]
        options += ["-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: one(folder, NAMES[target], data))
        atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description="Fuzz the readers.")
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--target", choices=NAMES, help="this one only")
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir(), "mxfp4np-fuzz"))
    arguments = parser.parse_args()
    if arguments.target:
        fuzz(arguments.target, arguments.seconds, arguments.corpus.absolute() / arguments.target)
    failed = []
    for target in NAMES:
        command = [sys.executable, __file__, "--target", target, "--corpus", arguments.corpus]
        if subprocess.run([*command, "--seconds", str(arguments.seconds // len(NAMES))], check=False).returncode:
            failed.append(target)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
