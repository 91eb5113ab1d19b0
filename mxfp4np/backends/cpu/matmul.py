"""Kernels that multiply packed rows by vectors.

A block is decoded to registers, by a table, and multiplied there: ``sum += value * x`` in float32. The caller has
brought x into the order in which a block's values come out; see `mxfp4np.backends.cpu.activations`.

With activations of 16 bits, x is integers with a factor for each block. Twice a code's value is an integer too, and a
block's sum of products an exact one, of 32 bits: ``sum += factor * 2**(scale - 127) * integer``.

`mxfp4np.backends.cpu.geometry` describes jobs.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .activations import WORD_ORDER
from .decode import HIGH_BYTES, LOW_BYTES, TABLE_LINE, codes_of_block
from .floats import FLOAT, add_sums, load_floats, multiply_add, store_sums, zero_sums
from .geometry import PRODUCT_JOB, READ_BYTES
from .simd import (
    I8,
    I16,
    I32,
    I64,
    byte_lookup,
    call,
    constants,
    inner,
    load,
    offset,
    prefetch,
    repeated,
    shuffle,
    stack_buffer,
    store,
    target_of,
    vector,
)

RECORD = PRODUCT_JOB
"""The record that kernels of this file read."""

STRETCH = 32
"""Blocks whose products are added up from zero, before their sums are added to others: it bounds the rounding error."""


# Float32


def _values(builder, target, block, line):
    """Return the 32 values of a block as float32, in the order of `value_elements`.

    ``line`` is the address of a line of 64 bytes: of `value_table` with AVX-512, else of the table of `decode`.
    """
    if target == "avx512":  # a permutation looks up by the low four bits of its indices
        codes, table = load(builder, block, vector(I32, 4)), load(builder, line, vector(FLOAT, 16), TABLE_LINE)
        codes = shuffle(builder, codes, codes, [*range(4)] * 4)
        shifts = (constants(I32, [first + 4 * (lane // 4) for lane in range(16)]) for first in (0, 16))
        indices = [builder.lshr(codes, shift) for shift in shifts]
        halves = (call(builder, "llvm.x86.avx512.permvar.sf.512", table.type, table, index) for index in indices)
        return shuffle(builder, *halves, range(32))
    codes = codes_of_block(builder, block, halves=True)
    tables = [load(builder, offset(builder, line, at), vector(I8, 16), 16) for at in (LOW_BYTES, HIGH_BYTES)]
    low, high = (byte_lookup(builder, target, table, codes) for table in tables)
    words = shuffle(builder, low, high, [i + byte for i in WORD_ORDER for byte in (0, 32)])
    pairs = builder.bitcast(words, vector(I32, 16))  # of words; a word is the upper half of a float32
    halves = builder.shl(pairs, repeated(16, pairs)), builder.and_(pairs, repeated(0xFFFF0000, pairs))
    return shuffle(builder, *(builder.bitcast(half, vector(FLOAT, 16)) for half in halves), range(32))


@intrinsic(prefer_literal=True)
def multiply_blocks(typingctx, table, block, codes_row, scale, scales_row, x, sums, vectors):
    """Multiply a block of each of some rows by some vectors, and add to the sums; those of a row follow each other."""

    def codegen(context, builder, signature, args):
        table, block, codes_row, scale, scales_row, x, sums, _ = args
        sums, per_row = cgutils.unpack_tuple(builder, sums), vectors.literal_value
        lanes = sums[0].type.count
        rows = []
        for _ in range(len(sums) // per_row):
            number = builder.zext(load(builder, scale, I8), I64)
            line = builder.add(table, builder.mul(number, I64(TABLE_LINE)))
            rows.append(_values(builder, target_of(context), block, line))
            block, scale = builder.add(block, codes_row), builder.add(scale, scales_row)
        for m in range(per_row):
            for first in range(0, 32, lanes):
                factors = load_floats(builder, x, 32 * m + first, lanes)
                for row, values in enumerate(rows):
                    part = shuffle(builder, values, values, range(first, first + lanes))
                    place = row * per_row + m
                    sums[place] = multiply_add(builder, part, factors, sums[place])
        return context.make_tuple(builder, signature.return_type, sums)

    return sums(*[types.int64] * 6, sums, vectors), codegen


def multiply(rows_at_once, vectors, lanes):
    """Return the kernel for float32. A unit is ``rows_at_once`` rows: one or two; an odd last row is taken twice."""
    count, x_step = rows_at_once * vectors, 128 * vectors

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        table, distance, codes_step, scales_step = job.table, job.prefetch_distance, job.codes_step, job.scales_step
        for unit in range(start, stop):
            row = unit * rows_at_once
            another = row + 1 < job.rows
            codes_row, scales_row = another * job.codes_row, another * job.scales_row
            block, scale, x = job.codes + row * job.codes_row, job.scales + row * job.scales_row, job.x
            totals = zero_sums(count, lanes)
            for begin in range(0, job.blocks_per_row, STRETCH):
                sums = zero_sums(count, lanes)
                for g in range(begin, min(begin + STRETCH, job.blocks_per_row)):
                    if g % 4 == 0:
                        prefetch(block + distance)
                        prefetch(scale + distance // 16)
                        if rows_at_once > 1:
                            prefetch(block + codes_row + distance)
                    sums = multiply_blocks(table, block, codes_row, scale, scales_row, x, sums, vectors)
                    block += codes_step
                    scale += scales_step
                    x += x_step
                totals = add_sums(totals, sums)
            values = job.values + row * job.values_row
            store_sums(totals, values, another * job.values_row, job.values_step, vectors)

    return kernel


# Integers of 16 bits


DOUBLED = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
"""Twice the value of each code."""

FACTORS = 256
"""Blocks whose factors are computed together."""

FACTORS_AT_ONCE = 8
"""Factors in a register."""


def _multiplied(builder, target, words, x):
    """Return the sums of products of pairs of words, as integers of 32 bits."""
    if target in ("avx512", "avx2"):
        return call(builder, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), words, x)
    products = builder.mul(builder.sext(words, vector(I32, 16)), builder.sext(x, vector(I32, 16)))
    return builder.add(*(shuffle(builder, products, products, range(begin, 16, 2)) for begin in (0, 1)))


@intrinsic
def multiply_two_blocks(typingctx, block, second, factors, x, sums):
    """Multiply two blocks by integers, and add the products, times a factor for each block, to the sums."""

    def codegen(context, builder, signature, args):
        target, (block, second, factors, x, sums) = target_of(context), args
        (sums,) = cgutils.unpack_tuple(builder, sums)
        both = shuffle(builder, *(load(builder, address, vector(I8, 16)) for address in (block, second)), range(32))
        total = None
        for nibbles in (builder.and_(both, repeated(15, both)), builder.lshr(both, repeated(4, both))):
            values = byte_lookup(builder, target, constants(I8, DOUBLED), nibbles)
            for first in (0, 8):  # of each block: the values, times 256, as words
                places = [lane + first + i for lane in (0, 16) for i in range(8)]
                words = shuffle(builder, repeated(0, values), values, [i + byte for i in places for byte in (0, 32)])
                words = builder.bitcast(words, vector(I16, 16))
                products = _multiplied(builder, target, words, load(builder, x, vector(I16, 16), 32))
                total = products if total is None else builder.add(total, products)
                x = offset(builder, x, 32)
        pair = load(builder, factors, vector(FLOAT, 2), 4)
        pair = shuffle(builder, pair, pair, [0] * 4 + [1] * 4)
        sums = multiply_add(builder, builder.sitofp(total, vector(FLOAT, 8)), pair, sums)
        return context.make_tuple(builder, signature.return_type, [sums])

    return sums(*[types.int64] * 4, sums), codegen


@intrinsic(prefer_literal=True)
def store_factors(typingctx, scales, factors, target, count):
    """Multiply factors by 2**(scale - 127), for ``count`` scales. A scale of 255 gives infinity, not NaN."""

    def codegen(context, builder, signature, args):
        scales, factors, target, _ = args
        lanes = count.literal_value
        bits = builder.zext(load(builder, scales, vector(I8, lanes)), vector(I32, lanes))
        bits = builder.shl(bits, repeated(23, bits))
        least = repeated(1 << 22, bits)  # 2**-127
        bits = builder.select(builder.icmp_unsigned(">", bits, least), bits, least)
        powers = builder.bitcast(bits, vector(FLOAT, lanes))
        store(builder, builder.fmul(powers, load(builder, factors, powers.type, 4)), target)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, count), codegen


@inner
def factors_of_stretch(scale, scales_step, factors, count, target):
    """Write the factors of ``count`` blocks, and a zero after them."""
    if scales_step == 1 and count >= FACTORS_AT_ONCE:
        for begin in range(0, count, FACTORS_AT_ONCE):
            g = min(begin, count - FACTORS_AT_ONCE)
            store_factors(scale + g, factors + 4 * g, target + 4 * g, FACTORS_AT_ONCE)
    else:
        for g in range(count):
            store_factors(scale + g * scales_step, factors + 4 * g, target + 4 * g, 1)
    store_zero(target + 4 * count)


@intrinsic
def store_zero(typingctx, address):
    """Write a float32 of 0."""

    def codegen(context, builder, signature, args):
        store(builder, FLOAT(0.0), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def multiply_integers(adjacent):
    """Return the kernel for one vector of integers. A unit is a row; whether its blocks are adjacent is a constant."""
    buffer_bytes = 4 * (FACTORS + 1)

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        buffer, scales_step, distance = stack_buffer(buffer_bytes), job.scales_step, job.prefetch_distance
        codes_step = 16 if adjacent else job.codes_step
        for row in range(start, stop):
            block, scale = job.codes + row * job.codes_row, job.scales + row * job.scales_row
            factors, x = job.factors, job.x
            sums = zero_sums(1, 8)
            for begin in range(0, job.blocks_per_row, FACTORS):
                count, factor = min(FACTORS, job.blocks_per_row - begin), buffer
                factors_of_stretch(scale, scales_step, factors, count, buffer)
                for _ in range(count // 4):
                    prefetch(block + distance)
                    prefetch(scale + distance // 16)
                    sums = multiply_two_blocks(block, block + codes_step, factor, x, sums)
                    block += 2 * codes_step
                    sums = multiply_two_blocks(block, block + codes_step, factor + 8, x + 128, sums)
                    block += 2 * codes_step
                    factor += 16
                    x += 256
                for g in range(0, count % 4, 2):  # of an odd last block, the second one is itself, with a factor of 0
                    second = block + codes_step * (g + 1 < count % 4)
                    sums = multiply_two_blocks(block, second, factor, x, sums)
                    block += 2 * codes_step
                    factor += 8
                    x += 128
                scale += FACTORS * scales_step
                factors += 4 * FACTORS
            store_sums(sums, job.values + row * job.values_row, 0, 0, 1)

    return kernel


# The limit of a product of one vector: reading the same bytes, and multiplying nothing


@intrinsic
def read_bytes(typingctx, address, sums):
    """Load `READ_BYTES` bytes, and mix their bits into a vector."""

    def codegen(context, builder, signature, args):
        (mixed,) = cgutils.unpack_tuple(builder, args[1])
        loaded = load(builder, args[0], vector(I32, 32))
        mixed = builder.bitcast(builder.xor(builder.bitcast(mixed, loaded.type), loaded), mixed.type)
        return context.make_tuple(builder, signature.return_type, [mixed])

    return sums(types.int64, sums), codegen


def read():
    """Return the kernel that reads codes. A unit is `READ_BYTES` bytes; ``job.values`` has room for one of any bits."""

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        mixed, address = zero_sums(1, 32), job.codes + start * READ_BYTES
        for _ in range(start, stop):
            prefetch(address + job.prefetch_distance)
            prefetch(address + job.prefetch_distance + 64)
            mixed = read_bytes(address, mixed)
            address += READ_BYTES
        store_sums(mixed, job.values, 0, 0, 1)

    return kernel
