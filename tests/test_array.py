"""MXFP4Array: what it takes, what it refuses and says, and that indexing only makes views."""

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits, oracle
from hypothesis import given
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import LayoutError
from mxfp4np.shapes import split


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (4, 6, 3, 16), np.uint8), rng.integers(100, 140, (4, 6, 3), np.uint8)


def test_describes_itself(pair):
    array = mxfp4np.MXFP4Array(*pair)
    assert (array.shape, array.ndim, array.size, len(array)) == ((4, 6, 96), 3, 4 * 6 * 96, 4)
    assert array.nbytes == 4 * 6 * 3 * 17
    assert repr(array) == "MXFP4Array(shape=(4, 6, 96), nbytes=1224)"


def test_scales_of_float8_e8m0fnu_are_taken_by_their_bits(pair):
    blocks, scales = pair
    array = mxfp4np.MXFP4Array(blocks, scales.view(ml_dtypes.float8_e8m0fnu))
    assert np.shares_memory(array.scales, scales)
    assert_same_bits(array.decode(), oracle(blocks, scales, "bfloat16"))


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8), "blocks must be uint8, found int8"),
        (np.zeros((2, 16), np.uint8), np.zeros(2, np.float32), "scales must be uint8, found float32"),
        (np.zeros((2, 8), np.uint8), np.zeros(2, np.uint8), r"blocks must be .* found \[2, 8\] and \[2\]"),
        (np.zeros((2, 16), np.uint8), np.zeros(3, np.uint8), r"found \[2, 16\] and \[3\]"),
        (np.zeros((2, 3, 16), np.uint8), np.zeros(2, np.uint8), r"found \[2, 3, 16\] and \[2\]"),
        (np.zeros(16, np.uint8), np.uint8(0), r"found \[16\] and \[\]"),
        ([[0] * 16], [0], "blocks must be uint8, found int64"),
    ],
)
def test_misfits_are_refused(blocks, scales, message):
    with pytest.raises(mxfp4np.LayoutError, match=message):
        mxfp4np.MXFP4Array(blocks, scales)


def test_indexing_makes_views(pair):
    blocks, scales = pair
    part = mxfp4np.MXFP4Array(blocks, scales)[1:, ::-2, 40:90]
    assert part.shape == (3, 3, 50)
    assert part.start == 8
    assert np.shares_memory(part.blocks, blocks)
    assert np.shares_memory(part.scales, scales)
    assert part.blocks.shape == (3, 3, 2, 16)  # blocks that are not needed are left out


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 0, 5), r"last axis takes a slice, found 5: use \[5:5 \+ 1\]"),
        ((0, 0, slice(None, None, 2)), "slices of step 1, found step 2"),
        ((..., slice(None, None, -1)), "slices of step 1, found step -1"),
        ((0, 0, slice(1), 0), "3 axes, but 4 were indexed"),
        ((..., ...), "one '...' only"),
        ((None,), "integers, slices and one '...'"),
        ((True,), "integers, slices"),
        (([0.5, 1],), "lists or masks"),
        ((np.array(True),), "integers, slices"),
        ((np.array(1.0),), "integers, slices"),
        (([[0], [1, 2]],), "integers, slices"),
        (([True, False],), "boolean index did not match"),
        ((0, 0, [0, 1]), "the last axis takes a slice, found array"),
        ((np.ones((4, 6, 96), bool),), "the last axis takes a slice"),
        ("a", "integers, slices"),
        (4, "out of bounds"),
        (-5, "out of bounds"),
    ],
)
def test_other_indices_are_refused(pair, index, message):
    with pytest.raises(IndexError, match=message):
        mxfp4np.MXFP4Array(*pair)[index]


def test_iteration_gives_the_parts_of_the_first_axis(pair):
    array = mxfp4np.MXFP4Array(*pair)
    assert [part.shape for part in array] == [(6, 96)] * 4
    with pytest.raises(IndexError, match="last axis"):
        next(iter(array[0, 0]))


def test_numpy_converts_it(pair):
    array = mxfp4np.MXFP4Array(*pair)
    assert np.asarray(array).dtype == ml_dtypes.bfloat16
    assert_same_bits(np.asarray(array, dtype=np.float16), oracle(*pair, "float16"))
    assert np.array_equal(np.asarray(array, dtype=np.float64), oracle(*pair, "float32").astype(np.float64))
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(array, copy=False)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (None, "bfloat16"),
        ("bfloat16", "bfloat16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
        (np.float16, "float16"),
        (np.dtype("f4"), "float32"),
    ],
)
def test_dtypes_by_name_type_and_dtype(pair, dtype, name):
    assert mxfp4np.decode(*pair, dtype).dtype.name == name


@pytest.mark.parametrize("dtype", ["float64", "int8", np.float64, "nonsense", np.dtype(">f4")])
def test_other_dtypes_are_refused(pair, dtype):
    with pytest.raises(ValueError, match="values decode to"):
        mxfp4np.decode(*pair, dtype)


def test_out_decides_the_dtype(pair):
    out = np.empty((4, 6, 96), np.float32)
    assert mxfp4np.decode(*pair, out=out) is out
    assert_same_bits(out, oracle(*pair, "float32"))


def test_an_out_that_does_not_fit_is_refused(pair):
    read_only = np.empty((4, 6, 96), np.float16)
    read_only.flags.writeable = False
    for out, dtype, message in [
        (np.empty((4, 6, 95), np.float32), None, r"shape \(4, 6, 96\), found \(4, 6, 95\)"),
        (np.empty((4, 6, 96), np.float32), "float16", "dtype float16, found float32"),
        (np.empty((4, 6, 96), np.int16), None, "values decode to"),
        (read_only, None, "read-only"),
    ]:
        with pytest.raises(ValueError, match=message):
            mxfp4np.decode(*pair, dtype, out=out)
    with pytest.raises(TypeError, match=r"numpy\.ndarray, found list"):
        mxfp4np.decode(*pair, out=[])


def test_an_out_that_overlaps_the_input_is_refused():
    memory = np.zeros(4096, np.uint8)
    blocks, scales = memory[:1600].reshape(100, 16), memory[1600:1700]
    for begin in (0, 62, 1602):
        with pytest.raises(ValueError, match="overlap"):
            mxfp4np.decode(blocks[:4], scales[:4], out=memory[begin:][:256].view("f2"))
    mxfp4np.decode(blocks[:4], scales[:4], out=memory[2048:2304].view("f2"))


@pytest.mark.parametrize("threads", [0, -1])
def test_num_threads_must_be_positive(pair, threads):
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        mxfp4np.decode(*pair, num_threads=threads)


@given(
    shape=st.lists(st.integers(0, 70), max_size=3).map(tuple),
    itemsize=st.sampled_from([1, 2, 4]),
    max_bytes=st.integers(1, 5000),
    units=st.sampled_from([(1,), (32,), (32, 1)]),
)
def test_split_covers_everything_once_in_order(shape, itemsize, max_bytes, units):
    if max_bytes < units[-1] * itemsize:
        with pytest.raises(ValueError, match="max_bytes must be at least"):
            list(split(shape, itemsize, max_bytes, units))
        return
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    indices = list(split(shape, itemsize, max_bytes, units))
    parts = [numbers[index] for index in indices]
    assert np.array_equal(np.concatenate([part.reshape(-1) for part in parts] or [[]]), numbers.reshape(-1))
    assert all(part.size * itemsize <= max_bytes for part in parts)
    assert all(not index or not isinstance(index[-1], slice) or index[-1].start % units[-1] == 0 for index in indices)
    if len(units) == 2 and len(shape) > 1 and max_bytes >= 32 * itemsize * shape[-1]:
        assert all(not isinstance(index[-2], slice) or index[-2].start % 32 == 0 for index in indices)


def test_chunks_are_the_array(pair):
    array = mxfp4np.MXFP4Array(*pair)[1:, :, 5:77]
    whole = array.decode("float32")
    for max_bytes in (128, 300, 1000, 10**6):
        again = np.zeros_like(whole)
        for index, part in array.iter_chunks(max_bytes, "float32"):
            assert part.size * 4 <= max_bytes
            part.decode(out=again[index])
        assert np.array_equal(again, whole)


@pytest.mark.parametrize("name", ["blocks", "scales", "shape", "start", "order", "block_size"])
def test_attributes_cannot_be_set(pair, name):
    packed = mxfp4np.MXFP4Array(*pair)
    with pytest.raises(AttributeError, match=name):
        setattr(packed, name, getattr(packed, name))


@pytest.mark.filterwarnings("ignore:Setting the shape")
@pytest.mark.parametrize(
    ("what", "shape"),
    [("blocks", (2, 1, 48)), ("blocks", (6, 16)), ("scales", (1, 6)), ("scales", (3, 2)), ("scales", (6,))],
)
def test_shapes_that_were_changed_in_place_are_refused_where_addresses_are_taken(what, shape):
    packed = mxfp4np.MXFP4Array(np.zeros((2, 3, 16), np.uint8), np.zeros((2, 3), np.uint8))
    getattr(packed, what).shape = shape
    with pytest.raises(LayoutError, match="do not change the shapes of packed arrays"):
        packed.decode(backend="cpu")
    with pytest.raises(LayoutError, match="do not change the shapes of packed arrays"):
        mxfp4np.encode(np.zeros((2, 96), np.float32), out=packed, backend="cpu")
