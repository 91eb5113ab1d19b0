"""The command that measures: what it prints and refuses, never how fast anything was."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from contract import run_python

import mxfp4np
from mxfp4np.backends.cpu import driver as cpu
from mxfp4np.backends.memory import aligned_empty
from mxfp4np.cli import bench, timing
from mxfp4np.format import DTYPES, decoded_dtype

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir() if list(path.glob("*.safetensors")))
REUSED, NEW = ["stream", "memset"], ["allocate and fill"]


@pytest.fixture
def command(command):
    """Return a function that runs the command with little data and returns its status, stdout and stderr."""
    return partial(command, "bench", "--size", "18kB")


@pytest.fixture
def figures(command):
    """Return a function that runs the command and returns its JSON."""

    def run(*arguments):
        status, out, err = command("--json", *arguments)
        assert (status, err) == (0, "")
        return json.loads(out)

    return run


def whats(found, dtype):
    return [row["what"] for row in found["rows"] if row["dtype"] == dtype]


def test_each_dtype_has_its_rows_and_limits(figures):
    found = figures()
    assert list(dict.fromkeys(row["dtype"] for row in found["rows"])) == list(DTYPES)
    for dtype in DTYPES:
        assert whats(found, dtype) == ["decode", *REUSED, "decode, new output", *NEW]
    for row in found["rows"]:
        assert 3 <= row["rounds"] <= bench.ROUNDS
        assert 0 < row["lowest"] <= row["gb_per_second"] <= row["highest"]
        itemsize = decoded_dtype(row["dtype"]).itemsize
        assert math.isclose(row["gvalues_per_second"] * itemsize, row["gb_per_second"])
        if row["what"].startswith("decode"):
            assert row["limit_of"] is row["reached"] is None
        else:
            assert row["limit_of"] == ("decode" if row["what"] in REUSED else "decode, new output")
            assert row["reached"] > 0
    kinds = ["multiply", "read", "multiply, int16", "read"]
    assert [row["what"] for row in found["products"]] == kinds
    assert [row["limit_of"] for row in found["products"]] == [None, kinds[0], None, kinds[2]]
    for row in found["products"]:
        assert 0 < row["lowest"] <= row["gb_per_second"] <= row["highest"]
        assert math.isclose(row["gvalues_per_second"] * 17 / 32, row["gb_per_second"])
    assert found["values"] == 3 * 2880
    assert found["tensors"] == []
    assert found["machine"]["versions"]["mxfp4np"] == mxfp4np.__version__
    assert found["machine"]["cpus"] >= 1


def test_dtype_and_threads(figures):
    found = figures("--dtype", "float16", "--threads", 1)
    assert {row["dtype"] for row in found["rows"]} == {"float16"}
    assert found["threads"] == 1


def test_the_page_for_a_person(command):
    status, out, err = command("--threads", 2)
    assert (status, err) == (0, "")
    head, what, blank, columns, *table, _, _, _, _ = out.splitlines()
    assert f"mxfp4np {mxfp4np.__version__}" in head
    assert "random data in memory" in what
    assert "2 threads" in what
    assert not blank
    assert columns.split() == ["OUTPUT", "RUN", "GB/S", "SPREAD", "G", "VALUES/S", "REACHED"]
    assert len(table) == 5 * len(DTYPES) + 4
    assert all(line.endswith("%") == ("limit:" in line) for line in table)
    assert all(len(line) <= 120 for line in out.splitlines())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_tensors_of_a_checkpoint_of_any_layout(name, figures):
    checkpoint = mxfp4np.Checkpoint(DATA / name)
    found = figures(DATA / name, "--size", "1GB", "--dtype", "float32")
    assert whats(found, "float32") == ["decode, from the file", *REUSED, "decode, new output", *NEW]
    infos = [info for info in map(checkpoint.info, checkpoint) if info.format == "MXFP4"]
    sizes = {info.name: math.prod(info.shape) for info in infos}
    assert sorted(found["tensors"]) == sorted(sizes)
    assert found["values"] == sum(sizes.values())


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint with packed tensors of 32, 64 and 96 rows of 64 values, and a plain one."""
    tensors = {f"w{n}": mxfp4np.MXFP4Array(np.zeros((n, 2, 16), "u1"), np.zeros((n, 2), "u1")) for n in (32, 64, 96)}
    mxfp4np.save_file({**tensors, "bias": np.zeros(9000, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_the_largest_tensors_that_fit_are_taken(figures, command, folder):
    assert figures(folder, "--size", "17kB")["tensors"] == ["w96", "w32"]
    assert figures(folder, "--size", "9kB")["tensors"] == ["w64"]
    found = figures(folder, "--size", "2kB")
    assert (found["tensors"], found["values"]) == (["w96"], 15 * 64)
    assert figures(folder, "--size", "1B")["values"] == 32
    _, out, _ = command(folder, "--size", "1GB")
    assert "3 of 3 packed tensors" in out
    assert "less than the 1 GB asked for" in out


def test_free_memory_bounds_the_size(figures, command, folder, monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda: 1_000_000)
    size = 2 * figures("--size", "1GB")["values"]
    assert 100_000 < size < 500_000
    assert "less than the 1 GB asked for" in command("--size", "1GB")[1]
    monkeypatch.setattr(bench, "available_memory", lambda: 90_000)
    assert figures(folder, "--size", "1GB")["tensors"] == ["w64"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\n"}, 7 * 1024),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, math.inf),
        ({"sys/fs/cgroup/memory.max": "50\n", "sys/fs/cgroup/memory.current": "8\n"}, 42),
        ({"sys/fs/cgroup/memory.max": "5\n", "sys/fs/cgroup/memory.current": "8\n"}, 0),
    ],
)
def test_available_memory(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert timing.available_memory(str(tmp_path)) == expected


def test_refusals_are_one_line(command, tmp_path):
    mxfp4np.save_file({"bias": np.zeros(3, np.float32)}, tmp_path / "plain.safetensors")
    for arguments, message in (
        ([tmp_path / "plain.safetensors"], "no MXFP4 tensor"),
        ([tmp_path / "missing"], "missing"),
        (["--dtype", "float64"], "float64"),
        (["--threads", "0"], "'0' is not a positive number"),
        (["--threads", "two"], "'two' is not a positive number"),
        (["--size", "big"], "'big' is not a size"),
        ([DATA / "gpt_oss_hf", "--layout", "nonsense"], "layout must be one of"),
    ):
        status, out, err = command(*arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_without_a_compiler_there_is_no_limit():
    script = """
    import os
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    from mxfp4np.cli import main
    assert main(["bench", "--size", "1kB"]) == 2
    """
    assert run_python(script) == ""


def test_in_turn_makes_as_many_rounds_as_the_budget_allows():
    calls = []
    runs = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert [len(seconds) for seconds in timing.in_turn(runs, 5)] == [5, 5]
    assert calls == ["a", "b"] * 6
    assert [len(seconds) for seconds in timing.in_turn(runs, 5, budget=0)] == [3, 3]
    assert [len(seconds) for seconds in timing.in_turn(runs, 2, budget=0)] == [2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limit_writes_all_of_the_output_and_nothing_else(dtype):
    shape = (7, 3, 5)
    blocks, scales = np.full((*shape, 16), 0x11, np.uint8), np.full(shape, 0x22, np.uint8)
    out = aligned_empty((8, 3, 160), decoded_dtype(dtype))
    memory = out.view(np.uint8)
    memory[...] = 0x55
    cpu.stream(blocks, scales, out[:7])
    assert set(np.unique(memory[:7])) == {0x11, 0x22}
    assert np.all(memory[7] == 0x55)


def test_the_limit_refuses_gaps():
    blocks, scales = np.zeros((4, 3, 16), np.uint8), np.zeros((4, 3), np.uint8)
    with pytest.raises(ValueError, match="without gaps"):
        cpu.stream(blocks[:, :2], scales[:, :2], aligned_empty((4, 64), np.dtype("f4")))


def test_the_limit_takes_blocks_that_lie_apart():
    memory = np.full((60, 17), 0x11, np.uint8)
    out = aligned_empty((60 * 32,), np.dtype(np.float32))
    cpu.stream(memory[:, 1:], memory[:, 0], out)
    assert set(np.unique(out.view(np.uint8))) == {0x11}
