"""Run a command and watch the memory of its process. It knows nothing of what is run."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Finished(NamedTuple):
    """What a process printed, and its peaks of memory in bytes."""

    output: str
    anonymous: int
    """Memory that it wrote to, sampled every 10 ms."""
    resident: int
    """With the pages of mapped files that were in memory, as ``ru_maxrss`` counts them."""


def watch(command: Sequence[object]) -> Finished:
    """Run a command to its end.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails.
    """
    anonymous = resident = 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            anonymous = max(anonymous, _bytes(fields, "RssAnon"))
            resident = max(resident, _bytes(fields, "VmHWM"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3])
    return Finished(output, anonymous, resident)


def _bytes(fields: dict[str, str], name: str) -> int:
    return int(fields.get(name, "0 kB").split()[0]) << 10
