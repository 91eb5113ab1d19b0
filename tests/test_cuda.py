"""The CUDA backend: what it gives is what the CPU gives; and what it says where it cannot run.

All but the last tests need a device and are skipped without one.
"""

import gc
import itertools
import json
import re
import sys
import threading
import types
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from contract import (
    DTYPES,
    assert_same_bits,
    encode_oracle,
    every_magnitude,
    every_pair,
    indices,
    oracle,
    packed,
    run_python,
    strided,
    values,
)
from helpers import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np.backends import _get_backend, get_backend
from mxfp4np.backends.cuda import driver, kernels, staging
from mxfp4np.backends.cuda.cupy import working_cupy
from mxfp4np.cli import bench
from mxfp4np.format import RULES
from mxfp4np.scaled import ScaledArray

try:
    import cupy

    cupy.cuda.runtime.getDeviceCount()
    REASON = ""
except Exception as error:  # noqa: BLE001
    cupy, REASON = None, f"needs CuPy and an NVIDIA GPU: {error}"

gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]
ORDERS = ["pairs", "halves"]


def marked(test):
    for mark in gpu:
        test = mark(test)
    return test


def on_device(array):
    """Copy an array with its strides, gaps and misalignment; bytes may be anywhere, other elements not."""
    low, high = np.lib.array_utils.byte_bounds(array)
    begin = low % 64 // array.itemsize * array.itemsize
    memory = cupy.zeros(begin + high - low + 64, np.uint8)
    copy = cupy.ndarray(array.shape, array.dtype, memory.data + begin + array.ctypes.data - low, array.strides)
    if array.size:
        copy[...] = cupy.asarray(np.ascontiguousarray(array))
    return copy


def poisoned(shape, dtype):
    out = cupy.empty(shape, DTYPES[dtype])
    out.view(np.uint8)[...] = 0xA5
    return out


def random_pair(*shape):
    rng = np.random.default_rng(4)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(0, 256, shape, np.uint8)


@marked
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale(dtype, order):
    blocks, scales = every_pair()
    expected = oracle(blocks, scales, dtype, order)
    array = mxfp4np.MXFP4Array(cupy.asarray(blocks), cupy.asarray(scales), order)
    out = poisoned(expected.shape, dtype)
    assert array.decode(out=out) is out
    assert_same_bits(out.get(), expected)
    assert_same_bits(array[:, 1:].decode(dtype).get(), expected[:, 1:])  # one element a thread
    transposed = poisoned(expected.shape[::-1], dtype)
    array.decode(out=transposed, transpose=True)
    assert_same_bits(transposed.get().T, expected)
    host = mxfp4np.MXFP4Array(blocks, scales, order)
    assert_same_bits(host.decode(dtype, device="cuda").get(), expected)


ELEMENTS = ["E4M3", "E5M2", "E2M1"]
TILES = [(1, 16), (1, 32), (128, 128), (1, 1 << 20), (1 << 20, 1 << 20)]


def scaled(element, shape, tile, kind, seed=0):
    """Return an array of all codes, with scales of a kind."""
    rng = np.random.default_rng(seed)
    *lead, rows, columns = shape
    tile = min(tile[0], rows), min(tile[1], columns)
    nbytes = columns // 2 if element == "E2M1" else columns
    codes = rng.integers(0, 256, (*lead, rows, nbytes), np.uint8)
    places = (*lead, -(-rows // tile[0]), -(-columns // tile[1]))
    scales = rng.integers(0, 256, places, np.uint8)
    if kind == "float32":
        scales = rng.integers(0, 1 << 32, places, np.uint32).view(np.float32)
    second = np.float32(0.3) if kind == "float8_e4m3fn" else None
    scales = scales if kind in ("uint8", "float32") else scales.view(getattr(ml_dtypes, kind))
    return ScaledArray(codes, scales, element, tile, second, divide=True)


@marked
@pytest.mark.parametrize("kind", ["uint8", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_with_scales(dtype, element, tile, kind):
    for shape in ((2, 150, 256), (3, 5, 7, 96), (40, 50)):
        array = scaled(element, shape, tile, kind)
        for index in ((), np.s_[..., 1:, :], np.s_[..., 3:45], np.s_[..., ::2, 16:48]):
            part = array[index]
            expected = part.decode(dtype, backend="numpy")
            assert_same_bits(part.decode(dtype, device="cuda").get(), expected)
            assert_same_bits(part.decode(dtype, device="cuda", transpose=True).get(), expected.swapaxes(-1, -2))
        out = poisoned((*shape[:-1], shape[-1] + 8), dtype)[..., : shape[-1]]
        assert_same_bits(array.decode(out=out).get(), array.decode(dtype, backend="numpy"))


@marked
@pytest.mark.parametrize("element", ELEMENTS)
def test_elements_on_the_device(element):
    host = scaled(element, (3, 64, 128), (1, 32), "uint8")
    array = ScaledArray(cupy.asarray(host.blocks), cupy.asarray(host.scales), element)
    assert array.device == "cuda:0"
    assert_same_bits(array[1:, :, 7:].decode("float32").get(), host[1:, :, 7:].decode("float32", backend="numpy"))
    assert_same_bits(array.decode("bfloat16").get(), host.decode("bfloat16", backend="numpy"))


@marked
def test_elements_in_parts(monkeypatch):
    monkeypatch.setattr(driver, "STAGED_BYTES", 10_000)
    for element, tile in itertools.product(ELEMENTS, TILES):
        array = scaled(element, (3, 200, 256), tile, "float32")
        assert_same_bits(array.decode(device="cuda").get(), array.decode(backend="numpy"))


@marked
@given(data=st.data())
@settings(max_examples=300)
def test_any_shape_index_and_strides(data):
    blocks, scales = data.draw(packed())
    dtype, order = data.draw(st.sampled_from(sorted(DTYPES))), data.draw(st.sampled_from(ORDERS))
    expected = oracle(blocks, scales, dtype, order)
    array = mxfp4np.MXFP4Array(on_device(blocks), on_device(scales), order)
    index = data.draw(indices(expected.shape))
    expected = expected[index]
    if data.draw(st.booleans()):
        result = array[index].decode(dtype)
    else:
        out = on_device(data.draw(strided(expected.shape, DTYPES[dtype])))
        result = array[index].decode(out=out)
        assert result is out
    assert_same_bits(result.get(), expected)
    if expected.ndim > 1:
        assert_same_bits(array[index].decode(dtype, transpose=True).get(), expected.swapaxes(-1, -2))
    host = mxfp4np.MXFP4Array(blocks, scales, order)[index]
    assert_same_bits(host.decode(dtype, device="cuda").get(), expected)


@marked
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_matrices_of_many_shapes(dtype, order):
    blocks, scales = random_pair(3, 264, 7)
    expected = oracle(blocks, scales, dtype, order)
    array = mxfp4np.MXFP4Array(cupy.asarray(blocks), cupy.asarray(scales), order)
    for index in [np.s_[:, ::2], np.s_[1:, :, 32:96], np.s_[0, 8:256], np.s_[:, 3:12], np.s_[::2, ::-1], np.s_[:, :1]]:
        part = array[index]
        assert_same_bits(part.decode(dtype).get(), expected[index])
        assert_same_bits(part.decode(dtype, transpose=True).get(), expected[index].swapaxes(-1, -2))
        whole = poisoned(expected.shape, dtype)
        part.decode(out=whole[index])
        assert_same_bits(whole[index].get(), expected[index])
        before = poisoned(expected.shape, dtype).get()
        before[index] = expected[index]
        assert_same_bits(whole.get(), before)


@marked
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_around_the_output(dtype, order):
    """Not where the last of a kernel's threads have nothing to do, either."""
    for shape in [(3, 264, 7), (1, 8, 1), (7, 256, 3), (5, 40, 9)]:
        blocks, scales = random_pair(*shape)
        array = mxfp4np.MXFP4Array(cupy.asarray(blocks), cupy.asarray(scales), order)
        expected = oracle(blocks, scales, dtype, order)
        for transpose in (False, True):
            memory = poisoned((3 * expected.size,), dtype)
            before = memory.get()
            wanted = expected.swapaxes(-1, -2) if transpose else expected
            middle = slice(expected.size, 2 * expected.size)
            array.decode(out=memory[middle].reshape(wanted.shape), transpose=transpose)
            before[middle] = wanted.reshape(-1)
            assert_same_bits(memory.get(), before)


@marked
@pytest.mark.parametrize("most", [1, 100, 1 << 31])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_along_several_axes_at_once_or_in_turn(monkeypatch, dtype, most):
    monkeypatch.setattr(driver, "MAX_VECTORS", most)
    blocks, scales = random_pair(2, 3, 4, 6, 5)
    expected = oracle(blocks, scales, dtype)
    array = mxfp4np.MXFP4Array(cupy.asarray(blocks), cupy.asarray(scales))
    for index in [np.s_[1], np.s_[0, ::2], np.s_[1, :, ::2, ::3], np.s_[1, ::2, 1:, ::2], np.s_[:, ::2, ::3, ::5]]:
        whole = poisoned(expected.shape, dtype)
        array[index].decode(out=whole[index])
        before = poisoned(expected.shape, dtype).get()
        before[index] = expected[index]
        assert_same_bits(whole.get(), before)


@marked
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_beyond_32_bit_addresses(dtype):
    rows, groups = 75_000, 900 if dtype != "float32" else 450
    blocks = cupy.random.randint(0, 256, (rows, groups, 16), np.uint8)
    scales = cupy.random.randint(110, 140, (rows, groups), np.uint8)
    array = mxfp4np.MXFP4Array(blocks, scales)
    for transpose in (False, True):
        out = array.decode(dtype, transpose=transpose)
        assert out.nbytes > 1 << 32
        for i in (0, rows // 2, rows - 1):
            row = out[:, i] if transpose else out[i]
            assert_same_bits(row.get(), oracle(blocks[i].get(), scales[i].get(), dtype))
        del out
    every = array[::2].decode(dtype)
    assert_same_bits(every[-1].get(), oracle(blocks[-2].get(), scales[-2].get(), dtype))


@marked
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_the_host_in_many_pieces(monkeypatch, dtype):
    monkeypatch.setattr(driver, "STAGED_BYTES", 5000)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(staging, "MIN_COPY_BYTES", 250)
    monkeypatch.setattr(staging, "CHUNK_BYTES", 96)
    get_backend("cuda").release()  # buffers of the usual size
    blocks, scales = random_pair(3, 70, 9)
    expected = oracle(blocks, scales, dtype)
    array = mxfp4np.MXFP4Array(blocks, scales)
    for index in [np.s_[...], np.s_[1, :, 5:200], np.s_[::2, ::3, 32:], np.s_[0, 0, 1:280]]:
        for threads in (1, 3):
            result = array[index].decode(dtype, device="cuda", num_threads=threads)
            assert_same_bits(result.get(), expected[index])
        if expected[index].ndim > 1:
            transposed = array[index].decode(dtype, device="cuda", transpose=True)
            assert_same_bits(transposed.get(), expected[index].swapaxes(-1, -2))
        out = poisoned((3, 70, 290), dtype)[index] if expected[index].shape == out_shape(index) else None
        if out is not None:
            array[index].decode(out=out)
            assert_same_bits(out.get(), expected[index])
    get_backend("cuda").release()


def out_shape(index):
    return np.empty((3, 70, 290))[index].shape


@marked
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encodes_every_magnitude_as_the_oracle(dtype, rule):
    x = every_magnitude(dtype)
    blocks, scales = encode_oracle(x, rule)
    for array in (cupy.asarray(x), x):
        result = mxfp4np.encode(array, rule, backend="cuda")
        assert result.device == "cuda:0"
        assert np.array_equal(result.scales.get(), scales)
        assert np.array_equal(result.blocks.get(), blocks)


@marked
@given(data=st.data())
@settings(max_examples=200)
def test_encodes_any_shape_and_strides(data):
    x, rule = data.draw(values()), data.draw(st.sampled_from(RULES))
    blocks, scales = encode_oracle(x, rule)
    shape = scales.shape
    out = None
    if data.draw(st.booleans()):
        out = mxfp4np.MXFP4Array(
            on_device(data.draw(strided((*shape, 16), np.dtype("uint8")))),
            on_device(data.draw(strided(shape, np.dtype("uint8")))),
        )
    result = mxfp4np.encode(on_device(x), rule, out=out)
    assert np.array_equal(result.scales.get(), scales)
    assert np.array_equal(result.blocks.get(), blocks)


@pytest.fixture
def model(tmp_path):
    blocks, scales = random_pair(4, 64, 6)
    tensors = {
        "w": mxfp4np.MXFP4Array(blocks, scales),
        "bias": np.arange(64, dtype=np.float32),
        "norm": np.arange(64).astype(DTYPES["bfloat16"]),
        "step": np.array(7, np.int64),
    }
    mxfp4np.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@marked
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_checkpoint_on_a_device(model, io):
    with mxfp4np.Checkpoint(model) as host, mxfp4np.Checkpoint(model, "cuda:0", io=io) as ckpt:
        assert list(ckpt) == list(host)
        for name in ckpt:
            assert isinstance(ckpt[name], cupy.ndarray)
            assert_same_bits(ckpt[name].get(), host[name])
        for dtype in DTYPES:
            assert_same_bits(ckpt.get("w", dtype=dtype).get(), host.get("w", dtype=dtype))
        for index in [np.s_[1], np.s_[:, ::2], np.s_[2, :, 5:99]]:
            assert_same_bits(ckpt.get("w", index=index).get(), host.get("w", index=index))
        transposed = ckpt.get("w", transpose=True)
        assert_same_bits(transposed.get(), host.get("w", transpose=True))
        out = poisoned((4, 64, 192), "float32")
        assert ckpt.get("w", out=out) is out
        assert_same_bits(out.get(), host.get("w", dtype="float32"))
        assert ckpt.get("bias", dtype="float16").dtype == np.float16
        out = cupy.zeros(128)[::2]
        ckpt.get("bias", out=out)
        assert np.array_equal(out.get(), np.arange(64.0))
        whole = cupy.zeros((4, 64, 192), DTYPES["bfloat16"])
        for index, piece in ckpt.chunks("w", 20_000):
            whole[index] = piece
        assert_same_bits(whole.get(), host["w"])
        assert isinstance(ckpt.packed("w").blocks, np.ndarray)
        assert isinstance(ckpt.stored["bias"], np.ndarray)
        assert next(iter(ckpt.chunks("bias")))[1].device.id == 0
        with pytest.raises(TypeError, match=r"must be a cupy\.ndarray, found numpy\.ndarray"):
            ckpt.get("w", out=np.empty((4, 64, 192), np.float32))
        with pytest.raises(TypeError, match=r"must be a cupy\.ndarray, found numpy\.ndarray"):
            ckpt.get("bias", out=np.empty(64, np.float32))
        with pytest.raises(ValueError, match="leave one of the two out"):
            ckpt.get("w", backend="numpy")
        for index in ([2, 0], np.array([True, False, True, False]), np.s_[[3, 1], 5:9, :40]):
            assert_same_bits(ckpt.get("w", index=index).get(), host["w"][index])
            packed = mxfp4np.MXFP4Array(cupy.asarray(ckpt.packed("w").blocks), cupy.asarray(ckpt.packed("w").scales))
            assert_same_bits(packed[index].decode().get(), host["w"][index])
        assert_same_bits(packed.T.get(), host["w"].T)
        assert mxfp4np.Checkpoint(model, cupy.cuda.Device(0)).device == "cuda:0"
        assert ckpt.get("none", default=None) is None
        with pytest.raises(mxfp4np.TensorNotFoundError):
            ckpt["none"]
    assert {name: array.device.id for name, array in mxfp4np.load_file(model, "cuda").items()} == dict.fromkeys(host, 0)


@marked
@pytest.mark.gguf
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_types_of_gguf_on_a_device(tmp_path, io):
    gguf = pytest.importorskip("gguf")
    raw = gguf.quantize(
        np.random.default_rng(3).normal(size=(3, 8, 64)).astype("float32"), gguf.GGMLQuantizationType.Q8_0
    )
    path = write_gguf(tmp_path / "m.gguf", {"w": ("Q8_0", raw)})
    with mxfp4np.Checkpoint(path) as host, mxfp4np.Checkpoint(path, "cuda:0", io=io) as ckpt:
        for dtype in DTYPES:
            assert_same_bits(ckpt.get("w", dtype).get(), host.get("w", dtype))
        assert_same_bits(ckpt.get("w", index=np.s_[[2, 0], :, 5:50]).get(), host["w"][[2, 0], :, 5:50])
        assert_same_bits(ckpt.get("w", transpose=True).get(), host.get("w", transpose=True))
        out = poisoned((3, 8, 64), "float32")
        assert ckpt.get("w", out=out) is out
        assert_same_bits(out.get(), host.get("w", "float32"))
        whole = cupy.zeros((3, 8, 64), DTYPES["bfloat16"])
        for index, piece in ckpt.chunks("w", 500):
            whole[index] = piece
        assert_same_bits(whole.get(), host["w"])


@marked
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_converting_on_a_device_gives_the_same_files(model, tmp_path, dtype):
    blocks, scales = random_pair(4, 64, 6)
    mxfp4np.save_file({"w": mxfp4np.MXFP4Array(blocks, scales % 255)}, model / "model.safetensors")  # no NaN
    files = []
    for device in ("cpu", "cuda:0"):
        mxfp4np.convert(model, tmp_path / device[:4], dtype=dtype, transpose="yes", device=device)
        files.append([path.read_bytes() for path in sorted((tmp_path / device[:4]).glob("*.safetensors"))])
    assert files[0] == files[1] != []


@marked
def test_bench_measures_a_device(command, model):
    options = "--size", "2MB", "--dtype", "float16"
    for source in ([], [model]):
        status, out, err = command("bench", *source, "--device", "cuda", *options, "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert found["device"] == "cuda"
        elsewhere = "decode, from the file" if source else "decode, from the host"
        assert [row["what"] for row in found["rows"]] == ["decode", "copy", elsewhere, "pinned memory"]
        assert [row["limit_of"] for row in found["rows"]] == [None, "decode", None, elsewhere]
    status, out, _ = command("bench", "--device", "cuda:0", *options)
    assert status == 0
    assert cupy.cuda.runtime.getDeviceProperties(0)["name"].decode() in out


@marked
def test_a_host_checkpoint_decodes_to_where_out_is(model):
    with mxfp4np.Checkpoint(model) as ckpt:
        out = poisoned((4, 64, 192), "bfloat16")
        ckpt.get("w", out=out)
        assert_same_bits(out.get(), ckpt["w"])


@marked
def test_what_is_on_a_device_can_be_saved(tmp_path):
    x = cupy.random.standard_normal((8, 64)).astype(np.float32)
    packed = mxfp4np.encode(x)
    assert packed.device == "cuda:0"
    assert repr(packed) == "MXFP4Array(shape=(8, 64), nbytes=272)"
    mxfp4np.save_file({"w": packed, "x": x}, tmp_path / "model.safetensors")
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        assert np.array_equal(ckpt["x"], x.get())
        assert_same_bits(ckpt["w"], packed.decode().get())
    with pytest.raises(TypeError, match="use decode"):
        np.asarray(packed)


@marked
def test_float8_has_no_dtype_there(tmp_path):
    import ml_dtypes

    mxfp4np.save_file({"x": np.zeros(4, ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with mxfp4np.Checkpoint(tmp_path, "cuda") as ckpt, pytest.raises(mxfp4np.BackendUnavailableError, match="float8"):
        ckpt["x"]


@marked
def test_the_callers_stream_is_used_and_nothing_waits():
    blocks, scales = (cupy.asarray(a) for a in random_pair(64, 5760, 90))
    out = poisoned((64, 5760, 2880), "bfloat16")
    mxfp4np.decode(blocks[:1], scales[:1], out=out[:1])  # built
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    pool = cupy.get_default_memory_pool()
    used = pool.used_bytes()
    with stream:
        for _ in range(50):
            mxfp4np.decode(blocks, scales, out=out)
        assert not stream.done  # queued, not waited for
        assert cupy.cuda.Stream.null.done
    assert pool.used_bytes() == used
    stream.synchronize()
    assert_same_bits(out[63, -5:].get(), oracle(blocks[63, -5:].get(), scales[63, -5:].get(), "bfloat16"))


@marked
def test_from_the_host_in_order_of_the_callers_stream():
    blocks, scales = random_pair(2, 5760, 90)
    expected = oracle(blocks[1, :5], scales[1, :5], "float16")
    array = mxfp4np.MXFP4Array(blocks, scales)
    stream = cupy.cuda.Stream(non_blocking=True)
    big = cupy.ones(1 << 28, np.float32)
    with stream:
        for _ in range(5):
            out = cupy.empty((2, 5760, 2880), np.float16)
            for _ in range(20):
                cupy.multiply(big, 1, out=big)
            out[...] = 1  # late, and on this stream: decoding must come after it
            array.decode(out=out)
            copy = out.copy()  # comes after decoding
            out[...] = 2
            assert_same_bits(copy[1, :5].get(), expected)


@marked
def test_threads_and_memory_at_once():
    blocks, scales = random_pair(8, 2880, 90)
    array = mxfp4np.MXFP4Array(blocks, scales)
    expected = array.decode()
    get_backend("cuda").release()
    failures = []

    def run():
        with cupy.cuda.Stream(non_blocking=True):
            for _ in range(4):
                result = array.decode(device="cuda:0").get()
                failures.append(np.count_nonzero((result != expected) & ~np.isnan(expected)))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [0] * 32
    assert 0 < sum(pair.nbytes for pair in staging.pinned._all) <= 256 << 20
    assert len(staging.pinned._free) == len(staging.pinned._all)
    get_backend("cuda").release()
    assert not len(staging.pinned._all)


@marked
def test_closing_returns_pinned_memory_and_its_bound_can_be_set(model, monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", str(1))
    get_backend("cuda").release()
    with mxfp4np.Checkpoint(model, "cuda") as ckpt:
        assert_same_bits(ckpt["w"].get(), ckpt.packed("w").decode())
        assert len(staging.pinned._all) == 1
    assert not len(staging.pinned._all)
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "much")
    with (
        mxfp4np.Checkpoint(model, "cuda") as ckpt,
        pytest.raises(ValueError, match="MXFP4NP_PINNED_BYTES: 'much' is not a size"),
    ):
        ckpt["w"]


@marked
def test_device_memory_is_the_output_and_two_buffers():
    blocks, scales = random_pair(16, 5760, 90)
    array = mxfp4np.MXFP4Array(blocks, scales)
    pool = cupy.get_default_memory_pool()
    gc.collect()
    pool.free_all_blocks()
    used = pool.total_bytes()
    out = array.decode(device="cuda")
    assert pool.total_bytes() - used <= out.nbytes + 2 * driver.STAGED_BYTES + (1 << 20)


@marked
def test_out_of_device_memory_says_how_much_and_is_survived(model):
    cupy.get_default_memory_pool().free_all_blocks()
    free = cupy.cuda.Device().mem_info[0]
    groups = free // 32
    blocks = np.broadcast_to(np.zeros(16, np.uint8), (groups, 16))
    scales = np.broadcast_to(np.zeros((), np.uint8), (groups,))
    with pytest.raises(mxfp4np.DeviceMemoryError, match=rf"{64 * groups:,} bytes are needed, [\d,]+ are free") as error:
        mxfp4np.decode(blocks, scales, device="cuda:0")
    assert isinstance(error.value, MemoryError)
    with mxfp4np.Checkpoint(model, "cuda:0") as ckpt:
        assert ckpt["w"].shape == (4, 64, 192)


@marked
def test_arguments_that_do_not_fit():
    blocks, scales = random_pair(4, 3)
    there = cupy.asarray(blocks), cupy.asarray(scales)
    count = cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(ValueError, match=rf"no device 'cuda:{count}': this machine has 'cuda:0'"):
        mxfp4np.decode(blocks, scales, device=f"cuda:{count}")
    with pytest.raises(mxfp4np.LayoutError, match="'cpu' and scales on 'cuda:0'"):
        mxfp4np.MXFP4Array(blocks, there[1])
    with pytest.raises(ValueError, match="the data is on 'cuda:0', not on 'cpu'"):
        mxfp4np.decode(*there, device="cpu")
    with pytest.raises(ValueError, match="backend 'cpu' does not run on device 'cuda:0'"):
        mxfp4np.decode(*there, backend="cpu")
    with pytest.raises(TypeError, match=r"must be a cupy\.ndarray, found numpy\.ndarray"):
        mxfp4np.decode(*there, out=np.empty((4, 96), np.float32))
    memory = cupy.zeros(4096, np.uint8)
    with pytest.raises(ValueError, match="overlap"):
        mxfp4np.decode(memory[:64].reshape(4, 16), memory[64:68], out=memory[32:288].view(np.float16))
    with pytest.raises(ValueError, match="overlap"):
        mxfp4np.encode(
            memory[:256].view(np.float32), out=mxfp4np.MXFP4Array(memory[:32].reshape(2, 16), memory[512:514])
        )
    odd = memory[1 : 1 + 4 * 96 * 2].view(np.float16)
    with pytest.raises(ValueError, match="out must have its elements of 2 bytes at multiples of 2: copy it first"):
        mxfp4np.decode(*there, out=odd.reshape(4, 96))
    with pytest.raises(ValueError, match="x must have its elements of 2 bytes at multiples of 2"):
        mxfp4np.encode(odd)
    assert mxfp4np.decode(*there, device="cuda").device.id == 0
    assert mxfp4np.decode(blocks, scales, backend="cuda").device.id == 0
    assert mxfp4np.decode(np.zeros((0, 16), np.uint8), np.zeros(0, np.uint8), device="cuda").shape == (0,)


@marked
def test_arrays_of_torch_cross_without_a_copy():
    torch = pytest.importorskip("torch")
    blocks, scales = random_pair(5, 64, 3)
    expected = oracle(blocks, scales, "bfloat16")
    there = torch.from_numpy(blocks).cuda(), torch.from_numpy(scales).cuda()
    result = mxfp4np.decode(*there)
    assert isinstance(result, cupy.ndarray)
    assert_same_bits(result.get(), expected)
    tensor = torch.from_dlpack(result)
    assert tensor.dtype is torch.bfloat16
    assert tensor.data_ptr() == result.data.ptr
    assert_same_bits(tensor.cpu().view(torch.uint16).numpy().view(DTYPES["bfloat16"]), expected)
    back = cupy.from_dlpack(tensor)
    assert back.data.ptr == result.data.ptr
    assert back.dtype == DTYPES["bfloat16"]
    packed = mxfp4np.encode(back)
    assert_same_bits(packed.decode().get(), mxfp4np.encode(expected).decode())
    values = torch.randn(8, 64, device="cuda")
    assert np.array_equal(mxfp4np.encode(values).blocks.get(), mxfp4np.encode(values.cpu().numpy()).blocks)
    for dtype in (np.float32, np.float16):
        out = torch.empty(5, 64, 96, dtype=torch.float32 if dtype is np.float32 else torch.float16, device="cuda")
        mxfp4np.decode(*there, out=cupy.asarray(out))
        assert_same_bits(out.cpu().numpy(), oracle(blocks, scales, np.dtype(dtype).name))


@marked
def test_arrays_to_numpy_and_through_the_array_interface():
    blocks, scales = random_pair(5, 3)
    result = mxfp4np.decode(cupy.asarray(blocks), cupy.asarray(scales), "float32")
    assert_same_bits(cupy.asnumpy(result), oracle(blocks, scales, "float32"))
    interface = result.__cuda_array_interface__
    assert interface["shape"] == (5, 96)
    assert interface["typestr"] == "<f4"
    assert result.data.ptr % 64 == 0

    class Other:
        __cuda_array_interface__ = cupy.asarray(blocks).__cuda_array_interface__

    assert mxfp4np.MXFP4Array(Other(), cupy.asarray(scales)).device == "cuda:0"


@marked
def test_arrays_of_jax():
    pytest.importorskip("jax")
    run_python(
        """
        import warnings
        warnings.simplefilter("ignore")
        import os
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import cupy, jax, mxfp4np, numpy as np
        rng = np.random.default_rng(4)
        blocks, scales = rng.integers(0, 256, (5, 3, 16), np.uint8), rng.integers(0, 255, (5, 3), np.uint8)
        expected = mxfp4np.decode(blocks, scales)
        array = jax.dlpack.from_dlpack(mxfp4np.decode(cupy.asarray(blocks), cupy.asarray(scales)))
        assert array.dtype == expected.dtype and np.array_equal(np.asarray(array), expected)
        if jax.default_backend() == "gpu":
            there = jax.numpy.asarray(blocks), jax.numpy.asarray(scales)
            assert np.array_equal(mxfp4np.decode(*there).get(), expected)
        """
    )


@marked
def test_two_devices_from_two_threads(model):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    blocks, scales = random_pair(4, 64, 6)
    mxfp4np.save_file({"w": mxfp4np.MXFP4Array(blocks, scales % 252)}, model / "model.safetensors")  # finite values
    with mxfp4np.Checkpoint(model) as ckpt:
        expected = ckpt["w"]
    found = {}

    def run(device):
        with mxfp4np.Checkpoint(model, f"cuda:{device}") as ckpt:
            arrays = [ckpt["w"] for _ in range(20)]
            found[device] = {array.device.id for array in arrays}
            for array in arrays:
                assert_same_bits(array.get(), expected)
                assert_same_bits(mxfp4np.encode(array).decode().get(), expected)

    threads = [threading.Thread(target=run, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {0}, 1: {1}}
    assert cupy.cuda.Device().id == 0
    with cupy.cuda.Device(1):
        assert mxfp4np.Checkpoint(model, "cuda")["w"].device.id == 1
    there = cupy.zeros((1, 16), np.uint8), cupy.zeros(1, np.uint8)
    with pytest.raises(ValueError, match="the data is on 'cuda:0', not on 'cuda:1'"):
        mxfp4np.decode(*there, device="cuda:1")


# Without a device


@pytest.mark.parametrize(("axes", "most", "counts"), [(1, 100, [100, 100, 4]), (2, 408, [408] * 12), (1, 1, None)])
def test_rows_of_too_many_vectors_are_decoded_in_turn(monkeypatch, axes, most, counts):
    """In as many vectors of 16 bytes as a kernel counts; rows that are longer, one element a thread."""
    out = types.SimpleNamespace(shape=(51, 32), itemsize=2, dtype=np.dtype(np.float16))
    found = []

    def launch(kernel, _, *arguments, threads=None):
        found.append(arguments[3] if kernel is kernels.decode_rows else None)
        assert threads is None or 2 * threads >= arguments[3]

    monkeypatch.setattr(driver, "MAX_VECTORS", most)
    monkeypatch.setattr(driver, "_launch", launch)
    monkeypatch.setattr(driver, "_raw", lambda *_: None)
    monkeypatch.setattr(driver, "_decode_any", lambda *_: found.append("any"))
    walked = [(24, 1, 1, 1), (51, 2, 2, 2)][-axes:]
    driver._decode_rows(out, out, out, walked, False)
    assert found == (counts or ["any"])


@pytest.mark.parametrize("error", [NotImplementedError("no"), ImportError("no"), OSError("no"), "compiler"])
def test_what_a_compiler_says_is_said_with_what_to_do(monkeypatch, error):
    class CompileError(Exception):
        pass

    for name in ("cupy", "cupy.cuda", "cupy.cuda.compiler"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["cupy.cuda.compiler"].CompileException = CompileError

    def fail(*_, **__):
        raise CompileError("no") if error == "compiler" else error

    with pytest.raises(mxfp4np.BackendUnavailableError, match=r"cannot compile for this device \(no\): install"):
        driver._launch(lambda _: fail, np.dtype(np.float32))
    error = MemoryError("enough")
    with pytest.raises(MemoryError, match="enough"):
        driver._launch(lambda _: fail, np.dtype(np.float32))


def test_a_device_does_what_is_timed_as_often_as_counts():
    calls = []
    bench._repeat(mock.MagicMock(), lambda: calls.append(None))
    assert len(calls) == bench.TIMES_ON_DEVICE


@pytest.fixture
def fake_cupy(monkeypatch):
    """Return a function that puts something in the place of CuPy."""

    def put(module):
        working_cupy.cache_clear()
        _get_backend.cache_clear()
        monkeypatch.setitem(sys.modules, "cupy", module)

    yield put
    working_cupy.cache_clear()
    _get_backend.cache_clear()


def without_driver():
    raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")


BROKEN = {
    "not installed": (None, r"need CuPy: python -m pip install 'mxfp4np\[cuda12\]' \(or cuda13.*device='cpu' works"),
    "too old": (types.SimpleNamespace(__version__="13.6.0"), r"need CuPy 14 or newer, found 13\.6\.0"),
    "no driver": (
        types.SimpleNamespace(
            __version__="14.0.1",
            cuda=types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=without_driver)),
        ),
        r"finds no NVIDIA driver .*cudaErrorInsufficientDriver.* device='cpu' works",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_missing_is_said_and_what_works_instead(fake_cupy, refused, model, what):
    module, message = BROKEN[what]
    fake_cupy(module)
    pair = np.zeros((1, 16), np.uint8), np.zeros(1, np.uint8)
    for use in (
        lambda: get_backend("cuda"),
        lambda: get_backend(device="cuda:3"),
        lambda: mxfp4np.Checkpoint(model, device="cuda"),
        lambda: mxfp4np.decode(*pair, device="cuda:0"),
        lambda: mxfp4np.encode(np.zeros(32, np.float32), backend="cuda"),
        lambda: mxfp4np.convert(model, model / "converted", device="cuda"),
    ):
        with pytest.raises(mxfp4np.BackendUnavailableError, match=message):
            use()
    assert re.search(message, refused("bench", "--device", "cuda"))
    assert re.search(message, refused("convert", model, model / "converted", "--device", "cuda:0"))
    assert mxfp4np.decode(*pair).shape == (32,)


def test_cupy_is_not_imported_until_it_is_needed(model):
    run_python(
        """
        import sys, mxfp4np
        with mxfp4np.Checkpoint(sys.argv[1]) as ckpt:
            ckpt["w"]
        assert "cupy" not in sys.modules
        """,
        model,
    )
