"""Decoding and encoding touch no byte outside their arrays, on every instruction set that this machine runs.

``MXFP4NP_TEST_GUARDED`` sets how many cases there are for all of them together.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from test_cpu import FORMS, check_processor_has

CASES = int(os.environ.get("MXFP4NP_TEST_GUARDED", "20000"))

pytestmark = [
    pytest.mark.guard,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect"),
]


def run(*arguments, **variables):
    command = [sys.executable, str(Path(__file__).with_name("guard.py")), *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_touched_outside_of_arrays(form):
    variables, needed, expected = FORMS[form]
    check_processor_has(needed)
    cases = CASES // len(FORMS)
    result = run(cases, random.randrange(10**9), **variables)
    assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-20:])
    done, instruction_set = result.stdout.split()
    assert int(done) == cases
    assert expected in (None, instruction_set)


def test_a_byte_behind_the_last_one_ends_the_process():
    assert run("behind").returncode == -signal.SIGSEGV
