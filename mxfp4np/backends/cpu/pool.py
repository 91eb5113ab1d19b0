"""The pool: worker threads that wait in compiled code for tasks, and take part in them without the interpreter.

A task is a kernel, a job, and a range of units. Threads claim chunks of the range until none is left: the calling
thread, and workers that are idle when it calls. So a call finishes even if all workers are busy with other calls.

What a worker is at is one number, its field ``task``:

    0                   idle        any caller may assign a task
    address of a task   assigned    the worker may begin, or the caller may take the task back
    address + 1         running     the caller waits for the worker

Each step from one to the next is one atomic operation. A worker that is idle polls for a task for a moment, since many
calls follow each other, and then sleeps by a lock of its own. Locks are those of Python's C API, which need no GIL.
Workers are daemon threads: they do not keep the interpreter from shutting down. Nothing here knows MXFP4.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

import numpy as np
from numba import types

from ..memory import address_of, aligned_empty
from ..threads import most_threads
from .compiler import CompiledFunction, compile_function
from .geometry import field_offsets
from .simd import atomic_add, atomic_load, atomic_replace, call_c, inner, pause

TASK: Final = np.dtype([(name, np.int64) for name in ("kernel", "job", "next", "stop", "fewest", "most", "share")])
WORKER: Final = np.dtype([(name, np.int64) for name in ("task", "is_asleep", "lock")] + [("unused", np.int64, 5)])
POOL: Final = np.dtype([(name, np.int64) for name in ("workers", "count", "acquire", "release", "never_released")])

# Fields are read and written atomically, at their offsets.
KERNEL, JOB, NEXT, STOP, FEWEST, MOST, SHARE = field_offsets(TASK)
CURRENT, IS_ASLEEP, LOCK, _ = field_offsets(WORKER)
WORKERS, COUNT, ACQUIRE, RELEASE, NEVER_RELEASED = field_offsets(POOL)
WORKER_SIZE: Final = WORKER.itemsize

IDLE: Final = 0
RUNNING: Final = 1
"""What is added to the address of a task that is running."""

CHUNKS_AT_ONCE: Final = 64
"""Chunks that the calling thread does before Python can interrupt it: a tenth of a second at most."""

SHARES_PER_THREAD: Final = 3
"""A chunk is what is left, divided by this and by the number of threads."""

IDLE_POLLS: Final = 1 << 14
"""How often an idle worker polls for a task before it sleeps, 0.4 to 0.8 ms. To wake one takes 50 microseconds."""

JOIN_POLLS: Final = 1 << 11
"""How often a caller polls whether workers are done, 20 to 100 microseconds, before it sleeps between polls."""

JOIN_SLEEP: Final = 50
"""Microseconds."""


@inner  # type: ignore[untyped-decorator]
def work(task: int) -> int:
    """Do some chunks of a task; return whether there may be more.

    A chunk is a share of what is left: threads seldom begin anew, and end at about the same time.
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
    """Wake two workers that sleep and have been assigned a task. To wake one takes 5 to 10 microseconds."""
    count = 2
    for worker in workers_of(pool):
        if count > 0 and atomic_load(worker + CURRENT) == task and atomic_replace(worker + IS_ASLEEP, 1, 0):
            call_c(atomic_load(pool + RELEASE), (atomic_load(worker + LOCK),))
            count -= 1


def assign(pool: int, task: int, count: int) -> None:
    """Assign a task to some workers that are idle, and wake two of them; each that begins wakes two more."""
    for worker in workers_of(pool):
        if count > 0 and atomic_replace(worker + CURRENT, IDLE, task):
            count -= 1
    wake_two(pool, task)


def join(pool: int, task: int) -> None:
    """Have nobody claim more of a task, and return when no worker is at it any more."""
    atomic_add(task + NEXT, atomic_load(task + STOP))
    polls = 0
    for worker in workers_of(pool):
        atomic_replace(worker + CURRENT, task, IDLE)  # if it has not begun
        while atomic_load(worker + CURRENT) == task + RUNNING:
            polls += 1
            if polls < JOIN_POLLS:
                pause()
            else:
                call_c(atomic_load(pool + ACQUIRE), (atomic_load(pool + NEVER_RELEASED), JOIN_SLEEP, 0))


def serve(pool: int, worker: int) -> None:
    """Do one task after the other, and sleep in between. It does not return."""
    while True:
        polls = 0
        while atomic_load(worker + CURRENT) == IDLE and polls < IDLE_POLLS:
            pause()
            polls += 1
        if polls == IDLE_POLLS:
            atomic_replace(worker + IS_ASLEEP, 0, 1)
            # Who wakes this worker from here on releases the lock, once, and has said so in `is_asleep` before.
            if atomic_load(worker + CURRENT) == IDLE or not atomic_replace(worker + IS_ASLEEP, 1, 0):
                call_c(atomic_load(pool + ACQUIRE), (atomic_load(worker + LOCK), -1, 0))
        task = atomic_load(worker + CURRENT)
        if task != IDLE and task & RUNNING == 0 and atomic_replace(worker + CURRENT, task, task + RUNNING):
            wake_two(pool, task)
            while work(task):
                pass
            atomic_replace(worker + CURRENT, task + RUNNING, IDLE)


class Pool:
    """The workers of this process, started when they are first wanted."""

    def __init__(self, functions: dict[str, CompiledFunction]) -> None:
        self.work, self.assign, self.join = (functions[name].call for name in ("work", "assign", "join"))
        self._serve = functions["serve"].call
        self._starting = threading.RLock()  # a signal handler may decode too
        self._workers = aligned_empty((most_threads(),), WORKER)
        self._workers["task"] = self._workers["is_asleep"] = 0
        self._workers["lock"] = [_held_lock() for _ in self._workers]
        api = ctypes.pythonapi
        acquire, release = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (api.PyThread_acquire_lock_timed, api.PyThread_release_lock)
        )
        self._record = np.array((address_of(self._workers), 0, acquire, release, _held_lock()), POOL)
        self.address = address_of(self._record)

    def run(self, kernel: int, job: int, units: int, chunk: tuple[int, int], num_threads: int) -> None:
        """Run the kernel at an address over units 0 to ``units - 1`` of the job at another, in several threads.

        Threads claim a chunk at a time, of at least and at most as many units as ``chunk`` says. Returns, or raises
        what interrupts it, when no thread is at the job any more.
        """
        fewest, most = chunk
        record = np.array((kernel, job, 0, units, fewest, most, SHARES_PER_THREAD * num_threads), TASK)
        task = address_of(record)
        helpers = self.start(min(num_threads, -(-units // fewest)) - 1)
        try:
            self.assign(self.address, task, helpers)
            while self.work(task):
                pass
        finally:
            # Python handles no signal before this call. After it, the memory of the job may be freed.
            self.join(self.address, task)

    def start(self, wanted: int) -> int:
        """Return how many workers there are: as many as are wanted, if there can be."""
        wanted = min(wanted, len(self._workers))
        if self._record["count"] < wanted:
            with self._starting:
                while self._record["count"] < wanted and self._start_one():
                    pass
        return min(wanted, int(self._record["count"]))

    def _start_one(self) -> bool:
        count = int(self._record["count"])
        worker = address_of(self._workers) + count * WORKER_SIZE
        thread = threading.Thread(target=self._serve, args=(self.address, worker), name=f"mxfp4np_{count}", daemon=True)
        try:
            # If an interrupt comes when the thread has started, the next one shares its record: either does a task.
            thread.start()
        except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
            return False
        self._record["count"] = max(count + 1, int(self._record["count"]))
        return True


def _held_lock() -> int:
    """Return a new lock of Python's C API, acquired. It is never freed, since a worker may sleep by it."""
    api = ctypes.pythonapi
    api.PyThread_allocate_lock.restype = ctypes.c_void_p
    lock: int | None = api.PyThread_allocate_lock()
    if not lock:
        raise MemoryError("the system has no lock left for a thread")
    api.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
    return lock


def compile_functions() -> dict[str, CompiledFunction]:
    """Compile what a pool consists of."""
    integer = types.int64
    signatures = {
        work.py_func: integer(integer),
        assign: types.void(integer, integer, integer),
        join: types.void(integer, integer),
        serve: types.void(integer, integer),
    }
    compiled = {function.__name__: compile_function(function, signatures[function]) for function in signatures}
    return {name: function for name, function in compiled.items() if function is not None}
