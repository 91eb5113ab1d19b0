"""Worker threads: results in order, the first error stops all, and an interrupt always ends the call in time."""

import concurrent.futures
import os
import signal
import sys
import threading
import time

import pytest
from contract import run_python

from mxfp4np.rewrite import workers
from mxfp4np.rewrite.workers import Workers

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def four(monkeypatch):
    """Let four threads run, whatever the number of CPUs."""
    monkeypatch.setenv("MXFP4NP_NUM_THREADS", "4")


def pool(number=4, progress=lambda _: None):
    return Workers(number, 10**6, progress)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("number", [None, 1, 2, 4, 10**6])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 300])
def test_results_are_in_order(number, tasks):
    assert pool(number).map(lambda task: -task, range(tasks)) == [-task for task in range(tasks)]


@pytest.mark.usefixtures("four")
def test_as_many_threads_as_asked_for_and_no_more():
    together, running, most = threading.Barrier(3, timeout=10), set(), []

    def work(task):
        running.add(threading.get_ident())
        most.append(len(running))
        if task < 3:
            together.wait()
        running.discard(threading.get_ident())

    pool(3).map(work, range(50))
    assert max(most) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "usable_cpus", lambda: 1)
        patch.setenv("MXFP4NP_NUM_THREADS", "1")
        assert set(pool(10**6).map(lambda _: threading.get_ident(), range(9))) == {threading.get_ident()}


@pytest.mark.usefixtures("four")
def test_no_thread_is_left_behind():
    before = threading.active_count()
    pool().map(time.sleep, [0.001] * 9)
    assert threading.active_count() == before


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_first_error_stops_all(kind):
    ours, done = pool(), []

    def work(task):
        if task == 5:
            raise kind("from a task")
        while not ours._error:
            ours.advance("shard", "tensor", 1)
            time.sleep(0.001)
            if task < 4:
                return
        done.append(task)
        ours.advance("shard", "tensor", 1)
        pytest.fail("went on")

    with pytest.raises(kind, match="from a task"):
        ours.map(work, range(10**6))
    assert len(done) <= 3


@pytest.mark.usefixtures("four")
def test_progress_is_not_called_again_once_it_has_raised():
    calls = []

    def progress(step):
        calls.append(step)
        if len(calls) == 20:
            raise ValueError("enough")

    ours = pool(progress=progress)
    with pytest.raises(ValueError, match="enough"):
        ours.map(lambda _: ours.advance("shard", "tensor", 3), range(1000))
    assert len(calls) == 20
    assert [step.done for step in calls] == [3 * i for i in range(1, 21)]


def interrupt():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.fixture
def sigint():
    if not hasattr(signal, "pthread_kill"):
        pytest.skip("needs signals to threads")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("four", "sigint")
def test_after_an_interrupt_nothing_runs():
    ours, done = pool(), []

    def work(task):
        if task == 20:
            interrupt()
        time.sleep(0.001)
        ours.advance("shard", "tensor", 1)
        done.append(task)

    with pytest.raises(KeyboardInterrupt):
        ours.map(work, range(10**6))
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count < 10**6


@pytest.mark.usefixtures("four", "sigint")
def test_an_interrupt_waits_for_stuck_workers_only_so_long(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.2)
    release = threading.Event()

    def work(task):
        if task == 0:
            time.sleep(0.1)  # until the caller waits
            interrupt()
        release.wait(timeout=60)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool(2).map(work, range(2))
    assert time.monotonic() - begin < 10
    release.set()


@pytest.mark.usefixtures("four", "sigint")
def test_a_second_interrupt_does_not_wait(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 600)
    release = threading.Event()

    def work(task):
        for _ in range(2 if task == 0 else 0):
            time.sleep(0.3)
            interrupt()
        release.wait(timeout=60)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool(2).map(work, range(2))
    assert time.monotonic() - begin < 30
    release.set()


@pytest.mark.usefixtures("four")
def test_an_interrupt_while_threads_are_started(monkeypatch):
    begun, done = threading.Event(), []
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def interrupted(executor, call):
        submit(executor, call)
        assert begun.wait(timeout=10)
        raise KeyboardInterrupt

    def work(task):
        begun.set()
        time.sleep(0.001)
        done.append(task)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        pool().map(work, range(10**6))
    time.sleep(0.2)
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count < 10**6
    assert threading.active_count() <= before


@pytest.mark.usefixtures("four")
def test_where_no_thread_can_start_the_caller_works(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert pool().map(lambda task: (task, threading.get_ident()), range(5)) == [
        (task, threading.get_ident()) for task in range(5)
    ]


def test_while_the_interpreter_is_shutting_down():
    code = """
    import atexit, os
    os.environ["MXFP4NP_NUM_THREADS"] = "4"
    from mxfp4np.rewrite.workers import Workers

    run = lambda: print(Workers(4, 9, lambda _: None).map(abs, [-1, -2, -3]))
    atexit.register(run)
    run()
    """
    assert run_python(code) == 2 * "[1, 2, 3]\n"


@needs_fork
def test_in_a_forked_child_while_the_parent_works():
    code = """
    import os, warnings
    os.environ["MXFP4NP_NUM_THREADS"] = "4"
    from mxfp4np.rewrite.workers import Workers
    warnings.simplefilter("ignore", DeprecationWarning)

    def work(task):
        child = os.fork()
        if not child:
            found = Workers(2, 9, lambda _: None).map(abs, [-1, -2, -3])
            os._exit(0 if found == [1, 2, 3] else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    print(Workers(4, 9, lambda _: None).map(work, range(8)))
    """
    assert run_python(code) == f"{[0] * 8}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize("moment", range(8))
def test_ctrl_c_at_any_moment_ends_the_process(tmp_path, moment):
    code = """
    import os, signal, sys, threading, time
    import numpy as np, mxfp4np
    from mxfp4np.cli import main

    os.environ["MXFP4NP_NUM_THREADS"] = "8"
    source, target, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rng = np.random.default_rng(0)
    mxfp4np.save_file(
        {f"w{i}": mxfp4np.MXFP4Array(rng.integers(0, 256, (64, 8, 16), "u1"), np.full((64, 8), 120, "u1"))
         for i in range(60)}, source)

    mxfp4np.load_file(source)  # everything is compiled

    def interrupt():
        while not os.path.exists(target + "/.mxfp4np.json"):
            time.sleep(0.0001)
        time.sleep(0.005 * moment)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        if main(["convert", source, target, "--max-shard-size", "1", "--threads", "8", "--verify", "--quiet"]) == 0:
            time.sleep(10)  # it was done before
    except KeyboardInterrupt:
        pass
    while any(thread.name.startswith("mxfp4np-rewrite") for thread in threading.enumerate()):
        time.sleep(0.01)
    assert not [name for name in os.listdir(target) if name.endswith(".tmp")]
    """
    run_python(code, tmp_path / "model.safetensors", tmp_path / "out", moment, timeout=60)
