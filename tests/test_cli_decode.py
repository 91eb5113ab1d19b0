"""Writing decoded tensors: what is in the file, in which order, and how much memory it takes."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import CheckpointError
from mxfp4np.cli import decode
from mxfp4np.cli.decode import Selection

ITEMSIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1, "F8_E5M2": 1}


def header_of(path):
    """Return the entries of a safetensors file, in order, and where its data begins."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return header, end


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()


def random_packed(*shape, seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.integers(100, 150, (*shape[:-1], shape[-1] // 32), np.uint8)
    return mxfp4np.MXFP4Array(rng.integers(0, 256, (*scales.shape, 16), np.uint8), scales)


@pytest.fixture
def checkpoint(tmp_path):
    rng = np.random.default_rng(1)
    mxfp4np.save_file(
        {
            "w": random_packed(3, 5, 96),
            "v": random_packed(4, 64, seed=1),
            "empty_packed": random_packed(0, 64),
            "f64": rng.standard_normal((3, 5)),
            "f32": rng.standard_normal((3, 7, 11)).astype(np.float32),
            "bf16": rng.standard_normal((3, 3)).astype(ml_dtypes.bfloat16),
            "bytes": rng.integers(0, 256, (3, 1), np.uint8),
            "flags": np.array([True, False, True]),
            "f8": np.arange(3).astype(ml_dtypes.float8_e5m2),
            "scalar": np.float32(3),
            "empty": np.zeros((3, 0), np.float16),
        },
        tmp_path / "m.safetensors",
    )
    with mxfp4np.Checkpoint(tmp_path / "m.safetensors") as checkpoint:
        yield checkpoint


@pytest.fixture(params=[128, 1000, 32 << 20])
def piece_bytes(request, monkeypatch):
    monkeypatch.setattr(decode, "CHUNK_BYTES", request.param)
    return request.param


# Contents


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_safetensors(checkpoint, piece_bytes, tmp_path, dtype):
    path = tmp_path / "out.safetensors"
    done = []
    selection = Selection(checkpoint, list(checkpoint), dtype=dtype)
    selection.write(path, done.append)
    loaded = mxfp4np.load_file(path)
    assert loaded.keys() == set(checkpoint)
    for name in checkpoint:
        same_bits(loaded[name], checkpoint.get(name, dtype=dtype))
    _, begin = header_of(path)
    assert selection.nbytes == path.stat().st_size - begin == sum(done)
    assert max(done) <= piece_bytes


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("name", ["w", "empty_packed", "f64", "f32", "bytes", "flags", "scalar", "empty"])
def test_npy(checkpoint, piece_bytes, tmp_path, name, dtype):
    if checkpoint.info(name).layout and dtype is None:
        dtype = "float32"
    path = tmp_path / "out.npy"
    done = []
    selection = Selection(checkpoint, [name], dtype=dtype)
    selection.write(path, done.append)
    same_bits(np.load(path), checkpoint.get(name, dtype=dtype))
    assert sum(done) == selection.nbytes
    assert max(done, default=0) <= piece_bytes


@pytest.mark.parametrize("name", ["w", "bf16", "f8"])
def test_npy_of_what_numpy_cannot_name(checkpoint, tmp_path, name):
    path = tmp_path / "out.npy"
    with pytest.raises(ValueError, match=r"float32"):
        Selection(checkpoint, [name]).write(path)
    assert not path.exists()


@pytest.mark.parametrize(
    "index",
    [np.s_[1], np.s_[::-1], np.s_[1:, ::2], np.s_[:, 1:4, 7:70], np.s_[..., -40:-3], np.s_[2, 1, 31:33], np.s_[1:1]],
    ids=str,
)
@pytest.mark.parametrize("name", ["w", "f32"])
def test_index(checkpoint, piece_bytes, tmp_path, name, index):
    selection = Selection(checkpoint, [name], dtype="float32", index=index)
    for path in (tmp_path / "out.safetensors", tmp_path / "out.npy"):
        selection.write(path)
        loaded = mxfp4np.load_file(path)[name] if path.suffix == ".safetensors" else np.load(path)
        same_bits(loaded, checkpoint.get(name, dtype="float32")[index])
    assert selection.nbytes == loaded.nbytes
    assert piece_bytes


@pytest.mark.parametrize("index", [None, np.s_[1], np.s_[:, 1:4, 7:70], np.s_[2, 1]], ids=str)
@pytest.mark.parametrize(
    ("layout", "transpose", "transposed"),
    [("gpt-oss", "auto", False), ("gpt-oss-hf", "auto", True), ("gpt-oss-hf", "no", False), ("gpt-oss", "yes", True)],
)
def test_transpose_as_in_convert(piece_bytes, tmp_path, index, layout, transpose, transposed):
    """Only packed tensors, and after they are indexed."""
    packed, plain, suffix = random_packed(3, 5, 96), np.ones((3, 5, 96)), "." if layout == "gpt-oss" else "_"
    arrays = {f"w{suffix}blocks": packed.blocks, f"w{suffix}scales": packed.scales, "plain": plain}
    mxfp4np.save_file(arrays, tmp_path / "m.safetensors")
    done = []
    with mxfp4np.Checkpoint(tmp_path / "m.safetensors") as checkpoint:
        selection = Selection(checkpoint, ["w", "plain"], index=index, transpose=transpose)
        selection.write(tmp_path / "out.safetensors", done.append)
        Selection(checkpoint, ["w"], dtype="float32", index=index, transpose=transpose).write(tmp_path / "out.npy")
    loaded, values = (
        mxfp4np.load_file(tmp_path / "out.safetensors"),
        packed.decode("float32")[() if index is None else index],
    )
    expected = values.swapaxes(-1, -2) if transposed and values.ndim > 1 else values
    same_bits(loaded["w"].astype(np.float32), expected)
    same_bits(np.load(tmp_path / "out.npy"), expected)
    same_bits(loaded["plain"], plain[() if index is None else index])
    assert sum(done) == selection.nbytes
    assert max(done) <= piece_bytes


def test_index_to_a_scalar(checkpoint, tmp_path):
    path = tmp_path / "out.safetensors"
    Selection(checkpoint, ["bf16"], index=(1, 2)).write(path)
    same_bits(mxfp4np.load_file(path)["bf16"], np.asarray(checkpoint["bf16"][1, 2]))


def test_index_applies_to_each(checkpoint, tmp_path):
    path = tmp_path / "out.safetensors"
    names = ["w", "f64", "bytes", "flags"]
    Selection(checkpoint, names, index=np.s_[1:]).write(path)
    for name, array in mxfp4np.load_file(path).items():
        same_bits(array, checkpoint[name][1:])


def test_index_that_fits_only_some(checkpoint):
    with pytest.raises(IndexError):
        Selection(checkpoint, ["w", "v"], index=np.s_[0, 0, :])


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_pieces_in_order(data):
    """Whatever the shape, the part of it and the piece size, the pieces are the whole, in C order."""
    shape = data.draw(st.lists(st.integers(1, 5), max_size=2).map(lambda lead: (*lead, 32 * len(lead) + 64)))
    array = random_packed(*shape)
    begin = data.draw(st.integers(0, shape[-1]))
    index = (..., slice(begin, data.draw(st.integers(begin, shape[-1]))))
    limit = data.draw(st.integers(128, 2000))

    class Stub:
        files = ()

        def changed_files(self):
            return []

        def info(self, _):
            return mxfp4np.TensorInfo("w", array.shape, "MXFP4", "gpt-oss", ())

        def reader(self, _):
            return SimpleNamespace(array=array, load=lambda part: part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "CHUNK_BYTES", limit)
        selection = Selection(Stub(), ["w"], dtype="float32", index=index)
        pieces = list(selection._tensors["w"].chunks(lambda _: None))
    expected = array.decode("float32")[index]
    assert selection._tensors["w"].array.shape == expected.shape
    assert all(0 < piece.nbytes <= limit for piece in pieces)
    assert b"".join(piece.tobytes() for piece in pieces) == expected.tobytes()


# Layout of the file


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_widest_first_and_aligned(checkpoint, tmp_path, dtype):
    path = tmp_path / "out.safetensors"
    names = sorted(checkpoint)
    Selection(checkpoint, names, dtype=dtype).write(path)
    header, begin = header_of(path)
    assert begin % 8 == 0
    sizes = [ITEMSIZES[entry["dtype"]] for entry in header.values()]
    assert sizes == sorted(sizes, reverse=True)
    end = 0
    for entry, size in zip(header.values(), sizes, strict=True):
        start, stop = entry["data_offsets"]
        assert start == end
        assert (begin + start) % size == 0
        assert stop - start == math.prod(entry["shape"]) * size
        end = stop
    assert begin + end == path.stat().st_size


def test_order_as_asked_within_a_width(checkpoint, tmp_path):
    path = tmp_path / "out.safetensors"
    Selection(checkpoint, ["w", "f64", "bf16", "v"]).write(path)
    assert list(header_of(path)[0]) == ["f64", "w", "bf16", "v"]


def test_nbytes(checkpoint):
    assert Selection(checkpoint, ["w"]).nbytes == 3 * 5 * 96 * 2
    assert Selection(checkpoint, ["w"], dtype="float32").nbytes == 3 * 5 * 96 * 4
    assert Selection(checkpoint, ["w", "f64", "scalar"]).nbytes == 3 * 5 * 96 * 2 + 3 * 5 * 8 + 4
    assert Selection(checkpoint, ["w"], index=np.s_[0, :, :7]).nbytes == 5 * 7 * 2
    assert Selection(checkpoint, ["empty", "empty_packed"]).nbytes == 0
    assert Selection(checkpoint, []).nbytes == 0


# Refusals


def test_dtype_that_is_none(checkpoint):
    with pytest.raises(ValueError, match="float64"):
        Selection(checkpoint, ["w"], dtype="float64")


def test_unknown_name(checkpoint):
    with pytest.raises(mxfp4np.TensorNotFoundError, match="nothing"):
        Selection(checkpoint, ["nothing"])


def test_nothing_is_left_of_a_failure(checkpoint, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()

    def fail(_):
        raise RuntimeError("stop")

    for name in ("out.npy", "out.safetensors"):
        with pytest.raises(RuntimeError, match="stop"):
            Selection(checkpoint, ["f64"]).write(folder / name, fail)
    assert list(folder.iterdir()) == []


def test_own_file(checkpoint):
    (path,) = checkpoint.files
    before = path.read_bytes()
    with pytest.raises(ValueError, match="part of the checkpoint"):
        Selection(checkpoint, ["w"]).write(path)
    assert path.read_bytes() == before


# Memory

MEASURE = """
import json, re, sys, threading
from pathlib import Path
import numpy as np
import mxfp4np
from mxfp4np.cli.decode import Selection

path, name, output, dtype = sys.argv[1:]

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

with mxfp4np.Checkpoint(path) as checkpoint:
    Selection(checkpoint, [name], dtype=dtype, index=np.s_[:1]).write(Path(output))  # imports, compiles, starts threads
    selection = Selection(checkpoint, [name], dtype=dtype)
    samples, done = [anonymous()], threading.Event()

    def sample():
        while not done.wait(0.001):
            samples.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    selection.write(Path(output))
    done.set()
    thread.join()
    print(json.dumps({"written": selection.nbytes, "samples": len(samples), "extra": max(samples) - samples[0]}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to measure memory")
@pytest.mark.parametrize(
    ("name", "dtype", "suffix"),
    [
        ("w", "bfloat16", "safetensors"),
        ("w", "float32", "npy"),
        ("plain", "float16", "safetensors"),
        ("plain", "float32", "npy"),
    ],
)
def test_memory_is_bounded(tmp_path, name, dtype, suffix):
    elements = (150 << 20) // 1024 * 1024  # 315 MB in two bytes each
    sizes = {"w.blocks": elements // 2, "w.scales": elements // 32, "plain": 2 * elements}
    shapes = {
        "w.blocks": ("U8", [elements // 1024, 32, 16]),
        "w.scales": ("U8", [elements // 1024, 32]),
        "plain": ("BF16", [elements // 1024, 1024]),
    }
    header, end = {}, 0
    for key, (stored, shape) in shapes.items():
        header[key] = {"dtype": stored, "shape": shape, "data_offsets": [end, end + sizes[key]]}
        end += sizes[key]
    text = json.dumps(header).encode()
    path, output = tmp_path / "large.safetensors", tmp_path / f"out.{suffix}"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no room on disk
    arguments = [sys.executable, "-c", MEASURE, str(path), name, str(output), dtype]
    root = Path(mxfp4np.__file__).parents[1]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=root, check=False, timeout=300)
    output.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["written"] >= 300_000_000
    assert found["samples"] > 20
    assert found["extra"] < 128_000_000, f"{found['extra']:,} bytes more than before"


def test_a_source_that_is_overwritten_meanwhile(tmp_path):
    mxfp4np.save_file({"x": np.zeros(10), "y": np.zeros(10)}, tmp_path / "in.safetensors")
    with mxfp4np.Checkpoint(tmp_path / "in.safetensors") as checkpoint:
        selection = Selection(checkpoint, ["x", "y"])

        def progress(_):
            data = (tmp_path / "in.safetensors").read_bytes()
            (tmp_path / "in.safetensors").write_bytes(data[:-8] + b"12345678")

        with pytest.raises(CheckpointError, match=r"in\.safetensors: was replaced or changed while it was read"):
            selection.write(tmp_path / "out.safetensors", progress)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
