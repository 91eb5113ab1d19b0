"""Written files are complete or not there, and read as what was written, by this library and by others."""

import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_same, both_io
from hypothesis import given
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import MXFP4Array
from mxfp4np.storage import safetensors as writer
from mxfp4np.storage.safetensors import SafetensorsFile, entry_size, header_bytes, write_safetensors
from mxfp4np.storage.tensorfile import DTYPES, nbytes_of


def pair(*lead, seed=3):
    rng = np.random.default_rng(seed)
    return MXFP4Array(rng.integers(0, 256, (*lead, 16), np.uint8), rng.integers(0, 256, lead, np.uint8))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("old", [None, b"what was there"])
def test_interrupted_write_leaves_nothing_behind(tmp_path, error, old):
    path = tmp_path / "x.safetensors"
    if old is not None:
        path.write_bytes(old)

    def pieces():
        yield np.ones(500_000, np.float32)
        raise error

    with pytest.raises(error):
        write_safetensors(path, {"x": ("F32", (1_000_000,))}, pieces())
    assert [file.name for file in tmp_path.iterdir()] == ([] if old is None else [path.name])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("count", [0, 3, 5])
def test_wrong_amount_of_data(tmp_path, count):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=rf"x\.safetensors.*16.*{4 * count}"):
        write_safetensors(path, {"x": ("F32", (4,))}, [np.ones(count, np.float32)])
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_chunks_may_be_cut_anywhere(tmp_path):
    path = tmp_path / "x.safetensors"
    data = np.arange(24, dtype=np.uint8)
    write_safetensors(
        path, {"a": ("F32", (4,)), "b": ("F4", (2, 8)), "c": ("U8", (0, 3))}, [data[:7], data[7:7], data[7:]]
    )
    with mxfp4np.Checkpoint(path) as ckpt:
        assert ckpt["a"].tobytes() + ckpt["b"].tobytes() == data.tobytes()
        assert ckpt["c"].shape == (0, 3)


@pytest.fixture
def awkward():
    """Arrays whose bytes do not lie as they have to be written."""
    rng = np.random.default_rng(4)
    base = rng.standard_normal((6, 5, 4)).astype("float32")
    return {
        "transposed": base.T,
        "strided": base[::2, ::-1, 1:3],
        "reversed": base[::-1],
        "fortran": np.asfortranarray(base[0]),
        "broadcast": np.broadcast_to(base[0, 0], (3, 4)),
        "big f4": base.astype(">f4"),
        "big f8": base.astype(">f8")[:, ::2],
        "big i2": np.arange(-3, 4, dtype=">i2"),
        "big c8": (base[0] + 1j).astype(">c8"),
        "bf16": base.astype(ml_dtypes.bfloat16).T,
        "e8m0": np.array([1, 2, 4], ml_dtypes.float8_e8m0fnu)[::-1],
        "bool": (base > 0)[:, 0],
        "i1": np.arange(5, dtype=np.int8),
        "scalar": np.array(7, ">u4"),
        "empty": np.zeros((0, 3), np.float64),
        "read-only": np.frombuffer(b"abc", np.uint8),
    }


@both_io
def test_awkward_arrays_are_written_right(tmp_path, awkward, io):
    mxfp4np.save_file(awkward, tmp_path / "x.safetensors", {"key": "é\n"})
    with mxfp4np.Checkpoint(tmp_path / "x.safetensors", io=io) as ckpt:
        assert set(ckpt) == set(awkward)
        assert ckpt.metadata == {"key": "é\n"}
        for name, array in awkward.items():
            assert_same(ckpt[name], np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def test_others_read_what_is_written(tmp_path, awkward):
    del awkward["e8m0"]  # which safetensors does not give to NumPy
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file(awkward, path, {"key": "value"})
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(awkward)
    for name, array in awkward.items():
        assert_same(loaded[name], np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def test_array_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("mxfp4np.files.WRITE_BYTES", 1000)
    array = np.arange(60_000, dtype=np.int32).reshape(60, 50, 20)
    mxfp4np.save_file({"x": array, "t": array.T, "b": array.astype(">i4")}, tmp_path / "x.safetensors")
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert_same(loaded["x"], array)
    assert_same(loaded["b"], array)
    assert_same(loaded["t"], np.ascontiguousarray(array.T))


@pytest.mark.parametrize("padding", range(9))
def test_data_and_all_tensors_are_aligned(tmp_path, padding, awkward):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({**awkward, "n" * padding: np.ones(3, np.uint8), "p": pair(1, 3)}, path)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0
    for tensor in SafetensorsFile(path).tensors.values():
        assert tensor.offset % max(1, DTYPES[tensor.dtype][0] // 8) == 0
    with mxfp4np.Checkpoint(path) as ckpt:
        assert all(array.flags.aligned for array in ckpt.stored.values())


@pytest.mark.parametrize(
    "dtype",
    ["object", "U3", "S3", "M8[s]", "m8[s]", "complex128", "f2,f4", ml_dtypes.float4_e2m1fn, ml_dtypes.int4],
    ids=str,
)
def test_dtype_that_the_format_lacks(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"tensor 'bad\.one'.*no dtype"):
        mxfp4np.save_file({"fine": np.ones(2), "bad.one": np.zeros(4, dtype)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", ["x.blocks", "x.scales"])
@pytest.mark.parametrize("first", [False, True])
def test_two_tensors_of_one_name(tmp_path, half, first):
    items = [("x", pair(2, 3)), (half, np.ones(3, np.uint8))]
    with pytest.raises(ValueError, match=half):
        mxfp4np.save_file(dict(items[::-1] if first else items), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_headers_have_a_limit(tmp_path, monkeypatch, streamed):
    """No reader opens a file with a larger one. A stream ends before the rest of its data is written."""
    path, seen = tmp_path / "x.safetensors", []

    def tensors(count):
        for i in range(count):
            seen.append(i)
            yield f"tensor {i}", np.ones(1)

    def save(count):
        mxfp4np.save_file(tensors(count) if streamed else dict(tensors(count)), path, {"key": "value"})

    save(10)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(writer, "HEADER_LIMIT", header + 10)
    save(10)
    before = path.read_bytes()
    seen.clear()
    with pytest.raises(ValueError, match=r"x\.safetensors: the header would have .* bytes, and the format allows"):
        save(1000)
    assert len(seen) < 50 if streamed else len(seen) == 1000
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], before)


def test_the_limit_is_that_of_the_parser(tmp_path):
    for size, allowed in ((writer.HEADER_LIMIT, True), (writer.HEADER_LIMIT + 8, False)):
        with (tmp_path / "x.safetensors").open("wb") as file:
            file.write(size.to_bytes(8, "little") + b"{}")
            file.write(b" " * (size - 2))
        if allowed:
            with safetensors.safe_open(tmp_path / "x.safetensors", framework="np") as handle:
                assert handle.keys() == []
        else:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.safe_open(tmp_path / "x.safetensors", framework="np")


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 64), max_size=8),
)
def test_size_of_an_entry(name, dtype, shape):
    spec = (dtype, (*shape, 8))
    end = 10**9 + nbytes_of(*spec)
    alone = header_bytes({name: spec}, None)[8:].rstrip()
    assert 0 <= entry_size(name, spec, end) - len(alone) <= 2 * len(str(end))


def test_reserved_name(tmp_path):
    with pytest.raises(ValueError, match="__metadata__"):
        mxfp4np.save_file({"__metadata__": np.ones(3)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {"a": {}}, {1: "a"}], ids=str)
def test_metadata_must_be_strings(tmp_path, metadata):
    with pytest.raises((TypeError, ValueError), match="metadata"):
        mxfp4np.save_file({"x": np.ones(3)}, tmp_path / "x.safetensors", metadata)
    assert list(tmp_path.iterdir()) == []


@both_io
def test_packed_arrays_round_trip(tmp_path, io):
    whole = pair(4, 6, 3)
    parts = {
        "whole": whole,
        "expert": whole[2],
        "rows": whole[:, ::2],
        "reversed": whole[::-1],
        "columns": whole[..., 32:],
        "row": whole[0, 0],
        "none": whole[:0],
    }
    mxfp4np.save_file({**parts, "bias": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    with mxfp4np.Checkpoint(tmp_path / "x.safetensors", io=io) as ckpt:
        assert set(ckpt) == {*parts, "bias"}
        assert set(ckpt.stored) == {f"{name}.{half}" for name in parts for half in ("blocks", "scales")} | {"bias"}
        for name, part in parts.items():
            packed = ckpt.packed(name)
            assert_same(packed.blocks, np.ascontiguousarray(part.blocks))
            assert_same(packed.scales, np.ascontiguousarray(part.scales))
            assert_same(ckpt.get(name, dtype="float32"), part.decode("float32"))


@pytest.mark.parametrize("room", [64, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_tensors_saved_as_they_come(tmp_path, monkeypatch, room, count):
    """Whether the header fits into the room left for it, or the data has to be moved, one way or the other."""
    monkeypatch.setattr(writer, "HEADER_ROOM", room)
    rng = np.random.default_rng(0)
    shapes = [(int(rng.integers(0, 5000)), 3) for _ in range(count)]
    arrays = {f"t{i}": rng.integers(0, 256, shape, np.uint8).astype(dtype_of(i)) for i, shape in enumerate(shapes)}
    packed = mxfp4np.MXFP4Array(np.arange(32, dtype=np.uint8).reshape(2, 16), np.array([126, 127], np.uint8))
    path = tmp_path / "m.safetensors"
    mxfp4np.save_file(iter([*arrays.items(), ("w", packed)]), path, {"made": "here"})
    theirs = safetensors.numpy.load_file(path)
    assert list(SafetensorsFile(path).tensors) == [*arrays, "w.blocks", "w.scales"] or 0 in [
        a.size for a in arrays.values()
    ]
    assert theirs.keys() == {*arrays, "w.blocks", "w.scales"}
    for name, array in arrays.items():
        assert theirs[name].dtype == array.dtype
        assert np.array_equal(theirs[name], array)
    with mxfp4np.Checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"made": "here"}
        assert np.array_equal(checkpoint["w"], packed.decode())
    assert list(tmp_path.iterdir()) == [path]


def dtype_of(i):
    return [np.uint8, np.float32, np.float16, np.int64][i % 4]


def test_data_moved_in_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "HEADER_ROOM", 64)
    array = np.arange(5 << 20, dtype=np.uint64)  # 40 MiB, of which 16 are moved at a time
    mxfp4np.save_file(iter([("x", array)]), tmp_path / "m.safetensors")
    assert np.array_equal(safetensors.numpy.load_file(tmp_path / "m.safetensors")["x"], array)


def test_tensors_saved_as_they_come_are_released(tmp_path):
    alive = weakref.WeakValueDictionary()

    def make():
        for i in range(10):
            array = np.full(1000, i)
            alive[i] = array
            yield f"t{i}", array
            del array
            assert len(alive) <= 2

    mxfp4np.save_file(make(), tmp_path / "m.safetensors")
    assert len(SafetensorsFile(tmp_path / "m.safetensors").tensors) == 10


def test_nothing_is_left_if_tensors_stop_coming(tmp_path):
    def broken():
        yield "a", np.ones(3)
        raise RuntimeError("no more")

    for tensors, error, match in (
        (broken(), RuntimeError, "no more"),
        (iter([("a", np.ones(3)), ("a", np.ones(3))]), ValueError, "two tensors would both be called 'a'"),
        (iter([("a", np.array(["text"]))]), ValueError, "tensor 'a': safetensors has no dtype for"),
    ):
        with pytest.raises(error, match=match):
            mxfp4np.save_file(tensors, tmp_path / "m.safetensors")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [np.s_[..., 1:], np.s_[..., :31], np.s_[..., 5:37], np.s_[..., 16:48]], ids=str)
def test_partial_blocks_are_not_saved(tmp_path, index):
    with pytest.raises(ValueError, match=r"tensor 'w'.*whole blocks"):
        mxfp4np.save_file({"w": pair(2, 3)[index]}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_mapped_may_be_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"x": np.arange(1000)}, path)
    with mxfp4np.Checkpoint(path) as ckpt:
        mxfp4np.save_file({"x": ckpt["x"][::-1]}, path)
        assert ckpt["x"][0] == 0
    with mxfp4np.Checkpoint(path) as ckpt:
        assert ckpt["x"][0] == 999
