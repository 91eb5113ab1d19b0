"""Fixtures and settings for all tests.

One hypothesis profile: machines here are shared, so that no single example has a deadline.
"""

import ml_dtypes
import numpy as np
import pytest
from helpers import pair, save_raw
from hypothesis import settings

from mxfp4np import cli

settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture
def command(capsys):
    """Return a function that runs a command in this process and returns its status, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse ends bad usage by itself
            status = error.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command):
    """Return a function that runs a command that must fail: nothing printed, status 2, one line, which it returns."""

    def run(*arguments):
        status, out, err = command(*arguments)
        assert (status, out) == (2, "")
        assert err.endswith("\n")
        assert err.count("\n") == 1, f"expected one line, found:\n{err}"
        assert "Traceback" not in err
        assert "\x1b" not in err
        return err.rstrip("\n")

    return run


@pytest.fixture
def shards(tmp_path):
    """Two files, a pair across them, and no index."""
    packed = pair(2, 3, 4)
    save_raw(
        tmp_path / "a.safetensors",
        {"w.blocks": packed.blocks, "one": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"format": "pt", "both": "first"},
    )
    save_raw(
        tmp_path / "b.safetensors",
        {"w.scales": packed.scales, "two": np.array([1, 2, 3], ml_dtypes.bfloat16)},
        {"other": "yes", "both": "second"},
    )
    return tmp_path
