"""Kernels that encode: from rows, and from columns (transposed values).

They compute the scale of a block from the largest magnitude in it, by the caller's rule. The code of a value is that of
the E2M1 number nearest to value / 2**(scale - 127), ties to even.

Magnitudes are compared by their bits, as integers, which have the same order. A float32 is narrowed to its upper 16
bits, a bfloat16, whose last bit is set if any of the lower 16 bits is (a sticky bit). This moves no value onto or
across a bound, since bounds of scales and codes have at most three significant bits. So a block is 32 words of 16 bits.

The table for a dtype and a rule begins with the scale for each largest magnitude: 2**15 bytes, indexed by its lower 15
bits. Then follows a line of 16 bytes for each scale: for each code from 0 to 6 the largest word that has it, and the
base.

With a base, codes take few instructions. All bounds of codes lie at quarters of a binade, and d counts quarters from
the smallest bound. M is the number of mantissa bits; `tie` is bit M - 1 of the word, set at those bounds that round up:

    d = max(0, 2 * word + tie - base) >> (M - 1),   base = 2 * (word of 0.25 * 2**(scale - 127)) - 2**(M - 1) + 1

    d                           0     1 to 6   7 to 9   10, 11   12, 13   14, 15   16, 17   18 to 20
    value / 2**(scale - 127)    0     0.25     0.75     1.25     1.75     2.5      3.5      5           and more
    code                        0     1        2        3        4        5        6        7

The base is 0 where a bound is subnormal: words are then compared with all seven bounds.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from numba import carray, types
from numba.extending import intrinsic

from .decode import row_addresses
from .geometry import GROUP_ROWS, JOB
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
    inner,
    load,
    load_uint8,
    load_uint16,
    offset,
    prefetch,
    repeated,
    shuffle,
    stack_buffer,
    store,
    store_uint8,
    target_of,
    transpose,
    vector,
)

RECORD = JOB
"""The record that kernels of this file read."""

SCALES, LINE, BASE = 1 << 15, 16, 14  # sizes of the scales and of a line in bytes; offset of the base in a line

CODES_FROM_5 = 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7
"""The codes of d = 5 to 20. The code of d = 1 to 4 is that of 5."""


def load_words(builder, address, itemsize):
    """Return 32 values as words."""
    if itemsize == 2:
        return load(builder, address, vector(I16, 32))
    values = load(builder, address, vector(I32, 32))
    rest = builder.and_(values, repeated(0xFFFF, values))
    rest = call(builder, "llvm.umin.v32i32", rest.type, rest, repeated(1, rest))
    return builder.trunc(builder.or_(builder.lshr(values, repeated(16, values)), rest), vector(I16, 32))


@intrinsic(prefer_literal=True)
def narrow_block(typingctx, values, target, itemsize):
    """Narrow 32 values to words."""

    def codegen(context, builder, signature, args):
        store(builder, load_words(builder, args[0], itemsize.literal_value), args[1], 64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, itemsize), codegen


@intrinsic
def largest_magnitude(typingctx, words):
    """Return the largest of 32 words without their signs."""

    def codegen(context, builder, signature, args):
        words = load(builder, args[0], vector(I16, 32))
        words = builder.and_(words, repeated(0x7FFF, words))
        largest = call(builder, "llvm.vector.reduce.umax.v32i16", I16, words)
        return builder.zext(largest, args[0].type)

    return types.int64(types.int64), codegen


def store_codes(builder, codes, address):
    """Store 32 codes, a byte each, as a block of 16 bytes."""
    pairs = builder.bitcast(codes, vector(I16, 16))
    pairs = builder.or_(pairs, builder.lshr(pairs, repeated(4, pairs)))
    store(builder, builder.trunc(pairs, vector(I8, 16)), address)


@intrinsic
def encode_by_base(typingctx, words, base, block, mantissa_bits):
    """Write the codes of 32 words by the base of their scale."""

    def codegen(context, builder, signature, args):
        words, base, block, mantissa_bits = args
        words = load(builder, words, vector(I16, 32))
        shift = broadcast(builder, builder.sub(builder.trunc(mantissa_bits, I16), I16(1)), 32)
        tie = builder.and_(builder.lshr(words, shift), repeated(1, words))
        doubled = builder.or_(builder.add(words, words), tie)  # doubling shifts the sign out
        steps = call(builder, "llvm.usub.sat.v32i16", words.type, doubled, broadcast(builder, base, 32))
        steps = builder.trunc(builder.lshr(steps, shift), vector(I8, 32))
        codes = call(builder, "llvm.usub.sat.v32i8", steps.type, steps, repeated(5, steps))
        codes = byte_lookup(builder, target_of(context), constants(I8, CODES_FROM_5), codes)
        codes = call(builder, "llvm.umin.v32i8", codes.type, codes, steps)  # 0 for d = 0; no change otherwise
        bytes_ = builder.bitcast(words, vector(I8, 64))
        signs = shuffle(builder, bytes_, bytes_, range(1, 64, 2))
        is_negative = builder.icmp_signed("<", signs, repeated(0, signs))
        codes = builder.select(is_negative, builder.or_(codes, repeated(8, codes)), codes)
        store_codes(builder, codes, block)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint16, types.int64, types.int64), codegen


@intrinsic
def encode_by_bounds(typingctx, words, line, block):
    """Write the codes of 32 words by a line of the table."""

    def codegen(context, builder, signature, args):
        words = load(builder, args[0], vector(I16, 32))
        magnitudes = builder.and_(words, repeated(0x7FFF, words))
        codes = builder.and_(builder.lshr(words, repeated(12, words)), repeated(8, words))
        for code in range(7):
            bound = broadcast(builder, load(builder, offset(builder, args[1], 2 * code), I16, 2), 32)
            codes = builder.add(codes, builder.zext(builder.icmp_signed(">", magnitudes, bound), codes.type))
        store_codes(builder, builder.trunc(codes, vector(I8, 32)), args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


BATCH = 64
"""Blocks that are gathered, or narrowed to words, at a time."""

LAG = 8
"""Blocks between the one that gets its scale and the one that gets its codes, which need the scale and would wait."""


@inner
def encode_words(job, words, count, codes, codes_step, scales, scales_step, following):
    """Encode ``count`` contiguous blocks of words. Codes and scales of successive blocks lie a step apart.

    ``following`` is the address of the values that are encoded next. 64 bytes are prefetched for each block, which is
    half of a float32 block: on Intel (Emerald Rapids) encoding becomes 1.4 times as fast; on AMD (Zen 4) prefetching
    whole blocks would make it 0.6 times as fast.
    """
    table, mantissa_bits = job.table, job.mantissa_bits
    for i in range(count + LAG):
        if i < count:
            prefetch(following + 64 * i)
            store_uint8(load_uint8(table + largest_magnitude(words + 64 * i)), scales + i * scales_step)
        if i >= LAG:
            j = i - LAG
            line = table + SCALES + LINE * load_uint8(scales + j * scales_step)
            base = load_uint16(line + BASE)
            if base:
                encode_by_base(words + 64 * j, base, codes + j * codes_step, mantissa_bits)
            else:
                encode_by_bounds(words + 64 * j, line, codes + j * codes_step)


def encode_rows(itemsize):
    """Return the kernel that encodes rows. A unit is one block."""
    block_bytes = 32 * itemsize
    values_bytes, words_bytes = BATCH * block_bytes, BATCH * 64

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        gathered, narrowed = stack_buffer(values_bytes), stack_buffer(words_bytes)
        unit = start
        while unit < stop:
            row, g = divmod(unit, job.blocks_per_row)
            codes, scales, values = row_addresses(job, row)
            count = min(BATCH, stop - unit, job.blocks_per_row - g)
            source = values + 32 * g * job.values_step
            if job.values_step != itemsize:
                for i in range(32 * count):
                    copy_bytes(source + i * job.values_step, gathered + i * itemsize, itemsize, False)
                source = gathered
            if itemsize == 4:
                for i in range(count):
                    narrow_block(source + i * block_bytes, narrowed + i * 64, itemsize)
                source = narrowed
            encode_words(
                job,
                source,
                count,
                codes + g * job.codes_step,
                job.codes_step,
                scales + g * job.scales_step,
                job.scales_step,
                values + 32 * (g + count) * job.values_step,
            )
            unit += count

    return kernel


@intrinsic
def transpose_words(typingctx, words, stride, target):
    """Transpose a matrix of 32 by 32 words, whose rows lie ``stride`` bytes apart."""

    def codegen(context, builder, signature, args):
        words, stride, target = args
        runs = []
        for _ in range(32):
            runs.append([load(builder, offset(builder, words, 16 * part), vector(I16, 8)) for part in range(4)])
            words = builder.add(words, stride)
        for part in range(4):
            vectors = []
            for i in range(8):
                first, second = (shuffle(builder, runs[i + j][part], runs[i + j + 8][part], range(16)) for j in (0, 16))
                vectors.append(shuffle(builder, first, second, range(32)))
            for i, block in enumerate(transpose(builder, vectors)):
                store(builder, block, offset(builder, target, 64 * (8 * part + i)), 64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def encode_columns(itemsize):
    """Return the kernel that encodes transposed values, whose ``values_row`` is ``itemsize``, of 32 rows or more.

    A unit is one block of each row in a group of `GROUP_ROWS` rows.
    """
    tile_bytes, words_bytes = 32 * itemsize, 32 * 64

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        narrowed, words = stack_buffer(words_bytes), stack_buffer(words_bytes)
        groups = (job.rows + GROUP_ROWS - 1) // GROUP_ROWS
        for unit in range(start, stop):
            group, g = divmod(unit, job.blocks_per_row)
            matrix, group = divmod(group, groups)
            for top in range(GROUP_ROWS * group, min(job.rows, GROUP_ROWS * (group + 1)), 32):
                first = min(top, job.rows - 32)  # the last tile may encode rows again
                codes, scales, values = row_addresses(job, matrix * job.rows + first)
                values += 32 * g * job.values_step
                for i in range(32, 64):
                    for at in range(0, tile_bytes, SIZE_OF_CACHE_LINE):
                        prefetch(values + i * job.values_step + at)
                if itemsize == 4:
                    for i in range(32):
                        narrow_block(values + i * job.values_step, narrowed + 64 * i, itemsize)
                    transpose_words(narrowed, 64, words)
                else:
                    transpose_words(values, job.values_step, words)
                codes += g * job.codes_step
                scales += g * job.scales_step
                # Values are prefetched above: what is passed as following is in the cache already.
                encode_words(job, words, 32, codes, job.codes_row, scales, job.scales_row, words)

    return kernel
