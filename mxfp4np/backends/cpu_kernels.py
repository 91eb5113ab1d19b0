"""Range kernels: the loops that turn packed bytes into values on the CPU, and the intrinsics they stand on.

No policy here: no validation, no allocation, no threads. A kernel works on raw addresses that its driver
(`mxfp4np.backends.cpu`) has checked, so that one compiled form serves every stride, alignment and rank, releases the
GIL, and can be called for disjoint ranges from any thread. Importing this module imports Numba and compiles nothing.

Everything that is compiled together stays in this file: Numba's cache on disk notices changes of the file a kernel is
in, not of the files it calls into.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Positions in a kernel's `geometry`, an int64 vector. Rows are the leading axes, outermost first; after the fixed part
# come four numbers for each: its size and the strides of blocks, scales and out along it. Strides are in bytes.
BLOCKS_ADDRESS, SCALES_ADDRESS, OUT_ADDRESS = 0, 1, 2
BLOCKS_STEP, SCALES_STEP, OUT_STEP = 3, 4, 5  # strides from block to block, and from element to element of `out`
BLOCKS_PER_ROW, START, LENGTH = 6, 7, 8  # elements of a row: `LENGTH`, beginning at `START` of its first block
ROW_AXES = 9


@intrinsic
def load_byte(typingctx, address):
    """Read the uint8 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], cgutils.int8_t.as_pointer()))

    return types.uint8(types.int64), codegen


@intrinsic
def store(typingctx, address, index, word):
    """Write an unsigned word, ``index`` words past an address of any alignment."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], args[2].type.as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, word), codegen


@njit(nogil=True, inline="always")
def _decode_block(block, table, scale, out):
    """Write the 32 elements of one block to consecutive words."""
    for j in range(16):
        byte = load_byte(block + j)
        store(out, 2 * j, table[scale + (byte & 15)])
        store(out, 2 * j + 1, table[scale + (byte >> 4)])


@njit(nogil=True, inline="always")
def _decode_part(block, table, scale, step, out, first, last):
    """Write elements ``first`` to ``last - 1`` of one block, ``step`` bytes apart."""
    for j in range(first, last):
        byte = load_byte(block + (j >> 1))
        store(out + (j - first) * step, 0, table[scale + ((byte >> (4 * (j & 1))) & 15)])


def decode_range(geometry, table, start, stop):
    """Decode blocks ``start`` to ``stop - 1``, counted over all rows in C order.

    ``table[16 * scale + code]`` is the word to write, for all scales and codes.
    """
    size = table.itemsize
    per_row = geometry[BLOCKS_PER_ROW]
    step = geometry[OUT_STEP]
    skip = geometry[START]
    length = geometry[LENGTH]
    while start < stop:
        row = start // per_row
        first = start - row * per_row
        last = min(per_row, first + stop - start)
        start += last - first
        block = geometry[BLOCKS_ADDRESS] + first * geometry[BLOCKS_STEP]
        scale = geometry[SCALES_ADDRESS] + first * geometry[SCALES_STEP]
        out = geometry[OUT_ADDRESS]
        for axis in range(len(geometry) - 4, ROW_AXES - 1, -4):
            index = row % geometry[axis]
            row //= geometry[axis]
            block += index * geometry[axis + 1]
            scale += index * geometry[axis + 2]
            out += index * geometry[axis + 3]
        for g in range(first, last):
            offset = 32 * g - skip  # of the block's first element in the row of `out`
            entry = 16 * np.int64(load_byte(scale))
            if step == size and offset >= 0 and offset + 32 <= length:
                _decode_block(block, table, entry, out + offset * size)
            else:
                begin = max(0, offset)
                end = min(length, offset + 32)
                _decode_part(block, table, entry, step, out + begin * step, begin - offset, end - offset)
            block += geometry[BLOCKS_STEP]
            scale += geometry[SCALES_STEP]
