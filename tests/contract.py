"""What every backend must do, run against each of them by test_backends.py; and what several test files share.

The oracles are independent of the library: decoding is by ml_dtypes' own float4_e2m1fn and float8_e8m0fnu types, in
float64; encoding by comparing with every scale and every value.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import mxfp4np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16"), "float32": np.dtype("float32")}


def oracle(blocks, scales, dtype, order="pairs"):
    """Decode with ml_dtypes' types; scale 255 is NaN there as well."""
    axis = {"pairs": -1, "halves": -2}[order]
    codes = np.stack([blocks & 15, blocks >> 4], axis=axis).reshape(*scales.shape, 32)
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(over="ignore"):
        values = (elements * factors[..., None]).astype(DTYPES[dtype])
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * 32)


RULES = {"even": (3.5, "right"), "floor": (4, "right"), "rceil": (6, "left"), "ceil": (4, "left")}
"""A rule gives the largest e with ``bound * 2**e <= a`` ("right"), or the smallest with ``bound * 2**e >= a`` ("left").

With floor, ``2**e`` is the largest power with ``4 * 2**e <= a``; with even the same, after ``a`` is rounded half up to
one bit after the binary point, from 3.5 to 4; with ceil and rceil it is the smallest with 4 or 6 times ``2**e >= a``.
"""


@np.errstate(invalid="ignore")
def encode_oracle(x, rule):
    """Encode by search: for the rule's scale among all scales, and for the nearest of all values, even codes first."""
    values = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    largest = np.abs(values).max(axis=-1)
    bound, side = RULES[rule]
    first = -126 if side == "right" else -127
    scales = np.searchsorted(bound * 2.0 ** np.arange(first, first + 254), largest, side=side).astype(np.uint8)
    scales[largest >= 3.5 * 2.0**126] = 252  # under the scale 253 they would round to 4 * 2**126, which is infinity
    scales[~np.isfinite(largest)] = 255
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7], np.uint8)
    magnitudes = np.abs(values) / 2.0 ** (scales[..., None].astype(np.float64) - 127)
    distances = np.abs(magnitudes[..., None] - order.view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    codes = order[np.argmin(distances, axis=-1)]
    codes[scales == 255] = 0
    codes[np.signbit(values)] += 8
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def every_magnitude(dtype):
    """Return blocks of values of every order of magnitude, of any bits, of zeros, and with NaN and infinities."""
    rng = np.random.default_rng(0)
    factors = np.ldexp(1.0, rng.integers(-152, 127, (2500, 1)))
    normal = rng.standard_normal((2500, 32)) * factors
    ties = rng.integers(-32, 33, (2500, 32)) * factors / 4
    special = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1.0], (2500, 32), p=[0.01, 0.01, 0.01, 0.47, 0.5])
    with np.errstate(over="ignore"):
        values = np.concatenate([normal, ties, special, np.zeros((300, 32))]).astype(DTYPES[dtype])
    bits = rng.integers(0, 256, (2500, 32, values.itemsize), np.uint8).view(values.dtype)[..., 0]
    return np.concatenate([values, bits])


def assert_encodes(x, rule, **options):
    """Compare what `mxfp4np.encode` gives with the oracle, byte for byte; return it."""
    actual = mxfp4np.encode(x, rule, **options)
    blocks, scales = encode_oracle(x, rule)
    assert actual.shape == x.shape
    assert np.array_equal(actual.scales, scales)
    assert np.array_equal(actual.blocks, blocks)
    return actual


def assert_same_bits(actual, expected):
    """Compare bit for bit, NaN with NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    word = f"u{expected.dtype.itemsize}"
    actual_bits = np.ascontiguousarray(actual).reshape(-1).view(word)
    expected_bits = np.ascontiguousarray(expected).reshape(-1).view(word)
    nan = np.isnan(expected.reshape(-1).astype(np.float32))
    assert np.array_equal(np.isnan(actual.reshape(-1).astype(np.float32)), nan)
    different = np.flatnonzero((actual_bits != expected_bits) & ~nan)
    assert not len(different), (
        f"element {different[0]}: {actual_bits[different[0]]:#x}, not {expected_bits[different[0]]:#x}"
    )


def every_pair():
    """Return blocks and scales that hold every byte under every scale: shapes [256, 16, 16] and [256, 16]."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    return blocks, scales


@st.composite
def packed(draw, max_side=4, max_axes=4):
    """Draw blocks and scales of any rank, empty axes and every kind of strides included."""
    lead = draw(st.lists(st.integers(0, max_side), max_size=max_axes))
    groups = draw(st.integers(0, max_side))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (*lead, groups)
    blocks = draw(strided((*shape, 16), np.dtype("uint8")))
    scales = draw(strided(shape, np.dtype("uint8")))
    blocks[...] = rng.integers(0, 256, blocks.shape)
    scales[...] = (
        rng.integers(0, 256, shape) if draw(st.booleans()) else rng.choice([0, 1, 103, 127, 253, 254, 255], shape)
    )
    return blocks, scales


@st.composite
def strided(draw, shape, dtype):
    """Draw a writable array of this shape: C or Fortran order, with gaps, reversed, or misaligned."""
    kind = draw(st.sampled_from(["C", "F", "gaps", "reversed", "permuted", "misaligned"]))
    if kind == "C" or not shape:
        return np.zeros(shape, dtype)
    if kind == "F":
        return np.zeros(shape, dtype, order="F")
    if kind == "gaps":
        steps = [draw(st.integers(1, 3)) for _ in shape]
        big = np.zeros([n * step for n, step in zip(shape, steps, strict=True)], dtype)
        return big[tuple(slice(None, None, step) for step in steps)]
    if kind == "reversed":
        return np.zeros(shape, dtype)[tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape)]
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        return np.zeros([shape[i] for i in order], dtype).transpose(np.argsort(order))
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize + 1, np.uint8)
    return memory[1:].view(dtype).reshape(shape)


@st.composite
def values(draw, max_side=3, max_axes=3):
    """Draw values to encode, of any dtype, magnitude, shape and strides, special ones among them."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    lead = draw(st.lists(st.integers(0, max_side), max_size=max_axes))
    shape = (*lead, 32 * draw(st.integers(0, max_side)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["bits", "normal", "packed"]))
    x = draw(strided(shape, dtype))
    if kind == "bits":
        x[...] = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
        return x
    if kind == "normal":
        magnitude = 2.0 ** rng.integers(-152, 126, (*shape[:-1], shape[-1] // 32, 1))
        array = (rng.standard_normal((*shape[:-1], shape[-1] // 32, 32)) * magnitude).reshape(shape)
    else:  # quarters of values, so that ties are frequent
        array = rng.integers(-32, 33, shape) * 2.0 ** (draw(st.integers(-154, 121)))
    special = rng.choice(np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0]), shape)
    with np.errstate(over="ignore"):
        x[...] = np.where(rng.random(shape) < draw(st.sampled_from([0, 0.01, 1])), special, array)
    return x


@st.composite
def indices(draw, shape):
    """Draw a basic index: integers, slices and '...' for the leading axes, a range or nothing for the last."""
    items = []
    for size in shape[:-1]:
        bound = st.none() | st.integers(-size - 2, size + 2)
        step = st.sampled_from([None, 1, 2, 3, -1, -2])
        choices = [st.builds(slice, bound, bound, step)] + ([st.integers(-size, size - 1)] if size else [])
        items.append(draw(st.one_of(choices)))
    last = st.none() | st.integers(-shape[-1] - 2, shape[-1] + 2)
    blocks = st.none() | st.integers(0, shape[-1] // 32).map(lambda g: 32 * g)
    items.append(draw(st.builds(slice, blocks, blocks) | st.builds(slice, last, last)))
    kind = draw(st.sampled_from(["all", "ellipsis", "prefix", "suffix"]))
    cut = draw(st.integers(0, len(items)))
    if kind == "ellipsis":
        return (*items[:cut], Ellipsis, *items[draw(st.integers(cut, len(items))) :])
    if kind == "prefix":
        return tuple(items[:cut])
    if kind == "suffix":
        return (Ellipsis, *items[cut:])
    return tuple(items)


@contextlib.contextmanager
def interrupted_after(seconds):
    """Raise KeyboardInterrupt once, after ``seconds``."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_python(code, *arguments, timeout=120):
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(mxfp4np.__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
