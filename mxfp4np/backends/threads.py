"""Work that is shared out to threads in Python, and how many threads this process may use.

Threads claim pieces, the calling one among them, so that a call finishes even when every pool thread is busy with
someone else's, and nothing is ever waited for that has not begun. It knows nothing of MXFP4.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ENVIRONMENT_VARIABLE = "MXFP4NP_NUM_THREADS"

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """Start over in a forked child, where the threads of the parent's pool do not exist."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _shared_pool() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(most_threads(), "mxfp4np")
        return _pool


def most_threads() -> int:
    """Return how many threads are kept: as many as can run at once, or more if the environment variable says so."""
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


def parallel_for(
    task: Callable[[int, int], object],
    stop: int,
    step: int,
    num_threads: int,
    failed: Callable[[BaseException], object] | None = None,
) -> None:
    """Call ``task(i, j)`` for consecutive pieces of ``[0, stop)`` of ``step`` integers, in several threads.

    Returns, or raises what the first thread that failed did, when no thread is at a piece any more.

    Parameters
    ----------
    task : callable
        Called from any thread; should release the GIL to run in parallel.
    stop, step : int
        The range and the size of a piece.
    num_threads : int
        At most this many threads, the calling one included, and never more than `most_threads` and one.
    failed : callable, optional
        Called with what ends a thread, an interrupt of the calling one included, before the others are waited for.
    """
    starts = iter(range(0, stop, step))
    helpers, going_on, lock = 0, True, threading.Lock()
    left: SimpleQueue[None] = SimpleQueue()
    first: list[BaseException] = []

    def end(error: BaseException) -> None:
        nonlocal going_on
        with lock:
            going_on = False
        if not first:
            first.append(error)
        if failed is not None:
            failed(error)

    def claim() -> int | None:
        with lock:
            return next(starts, None) if going_on else None

    def work() -> None:
        try:
            while (i := claim()) is not None:
                task(i, min(i + step, stop))
        except BaseException as error:  # noqa: BLE001 - an interrupt too
            end(error)

    def help_out() -> None:
        nonlocal helpers
        with lock:
            if not going_on:
                return
            helpers += 1
        work()
        with lock:
            helpers -= 1
        left.put(None)

    def nobody_works() -> bool:
        nonlocal going_on
        with lock:
            going_on = False
            if not helpers:
                return True
        left.get()
        return False

    try:
        for _ in range(min(num_threads - 1, -(-stop // step) - 1, most_threads())):
            _shared_pool().submit(help_out)
        work()
    except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
        work()
    except BaseException as error:  # noqa: BLE001 - an interrupt while help was being called
        end(error)
    finally:
        # Even after an error, whatever interrupts it: helpers write to the caller's memory until they are done.
        waiting = True
        while waiting:
            try:
                waiting = not nobody_works()
            except BaseException as error:  # noqa: BLE001
                end(error)
    if first:
        raise first.pop()
