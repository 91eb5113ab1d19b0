"""Files mapped and read: both give the same arrays, and both notice files that change while they are open."""

import itertools
import mmap
import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same, both_io, entry, error_of, save_raw, write_raw

import mxfp4np
from mxfp4np import CheckpointError, MXFP4Array
from mxfp4np.storage import safetensors, tensorfile

# io="pread" gives what io="mmap" gives


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file of plain tensors of several widths and ranks, and of packed pairs."""
    rng = np.random.default_rng(1)
    tensors = {
        "f32": rng.standard_normal((6, 7, 8)).astype("float32"),
        "bf16": rng.standard_normal((5, 9)).astype(ml_dtypes.bfloat16),
        "i64": rng.integers(-(2**40), 2**40, 17),
        "u8": rng.integers(0, 256, (3, 1, 4, 5), np.uint8),
        "scalar": np.array(2.5),
        "pair": MXFP4Array(
            rng.integers(0, 256, (4, 6, 3, 16), np.uint8), rng.integers(118, 126, (4, 6, 3), dtype=np.uint8)
        ),
        "row": MXFP4Array(rng.integers(0, 256, (5, 16), np.uint8), rng.integers(118, 126, 5, dtype=np.uint8)),
    }
    path = tmp_path_factory.mktemp("mixed") / "mixed.safetensors"
    mxfp4np.save_file(tensors, path, {"made": "here"})
    return path, tensors


@pytest.fixture
def pair_of_modes(mixed):
    with mxfp4np.Checkpoint(mixed[0]) as mapped, mxfp4np.Checkpoint(mixed[0], io="pread") as read:
        yield mapped, read


def test_pread_plain_tensors(pair_of_modes, mixed):
    mapped, read = pair_of_modes
    assert list(mapped) == list(read)
    for name, array in mixed[1].items():
        if isinstance(array, np.ndarray):
            assert_same(mapped[name], array)
            assert_same(read[name], array)
            assert_same(read.stored[name], array)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("f32", np.s_[2]),
        ("f32", np.s_[-1, 3, 5]),
        ("f32", np.s_[1:4, 2:5, 3:6]),
        ("f32", np.s_[::2, 1::3, ::4]),
        ("f32", np.s_[::-1]),
        ("f32", np.s_[::-2, ::-1, ::-3]),
        ("f32", np.s_[:, :, ::-1]),
        ("f32", np.s_[..., 0]),
        ("f32", np.s_[:, 0]),
        ("f32", np.s_[3:3]),
        ("f32", np.s_[None, 2, :, None]),
        ("f32", ()),
        ("f32", ...),
        ("f32", [0, 2, 2, 5]),
        ("f32", np.s_[[0, -1], :, ::2]),
        ("f32", np.s_[[0, 1], [2, 3], [4, 5]]),
        ("f32", np.arange(6) % 2 == 0),
        ("f32", np.s_[:, np.array([[0, 1], [2, 3]])]),
        ("bf16", np.s_[1:4, ::2]),
        ("bf16", np.s_[4, 8]),
        ("bf16", np.s_[[3, 1]]),
        ("i64", np.s_[::-3]),
        ("i64", 3),
        ("i64", np.s_[2:-2]),
        ("i64", [1, 1]),
        ("u8", np.s_[:, 0, ::2, 1:4]),
        ("u8", np.s_[::2, ::-1]),
        ("scalar", ()),
        ("scalar", ...),
        ("scalar", None),
        ("scalar", np.s_[None]),
    ],
    ids=str,
)
def test_pread_index_of_plain_tensor(pair_of_modes, mixed, name, index):
    mapped, read = pair_of_modes
    expected = mixed[1][name] if index is None else mixed[1][name][index]
    for ckpt in (mapped, read):
        array = ckpt.get(name, index=index)
        assert isinstance(array, np.ndarray) == isinstance(expected, np.ndarray)
        assert_same(array, expected)
        if array.dtype.itemsize >= 4:
            assert_same(ckpt.get(name, index=index, dtype="float32"), expected.astype("float32"))


@pytest.mark.parametrize(
    ("name", "index"), [("f32", 6), ("f32", np.s_[0, 0, 0, 0]), ("i64", [17]), ("scalar", 0)], ids=str
)
def test_index_out_of_range_of_plain_tensor(pair_of_modes, name, index):
    for ckpt in pair_of_modes:
        with pytest.raises(IndexError):
            ckpt.get(name, index=index)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("pair", None),
        ("pair", np.s_[2]),
        ("pair", np.s_[-1, 3]),
        ("pair", np.s_[:, 0::2]),
        ("pair", np.s_[::-1, ::-2]),
        ("pair", np.s_[1:3, 4, 5:70]),
        ("pair", np.s_[..., 33:34]),
        ("pair", np.s_[..., 32:64]),
        ("pair", np.s_[2:2]),
        ("pair", np.s_[..., 40:40]),
        ("row", np.s_[7:150]),
        ("row", np.s_[:]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pread_packed_pair(pair_of_modes, mixed, name, index, dtype):
    mapped, read = pair_of_modes
    whole = mixed[1][name].decode(dtype)
    expected = whole if index is None else whole[index]
    for ckpt in (mapped, read):
        assert_same(ckpt.get(name, index=index, dtype=dtype), expected)
        packed = ckpt.packed(name)
        assert_same((packed if index is None else packed[index]).decode(dtype), expected)
    assert_same(read.packed(name).blocks, mixed[1][name].blocks)
    assert_same(read.packed(name).scales, mixed[1][name].scales)


def test_pread_chunks(pair_of_modes):
    mapped, read = pair_of_modes
    for name in mapped:
        pieces = list(zip(mapped.chunks(name, 128), read.chunks(name, 128), strict=True))
        assert pieces
        for (at, left), (at_read, right) in pieces:
            assert at == at_read
            assert_same(left, right)


def test_pread_without_preadv(mixed, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    with mxfp4np.Checkpoint(mixed[0], io="pread") as ckpt:
        for name, tensor in mixed[1].items():
            assert_same(ckpt[name], tensor.decode() if isinstance(tensor, MXFP4Array) else tensor)
        assert_same(ckpt.get("f32", index=np.s_[::-2, 1]), mixed[1]["f32"][::-2, 1])
        whole = mixed[1]["pair"].decode("float32")
        assert_same(ckpt.get("pair", index=np.s_[1, ::2, 5:70], dtype="float32"), whole[1, ::2, 5:70])


def test_pread_where_maps_have_no_flags(mixed, monkeypatch):
    monkeypatch.delattr(mmap, "MAP_PRIVATE", raising=False)
    monkeypatch.delattr(mmap, "MAP_ANONYMOUS", raising=False)
    with mxfp4np.Checkpoint(mixed[0], io="pread") as ckpt:
        for name, tensor in mixed[1].items():
            assert_same(ckpt[name], tensor.decode() if isinstance(tensor, MXFP4Array) else tensor)


@both_io
def test_complex_values_do_not_become_real_ones(tmp_path, io):
    mxfp4np.save_file({"c": np.full(2, 1 + 2j, np.complex64)}, tmp_path / "x.safetensors")
    with mxfp4np.Checkpoint(tmp_path / "x.safetensors", io=io) as ckpt:
        for arguments in ({"dtype": "float32"}, {"out": np.zeros(2, np.float32)}):
            with pytest.raises(ValueError, match="complex values cannot become float32"):
                ckpt.get("c", **arguments)
        assert ckpt.get("c", out=np.zeros(2, np.complex128)).tolist() == [1 + 2j] * 2


def test_pread_without_preadv_from_many_threads(mixed, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    wrong = []
    with mxfp4np.Checkpoint(mixed[0], io="pread") as ckpt:

        def look():
            looked = itertools.islice(itertools.cycle(range(6)), 200)
            wrong.extend(i for i in looked if not np.array_equal(ckpt.get("f32", index=i), mixed[1]["f32"][i]))

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_pread_arrays_belong_to_the_caller_and_are_aligned(mixed):
    with mxfp4np.Checkpoint(mixed[0], io="pread") as ckpt:
        arrays = [ckpt["f32"], ckpt["bf16"], ckpt["pair"], ckpt.packed("pair").blocks, ckpt.packed("pair").scales]
    assert all(array.ctypes.data % 64 == 0 and array.flags.c_contiguous for array in arrays)


@both_io
def test_index_into_a_tensor_larger_than_memory(tmp_path, io):
    """Neither a map nor what stands in for one may need memory for the whole tensor."""
    size = 1 << 42
    path = write_raw(tmp_path / "x.safetensors", {"x": entry("U8", [size >> 20, 1 << 20], 0, size)})
    begin = path.stat().st_size
    try:
        os.truncate(path, begin + size)
    except OSError as error:
        pytest.skip(f"no sparse files of 4 TiB here: {error}")
    with path.open("r+b") as file:
        file.seek(begin + size - 3)
        file.write(b"abc")
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert bytes(ckpt.get("x", index=np.s_[-1, -4:])) == b"\x00abc"


# Files that change while they are open


@pytest.mark.parametrize("cut", [1, 100_000, None], ids=["one byte", "much", "all"])
@pytest.mark.parametrize("read_before", [False, True])
def test_pread_of_a_truncated_file(tmp_path, read_before, cut):
    rng = np.random.default_rng(2)
    packed = MXFP4Array(rng.integers(0, 256, (64, 128, 16), np.uint8), np.full((64, 128), 127, np.uint8))
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"plain": np.ones(1000, np.float32), "pair": packed}, path)
    with mxfp4np.Checkpoint(path, io="pread") as ckpt:
        last = list(ckpt)[-1]  # at the end of the file
        if read_before:
            ckpt["pair"], ckpt["plain"]
        os.truncate(path, 0 if cut is None else path.stat().st_size - cut)
        for call in (lambda: ckpt[last], lambda: ckpt.packed(last), lambda: list(ckpt.chunks(last, 4096))):
            error = error_of(call)
            assert isinstance(error, CheckpointError), repr(error)
            assert str(path) in str(error)
        if read_before:
            assert "tensor 'pair." in str(error)


def test_mmap_of_a_file_truncated_before_it_was_mapped(tmp_path):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"x": np.ones(100_000, np.float32)}, path)
    with mxfp4np.Checkpoint(path) as ckpt:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            ckpt["x"]


@both_io
@pytest.mark.parametrize("same_size", [False, True])
def test_file_replaced_after_opening_is_refused(tmp_path, same_size, io):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"x": np.ones(10, np.float32)}, path)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        new = {"y": np.ones(10, np.int32)} if same_size else {"x": np.ones(11, np.float32)}
        mxfp4np.save_file(new, path)
        with pytest.raises(CheckpointError, match=r"x\.safetensors.*open it again"):
            ckpt["x"]


@both_io
def test_file_replaced_after_it_was_read_stays_the_old_one(tmp_path, io):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"x": np.ones(10, np.float32)}, path)
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert ckpt["x"].sum() == 10
        mxfp4np.save_file({"x": np.zeros(10, np.float32)}, path)
        assert ckpt["x"].sum() == 10


@both_io
def test_file_removed_after_opening(tmp_path, io):
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"x": np.ones(10, np.float32)}, path)
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
            ckpt["x"]


@both_io
@pytest.mark.parametrize("read_before", [False, True])
def test_closed_checkpoint(mixed, io, read_before):
    ckpt = mxfp4np.Checkpoint(mixed[0], io=io)
    chunks = ckpt.chunks("pair", 1024)
    if read_before:
        next(chunks)
        ckpt["f32"]
    ckpt.close()
    ckpt.close()
    for call in (
        lambda: ckpt["f32"],
        lambda: ckpt["pair"],
        lambda: ckpt.packed("pair"),
        lambda: ckpt.stored["f32"],
        lambda: list(ckpt.chunks("f32")),
    ):
        with pytest.raises(CheckpointError, match=r"mixed\.safetensors.*closed"):
            call()
    assert "pair" in ckpt
    assert ckpt.info("pair").shape == (4, 6, 96)
    if io == "pread":
        with pytest.raises(CheckpointError, match="closed"):
            list(chunks)


@both_io
def test_files_do_not_stay_open(tmp_path, io):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc/self/fd")
    path = tmp_path / "x.safetensors"
    mxfp4np.save_file({"x": np.ones(10, np.float32)}, path)
    bad = write_raw(tmp_path / "bad.safetensors", {"x": entry("U8", [4], 0, 4)})

    def held():
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(str(link.readlink()).startswith(str(tmp_path)) for link in links if link.is_symlink())

    ckpt = mxfp4np.Checkpoint(path, io=io)
    with pytest.raises(CheckpointError):
        mxfp4np.Checkpoint(bad, io=io)
    assert held() == 0
    array = ckpt["x"]
    ckpt.close()
    del array
    assert held() == 0


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv")
def test_closed_during_a_read(mixed, tmp_path, monkeypatch):
    path, tensors = mixed
    (tmp_path / "other").write_bytes(b"another file's bytes" * 100_000)
    ckpt, opened, preadv = mxfp4np.Checkpoint(path, io="pread"), [], os.preadv

    def close_then_read(descriptor, buffers, offset):
        if not opened:
            ckpt.close()
            opened.extend(os.open(tmp_path / "other", os.O_RDONLY) for _ in range(20))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", close_then_read)
    assert_same(ckpt["f32"], tensors["f32"])
    with pytest.raises(CheckpointError, match="closed"):
        _ = ckpt["f32"]
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_pread_does_not_map_the_header(mixed, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(mixed[0].read_bytes())
    parse = safetensors.safe_open

    def truncate_then_parse(parsed, **options):  # a map of the file would end the process here
        os.truncate(path, 0)
        return parse(parsed, **options)

    monkeypatch.setattr(safetensors, "safe_open", truncate_then_parse)
    with pytest.raises(CheckpointError, match="changed while it was being opened"):
        mxfp4np.Checkpoint(path, io="pread")


@pytest.mark.parametrize("index", [None, 1, np.s_[:, 1:3], np.s_[::-1]])
def test_reads_into_the_output(tmp_path, monkeypatch, index):
    """A tensor that is read needs no second copy of it in memory; what does not fit is converted as usual."""
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    with mxfp4np.Checkpoint(save_raw(tmp_path / "x.safetensors", {"a": array}), io="pread") as ckpt:
        expected, wide = array if index is None else array[index], np.empty((4, 6), np.float64)
        ckpt.get("a", out=wide)
        strided = np.empty((*expected.shape, 2), np.float32)[..., 0]
        ckpt.get("a", index=index, out=strided)
        monkeypatch.setattr(tensorfile, "aligned_empty", None)
        out = np.empty(expected.shape, np.float32)
        assert ckpt.get("a", index=index, out=out) is out
    assert np.array_equal(wide, array)
    assert np.array_equal(out, expected)
    assert np.array_equal(strided, expected)
