"""Forks at random moments of a process whose threads decode, encode and compile: every child decodes.

``MXFP4NP_TEST_FORKS`` sets how many forks there are.
"""

import os
import random
import subprocess
import sys

import pytest
from commands import environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

FORKS = int(os.environ.get("MXFP4NP_TEST_FORKS", "60"))

SCRIPT = """
import faulthandler, os, random, sys, threading, time
import numpy as np, mxfp4np
from mxfp4np.backends.cpu import compiler, launch

what, forks, rng = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
launch.ALONE_BLOCKS, launch.THREAD_BLOCKS, launch.CHUNK_BLOCKS = 64, 16, (7, 500)  # small tasks use the pool too
numbers = np.random.default_rng(0)
blocks, scales = numbers.integers(0, 256, (128, 20, 16), np.uint8), numbers.integers(110, 130, (128, 20), np.uint8)
cases = [(dtype, turn) for dtype in ("bfloat16", "float16", "float32") for turn in (False, True)]
expected = {case: mxfp4np.decode(blocks, scales, case[0], transpose=case[1], backend="numpy") for case in cases}
x = expected["float32", False]
packed = mxfp4np.encode(x, backend="numpy")
wrong, over = [], threading.Event()

def check(rng):
    case, threads = rng.choice(cases), rng.randint(1, 3)
    found = mxfp4np.decode(blocks, scales, case[0], transpose=case[1], num_threads=threads)
    again = mxfp4np.encode(x, num_threads=threads)
    if found.tobytes() != expected[case].tobytes() or again.blocks.tobytes() != packed.blocks.tobytes():
        wrong.append(case)

def work(seed):
    rng = random.Random(seed)
    while not over.is_set():
        check(rng)

def compile_again():
    import numba
    for count in range(10**9):
        if over.is_set():
            break
        for key in [key for key in list(compiler._built) if key[0] in ("decode", "encode")]:
            compiler.build_once(("again", count, *key), lambda: compiler._compile_kernel(*key))
        compiler.build_once(("table", count), lambda: launch.encode_table("float16", "even"))
        compiler.build_once(("function", count), lambda: numba.njit(lambda value: value + count)(1))

def watched(work, *arguments):
    try:
        work(*arguments)
    except BaseException as error:
        wrong.append(repr(error))

if what == "later":
    for case in cases:
        mxfp4np.decode(blocks, scales, case[0], transpose=case[1], num_threads=2)
threads = [threading.Thread(target=watched, args=[work, seed]) for seed in range(3)]
threads.append(threading.Thread(target=watched, args=[compile_again]))
for thread in threads:
    thread.start()
for _ in range(forks):
    time.sleep(rng.random() * rng.choice((0.02, 0.002)))
    seed = rng.random()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True)  # ends a child that hangs
        own = random.Random(seed)
        check(own)
        if own.random() < 0.1:
            grandchild = os.fork()
            if grandchild == 0:
                check(own)
                os._exit(len(wrong))
            if os.waitpid(grandchild, 0)[1]:
                wrong.append("grandchild")
        os._exit(len(wrong))
    status = os.waitpid(child, 0)[1]
    if status:
        wrong.append(f"child: {status}")
over.set()
for thread in threads:
    thread.join()
print(wrong)
"""


def forks(what, count):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, what, str(count), str(random.randrange(10**9))]
    variables = environment(MXFP4NP_NUM_THREADS="3")
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=3600, check=False)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_children_forked_while_threads_compile_and_decode_are_right():
    forks("later", FORKS * 2 // 3)


def test_children_forked_during_the_first_decodes_are_right():
    """Several processes, each of which imports and compiles while it forks."""
    for _ in range(max(1, FORKS // 60)):
        forks("first", 20)
