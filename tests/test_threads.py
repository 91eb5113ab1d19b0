"""Parallel decoding as a guest in other people's processes: threads, forks, pools, quotas, odd Numba settings."""

import concurrent.futures
import ctypes
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from contract import run_python

import mxfp4np
from mxfp4np.backends import threads
from mxfp4np.backends.cpu import compiler, launch, pool

BLOCKS = 300_000  # several chunks, so that the pool is used

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's mounts and permissions")


def make(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (BLOCKS, 16), np.uint8), rng.integers(118, 126, BLOCKS, np.uint8)


def digest(seed, num_threads=2):
    return hash(mxfp4np.decode(*make(seed), num_threads=num_threads).tobytes())


def is_right(seed):
    """Decode and compare with the reference; picklable, for pools."""
    pair = make(seed)
    return mxfp4np.decode(*pair, num_threads=2).tobytes() == mxfp4np.decode(*pair, backend="numpy").tobytes()


def test_eight_threads_at_once():
    expected = [digest(seed) for seed in range(8)]
    barrier = threading.Barrier(8)

    def work(seed):
        barrier.wait()
        return [digest(seed) for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[value] * 4 for value in expected]


@needs_fork
def test_threads_that_decode_first_at_once_share_one_table():
    """A table that one thread makes anew while another uses it would be freed under the latter's feet."""
    code = """
        import threading, time
        import numpy as np, mxfp4np
        from mxfp4np.backends.cpu import tables

        class Slow(tables.ReferenceBackend):
            calls = 0

            def decode(self, *args, **options):
                Slow.calls += 1
                super().decode(*args, **options)
                time.sleep(0.2)

        tables.ReferenceBackend = Slow
        pair = np.full((3, 1, 16), 0x21, np.uint8), np.full((3, 1), 127, np.uint8)
        found = []
        work = lambda: found.append(float(mxfp4np.decode(*pair).astype("f4").sum()))
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(Slow.calls, found)
    """
    assert run_python(code) == "1 [72.0, 72.0, 72.0, 72.0]\n"


@pytest.mark.parametrize(
    "method", [pytest.param("fork", marks=needs_fork), "spawn", pytest.param("forkserver", marks=needs_fork)]
)
def test_a_multiprocessing_pool_after_the_parent_decoded(method):
    assert is_right(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks with threads: the very case
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map_async(is_right, range(4)).get(timeout=120) == [True] * 4


@needs_fork
def test_a_forked_child_decodes_and_the_parent_goes_on():
    assert is_right(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if is_right(1) else 1)
    assert is_right(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_after_an_interrupt_nothing_is_decoded_any_more(monkeypatch):
    blocks, scales = make(0)
    out = np.empty(32 * BLOCKS, np.float32)
    mxfp4np.decode(blocks, scales, out=out, num_threads=2)
    own = launch.worker_pool()

    def interrupted(task):
        record = np.frombuffer((ctypes.c_char * pool.TASK.itemsize).from_address(task), pool.TASK)[0]
        while record["next"] == 0:
            time.sleep(0.0001)
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "work", interrupted)
    monkeypatch.setattr(launch, "CHUNK_BLOCKS", (1, 1))
    with pytest.raises(KeyboardInterrupt):
        mxfp4np.decode(blocks, scales, out=out, num_threads=2)
    out[:] = 7
    time.sleep(0.05)
    assert np.all(out == 7)


FIRST = """
import contextlib, os, signal, sys, threading, time
import numpy as np, mxfp4np
from mxfp4np.backends.cpu import compiler
blocks, scales = np.full((300_000, 16), 0x22, np.uint8), np.full(300_000, 127, np.uint8)

def is_right():
    return bool((mxfp4np.decode(blocks, scales, "float32", num_threads=2) == 1).all())
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.03, 0.1, 0.2, 0.4])
def test_an_interrupt_in_the_first_decode_breaks_nothing(seconds):
    """Wherever it comes: while Numba is imported, or compiles, or a table is made."""
    script = f"""
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
for i in range(3):
    with contextlib.suppress(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, {seconds})
        is_right()
signal.setitimer(signal.ITIMER_REAL, 0)
print("right" if is_right() else "wrong")
"""
    run({}, script=FIRST + script)


def test_an_import_lock_that_an_interrupted_import_has_kept_is_no_obstacle():
    script = """
import _imp
_imp.acquire_lock()  # as where an interrupt comes right behind it
print("right" if is_right() else "wrong")
"""
    run({}, script=FIRST + script)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
def test_a_signal_handler_may_decode_during_the_first_decode():
    script = """
found = []
signal.signal(signal.SIGALRM, lambda *_: found.append(is_right()))
signal.setitimer(signal.ITIMER_REAL, 0.1)
found.append(is_right())
while len(found) < 2:
    time.sleep(0.01)
print("right" if all(found) else "wrong")
"""
    run({}, script=FIRST + script)


@needs_fork
@pytest.mark.parametrize("what", ["a table", "a kernel"])
def test_a_child_that_is_forked_while_another_thread_builds_decodes(what):
    script = f"""
signal.alarm(60)
begun = threading.Event()

def slow(*arguments):
    begun.set()
    time.sleep(0.3)
    return make(*arguments)

from mxfp4np.backends.cpu import launch
if {what!r} == "a table":
    make, launch.decode_table = launch.decode_table, slow
else:
    make, compiler.compile_function = compiler.compile_function, slow
thread = threading.Thread(target=is_right)
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(not is_right())
thread.join()
print("right" if os.waitpid(child, 0)[1] == 0 else "wrong")
"""
    run({"PYTHONWARNINGS": "ignore"}, script=FIRST + script)


@needs_fork
def test_a_fork_does_not_hold_a_lock_that_the_builder_needs():
    """Handlers of forks run in reverse order of registration: logging's lock would be held while this one waits."""
    script = """
signal.alarm(60)
begun = threading.Event()

def make():
    begun.set()
    time.sleep(0.3)
    import logging
    return logging.getLogger("some other") is not None

thread = threading.Thread(target=compiler.build_once, args=("test", make))
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    os._exit(not is_right())
thread.join()
print("right" if os.waitpid(child, 0)[1] == 0 else "wrong")
"""
    run({"PYTHONWARNINGS": "ignore"}, script=FIRST + script)


@needs_fork
def test_an_interrupt_while_a_fork_waits_for_the_builder_changes_nothing():
    script = """
signal.alarm(60)
begun = threading.Event()

def make():
    begun.set()
    time.sleep(0.5)
    return 1

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
thread = threading.Thread(target=compiler.build_once, args=("test", make))
thread.start()
begun.wait()
threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
child = os.fork()
if child == 0:
    os._exit("test" not in compiler._built or not is_right())
thread.join()
print("right" if os.waitpid(child, 0)[1] == 0 else "wrong")
"""
    run({"PYTHONWARNINGS": "ignore"}, script=FIRST + script)


def test_an_error_while_building_is_raised_and_building_is_tried_again():
    def fail():
        raise OSError("no")

    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            compiler.build_once("test of an error", fail)
    assert compiler.build_once("test of an error", lambda: 5) == 5
    assert compiler.build_once("test of an error", fail) == 5
    del compiler._built["test of an error"]


def test_a_change_of_any_file_of_kernels_is_another_name_in_the_cache(tmp_path, monkeypatch):
    for source in Path(compiler.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    digests = [compiler._digest.__wrapped__()]
    for name in ("simd.py", "decode.py", "geometry.py"):
        (tmp_path / name).write_text("changed")
        digests.append(compiler._digest.__wrapped__())
    assert len(set(digests)) == 4


def test_environment_variable(monkeypatch):
    monkeypatch.setenv(threads.ENVIRONMENT_VARIABLE, "3")
    assert threads.default_num_threads() == 3
    monkeypatch.setenv(threads.ENVIRONMENT_VARIABLE, "")
    assert threads.default_num_threads() == threads.usable_cpus()
    for nonsense in ("0", "-1", "two"):
        monkeypatch.setenv(threads.ENVIRONMENT_VARIABLE, nonsense)
        with pytest.raises(ValueError, match="MXFP4NP_NUM_THREADS must be a positive integer"):
            threads.default_num_threads()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_is_respected():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert threads.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, math.inf),
    ],
)
def test_cgroup_quota(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cgroup_cpus(str(tmp_path)) == expected


def test_a_quota_below_one_cpu_still_is_one(monkeypatch):
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: 0.5)
    assert threads.usable_cpus() == 1


SCRIPT = """
import numpy as np, mxfp4np
blocks = np.arange(256 * 16, dtype=np.uint32).astype(np.uint8).reshape(256, 16)
scales = np.arange(256, dtype=np.uint8)
for dtype in ("bfloat16", "float16", "float32"):
    a, b = (mxfp4np.decode(blocks, scales, dtype, backend=backend) for backend in ("cpu", "numpy"))
    assert a.tobytes() == b.tobytes(), dtype
    a, b = (mxfp4np.encode(a, backend=backend) for backend in ("cpu", "numpy"))
    assert a.blocks.tobytes() + a.scales.tobytes() == b.blocks.tobytes() + b.scales.tobytes(), dtype
print("right")
"""


def run(environment, *, script=SCRIPT, cwd=None):
    command = [sys.executable, "-c", script]
    full = {**os.environ, **environment}
    result = subprocess.run(command, env=full, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_DISABLE_JIT": "1"},
        {"MXFP4NP_NUM_THREADS": "1"},
        {"NUMBA_CACHE_DIR": "/proc/no/such/place"},
        {"NUMBA_CACHE_DIR": "/dev/null"},
        {"HOME": "/proc/no/such/home", "XDG_CACHE_HOME": "/proc/no/such/cache"},
    ],
    ids=" ".join,
)
def test_odd_environments(environment):
    run(environment)


def test_a_broken_cache_is_no_obstacle(tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run(environment)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files, "the kernels were not cached"
    for content in (b"", b"nonsense", None):
        for path in files:
            path.write_bytes(path.read_bytes()[:-40] if content is None else content)
        run(environment)
        assert list(tmp_path.rglob("*.nbi"))


@needs_linux
def test_a_read_only_installation_without_a_home(tmp_path):
    package = Path(mxfp4np.__file__).parent
    target = tmp_path / "site" / "mxfp4np"
    target.mkdir(parents=True)
    for source in (*package.rglob("*.py"), *package.rglob("*.pyi")):
        copy = target / source.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    environment = {
        "PYTHONPATH": str(tmp_path / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "none"),
    }
    drop = """
import os, ml_dtypes, numba, numpy, mxfp4np.codec
import mxfp4np.backends.cpu.driver, mxfp4np.backends.cpu.encode, mxfp4np.backends.cpu.pool
assert "site/" in mxfp4np.__file__
if not os.getuid():  # root may write anywhere; as nobody, it may not be able to import any more
    numba.njit(lambda x: 0)(numpy.zeros(1, 'int64'))
    os.setuid(65534)
assert not os.access(os.path.dirname(mxfp4np.__file__), os.W_OK)
"""
    try:
        run(environment, script=drop + SCRIPT, cwd=tmp_path)
    finally:
        for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)


def test_decoding_while_the_interpreter_shuts_down():
    script = """
import threading, numpy as np, mxfp4np
blocks, scales = np.zeros((300_000, 16), np.uint8), np.zeros(300_000, np.uint8)
def late():
    threading.main_thread().join()
    mxfp4np.decode(blocks, scales, num_threads=2)
    print("right", flush=True)
mxfp4np.decode(blocks[:10], scales[:10])
threading.Thread(target=late).start()
"""
    run({}, script=script)
