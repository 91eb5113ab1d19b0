"""The CPU backend's machine code: every form of it, forced by the features Numba is given, gives the same bits."""

import itertools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import llvmlite.binding as llvm
import numpy as np
import pytest
from contract import DTYPES, RULES, assert_encodes, assert_same_bits, indices, oracle, packed, values
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir
from numba.core.registry import cpu_target

import mxfp4np
from mxfp4np import MXFP4Array
from mxfp4np.backends.cpu import decode, launch, pool, simd
from mxfp4np.backends.cpu import driver as cpu
from mxfp4np.backends.memory import address_of, aligned_empty

SSSE3 = "+sse,+sse2,+sse3,+ssse3,+cx16,-sse4.1,-avx,-avx2,-avx512f,-avx512bw"
AVX2 = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+fma,+xsave,-avx512f,-avx512bw"
FORMS = {
    "as it is": ({}, None, None),
    "avx2": ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}, "+avx2", "avx2"),
    "ssse3": ({"NUMBA_CPU_NAME": "core2", "NUMBA_CPU_FEATURES": SSSE3}, "+ssse3", "ssse3"),
    "generic": ({"NUMBA_CPU_NAME": "generic"}, "", "portable"),
}

SMALL = {"ALONE_BLOCKS": 8, "THREAD_BLOCKS": 8}  # so that workers take part in little

EXHAUSTIVE = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from contract import DTYPES, RULES, assert_encodes, assert_same_bits, every_magnitude, every_pair, oracle
from mxfp4np.backends.cpu import driver as cpu, launch
from mxfp4np.backends.memory import aligned_empty
import mxfp4np

blocks, scales = every_pair()
many = [np.ascontiguousarray(np.broadcast_to(a, (40, *a.shape))) for a in (blocks, scales)]
for dtype, order in itertools.product(DTYPES, ("pairs", "halves")):
    for start in (0, 5):
        part = mxfp4np.MXFP4Array(blocks, scales, order)[:, start:]
        expected = oracle(blocks, scales, dtype, order)[:, start:]
        assert_same_bits(part.decode(dtype), expected)
        assert_same_bits(part.decode(dtype, transpose=True), expected.T)
    # Large enough to be written past the cache, at every alignment.
    array, expected = mxfp4np.MXFP4Array(*many, order), oracle(*many, dtype, order)
    for offset in (0, 16, 2, 1):
        memory = aligned_empty((expected.nbytes + 64,), np.dtype("u1"))[offset : offset + expected.nbytes]
        out = memory.view(expected.dtype).reshape(expected.shape)
        assert_same_bits(array.decode(out=out), expected)
        out = out.reshape(40, 512, 256)
        assert_same_bits(array.decode(out=out, transpose=True), expected.swapaxes(-1, -2))
# Tiles side by side, of every scale alone, of all, and of usual ones, past the cache and not; and rows of these.
rng = np.random.default_rng(0)
blocks = rng.integers(0, 256, (16, 160, 18, 16), np.uint8)
scales = np.empty(blocks.shape[:-1], np.uint8)
scales[..., :16] = np.arange(256).reshape(16, 1, 16)
scales[..., 16], scales[..., 17] = rng.integers(0, 256, (16, 160)), rng.integers(114, 141, (16, 160))
for dtype, order, streaming in itertools.product(DTYPES, ("pairs", "halves"), (0, sys.maxsize)):
    cpu.STREAMING_BYTES = streaming
    expected = oracle(blocks, scales, dtype, order)
    for start, end in ((0, 576), (3, 570)):
        part = mxfp4np.MXFP4Array(blocks, scales, order)[..., start:end]
        out = aligned_empty((16, end - start, 160), expected.dtype)
        assert_same_bits(part.decode(out=out, transpose=True), expected[..., start:end].swapaxes(-1, -2))
        out = aligned_empty((16, 160, end - start), expected.dtype)
        assert_same_bits(part.decode(out=out), expected[..., start:end])
# Every value as a product with 1, in every number of vectors; and sums of whole numbers, which are exact.
blocks, scales = (array.reshape(-1, 1, *array.shape[2:]) for array in every_pair())
whole = rng.integers(0, 256, (7, 70, 16), np.uint8), rng.integers(125, 130, (7, 70), np.uint8)
x = rng.integers(-8, 9, (2240, 31)).astype(np.float32)
for order in ("pairs", "halves"):
    packed = mxfp4np.MXFP4Array(blocks, scales, order)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = oracle(blocks, scales, "float32", order).astype(np.float64) @ np.eye(32)
    assert np.array_equal(packed @ np.eye(32), expected.astype(np.float32), equal_nan=True)
    packed, values = mxfp4np.MXFP4Array(*whole, order), oracle(*whole, "float32", order)
    for vectors in (*range(1, 10), 16, 31):
        assert np.array_equal(packed @ x[:, :vectors], values @ x[:, :vectors])
    for blocks_ in (70, 3, 1):
        some = x[: 32 * blocks_, 0]
        product = mxfp4np.linear(some, packed[:, : 32 * blocks_], activations="int16")
        exact = values[:, : 32 * blocks_] @ some
        assert np.abs(product - exact).max() <= 1e-4 * np.abs(exact).max()
for dtype, rule in itertools.product(DTYPES, RULES):
    x = every_magnitude(dtype)
    turned = np.asfortranarray(x.reshape(-1, 64))
    for part in (x, x.reshape(-1, 3200), x[::2], x.reshape(-1, 64)[:, ::2], x.reshape(-1)[5:-27], turned):
        assert_encodes(part, rule)
print(launch.instruction_set())
"""


def check_processor_has(feature):
    """Skip a test that needs a feature, if it needs one, which this processor lacks."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    if feature is not None and (platform.machine() not in ("x86_64", "AMD64") or feature not in features):
        pytest.skip(f"this processor has no {feature}")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_instruction_set_is_exact(form):
    environment, needed, expected = FORMS[form]
    check_processor_has(needed)
    command = [sys.executable, "-c", EXHAUSTIVE, str(Path(__file__).parent)]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert expected in (None, result.stdout.strip())


@pytest.mark.parametrize(
    ("triple", "features", "form"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512bw,+ssse3", "avx512"),
        ("x86_64-unknown-linux-gnu", "+avx2,+ssse3,-avx512bw", "avx2"),
        ("x86_64-unknown-linux-gnu", "+sse2,-ssse3", "portable"),
        ("x86_64-unknown-linux-gnu", "", "portable"),
        ("aarch64-apple-darwin", "", "neon"),
        ("aarch64-unknown-linux-gnu", "+neon,+sve", "neon"),
        ("riscv64-unknown-linux-gnu", "", "portable"),
    ],
)
def test_the_form_follows_from_triple_and_features(triple, features, form):
    assert simd.instruction_set(triple, features) == form


def test_arm_looks_up_with_tbl():
    address = ir.IntType(64)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [address] * 3), "decode")
    builder = ir.IRBuilder(function.append_basic_block())
    block, line, out = function.args
    codes = decode.codes_of_block(builder, block, halves=False)
    words = decode.LOOKUP["neon"](builder, codes, line)
    decode.store_words(builder, words, out, 2, streaming=False)
    builder.ret_void()
    try:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite has no AArch64 code generator")
    compiled = llvm.parse_assembly(str(module))
    assembly = target.create_target_machine(opt=3).emit_assembly(compiled)
    assert assembly.count("tbl\t") == 4


@pytest.mark.parametrize("order", ["pairs", "halves"])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("shape", [(2, 64, 3), (40, 2), (3, 33, 5), (2, 2, 100, 4), (1, 7), (31, 1), (0, 2), (2, 0, 2)])
def test_transpose(shape, backend, order):
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(0, 256, shape, np.uint8)
    for dtype in DTYPES:
        for span in (slice(None), slice(3, None), slice(5, -7)):
            packed = mxfp4np.MXFP4Array(blocks, scales, order)[..., span]
            expected = oracle(blocks, scales, dtype, order)[..., span].swapaxes(-1, -2)
            assert_same_bits(packed.decode(dtype, transpose=True, backend=backend), expected)
            around = np.full((*expected.shape[:-1], expected.shape[-1] + 4), 7, DTYPES[dtype])
            assert_same_bits(packed.decode(out=around[..., 2:-2], transpose=True, backend=backend), expected)
            assert np.all(around[..., :2] == 7)
            assert np.all(around[..., -2:] == 7)


def test_transpose_needs_two_axes_and_the_transposed_out():
    blocks, scales = np.zeros((4, 3, 16), np.uint8), np.zeros((4, 3), np.uint8)
    assert mxfp4np.decode(blocks, scales, transpose=True).shape == (96, 4)
    with pytest.raises(ValueError, match="two axes or more"):
        mxfp4np.decode(blocks[0], scales[0], transpose=True)
    with pytest.raises(ValueError, match=r"shape \(96, 4\), found \(4, 96\)"):
        mxfp4np.decode(blocks, scales, out=np.zeros((4, 96), np.float32), transpose=True)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_checkpoint_transposes_as_transformers_does(io):
    folder = Path(__file__).parent / "data" / "gpt_oss_hf"
    with np.load(folder / "expected.npz") as golden, mxfp4np.Checkpoint(folder, io=io) as ckpt:
        names = [name.removesuffix("__in_out") for name in golden.files if name.endswith("__in_out")]
        assert names
        for name in names:
            assert np.array_equal(ckpt.get(name, dtype="float32", transpose=True), golden[name + "__in_out"])
            part = ckpt.get(name, dtype="float32", index=np.s_[1, 2:9, 32:], transpose=True)
            assert np.array_equal(part, golden[name + "__in_out"][1, 32:, 2:9])
        bias = ckpt[names[0] + "_bias"]
        assert np.array_equal(ckpt.get(names[0] + "_bias", transpose=True), bias.T)


@given(data=st.data(), streaming=st.booleans(), transpose=st.booleans())
@settings(max_examples=300)
def test_small_pieces_past_the_cache_and_not(data, streaming, transpose):
    """What large arrays go through, on small ones: several threads, odd pieces, streaming stores at any alignment."""
    blocks, scales = data.draw(packed() | packed(max_side=70, max_axes=1))
    order = data.draw(st.sampled_from(["pairs", "halves"]))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    whole = oracle(blocks, scales, dtype, order)
    index = data.draw(indices(whole.shape))
    part, expected = MXFP4Array(blocks, scales, order)[index], whole[index]
    if transpose := transpose and part.ndim > 1:
        expected = expected.swapaxes(-1, -2)
    skew, pad = data.draw(st.sampled_from([0, 1, 2, 16, 32])), data.draw(st.sampled_from([0, 5, 32]))
    shape = (*expected.shape[:-1], expected.shape[-1] + 2 * pad)
    memory = aligned_empty((math.prod(shape) * expected.itemsize + 128,), np.dtype(np.uint8))
    memory[:] = 0x55
    out = memory[skew:][: math.prod(shape) * expected.itemsize].view(expected.dtype).reshape(shape)
    out = out[..., pad : pad + expected.shape[-1]]
    with (
        mock.patch.multiple(launch, **SMALL, CHUNK_BLOCKS=(3, 17)),
        mock.patch.object(cpu, "STREAMING_BYTES", 0 if streaming else sys.maxsize),
    ):
        part.decode(out=out, transpose=transpose, num_threads=data.draw(st.integers(1, 3)))
    assert_same_bits(out, expected)
    out[...] = np.full((), 0x55, np.uint8).repeat(expected.itemsize).view(expected.dtype)[0]
    assert np.all(memory == 0x55), "written outside of out"


@pytest.mark.parametrize("length", [16, 32, 33, 48, 63, 64, 100, 1265, 2880, 9001])
@pytest.mark.parametrize("order", ["pairs", "halves"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length_and_alignment_past_the_cache(dtype, order, length):
    """Rows that follow each other, and rows with gaps."""
    rng = np.random.default_rng(length)
    rows, groups = 60_000 // length, length // 32 + 2
    blocks, scales = rng.integers(0, 256, (rows, groups, 16), np.uint8), rng.integers(0, 255, (rows, groups), np.uint8)
    whole = oracle(blocks, scales, dtype, order)
    for start, skew, gap in itertools.product((0, 1, 16, 31), (0, 2, 31, 32), (0, 7)):
        expected = whole[:, start : start + length]
        memory = aligned_empty((rows * (length + gap) * whole.itemsize + 128,), np.dtype(np.uint8))
        memory[:] = 0x55
        out = memory[skew:][: rows * (length + gap) * whole.itemsize].view(whole.dtype).reshape(rows, length + gap)
        out = out[:, :length]
        part = MXFP4Array(blocks, scales, order)[:, start : start + length]
        with (
            mock.patch.multiple(launch, **SMALL, CHUNK_BLOCKS=(501, 501)),
            mock.patch.object(cpu, "STREAMING_BYTES", 0),
        ):
            part.decode(out=out, num_threads=2)
        assert_same_bits(out, expected)
        out[...] = np.full((), 0x55, np.uint8).repeat(whole.itemsize).view(whole.dtype)[0]
        assert np.all(memory == 0x55), "written outside of out"


def memory_at(offset, shape, strides):
    """Return an array of float16, of strides in elements, whose address is ``offset`` bytes after a cache line's."""
    out = aligned_empty((100_000,), np.dtype(np.uint8))[offset:][:99_000].view(np.float16)
    return np.lib.stride_tricks.as_strided(out, shape, [2 * stride for stride in strides])


@pytest.mark.parametrize(
    ("index", "offset", "strides", "cached", "streamed"),
    [
        (np.s_[:], 0, (128, 1), "decode_rows", "decode_rows"),
        (np.s_[::2, 32:96], 0, (64, 1), "decode_rows", "decode_rows"),
        (np.s_[:], 0, (160, 1), "decode_rows", "decode_rows"),  # rows with gaps, of whole lines
        (np.s_[:], 0, (136, 1), "decode_rows", "decode_any_rows"),  # of a part of a line
        (np.s_[:], 2, (128, 1), "decode_rows", "decode_any_rows"),
        (np.s_[:], 1, (128, 1), "decode_rows", "decode_any_rows"),
        (np.s_[:, 5:], 0, (123, 1), "decode_any_rows", "decode_any_rows"),
        (np.s_[:, :100], 0, (128, 1), "decode_any_rows", "decode_any_rows"),
        (np.s_[:, 5:36], 0, (128, 1), "decode_any_rows", "decode_any_rows"),
        (np.s_[:], 0, (256, 2), "decode_any_rows", "decode_any_rows"),
        (np.s_[:], 0, (1, 32), "decode_columns", "decode_columns"),
        (np.s_[:, 5:], 0, (1, 32), "decode_columns", "decode_columns"),
        (np.s_[:], 0, (1, 20), "decode_columns", None),  # columns of a part of a line are not streamed
    ],
)
def test_the_kernel_follows_from_where_rows_lie(index, offset, strides, cached, streamed):
    """Whole blocks are written directly, if to whole and aligned cache lines or through the cache."""
    rng = np.random.default_rng(0)
    part = MXFP4Array(rng.integers(0, 256, (20, 4, 16), np.uint8), rng.integers(0, 256, (20, 4), np.uint8))[index]
    out = memory_at(offset, part.shape, strides)
    for streaming_bytes, name in ((sys.maxsize, cached), (0, streamed)):
        with (
            mock.patch.object(cpu, "STREAMING_BYTES", streaming_bytes),
            mock.patch.object(launch, "compiled_kernel", wraps=launch.compiled_kernel) as compiled,
        ):
            part.decode(out=out)
        streaming = streaming_bytes == 0 and name is not None
        assert compiled.call_args.args == ("decode", name or cached, 2, False, streaming)
        assert_same_bits(out, oracle(part.blocks, part.scales, "float16")[:, part.start :][:, : part.shape[1]])


@pytest.mark.parametrize(
    "index",
    [np.s_[..., :3], np.s_[:, ::2, :, ::3], np.s_[::2, ::2, ::2, 1:, 5:], np.s_[:, :, ::-1, :3, 40:70], np.s_[0]],
)
def test_arrays_of_more_axes_than_a_job_has(index):
    rng = np.random.default_rng(0)
    shape = (4, 3, 4, 6, 3)
    blocks, scales = rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(0, 256, shape, np.uint8)
    whole = oracle(blocks, scales, "float16")
    part, expected = MXFP4Array(blocks, scales)[index], whole[index]
    assert_same_bits(part.decode("float16"), expected)
    assert_same_bits(part.decode("float16", transpose=True), expected.swapaxes(-1, -2))
    values = rng.standard_normal((4, 3, 4, 6, 96)).astype(np.float16)
    for x in (values[:, ::2, :, ::3], values[::2, ::2, ::2, 1:], values.swapaxes(0, 2)[:, ::2, ::-1]):
        assert_encodes(x, "even")


def test_strides_of_axes_of_one_element_mean_nothing():
    """NumPy calls arrays contiguous whatever these are."""
    blocks, scales = np.arange(5 * 16, dtype=np.uint8).reshape(5, 1, 16), np.arange(125, 130, dtype=np.uint8)[:, None]
    expected = oracle(blocks, scales, "float32")
    odd = np.lib.stride_tricks.as_strided(blocks, strides=(16, 48, 1))
    assert odd.flags.c_contiguous
    assert_same_bits(MXFP4Array(odd, scales[:, ::7]).decode("float32"), expected)
    packed = MXFP4Array(
        np.lib.stride_tricks.as_strided(np.empty_like(blocks), strides=(16, 48, 1)), np.empty_like(scales)
    )
    assert_encodes(expected, "even", out=packed)


def test_addresses():
    memory = np.arange(4096, dtype=np.uint8)
    frozen = memory[7:]
    frozen.flags.writeable = False
    for array in (
        memory,
        frozen,
        memory[::-3],
        memory[:0],
        np.float32(1) + np.zeros((3, 0, 2)),
        memory.view("f2")[5:].T,
    ):
        assert address_of(array) == array.__array_interface__["data"][0]


def test_results_of_every_size_are_aligned():
    for n in (1, 3, 100, 4097):
        assert aligned_empty((n,), np.dtype("f4")).ctypes.data % 64 == 0


@pytest.mark.parametrize(("blocks", "asked", "used"), [(2, 16, 1), (3, 16, 3), (7.5, 16, 8), (7.5, 4, 4), (32, 16, 16)])
def test_as_many_threads_as_there_is_work_for(monkeypatch, blocks, asked, used):
    monkeypatch.setattr(launch, "ALONE_BLOCKS", 1 << 11)
    monkeypatch.setattr(launch, "THREAD_BLOCKS", 1 << 10)
    monkeypatch.setattr(launch, "CHUNK_BLOCKS", (1, 1))
    found, run = [1], pool.Pool.run
    monkeypatch.setattr(pool.Pool, "run", lambda *job: (found.append(job[-1]), run(*job)))
    count = int(blocks * launch.THREAD_BLOCKS)
    codes, scales = np.full((count, 16), 0x22, np.uint8), np.full(count, 127, np.uint8)
    assert np.all(mxfp4np.decode(codes, scales, num_threads=asked) == 1)
    assert found[-1] == used


@given(x=values(max_side=70, max_axes=1), rule=st.sampled_from(sorted(RULES)), threads=st.integers(1, 3))
@settings(max_examples=200)
def test_small_pieces_of_values(x, rule, threads):
    with mock.patch.multiple(launch, **SMALL, CHUNK_BLOCKS=(3, 17)):
        assert_encodes(x, rule, num_threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_number_of_blocks(dtype):
    """Blocks encoded by their bases and by their bounds, one by one and two by two; nothing is written around them."""
    x = np.random.default_rng(0).standard_normal((7, 32 * 70)).astype(DTYPES[dtype])
    x[3, :32], x[4, -32:], x[5, 640:650] = 0, np.nan, 1e-38
    for count in range(1, 71):
        memory = np.full((9, 16 * count + 32), 99, np.uint8)
        blocks = memory[1:-1, 16:-16].reshape(7, count, 16)
        assert np.shares_memory(blocks, memory)
        assert_encodes(x[:, : 32 * count], "even", out=MXFP4Array(blocks, np.empty((7, count), np.uint8)))
        memory[1:-1, 16:-16] = 99
        assert np.all(memory == 99)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [31, 32, 33, 63, 64, 65, 300])
def test_rows_that_are_columns_in_memory(rows, dtype):
    """Groups of 32 rows, the last of which shares rows with the one before, of several matrices, by several threads."""
    x = np.random.default_rng(rows).standard_normal((3, 2, 96, rows + 5)).astype(DTYPES[dtype])
    x[0, 0, :32, 3], x[1, 1, 40:50, 7], x[2, 0, 64:, rows - 1] = 0, np.nan, 1e-38
    before = x.tobytes()
    for part in (x[..., 1 : rows + 1], x[:, ::-1, ::-1, 5:], x[:, 0, :32, :rows]):
        turned = part.swapaxes(-1, -2)
        memory = np.full((*turned.shape[:-1], 2 * turned.shape[-1] // 32, 19), 99, np.uint8)
        out = MXFP4Array(memory[..., ::2, 1:17], memory[..., ::2, 17])
        with mock.patch.multiple(launch, **SMALL, CHUNK_BLOCKS=(200, 200)):
            assert_encodes(turned, "even", out=out, num_threads=2)
        memory[..., ::2, 1:18] = 99
        assert np.all(memory == 99)
    assert x.tobytes() == before
