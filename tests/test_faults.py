"""Disks that fail at any moment: every message names the file, nothing half written looks finished, runs are resumed.

By default a share of the moments is tried; with MXFP4NP_FAULTS=full, all of them, which takes minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import faults
import pytest
from commands import environment
from faults import COMMANDS, FAULTS, build, tree

from mxfp4np import cli

FULL = os.environ.get("MXFP4NP_FAULTS") == "full"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library to be loaded before libc."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.c").write_text(faults.SOURCE)
    built = subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", "faults.so", "faults.c", "-ldl"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder / "faults.so"


@pytest.mark.parametrize("command", COMMANDS)
def test_faults_at_any_moment(library, tmp_path, command):
    done = subprocess.run(
        [sys.executable, Path(faults.__file__), library, tmp_path, command, "100" if FULL else "12"],
        env=environment(LD_PRELOAD=str(library)),
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: (result["calls"], result["moments"]) for name, result in found.items()})
    assert {name: result["problems"] for name, result in found.items() if result["problems"]} == {}
    for name in FAULTS.keys() - {"read back EIO"}:
        read_only = command == "verify" and FAULTS[name].stays and name != "all short"
        assert found[name]["calls"] > 0 or read_only, f"no call was seen: {name}"


# By strace: at the system calls themselves, whatever library makes them

CALLS = ("openat", "write", "fsync", "ftruncate", "rename", "link", "unlink", "mkdir", "pread64", "preadv", "preadv2")


@pytest.fixture(scope="session")
def strace():
    """The beginning of a command line."""
    program = shutil.which("strace")
    if program is None or subprocess.run([program, "-qq", "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("needs strace, and leave to use it")
    return [program, "-f", "-qq", "-y", "-s", "1", "-e", f"trace={','.join(CALLS)}"]


def run_under(strace, root, command, *options):
    """Run a command in a process of its own, and return its exit status and what it printed."""
    arguments = [str(root / x) if x.split("/")[0] in ("in", "out") else x for x in COMMANDS[command]]
    threads = [] if command == "decode" else ["--threads=1"]
    done = subprocess.run(
        [*strace, *options, sys.executable, "-m", "mxfp4np", *arguments, *threads],
        env=environment(PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, [*arguments, *threads]


@pytest.mark.parametrize("command", ["convert", "encode", "decode"])
def test_system_calls_that_fail_or_are_the_last(strace, tmp_path, capfd, command):
    build(tmp_path, command)
    log = tmp_path / "log"
    for _ in range(2):  # kernels are compiled the first time
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
        status, printed, arguments = run_under(strace, tmp_path, command, "-o", str(log))
        assert status == 0, printed
    expected, numbers, moments = tree(tmp_path / "out"), defaultdict(int), []
    main = log.read_text().split(maxsplit=1)[0]
    for line in log.read_text().splitlines():
        if match := re.match(rf"{main} +(\w+)\((.*)", line):
            numbers[match[1]] += 1
            if str(tmp_path / "out") in match[2]:
                moments.append((match[1], numbers[match[1]]))
    assert len(moments) > 5
    assert {name for name, _ in moments} >= {"openat", "write", "fsync", "rename"}
    for i, (call, number) in enumerate(moments if FULL else moments[:: len(moments) // 3]):
        for effect in ("signal=SIGKILL", "error=EIO") if FULL else [("signal=SIGKILL", "error=EIO")[i % 2]]:
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").mkdir()
            inject = f"inject={call}:{effect}:when={number}"
            status, printed, _ = run_under(strace, tmp_path, command, "-o", str(log), "-e", inject)
            left = {name: data for name, data in tree(tmp_path / "out").items() if not name.endswith(".tmp")}
            assert left.items() <= expected.items(), inject
            if effect == "signal=SIGKILL":
                assert status not in (0, 1, 2), (inject, status, printed)
            elif status:
                assert re.fullmatch(rf"mxfp4np: {tmp_path}.*: cannot be .*", printed.strip()), (inject, printed)
            else:
                assert left == expected, inject
            again = [] if command == "decode" else ["--resume"]
            assert cli.main([*arguments, *again]) == 0, (inject, capfd.readouterr().err)
            found = tree(tmp_path / "out")
            if command == "decode":  # which knows of no other run, and leaves the files of all alone
                found = {name: data for name, data in found.items() if not name.endswith(".tmp")}
            assert found == expected, inject
