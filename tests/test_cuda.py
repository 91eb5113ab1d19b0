"""The CUDA backend: what it gives is what the CPU gives; and what it says where it cannot run.

All but the last tests need a device and are skipped without one.
"""

import ctypes
import gc
import itertools
import json
import random
import re
import signal
import sys
import threading
import time
import types
from functools import partial

import numba
import numpy as np
import pytest
from contract import (
    DTYPES,
    assert_same_bits,
    encode_oracle,
    every_magnitude,
    every_pair,
    indices,
    interrupted_after,
    oracle,
    packed,
    run_python,
    strided,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mxfp4np.backends.cpu.kernels import FILLERS, LEADER

import mxfp4np
from mxfp4np.backends import get_backend
from mxfp4np.backends.cpu import pool as crew
from mxfp4np.backends.cuda import driver as cuda_backend
from mxfp4np.cli import bench
from mxfp4np.format import RULES

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
    turned = poisoned(expected.shape[::-1], dtype)
    array.decode(out=turned, transpose=True)
    assert_same_bits(turned.get().T, expected)
    host = mxfp4np.MXFP4Array(blocks, scales, order)
    assert_same_bits(host.decode(dtype, device="cuda").get(), expected)


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
    monkeypatch.setattr(cuda_backend, "MOST_VECTORS", most)
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
    monkeypatch.setattr(cuda_backend, "STAGED_BYTES", 5000)
    monkeypatch.setattr(cuda_backend, "SLOT_BYTES", 1000)
    monkeypatch.setattr(cuda_backend, "PIECE_BYTES", 250)
    get_backend("cuda").release()  # slots of the usual size
    blocks, scales = random_pair(3, 70, 9)
    expected = oracle(blocks, scales, dtype)
    array = mxfp4np.MXFP4Array(blocks, scales)
    for index in [np.s_[...], np.s_[1, :, 5:200], np.s_[::2, ::3, 32:], np.s_[0, 0, 1:280]]:
        for threads in (1, 3):
            result = array[index].decode(dtype, device="cuda", num_threads=threads)
            assert_same_bits(result.get(), expected[index])
        if expected[index].ndim > 1:
            turned = array[index].decode(dtype, device="cuda", transpose=True)
            assert_same_bits(turned.get(), expected[index].swapaxes(-1, -2))
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
        turned = ckpt.get("w", transpose=True)
        assert_same_bits(turned.get(), host.get("w", transpose=True))
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
        assert ckpt.get("none", None) is None
        with pytest.raises(mxfp4np.TensorNotFoundError):
            ckpt["none"]
    assert {name: array.device.id for name, array in mxfp4np.load_file(model, "cuda").items()} == dict.fromkeys(host, 0)


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
    assert len(cuda_backend._pinned._all) * cuda_backend.SLOT_BYTES <= 256 << 20
    assert len(cuda_backend._pinned._free) == len(cuda_backend._pinned._all) > 0
    get_backend("cuda").release()
    assert not len(cuda_backend._pinned._all)


@marked
def test_closing_returns_pinned_memory_and_its_bound_can_be_set(model, monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", str(1))
    get_backend("cuda").release()
    with mxfp4np.Checkpoint(model, "cuda") as ckpt:
        assert_same_bits(ckpt["w"].get(), ckpt.packed("w").decode())
        assert len(cuda_backend._pinned._all) == 1
    assert not len(cuda_backend._pinned._all)
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "much")
    with mxfp4np.Checkpoint(model, "cuda") as ckpt, pytest.raises(ValueError, match="number of bytes, found 'much'"):
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
    assert pool.total_bytes() - used <= out.nbytes + 2 * cuda_backend.STAGED_BYTES + (1 << 20)


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


class HostCupy(types.ModuleType):
    """What `_Transfer` needs of CuPy, with the host in the place of a device."""

    batches = True

    class Queue:
        ptr = 0
        id = 0
        done = True

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_event(self, _):
            pass

        record = wait_event

        def synchronize(self):
            pass

    class PinnedMemory:
        def __init__(self, nbytes):
            self.memory = ctypes.create_string_buffer(nbytes)
            self.ptr = ctypes.addressof(self.memory)

    def __init__(self):
        super().__init__("cupy")
        self.cuda = types.ModuleType("cupy.cuda")
        self.cuda.Device = self.cuda.Stream = self.cuda.Event = self.Queue
        self.cuda.PinnedMemory = self.PinnedMemory
        self.cuda.get_current_stream = self.Queue
        self.cuda.driver = types.SimpleNamespace(CUDADriverError=DriverError, ctxGetCurrent=lambda: 0)
        names = {"copy": 4, "copy_batch": 9, "record": 2, "query": 1, "set_context": 1}
        self.functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_longlong] * count)(getattr(self, name))
            for name, count in names.items()
        }

    def driver(self):
        """Return the addresses of functions in the place of the driver's."""
        functions = [ctypes.cast(function, ctypes.c_void_p).value for function in self.functions.values()]
        functions[1] *= self.batches
        return functions

    def copy(self, to, source, nbytes, _):
        ctypes.memmove(to, source, nbytes)
        return 0

    def copy_batch(self, targets, sources, sizes, count, attributes, first, number, _, stream):
        assert (ctypes.c_int * 6).from_address(attributes)[:] == [1, 0, 0, 0, 0, 0]
        assert (ctypes.c_longlong.from_address(first).value, number) == (0, 1)
        copies = zip(*((ctypes.c_longlong * count).from_address(a) for a in (targets, sources, sizes)), strict=True)
        return max(self.copy(*copy, stream) for copy in reversed(list(copies)))  # in whatever order

    def record(self, *_):
        return 0

    query = set_context = record


class DriverError(RuntimeError):
    pass


class LateCupy(HostCupy):
    """The same, with streams that do what is queued when it has to be done, and at random before."""

    def __init__(self, seed):
        super().__init__()
        self.random, self.streams, self.events, self.lock = random.Random(seed), [], [], threading.Lock()
        self.cuda.Event = lambda **_: LateEvent(self)
        self.cuda.Stream = lambda **_: LateStream(self)
        current = LateStream(self)
        self.cuda.get_current_stream = lambda: current

    def copy(self, to, source, nbytes, stream):
        self.streams[stream].queue.append(lambda: ctypes.memmove(to, source, nbytes))
        return 0

    def record(self, event, stream):
        self.events[event].record(self.streams[stream])
        return 0

    def query(self, event):
        return 0 if self.events[event].done else 600

    def proceed(self):
        """Do what one of the streams has to do next; return whether there was anything."""
        with self.lock:
            for stream in self.random.sample(self.streams, len(self.streams)):
                if stream.queue and stream.queue[0]() is not False:
                    stream.queue.pop(0)
                    return True
        return False


class LateStream(HostCupy.Queue):
    def __init__(self, device):
        self.device, self.queue, self.ptr = device, [], len(device.streams)
        device.streams.append(self)

    def wait_event(self, event):
        count = event.recorded
        self.queue.append(lambda: event.reached >= count)

    def synchronize(self):
        while self.queue:
            assert self.device.proceed(), "all streams wait for each other"


class LateEvent:
    def __init__(self, device):
        self.device, self.recorded, self.reached, self.ptr = device, 0, 0, len(device.events)
        device.events.append(self)

    def record(self, stream):
        self.recorded += 1
        count = self.recorded
        stream.queue.append(lambda: setattr(self, "reached", max(self.reached, count)))

    @property
    def done(self):
        for _ in range(self.device.random.randrange(4)):
            self.device.proceed()
        return self.reached == self.recorded

    def synchronize(self):
        while self.reached < self.recorded:
            assert self.device.proceed(), "all streams wait for each other"


@pytest.mark.parametrize("seed", range(60))
def test_streams_wait_for_each_other_where_they_have_to(host_cupy, monkeypatch, seed):
    fake = LateCupy(seed)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake.cuda)
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    stream = fake.cuda.get_current_stream()
    source = np.random.default_rng(seed).integers(0, 256, (12, 4500), np.uint8)
    targets = [OnHost(4500, np.uint8) for _ in range(2)]
    targets[0].array[:] = 7
    before, found = [], []
    stream.queue.append(lambda: before.append(targets[0].array.copy()))  # what the caller queued, and is not done yet

    def parts():
        for i, row in enumerate(source):
            target = targets[i % 2]
            then = partial(stream.queue.append, partial(lambda target: found.append(target.array.copy()), target))
            yield host_cupy._Part([host_cupy._Copy.to(target.data.ptr, row, row.dtype)], then)

    host_cupy._Transfer(parts(), source.nbytes, 2).run()
    source_then, source[:] = source.copy(), 0  # it has been read
    stream.synchronize()
    assert np.all(before[0] == 7)
    assert np.array_equal(found, source_then)
    host_cupy._pinned.release()


@pytest.fixture(params=["batches", "copies"])
def host_cupy(monkeypatch, request):
    """Put the host in the place of a device, with small slots, and drivers that know batches and not."""
    monkeypatch.setattr(HostCupy, "batches", request.param == "batches")
    fake = HostCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake.cuda)
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    monkeypatch.setattr(cuda_backend, "_pinned", cuda_backend._Pinned())
    monkeypatch.setattr(cuda_backend, "SLOT_BYTES", 1000)
    monkeypatch.setattr(cuda_backend, "STAGED_BYTES", 10000)
    monkeypatch.setattr(cuda_backend, "PIECE_BYTES", 96)
    cuda_backend._copies.cache_clear()
    yield cuda_backend
    cuda_backend._copies.cache_clear()


class OnHost:
    """A contiguous array in the place of one on a device."""

    def __init__(self, shape, dtype):
        self.array = np.empty(shape, dtype)
        self.itemsize, self.dtype = self.array.itemsize, self.array.dtype
        self.data = types.SimpleNamespace(ptr=self.array.ctypes.data)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("slots", [1, 3, 100])
def test_bytes_of_all_strides_and_dtypes_arrive(host_cupy, monkeypatch, threads, slots):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", str(1000 * slots))
    big = np.random.default_rng(0).integers(0, 256, (6, 40, 16, 8), np.uint8)
    sources = [
        big,
        big[::2],
        big[:, ::-2],
        big[::2, ::3],
        big[..., ::2],
        big.transpose(2, 0, 3, 1),
        big[0, 0, 0],
        big[0, 0, 0, 0:1],
        big[2, 3, 4, 5],
        big.reshape(-1)[1:-1].view(np.int16),
    ]
    for dtype in (None, np.float32):
        for source in map(np.asarray, sources):
            target = OnHost(source.shape, dtype or source.dtype)
            host_cupy._Transfer(host_cupy._parts(source, target), target.array.nbytes, threads).run()
            assert np.array_equal(target.array, source.astype(target.dtype))
    assert len(host_cupy._pinned._all) <= slots


@pytest.mark.parametrize("helpers", [0, 1])
def test_slots_are_filled_where_fewer_threads_come_than_could(host_cupy, monkeypatch, helpers):
    """Others may be at something else: the thread that leads, which fills none by itself, does what they would."""
    some = crew.Crew(helpers)
    some.enlist(helpers)
    monkeypatch.setattr(cuda_backend, "shared_crew", lambda wanted: (some.address, wanted))
    source, target = np.random.default_rng(0).integers(0, 256, (30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, 5).run()
    assert np.array_equal(target.array, source)


@pytest.mark.parametrize(("threads", "fillers"), [(3, 2), (2, 2)])
def test_the_thread_that_leads_fills_slots_only_if_some_are_left(host_cupy, monkeypatch, threads, fillers):
    """They would push what it does in between two parts out of its caches."""
    monkeypatch.setattr(cuda_backend, "SLOTS", 2 * cuda_backend.SLOTS_EACH)
    monkeypatch.setattr(crew, "_crew", crew.Crew(2))
    found = []

    class Watched(cuda_backend._Transfer):
        def _lead(self, loading):
            while loading[FILLERS] < threads - 1:
                time.sleep(0.001)  # until all others are there
            super()._lead(loading)
            found.append((loading[FILLERS], loading[LEADER]))

    source, target = np.random.default_rng(0).integers(0, 256, (30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    Watched(host_cupy._parts(source, target), source.nbytes, threads).run()
    assert found == [(fillers, threads - 1)]
    assert np.array_equal(target.array, source)


@pytest.mark.parametrize("threads", [1, 4])
def test_parts_are_finished_once_they_are_there_and_memory_is_used_again_after(host_cupy, threads):
    source = np.random.default_rng(0).integers(0, 256, (30, 7000), np.uint8)
    targets = [OnHost(7000, np.uint8) for _ in range(2)]
    found = []

    def parts():
        for i, row in enumerate(source):
            target = targets[i % 2]
            then = lambda i=i, target=target: found.append((i, target.array.copy()))  # noqa: E731
            yield host_cupy._Part([host_cupy._Copy.to(target.data.ptr, row, row.dtype)], then)

    host_cupy._Transfer(parts(), source.nbytes, threads).run()
    assert [i for i, _ in found] == list(range(30))
    assert all(np.array_equal(array, source[i]) for i, array in found)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_on_the_way_ends_all_and_gives_back_the_memory(host_cupy, threads):
    source = np.zeros((30, 7000), np.uint8)
    target = OnHost(7000, np.uint8)

    def fail():
        raise MemoryError("enough")

    for _ in range(20):
        copy = host_cupy._Copy.to(target.data.ptr, source[0], source.dtype)
        parts = (host_cupy._Part([copy], fail if i == 3 else lambda: None) for i in range(30))
        with pytest.raises(MemoryError, match="enough"):
            host_cupy._Transfer(parts, source.nbytes, threads).run()
    assert len(host_cupy._pinned._free) == len(host_cupy._pinned._all) == host_cupy.SLOTS_EACH * threads
    host_cupy._pinned.release()
    assert not len(host_cupy._pinned._all)


@pytest.mark.parametrize(
    ("function", "threads"), [("copy", 1), ("copy", 3), ("record", 3), ("query", 1), ("query", 3), ("set_context", 3)]
)
def test_an_error_of_the_driver_ends_all_with_its_number(host_cupy, monkeypatch, function, threads):
    failed, times = threading.Event(), itertools.count()

    def fail(*_):
        if function != "set_context" and next(times) < 3:
            return 0
        failed.set()
        return 719

    def wait(*_):
        assert failed.wait(timeout=10)
        return 0

    functions = {"query": wait} if function == "set_context" else {}
    functions[function] = fail
    fake = type("Failing", (HostCupy,), {name: staticmethod(what) for name, what in functions.items()})()
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    with pytest.raises(DriverError, match="719"):
        host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, threads).run()
    assert len(host_cupy._pinned._free) == len(host_cupy._pinned._all) == host_cupy.SLOTS_EACH * threads


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_last_copy_is_not_lost(host_cupy, monkeypatch, threads):
    source, target = np.zeros((30, 700), np.uint8), OnHost((30, 700), np.uint8)
    end = target.data.ptr + target.array.nbytes
    fake = type("Failing", (HostCupy,), {"copy": lambda _, to, __, nbytes, ___: 719 * (to + nbytes == end)})()
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    for _ in range(100):
        with pytest.raises(DriverError, match="719"):
            host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, threads).run()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
@pytest.mark.parametrize("threads", [1, 3])
def test_waiting_for_a_device_that_is_busy_can_be_interrupted(host_cupy, monkeypatch, threads):
    not_ready = numba.cfunc("int32(int64)")(lambda _: 600)  # not Python, which would be interrupted itself
    fake = HostCupy()
    copy, copy_batch, record, _, set_context = fake.driver()
    functions = copy, copy_batch, record, not_ready.address, set_context
    monkeypatch.setattr(cuda_backend, "_driver", lambda: functions)
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.05):
        host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, threads).run()
    assert len(host_cupy._pinned._free) == len(host_cupy._pinned._all) == host_cupy.SLOTS_EACH * threads


def slow_copy(*copy):
    """Give other threads the time to fill all of their slots."""
    time.sleep(0.002)
    return HostCupy.copy(None, *copy)


@pytest.mark.parametrize("threads", [3, 8])
def test_what_is_full_while_the_driver_is_busy_is_queued_as_one_the_oldest_first(host_cupy, monkeypatch, threads):
    batches = []

    def copy_batch(self, *batch):
        batches.append(list((ctypes.c_int64 * batch[3]).from_address(batch[0])))
        return HostCupy.copy_batch(self, *batch)

    fake = type("Slow", (HostCupy,), {"copy": staticmethod(slow_copy), "copy_batch": copy_batch})()
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    monkeypatch.setattr(crew, "_crew", crew.Crew(threads - 1))
    source, target = np.random.default_rng(0).integers(0, 256, (30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, threads).run()
    assert np.array_equal(target.array, source)
    assert max(map(len, batches), default=0) in (range(3, 9) if HostCupy.batches else [0])
    assert all(targets == sorted(targets) for targets in batches)


@pytest.mark.parametrize("host_cupy", ["batches"], indirect=True)
def test_an_error_of_a_batch_ends_all_with_its_number(host_cupy, monkeypatch):
    failing = {"copy": staticmethod(slow_copy), "copy_batch": staticmethod(lambda *_: 719)}
    fake = type("Failing", (HostCupy,), failing)()
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    with pytest.raises(DriverError, match="719"):
        host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, 3).run()
    assert len(host_cupy._pinned._free) == len(host_cupy._pinned._all) == 3 * host_cupy.SLOTS_EACH


def test_one_thread_at_a_time_calls_the_driver(host_cupy, monkeypatch):
    """Where several do, they wait for each other, and much longer than a call takes."""
    busy, callers, overlaps = threading.Lock(), set(), []

    def take_a_while(*_):
        if not busy.acquire(blocking=False):
            overlaps.append(threading.get_ident())
            return 0
        callers.add(threading.get_ident())
        time.sleep(1e-5)
        busy.release()
        return 0

    functions = dict.fromkeys(("copy", "record", "query"), staticmethod(take_a_while))
    fake = type("Slow", (HostCupy,), functions)()
    monkeypatch.setattr(cuda_backend, "_driver", fake.driver)
    monkeypatch.setattr(crew, "_crew", crew.Crew(3))
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    host_cupy._Transfer(host_cupy._parts(source, target), source.nbytes, 4).run()
    assert not overlaps
    assert len(callers) > 1


@pytest.mark.parametrize(("axes", "most", "counts"), [(1, 100, [100, 100, 4]), (2, 408, [408] * 12), (1, 1, None)])
def test_rows_of_too_many_vectors_are_decoded_in_turn(monkeypatch, axes, most, counts):
    """In as many vectors of 16 bytes as a kernel counts; rows that are longer, one element a thread."""
    out = types.SimpleNamespace(shape=(51, 32), itemsize=2, dtype=np.dtype(np.float16))
    found = []

    def launch(kernel, _, *arguments, threads=None):
        found.append(arguments[3] if kernel is cuda_backend.cuda_kernels.decode_rows else None)
        assert threads is None or 2 * threads >= arguments[3]

    monkeypatch.setattr(cuda_backend, "MOST_VECTORS", most)
    monkeypatch.setattr(cuda_backend, "_launch", launch)
    monkeypatch.setattr(cuda_backend, "_raw", lambda *_: None)
    monkeypatch.setattr(cuda_backend, "_decode_any", lambda *_: found.append("any"))
    walked = [(24, 1, 1, 1), (51, 2, 2, 2)][-axes:]
    cuda_backend._decode_rows(out, out, out, walked, False)
    assert found == (counts or ["any"])


@pytest.mark.parametrize("error", [NotImplementedError("no"), ImportError("no"), OSError("no"), "compiler"])
def test_what_a_compiler_says_is_said_with_what_to_do(host_cupy, monkeypatch, error):
    class CompileError(Exception):
        pass

    monkeypatch.setitem(sys.modules, "cupy.cuda.compiler", types.SimpleNamespace(CompileException=CompileError))

    def fail(*_, **__):
        raise CompileError("no") if error == "compiler" else error

    with pytest.raises(mxfp4np.BackendUnavailableError, match=r"cannot compile for this device \(no\): install"):
        host_cupy._launch(lambda _: fail, np.dtype(np.float32))
    error = MemoryError("enough")
    with pytest.raises(MemoryError, match="enough"):
        host_cupy._launch(lambda _: fail, np.dtype(np.float32))


def test_an_interrupt_loses_no_pinned_memory(host_cupy, monkeypatch):
    slot, made = host_cupy._Slot, []

    def interrupted():
        made.append(slot())
        if len(made) == 3:
            raise KeyboardInterrupt
        return made[-1]

    monkeypatch.setattr(host_cupy, "_Slot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host_cupy._pinned.take(5)
    assert len(host_cupy._pinned._all) == len(host_cupy._pinned._free) == 2
    host_cupy._pinned.release()
    assert len(host_cupy._pinned._all) == 0


def test_pinned_memory_that_an_interrupt_has_lost_is_not_waited_for(host_cupy, monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "1000")
    host_cupy._pinned.take(1)  # which nobody keeps
    assert len(host_cupy._pinned.take(1)) == 1


def test_a_device_does_what_is_timed_as_often_as_counts():
    device, calls = object.__new__(bench._Device), []
    device._device = HostCupy.Queue()
    device.finishing(lambda: calls.append(None))()
    assert len(calls) == bench.TIMES_ON_DEVICE


def test_bytes_are_not_brought_to_a_device_without_compiled_code(host_cupy, monkeypatch):
    monkeypatch.setattr(cuda_backend, "kernel_address", lambda *_: None)
    with pytest.raises(mxfp4np.BackendUnavailableError, match="unset NUMBA_DISABLE_JIT"):
        host_cupy._Transfer([], 1, 1)


@pytest.fixture
def fake_cupy(monkeypatch):
    """Return a function that puts something in the place of CuPy."""

    def put(module):
        cuda_backend._working_cupy.cache_clear()
        monkeypatch.setitem(sys.modules, "cupy", module)

    yield put
    cuda_backend._working_cupy.cache_clear()


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
