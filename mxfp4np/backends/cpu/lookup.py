"""Look up elements with scales: FP8, MXFP8, NVFP4 to bfloat16 and float16, with AVX-512.

A table has a line for each scale, or for each byte that a scale can be: the values of all codes of E2M1 under it, or of
the 128 codes of E4M3 or E5M2 that have no sign. They are the results of `mxfp4np.backends.cpu.scaled`, which takes more
than twice as long to multiply and round 32 numbers as two permutations of words do to look them up.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from .decode import codes_of_block
from .simd import (
    I8,
    I16,
    SIZE_OF_CACHE_LINE,
    call,
    constants,
    inner,
    load,
    load_uint8,
    load_uint32,
    offset,
    repeated,
    shuffle,
    store,
    vector,
)
from .tables import LINE_VALUES


def _of_two_lines(builder, block, first, second):
    """Return 32 values of E2M1: the first half from one line, the second from another."""
    codes = builder.zext(codes_of_block(builder, block, halves=False), vector(I16, 32))
    codes = builder.add(codes, constants(I16, [0] * 16 + [16] * 16))
    both = shuffle(builder, *(load(builder, line, vector(I16, 16), 32) for line in (first, second)), range(32))
    return call(builder, "llvm.x86.avx512.permvar.hi.512", codes.type, both, codes)


def _of_one_line(builder, block, line):
    """Return 32 values of E4M3 or E5M2."""
    codes = builder.zext(load(builder, block, vector(I8, 32)), vector(I16, 32))
    parts = [load(builder, offset(builder, line, start), codes.type, SIZE_OF_CACHE_LINE) for start in range(0, 256, 64)]
    name = "llvm.x86.avx512.vpermi2var.hi.512"  # looks up by the lower 6 bits
    low, high = (call(builder, name, codes.type, parts[i], codes, parts[i + 1]) for i in (0, 2))
    is_low = builder.icmp_unsigned("==", builder.and_(codes, repeated(0x40, codes)), repeated(0, codes))
    signs = builder.and_(builder.shl(codes, repeated(8, codes)), repeated(0x8000, codes))
    return builder.xor(builder.select(is_low, low, high), signs)


@intrinsic(prefer_literal=True)
def look_up_elements(typingctx, block, first, second, values, element, streaming):
    """Look up 32 elements, the first half of them in one line and the second in another; of FP8, all in the first.

    Streaming stores need elements aligned to a cache line.
    """

    def codegen(context, builder, signature, args):
        block, first, second, values, _, _ = args
        if element.literal_value == "E2M1":
            words = _of_two_lines(builder, block, first, second)
        else:
            words = _of_one_line(builder, block, first)
        is_streaming = streaming.literal_value
        store(builder, words, values, SIZE_OF_CACHE_LINE if is_streaming else 1, streaming=is_streaming)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, element, streaming), codegen


def by_lines(element, has_table, streaming):
    """Return the functions that find the line of the scale at an address, and decode a block by those of its halves.

    A scale is the number of its line: with ``has_table`` a byte, otherwise a uint32.
    """
    load_number, line_bytes = load_uint8 if has_table else load_uint32, 2 * LINE_VALUES[element]

    @inner
    def find(job, address):
        return job.table + line_bytes * load_number(address)

    @inner
    def decode(block, one, other, values):
        look_up_elements(block, one, other, values, element, streaming)

    return find, decode
