"""Encoding: both backends against an independent oracle and torchao's golden bytes; what a round trip keeps."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from contract import DTYPES, RULES, assert_encodes, assert_same_bits, encode_oracle, packed, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import MXFP4Array

DATA = Path(__file__).parent / "data"
BACKENDS = ["numpy", "cpu"]
STEPS = np.array([0.5, 0.5, 0.5, 0.5, 1, 1, 2, 2])
"""From each E2M1 magnitude to the next, which after 6 would be 8."""

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_rule = pytest.mark.parametrize("rule", RULES)


def neighbours(x):
    """Return values with the next smaller and the next larger ones of their dtype."""
    bits = x.view(f"i{x.itemsize}")
    return np.concatenate([bits - 1, bits, bits + 1]).view(x.dtype)


@every_rule
@every_backend
def test_one_block_readable_by_eye(rule, backend):
    x = np.array(
        [0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.0, -0.2, -0.3, -1.1, -2.4, -2.6, -4.9, -6.5] * 2, np.float32
    )
    array = mxfp4np.encode(x, rule, backend=backend)
    found = array.decode("float32")
    if rule in ("even", "floor"):  # 6.5 saturates
        assert array.scales.tolist() == [127]
        assert array.blocks[0, :8].tolist() == [0x00, 0x22, 0x44, 0x66, 0x88, 0xA9, 0xDC, 0xFE]
        assert found[:16].tolist() == [0, 0, 1, 1, 2, 2, 4, 4, 0, 0, -0.5, -1, -2, -3, -4, -6]
    else:
        assert array.scales.tolist() == [128]
        assert array.blocks[0, :8].tolist() == [0x00, 0x11, 0x22, 0x44, 0x88, 0x98, 0xBA, 0xDC]
        assert found[:16].tolist() == [0, 0, 1, 1, 2, 2, 4, 4, 0, 0, 0, -1, -2, -3, -4, -6]
    assert np.signbit(found)[:16].tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("largest", "exponents"),
    [  # of even, floor, rceil, ceil
        (4.0, (0, 0, 0, 0)),
        (4.001, (0, 0, 0, 1)),
        (6.0, (0, 0, 0, 1)),
        (6.001, (0, 0, 1, 1)),
        (6.999, (0, 0, 1, 1)),
        (7.0, (1, 0, 1, 1)),
        (7.999, (1, 0, 1, 1)),
        (8.0, (1, 1, 1, 1)),
        (2.0**-124, (-126, -126, -126, -126)),
        (2.0**-125, (-127, -127, -127, -127)),
        (2.0**-149, (-127, -127, -127, -127)),
        (0.0, (-127, -127, -127, -127)),
        (1.5 * 2.0**127, (125, 125, 125, 126)),
        (float(np.nextafter(np.float32(1.75 * 2.0**127), np.float32(0))), (125, 125, 126, 126)),
        (1.75 * 2.0**127, (125, 125, 125, 125)),
        (float(np.finfo(np.float32).max), (125, 125, 125, 125)),
        (np.inf, (128, 128, 128, 128)),
        (np.nan, (128, 128, 128, 128)),
    ],
)
@every_backend
def test_rules_by_their_largest_magnitude(backend, largest, exponents):
    for sign in (1, -1):
        x = np.zeros(32, np.float32)
        x[17] = sign * largest
        found = [int(mxfp4np.encode(x, rule, backend=backend).scales[0]) - 127 for rule in RULES]
        assert tuple(found) == exponents


@every_rule
@every_backend
def test_rows_have_the_bytes_of_torchao(rule, backend):
    with np.load(DATA / "encode.npz") as golden:
        x, scales, blocks = (golden[name] for name in ("x", f"torchao_{rule}_scales", f"torchao_{rule}_blocks"))
    actual = mxfp4np.encode(x, rule, backend=backend)
    # It does not divide by 2**-127, and lets the largest values overflow; see the docstring of `encode`.
    largest = np.abs(x.reshape(*scales.shape, 32)).max(axis=-1)
    assert np.array_equal(actual.scales, np.where(largest < 1.75 * 2.0**127, scales, 252))
    same = ((scales > 0) | ~x.any(axis=-1, keepdims=True)) & (actual.scales == scales)
    assert np.count_nonzero(~same) < 8
    assert np.array_equal(actual.blocks[same], blocks[same])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_rule
@every_backend
def test_every_16_bit_value_as_the_largest_of_a_block(backend, rule, dtype):
    largest = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    x = np.zeros((65536, 32), DTYPES[dtype])
    x[np.arange(65536), np.arange(65536) % 32] = largest
    assert_encodes(x, rule, backend=backend)
    with np.errstate(invalid="ignore"):
        x = (largest[:, None].astype(np.float32) * np.linspace(-1, 1, 32, dtype=np.float32)).astype(DTYPES[dtype])
    assert_encodes(x, rule, backend=backend)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_rule
@every_backend
def test_every_16_bit_value_as_an_element(backend, rule, dtype):
    elements = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    exponents = [-14, -10, -3, 0, 5, 15] if dtype == "float16" else [-133, -127, -126, -125, -124, -100, 0, 60, 127]
    for exponent in exponents:
        largest = 1.25 * 2.0**exponent
        with np.errstate(invalid="ignore"):
            fitting = elements[np.abs(elements.astype(np.float64)) <= largest]
        rows = -(-len(fitting) // 31)
        first = np.full((rows, 1), largest, DTYPES[dtype])
        assert_encodes(np.concatenate([first, np.resize(fitting, (rows, 31))], axis=1), rule, backend=backend)


@every_rule
@every_backend
def test_float32_at_every_boundary_under_every_scale(backend, rule):
    # Largest magnitudes: 1, 1.5 and 1.75 times every power of two, and their neighbours.
    powers = 2.0 ** np.arange(-149, 128)
    largest = neighbours(np.concatenate([f * powers for f in (1, 1.5, 1.75)]).astype(np.float32))
    largest = np.concatenate([largest, np.arange(1, 1000, dtype=np.uint32).view(np.float32)])
    x = np.zeros((len(largest), 32), np.float32)
    x[:, 5] = -largest
    assert_encodes(x, rule, backend=backend)
    # Elements: half way between any two values under any scale, and their neighbours.
    with np.errstate(over="ignore"):
        halves = np.multiply.outer(2.0 ** np.arange(-127, 127), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]).astype("f4")
    x = np.stack([neighbours(row) for row in halves])  # 24 of them; and what decides on the scale
    x = np.concatenate([x, -x[:, :7], np.full_like(x[:, :1], 0)], axis=1)
    x[:, -1] = np.minimum(4 * 2.0 ** np.arange(-127, 127), np.finfo(np.float32).max)
    x[~np.isfinite(x)] = 0
    assert_encodes(x, rule, backend=backend)
    x[:, 7::8][:, :3] = 0  # without 6 and its neighbours
    assert_encodes(x, rule, backend=backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_rule
@every_backend
def test_what_is_finite_decodes_to_finite_values(backend, rule, dtype):
    largest = ml_dtypes.finfo(DTYPES[dtype]).max
    x = np.linspace(-float(largest), float(largest), 32 * 4096).astype(DTYPES[dtype]).reshape(64, -1)
    assert np.isfinite(x.astype(np.float64)).all()
    packed = assert_encodes(x, rule, backend=backend)
    for to in ("bfloat16", "float32"):
        decoded = packed.decode(to, backend=backend).astype(np.float64)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded).max() == 6 * 2.0**125


@given(x=values(), rule=st.sampled_from(sorted(RULES)))
@settings(max_examples=500)
@every_backend
def test_any_values_shape_and_strides(backend, x, rule):
    before = x.tobytes()
    assert_encodes(x, rule, backend=backend)
    assert x.tobytes() == before


@given(x=values(), rule=st.sampled_from(sorted(RULES)), data=st.data())
@settings(max_examples=300)
@every_backend
def test_out_of_every_kind(backend, x, rule, data):
    shape = (*x.shape[:-1], x.shape[-1] // 32)
    out = MXFP4Array(data.draw(strided((*shape, 16), np.dtype("uint8"))), data.draw(strided(shape, np.dtype("uint8"))))
    assert assert_encodes(x, rule, backend=backend, out=out) is out


@every_backend
def test_nothing_is_written_around_out(backend):
    x = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    memory = np.full((9, 5, 17), 99, np.uint8)
    out = MXFP4Array(memory[1:-1, 1:-1, 1:], memory[1:-1, 1:-1, 0])  # as GGUF interleaves them
    assert_encodes(x, "even", backend=backend, out=out)
    memory[1:-1, 1:-1] = 99
    assert np.all(memory == 99)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@every_backend
def test_long_rows_and_many_rows_are_split_between_threads_exactly(backend, threads, dtype):
    x = np.random.default_rng(1).standard_normal((3, 101, 32 * 300), np.float32).astype(DTYPES[dtype])
    for part in (x, x[:, ::2, 32:-64], x.swapaxes(0, 1)[..., ::-1], x[:, :96].swapaxes(1, 2)):
        assert_encodes(part, "even", backend=backend, num_threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_results_are_aligned_contiguous_and_owned_by_the_caller(backend, dtype):
    for shape in [(32,), (3, 64), (0, 32), (2, 0), (7, 1, 96)]:
        x = np.zeros(shape, DTYPES[dtype])
        x.flags.writeable = False
        array = mxfp4np.encode(x, backend=backend)
        assert array.shape == shape
        assert repr(array) == f"MXFP4Array(shape={shape}, nbytes={17 * x.size // 32})"
        for part in (array.blocks, array.scales):
            assert part.flags.c_contiguous
            assert part.flags.writeable
            assert part.ctypes.data % 64 == 0 or not part.size


# What a round trip keeps. With e the exponent of a block, s the one that encoding chooses for its decoded values, and v
# its largest magnitude divided by 2**e:
#
#   even, floor, rceil   v = 6 or 4: s = e;  3 or 2: s = e - 1;  1.5 or 1: s = e - 2;  0.5: s = e - 3
#
# or -127, if that is more. Times 2, the values up to 3 are values again; times 2 or 4, those up to 1.5; times 2, 4 or
# 8, 0.5. "ceil" gives the same, but one more if v is 6, 3 or 1.5. Of these, only 6 gives more than e: half of 6, 4, 3,
# 2 and 1 are values, half of 0.5 and 1.5 are not.


def kept(blocks, rule):
    """Return of which blocks all values survive."""
    magnitudes = np.stack([blocks & 7, blocks >> 4 & 7], axis=-1)
    if rule != "ceil":
        return np.ones(blocks.shape[:-1], bool)
    largest, between = (np.isin(magnitudes, codes).any(axis=(-1, -2)) for codes in ([7], [1, 3]))
    return ~(largest & between)


@given(data=packed(), rule=st.sampled_from(sorted(RULES)), dtype=st.sampled_from(["bfloat16", "float32"]))
@settings(max_examples=500)
@every_backend
def test_what_was_decoded_encodes_to_the_same_values(backend, data, rule, dtype):
    blocks, scales = data
    x = MXFP4Array(blocks, scales).decode(dtype, backend=backend)
    again = mxfp4np.encode(x, rule, backend=backend)
    by_block = x.astype(np.float32).reshape(*scales.shape, 32)
    finite = np.isfinite(by_block).all(axis=-1)
    assert np.array_equal(again.scales == 255, ~finite)
    same = finite & kept(blocks, rule)
    decoded = again.decode("float32", backend=backend).reshape(by_block.shape)
    assert_same_bits(decoded[same], by_block[same])  # -0.0 too
    assert not (finite & ~same).any() or not np.array_equal(decoded[finite], by_block[finite])
    if rule != "ceil":
        largest = np.stack([blocks & 7, blocks >> 4 & 7]).max(axis=(0, -1), initial=0)
        still = finite & (largest >= 6)
        assert np.array_equal(again.scales[still], scales[still])
        assert np.array_equal(again.blocks[still], blocks[still])
        assert np.all(again.scales[finite] <= scales[finite])


@every_rule
@every_backend
def test_round_trip_of_every_code_under_every_scale(backend, rule):
    # A block of one code and of the other codes up to its magnitude.
    codes = np.array([[[i if i < 8 else i - 8 + 8, min(j, i % 8) + 8 * (j % 2)] for j in range(16)] for i in range(16)])
    blocks = np.broadcast_to((codes[..., 0] | codes[..., 1] << 4).astype(np.uint8), (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    x = mxfp4np.decode(blocks, scales, "float32")
    again = mxfp4np.encode(x, rule, backend=backend).decode("float32").reshape(256, 16, 32)
    x = x.reshape(again.shape)
    same = kept(blocks, rule) & np.isfinite(x).all(axis=-1)
    assert np.all(same[:253] == kept(blocks, rule)[:253])  # up to scale 252 all is finite
    assert_same_bits(again[same], x[same])
    assert np.all(np.isnan(again[~np.isfinite(x).all(axis=-1)]))


@given(x=values(), rule=st.sampled_from(sorted(RULES)))
@settings(max_examples=500)
@every_backend
def test_no_error_is_more_than_half_a_step(backend, x, rule):
    array = mxfp4np.encode(x, rule, backend=backend)
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64).reshape(*array.scales.shape, 32)
    finite = np.isfinite(wide).all(axis=-1)
    exact = wide[finite] / 2.0 ** (array.scales[finite, None].astype(np.float64) - 127)
    codes = np.stack([array.blocks & 15, array.blocks >> 4], axis=-1).reshape(wide.shape)[finite]
    found = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert np.array_equal(np.signbit(exact), np.signbit(found))
    below = np.abs(exact) < np.abs(found)
    bounds = STEPS[(codes & 7) - below] / 2
    saturated = (rule == "floor") | (np.abs(wide[finite]).max(axis=-1, keepdims=True, initial=0) >= 1.75 * 2.0**127)
    bounds[saturated & (codes & 7 == 7) & ~below] = 2  # 8 would be nearer, from 7 on
    assert np.all(np.abs(exact - found) <= bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@every_rule
@every_backend
def test_nan_or_infinity_makes_its_block_nan_and_no_other(backend, rule, dtype):
    x = np.random.default_rng(4).standard_normal((6, 160)).astype(DTYPES[dtype])
    clean = mxfp4np.encode(x, rule, backend=backend)
    for number in (np.nan, -np.nan, np.inf, -np.inf):
        for place in range(64, 96):
            broken = x.copy()
            broken[3, place] = number
            array = mxfp4np.encode(broken, rule, backend=backend)
            assert array.scales[3, 2] == 255
            assert array.blocks[3, 2].tolist() == encode_oracle(broken, rule)[0][3, 2].tolist()
            assert np.all(array.blocks[3, 2] & 0x77 == 0)
            array.scales[3, 2], array.blocks[3, 2] = clean.scales[3, 2], clean.blocks[3, 2]
            assert np.array_equal(array.scales, clean.scales)
            assert np.array_equal(array.blocks, clean.blocks)


@every_rule
@every_backend
def test_zeros_keep_their_signs(backend, rule):
    x = np.array([0.0, -0.0] * 32, np.float32)
    array = mxfp4np.encode(x, rule, backend=backend)
    assert array.scales.tolist() == [0, 0]
    assert np.all(array.blocks == 0x80)
    assert_same_bits(array.decode("float32"), x)


@every_backend
def test_what_is_encoded_can_be_saved_and_opened(backend, tmp_path):
    x = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    array = mxfp4np.encode(x, backend=backend)
    mxfp4np.save_file({"w": array}, tmp_path / "w.safetensors")
    with mxfp4np.Checkpoint(tmp_path / "w.safetensors") as checkpoint:
        assert_same_bits(checkpoint["w"], array.decode())
    assert np.mean((array.decode("float32") - x) ** 2) < 0.02


def test_even_is_the_default_and_loses_least():
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((4096, 32)) * 2.0 ** rng.uniform(0, 1, (4096, 1))).astype(np.float32)
    errors = {rule: np.mean((mxfp4np.encode(x, rule).decode("float32") - x) ** 2) for rule in RULES}
    assert min(errors, key=errors.get) == "even"
    assert np.array_equal(mxfp4np.encode(x).blocks, mxfp4np.encode(x, "even").blocks)


@every_backend
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(32), r"x must be bfloat16, float16, float32, in native byte order, found dtype\('float64'\)"),
        ([0.5] * 32, "found dtype.'float64'"),
        (np.zeros(32, np.int8), "found dtype.'int8'"),
        (np.zeros(32, ml_dtypes.float8_e5m2), "found dtype.float8_e5m2"),
        (np.zeros(32, ">f4"), "found dtype.'>f4'"),
        (np.float32(1), r"a multiple of 32, found shape \(\)"),
        (np.zeros((32, 33), np.float32), r"a multiple of 32, found shape \(32, 33\)"),
    ],
)
def test_values_that_cannot_be_encoded_are_refused(backend, x, message):
    with pytest.raises(ValueError, match=message):
        mxfp4np.encode(x, backend=backend)


def test_arguments_that_do_not_fit_are_refused():
    x = np.zeros((2, 64), np.float32)
    blocks, scales = np.zeros((2, 2, 16), np.uint8), np.zeros((2, 2), np.uint8)
    fixed = np.zeros_like(blocks)
    fixed.flags.writeable = False
    over = x.reshape(-1).view(np.uint8)
    for options, message in [
        ({"rule": "nearest"}, "rule must be 'even', 'floor', 'rceil', 'ceil', found 'nearest'"),
        ({"num_threads": 0}, "num_threads must be at least 1, found 0"),
        ({"out": MXFP4Array(blocks[:1], scales[:1])}, r"out must have shape \(2, 64\), found \(1, 64\)"),
        ({"out": MXFP4Array(blocks, scales, "halves")}, "out must have its elements in pairs, found order 'halves'"),
        ({"out": MXFP4Array(fixed, scales)}, "out must be writable, found a read-only array"),
        ({"out": MXFP4Array(blocks, fixed[..., 0])}, "out must be writable, found a read-only array"),
        ({"out": MXFP4Array(over[:64].reshape(2, 2, 16), scales)}, "out must not overlap"),
        ({"out": MXFP4Array(blocks, over[:4].reshape(2, 2))}, "out must not overlap"),
        ({"backend": "torch"}, "no backend 'torch'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mxfp4np.encode(x, **options)
    with pytest.raises(ValueError, match="begins at element 16 of a block"):
        mxfp4np.encode(x[:, :32], out=MXFP4Array(blocks, scales)[:, 16:48])
    with pytest.raises(TypeError, match="out must be an MXFP4Array, found ndarray"):
        mxfp4np.encode(x, out=blocks)
    assert not blocks.any()
