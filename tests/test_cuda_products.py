"""Products on a CUDA device, against products of weights that ml_dtypes has decoded, in float64."""

import numpy as np
import pytest
from contract import packed, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import cupy, marked, on_device
from test_products import ORDERS, random_packed, relative_error, values_of
from test_products import assert_close as compare

import mxfp4np
from mxfp4np import MXFP4Array, linear
from mxfp4np.backends import get_backend
from mxfp4np.backends.cuda import driver


@np.errstate(over="ignore")
def assert_close(actual, values, x):
    compare(actual, values, x)


def there(array):
    return MXFP4Array(on_device(array.blocks), on_device(array.scales), array.order)


def vectors(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def into_poison(array, x):
    """Multiply into memory with gaps, and check that nothing else is written."""
    memory = cupy.full((len(array) + 2, 2 * x.shape[1] + 2), np.nan, np.float32)
    out = memory[1:-1, 1:-1:2]
    get_backend("cuda").matmul(array.blocks, array.scales, x, out, order=array.order)
    result = out.get()
    out[...] = np.nan
    assert np.isnan(memory.get()).all()
    return result


@marked
@given(data=st.data())
@settings(max_examples=300)
def test_products_of_any_shapes_and_strides(data):
    blocks, scales = data.draw(packed(max_side=9, max_axes=1).filter(lambda pair: pair[1].ndim > 1))
    host = MXFP4Array(blocks, scales, data.draw(st.sampled_from(ORDERS)))
    cut = data.draw(st.sampled_from([np.s_[...], np.s_[:, 32:], np.s_[:, 5:], np.s_[::2], np.s_[::-1, :64]]))
    array, host = there(host)[cut], host[cut]
    x = data.draw(strided((host.shape[1], data.draw(st.integers(0, 17))), np.dtype(np.float32)).filter(is_aligned))
    x[...] = vectors(*x.shape) * np.float32(2.0 ** data.draw(st.integers(-20, 20)))
    wide = x.astype(np.float64)
    assert_close((array @ on_device(x)).get(), values_of(host), wide)
    assert_close(linear(on_device(x.T), array).get().T, values_of(host), wide)
    assert_close((host @ on_device(x)).get(), values_of(host), wide)


def is_aligned(x):
    return x.ctypes.data % 4 == 0


@marked
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", range(1, 17))
def test_any_number_of_vectors_and_nothing_else_is_written(count, order):
    for rows, groups in [(1, 1), (31, 3), (33, 4), (100, 17), (257, 90)]:
        host = random_packed(rows, groups=groups, order=order)
        x = vectors(32 * groups, count)
        actual = into_poison(there(host), on_device(x))
        assert_close(actual, values_of(host), x.astype(np.float64))


@marked
@pytest.mark.parametrize("x", [0.0, -1.5, 1e-42, 1e30, 3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("scale", [0, 1, 2, 127, 132, 133, 134, 150, 252, 253, 254, 255])
def test_special_values_are_those_of_decoded_weights(scale, x):
    host = random_packed(64, groups=3, scales=(scale, scale + 1))
    factor = vectors(96, 2)
    factor[[0, 40], 0] = x
    if scale > 200:
        factor *= np.float32(2.0**-120)
    assert_close((there(host) @ on_device(factor)).get(), values_of(host), factor.astype(np.float64))


@marked
@pytest.mark.parametrize("power", [-149, -140, -126, -100, -62, -61, 0, 100, 127])
def test_vectors_of_any_magnitude(power):
    host = random_packed(40, groups=5, scales=(0, 134) if power < 100 else (0, 100))
    factor = np.ldexp(vectors(160, 3).clip(-1.9, 1.9), power).astype(np.float32)
    assert_close((there(host) @ on_device(factor)).get(), values_of(host), factor.astype(np.float64))


@marked
def test_rows_with_large_scales_change_no_other_row():
    host = random_packed(70, groups=9)
    x = vectors(288, 5)
    before = (there(host) @ on_device(x)).get()
    host.scales[[3, 33, 34, 69], [0, 8, 4, 3]] = [134, 200, 255, 254]
    after = (there(host) @ on_device(x)).get()
    assert_close(after, values_of(host), x.astype(np.float64))
    same = np.setdiff1d(np.arange(70), [3, 33, 34, 69])
    assert np.array_equal(after[same], before[same])


@marked
@pytest.mark.parametrize("columns", [2880, 4096, 16384])
@pytest.mark.parametrize("count", [1, 8, 16])
def test_the_error_is_what_is_said(count, columns):
    host = random_packed(512, groups=columns // 32)
    x = vectors(count, columns)
    error = relative_error(linear(on_device(x), there(host)).get(), x.astype(np.float64) @ values_of(host).T)
    assert 1e-8 < error < 3e-7


@marked
def test_the_same_bits_from_everywhere(monkeypatch):
    """On the device, part of it, a second time, misaligned, and from the host in parts."""
    host = random_packed(700, groups=90)
    array, x = there(host), on_device(vectors(2880, 3))
    expected = (array @ x).get()
    assert np.array_equal((array @ x).get(), expected)
    assert np.array_equal((array[64:200] @ x).get(), expected[64:200])
    memory = cupy.zeros(host.blocks.nbytes + 16, np.uint8)
    for offset in (1, 2, 3, 4):
        blocks = memory[offset : offset + host.blocks.nbytes].reshape(host.blocks.shape)
        blocks[...] = array.blocks
        assert np.array_equal((MXFP4Array(blocks, array.scales) @ x).get(), expected)
    for staged in (1, 100_000, driver.STAGED_BYTES):
        monkeypatch.setattr(driver, "STAGED_BYTES", staged)
        result = host @ x
        assert isinstance(result, cupy.ndarray)
        assert np.array_equal(result.get(), expected)


@marked
def test_blocks_of_17_bytes_are_multiplied_where_they_lie():
    memory = np.random.default_rng(0).integers(100, 140, (50, 7, 17), np.uint8)
    host = MXFP4Array(memory[..., 1:], memory[..., 0], "halves")
    x = vectors(224, 3)
    here = cupy.asarray(memory)
    for array in (MXFP4Array(here[..., 1:], here[..., 0], "halves"), host):
        assert_close((array @ on_device(x)).get(), values_of(host), x.astype(np.float64))


@marked
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_many_vectors_multiply_tiles_of_decoded_rows(monkeypatch, rows):
    monkeypatch.setattr(driver.CUDABackend, "tile_bytes", 4 * 96 * rows)
    host, x = random_packed(50, groups=3), vectors(96, 40)
    for array in (there(host), host):
        assert_close((array @ on_device(x)).get(), values_of(host), x.astype(np.float64))


@marked
def test_experts_of_a_mapped_file(tmp_path):
    host = random_packed(4, 64, groups=3)
    mxfp4np.save_file({"w": host}, tmp_path / "model.safetensors")
    x = vectors(4, 96, 2)
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        result = (ckpt.packed("w") @ on_device(x)).get()
    for i in range(4):
        assert_close(result[i], values_of(host[i]), x[i].astype(np.float64))


@marked
def test_the_callers_stream_is_used_and_nothing_waits():
    array = there(random_packed(5760, groups=90))
    x = on_device(vectors(2880, 8))
    expected = (array @ x).get()
    stream = cupy.cuda.Stream(non_blocking=True)
    big = cupy.ones(1 << 28, np.float32)
    with stream:
        for _ in range(20):
            cupy.multiply(big, 1, out=big)
        result = array @ x
        assert not stream.done
        assert cupy.cuda.Stream.null.done
        assert np.array_equal(result.get(), expected)


@marked
def test_elements_that_a_device_cannot_load_are_refused():
    array = there(random_packed(4, groups=1))
    memory = cupy.zeros(32 * 4 + 1, np.uint8)
    with pytest.raises(ValueError, match="x must have its elements of 4 bytes at multiples of 4"):
        array @ memory[1:].view(np.float32)
