"""The crew: threads that wait in compiled code. Kernels are Python functions here, which compiled code calls too."""

import ctypes
import itertools
import random
import signal
import sys
import threading
import time
from array import array

import numpy as np
import pytest
from contract import interrupted_after

import mxfp4np
from mxfp4np.backends.cpu import pool as crew

KERNEL_TYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
HELPERS = 3


@pytest.fixture
def own_crew():
    """Return what makes jobs for a crew of this test's own."""
    members = crew.Crew(HELPERS)
    kernels = []

    def make(kernel, helpers=HELPERS):
        kernels.append(KERNEL_TYPE(kernel))
        kernel = ctypes.cast(kernels[-1], ctypes.c_void_p).value
        return array("q", [8, kernel, members.address, members.enlist(helpers), 0, 0, 0, 0])

    make.members = members
    return make


def states(members):
    """Return what the threads of a crew are at."""
    return members._vector[crew.FIRST_MEMBER :: crew.MEMBER_NUMBERS][: members._count]


def assert_so_many_take_part(own_crew, helpers):
    """Assert that helpers and the caller are at a job at the same time, again and again, and at nothing afterwards."""
    together = threading.Barrier(helpers + 1)
    found = set()

    def kernel(*_):
        found.add(threading.get_ident())
        together.wait(timeout=10)
        return 0

    for _ in range(20):
        crew.run(own_crew(kernel, helpers))
        assert not states(own_crew.members).any()
        assert len(found) == helpers + 1
        found.clear()


@pytest.fixture
def no_new_threads(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("helpers", range(HELPERS + 1))
def test_as_many_threads_take_part_as_are_wanted(own_crew, helpers):
    assert_so_many_take_part(own_crew, helpers)


def test_a_kernel_is_called_again_until_nothing_is_left(own_crew):
    left, done = iter(range(100)), []

    def kernel(*_):
        number = next(left, None)
        done.append(number)
        return number is not None

    crew.run(own_crew(kernel))
    assert set(range(100)) < set(done)


def test_threads_at_another_job_are_not_waited_for_and_help_when_they_are_free(own_crew):
    release, begun = threading.Event(), threading.Semaphore(0)

    def busy(*_):
        begun.release()
        assert release.wait(timeout=10)
        return 0

    other = threading.Thread(target=crew.run, args=[own_crew(busy)])
    other.start()
    for _ in range(HELPERS + 1):
        assert begun.acquire(timeout=10)
    caller, found = threading.current_thread(), set()

    def kernel(*_):
        found.add(threading.current_thread())
        if threading.current_thread() is caller and not release.is_set():
            assert found == {caller}
            release.set()
            other.join()
        return len(found) <= HELPERS

    crew.run(own_crew(kernel))
    assert len(found) == HELPERS + 1


def test_when_a_job_is_over_nobody_comes_to_it_later(own_crew):
    """Even those that have been chosen, and not begun."""
    rng = random.Random(0)
    errors = []

    def call(seed):
        over, at_it = True, itertools.count()

        def kernel(*_):
            if over:
                errors.append("too late")
            next(at_it)
            time.sleep(rng.choice((0, 0, 1e-5, 1e-4)))
            if over:
                errors.append("left alone")
            return 0

        jobs = [own_crew(kernel, helpers) for helpers in range(HELPERS + 1)]
        for i in range(300):
            over = False
            crew.run(jobs[(i + seed) % len(jobs)])
            over = True

    callers = [threading.Thread(target=call, args=[seed]) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors
    assert not states(own_crew.members).any()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize("helpers", [0, 1, HELPERS])
def test_an_interrupted_caller_waits_for_those_that_are_at_a_piece(own_crew, monkeypatch, helpers):
    """And another interrupt meanwhile changes nothing."""
    caller, begun, ended = threading.current_thread(), threading.Semaphore(0), []

    def kernel(*_):
        if threading.current_thread() is caller:
            return 0
        begun.release()
        while job[crew.NEXT] < job[crew.UNITS]:
            time.sleep(0.001)
        time.sleep(0.05)  # until the caller is waiting, and longer than it looks before it rests
        signal.pthread_kill(caller.ident, signal.SIGINT)
        time.sleep(0.05)
        ended.append(threading.current_thread())
        return 0

    def interrupted(address):
        if job[crew.NEXT] == job[crew.UNITS]:
            return do(address)
        compiled("call_crew")(address)
        for _ in range(helpers):
            assert begun.acquire(timeout=10)
        raise KeyboardInterrupt

    compiled, doing = crew.compiled, "lead" if helpers else "work"
    do = compiled(doing)
    monkeypatch.setattr(crew, "compiled", lambda *key: interrupted if key[0] == doing else compiled(*key))
    job = own_crew(kernel, helpers)
    job[crew.UNITS] = 1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            crew.run(job)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == helpers


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
@pytest.mark.parametrize("count", [1, 60_000, 300_000])
def test_a_decode_of_any_size_can_be_interrupted(count):
    """Also one that has no crew."""
    blocks, scales = np.zeros((count, 16), np.uint8), np.full(count, 127, np.uint8)
    mxfp4np.decode(blocks, scales, num_threads=2)
    for _ in range(30):
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.003):  # noqa: PT012
            while True:
                mxfp4np.decode(blocks, scales, num_threads=2)


@pytest.mark.usefixtures("no_new_threads")
def test_a_thread_that_does_not_start_costs_one_lock(own_crew, monkeypatch):
    held_lock, locks = own_crew.members._held_lock, []
    monkeypatch.setattr(own_crew.members, "_held_lock", lambda: locks.append(held_lock()) or locks[-1])
    for _ in range(3):
        assert own_crew.members.enlist(HELPERS) == 0
    assert len(locks) == 1


@pytest.mark.parametrize("begins", [False, True])
def test_when_the_start_of_a_thread_is_interrupted_another_takes_its_place(own_crew, monkeypatch, begins):
    start = threading.Thread.start

    def interrupted(thread):
        if begins:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_crew.members.enlist(HELPERS)
    monkeypatch.undo()
    assert_so_many_take_part(own_crew, HELPERS)


@pytest.mark.usefixtures("no_new_threads")
def test_where_there_can_be_no_threads_the_caller_works_alone(own_crew):
    found = []
    crew.run(own_crew(lambda *_: found.append(threading.current_thread()) or 0))
    assert found == [threading.current_thread()]


def test_a_crew_is_as_large_as_can_run_at_once_and_not_larger(own_crew):
    assert own_crew.members.enlist(100) == HELPERS
    assert sum(thread.name.startswith("mxfp4np") for thread in threading.enumerate()) >= HELPERS


def test_a_decode_leaves_no_thread_at_work():
    blocks, scales = np.zeros((300_000, 16), np.uint8), np.full(300_000, 127, np.uint8)
    for _ in range(50):
        mxfp4np.decode(blocks, scales, num_threads=2)
        assert not states(crew._crew).any()
