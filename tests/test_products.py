"""Products with packed weights, against products of weights that ml_dtypes has decoded, in float64."""

import math
from unittest import mock

import numpy as np
import pytest
from contract import DTYPES, oracle, packed, strided
from hypothesis import given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import MXFP4Array, linear
from mxfp4np.backends.cpu import launch

ORDERS = ["pairs", "halves"]
EPSILON = float(np.finfo(np.float32).eps)


def random_packed(*lead, groups, order="pairs", seed=0, scales=(117, 130)):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*lead, groups, 16), np.uint8)
    return MXFP4Array(blocks, rng.integers(*scales, (*lead, groups), np.uint8), order)


def values_of(array):
    """Decode with ml_dtypes, in float64."""
    whole = oracle(array.blocks, array.scales, "float32", array.order).astype(np.float64)
    return whole[..., array.start : array.start + array.shape[-1]]


def assert_close(actual, values, x, tolerance=8 * EPSILON):
    """Compare with the exact product, relative to the sum of the products' magnitudes."""
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.asarray(values @ x)
        magnitudes = np.abs(values) @ np.abs(x)
        of_finite = np.where(np.isfinite(values), np.abs(values), 0) @ np.where(np.isfinite(x), np.abs(x), 0)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    finite = magnitudes < 2.0**120
    assert np.all(np.abs(actual[finite] - expected[finite]) <= tolerance * magnitudes[finite] + 2.0**-140)
    other = ~np.isfinite(magnitudes) & (of_finite < 2.0**120)  # beyond, sums of finite products may overflow
    assert np.array_equal(actual[other], expected[other].astype(np.float32), equal_nan=True)


def relative_error(actual, expected):
    return math.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_products_of_any_shapes_and_strides(data):
    blocks, scales = data.draw(packed(max_side=5, max_axes=3).filter(lambda pair: pair[1].ndim > 1))
    array = MXFP4Array(blocks, scales, data.draw(st.sampled_from(ORDERS)))
    cut = data.draw(st.sampled_from([np.s_[...], np.s_[..., 32:], np.s_[..., 5:], np.s_[..., ::2, :], np.s_[..., :70]]))
    array = array[cut]
    shape = (array.shape[-1],)
    if data.draw(st.booleans()):
        lead = array.shape[:-2][data.draw(st.integers(0, array.ndim - 2)) :]
        lead = tuple(data.draw(st.sampled_from([1, n])) for n in lead)
        shape = (*data.draw(st.sampled_from([(), lead])), *shape, data.draw(st.integers(0, 40)))
    x = data.draw(strided(shape, DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    with np.errstate(over="ignore"):
        x[...] = rng.standard_normal(shape) * 2.0 ** data.draw(st.integers(-20, 20))
    small = {"ALONE_BLOCKS": 0, "THREAD_BLOCKS": 1, "CHUNK_BLOCKS": (1, 5)}
    with mock.patch.multiple(launch, **small):
        product = array @ x
    assert product.flags.c_contiguous
    assert_close(product, values_of(array), x.astype(np.float64))
    if x.ndim > 1:
        turned = np.ascontiguousarray(x.swapaxes(-1, -2)) @ array.mT
        assert turned.flags.c_contiguous
        assert_close(np.ascontiguousarray(turned.swapaxes(-1, -2)), values_of(array), x.astype(np.float64))


@pytest.mark.parametrize("x", [0.0, -1.5, 1e-42, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("activations", "tolerance"), [("float32", 8 * EPSILON), ("int16", 1e-4)])
@pytest.mark.parametrize("scale", [0, 1, 127, 252, 253, 254, 255])
def test_special_values_are_those_of_decoded_weights(scale, activations, tolerance, x):
    """Nothing but what is infinite or NaN already becomes so."""
    array = random_packed(64, groups=3, scales=(scale, scale + 1))
    vector = np.random.default_rng(1).standard_normal(96).astype(np.float32)
    vector[[0, 40]] = x
    if scale > 200:
        vector *= np.float32(2.0**-120)
    assert_close(linear(vector, array, activations=activations), values_of(array), vector.astype(np.float64), tolerance)


@pytest.mark.parametrize("columns", [2880, 4096, 16384])
@pytest.mark.parametrize(("vectors", "activations", "most"), [(1, None, 3e-7), (8, None, 3e-7), (1, "int16", 3e-5)])
def test_the_error_is_what_the_docstring_says(vectors, activations, most, columns):
    array = random_packed(512, groups=columns // 32)
    x = np.random.default_rng(1).standard_normal((vectors, columns)).astype(np.float32)
    error = relative_error(linear(x, array, activations=activations), x.astype(np.float64) @ values_of(array).T)
    assert most / 30 < error < most


@pytest.mark.parametrize("vectors", [1, 3, 16, 33])
@pytest.mark.parametrize("activations", [None, "int16"])
def test_the_number_of_threads_does_not_change_a_bit(vectors, activations):
    array = random_packed(1001, groups=90)
    x = np.random.default_rng(1).standard_normal((vectors, 2880)).astype(np.float32)
    results = [linear(x, array, activations=activations, num_threads=n) for n in (1, 2, 3)]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_blocks_of_17_bytes_are_multiplied_where_they_lie():
    memory = np.random.default_rng(0).integers(100, 140, (50, 7, 17), np.uint8)
    array = MXFP4Array(memory[..., 1:], memory[..., 0], "halves")
    x = np.random.default_rng(1).standard_normal((224, 3)).astype(np.float32)
    assert_close(array @ x, values_of(array), x.astype(np.float64))
    actual = linear(x[:, 0], array, activations="int16")
    assert relative_error(actual, values_of(array) @ x[:, 0].astype(np.float64)) < 3e-5


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_experts_of_a_mapped_file(tmp_path, io):
    blocks = np.random.default_rng(0).integers(0, 256, (4, 64, 3, 16), np.uint8)
    scales = np.random.default_rng(1).integers(117, 130, (4, 64, 3), np.uint8)
    mxfp4np.save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    x = np.random.default_rng(2).standard_normal(96).astype(np.float32)
    with mxfp4np.Checkpoint(tmp_path, io=io) as checkpoint:
        array = checkpoint.packed("w")
        expert = array[2]
        for part in (expert, expert[::2], expert[1::2], expert[8:16], expert[:, 32:]):
            assert_close(part @ x[: part.shape[1]], values_of(part), x[: part.shape[1]].astype(np.float64))
        assert_close(array @ x, values_of(array), x.astype(np.float64))


def test_bias_and_leading_axes():
    array, rng = random_packed(5, groups=2), np.random.default_rng(1)
    x, bias = rng.standard_normal((2, 3, 64)).astype(np.float32), rng.standard_normal(5)
    expected = x.astype(np.float64) @ values_of(array).T + bias
    result = linear(x, array, bias)
    assert result.shape == (2, 3, 5)
    assert result.flags.c_contiguous
    assert np.allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert linear(x[0, 0], array).shape == (5,)
    assert linear(x[:, :0], array).shape == (2, 0, 5)
    assert linear(np.zeros((2, 0)), random_packed(5, groups=0)).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int32", DTYPES["bfloat16"]])
def test_out_of_any_dtype_and_strides(dtype):
    array, x = random_packed(6, groups=1, scales=(127, 128)), np.ones((4, 32), np.float32)
    out = np.zeros((6, 8), dtype).T[::2]
    assert linear(x, array, out=out) is out
    assert np.array_equal(out, (x @ values_of(array).T).astype(dtype))
    other = np.zeros((6, 4), dtype)
    assert np.matmul(array, x.T, out=other) is other
    assert np.array_equal(other, out.T)


@pytest.mark.parametrize("kind", ["mxfp4", "part of a block", "scaled"])
def test_the_operators_of_numpy(kind):
    array = random_packed(3, 40, groups=3)
    if kind == "scaled":
        codes = np.random.default_rng(0).integers(0, 120, (3, 40, 96), np.uint8)
        array = mxfp4np.ScaledArray(codes, np.ones((3, 40, 1), np.float32), "E4M3", (1, 96))
    elif kind == "part of a block":
        array = array[..., 3:]
    values, rng = array.decode("float32").astype(np.float64), np.random.default_rng(1)
    right, left = rng.standard_normal((3, array.shape[2], 4)), rng.standard_normal((3, 4, 40))
    expert = array[0]
    for actual, expected in [
        (array @ right, values @ right),
        (np.matmul(array, right), values @ right),
        (left @ array, left @ values),
        (np.matmul(left, array), left @ values),
        (right.swapaxes(1, 2) @ array.mT, right.swapaxes(1, 2) @ values.swapaxes(1, 2)),
        (array.mT @ left.swapaxes(1, 2), values.swapaxes(1, 2) @ left.swapaxes(1, 2)),
        (right[0, :, 0] @ expert.T, right[0, :, 0] @ values[0].T),
        (right[0].T @ expert.T, right[0].T @ values[0].T),
        (expert.T @ left[0, 0], values[0].T @ left[0, 0]),
        (left[0, 0] @ expert, left[0, 0] @ values[0]),
        (right[0, :, 0].tolist() @ expert.T, right[0, :, 0] @ values[0].T),
        (expert[0] @ right[0], values[0, 0] @ right[0]),
        (left[0, :, :1] @ expert[:1], left[0, :, :1] @ values[0, :1]),
        (expert @ expert.T, values[0] @ values[0].T),
        (array[:, :0] @ right, values[:, :0] @ right),
    ]:
        assert isinstance(actual, np.ndarray)
        assert actual.dtype == np.float32
        assert actual.shape == expected.shape
        assert np.allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(initial=0))


def test_a_transposed_array():
    array = random_packed(2, 40, groups=3)
    turned = array.mT
    assert (turned.shape, turned.ndim, len(turned), turned.dtype) == ((2, 96, 40), 3, 2, DTYPES["bfloat16"])
    assert turned.mT is array
    assert np.array_equal(array[0].T.T.decode(), array[0].decode())
    assert array[0].T.shape == (96, 40)
    assert repr(array[0].T) == "MXFP4Array(shape=(40, 96), nbytes=2040).mT"
    expected = values_of(array).swapaxes(1, 2)
    assert np.array_equal(np.asarray(turned, np.float64), expected)
    assert np.array_equal(turned.decode("float32"), expected)
    assert np.array_equal(turned.T, np.asarray(turned).T)
    with pytest.raises(ValueError, match="two axes"):
        _ = array[0, 0].mT


def test_other_functions_of_numpy_decode():
    array = random_packed(4, groups=1)
    values = array.decode()
    assert np.array_equal(np.add(array, 1), values + 1)
    assert np.array_equal(np.multiply.reduce(array.T, axis=0), np.multiply.reduce(values.T, axis=0))
    with pytest.raises(TypeError, match="out must be a numpy"):
        np.add(values, 1, out=(array,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: linear(np.ones(31), w), ValueError, r"last axis of 64, found shape \(31,\)"),
        (lambda w: linear(1.0, w), ValueError, "at least one axis"),
        (lambda w: linear(np.ones(64), w[0]), ValueError, "two axes"),
        (lambda w: linear(np.ones(64), w.decode()), TypeError, "MXFP4Array or a ScaledArray, found ndarray"),
        (lambda w: linear(np.ones(64) * 1j, w), TypeError, "real numbers, found dtype complex128"),
        (lambda w: linear(np.ones(64), w, np.ones(2)), ValueError, r"bias must have shape \(3,\), found \(2,\)"),
        (lambda w: linear(np.ones(64), w, activations="int4"), ValueError, "'float32' or 'int16', found 'int4'"),
        (lambda w: linear(np.ones(64), w, num_threads=0), ValueError, "num_threads"),
        (lambda w: linear(np.ones(64), w, out=np.ones(4)), ValueError, r"shape \(3,\), found \(4,\)"),
        (lambda w: linear(np.ones(64), w, out=w.blocks), ValueError, "overlap"),
        (lambda w: w @ np.ones(63), ValueError, r"fit each other: \(3, 64\) @ \(63,\)"),
        (lambda w: w @ 2, ValueError, "at least one axis"),
        (
            lambda w: np.matmul(w, np.ones(64), out=np.ones((2, 3))),
            ValueError,
            r"out must have shape \(3,\), found \(2, 3\)",
        ),
        (lambda w: np.ones((2, 4)) @ w, ValueError, r"\(2, 4\) @ \(3, 64\)"),
        (lambda w: np.ones((2, 4)) @ w.T, ValueError, r"\(2, 4\) @ \(64, 3\)"),
        (lambda w: w.T @ np.ones((2, 4)), ValueError, r"\(64, 3\) @ \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call(random_packed(3, groups=2))


def test_the_reference_is_used_where_there_is_no_compiled_code(monkeypatch):
    array, x = random_packed(3, groups=2), np.arange(64.0)
    monkeypatch.setattr(launch, "compiled_kernel", lambda *_: None)
    expected = (values_of(array) @ x).astype(np.float32)
    assert np.array_equal(array @ x, expected)
    assert np.array_equal(linear(x, array, activations="int16"), expected)


def test_shapes_that_were_changed_are_refused():
    array = random_packed(4, groups=2)
    array.blocks.shape = (2, 4, 16)
    with pytest.raises(mxfp4np.LayoutError, match="do not change the shapes"):
        linear(np.ones(64), array)


def test_rows_that_share_memory_and_reversed_ones():
    array = random_packed(5, groups=3)
    x = np.random.default_rng(1).standard_normal((96, 3)).astype(np.float32)
    repeated = MXFP4Array(np.broadcast_to(array.blocks[:1], (7, 3, 16)), np.broadcast_to(array.scales[:1], (7, 3)))
    for part in (array[::-1], MXFP4Array(array.blocks[:, ::-1], array.scales[:, ::-1]), repeated):
        assert_close(part @ x, values_of(part), x.astype(np.float64))
        actual = linear(x[:, 0], part, activations="int16")
        assert_close(actual, values_of(part), x[:, 0].astype(np.float64), 1e-4)
