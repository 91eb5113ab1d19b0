"""Signals at random moments: nothing hangs, nothing half written stays, and what is decoded next is right.

``MXFP4NP_TEST_MOMENTS`` sets how many moments there are, for all tests of this file together.
"""

import collections
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from commands import environment, finish, process
from helpers import pair, save_raw

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")

MOMENTS = int(os.environ.get("MXFP4NP_TEST_MOMENTS", "64"))
SECONDS = float(os.environ.get("MXFP4NP_TEST_SECONDS", "30"))
"""The longest time from the signal to the end; 2 on a machine that is calm."""

AT_ONCE = 3


@functools.cache
def rng(what):
    return random.Random(f"{what}{time.time_ns() if MOMENTS > 64 else 0}")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in ("packed", "plain"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        (folder / name / "tokenizer.json").write_text("{}")
    save_raw(folder / "packed" / "model.safetensors", {f"layers.{i}.w": pair(64, 8, seed=i) for i in range(40)})
    plain = {f"layers.{i}.weight": np.full((64, 256), 1 + i, np.float32) for i in range(40)}
    save_raw(folder / "plain" / "model.safetensors", plain)
    return folder


COMMANDS = {
    "convert": "convert packed OUT --max-shard-size 40000 --threads 8 --verify",
    "encode": "encode plain OUT --max-shard-size 10000 --threads 8 --layout mlx",
    "verify": "verify packed",
    "demo": "demo --out OUT --size 1MB",
    "decode": "decode packed layers.0.w layers.1.w -o OUT/out.safetensors",
}


def arguments(command, sources, out):
    words = COMMANDS[command].replace("OUT", str(out)).split()
    return [sources / word if word in ("packed", "plain") else word for word in words]


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """Return what a command writes that nobody disturbs, and how long it takes."""

    @functools.cache
    def run(command):
        for _ in range(2):  # the second time, everything is compiled
            out = tmp_path_factory.mktemp(command)
            begin = time.monotonic()
            assert finish(process(*arguments(command, sources, out), env=ENVIRONMENT))[0] == 0
        return contents(out), time.monotonic() - begin

    return run


@pytest.fixture(autouse=True)
def _signals_are_not_ignored():
    """What shells start in the background ignores SIGINT, and so do its children."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


ENVIRONMENT = environment(MXFP4NP_NUM_THREADS="8")


def ended(running, seconds, numbers):
    """Send signals after some seconds; return the status, the time since the last signal and the output."""
    for number in numbers:
        time.sleep(seconds)
        running.send_signal(number)
        seconds = 0
    begin = time.monotonic()
    try:
        out, err = running.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        running.kill()
        running.communicate()
        pytest.fail(f"hangs after signals {numbers}")
    return running.returncode, time.monotonic() - begin, out.decode(), err.decode()


def check_command(command, sources, whole, out, number):
    expected, seconds = whole
    moment = rng(command).uniform(0, 1.4 * seconds)
    running = process(*arguments(command, sources, out), env=ENVIRONMENT)
    status, took, _, err = ended(running, moment, [number])
    where = f"{command}, signal {number} after {moment:.4f} s: status {status}, {took:.2f} s later\n{err}"
    # Negative, or 1 with a traceback, before `main` runs and when it has returned.
    in_main = "commands.py" in err or "signals.py" in err
    of_python = status == 1 and not in_main
    assert status in (0, 128 + number, -number) or of_python, where
    assert took < SECONDS, where
    found = contents(out) if out.exists() else {}
    shards = {name for name in found if name.endswith(".safetensors")}
    assert not [name for name in found if name.endswith(".tmp")], where
    if command != "demo":
        assert all(found[name] == expected[name] for name in shards), where
    if status == 0 and command != "demo":  # whose tensors are random, but not whose names
        assert found == expected, where
    elif status == 128 + number and command in ("demo", "decode"):
        assert not found or found.keys() == expected.keys(), where
    return took, status


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_and_leaves_nothing_half_written(command, number, sources, whole, tmp_path):
    count = MOMENTS // 8 if number == "SIGINT" else MOMENTS // 64
    expected = whole(command)

    def check(i):
        out = tmp_path / str(i)
        out.mkdir()
        return check_command(command, sources, expected, out, getattr(signal, number))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = sorted(pool.map(check, range(count)))
    statuses = dict(collections.Counter(status for _, status in results))
    print(f"{command} {number}: longest {results[-1][0]:.2f} s, median {results[count // 2][0]:.2f} s, {statuses}")


FIRST = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np, mxfp4np
blocks, scales = np.full((300_000, 16), 0x22, np.uint8), np.full(300_000, 127, np.uint8)
x = np.ones((4, 320), np.float32)

def work():
    packed = mxfp4np.encode(x)
    return (mxfp4np.decode(blocks, scales, "float32", num_threads=2) == 1).all() and (packed.decode() == 1).all()

try:
    print("ready", flush=True)
    work()
    time.sleep(100)
except KeyboardInterrupt:
    pass
except RuntimeError as error:  # of Python 3.11, from an interrupt in __set_name__
    assert isinstance(error.__cause__, KeyboardInterrupt)
assert work()
print("right", flush=True)
"""


def test_the_decode_after_an_interrupted_first_one_is_right():
    def check(_):
        command = [sys.executable, "-c", FIRST]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        assert running.stdout.readline() == b"ready\n"
        moment = rng("first").choice([0.01, 0.1, 1, 2]) * rng("first").random()
        status, took, out, err = ended(running, moment, [signal.SIGINT])
        where = f"after {moment:.4f} s: status {status}, {took:.2f} s later\n{err}"
        assert (status, out) == (0, "right\n"), where
        assert took < SECONDS, where
        return took

    count = MOMENTS // 8
    with ThreadPoolExecutor(AT_ONCE) as pool:
        took = sorted(pool.map(check, range(count)))
    print(f"first decodes: {count} moments, longest {took[-1]:.2f} s, median {took[count // 2]:.2f} s")


LATER = """
import json, random, signal, sys, time
import numpy as np, mxfp4np
rng = np.random.default_rng(0)
blocks, scales = rng.integers(0, 256, (100_000, 16), np.uint8), rng.integers(110, 130, 100_000, np.uint8)
x = mxfp4np.decode(blocks, scales, "float32", backend="numpy").reshape(-1, 3200)
packed = mxfp4np.encode(x, backend="numpy")

def work():
    values = mxfp4np.decode(blocks, scales, "float32", num_threads=3).reshape(x.shape)
    again = mxfp4np.encode(x, num_threads=3)
    turned = packed.decode("float32", transpose=True, num_threads=3)
    pairs = (values, x), (again.blocks, packed.blocks), (again.scales, packed.scales), (turned.T, x)
    return all(np.array_equal(*pair) for pair in pairs)

assert work()
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
longest, random = 0, random.Random(int(sys.argv[2]))
for _ in range(int(sys.argv[1])):
    seconds = random.uniform(1e-6, random.choice((1e-4, 1e-3, 1e-2)))
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        begin = time.monotonic()
        while time.monotonic() < begin + 20:
            work()
        sys.exit("the interrupt was lost")
    except KeyboardInterrupt:
        longest = max(longest, time.monotonic() - begin - seconds)
    assert work()
print(json.dumps(longest))
"""


def test_decodes_and_encodes_after_interrupted_later_ones_are_right():
    count = MOMENTS // 4
    command = [sys.executable, "-c", LATER, str(count), str(rng("later").randrange(10**9))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) < SECONDS
    print(f"later decodes: {count} moments, longest {result.stdout}")
