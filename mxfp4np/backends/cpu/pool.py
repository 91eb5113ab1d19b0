"""The worker pool: threads that wait in compiled code for tasks, and run them without the interpreter.

A task is a kernel, a job, and a range of units. The calling thread, and the workers that are idle when it calls, claim
chunks of the range until none is left. So a call finishes even if all workers are busy with other calls.

The field ``task`` of a worker is its state:

    0                   idle        any caller may assign a task
    address of a task   assigned    the worker may begin, or the caller may take the task back
    address + 1         running     the caller waits for the worker, and keeps the task's memory until then

Each change of state is one atomic compare-and-swap. An idle worker first polls for a task, since calls often follow
each other closely, and then sleeps: it waits for its own lock, which another thread releases to wake it. Locks are
Python's C API's, which need no GIL. Workers are daemon threads: they do not keep the interpreter from shutting down.
Nothing here knows MXFP4.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Final

import numpy as np
from numba import types

from ..memory import address_of, aligned_empty
from ..threads import most_threads, starting_threads
from .compiler import compile_function
from .geometry import field_offsets
from .simd import atomic_add, atomic_load, atomic_replace, call_c, inner, pause

TASK: Final = np.dtype([(name, np.int64) for name in ("kernel", "job", "next", "stop", "fewest", "most", "share")])
WORKER: Final = np.dtype([(name, np.int64) for name in ("task", "is_asleep", "lock")] + [("unused", np.int64, 5)])
POOL: Final = np.dtype([(name, np.int64) for name in ("workers", "count", "acquire", "release", "never_released")])

# Offsets of the fields, which compiled code reads and writes atomically. CURRENT is the offset of a worker's ``task``.
KERNEL, JOB, NEXT, STOP, FEWEST, MOST, SHARE = field_offsets(TASK)
CURRENT, IS_ASLEEP, LOCK, _ = field_offsets(WORKER)
WORKERS, COUNT, ACQUIRE, RELEASE, NEVER_RELEASED = field_offsets(POOL)
WORKER_SIZE: Final = WORKER.itemsize

IDLE: Final = 0
RUNNING: Final = 1
"""Added to the address of a task that is running; addresses of tasks are even."""

CHUNKS_AT_ONCE: Final = 64
"""Chunks that the calling thread runs before it handles signals in Python: about a tenth of a second at most."""

SHARES_PER_THREAD: Final = 3
"""The size of a chunk is what is left, divided by this and by the number of threads."""

IDLE_POLLS: Final = 1 << 14
"""Polls by an idle worker before it sleeps: 0.4 to 0.8 ms. A sleeping worker begins 50 microseconds after a wake."""

JOIN_POLLS: Final = 1 << 11
"""Polls by a caller that waits for workers, 20 to 100 microseconds, before it sleeps between polls."""

JOIN_SLEEP: Final = 50
"""Microseconds that a waiting caller sleeps between polls."""


@inner  # type: ignore[untyped-decorator]
def work(task: int) -> int:
    """Claim and run some chunks of a task; return whether there may be more.

    Chunks become smaller as less is left: there are few of them, and threads finish at about the same time.
    """
    stop, fewest, most = atomic_load(task + STOP), atomic_load(task + FEWEST), atomic_load(task + MOST)
    chunks = 0
    while chunks < CHUNKS_AT_ONCE:
        begin = atomic_load(task + NEXT)
        if begin >= stop:
            return 0
        end = min(stop, begin + max(fewest, min(most, (stop - begin) // atomic_load(task + SHARE))))
        if atomic_replace(task + NEXT, begin, end):
            call_c(atomic_load(task + KERNEL), (atomic_load(task + JOB), begin, end))
            chunks += 1
    return 1


@inner  # type: ignore[untyped-decorator]
def workers_of(pool: int) -> range:
    """Return the addresses of the workers."""
    first = atomic_load(pool + WORKERS)
    return range(first, first + atomic_load(pool + COUNT) * WORKER_SIZE, WORKER_SIZE)


@inner  # type: ignore[untyped-decorator]
def wake_two(pool: int, task: int) -> None:
    """Wake up to two sleeping workers that have been assigned a task. A wake takes the caller 5 to 10 microseconds."""
    count = 2
    for worker in workers_of(pool):
        if count > 0 and atomic_load(worker + CURRENT) == task and atomic_replace(worker + IS_ASLEEP, 1, 0):
            call_c(atomic_load(pool + RELEASE), (atomic_load(worker + LOCK),))
            count -= 1


def assign(pool: int, task: int, count: int) -> None:
    """Assign a task to at most ``count`` idle workers, and wake two of them; each worker that begins wakes two more."""
    for worker in workers_of(pool):
        if count > 0 and atomic_replace(worker + CURRENT, IDLE, task):
            count -= 1
    wake_two(pool, task)


def join(pool: int, task: int) -> None:
    """Let no thread claim another chunk of a task, and return when no worker runs it."""
    atomic_add(task + NEXT, atomic_load(task + STOP))  # nothing is left to claim
    polls = 0
    for worker in workers_of(pool):
        atomic_replace(worker + CURRENT, task, IDLE)  # takes the task back if the worker has not begun
        while atomic_load(worker + CURRENT) == task + RUNNING:
            polls += 1
            if polls < JOIN_POLLS:
                pause()
            else:
                # Sleeps: no thread releases this lock, so that the wait for it ends after JOIN_SLEEP.
                call_c(atomic_load(pool + ACQUIRE), (atomic_load(pool + NEVER_RELEASED), JOIN_SLEEP, 0))


def serve(pool: int, worker: int) -> None:
    """Run one task after another, and sleep in between. This function never returns."""
    while True:
        polls = 0
        while atomic_load(worker + CURRENT) == IDLE and polls < IDLE_POLLS:
            pause()
            polls += 1
        if polls == IDLE_POLLS:
            atomic_replace(worker + IS_ASLEEP, 0, 1)
            # A waker sets IS_ASLEEP to 0, then releases the lock. The worker sets IS_ASLEEP before it reads CURRENT; a
            # caller writes CURRENT before it reads IS_ASLEEP. So at least one of the two sees what the other wrote. If
            # there is a task, and no waker has set IS_ASLEEP to 0, the worker does so itself, and does not sleep.
            if atomic_load(worker + CURRENT) == IDLE or not atomic_replace(worker + IS_ASLEEP, 1, 0):
                call_c(atomic_load(pool + ACQUIRE), (atomic_load(worker + LOCK), -1, 0))
        task = atomic_load(worker + CURRENT)
        if task != IDLE and task & RUNNING == 0 and atomic_replace(worker + CURRENT, task, task + RUNNING):
            wake_two(pool, task)
            while work(task):
                pass
            atomic_replace(worker + CURRENT, task + RUNNING, IDLE)


class Pool:
    """The workers of this process. Each is started when a call first needs it."""

    def __init__(self) -> None:
        functions = _compile()
        self.work, self.assign, self.join = (functions[name].call for name in ("work", "assign", "join"))
        self._serve = functions["serve"].call
        self._workers = aligned_empty((most_threads(),), WORKER)
        self._record = np.zeros((), POOL)
        self.address = address_of(self._record)
        self._forks = -1
        self._forget_workers()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_workers)

    def _forget_workers(self) -> None:
        """Begin without workers: a forked child has none of its parent's threads, in whatever state they were."""
        self._starting = threading.RLock()  # a signal handler may decode too
        self._workers["task"] = self._workers["is_asleep"] = 0
        self._workers["lock"] = [_held_lock() for _ in self._workers]
        api = ctypes.pythonapi
        acquire, release = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (api.PyThread_acquire_lock_timed, api.PyThread_release_lock)
        )
        self._record[()] = address_of(self._workers), 0, acquire, release, _held_lock()
        self._forks += 1

    def run(self, kernel: int, job: int, units: int, chunk: tuple[int, int], num_threads: int) -> None:
        """Run a kernel over units 0 to ``units - 1`` of a job, in several threads.

        Returns, or raises the exception of a signal handler, when no thread uses the job any more.

        Parameters
        ----------
        kernel, job : int
            Their addresses.
        units : int
            Number of units in the job.
        chunk : (int, int)
            Fewest and most units that a thread claims at a time.
        num_threads : int
            At most this many threads, of which the calling thread is one.
        """
        forks, (fewest, most) = self._forks, chunk
        record = np.array((kernel, job, 0, units, fewest, most, SHARES_PER_THREAD * num_threads), TASK)
        task = address_of(record)
        helpers = self.start(min(num_threads, -(-units // fewest)) - 1)
        try:
            self.assign(self.address, task, helpers)
            while self.work(task):
                pass
        finally:
            # CPython handles signals after calls and at backward jumps, so none can prevent this call. Until it has
            # returned, workers may write to the memory of the job.
            self.join(self.address, task)
        if self._forks != forks:  # a signal handler has forked, and this is the child: its parent's workers did a part
            self.run(kernel, job, units, chunk, num_threads)

    def start(self, wanted: int) -> int:
        """Start workers until there are as many as wanted, or no more can start; return how many of them there are."""
        wanted = min(wanted, len(self._workers))
        if self._record["count"] < wanted:
            with self._starting:
                while self._record["count"] < wanted and self._start_one():
                    pass
        return min(wanted, int(self._record["count"]))

    def _start_one(self) -> bool:
        count = int(self._record["count"])
        worker = address_of(self._workers) + count * WORKER_SIZE
        thread = threading.Thread(
            target=self._run_worker, args=(worker, threading.get_native_id()), name=f"mxfp4np_{count}", daemon=True
        )
        try:
            # If a signal handler raises after the thread has started, the next thread shares its record. That is safe:
            # only one of the two can change the state to running, and one of them is awake or can be woken.
            with starting_threads():
                thread.start()
        except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
            return False
        self._record["count"] = max(count + 1, int(self._record["count"]))
        return True

    def _run_worker(self, worker: int, starter: int) -> None:
        if threading.get_native_id() != starter:  # not with gevent, whose threads are one of the system
            self._serve(self.address, worker)  # for ever: this frame keeps the pool until the process ends


def _held_lock() -> int:
    """Return a new lock of Python's C API, acquired. It is never freed, since a worker may be waiting for it."""
    api = ctypes.pythonapi
    api.PyThread_allocate_lock.restype = ctypes.c_void_p
    lock: int | None = api.PyThread_allocate_lock()
    if not lock:
        raise MemoryError("the system has no lock left for a thread")
    api.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
    return lock


def _compile() -> dict[str, Any]:
    integer = types.int64
    signatures = {
        work.py_func: integer(integer),
        assign: types.void(integer, integer, integer),
        join: types.void(integer, integer),
        serve: types.void(integer, integer),
    }
    return {function.__name__: compile_function(function, signatures[function]) for function in signatures}
