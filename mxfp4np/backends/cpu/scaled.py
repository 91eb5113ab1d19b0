"""Kernels that decode elements with scales: FP8, MXFP8, NVFP4. They share the loops of `decode`.

They compute value = code * factor in float32, rounded to the output's dtype. 32 codes at a time become float16 numbers,
which processors widen to float32: E5M2 is the upper byte of a float16, E4M3 is one shifted, 256 times too small, and
the codes of E2M1 are looked up as E5M2. Factors are float32, or bytes for which a table has them. Or a table has the
results, as `mxfp4np.backends.cpu.lookup` says.

A unit is a block of 32 elements, at the end of a row perhaps fewer. `mxfp4np.backends.cpu.geometry` describes jobs.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

import math

from llvmlite import ir
from numba import carray, float32, types
from numba.extending import intrinsic

from .decode import BATCH, codes_of_block, row_addresses, scatter
from .geometry import COLUMN_ROWS, SCALED_JOB
from .lookup import by_lines
from .simd import (
    I8,
    I16,
    I32,
    SIZE_OF_CACHE_LINE,
    broadcast,
    byte_lookup,
    call,
    constants,
    copy_bytes,
    copy_run,
    inner,
    load,
    load_float32,
    load_uint8,
    prefetch,
    repeated,
    shuffle,
    stack_buffer,
    store,
    store_fence,
    target_of,
    vector,
)

RECORD = SCALED_JOB
"""The record that kernels of this file read."""

HALF, FLOAT = ir.HalfType(), ir.FloatType()


E2M1_AS_E5M2 = [sign | code for sign in (0, 0x80) for code in (0, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46)]
"""The upper byte of the float16 of each code."""


def _halves(builder, target, address, element):
    """Return 32 codes as float16 numbers, those of E4M3 divided by 256."""
    if element == "E2M1":
        codes = codes_of_block(builder, address, halves=False)
        codes = byte_lookup(builder, target, constants(I8, E2M1_AS_E5M2), codes)
    else:
        codes = load(builder, address, vector(I8, 32))
    words = builder.sext(codes, vector(I16, 32))
    if element != "E4M3":
        words = builder.shl(words, repeated(8, words))
    else:  # the sign goes to bits 15 and 14, of which the latter is cleared
        words = builder.and_(builder.shl(words, repeated(7, words)), repeated(0xBFFF, words))
        is_nan = builder.icmp_unsigned("==", builder.or_(codes, repeated(0x80, codes)), repeated(0xFF, codes))
        words = builder.or_(words, builder.select(is_nan, repeated(0x7E00, words), repeated(0, words)))
    return builder.bitcast(words, vector(HALF, 32))


def _rounded(builder, target, values, dtype):
    """Return 32 float32 numbers as elements of a dtype, rounded to nearest even; NaN must have zeros for low bits."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return _as_float16(builder, target, values)
    bits = builder.bitcast(values, vector(I32, 32))
    even = builder.and_(builder.lshr(bits, repeated(16, bits)), repeated(1, bits))
    bits = builder.add(builder.add(bits, repeated(0x7FFF, bits)), even)
    words = builder.bitcast(bits, vector(I16, 64))
    return shuffle(builder, words, words, range(1, 64, 2))


def _as_float16(builder, target, values):
    """Return float16 numbers as words: LLVM would not stream vectors of float16."""
    if target == "neon":
        return builder.fptrunc(values, vector(HALF, 32))
    width = 16 if target == "avx512" else 8
    parts = [shuffle(builder, values, values, range(begin, begin + width)) for begin in range(0, 32, width)]
    if target == "avx512":
        rest = ir.Constant(vector(I16, 16), ir.Undefined), I16(-1)
        words = [call(builder, "llvm.x86.avx512.mask.vcvtps2ph.512", vector(I16, 16), x, I32(0), *rest) for x in parts]
    else:
        words = [call(builder, "llvm.x86.vcvtps2ph.256", vector(I16, 8), x, I32(0)) for x in parts]
    while len(words) > 1:
        lanes = range(2 * words[0].type.count)
        words = [shuffle(builder, *words[i : i + 2], lanes) for i in range(0, len(words), 2)]
    return words[0]


MOST = 2.0**119
"""Up to this magnitude, 256 times a factor is finite."""


@intrinsic(prefer_literal=True)
def decode_elements(typingctx, codes, first, second, values, element, dtype, small, streaming):
    """Decode 32 elements, the first half of them multiplied by one factor and the second by another.

    With ``small``, the magnitudes of both factors are at most `MOST`. Streaming stores need elements aligned
    to a cache line.
    """

    def codegen(context, builder, signature, args):
        is_small, is_streaming, target = small.literal_value, streaming.literal_value, target_of(context)
        numbers = builder.fpext(_halves(builder, target, args[0], element.literal_value), vector(FLOAT, 32))
        factors = args[1:3]
        if element.literal_value == "E4M3" and is_small:
            factors = [builder.fmul(factor, FLOAT(256.0)) for factor in factors]
        elif element.literal_value == "E4M3":
            numbers = builder.fmul(numbers, repeated(256.0, numbers))
        factors = shuffle(builder, *(broadcast(builder, factor, 16) for factor in factors), range(32))
        numbers = _rounded(builder, target, builder.fmul(numbers, factors), dtype.literal_value)
        store(builder, numbers, args[3], SIZE_OF_CACHE_LINE if is_streaming else 1, streaming=is_streaming)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32, types.int64, element, dtype, small, streaming), codegen


@inner
def is_small(factor):
    """Tell whether a factor is small enough to be multiplied by 256."""
    return abs(factor) <= MOST


def by_factors(element, dtype, has_table, streaming):
    """Return the functions that find the factor of the scale at an address, and decode a block by those of its halves.

    With ``has_table``, a scale is a byte for which the table has a factor; otherwise, a factor.
    """
    if has_table:

        @inner
        def find(job, address):
            return load_float32(job.table + 4 * load_uint8(address))

    else:

        @inner
        def find(job, address):
            value = load_float32(address)
            return float32(math.nan) if math.isnan(value) else value  # NaN whose low bits are zeros

    @inner
    def decode(block, one, other, values):
        if is_small(one) and is_small(other):
            decode_elements(block, one, other, values, element, dtype, True, streaming)
        else:
            decode_elements(block, one, other, values, element, dtype, False, streaming)

    return find, decode


def methods(element, dtype, has_table, has_lines, streaming):
    """Return the functions of `by_lines` or of `by_factors`."""
    return by_lines(element, has_table, streaming) if has_lines else by_factors(element, dtype, has_table, streaming)


def decode_scaled_rows(element, dtype, has_table, has_lines, streaming):
    """Return the kernel that decodes to rows of whole blocks with contiguous elements.

    Streaming needs rows that are aligned to cache lines.
    """
    find, decode = methods(element, dtype, has_table, has_lines, streaming)
    codes_step, values_step = 16 if element == "E2M1" else 32, 128 if dtype == "float32" else 64

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        per_scale, scales_step, distance = job.blocks_per_scale, job.scales_step, job.prefetch_distance
        unit = start
        while unit < stop:
            row, begin = divmod(unit, job.blocks_per_row)
            end = min(job.blocks_per_row, begin + stop - unit)
            block, scale, value = row_addresses(job, row)
            block += begin * codes_step
            value += begin * values_step
            if per_scale == 0:  # 16 elements
                scale += 2 * begin * scales_step
                for _ in range(begin, end):
                    prefetch(block + distance)
                    decode(block, find(job, scale), find(job, scale + scales_step), value)
                    block += codes_step
                    scale += 2 * scales_step
                    value += values_step
            else:
                group, within = divmod(job.first_block + begin, per_scale)
                scale += group * scales_step
                g = begin
                while g < end:
                    same = min(end, g + per_scale - within)
                    one = find(job, scale)
                    for _ in range(g, same):
                        prefetch(block + distance)
                        decode(block, one, one, value)
                        block += codes_step
                        value += values_step
                    scale += scales_step
                    within = 0
                    g = same
            unit += end - begin
        if streaming:
            store_fence()

    return kernel


def block_decoder(element, dtype, has_table, has_lines):
    """Return the function that decodes block ``g`` of a row to 32 elements, and reads nothing beyond the row."""
    find, decode = methods(element, dtype, has_table, has_lines, False)
    codes_step = 16 if element == "E2M1" else 32

    @inner
    def decode_one(job, codes, scales, g, values):
        if job.blocks_per_scale == 0:
            scale = scales + 2 * g * job.scales_step
            one = find(job, scale)
            other = find(job, scale + job.scales_step) if 32 * g + 16 < job.skip + job.length else one
        else:
            one = find(job, scales + (job.first_block + g) // job.blocks_per_scale * job.scales_step)
            other = one
        block, left = codes + g * codes_step, job.row_bytes - g * codes_step
        if left < codes_step:
            padded = stack_buffer(32)
            copy_run(block, padded, left, False)
            block = padded
        decode(block, one, other, values)

    return decode_one


def decode_scaled_any_rows(element, dtype, has_table, has_lines, streaming):
    """Return the kernel for rows that begin or end inside a block, or have any strides."""
    decode_one = block_decoder(element, dtype, has_table, has_lines)
    block_bytes = 128 if dtype == "float32" else 64
    buffer_bytes = BATCH * block_bytes

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        buffer = stack_buffer(buffer_bytes)
        unit = start
        while unit < stop:
            row, begin = divmod(unit, job.blocks_per_row)
            end = min(job.blocks_per_row, begin + stop - unit, begin + BATCH)
            codes, scales, values = row_addresses(job, row)
            for g in range(begin, end):
                decode_one(job, codes, scales, g, buffer + (g - begin) * block_bytes)
            scatter(job, buffer, begin, end, values, streaming)
            unit += end - begin
        if streaming:
            store_fence()

    return kernel


def decode_scaled_columns(element, dtype, has_table, has_lines):
    """Return the kernel that decodes to transposed values.

    A unit is one block of each row in a group of `COLUMN_ROWS`.
    """
    decode_one = block_decoder(element, dtype, has_table, has_lines)
    size = 4 if dtype == "float32" else 2
    buffer_bytes = COLUMN_ROWS * 32 * size

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        buffer = stack_buffer(buffer_bytes)
        groups = (job.rows + COLUMN_ROWS - 1) // COLUMN_ROWS
        for unit in range(start, stop):
            group, g = divmod(unit, job.blocks_per_row)
            matrix, group = divmod(group, groups)
            rows = min(COLUMN_ROWS, job.rows - COLUMN_ROWS * group)
            first_row = matrix * job.rows + COLUMN_ROWS * group
            for row in range(rows):
                codes, scales, _ = row_addresses(job, first_row + row)
                decode_one(job, codes, scales, g, buffer + row * 32 * size)
            _, _, values = row_addresses(job, first_row)
            for i in range(max(0, 32 * g - job.skip), min(job.length, 32 * (g + 1) - job.skip)):
                source, target = buffer + (job.skip + i - 32 * g) * size, values + i * job.values_step
                for _ in range(rows):
                    copy_bytes(source, target, size, False)
                    source += 32 * size
                    target += job.values_row

    return kernel


# The limit of decoding: the loop of `decode_scaled_rows`, moving the same bytes without computing anything


@intrinsic(prefer_literal=True)
def move_elements(typingctx, codes, values, codes_step, itemsize):
    """Load the bytes of 32 codes, and stream 32 elements that are made of them."""

    def codegen(context, builder, signature, args):
        count = codes_step.literal_value
        loaded = load(builder, args[0], vector(I8, count))
        made = shuffle(builder, loaded, loaded, [i % count for i in range(32 * itemsize.literal_value)])
        store(builder, made, args[1], SIZE_OF_CACHE_LINE, streaming=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, codes_step, itemsize), codegen


def move_scaled(codes_step, itemsize):
    """Return the kernel that streams meaningless bytes to one contiguous row."""

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        block, value = job.codes + start * codes_step, job.values + start * 32 * itemsize
        for _ in range(start, stop):
            prefetch(block + job.prefetch_distance)
            move_elements(block, value, codes_step, itemsize)
            block += codes_step
            value += 32 * itemsize
        store_fence()

    return kernel
