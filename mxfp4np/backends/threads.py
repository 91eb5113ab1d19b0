"""How many threads this process may use: its CPU affinity, its cgroup's quota, a variable; and how they are started."""

from __future__ import annotations

import functools
import math
import operator
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ENVIRONMENT_VARIABLE = "MXFP4NP_NUM_THREADS"

STACK_BYTES: Final = 1 << 20
"""The smallest stack of a thread that this package starts. Compiled code needs up to 128 KiB, compilers more."""

_starting = threading.RLock()


def _forget() -> None:
    """Replace the lock in a forked child: another thread of the parent may hold it."""
    global _starting  # noqa: PLW0603
    _starting = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def starting_threads() -> Iterator[None]:
    """Give threads that are started here a stack that is large enough, whatever `threading.stack_size` is set to."""
    with _starting:
        before = threading.stack_size()
        try:
            if 0 < before < STACK_BYTES:
                threading.stack_size(STACK_BYTES)
            yield
        except KeyError as error:  # of `threading` itself, where a signal handler raised as the thread began
            raise (error.__context__ or error) from None
        finally:
            threading.stack_size(before)


def check_num_threads(num_threads: int | None) -> None:
    """Refuse a number of threads below 1."""
    if num_threads is not None and operator.index(num_threads) < 1:
        raise ValueError(f"num_threads must be at least 1, found {num_threads}")


def most_threads() -> int:
    """Return how many worker threads are kept: one for each usable CPU, or more if the environment variable says so."""
    return max(usable_cpus(), default_num_threads())


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, bounded by the quota of its cgroup."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    return cpus if quota >= cpus else max(1, math.ceil(quota))


@functools.cache
def cgroup_cpus(root: str = "/") -> float:
    """Return the CPUs that the cgroup's quota grants, or infinity without one.

    The smallest quota on the way from the process's group to the top holds. Version 2 keeps it in ``cpu.max``
    ("quota period", in microseconds, or "max"), version 1 in ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``.
    """
    proc, mount = Path(root, "proc/self/cgroup"), Path(root, "sys/fs/cgroup")
    quotas = [math.inf]
    try:
        groups = [line.split(":", 2)[1:] for line in proc.read_text().splitlines()]
    except OSError:
        return math.inf
    for controllers, group in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        folder = top / group.strip("/")
        for level in [folder, *folder.parents]:
            try:
                if controllers:
                    quota, period = ((level / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                else:
                    quota, period = (level / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    quotas.append(int(quota) / int(period))
            except (OSError, ValueError, ZeroDivisionError):
                pass  # no quota at this level
            if level == top:
                break
    return min(quotas)


def default_num_threads() -> int:
    """Return the number of threads used when a call does not say: the environment variable's, or `usable_cpus`.

    Raises
    ------
    ValueError
        If the environment variable is set to anything but a positive integer.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not text:
        return usable_cpus()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be a positive integer, found {text!r}")
    return int(text)
