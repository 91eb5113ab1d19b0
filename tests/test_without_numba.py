"""Without Numba, as on small machines: `tox -e small` runs this where it is not installed; elsewhere it is hidden."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import DATA, assert_same, pair

import mxfp4np


@pytest.fixture
def path(tmp_path):
    arrays = {"w": pair(5, 6, 3), "bias": np.arange(30, dtype=np.float32).reshape(5, 6)}
    mxfp4np.save_file(arrays, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def without_numba(script):
    script = "import sys; sys.modules['numba'] = None\nimport numpy as np, warnings, mxfp4np\n" + script
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_needs_none_works_without_a_word(path):
    without_numba(f"""
warnings.simplefilter("error")
from mxfp4np.cli import main
packed = mxfp4np.MXFP4Array(np.zeros((2, 16), np.uint8), np.zeros(2, np.uint8))
with mxfp4np.Checkpoint({str(path)!r}) as ckpt:
    ckpt["bias"], ckpt.packed("w")[[0, 2]], ckpt.get("w", backend="numpy", index=[0]), ckpt.info("w")
    mxfp4np.save_file({{"again": ckpt.packed("w")}}, {str(path.with_name("again.safetensors"))!r})
    mxfp4np.encode(np.ones(32, np.float32), backend="numpy")
assert main(["inspect", {str(path)!r}, "--stats"]) == 0
assert main(["verify", {str(path)!r}]) == 0
""")


def test_the_reference_decodes_and_says_so_once(path):
    out = without_numba(f"""
from mxfp4np.backends import get_backend
with warnings.catch_warnings(record=True) as caught, mxfp4np.Checkpoint({str(path)!r}) as ckpt:
    warnings.simplefilter("always")
    for _ in range(3):
        assert (ckpt["w"] == ckpt.get("w", backend="numpy")).all()
        mxfp4np.encode(np.ones(32, np.float32)).decode("float32", num_threads=1)
    assert get_backend().name == get_backend(device="cpu").name == "numpy"
(warning,) = caught
print(warning.message)
from mxfp4np.backends.cpu.launch import instruction_set
try:
    instruction_set()
except mxfp4np.BackendUnavailableError as error:
    assert "python -m pip install numba" in str(error)
try:
    mxfp4np.decode(np.zeros((1, 16), np.uint8), np.zeros(1, np.uint8), backend="cpu")
except mxfp4np.BackendUnavailableError as error:
    print(error)
""")
    warning, error = out.splitlines()
    assert "pip install numba" in warning
    assert "backend='numpy'" in error
    assert "pip install numba" in error


def run_command(words):
    return without_numba(f"""
sys.stderr = sys.stdout
from mxfp4np.cli import main
print(main({[str(word) for word in words]!r}))
""").splitlines()


def test_every_command_works_and_warns_in_a_line(tmp_path):
    source, bf16, again = DATA / "gpt_oss_hf", tmp_path / "bf16", tmp_path / "again"
    name = "model.layers.0.mlp.experts.down_proj"
    for words, warns in (
        (["inspect", source, "--stats"], False),
        (["decode", source, name, "--dtype", "fp32", "-o", tmp_path / "down.npy"], True),
        (["convert", source, bf16, "--verify"], True),
        (["encode", bf16, again, "--include", "*experts*_proj", "--verify"], True),
        (["verify", source, bf16], False),
        (["verify", source], False),
        (["demo", "--size", "100kB", "--out", tmp_path / "demo"], True),
    ):
        *lines, status = run_command(words)
        assert status == "0", lines
        assert sum(line.startswith("mxfp4np: warning: the CPU backend needs Numba") for line in lines) == warns
        assert "UserWarning" not in "".join(lines)
    with np.load(source / "expected.npz") as golden:
        assert_same(np.load(tmp_path / "down.npy"), golden[name])


@pytest.mark.parametrize("words", [["bench", "--size", "1kB"], ["warmup"]])
def test_what_is_about_compiled_code_is_refused(words):
    *_, line, status = run_command(words)
    assert status == "2"
    assert line.startswith("mxfp4np: the CPU backend needs Numba")
