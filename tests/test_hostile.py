"""Files of strangers: thousands of hostile ones, read in every way; see `hostile` for what must hold.

``MXFP4NP_HOSTILE_CASES`` is their number, ``MXFP4NP_HOSTILE_FIRST`` the first seed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

CASES = int(os.environ.get("MXFP4NP_HOSTILE_CASES", "2000"))
FIRST = int(os.environ.get("MXFP4NP_HOSTILE_FIRST", "0"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux")
@pytest.mark.parametrize("part", [0, 1])
def test_hostile_files(part):
    begin, end = (FIRST + CASES * i // 2 for i in (part, part + 1))
    command = [sys.executable, Path(__file__).with_name("hostile.py"), str(begin), str(end - begin)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0), found.stdout + found.stderr
