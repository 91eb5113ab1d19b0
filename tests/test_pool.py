"""The pool of worker threads. Kernels are Python functions here, which compiled code calls too."""

import ctypes
import itertools
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from contract import interrupted_after

import mxfp4np
from mxfp4np.backends.cpu import compiler, launch, pool

KERNEL_TYPE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
HELPERS = 3


@pytest.fixture
def own_pool(monkeypatch):
    """Put a pool of this test's own in the place of the process's."""
    monkeypatch.setattr(pool, "most_threads", lambda: HELPERS)
    own = compiler.build_once("test's own pool", pool.Pool)
    del compiler._built["test's own pool"]
    monkeypatch.setitem(compiler._built, "pool", own)
    return own


def run(kernel, units, helpers=HELPERS, chunk=1):
    """Run a Python function as a kernel."""
    function = KERNEL_TYPE(kernel)
    address = ctypes.cast(function, ctypes.c_void_p).value
    launch.worker_pool().run(address, 0, units, (chunk, chunk), helpers + 1)


def all_are_idle(some):
    return not some._workers["task"].any()


def assert_so_many_take_part(own_pool, helpers):
    """Assert that helpers and the caller are at a task at the same time, again and again, and at none afterwards."""
    together = threading.Barrier(helpers + 1)
    found = set()

    def kernel(*_):
        found.add(threading.get_ident())
        together.wait(timeout=10)

    for _ in range(20):
        run(kernel, helpers + 1, helpers)
        assert all_are_idle(own_pool)
        assert len(found) == helpers + 1
        found.clear()


@pytest.fixture
def no_new_threads(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("helpers", range(HELPERS + 1))
def test_as_many_threads_take_part_as_are_wanted(own_pool, helpers):
    assert_so_many_take_part(own_pool, helpers)


@pytest.mark.parametrize(("units", "chunk"), [(1, 1), (100, 1), (100, 7), (5, 100), (1000, 3)])
@pytest.mark.parametrize("helpers", [0, HELPERS])
@pytest.mark.usefixtures("own_pool")
def test_chunks_cover_the_units_once(units, chunk, helpers):
    done = []
    run(lambda _, start, stop: done.append((start, stop)), units, helpers, chunk)
    assert sorted(done) == [(i, min(i + chunk, units)) for i in range(0, units, chunk)]


@pytest.mark.usefixtures("own_pool")
def test_workers_at_another_task_are_not_waited_for_and_help_when_they_are_free():
    release, begun = threading.Event(), threading.Semaphore(0)

    def busy(*_):
        begun.release()
        assert release.wait(timeout=10)

    other = threading.Thread(target=run, args=[busy, HELPERS + 1])
    other.start()
    for _ in range(HELPERS + 1):
        assert begun.acquire(timeout=10)
    caller, found = threading.current_thread(), set()
    run(lambda *_: found.add(threading.current_thread()), 100)
    assert found == {caller}
    release.set()
    other.join()
    together = threading.Barrier(HELPERS + 1)
    run(lambda *_: together.wait(timeout=10), HELPERS + 1)


def test_when_a_task_is_over_nobody_comes_to_it_later(own_pool):
    """Not those that have been assigned and have not begun, either."""
    rng = random.Random(0)
    errors = []

    def call(seed):
        over = True

        def kernel(*_):
            if over:
                errors.append("too late")
            time.sleep(rng.choice((0, 0, 1e-5, 1e-4)))
            if over:
                errors.append("left alone")

        for i in range(300):
            over = False
            run(kernel, rng.randrange(1, 6), (i + seed) % (HELPERS + 1))
            over = True

    callers = [threading.Thread(target=call, args=[seed]) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors
    assert all_are_idle(own_pool)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_a_signal_handler_forks_meanwhile_does_all_units(own_pool):
    """What its parent's workers have done or claimed is not done in its memory."""
    done, children, caller = [], [], threading.current_thread()
    together = threading.Barrier(2)

    def kernel(_, start, __):
        if not children:  # the first chunks of the caller and of a worker
            together.wait(timeout=10)
            if threading.current_thread() is caller:
                children.append(os.fork())
            else:
                time.sleep(0.05)
        done.append(start)

    assert_so_many_take_part(own_pool, 1)
    run(kernel, 20, helpers=1)
    if children == [0]:
        os._exit(set(range(20)) - set(done) != set())
    assert sorted(done) == list(range(20))
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


def test_a_worker_sleeps_and_is_woken(own_pool):
    assert_so_many_take_part(own_pool, HELPERS)
    for _ in range(3):
        deadline = time.monotonic() + 10
        while own_pool._workers["is_asleep"].sum() < HELPERS:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert_so_many_take_part(own_pool, HELPERS)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize("helpers", [0, 1, HELPERS])
def test_an_interrupted_caller_waits_for_those_that_are_at_a_chunk(own_pool, monkeypatch, helpers):
    """And another interrupt meanwhile changes nothing."""
    caller, begun, ended = threading.current_thread(), threading.Semaphore(0), []
    finishing = threading.Event()

    def kernel(*_):
        begun.release()
        assert finishing.wait(timeout=10)
        time.sleep(0.05)  # until the caller is waiting, and longer than it looks before it sleeps
        signal.pthread_kill(caller.ident, signal.SIGINT)
        time.sleep(0.05)
        ended.append(threading.current_thread())

    def interrupted(_):
        for _ in range(helpers):
            assert begun.acquire(timeout=10)
        finishing.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(own_pool, "work", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(kernel, 100, helpers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == helpers
    assert caller not in ended
    assert all_are_idle(own_pool)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
@pytest.mark.parametrize("count", [1, 60_000, 300_000])
def test_a_decode_of_any_size_can_be_interrupted(count):
    """Also one that has no workers."""
    blocks, scales = np.zeros((count, 16), np.uint8), np.full(count, 127, np.uint8)
    mxfp4np.decode(blocks, scales, num_threads=2)
    for _ in range(30):
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.003):  # noqa: PT012
            while True:
                mxfp4np.decode(blocks, scales, num_threads=2)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
def test_a_signal_handler_may_decode_while_the_pool_is_at_work():
    blocks, scales = np.zeros((300_000, 16), np.uint8), np.full(300_000, 127, np.uint8)
    mxfp4np.decode(blocks, scales, num_threads=2)
    found = []

    def decode(*_):
        found.append(mxfp4np.decode(blocks, scales, num_threads=2).any())

    before = signal.signal(signal.SIGALRM, decode)
    try:
        for i in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * (i % 5 + 1))
            while len(found) <= i:
                mxfp4np.decode(blocks, scales, num_threads=2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not any(found)


@pytest.mark.parametrize("begins", [False, True])
def test_when_the_start_of_a_thread_is_interrupted_another_takes_its_place(own_pool, monkeypatch, begins):
    start = threading.Thread.start

    def interrupted(thread):
        if begins:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_pool.start(HELPERS)
    monkeypatch.undo()
    own_pool.start(HELPERS)
    for _ in range(20):
        done = []
        counted = itertools.count()

        def kernel(*_, done=done, counted=counted):
            next(counted)
            time.sleep(0.0005)
            done.append(threading.get_ident())

        function = KERNEL_TYPE(kernel)
        address = ctypes.cast(function, ctypes.c_void_p).value
        task = np.array((address, 0, 0, 20, 1, 1, 1), pool.TASK)
        own_pool.assign(own_pool.address, task.ctypes.data, HELPERS)
        while own_pool.work(task.ctypes.data):
            pass
        own_pool.join(own_pool.address, task.ctypes.data)
        assert len(done) == next(counted) == 20
        assert all_are_idle(own_pool)


@pytest.mark.usefixtures("own_pool", "no_new_threads")
def test_where_there_can_be_no_threads_the_caller_works_alone():
    found = set()
    run(lambda *_: found.add(threading.current_thread()), 10)
    assert found == {threading.current_thread()}


def test_threads_that_are_none_of_the_system_do_not_serve(own_pool, monkeypatch):
    """As those of gevent, the first of which would never return to the others."""
    monkeypatch.setattr(threading, "get_native_id", lambda: 1)
    assert own_pool.start(HELPERS) == HELPERS
    found = set()
    run(lambda *_: found.add(threading.current_thread()), 10)
    assert found == {threading.current_thread()}


def test_a_pool_is_as_large_as_can_run_at_once_and_not_larger(own_pool):
    assert own_pool.start(100) == HELPERS
    assert sum(thread.name.startswith("mxfp4np") for thread in threading.enumerate()) >= HELPERS


def test_a_decode_leaves_no_thread_at_work():
    blocks, scales = np.zeros((300_000, 16), np.uint8), np.full(300_000, 127, np.uint8)
    for _ in range(50):
        mxfp4np.decode(blocks, scales, num_threads=2)
        assert all_are_idle(launch.worker_pool())
