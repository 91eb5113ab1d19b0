"""How runs are timed, and on which machine: used by ``mxfp4np bench``, ``mxfp4np demo`` and the benchmarks.

Runs that are compared take turns, round by round, so that other load on the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from .. import __version__
from ..backends.memory import address_of
from ..backends.threads import usable_cpus
from ..text import count

FILL_BYTES: Final = 16 << 20
"""Bytes that a thread fills at a time: as many as it decodes."""

Run = Callable[[], object]


def seconds_of(run: Run) -> float:
    """Return the seconds that a run takes, without releasing its result."""
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def in_turn(
    runs: Sequence[Run],
    rounds: int,
    budget: float = math.inf,
    clock: Callable[[Run], float] = seconds_of,
    before: Run = lambda: None,
) -> list[list[float]]:
    """Call each run once a round, and return the seconds that each took in each round.

    A first round is not counted: it compiles and touches memory. After ``budget`` seconds three rounds are enough.
    ``clock`` makes a run and returns its seconds; ``before`` is called before each run.
    """
    found: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for i in range(rounds + 1):
        if i > 3 and time.perf_counter() - begin > budget:
            break
        for run, seconds in zip(runs, found, strict=True):
            before()
            seconds.append(clock(run))
    return [seconds[1:] for seconds in found]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mxfp4np-timing")


def in_threads(task: Callable[[int, int], object], stop: int, step: int, threads: int) -> None:
    """Call ``task(begin, end)`` for every ``step`` integers below ``stop``, in threads that are kept for the next call.

    It must release the GIL to run in parallel.
    """
    begins = iter(range(0, stop, step))  # taking the next one is atomic
    workers = min(threads, -(-stop // step))

    def work(_: int = 0) -> None:
        for begin in begins:
            task(begin, min(begin + step, stop))

    if workers < 2:
        work()
    else:
        list(_pool(threads).map(work, range(workers)))


def fill(array: NDArray[Any], threads: int) -> None:
    """Fill a contiguous array with ``memset``, in several threads."""
    address = address_of(array)
    in_threads(lambda i, j: ctypes.memset(address + i, 1, j - i), array.nbytes, FILL_BYTES, threads)


def available_memory(root: str = "/") -> float:
    """Return the bytes of memory that this process may still use, infinity where the system does not tell."""
    found = [math.inf]
    with contextlib.suppress(OSError):
        text = Path(root, "proc/meminfo").read_text()
        found += [1024 * int(kilobytes) for kilobytes in re.findall(r"MemAvailable:\s*(\d+) kB", text)]
    with contextlib.suppress(OSError, ValueError):  # the limit of the cgroup, or "max"
        group = Path(root, "sys/fs/cgroup")
        limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
        found.append(max(0, limit - used))
    return min(found)


def machine(*packages: str) -> dict[str, Any]:
    """Return the processor, the CPUs that this process may use, the instruction set that is compiled for, versions."""
    from ..backends.cpu.launch import instruction_set

    found = {"python": platform.python_version()}
    for package in ("mxfp4np", "numpy", "numba", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package) if package != "mxfp4np" else __version__
    return {"cpu": _processor(), "cpus": usable_cpus(), "code": instruction_set(), "versions": found}


def describe(machine: dict[str, Any]) -> str:
    """Return what `machine` found in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['cpu']}, {count(machine['cpus'], 'CPU')}, {machine['code']} code; {versions}"


def _processor() -> str:
    try:
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return model[1].strip() if model else platform.processor() or platform.machine()
