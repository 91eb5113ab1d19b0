"""ScaledArray: every code under every kind of scale, by an oracle of ml_dtypes and NumPy, and what an array does."""

import operator
import pickle
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits
from helpers import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import LayoutError, ScaledArray
from mxfp4np.backends.cpu import driver as cpu
from mxfp4np.backends.cpu import launch
from mxfp4np.format import FP4_VALUES

DTYPES = ["bfloat16", "float16", "float32"]
FLOAT8 = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
ELEMENTS = ["E2M1", *FLOAT8]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_element = pytest.mark.parametrize("element", ELEMENTS)


def values_of(codes, element):
    """Return the float32 values of codes."""
    if element == "E2M1":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        return np.array(FP4_VALUES, np.float32)[codes]
    return codes.view(FLOAT8[element]).astype(np.float32)


def factors_of(scales):
    """Return scales as float32: by value, but of uint8 as E8M0."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)


def oracle(codes, scales, element, dtype, tile=(1, 32), second=None, *, divide=False):
    """Return the values, by the formula: a product in float32, rounded once."""
    values, factors = values_of(codes, element), factors_of(scales)
    with np.errstate(all="ignore"):
        if second is not None:
            second = np.asarray(second, np.float32)
            factors = factors / second if divide else factors * second
        factors = factors.repeat(tile[0], -2)[..., : values.shape[-2], :].repeat(tile[1], -1)[..., : values.shape[-1]]
        return (values * factors).astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


def random_array(rng, shape, element, tile, kind="float32", second=None, *, divide=False):
    """Return an array of random bytes, and the function that gives its values."""
    *lead, rows, columns = shape
    codes = rng.integers(0, 256, (*lead, rows, columns // 2 if element == "E2M1" else columns), np.uint8)
    places = (*lead, -(-rows // tile[0]), -(-columns // tile[1]))
    scales = rng.integers(0, 256, places, np.uint8)
    if kind in ("float32", "bfloat16"):
        scales = rng.normal(size=places).astype(getattr(ml_dtypes, kind, kind))
    elif kind != "uint8":
        scales = scales.view(getattr(ml_dtypes, kind))
    array = ScaledArray(codes, scales, element, tile, second, divide=divide)
    return array, lambda dtype: oracle(codes, scales, element, dtype, tile, second, divide=divide)


# Numbers

SPECIAL = np.frombuffer(
    bytes.fromhex(
        "00000000 80000000 00000001 007fffff 807fffff 00800000 7f7fffff ff7fffff 7f800000 ff800000 7fc00000 "
        "7f800001 ffffffff 3f800000 3f800001 33800000 477fe000 38800001 00400001 7e800000"
    ),
    ">u4",
)
SPECIAL = SPECIAL.astype(np.uint32).view(np.float32)
"""float32: zeros, subnormals, the largest, infinities, NaN of several kinds, and others."""

RNG = np.random.default_rng(7)
KINDS = {
    "E8M0": np.arange(256, dtype=np.uint8),
    "E8M0 by dtype": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu),
    "E4M3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "float32": np.concatenate([SPECIAL, RNG.integers(0, 1 << 32, 108, np.uint32).view(np.float32)]),
    "bfloat16": np.concatenate(
        [(SPECIAL.view(np.uint32) >> 16).astype(np.uint16), RNG.integers(0, 1 << 16, 108, np.uint16)]
    ).view(ml_dtypes.bfloat16),
    "float16": RNG.integers(0, 1 << 16, 128, np.uint16).view(np.float16),
}
"""Scales of each kind, every byte of those that have one."""


@every_backend
@every_element
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [16, 32, 256])
def test_every_code_under_every_scale(kind, dtype, element, backend, width):
    codes = np.arange(256, dtype=np.uint8)
    scales = KINDS[kind][:, None].repeat(-(-(512 if element == "E2M1" else 256) // width), 1)
    codes = np.broadcast_to(codes, (len(scales), 256))
    array = ScaledArray(codes, scales, element, (1, width))
    assert_same_bits(array.decode(dtype, backend=backend), oracle(codes, scales, element, dtype, (1, width)))


@pytest.mark.parametrize("element", ["E2M1", "E4M3", "E5M2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_looked_up(kind, dtype, element, monkeypatch):
    monkeypatch.setattr(cpu, "LOOKUP_VALUES", 1)
    monkeypatch.setattr(cpu, "LOOKUP_TIMES", 2)
    tables = mock.Mock(wraps=cpu.aligned_empty)
    monkeypatch.setattr(cpu, "aligned_empty", tables)
    scales = KINDS[kind]
    codes = np.broadcast_to(np.tile(np.arange(256, dtype=np.uint8), 4), (scales.size, 1024))
    length = 2048 if element == "E2M1" else 1024
    width = length if scales.itemsize > 1 else 16 if element == "E2M1" else 32
    scales = scales[(np.arange(scales.size)[:, None] + np.arange(length // width)) % scales.size]
    array, expected = ScaledArray(codes, scales, element, (1, width)), oracle(codes, scales, element, dtype, (1, width))
    assert_same_bits(array.decode(dtype), expected)
    assert tables.call_count == (dtype != "float32" and launch.instruction_set() == "avx512")
    assert_same_bits(array.decode(dtype, transpose=True), expected.T)
    assert_same_bits(array[1:, 35:-7].decode(dtype), expected[1:, 35:-7])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("kind", ["E4M3", "E8M0", "float32"])
def test_second_scales_are_applied_before_codes(kind, divide, dtype, backend):
    scales = KINDS[kind][:, None]
    codes = np.broadcast_to(np.arange(16, dtype=np.uint8) * 0x11, (len(scales), 16))
    for second in (*SPECIAL, np.float32(0.00037)):
        array = ScaledArray(codes, scales, "E2M1", (1, 32), second, divide=divide)
        expected = oracle(codes, scales, "E2M1", dtype, (1, 32), second, divide=divide)
        assert_same_bits(array.decode(dtype, backend=backend), expected)
    codes, scales = (np.stack([x, x]) for x in (codes, scales))
    second = np.array([0.3, 7], np.float32).reshape(2, 1, 1)
    array = ScaledArray(codes, scales, "E2M1", (1, 32), second, divide=divide)
    expected = oracle(codes, scales, "E2M1", dtype, (1, 32), second, divide=divide)
    assert_same_bits(array.decode(dtype, backend=backend), expected)
    assert_same_bits(array[1, 3:9].decode(dtype, backend=backend), expected[1, 3:9])
    assert_same_bits(array[[1, 0, 1]].decode(dtype, backend=backend), expected[[1, 0, 1]])


# Shapes

TILES = [(1, 16), (1, 32), (1, 48), (1, 10**6), (7, 32), (128, 128), (3, 10), (10**6, 10**6)]
INDICES = [
    np.s_[...],
    np.s_[1],
    np.s_[..., 5:77],
    np.s_[..., 64:],
    np.s_[..., 3:3],
    np.s_[:, 2:40:3],
    np.s_[:, ::-1, 33:34],
    np.s_[[2, 0, 2]],
    np.s_[[2, 0], 100:, 1:],
    np.s_[[2, 0], [5, 139]],
    np.s_[:, [130, 5, 5], 2:90],
    np.s_[0, 139],
    np.s_[-1, -1:, -5:],
    np.s_[1, 127:129, 127:129],
]


def clipped(tile, shape):
    return min(tile[0], shape[-2]), min(tile[1], shape[-1])


@every_backend
@pytest.mark.parametrize("element", ["E2M1", "E4M3"])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_views_of_partial_tiles(tile, kind, element, backend):
    shape = (3, 140, 150)
    array, whole = random_array(RNG, shape, element, clipped(tile, shape), kind)
    for dtype in ("bfloat16", "float32"):
        expected = whole(dtype)
        for index in INDICES:
            part = array[index]
            assert part.shape == expected[index].shape
            assert_same_bits(part.decode(dtype, backend=backend), expected[index])
        mask = RNG.random((3, 140)) < 0.1
        assert_same_bits(array[mask, 7:30].decode(dtype, backend=backend), expected[mask, 7:30])
        assert_same_bits(array[1, 100:, 20:][5:, 9:40].decode(dtype, backend=backend), expected[1, 105:, 29:60])
        assert_same_bits(array.decode(dtype, transpose=True, backend=backend), expected.swapaxes(-1, -2))
        part = array[1:, 30:135, 17:]
        assert_same_bits(
            part.decode(dtype, transpose=True, backend=backend), expected[1:, 30:135, 17:].swapaxes(-1, -2)
        )


@every_backend
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_out_of_any_strides(tile, backend):
    shape = (2, 130, 96)
    array, whole = random_array(RNG, shape, "E4M3", clipped(tile, shape))
    expected = whole("float16")
    wide = np.zeros((2, 130, 200), np.float16)
    for out in (
        wide[..., :96],
        wide[..., ::2][..., :96],
        wide[:, ::-1, 1:97],
        np.zeros((96, 130, 2), np.float16).T,
        np.zeros((2, 96, 130), np.float16).swapaxes(-1, -2),
        np.zeros((2, 130, 97), np.float16)[..., 1:],
    ):
        assert array.decode(out=out, backend=backend) is out
        assert_same_bits(out, expected)
    assert wide[..., 199:].any() == 0
    for codes in (array.blocks[:, ::-1], np.asfortranarray(array.blocks), np.repeat(array.blocks, 2, -1)[..., ::2]):
        strided = ScaledArray(codes, array_scales(array, tile), "E4M3", clipped(tile, shape))
        copied = ScaledArray(codes.copy(), array_scales(array, tile), "E4M3", clipped(tile, shape))
        assert_same_bits(strided.decode(backend=backend), copied.decode(backend="numpy"))


def array_scales(array, tile):
    """Return scales that are not repeated."""
    return array.scales if array.tile_rows > 1 or tile[0] == 1 else array.scales[..., :1, :]


@given(data=st.data())
def test_any_shape_tile_and_slice(data):
    draw = data.draw
    lead = draw(st.lists(st.integers(0, 3), max_size=2))
    element, kind = draw(st.sampled_from(["E2M1", "E4M3", "E5M2"])), draw(st.sampled_from(["uint8", "float32"]))
    shape = (*lead, draw(st.integers(0, 70)), 2 * draw(st.integers(0, 70)))
    tile = draw(st.integers(1, 80)), draw(st.sampled_from([2, 10, 16, 32, 64, 96, 128, 200]))
    array, whole = random_array(np.random.default_rng(draw(st.integers(0, 99))), shape, element, tile, kind)
    dtype = draw(st.sampled_from(DTYPES))
    expected = whole(dtype)
    for _ in range(2):
        index = tuple(slice(*sorted(draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in array.shape)
        array, expected = array[index], expected[index]
        for backend in BACKENDS:
            assert_same_bits(array.decode(dtype, backend=backend), expected)
            out = array.decode(dtype, backend=backend, transpose=True)
            assert_same_bits(out, expected.swapaxes(-1, -2))


def test_chunks_are_the_array():
    for tile in TILES:
        shape = (2, 130, 160)
        array, whole = random_array(RNG, shape, "E4M3", clipped(tile, shape))
        expected = whole("float32")
        for max_bytes in (640, 5000, 10**6):
            again = np.zeros_like(expected)
            for index, part in array.iter_chunks(max_bytes, "float32"):
                assert part.size * 4 <= max_bytes
                part.decode(out=again[index])
            assert_same_bits(again, expected)


def test_a_part_of_a_wide_tile_holds_nothing_else():
    for tile in ((1, 160), (130, 160)):
        array, _ = random_array(RNG, (130, 160), "E4M3", tile)
        part = array[3:5, 7:9]
        assert part.blocks.shape == (2, 2)
        assert np.shares_memory(part.blocks, array.blocks)


# What an array is


@pytest.fixture
def array():
    return ScaledArray(np.full((2, 4), 0x38, np.uint8), np.array([[0.5], [3.0]], np.float32), "E4M3", (1, 4))


def test_it_is_like_an_array(array):
    assert (array.shape, array.ndim, array.size, len(array)) == ((2, 4), 2, 8, 2)
    assert (array.nbytes, array.device, array.dtype.name) == (16, "cpu", "bfloat16")
    assert repr(array) == "ScaledArray(shape=(2, 4), element='E4M3', nbytes=16)"
    assert (array.element, array.divide, array.second, array.block_size) == ("E4M3", False, None, 4)
    assert np.asarray(array).dtype.name == "bfloat16"
    assert np.array(array, np.float64).tolist() == [[0.5] * 4, [3.0] * 4]
    assert array.astype("int32").tolist() == [[0] * 4, [3] * 4]
    assert np.asarray(array.T).tolist() == [[0.5, 3.0]] * 4
    assert [part.shape for part in array] == [(4,), (4,)]
    with pytest.raises(ValueError, match="packed E4M3 values cannot become an array without a copy"):
        np.asarray(array, copy=False)
    for name in ("blocks", "scales", "second", "element", "divide", "block_size", "shape", "start", "tile_rows"):
        with pytest.raises(AttributeError):
            setattr(array, name, None)
    assert mxfp4np.ScaledArray is ScaledArray


def test_scales_that_are_shared_count_once():
    array = ScaledArray(np.zeros((3, 64, 32), np.uint8), np.ones((3, 1, 1), np.float32), "E4M3", (64, 32))
    assert array.nbytes == 3 * 64 * 32 + 3 * 4
    assert array[1, 5:9, :10].nbytes == 4 * 10 + 4


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_pickling(tile):
    shape = (2, 70, 96)
    array, whole = random_array(RNG, shape, "E4M3", clipped(tile, shape), "uint8", np.float32(0.7))
    again = pickle.loads(pickle.dumps(array[1:, 5:, 3:]))
    assert_same_bits(again.decode(), whole("bfloat16")[1:, 5:, 3:])


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float8_e4m3fn", "float32"])
def test_exponents_of_scales(tile, kind):
    shape = (2, 140, 150)
    array, _ = random_array(RNG, shape, "E4M3", clipped(tile, shape), kind)
    assert array.count_scales() == 2 * -(-140 // clipped(tile, shape)[0]) * -(-150 // clipped(tile, shape)[1])
    factors = factors_of(array.scales if array.tile_rows > 1 or tile[0] == 1 else array.scales[:, :1])
    used = factors[factors != 0]
    expected = np.where(np.isfinite(used), np.frexp(used)[1] + 126, 255)
    assert np.array_equal(array.exponents(), np.maximum(expected, 0))
    second = np.array([2, 8], np.float32).reshape(2, 1, 1)
    again = ScaledArray(array.blocks, np.full((2, 140, 1), 3.0, np.float32), "E4M3", (1, 150), second, divide=True)
    assert np.bincount(again.exponents()).nonzero()[0].tolist() == [125, 127]


@pytest.mark.parametrize(("element", "zeros"), [("E2M1", 0x88), ("E4M3", 0x80), ("E5M2", 0x80), ("E4M3FNUZ", 0)])
def test_codes_that_are_all_zeros(element, zeros):
    codes = np.full((2, 32), zeros, np.uint8)
    scales = np.ones((2, 64 // 32 if element == "E2M1" else 1), np.float32)
    assert not ScaledArray(codes, scales, element).any_code()
    codes[1, 3] += 1
    assert ScaledArray(codes, scales, element).any_code()
    assert not ScaledArray(codes, scales, element)[:1].any_code()


def test_infinite_values_that_are_not_too_large():
    codes = np.array([[0x7C, 0x7B, 0x3C, 0, 0x7E], [0x3C, 0, 0x7C, 0xFC, 0x3C]], np.uint8)
    array = ScaledArray(codes, np.array([[1e38], [np.inf]], np.float32), "E5M2", (1, 5))
    assert np.isinf(array.decode("float32")).sum() == 2 + 4
    assert array.count_infinite() == 1 + 4
    assert array[:, 1:].count_infinite() == 3
    assert ScaledArray(codes, np.ones((1, 1), np.float32), "E4M3", (2, 5)).count_infinite() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"element": "E3M2"}, "element must be one of E2M1, E4M3, .*, found 'E3M2'"),
        (
            {"codes": np.zeros((2, 32), np.int8)},
            r"codes of E4M3 must be uint8 or float8_e4m3fn .*, found int8 \[2, 32\]",
        ),
        ({"codes": np.zeros((2, 32), ml_dtypes.float8_e5m2)}, "found float8_e5m2"),
        ({"codes": np.zeros(32, np.uint8)}, r"with 2 axes or more, found uint8 \[32\]"),
        ({"element": "E2M1", "codes": np.zeros((2, 16), ml_dtypes.float8_e4m3fn)}, "codes of E2M1 must be uint8 with"),
        ({"scales": np.zeros((2, 1), np.float64)}, "scales must be uint8, .*, found float64"),
        ({"scales": np.zeros((2, 1), ml_dtypes.float8_e5m2)}, "scales must be uint8, .*, found float8_e5m2"),
        ({"scales": np.zeros((1, 2), np.float32)}, r"scales must be \[2, 1\], one for a tile of \[1, 32\] values of"),
        ({"tile": (0, 32)}, r"tile must be rows and columns of whole bytes, found \(0, 32\)"),
        ({"tile": (1, 5), "element": "E2M1"}, r"found \(1, 5\)"),
        ({"second": np.ones(3)}, r"second must be one number or \[1, 1\], found \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    defaults = {"codes": np.zeros((2, 32), np.uint8), "scales": np.zeros((2, 1), np.float32), "element": "E4M3"}
    with pytest.raises(LayoutError, match=message):
        ScaledArray(**defaults | arguments)


def test_an_out_that_does_not_fit_is_refused(array):
    for out, dtype, message in [
        (np.empty((2, 3), np.float32), None, r"shape \(2, 4\), found \(2, 3\)"),
        (np.empty((2, 4), np.int16), None, "values decode to"),
        (None, "int8", "values decode to"),
    ]:
        with pytest.raises(ValueError, match=message):
            array.decode(dtype, out=out)
    with pytest.raises(IndexError, match="the last axis takes a slice"):
        operator.getitem(array, (0, 1))
