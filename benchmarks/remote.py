"""Read from a web server on this machine, nginx, beside what obstore alone fetches; and open many shards from there."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from obstore.store import HTTPStore

import mxfp4np
from benchmarks.startup import FILES, OPEN, TENSORS, printed, write_many
from benchmarks.timing import Row, Subject, amount, compare

NBYTES, RANGE = 1 << 30, 16 << 20
THREADS = 8
"""With fewer, obstore is slower; with more, it is not faster."""


@contextlib.contextmanager
def nginx(root: Path) -> Iterator[str]:
    """Serve a folder, and yield its URL."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise FileNotFoundError("needs nginx: apt-get install nginx-light")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
        config = Path(folder, "nginx.conf")
        config.write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/log; worker_processes 4; user root; events {{}} http {{"
            f"client_body_temp_path {folder}/body; {paths} access_log off; sendfile on; server {{"
            f"listen 127.0.0.1:{port}; root {root}; }} }}"
        )
        process = subprocess.Popen([program, "-e", f"{folder}/log", "-c", config])
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def measure(options: Namespace) -> Iterator[Row]:
    """Compare a plain tensor that is read whole, and one that is decoded, with obstore's ranges in threads."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (NBYTES // 17 // 2880 // 90, 2880, 90, 16), np.uint8)
    packed = mxfp4np.MXFP4Array(blocks, np.full(blocks.shape[:-1], 120, np.uint8))
    plain = rng.integers(0, 256, (NBYTES // RANGE, RANGE), np.uint8)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mxfp4np.save_file({"packed": packed, "plain": plain}, Path(folder, "model.safetensors"))
        with nginx(Path(folder)) as url, mxfp4np.Checkpoint(f"{url}/model.safetensors") as checkpoint:
            store = HTTPStore(url, client_options={"allow_http": True})
            values, read = checkpoint["packed"], np.empty_like(plain)
            begin = checkpoint.info("plain").stored[0].offset

            def fetch(at: int) -> NDArray[np.uint8]:
                return np.frombuffer(store.get_range("model.safetensors", start=begin + at, length=RANGE), np.uint8)

            def copy(at: int) -> None:
                read[at // RANGE] = fetch(at)

            with ThreadPoolExecutor(THREADS) as pool:
                for what, run in (("", lambda at: len(fetch(at))), (", copied into the output", copy)):
                    case = f"1 GiB from nginx : obstore's `get_range`, {THREADS} threads{what}"
                    subjects = [
                        Subject(case, "a plain tensor", lambda: checkpoint.get("plain", out=read), NBYTES, 0.9),
                        Subject(case, "decoded", lambda: checkpoint.get("packed", out=values), packed.nbytes),
                    ]
                    alone = partial(_all, pool, run)
                    yield from compare((alone, NBYTES), subjects, options.rounds, options.threads)


def _all(pool: ThreadPoolExecutor, run: Callable[[int], object]) -> None:
    for _ in pool.map(run, range(0, NBYTES, RANGE)):
        pass


def opening(options: Namespace) -> list[Row]:
    """Time the opening of a checkpoint with as many tensors as Kimi-K3, from nginx."""
    with tempfile.TemporaryDirectory() as name:
        weight_map = write_many(Path(name))
        Path(name, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with nginx(Path(name)) as url:
            seconds = [printed(OPEN, url)[0] for _ in range(options.rounds)]
    return [amount(f"open {TENSORS:,} tensors in {FILES} files from nginx", "with an index", 1, seconds, "s")]
