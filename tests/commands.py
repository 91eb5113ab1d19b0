"""What the tests of the command line share: commands in a process of their own, and comparisons."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import mxfp4np


def environment(**more):
    """Return an environment in which a subprocess finds this very package from any folder."""
    path = os.pathsep.join(filter(None, [str(Path(mxfp4np.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **more}


def process(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.Popen([sys.executable, "-m", "mxfp4np", *map(str, arguments)], **options)


def finish(running):
    try:
        out, err = running.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        running.kill()
        running.communicate()
        raise
    return running.returncode, out.decode(), err.decode()


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def value_of(path, name, **options):
    with mxfp4np.Checkpoint(path) as checkpoint:
        return checkpoint.get(name, **options)
