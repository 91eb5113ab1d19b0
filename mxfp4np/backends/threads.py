"""The shared thread pool, and how many threads this process may use.

Threads claim pieces of some work, here or in compiled code, the calling thread among them, so that a call finishes
even when every pool thread is busy with someone else's, and nothing is ever waited for that has not begun. It knows
nothing of MXFP4.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

ENVIRONMENT_VARIABLE = "MXFP4NP_NUM_THREADS"

LOOK_AGAIN = 10.0
"""Seconds after which an idle thread looks whether it should be one."""


class _Pool:
    """Threads that call what is submitted, the one first that was the last to become idle.

    An executor of the standard library takes 10 microseconds and more to submit a call, and wakes one thread after the
    other, for work of a few hundred. These threads do not keep the interpreter from shutting down, nor need they:
    whoever submits a call stays until it is done or withdrawn.
    """

    def __init__(self, size: int) -> None:
        self._size, self._count, self._lock = size, 0, threading.Lock()
        self._calls: deque[Callable[[], object]] = deque()
        self._idle: list[SimpleQueue[None]] = []  # what each idle thread waits for

    def submit(self, call: Callable[[], object], times: int = 1) -> None:
        """Have threads make a call, which must not raise, as they are idle; nobody does if there can be no threads."""
        self._calls.extend([call] * times)
        self._wake_two()

    def withdraw(self, call: Callable[[], object]) -> bool:
        """Take back one call that was submitted; return False if all of them have begun."""
        try:
            self._calls.remove(call)
        except ValueError:
            return False
        return True

    def _wake_two(self) -> None:
        """Wake two threads, or start them, if there are calls. Each does the same: to wake one takes a while."""
        for _ in range(2):
            if self._calls:
                try:
                    woken = self._idle.pop()
                except IndexError:
                    self._start()
                else:
                    woken.put(None)

    def _start(self) -> None:
        with self._lock:
            if self._count < self._size:
                self._count += 1
                try:
                    threading.Thread(target=self._work, name=f"mxfp4np_{self._count}", daemon=True).start()
                except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
                    self._count -= 1

    def _work(self) -> None:
        woken: SimpleQueue[None] = SimpleQueue()
        while True:
            try:
                call = self._calls.popleft()
            except IndexError:
                self._idle.append(woken)
                self._wake_two()  # perhaps a call came when this thread was not idle yet
                self._sleep(woken)
            else:
                self._wake_two()
                call()
                del call  # and what it holds

    def _sleep(self, woken: SimpleQueue[None]) -> None:
        """Wait to be woken, or, now and then, see that an interrupt came between being chosen and being woken."""
        while True:
            try:
                return woken.get(timeout=LOOK_AGAIN)
            except Empty:
                if woken not in self._idle:
                    return


_pool: _Pool | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """Start over in a forked child, where the threads of the parent's pool do not exist."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _shared_pool() -> _Pool:
    global _pool  # noqa: PLW0603
    with _pool_lock:
        if _pool is None:
            _pool = _Pool(max(usable_cpus(), default_num_threads()))
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


def in_threads(
    work: Callable[[], object],
    num_threads: int,
    close: Callable[[], object],
    failed: Callable[[BaseException], object] | None = None,
) -> None:
    """Call ``work()`` in several threads, each of which does pieces of some work until none is left.

    Returns, or raises what the first thread that failed did, when no thread is at a piece any more.

    Parameters
    ----------
    work : callable
        Called from any thread; should release the GIL to run in parallel.
    num_threads : int
        At most this many threads, the calling one included, and never more than the pool has and one.
    close : callable
        Called when a thread has failed: no piece must begin any more.
    failed : callable, optional
        Called with what ends a thread, an interrupt of the calling one included, before the others are waited for.
    """
    helpers, begin, lock = 0, True, threading.Lock()
    left: SimpleQueue[None] = SimpleQueue()
    first: list[BaseException] = []

    def end(error: BaseException) -> None:
        close()
        if not first:
            first.append(error)
        if failed is not None:
            failed(error)

    def begin_work() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - an interrupt too
            end(error)

    def help_out() -> None:
        nonlocal helpers
        with lock:
            if not begin:
                return
            helpers += 1
        begin_work()
        with lock:
            helpers -= 1
        left.put(None)

    def nobody_works() -> bool:
        nonlocal begin
        with lock:
            begin = False
            if not helpers:
                return True
        left.get()
        return False

    try:
        if num_threads > 1:
            _shared_pool().submit(help_out, num_threads - 1)
        begin_work()
    except BaseException as error:  # noqa: BLE001 - an interrupt while help was being called
        end(error)
    finally:
        # Even after an error: helpers write to the caller's memory until they are done.
        insist(nobody_works, end)
        while num_threads > 1 and _shared_pool().withdraw(help_out):
            pass
    if first:
        raise first.pop()


def parallel_for(
    task: Callable[[int, int], object],
    stop: int,
    step: int,
    num_threads: int,
    failed: Callable[[BaseException], object] | None = None,
) -> None:
    """Call ``task(i, j)`` for consecutive pieces of ``[0, stop)`` of ``step`` integers, in several threads.

    Parameters
    ----------
    task : callable
        Called from any thread; should release the GIL to run in parallel.
    stop, step : int
        The range and the size of a piece.
    num_threads, failed
        As for `in_threads`.
    """
    starts: Iterator[int] = iter(range(0, stop, step))
    lock = threading.Lock()

    def claim() -> int | None:
        with lock:
            return next(starts, None)

    def work() -> None:
        while (i := claim()) is not None:
            task(i, min(i + step, stop))

    def close() -> None:
        nonlocal starts
        with lock:
            starts = iter(())

    in_threads(work, min(num_threads, -(-stop // step)), close, failed=failed)


def insist(wait: Callable[[], object], interrupted: Callable[[BaseException], object]) -> None:
    """Wait until that returns something true, whatever interrupts it."""
    while True:
        try:
            if wait():
                return
        except BaseException as error:  # noqa: BLE001
            interrupted(error)
