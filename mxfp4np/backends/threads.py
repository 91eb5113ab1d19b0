"""The shared thread pool, and how many threads this process may use.

Work is a range of integers. Threads claim pieces of it in order, the calling thread among them, so that a call
finishes even when every pool thread is busy with someone else's, and nothing is ever waited for that has not begun.
It knows nothing of MXFP4.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

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
            _pool = ThreadPoolExecutor(max(usable_cpus(), default_num_threads()), thread_name_prefix="mxfp4np")
        return _pool


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


def parallel_for(task: Callable[[int, int], object], stop: int, step: int, num_threads: int) -> None:
    """Call ``task(i, j)`` for consecutive pieces of ``[0, stop)`` of ``step`` integers, in several threads.

    Parameters
    ----------
    task : callable
        Called from any thread; should release the GIL to run in parallel.
    stop, step : int
        The range and the size of a piece.
    num_threads : int
        At most this many threads, the calling one included, and never more than the pool has and one.
    """
    starts: Iterator[int] = iter(range(0, stop, step))
    lock = threading.Lock()

    def claim() -> int | None:
        with lock:
            return next(starts, None)

    def drain() -> None:
        nonlocal starts
        try:
            while (i := claim()) is not None:
                task(i, min(i + step, stop))
        except BaseException:  # an interrupt too: nobody begins another piece
            with lock:
                starts = iter(())
            raise

    with helped_by(min(num_threads, -(-stop // step)) - 1, drain):
        drain()


@contextmanager
def helped_by(count: int, task: Callable[[], object]) -> Iterator[None]:
    """Have a task done by so many other threads, or as many as are idle, while this one does something of its own.

    Parameters
    ----------
    count : int
    task : callable
        Must come to an end once what is done inside has, also if that is by an error.
    """
    helpers = []
    for _ in range(count):
        try:
            helpers.append(_shared_pool().submit(task))
        except RuntimeError:  # the interpreter is shutting down: this thread does it all
            break
    try:
        yield
    finally:
        # Even after an error: helpers use the caller's memory until they are done.
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def in_order(task: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield ``task(item)`` for each item, in the order of the items, computed in several threads.

    Parameters
    ----------
    task : callable
        As for `parallel_for`.
    items : iterable
    ahead : int
        At most this many items are begun before the first of them is yielded.
    """
    begun: deque[tuple[T, Future[R]]] = deque()

    def first() -> R:
        item, future = begun.popleft()
        return task(item) if future.cancel() else future.result()

    try:
        for item in items:
            if len(begun) == ahead:
                yield first()
            begun.append((item, _shared_pool().submit(task, item)))
        while begun:
            yield first()
    finally:
        wait([future for _, future in begun if not future.cancel()])
