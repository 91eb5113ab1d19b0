"""Compiled kernels on disk: a second process compiles nothing, and nothing is left to compile after a warm-up."""

import json
import os

import pytest
from contract import run_python

from mxfp4np.cli import warmup

SOME = """
import json, sys
import numpy as np, mxfp4np
from mxfp4np.backends.cpu.compiler import compiled_functions

fp8 = mxfp4np.ScaledArray(np.zeros((40, 64), np.uint8), np.ones((40, 2), np.float32), "E4M3")
mxfp8 = mxfp4np.ScaledArray(np.zeros((40, 64), np.uint8), np.ones((40, 2), np.uint8), "E4M3")
mxfp4 = mxfp4np.encode(np.ones((40, 64), np.float32))
for array in (fp8, mxfp8, mxfp4):
    for part, transpose in ((array, False), (array, True), (array[:, 3:], False)):
        part.decode("float32", transpose=transpose)
mxfp4 @ np.ones(64, np.float32)
mxfp4np.decode(np.zeros((100_000, 16), np.uint8), np.zeros(100_000, np.uint8), "float32", num_threads=2)  # workers
print(json.dumps([len(compiled_functions), sum(function.is_new for function in compiled_functions)]))
"""


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    """Whatever is in the closure of a kernel must be the same in each process."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    kernels, compiled = json.loads(run_python(SOME))
    assert kernels == compiled > 9
    before = files_in(tmp_path)
    assert before
    assert json.loads(run_python(SOME)) == [kernels, 0]
    assert files_in(tmp_path) == before


READ_ONLY = """
import errno, tempfile
from numba.core.caching import IndexDataCacheFile

def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")

tempfile.TemporaryFile = IndexDataCacheFile.save = refuse
"""


def test_a_cache_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    one = "import mxfp4np, numpy as np\nmxfp4np.encode(np.ones((2, 32), np.float32))"
    run_python(one)
    before = files_in(tmp_path)
    kernels, compiled = json.loads(run_python(READ_ONLY + SOME))
    assert kernels == compiled + 1
    assert files_in(tmp_path) == before
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "nothing"))
    run_python(READ_ONLY + one)


@pytest.mark.slow
def test_after_a_warm_up_nothing_is_left_to_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    ask = "import sys; from mxfp4np.cli import main; sys.exit(main(['warmup', '--json']))"
    first = json.loads(run_python(ask, timeout=300))
    assert first["kernels"] == first["compiled"]
    assert [os.path.commonpath([folder, tmp_path]) for folder in first["folders"]] == [str(tmp_path)]
    assert json.loads(run_python(ask))["compiled"] == json.loads(run_python(SOME))[1] == 0
    (kind,) = warmup.lines(first)
    assert kind.startswith(f"{first['kernels']} kernels, {first['kernels']} of them compiled in ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [("NUMBA_DISABLE_JIT=1", "no folder keeps what Numba compiles: set NUMBA_CACHE_DIR"), ("", "needs Numba")],
)
def test_without_a_compiler_it_is_refused(monkeypatch, setting, message):
    monkeypatch.setenv(*(setting or "X=").split("="))
    code = f"""
    import sys
    if not {bool(setting)}:
        sys.modules["numba"] = None
    from mxfp4np.cli import main
    sys.stderr = sys.stdout
    print(main(["warmup"]))
    """
    line, status = run_python(code).splitlines()
    assert status == "2"
    assert line.startswith("mxfp4np: ")
    assert message in line
