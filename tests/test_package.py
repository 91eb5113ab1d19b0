"""The package as a whole: what importing costs and loads, its docstrings, and its dependencies."""

import doctest
import importlib
import inspect
import json
import pkgutil
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import mxfp4np

ROOT = Path(__file__).parent.parent
HEAVY = {"numba", "llvmlite", "cupy", "torch", "ml_dtypes", "safetensors", "tqdm", "transformers"}
MODULES = sorted(module.name for module in pkgutil.walk_packages(mxfp4np.__path__, "mxfp4np."))


def python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def loaded_by(script):
    return set(json.loads(python(f"{script}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))")))


def test_importing_loads_numpy_and_nothing_heavier():
    loaded = loaded_by("import mxfp4np")
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_opening_and_looking_load_no_compiler(tmp_path):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"w": mxfp4np.MXFP4Array(np.zeros((2, 16), np.uint8), np.zeros(2, np.uint8))}, path)
    loaded = loaded_by(f"import mxfp4np; c = mxfp4np.Checkpoint({str(path)!r}); c.info('w'); c.packed('w')[:32]")
    assert not loaded & {"numba", "llvmlite", "cupy", "torch", "ml_dtypes", "tqdm"}
    assert not loaded_by(f"import mxfp4np; mxfp4np.Checkpoint({str(path)!r}).get('w')") & {"cupy", "torch", "tqdm"}


def test_importing_costs_at_most_50_ms_over_numpy():
    script = (
        "import time; a = time.perf_counter(); import numpy; b = time.perf_counter(); import mxfp4np; "
        "c = time.perf_counter(); print(c - b)"
    )
    assert statistics.median(float(python(script)) for _ in range(5)) < 0.050


def test_public_names_are_documented_and_resolve():
    assert set(dir(mxfp4np)) == set(mxfp4np.__all__)
    for name in mxfp4np.__all__:
        assert getattr(mxfp4np, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        mxfp4np.nonsense  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    if name == "mxfp4np.__main__":
        return
    module = importlib.import_module(name)
    assert module.__doc__
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, f"{name}.{key}"
        if inspect.isclass(value):
            for member, function in vars(value).items():
                overrides = any(hasattr(base, member) for base in value.__mro__[1:]) or "backends" in name
                if not member.startswith("_") and inspect.isfunction(function) and not overrides:
                    assert function.__doc__, f"{name}.{key}.{member}"


@pytest.mark.parametrize("name", ["mxfp4np.array", "mxfp4np.checkpoint", "mxfp4np.codec", "mxfp4np.files"])
def test_public_docstrings_are_numpydoc_with_an_example(name):
    module = importlib.import_module(name)
    for key in mxfp4np.__all__:
        value = vars(module).get(key)
        if getattr(value, "__module__", None) == name:
            for section in ("Parameters", "Examples"):
                assert f"{section}\n    {'-' * len(section)}\n" in value.__doc__, f"{key}: {section}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    if name != "mxfp4np.__main__":
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0


def test_python_m_runs_the_command_line():
    command = [sys.executable, "-m", "mxfp4np", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "mxfp4np",
        mxfp4np.__version__,
    ]


def test_the_lowest_versions_tested_are_the_lowest_allowed():
    tox = (ROOT / "tox.ini").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["test"], *extras["gguf"], *extras["remote"]]:
        name, version = requirement.split(">=")
        pins = re.findall(rf"^    {re.escape(name)}==(\S+)$", tox, re.MULTILINE)
        assert any((pin + ".").startswith(version + ".") for pin in pins), requirement
