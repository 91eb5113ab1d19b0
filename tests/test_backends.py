"""Both backends against independent oracles: exhaustively for all scales and bytes, by hypothesis for all shapes."""

from pathlib import Path

import numpy as np
import pytest
from contract import DTYPES, assert_same_bits, every_pair, indices, oracle, packed, strided
from hypothesis import given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np.backends import get_backend

DATA = Path(__file__).parent / "data"
BACKENDS = ["numpy", "cpu"]
ORDERS = ["pairs", "halves"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_byte_under_every_scale_has_the_bits_of_ml_dtypes(backend, dtype, order):
    blocks, scales = every_pair()
    array = mxfp4np.MXFP4Array(blocks, scales, order)
    assert_same_bits(array.decode(dtype, backend=backend), oracle(blocks, scales, dtype, order))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_byte_under_scales_0_to_254_has_the_bits_of_the_reference_loader(backend, dtype):
    blocks, scales = every_pair()
    actual = mxfp4np.decode(blocks, scales, dtype, backend=backend)
    with np.load(DATA / "decode_all.npz") as golden:
        expected = golden[dtype][:255]
    assert expected.shape == (255, 512)
    assert np.array_equal(actual.view(expected.dtype)[:255], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_readable_by_eye(backend, dtype):
    blocks = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8)[None]
    values = mxfp4np.decode(blocks, np.array([128], np.uint8), dtype, backend=backend).astype(np.float64)
    expected = [0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12]
    assert values.tolist() == expected * 2
    assert np.signbit(values).tolist() == [value < 8 and i > 7 for i, value in enumerate(expected)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_17_bytes_in_halves_are_decoded_where_they_lie(backend):
    rng = np.random.default_rng(3)
    memory = rng.integers(0, 256, (64, 1300, 17), np.uint8)  # large enough for several threads and streaming stores
    array = mxfp4np.MXFP4Array(memory[..., 1:], memory[..., 0], "halves")
    assert np.shares_memory(array.blocks, memory)
    expected = oracle(memory[..., 1:], memory[..., 0], "float32", "halves")
    assert_same_bits(array.decode("float32", backend=backend), expected)
    assert_same_bits(array[3:, 33:40000].decode("float32", backend=backend), expected[3:, 33:40000])


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match=r"order must be 'pairs' or 'halves', found 'thirds'"):
        mxfp4np.MXFP4Array(np.zeros((1, 16), np.uint8), np.zeros(1, np.uint8), "thirds")


@pytest.mark.parametrize("backend", BACKENDS)
def test_smallest_scale_is_a_subnormal_and_never_zero(backend):
    values = mxfp4np.decode(np.full((1, 16), 0x11, np.uint8), np.array([0], np.uint8), "float32", backend=backend)
    assert np.all(values == np.float32(2.0**-128))
    assert np.all(values > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_shape_and_strides(backend, data):
    blocks, scales = data.draw(packed())
    dtype, order = data.draw(st.sampled_from(sorted(DTYPES))), data.draw(st.sampled_from(ORDERS))
    expected = oracle(blocks, scales, dtype, order)
    assert_same_bits(mxfp4np.MXFP4Array(blocks, scales, order).decode(dtype, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_decoding_an_index_is_indexing_the_decoded(backend, data):
    blocks, scales = data.draw(packed())
    dtype, order = data.draw(st.sampled_from(sorted(DTYPES))), data.draw(st.sampled_from(ORDERS))
    whole = oracle(blocks, scales, dtype, order)
    first = data.draw(indices(whole.shape))
    array = mxfp4np.MXFP4Array(blocks, scales, order)[first]
    assert array.shape == whole[first].shape
    assert_same_bits(array.decode(dtype, backend=backend), whole[first])
    second = data.draw(indices(array.shape))
    assert_same_bits(array[second].decode(dtype, backend=backend), whole[first][second])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_out_of_every_kind(backend, data):
    blocks, scales = data.draw(packed())
    dtype, order = data.draw(st.sampled_from(sorted(DTYPES))), data.draw(st.sampled_from(ORDERS))
    expected = oracle(blocks, scales, dtype, order)
    index = data.draw(indices(expected.shape))
    expected = expected[index]
    out = data.draw(strided(expected.shape, DTYPES[dtype]))
    result = mxfp4np.MXFP4Array(blocks, scales, order)[index].decode(out=out, backend=backend)
    assert result is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("start", "length"), [(0, 32 * 700), (0, 32 * 699 + 1), (31, 32 * 650), (7, 20)])
def test_long_rows_and_many_rows_are_split_between_threads_exactly(backend, threads, start, length):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 101, 700, 16), np.uint8)
    scales = rng.integers(0, 256, (3, 101, 700), np.uint8)
    span = slice(start, start + length)
    array = mxfp4np.MXFP4Array(blocks, scales)[:, ::2, span]
    expected = oracle(blocks, scales, "bfloat16")[:, ::2, span]
    assert_same_bits(array.decode(backend=backend, num_threads=threads), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_long_row(backend):
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (100_000, 16), np.uint8)
    scales = rng.integers(0, 256, 100_000, np.uint8)
    expected = oracle(blocks, scales, "float16")
    for start, stop in [(0, 3_200_000), (1, 3_199_999), (1_000_000, 2_500_001)]:
        array = mxfp4np.MXFP4Array(blocks, scales)[start:stop]
        assert_same_bits(array.decode("float16", backend=backend), expected[start:stop])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_around_out(backend):
    blocks, scales = (np.ascontiguousarray(a) for a in every_pair())
    for dtype, start in [(dtype, start) for dtype in DTYPES for start in (0, 3)]:
        array = mxfp4np.MXFP4Array(blocks, scales)[:, start : start + 450]
        memory = np.full((258, 460), 7, DTYPES[dtype])
        array.decode(out=memory[1:-1, 5:455], backend=backend)
        assert_same_bits(memory[1:-1, 5:455], oracle(blocks, scales, dtype)[:, start : start + 450])
        memory[1:-1, 5:455] = 7
        assert np.all(memory == 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_aligned_contiguous_and_owned_by_the_caller(backend, dtype):
    for shape in [(1,), (3, 5), (0, 2), (7, 1, 2)]:
        array = mxfp4np.decode(np.zeros((*shape, 16), np.uint8), np.zeros(shape, np.uint8), dtype, backend=backend)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.dtype == DTYPES[dtype]
        assert array.ctypes.data % 64 == 0 or not array.size


def test_get_backend_picks_by_name_and_device():
    assert get_backend().name == "cpu"
    assert get_backend("numpy").name == "numpy"
    assert get_backend("cpu", "cpu").name == "cpu"
    for name, device in [("torch", None), (None, "tpu"), (None, "cpu:0"), (None, "cuda:x")]:
        with pytest.raises(ValueError, match="expected"):
            get_backend(name, device)
    for name, device in [("numpy", "cuda"), ("cpu", "cuda:1"), ("cuda", "cpu")]:
        with pytest.raises(ValueError, match="leave one of the two out"):
            get_backend(name, device)
