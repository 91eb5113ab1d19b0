"""Kernels that decode: to rows, and to columns (transposed values).

They compute value = E2M1[code] * 2**(scale - 127), rounded to the output's dtype. There are 16 codes and 256 scales:
a table holds all values. It has a line of 64 bytes for each scale: the 16 values as words of 16 bits, then their low
bytes, then their high bytes. On most processors, one byte shuffle looks up 16 or more bytes in 16 entries. Words are
bfloat16 or float16. A float32 is the bfloat16 with 16 zero bits below: values have two significant bits.

`mxfp4np.backends.cpu.geometry` describes jobs and units. A kernel is made by a function whose arguments are constants
in the compiled code. It processes units ``start`` to ``stop - 1`` of a job. The driver has checked everything.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .geometry import GROUP_ROWS, JOB
from .simd import (
    I8,
    I16,
    I32,
    I64,
    SIZE_OF_CACHE_LINE,
    broadcast,
    byte_lookup,
    call,
    copy_bytes,
    copy_run,
    inner,
    load,
    load_uint8,
    offset,
    prefetch,
    repeated,
    shuffle,
    stack_buffer,
    store,
    store_fence,
    store_uint8,
    target_of,
    transpose,
    vector,
)

TABLE_LINE, LOW_BYTES, HIGH_BYTES = 64, 32, 48

RECORD = JOB
"""The record that kernels of this file read."""


# One block: each of its 32 codes is looked up in the table's line for its scale


def lookup_avx512(builder, codes, line):
    """Look up 32 words with one permutation of words."""
    table = load(builder, line, vector(I16, 16), TABLE_LINE)
    table = shuffle(builder, table, table, [i % 16 for i in range(32)])
    indices = builder.zext(codes, vector(I16, 32))
    return call(builder, "llvm.x86.avx512.permvar.hi.512", indices.type, table, indices)


def lookup_by_bytes(target):
    """Return a function that looks up the low and high bytes of 32 words by byte shuffles, and interleaves them."""

    def lookup(builder, codes, line):
        tables = [load(builder, offset(builder, line, at), vector(I8, 16), 16) for at in (LOW_BYTES, HIGH_BYTES)]
        low, high = (byte_lookup(builder, target, table, codes) for table in tables)
        return builder.bitcast(shuffle(builder, low, high, [i // 2 + i % 2 * 32 for i in range(64)]), vector(I16, 32))

    return lookup


def lookup_portable(builder, codes, line):
    """Look up 32 words one by one."""
    words = ir.Constant(vector(I16, 32), ir.Undefined)
    for i in range(32):
        code = builder.zext(builder.extract_element(codes, I32(i)), I64)
        word = load(builder, builder.add(line, builder.shl(code, I64(1))), I16, 2)
        words = builder.insert_element(words, word, I32(i))
    return words


LOOKUP = {
    "avx512": lookup_avx512,
    "avx2": lookup_by_bytes("avx2"),
    "ssse3": lookup_by_bytes("ssse3"),
    "neon": lookup_by_bytes("neon"),
    "portable": lookup_portable,
}


def codes_of_block(builder, block, *, halves):
    """Return the 32 codes of the block at an address, one code per byte."""
    both = load(builder, block, vector(I8, 16))
    low, high = builder.and_(both, repeated(15, both)), builder.lshr(both, repeated(4, both))
    return shuffle(builder, low, high, range(32) if halves else [i // 2 + i % 2 * 16 for i in range(32)])


def store_words(builder, words, address, itemsize, *, streaming):
    """Store 32 words of the table as elements of 2 or 4 bytes."""
    if itemsize == 4:
        words = builder.zext(words, vector(I32, 32))
        words = builder.shl(words, repeated(16, words))
    store(builder, words, address, SIZE_OF_CACHE_LINE if streaming else 1, streaming=streaming)


@intrinsic(prefer_literal=True)
def decode_block(typingctx, block, line, values, itemsize, halves, streaming):
    """Decode a block to 32 elements by a line of the table. Streaming stores need elements aligned to a cache line."""

    def codegen(context, builder, signature, args):
        codes = codes_of_block(builder, args[0], halves=halves.literal_value)
        words = LOOKUP[target_of(context)](builder, codes, args[1])
        store_words(builder, words, args[2], itemsize.literal_value, streaming=streaming.literal_value)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, itemsize, halves, streaming), codegen


# To rows of whole blocks


@inner
def row_addresses(job, row):
    """Return the addresses of the codes, scales and values of a row; rows are numbered over all matrices."""
    matrix = row // job.rows
    row -= matrix * job.rows
    return (
        job.codes + matrix * job.codes_matrix + row * job.codes_row,
        job.scales + matrix * job.scales_matrix + row * job.scales_row,
        job.values + matrix * job.values_matrix + row * job.values_row,
    )


def decode_rows(itemsize, halves, streaming):
    """Return the kernel that decodes to rows of whole blocks with contiguous elements. A unit is one block.

    Streaming needs rows that are aligned to cache lines.
    """

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        table, distance, codes_step, scales_step = job.table, job.prefetch_distance, job.codes_step, job.scales_step
        unit = start
        while unit < stop:
            row, begin = divmod(unit, job.blocks_per_row)
            end = min(job.blocks_per_row, begin + stop - unit)
            codes, scales, values = row_addresses(job, row)
            block, scale = codes + begin * codes_step, scales + begin * scales_step
            value = values + 32 * begin * itemsize
            for g in range(begin, end):
                if g % 4 == 0:
                    prefetch(block + distance)
                decode_block(block, table + TABLE_LINE * load_uint8(scale), value, itemsize, halves, streaming)
                block += codes_step
                scale += scales_step
                value += 32 * itemsize
            unit += end - begin
        if streaming:
            store_fence()

    return kernel


# To rows of any kind: blocks are decoded to a buffer, and those elements that the output has are copied from there

BATCH = 64
"""Blocks in the buffer."""


@inner
def scatter(job, buffer, begin, end, values, streaming):
    """Copy from a buffer those elements of blocks ``begin`` to ``end - 1`` of a row that the output has."""
    first, last = max(0, 32 * begin - job.skip), min(job.length, 32 * end - job.skip)
    source, size = buffer + (job.skip + first - 32 * begin) * job.itemsize, job.itemsize
    if job.values_step == size:
        copy_run(source, values + first * size, (last - first) * size, streaming)
    else:
        for i in range(first, last):
            if size == 2:  # `copy_bytes` takes its size as a literal
                copy_bytes(source, values + i * job.values_step, 2, False)
            else:
                copy_bytes(source, values + i * job.values_step, 4, False)
            source += size


def decode_any_rows(itemsize, halves, streaming):
    """Return the kernel for rows that begin or end inside a block, or have any strides. A unit is one block."""
    block_bytes, buffer_bytes = 32 * itemsize, BATCH * 32 * itemsize

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        buffer = stack_buffer(buffer_bytes)
        unit = start
        while unit < stop:
            row, begin = divmod(unit, job.blocks_per_row)
            end = min(job.blocks_per_row, begin + stop - unit, begin + BATCH)
            codes, scales, values = row_addresses(job, row)
            for g in range(begin, end):
                block = codes + g * job.codes_step
                line = job.table + TABLE_LINE * load_uint8(scales + g * job.scales_step)
                prefetch(block + job.prefetch_distance)
                decode_block(block, line, buffer + (g - begin) * block_bytes, itemsize, halves, False)
            scatter(job, buffer, begin, end, values, streaming)
            unit += end - begin
        if streaming:
            store_fence()

    return kernel


# To columns: the bytes of 32 rows are transposed, so that a vector has one byte of each row's block. Rows differ in
# their scales: values are looked up for scale 127, and scale - 127 is added to their exponents. Where that would not
# give normal numbers, and at the edges, blocks are decoded one by one.


@intrinsic
def transpose_codes(typingctx, block, row_stride, target):
    """Transpose the blocks of 32 rows: byte ``i`` of all of them becomes 32 bytes at ``target + i * GROUP_ROWS``."""

    def codegen(context, builder, signature, args):
        block, row_stride, target = args
        rows = []
        for _ in range(32):
            rows.append(load(builder, block, vector(I8, 16)))
            block = builder.add(block, row_stride)
        pairs = [shuffle(builder, rows[i], rows[i + 16], range(32)) for i in range(16)]
        for i, column in enumerate(transpose(builder, pairs)):
            store(builder, column, offset(builder, target, i * GROUP_ROWS), 32)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def decode_two_columns(typingctx, codes, exponents, line, low, high, itemsize, streaming):
    """Decode the low nibbles of 32 bytes to one address and the high nibbles to another, by a line of the table.

    ``exponents`` is the address of 32 words, one for each byte. Each is added to the values of its byte that are not 0.
    """

    def codegen(context, builder, signature, args):
        both = load(builder, args[0], vector(I8, 32), 32)
        increase = load(builder, args[1], vector(I16, 32), 64)
        for nibbles, address in (
            (builder.and_(both, repeated(15, both)), args[3]),
            (builder.lshr(both, repeated(4, both)), args[4]),
        ):
            words = LOOKUP[target_of(context)](builder, nibbles, args[2])
            is_zero = builder.icmp_unsigned("==", builder.shl(words, repeated(1, words)), repeated(0, words))
            words = builder.select(is_zero, words, builder.add(words, increase))
            store_words(builder, words, address, itemsize.literal_value, streaming=streaming.literal_value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, itemsize, streaming), codegen


@intrinsic
def scale_exponents(typingctx, scales, least, most, mantissa_bits, target):
    """Write what 32 scales add to words of scale 127; return whether all scales are from ``least`` to ``most``."""

    def codegen(context, builder, signature, args):
        words = builder.zext(load(builder, args[0], vector(I8, 32), 32), vector(I16, 32))
        least, most, bits = (broadcast(builder, builder.trunc(value, I16), 32) for value in args[1:4])
        store(builder, builder.shl(builder.sub(words, repeated(127, words)), bits), args[4], 64)
        outside = builder.or_(builder.icmp_unsigned("<", words, least), builder.icmp_unsigned(">", words, most))
        return builder.icmp_unsigned("==", builder.bitcast(outside, I32), I32(0))

    return types.boolean(*[types.int64] * 5), codegen


def decode_columns(itemsize, halves, streaming):
    """Return the kernel that decodes to transposed values, whose ``values_row`` is ``itemsize``.

    A unit is one block of each row in a group of `GROUP_ROWS` rows. Streaming needs columns that are aligned to cache
    lines.
    """
    between_bytes, between_nibbles = (1, 16) if halves else (2, 1)  # in columns
    codes_bytes, scales_bytes, exponents_bytes, block_bytes = 16 * GROUP_ROWS, GROUP_ROWS, 2 * GROUP_ROWS, 32 * itemsize

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        transposed, row_scales = stack_buffer(codes_bytes), stack_buffer(scales_bytes)
        exponents, decoded = stack_buffer(exponents_bytes), stack_buffer(block_bytes)
        groups = (job.rows + GROUP_ROWS - 1) // GROUP_ROWS
        for unit in range(start, stop):
            group, g = divmod(unit, job.blocks_per_row)
            matrix, group = divmod(group, groups)
            block, scale, values = row_addresses(job, matrix * job.rows + GROUP_ROWS * group)
            block += g * job.codes_step
            scale += g * job.scales_step
            rows = min(GROUP_ROWS, job.rows - GROUP_ROWS * group)
            is_whole = job.skip <= 32 * g and 32 * (g + 1) <= job.skip + job.length
            tiled = rows // 32 * 32 if is_whole else 0  # rows that are decoded 32 at a time; the others, one by one
            for row in range(tiled):
                store_uint8(load_uint8(scale + row * job.scales_row), row_scales + row)
            for top in range(0, tiled, 32):
                source, target = row_scales + top, exponents + 2 * top
                if not scale_exponents(source, job.least_scale, job.most_scale, job.mantissa_bits, target):
                    tiled = 0
            for top in range(0, tiled, 32):
                transpose_codes(block + top * job.codes_row, job.codes_row, transposed + top)
            # Four blocks are one cache line: each block prefetches the next line of every fourth row.
            for row in range(g % 4, rows, 4):
                prefetch(block + row * job.codes_row + SIZE_OF_CACHE_LINE)
            column = values + (32 * g - job.skip) * job.values_step
            line = job.table + TABLE_LINE * 127
            for byte in range(16 if tiled else 0):
                low = column + byte * between_bytes * job.values_step
                high = low + between_nibbles * job.values_step
                for top in range(0, tiled, 32):
                    source = transposed + byte * GROUP_ROWS + top
                    decode_two_columns(source, exponents + 2 * top, line, low, high, itemsize, streaming)
                    low += 32 * itemsize
                    high += 32 * itemsize
            for row in range(tiled, rows):
                own_line = job.table + TABLE_LINE * load_uint8(scale + row * job.scales_row)
                decode_block(block + row * job.codes_row, own_line, decoded, itemsize, halves, False)
                scatter(job, decoded, g, g + 1, values + row * itemsize, False)
        if streaming:
            store_fence()

    return kernel


# The limit of decoding: the loop of `decode_rows`, moving the same bytes without looking anything up


@intrinsic(prefer_literal=True)
def move_block(typingctx, block, scale, values, itemsize):
    """Load a block and a scale, and stream 32 elements that are made of their bytes."""

    def codegen(context, builder, signature, args):
        block, scale, values, _ = args
        bytes_ = builder.insert_element(load(builder, block, vector(I8, 16)), load(builder, scale, I8), I32(0))
        bytes_ = shuffle(builder, bytes_, bytes_, [i % 16 for i in range(32 * itemsize.literal_value)])
        store(builder, bytes_, values, SIZE_OF_CACHE_LINE, streaming=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, itemsize), codegen


def move_blocks(itemsize):
    """Return the kernel that streams meaningless bytes to one contiguous row. A unit is one block."""

    def kernel(pointer, start, stop):
        job = carray(pointer, 1)[0]
        block, scale = job.codes + start * 16, job.scales + start
        value = job.values + start * 32 * itemsize
        for g in range(start, stop):
            if g % 4 == 0:
                prefetch(block + job.prefetch_distance)
            move_block(block, scale, value, itemsize)
            block += 16
            scale += 1
            value += 32 * itemsize
        store_fence()

    return kernel
