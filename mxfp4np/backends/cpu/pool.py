"""Compiled functions, and the crew: threads that wait in compiled code for jobs to take part in.

A job is what `mxfp4np.backends.cpu_kernels` describes. The calling thread does it too, so that a call finishes even
when all others are at someone else's. Calling others and waiting for them takes no interpreter: threads would hand it
to each other for longer than small jobs take. It knows nothing of MXFP4.
"""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from ..memory import address_of, aligned_empty
from ..threads import most_threads

# Positions in the vectors of a job and of a crew, as in `cpu_kernels`, which is not imported yet.
HELPERS, UNITS, NEXT = 3, 4, 5
MEMBERS, ACQUIRE, RELEASE, REST_LOCK = 0, 1, 2, 3
FIRST_MEMBER, MEMBER_NUMBERS, LOCK = 8, 2, 1


class Crew:
    """Threads that sleep, each by a lock of its own, while there is nothing to do.

    The locks are those of Python's C API, which need no interpreter. The threads do not keep it from shutting down:
    whoever has a job stays until nobody is at it.
    """

    def __init__(self, size: int) -> None:
        self._size, self._count, self._lock = size, 0, threading.Lock()
        api = ctypes.pythonapi
        self._allocate = api.PyThread_allocate_lock
        self._allocate.restype = ctypes.c_void_p
        self._vector = aligned_empty((FIRST_MEMBER + MEMBER_NUMBERS * size,), np.dtype(np.int64))
        self._vector[:] = 0
        functions = api.PyThread_acquire_lock_timed, api.PyThread_release_lock
        self._vector[[ACQUIRE, RELEASE]] = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        self._vector[REST_LOCK] = self._held_lock()
        self.address = address_of(self._vector)

    def enlist(self, wanted: int) -> int:
        """Return how many threads there are: as many as are wanted, if there can be."""
        if self._count < min(wanted, self._size):
            with self._lock:
                while self._count < min(wanted, self._size) and self._start():
                    pass
        return self._count

    def _start(self) -> bool:
        place = FIRST_MEMBER + MEMBER_NUMBERS * self._count + LOCK
        if not self._vector[place]:
            self._vector[place] = self._held_lock()
        compiled("serve", 2)
        name = f"mxfp4np_{self._count}"
        try:
            # If it is interrupted when the thread is there, the next one shares its place: either of them does.
            threading.Thread(target=self._serve, args=(self._count,), name=name, daemon=True).start()
        except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
            return False
        self._count += 1
        self._vector[MEMBERS] = self._count
        return True

    def _serve(self, thread: int) -> None:
        compiled("serve", 2)(self.address, thread)

    def _held_lock(self) -> int:
        lock: int | None = self._allocate()
        if not lock:
            raise MemoryError("the system has no lock left for a thread")
        ctypes.pythonapi.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
        return lock


_crew: Crew | None = None
_crew_lock = threading.Lock()


def _forget_crew() -> None:
    """Start over in a forked child, where the threads of the parent's crew do not exist."""
    global _crew, _crew_lock
    _crew, _crew_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_crew)


def shared_crew(helpers: int) -> tuple[int, int]:
    """Return where the crew of this process is, and how many threads of it can help, up to so many."""
    global _crew  # noqa: PLW0603
    if _crew is None:
        with _crew_lock:
            if _crew is None:
                _crew = Crew(most_threads())
    return _crew.address, min(helpers, _crew.enlist(helpers))


def run(job: array[int]) -> None:
    """Do a job of pieces, with others; return, or raise what interrupts it, when nobody is at a piece any more.

    More interrupts change nothing: Python looks for them when a call of compiled code has returned, not before it.
    """
    do = compiled("lead" if job[HELPERS] else "work")  # which compiles sooner
    address, _ = job.buffer_info()
    try:
        while do(address):
            pass
    except BaseException:
        job[HELPERS], job[NEXT] = 0, job[UNITS]
        do(address)  # which calls nobody and finds nothing to do, but waits for others
        raise


_functions: dict[tuple[str, str | int], Any] = {}
_compiling = threading.Lock()


def compiled(name: str, count: int = 1) -> Any:
    """Return a function of `cpu_kernels` compiled for so many int64, or None where Numba's compiler is switched off."""
    return _once(_compile, name, count)


def kernel_address(name: str, word: str) -> int | None:
    """Return where a kernel of `cpu_kernels` is, compiled for words of this type, or None as `compiled` does."""
    kernel = _once(_compile_kernel, name, word)
    return None if kernel is None else kernel.address


def _once(compile_: Callable[..., Any], name: str, how: str | int) -> Any:
    try:
        return _functions[name, how]
    except KeyError:
        with _compiling:
            if (name, how) not in _functions:
                _functions[name, how] = _with_cache(compile_, name, how)
        return _functions[name, how]


def _with_cache(compile_: Callable[..., Any], name: str, how: str | int) -> Any:
    import numba

    if numba.config.DISABLE_JIT:
        return None
    from . import kernels as cpu_kernels

    function = getattr(cpu_kernels, name)
    function = getattr(function, "py_func", function)
    try:
        return compile_(function, how, cache=True)
    except Exception:  # noqa: BLE001 - no place for a cache, or a broken one, is no reason to fail; anything else fails again
        return compile_(function, how, cache=False)


def _compile(function: Callable[..., Any], count: int, *, cache: bool) -> Any:
    import numba

    made = numba.njit(nogil=True, cache=cache)(function)
    made.compile((numba.types.int64,) * count)
    made.disable_compile()
    return made


def _compile_kernel(function: Callable[..., Any], word: str, *, cache: bool) -> Any:
    import numba

    return numba.cfunc(numba.types.int32(numba.types.int64, getattr(numba.types, word)), cache=cache)(function)
