"""Kernels: the loops that turn packed bytes into values on the CPU, and back, and the intrinsics they stand on.

The last of them fills memory that a device copies from. Here is also what threads wait in until there is work.

No policy here: no validation, no allocation, no choice of threads. A kernel works on raw addresses that its driver
(`mxfp4np.backends.cpu`) has checked, so that one compiled form serves every stride, alignment and rank, needs no
interpreter, and can be called from any number of threads at once, which share the work among them. Importing this
module imports Numba and compiles nothing.

The loops are plain Numba. What they do with one block is an intrinsic, whose machine code depends on the features that
Numba's own code generator reports. A scale and a code have 256 * 16 possible values, which a table holds; 16 entries
are what a byte shuffle can look up, for all codes of a block at once. Every form looks up the same table, so that all
give the same bits.

Everything that is compiled together stays in this file: Numba's cache on disk notices changes of the file a kernel is
in, not of the files it calls into.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

import sys
from mmap import PAGESIZE

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# What threads work on together is a job: a vector of int64, which begins with how many numbers it has; the address of a
# kernel, which does a part of the work and returns whether there may be more; and the crew that lends a hand, with how
# many threads of it.
NUMBERS, KERNEL, CREW, HELPERS = 0, 1, 2, 3
# A crew is a vector too: how many threads it has, Python's functions to acquire and to release a lock, and a lock that
# is never released; then for each thread what it is at, and the lock that it sleeps by. It is at nothing, or at a job,
# whose address is a multiple of 8: chosen for it, woken as well, or begun.
MEMBERS, ACQUIRE, RELEASE, REST_LOCK = 0, 1, 2, 3
FIRST_MEMBER, MEMBER_NUMBERS = 8, 2
IS_AT, LOCK = 0, 1
NOTHING, CHOSEN, WOKEN, BEGUN = 0, 1, 2, 3

# For most kernels a job is a `geometry`. Next in it is how threads share the work: all units (blocks, or groups of 32
# rows), and which one is claimed next; the fewest and most of a piece, and in between the share of what is left. Of a
# file that is mapped, up to where it has been read ahead, and whether a thread is about that.
UNITS, NEXT, FEWEST, MOST, SHARE, READ, READING = 4, 5, 6, 7, 8, 9, 10
# Then, where the arrays are. Rows are the leading axes, one at least, innermost first; after the fixed part come four
# numbers for each: its size and the strides of blocks, scales and out along it. Strides are in bytes.
BLOCKS_ADDRESS, SCALES_ADDRESS, OUT_ADDRESS, TABLE_ADDRESS = 11, 12, 13, 14
BLOCKS_STEP, SCALES_STEP, OUT_STEP = 15, 16, 17  # strides from block to block, and from element to element of `out`
BLOCKS_PER_ROW, START, LENGTH = 18, 19, 20  # elements of a row: `LENGTH`, beginning at `START` of its first block
ITEMSIZE, STREAMING, MAPPED = 21, 22, 23  # bytes of an element of `out`; whether `out` is too large to stay in the
# cache; whether the blocks are in a file that is mapped
GAPS_TOO = 24  # whether what lies between the rows of blocks is read too
APART = 25  # how many rows further the next is, where rows are asked for crosswise, and otherwise 0
ROWS, BLOCKS_ROW, SCALES_ROW = 26, 27, 28  # for a transposed `out`: rows of a matrix, and strides from row to row
ROW_AXES = ROW_AXIS = 29
ROW_AXIS_BLOCKS, ROW_AXIS_SCALES, ROW_AXIS_OUT, AXIS_NUMBERS = 30, 31, 32, 4

PIECES_AT_ONCE = 64
"""Pieces that a kernel does before it returns, so that the calling thread can be interrupted. Reading ends it too."""

STEPS_AHEAD = 8
"""Pieces of the largest size that are read ahead of what threads have claimed, at most."""

MADV_POPULATE_READ = 22
"""As Linux numbers it, from 5.14 on; Python's `mmap` does not name it, nor let others work meanwhile."""

SPINS = 1 << 11
"""How often to look whether others are done, 20 to 100 microseconds, before resting in between."""

REST = 50
"""Microseconds."""

AWAKE = 1 << 12
"""How often a thread that is done with a job looks for the next, 0.1 to 0.2 milliseconds, before it sleeps.

Waking it takes 50 microseconds; who decodes one tensor after the other is back after a hundred.
"""

# The table has one line of 64 bytes for each scale: the 16 words that its codes stand for, then their low bytes, then
# their high bytes. Words are bfloat16 or float16; a float32 is the bfloat16 with 16 zeros behind, since four bits and a
# power of two need no more.
TABLE_LINE, LOW_BYTES, HIGH_BYTES = 64, 32, 48

# What is compiled follows from the type of a kernel's argument `word`: its width is that of the elements, its sign says
# in which order they lie in a block: unsigned in pairs, signed in halves (see `mxfp4np.format.ORDERS`). To encode, the
# sign says which of the values of 16 bits they are: unsigned bfloat16, signed float16.

# Encoding compares bits of values as integers, which have the same order as the values. What it needs of a float32 are
# the first 16 bits, a bfloat16, and whether any of the others is set: if so, the last of the 16 is. Then no value comes
# to lie on a bound, nor moves across one, since bounds, of scales and of codes, need three bits of mantissa.
#
# The table to encode by, one for each rule, begins with a byte for all that can be the largest bits of a block, without
# their sign: the scale. Then comes a line of 32 bytes for each scale: eight words, each of them twice. Seven are the
# largest bits that get the codes 0 to 6; the last is the rule's: what rounds the largest bits to a power of two.
#
# That serves every block, and every processor. Most blocks need less: with M bits of mantissa, the scale is what is
# left of `largest + rounding` without the last M bits, and so is a base that all bounds have the same distance from.
# With `tie` being bit M - 1, which is set half way to an even code, d = max(0, bits + tie - base) >> (M - 2) counts
# quarters of binades:
#
#   d                   0     1 to 6   7 to 9   10, 11   12, 13   14, 15   16, 17   18 to 20
#   value / 2**e from   0     0.25     0.75     1.25     1.75     2.5      3.5      5
#   code                0     1        2        3        4        5        6        7
#
# That is not so where a bound is subnormal, nor in a block with NaN or infinity.
ENCODE_LINES, ENCODE_LINE, ENCODE_ROUNDING = 32768, 32, 28
CODES_FROM_5 = 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7

inner = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that only compiled code calls: what it takes to call it from elsewhere is a tenth of the time."""

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_INTERLEAVED = [i // 2 + 16 * (i % 2) for i in range(32)]


def simd(triple: str, features: str) -> str:
    """Return which form of `decode_block` suits a code generator: its LLVM triple and its list of features."""
    enabled = features.split(",")
    if "+avx512bw" in enabled:
        return "avx512"
    if "+avx2" in enabled:
        return "avx2"
    if "+ssse3" in enabled:
        return "ssse3"
    if triple.startswith("aarch64"):
        return "neon"
    return "portable"


def _vector(element, count):
    return ir.VectorType(element, count)


def _constants(element, values):
    return ir.Constant(_vector(element, len(values)), [ir.Constant(element, value) for value in values])


def _call(builder, name, result, *arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), function_type), arguments)


def _load(builder, address, type_, align=1):
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=align)


def _store(builder, value, address, align=1):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _offset(builder, address, count):
    return builder.add(address, ir.Constant(address.type, count))


def _join(builder, first, second, order):
    """Return the lanes of two vectors in the given order."""
    return builder.shuffle_vector(first, second, _constants(_I32, order))


def _lookup_avx512(builder, codes, line, *, halves):
    """Look up all 32 words with one permutation of words."""
    # Each nibble in the low bits of a word.
    if halves:
        low = builder.zext(codes, _vector(_I16, 16))
        indices = _join(builder, low, builder.lshr(low, _constants(_I16, [4] * 16)), range(32))
    else:
        both = builder.zext(codes, _vector(_I32, 16))
        both = builder.or_(both, builder.shl(both, _constants(_I32, [12] * 16)))
        indices = builder.bitcast(both, _vector(_I16, 32))
    table = _load(builder, line, _vector(_I16, 16), TABLE_LINE)
    table = _join(builder, table, table, [i % 16 for i in range(32)])  # an index has five bits, the fifth means nothing
    return _call(builder, "llvm.x86.avx512.permvar.hi.512", _vector(_I16, 32), table, indices)


def _lookup_avx2(builder, codes, line, *, halves):
    """Look up the low bytes of all 32 words, and the high bytes, with one shuffle of bytes each."""
    # Interleaving the two works on parts of 128 bits: what they make 16 words in a row of is two quarters apart.
    if halves:
        low, high = builder.and_(codes, _constants(_I8, [15] * 16)), builder.lshr(codes, _constants(_I8, [4] * 16))
        indices = _join(builder, low, high, [8 * part + i % 8 + i // 8 * 16 for part in range(2) for i in range(16)])
    else:
        quarters = _join(builder, codes, codes, [4 * part + i for part in (0, 2, 1, 3) for i in range(4)])
        both = builder.zext(quarters, _vector(_I16, 16))  # then, each nibble in a byte
        both = builder.or_(both, builder.shl(both, _constants(_I16, [4] * 16)))
        indices = builder.bitcast(builder.and_(both, _constants(_I16, [0x0F0F] * 16)), _vector(_I8, 32))
    planes = []
    for plane in (LOW_BYTES, HIGH_BYTES):
        table = _load(builder, _offset(builder, line, plane), _vector(_I8, 16), 16)
        table = _join(builder, table, table, [i % 16 for i in range(32)])
        planes.append(_call(builder, "llvm.x86.avx2.pshuf.b", _vector(_I8, 32), table, indices))
    words = []
    for half in (0, 8):
        order = [half + 16 * part + i // 2 + 32 * (i % 2) for part in range(2) for i in range(16)]
        words.append(builder.bitcast(_join(builder, *planes, order), _vector(_I16, 16)))
    return _join(builder, *words, range(32))


def _lookup_bytes(builder, codes, line, shuffle, *, halves):
    """Look up low and high bytes, 16 at a time, with a shuffle of bytes."""
    bytes_ = _vector(_I8, 16)
    low_nibbles = builder.and_(codes, _constants(_I8, [15] * 16))
    high_nibbles = builder.lshr(codes, _constants(_I8, [4] * 16))
    planes = [_load(builder, _offset(builder, line, plane), bytes_, 16) for plane in (LOW_BYTES, HIGH_BYTES)]
    order = range(32) if halves else _INTERLEAVED
    words = []
    for half in (order[:16], order[16:]):
        indices = _join(builder, low_nibbles, high_nibbles, half)
        low, high = (_call(builder, shuffle, bytes_, plane, indices) for plane in planes)
        words.append(builder.bitcast(_join(builder, low, high, _INTERLEAVED), _vector(_I16, 16)))
    return _join(builder, *words, range(32))


def _lookup_portable(builder, block, line, *, halves):
    """Look up word by word."""
    words = ir.Constant(_vector(_I16, 32), ir.Undefined)
    for j in range(16):
        byte = builder.zext(_load(builder, _offset(builder, block, j), _I8), line.type)
        nibbles = builder.and_(byte, ir.Constant(byte.type, 15)), builder.lshr(byte, ir.Constant(byte.type, 4))
        for i, nibble in enumerate(nibbles):
            word = _load(builder, builder.add(line, builder.shl(nibble, ir.Constant(byte.type, 1))), _I16, 2)
            words = builder.insert_element(words, word, ir.Constant(_I32, j + 16 * i if halves else 2 * j + i))
    return words


def decoded(form, builder, block, line, *, halves=False):
    """Return the 32 words of the block at one address, by the table's line at another."""
    if form == "portable":
        return _lookup_portable(builder, block, line, halves=halves)
    codes = _load(builder, block, _vector(_I8, 16))
    if form == "avx512":
        return _lookup_avx512(builder, codes, line, halves=halves)
    if form == "avx2":
        return _lookup_avx2(builder, codes, line, halves=halves)
    shuffle = {"ssse3": "llvm.x86.ssse3.pshuf.b.128", "neon": "llvm.aarch64.neon.tbl1.v16i8"}[form]
    return _lookup_bytes(builder, codes, line, shuffle, halves=halves)


def store_words(builder, words, out, width, align, *, streaming):
    """Write 32 table words as elements of so many bits."""
    if width == 32:
        words = builder.shl(builder.zext(words, _vector(_I32, 32)), _constants(_I32, [16] * 32))
    store = builder.store(words, builder.inttoptr(out, words.type.as_pointer()), align=align)
    if streaming:
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def _form(context):
    triple, _, features = context.codegen().magic_tuple()
    return simd(triple, features)


def _block_decoder(align, *, streaming):
    @intrinsic
    def decode_block(typingctx, block, line, out, word):
        """Write the 32 elements of the block at one address, by the table's line at another, as words to a third."""

        def codegen(context, builder, signature, args):
            block, line, out, word = args
            halves = signature.args[3].signed
            words = decoded(_form(context), builder, block, line, halves=halves)
            store_words(builder, words, out, word.type.width, align, streaming=streaming)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, word), codegen

    return decode_block


decode_block = _block_decoder(1, streaming=False)
stream_block = _block_decoder(64, streaming=True)


@intrinsic
def move_block(typingctx, block, scale, out, word):
    """Load the block and the scale at two addresses, and stream 32 words made of their bytes to a third."""

    def codegen(context, builder, signature, args):
        block, scale, out, word = args
        bytes_ = builder.insert_element(_load(builder, block, _vector(_I8, 16)), _load(builder, scale, _I8), _I32(0))
        bytes_ = _join(builder, bytes_, bytes_, [i % 16 for i in range(4 * word.type.width)])
        store = builder.store(bytes_, builder.inttoptr(out, bytes_.type.as_pointer()), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, word), codegen


def _line_mover(align, *, streaming):
    @intrinsic
    def move_line(typingctx, line, out, word):
        """Write the 32 table words at one address as elements to another."""

        def codegen(context, builder, signature, args):
            words = _load(builder, args[0], _vector(_I16, 32), 64)
            store_words(builder, words, args[1], args[2].type.width, align, streaming=streaming)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, word), codegen

    return move_line


move_line = _line_mover(1, streaming=False)
stream_line = _line_mover(64, streaming=True)


def _copier(count, align, *, streaming):
    @intrinsic
    def copy(typingctx, source, target):
        """Copy so many bytes from one address to another."""

        def codegen(context, builder, signature, args):
            value = _load(builder, args[0], _vector(_I8, count))
            store = builder.store(value, builder.inttoptr(args[1], value.type.as_pointer()), align=align)
            if streaming:
                store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


copy_1 = _copier(1, 1, streaming=False)
stream_64 = _copier(64, 64, streaming=True)


def _reserver(nbytes, align):
    @intrinsic
    def reserve(typingctx):
        """Reserve so many bytes on the stack, aligned, and return their address."""

        def codegen(context, builder, signature, args):
            memory = cgutils.alloca_once(builder, _I8, nbytes)
            memory.align = align
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.int64(), codegen

    return reserve


@intrinsic
def stream_joined(typingctx, first, second, count, out):
    """Copy ``count`` bytes from one address and the rest of a line from another, each at its place in the line."""

    def codegen(context, builder, signature, args):
        first, second = (_load(builder, address, _vector(_I8, 64)) for address in args[:2])
        count = builder.insert_element(
            ir.Constant(_vector(_I8, 64), ir.Undefined), builder.trunc(args[2], _I8), _I32(0)
        )
        counts = _join(builder, count, count, [0] * 64)
        is_first = builder.icmp_unsigned("<", _constants(_I8, range(64)), counts)
        line = builder.select(is_first, first, second)
        store = builder.store(line, builder.inttoptr(args[3], line.type.as_pointer()), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


def _joiner(*, fill=True, streaming=False):
    @intrinsic
    def join(typingctx, kept, count, block, line, begin, out, word):
        """Join ``count`` words that are kept at an address and those of a block from ``begin`` on.

        The first 32 are written as elements, and it is those behind them that are kept then; or, if there are not so
        many, all of them are.
        """

        def codegen(context, builder, signature, args):
            kept, count, block, line, begin, out, word = args
            words = decoded("avx512", builder, block, line, halves=signature.args[6].signed)
            numbers = count, builder.sub(begin, count)
            counts, shifts = (_repeated(builder, builder.trunc(value, _I16), 32) for value in numbers)
            lanes = _constants(_I16, range(32))
            # An index has five bits that count, and where there are two vectors a sixth, which says in which.
            behind = builder.add(lanes, shifts)
            of_block = builder.or_(behind, _constants(_I16, [32] * 32))
            of_both = builder.select(builder.icmp_unsigned("<", lanes, counts), lanes, of_block)
            both = _load(builder, kept, words.type, 64), of_both, words
            joined = _call(builder, "llvm.x86.avx512.vpermi2var.hi.512", words.type, *both)
            rest = _call(builder, "llvm.x86.avx512.permvar.hi.512", words.type, words, behind)
            _store(builder, rest if fill else joined, kept, 64)
            if fill:
                store_words(builder, joined, out, word.type.width, 64, streaming=streaming)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6, word), codegen

    return join


keep_words = _joiner(fill=False)
join_words = _joiner()
stream_words = _joiner(streaming=True)


# How far ahead memory is asked for: in rows, or at least in blocks of short ones; where there are no rows, in blocks,
# and in bytes for the first-level cache; and how far ahead in bytes, where elements are stored through the cache.
PREFETCH_ROWS, PREFETCH_SHORT, PREFETCH_BLOCKS, PREFETCH_NEAR, PREFETCH_OUT = 4, 128, 512, 1024, 1024
# Bytes of the ring in which lines are made: as many as addresses have different lowest bits; how far decoding is ahead
# of streaming at least, and at most; and how far behind a line that is streamed nothing may be loaded.
RING, RING_LAG, RING_LEAD, RING_GAP = 4096, 2048, 3072, 512
reserve_ring = _reserver(RING + RING + 128, 16)  # to be aligned to its size, and with a block behind its end
reserve_kept, reserve_line = _reserver(64, 64), _reserver(128, 64)  # a block as words, and as elements
reserve_tile = _reserver(32 * 64, 64)  # table words of 32 rows and 32 columns

# Tiles that are transposed together, so that it is several lines in a row that are written.
TILES_ABREAST = 4
reserve_turned = _reserver(TILES_ABREAST * 16 * 32, 64)

# The last scale, and how many up to it, with which no value is subnormal, infinite or NaN; and how to tell which dtype
# it is: by its 1.
USUAL_BFLOAT16, USUAL_FLOAT16 = (252, 251), (140, 27)
SCALE_OF_1, CODE_OF_1, FLOAT16_1 = 127, 2, 0x3C00


@intrinsic
def decode_tile(typingctx, block, block_row, scale, scale_row, table, target, word):
    """Write one block of each of 32 rows to a tile, transposed."""

    def codegen(context, builder, signature, args):
        block, block_row, scale, scale_row, table, target, _ = args
        form = _form(context)
        rows = []
        for _ in range(32):
            byte = builder.zext(_load(builder, scale, _I8), table.type)
            line = builder.add(table, builder.mul(byte, ir.Constant(byte.type, TABLE_LINE)))
            rows.append(decoded(form, builder, block, line, halves=signature.args[6].signed))
            block, scale = builder.add(block, block_row), builder.add(scale, scale_row)
        for i, column in enumerate(_transposed(builder, rows)):
            builder.store(
                column, builder.inttoptr(_offset(builder, target, 64 * i), column.type.as_pointer()), align=64
            )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, word), codegen


@intrinsic
def turn_bytes(typingctx, source, row, target):
    """Write 16 bytes of each of 32 rows to an address, transposed: 32 bytes for each column."""

    def codegen(context, builder, signature, args):
        source, row, target = args
        rows = []
        for _ in range(32):
            rows.append(_load(builder, source, _vector(_I8, 16)))
            source = builder.add(source, row)
        # As in `_transposed`, within parts of 128 bits that have 16 columns.
        vectors = []
        for i in range(8):
            pairs = [_join(builder, rows[i + k], rows[i + 8 + k], range(32)) for k in (0, 16)]
            vectors.append(_join(builder, *pairs, range(64)))
        low = [16 * part + i // 2 + 64 * (i % 2) for part in range(4) for i in range(16)]
        orders = low, [i + 8 for i in low]
        for _ in range(3):
            vectors = [_join(builder, vectors[i], vectors[i + 4], order) for i in range(4) for order in orders]
        order = [16 * part + 8 * column + i for column in range(2) for part in range(4) for i in range(8)]
        for i, vector in enumerate(vectors):
            _store(builder, _join(builder, vector, vector, order), _offset(builder, target, 64 * i), 64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _magnitudes_by_arithmetic(builder, codes, one, unit):
    """Return magnitudes of codes, in words, from the word of 1 and the unit of its exponent."""
    # From 1 on, a code is an exponent and a bit of mantissa; 0.5 has none, which is one too few to subtract; 0 is 0.
    half = builder.lshr(unit, _constants(_I16, [1] * 32))
    steps = builder.and_(codes, _constants(_I16, [7] * 32))
    words = builder.add(builder.sub(one, unit), builder.mul(steps, half))
    zeros, ones = (builder.icmp_unsigned("==", steps, _constants(_I16, [step] * 32)) for step in (0, 1))
    words = builder.select(ones, builder.sub(words, half), words)
    return builder.select(zeros, _constants(_I16, [0] * 32), words)


@intrinsic
def by_codes(typingctx):
    """Return whether it is codes that are best transposed, not words: where lookups are few, or far from the codes."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), _form(context) in ("avx512", "portable"))

    return types.boolean(), codegen


def _turned_decoder(align, *, streaming):
    @intrinsic
    def decode_turned(typingctx, codes, scales, table, last, count, target, step, word):
        """Decode tiles side by side, from codes and scales that are transposed, if all scales are usual ones.

        These are ``count``, up to ``last``: with them no value is subnormal, infinite or NaN, and scales differ in
        nothing but the exponent. Return whether it is so; if not, nothing is written.
        """

        def codegen(context, builder, signature, args):
            codes, scales, table, last, count, target, step, word = args
            line = builder.add(table, builder.mul(last, ir.Constant(last.type, TABLE_LINE)))
            words = _load(builder, line, _vector(_I16, 16), TABLE_LINE)
            words = _magnitudes(builder, _join(builder, words, words, [i % 16 for i in range(32)]))
            one, two = (_repeated(builder, builder.extract_element(words, _I32(code)), 32) for code in (2, 4))
            unit = builder.sub(two, one)
            last, count = (_repeated(builder, builder.trunc(value, _I16), 32) for value in (last, count))
            behind, usual = [], ir.Constant(_I32, -1)
            for tile in range(TILES_ABREAST):
                column = _load(builder, _offset(builder, scales, 512 * tile), _vector(_I8, 32), 32)
                behind.append(builder.sub(last, builder.zext(column, _vector(_I16, 32))))
                is_usual = builder.icmp_unsigned("<", behind[tile], count)
                usual = builder.and_(usual, builder.bitcast(is_usual, _I32))
            usual = builder.icmp_unsigned("==", usual, ir.Constant(_I32, -1))

            def load_pairs(source):
                for tile, place in enumerate(following):
                    builder.store(_load(builder, _offset(builder, source, 512 * tile), _vector(_I8, 32), 32), place)

            following = [cgutils.alloca_once(builder, _vector(_I8, 32)) for _ in range(TILES_ABREAST)]
            between_pairs, in_a_pair = (1, 16) if signature.args[7].signed else (2, 1)  # of the columns
            with builder.if_then(usual):  # exponents are those of `last` less a difference, from which 0 stays 0
                behind = [builder.mul(value, unit) for value in behind]
                load_pairs(codes)
                with cgutils.for_range(builder, ir.Constant(step.type, 16)) as loop:
                    both = [builder.load(place) for place in following]
                    # What is loaded behind streaming stores can be slow to come.
                    is_last = builder.icmp_unsigned("==", loop.index, ir.Constant(step.type, 15))
                    next_ = builder.select(is_last, loop.index, _offset(builder, loop.index, 1))
                    load_pairs(builder.add(codes, builder.mul(next_, ir.Constant(step.type, 32))))
                    for i in range(2):
                        column = builder.mul(loop.index, ir.Constant(step.type, between_pairs))
                        out = builder.add(target, builder.mul(step, _offset(builder, column, in_a_pair * i)))
                        for tile in range(TILES_ABREAST):
                            code = builder.zext(both[tile], _vector(_I16, 32))
                            code = builder.lshr(code, _constants(_I16, [4 * i] * 32))
                            if _form(context) == "avx512":
                                value = _call(builder, "llvm.x86.avx512.permvar.hi.512", words.type, words, code)
                            else:
                                value = _magnitudes_by_arithmetic(builder, code, one, unit)
                            value = _call(builder, "llvm.usub.sat.v32i16", words.type, value, behind[tile])
                            sign = builder.shl(code, _constants(_I16, [12] * 32))
                            sign = builder.and_(sign, _constants(_I16, [0x8000] * 32))
                            place = _offset(builder, out, 4 * word.type.width * tile)
                            value = builder.or_(value, sign)
                            store_words(builder, value, place, word.type.width, align, streaming=streaming)
            return usual

        return types.boolean(*[types.int64] * 7, word), codegen

    return decode_turned


decode_turned = _turned_decoder(1, streaming=False)
stream_turned = _turned_decoder(64, streaming=True)


def _prefetcher(locality, *, write=False):
    @intrinsic
    def prefetch(typingctx, address):
        """Ask for the cache line at an address."""

        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
            arguments = pointer, _I32(int(write)), _I32(locality), _I32(1)  # as data
            signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            builder.call(builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), signature), arguments)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


prefetch = _prefetcher(3)  # into all levels of the cache
prefetch_far = _prefetcher(2)  # into all but the first
prefetch_once = _prefetcher(0)  # into the first alone, where it takes little room
prefetch_to_write = _prefetcher(3, write=True)


def _transposed(builder, rows):
    """Return the columns of 32 vectors of 32 words."""
    # Within eight rows, interleaving rows i and i + 4 moves the highest bit of the row number behind the bits of the
    # column: three times over, rows and columns have changed places, within each group of eight columns. These are
    # unpack instructions, which work on parts of 128 bits.
    low = [8 * part + i // 2 + 32 * (i % 2) for part in range(4) for i in range(8)]
    orders = low, [i + 4 for i in low]
    eights = []
    for top in range(0, 32, 8):
        eight = rows[top : top + 8]
        for _ in range(3):
            eight = [_join(builder, eight[i], eight[i + 4], order) for i in range(4) for order in orders]
        eights.append(eight)
    # Then the four parts of each vector go to four columns.
    columns = [None] * 32
    for j in range(8):
        for half in (0, 16):
            pairs = [
                _join(builder, eights[e][j], eights[e + 1][j], [half + i % 16 + i // 16 * 32 for i in range(32)])
                for e in (0, 2)
            ]
            for part in (0, 8):
                order = [part + i % 8 + i // 8 % 2 * 16 + i // 16 * 32 for i in range(32)]
                columns[half + part + j] = _join(builder, *pairs, order)
    return columns


@intrinsic
def itemsize(typingctx, word):
    """Return the bytes of an element, a constant of the compiled form."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(64), args[0].type.width // 8)

    return types.int64(word), codegen


@intrinsic
def load_byte(typingctx, address):
    """Read the uint8 at an address."""

    def codegen(context, builder, signature, args):
        return _load(builder, args[0], _I8)

    return types.uint8(types.int64), codegen


@intrinsic
def load_word(typingctx, address):
    """Read the uint16 at an address."""

    def codegen(context, builder, signature, args):
        return builder.zext(_load(builder, args[0], _I16, 2), args[0].type)

    return types.int64(types.int64), codegen


@intrinsic
def load_code(typingctx, block, element, word):
    """Read the code of one element of the block at an address."""

    def codegen(context, builder, signature, args):
        block, element, _ = args
        halves = signature.args[2].signed
        one, four = ir.Constant(element.type, 1), ir.Constant(element.type, 4)
        place = builder.and_(element, ir.Constant(element.type, 15)) if halves else builder.lshr(element, one)
        is_high = builder.lshr(element, four) if halves else builder.and_(element, one)
        byte = builder.zext(_load(builder, builder.add(block, place), _I8), element.type)
        return builder.and_(builder.lshr(byte, builder.mul(is_high, four)), ir.Constant(element.type, 15))

    return types.int64(types.int64, types.int64, word), codegen


@intrinsic
def store_element(typingctx, line, code, out, word):
    """Write the element that a code stands for, by the table's line, as a word to an address."""

    def codegen(context, builder, signature, args):
        line, code, out, word = args
        value = _load(builder, builder.add(line, builder.shl(code, ir.Constant(code.type, 1))), _I16, 2)
        if word.type.width == 32:
            value = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
        builder.store(value, builder.inttoptr(out, value.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, word), codegen


@intrinsic
def fence(typingctx):
    """Order streaming stores before whatever tells another thread that they are done."""

    def codegen(context, builder, signature, args):
        _, _, features = context.codegen().magic_tuple()
        if "+sse" in features.split(","):
            _call(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


def _number_address(builder, vector, index):
    pointer = builder.inttoptr(vector, vector.type.as_pointer())
    return builder.gep(pointer, [index])


@intrinsic
def number(typingctx, vector, index):
    """Read a number of the vector of int64 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_number_address(builder, *args))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def set_number(typingctx, vector, index, value):
    """Write a number of a vector."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _number_address(builder, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def shared(typingctx, vector, index):
    """Read a number that other threads change, as the last of them left it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_number_address(builder, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def add_shared(typingctx, vector, index, value):
    """Add to a number that other threads change too, and return what it was."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _number_address(builder, *args[:2]), args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def replace_shared(typingctx, vector, index, old, new):
    """Replace a number if it is ``old``, and return what it was."""

    def codegen(context, builder, signature, args):
        address = _number_address(builder, *args[:2])
        return builder.extract_value(builder.cmpxchg(address, args[2], args[3], "seq_cst", "seq_cst"), 0)

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Give way to the other thread of this core for a moment."""

    def codegen(context, builder, signature, args):
        _, _, features = context.codegen().magic_tuple()
        if "+sse2" in features.split(","):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call(typingctx, function, arguments):
    """Call the C function at an address with a tuple of integers, for an int."""

    def codegen(context, builder, signature, args):
        integers = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        function_type = ir.FunctionType(_I32, [integer.type for integer in integers])
        function = builder.inttoptr(args[0], function_type.as_pointer())
        return builder.sext(builder.call(function, integers), ir.IntType(64))

    return types.int64(types.int64, arguments), codegen


@inner
def _members(crew):
    """Return where it stands what each thread of a crew is at."""
    first, size = crew + 8 * FIRST_MEMBER, 8 * MEMBER_NUMBERS
    return range(first, first + size * shared(crew, MEMBERS), size)


@inner
def _moves_on(member, before, after):
    """Change what a thread is at, if it is what it was before."""
    return shared(member, IS_AT) == before and replace_shared(member, IS_AT, before, after) == before


@inner
def _wake_two(crew, job):
    """Wake two threads that have been chosen for a job. Each does the same: to wake one takes a while."""
    woken = 0
    for member in _members(crew):
        if _moves_on(member, job + CHOSEN, job + WOKEN):
            call(number(crew, RELEASE), (number(member, LOCK),))
            woken += 1
            if woken == 2:
                break


@inner
def _wait(crew, looks):
    """Wait a moment, a longer one after many looks."""
    if looks < SPINS:
        pause()
    else:
        call(number(crew, ACQUIRE), (number(crew, REST_LOCK), REST, 0))


@inner
def call_crew(job):
    """Have as many threads of the crew as a job wants take part in it, of those that are at nothing."""
    crew, wanted = number(job, CREW), number(job, HELPERS)
    for member in _members(crew):
        if shared(member, IS_AT) & -8 == job:
            wanted -= 1
    for member in _members(crew):
        if wanted > 0 and _moves_on(member, NOTHING, job + CHOSEN):
            wanted -= 1
    _wake_two(crew, job)


@inner
def dismiss_crew(job):
    """Wait until no other thread is at a job any more. Those that have not begun need not."""
    crew, looks = number(job, CREW), 0
    for member in _members(crew):
        at = shared(member, IS_AT)
        while at & -8 == job:
            if at != job + BEGUN:
                _moves_on(member, at, NOTHING)
            else:
                _wait(crew, looks)
                looks += 1
            at = shared(member, IS_AT)


def serve(crew, thread):
    """Take part in one job after the other, as one of a crew, and sleep in between. It does not return."""
    member = crew + 8 * (FIRST_MEMBER + MEMBER_NUMBERS * thread)
    while True:
        for _ in range(AWAKE):
            if shared(member, IS_AT) != NOTHING:
                break
            pause()
        call(number(crew, ACQUIRE), (number(member, LOCK), -1, 0))
        at = shared(member, IS_AT)
        job = at & -8
        if at in (job + CHOSEN, job + WOKEN) and _moves_on(member, at, job + BEGUN):
            _wake_two(crew, job)
            while call(number(job, KERNEL), (job, 0)) != 0:
                pass
            _moves_on(member, job + BEGUN, NOTHING)


def work(job):
    """Do a part of a job alone; return whether there may be more to do."""
    return call(number(job, KERNEL), (job, 0)) != 0


def lead(job):
    """Do a part of a job, and have others help; return whether there may be more to do."""
    call_crew(job)
    if call(number(job, KERNEL), (job, 0)) != 0:
        return True
    dismiss_crew(job)
    return False


@inner
def pieces(job):
    """Yield ranges of units that this thread is to do."""
    for _ in range(PIECES_AT_ONCE):
        start = shared(job, NEXT)
        while True:
            left, fewest = number(job, UNITS) - start, number(job, FEWEST)
            piece = min(left, max(fewest, min(number(job, MOST), left // number(job, SHARE)) // fewest * fewest))
            found = replace_shared(job, NEXT, start, start + piece)
            if found == start:
                break
            start = found
        if piece == 0:
            break
        yield start, start + piece


@inner
def are_left(job):
    """Tell whether there are pieces that nobody has claimed."""
    return shared(job, NEXT) < number(job, UNITS)


@intrinsic
def populate(typingctx, address, count):
    """Have Linux map so many bytes of a file, all at once, and read what is not in memory."""

    def codegen(context, builder, signature, args):
        if not sys.platform.startswith("linux"):
            return context.get_dummy_value()
        address, count = args
        begin = builder.and_(address, ir.Constant(address.type, -PAGESIZE))
        count = builder.add(count, builder.sub(address, begin))
        function_type = ir.FunctionType(_I32, [address.type, count.type, _I32])
        madvise = cgutils.get_or_insert_function(builder.module, function_type, "madvise")
        builder.call(madvise, [begin, count, _I32(MADV_POPULATE_READ)])  # an older kernel refuses, and does no harm
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@inner
def _populate(first, last, count):
    """Have two arrays mapped from one pair of addresses to another, unless there is much more than ``count`` blocks."""
    if 0 <= last[0] - first[0] < 64 * count:
        populate(first[0], last[0] + 16 - first[0])
    if 0 <= last[1] - first[1] < 64 * count:
        populate(first[1], last[1] + 1 - first[1])


@inner
def _decode_part(geometry, word, first, last, block, scale, out):
    """Decode the elements that belong to the row of blocks ``first`` to ``last - 1``, one by one."""
    for g in range(first, last):
        offset = 32 * g - number(geometry, START)  # of the block's first element in the row of `out`
        line = number(geometry, TABLE_ADDRESS) + TABLE_LINE * load_byte(scale + g * number(geometry, SCALES_STEP))
        for i in range(max(0, offset), min(number(geometry, LENGTH), offset + 32)):
            code = load_code(block + g * number(geometry, BLOCKS_STEP), i - offset, word)
            store_element(line, code, out + i * number(geometry, OUT_STEP), word)


@inner
def _addresses(geometry, row):
    """Return where blocks, scales and elements of a row are, counted over the row axes in C order."""
    block, scale = number(geometry, BLOCKS_ADDRESS), number(geometry, SCALES_ADDRESS)
    out = number(geometry, OUT_ADDRESS)
    axis, end = geometry, geometry + 8 * (number(geometry, NUMBERS) - ROW_AXES)
    while axis < end:  # numbers of an axis are where those of the innermost one would be
        size = number(axis, ROW_AXIS)
        index = row % size
        row //= size
        block += index * number(axis, ROW_AXIS_BLOCKS)
        scale += index * number(axis, ROW_AXIS_SCALES)
        out += index * number(axis, ROW_AXIS_OUT)
        axis += 8 * AXIS_NUMBERS
    return block, scale, out


# What the processor reads ahead by itself begins anew with each row, and is too little where the system clears pages.
# So every fourth block asks for a line of a row ahead, and the last one for the rest of that row.
#
# Nor does the processor know where a row ends. Intel's take a page in which lines are asked for one behind the other
# for the beginning of a sequence, and read on: all of the gap perhaps, at the expense of all else that memory does. So
# rows are asked for crosswise there: first lines of as many rows as a row has lines, each in a page of its own, then
# their second lines, and so on, a line of each for every row that is decoded; then rows between them in these pages.
#
# AMD's are fast only in one sequence, and then read more than is written meanwhile: rows near each other cost no more
# if the gaps between them are asked for too, at the pace that the blocks of a row set, into the first-level cache.


@inner
def _ahead(geometry):
    """Return how far behind a block and its scale those are that are asked for."""
    block_row, scale_row = number(geometry, ROW_AXIS_BLOCKS), number(geometry, ROW_AXIS_SCALES)
    if block_row == 0:
        return PREFETCH_BLOCKS * number(geometry, BLOCKS_STEP), 0
    rows = max(PREFETCH_ROWS, PREFETCH_SHORT // number(geometry, BLOCKS_PER_ROW))
    return rows * block_row, rows * scale_row


@inner
def _far(geometry, block_ahead, left, place, group):
    """Return how far behind a row's beginning it is that its first block asks for, and how much further every fourth.

    With ``left`` blocks from this row on, in one of the groups of rows that are asked for together, and at a place in
    it. The next row's place and group follow.
    """
    apart, per_row = number(geometry, APART), number(geometry, BLOCKS_PER_ROW)
    lines = (per_row + 3) // 4
    if apart == 0 or left <= lines * apart * per_row:
        return block_ahead, 4 * number(geometry, BLOCKS_STEP), place, group
    block_row = number(geometry, ROW_AXIS_BLOCKS)
    ahead = (lines * apart - group * (lines - 1) - place) * block_row + 64 * place
    place += 1
    if place == lines:
        place = 0
        group = group + 1 if group + 1 < apart else 0
    return ahead, apart * block_row, place, group


@inner
def _nearby(geometry):
    """Return how far behind a row's beginning it is that its first block asks for, into the first level.

    And how much further each block goes, and the bits that are 0 in the place of one that asks.
    """
    block_row, step = number(geometry, ROW_AXIS_BLOCKS), number(geometry, BLOCKS_STEP)
    if number(geometry, GAPS_TOO):
        return PREFETCH_NEAR, block_row // number(geometry, BLOCKS_PER_ROW), 1
    if number(geometry, APART):
        return block_row, step, 3
    return PREFETCH_NEAR if block_row == 0 else 64, step, 3


@inner
def _prefetch_rest(geometry, block, scale):
    """Ask for what every fourth block of a row may leave out: the line in which it ends, and its scales."""
    last = number(geometry, BLOCKS_PER_ROW) - 1
    prefetch_far(block + last * number(geometry, BLOCKS_STEP))
    if number(geometry, SCALES_STEP) == 1:  # or they lie apart, among the blocks perhaps
        prefetch_far(scale)
        prefetch_far(scale + last // 2)
        prefetch_far(scale + last)


def _rows_decoder(*, streaming):
    decode = stream_block if streaming else decode_block

    @inner
    def decode_rows(geometry, word, count, first, block, scale, out):
        """Decode ``count`` blocks, from one of a row on, of rows that are decoded whole.

        All rows in one loop, which needs no memory for its own: between streaming stores, even a variable that has been
        put on the stack can be slow to come back, since the processor tells addresses apart by their lowest bits.
        """
        table, size = number(geometry, TABLE_ADDRESS), itemsize(word)
        block_step, scale_step = number(geometry, BLOCKS_STEP), number(geometry, SCALES_STEP)
        per_row = number(geometry, BLOCKS_PER_ROW)
        block_row, scale_row = number(geometry, ROW_AXIS_BLOCKS), number(geometry, ROW_AXIS_SCALES)
        out_row = number(geometry, ROW_AXIS_OUT)
        block_ahead, scale_ahead = _ahead(geometry)
        crosswise, left = number(geometry, APART) > 0, first + count
        ahead, stride, place, group = _far(geometry, block_ahead, left, 0, 0)
        far = block + ahead + first // 4 * stride
        near, pace, silent = _nearby(geometry)
        nearer = block + near + first * pace
        block += first * block_step
        scale += first * scale_step
        out += 32 * first * size
        g = first
        for _ in range(count):
            if g & 3 == 0:
                prefetch_far(far)
                far += stride
            if g & silent == 0:
                if crosswise:
                    prefetch_once(nearer)
                else:
                    prefetch(nearer)
            nearer += pace
            if not streaming:
                prefetch_to_write(out + PREFETCH_OUT)
                if size == 4:
                    prefetch_to_write(out + PREFETCH_OUT + 64)
            decode(block, table + TABLE_LINE * load_byte(scale), out, word)
            block += block_step
            scale += scale_step
            out += 32 * size
            g += 1
            if g == per_row:
                g = 0
                block += block_row - per_row * block_step
                scale += scale_row - per_row * scale_step
                out += out_row - 32 * per_row * size
                left -= per_row
                ahead, stride, place, group = _far(geometry, block_ahead, left, place, group)
                far, nearer = block + ahead, block + near
                _prefetch_rest(geometry, block + block_ahead, scale + scale_ahead)

    return decode_rows


_decode_whole_rows = _rows_decoder(streaming=False)
_stream_whole_rows = _rows_decoder(streaming=True)


@inner
def _next_shift(shift, gap):
    """Return the shift from ``out`` to the ring in the next row: another ``gap`` bytes of blocks are in no row."""
    shift += gap
    if shift & (RING - 1) >= RING - RING_GAP:
        shift += RING_GAP
    return shift


@inner
def _decode_to_ring(block, line, ring, place, word):
    """Decode a block to the ring, and if that is its beginning, also behind its end, where lines may reach to."""
    decode_block(block, line, ring + (place & (RING - 1)), word)
    if place & (RING - 1) == 0:
        decode_block(block, line, ring + RING, word)


@inner
def _stream_rows(geometry, word, count, first, block, scale, out, ring):
    """Decode ``count`` blocks, from one of a row on, of rows without gaps in ``out``, and stream whole lines of it.

    Blocks go to a ring in the first-level cache, and lines go from there to ``out`` after a while. What counts is:

    - No store crosses lines, since one that does halves the rate of those that stream. So blocks are aligned in the
      ring, and it is lines that are loaded from any address there. Where a row ends, a line is joined from two.
    - A line is loaded when the stores of its blocks have left the processor's queue, where those that stream hold them
      up: a load from two stores waits for that. This is the lag.
    - Nor does it have the lowest bits of a line just streamed in its address, since the processor tells addresses apart
      by them. How the two differ follows from the shift, which grows with every row.
    """
    table, size = number(geometry, TABLE_ADDRESS), itemsize(word)
    block_step, scale_step = number(geometry, BLOCKS_STEP), number(geometry, SCALES_STEP)
    per_row = number(geometry, BLOCKS_PER_ROW)
    start, row_bytes, block_bytes = number(geometry, START) * size, number(geometry, LENGTH) * size, 32 * size
    gap = per_row * block_bytes - row_bytes
    block_row, scale_row = number(geometry, ROW_AXIS_BLOCKS), number(geometry, ROW_AXIS_SCALES)
    block_ahead, scale_ahead = _ahead(geometry)
    begin = out + max(0, first * block_bytes - start)
    rows, rest = (first + count) // per_row, (first + count) % per_row
    end = out + rows * row_bytes + max(0, rest * block_bytes - start)
    # What is decoded next, and where its first element goes.
    crosswise, g, left = number(geometry, APART) > 0, first, first + count
    ahead, stride, place, group = _far(geometry, block_ahead, left, 0, 0)
    far = block + ahead + first // 4 * stride
    block += first * block_step
    scale += first * scale_step
    target = out + first * block_bytes - start
    shift = -target & (block_bytes - 1)
    # What is streamed next: a line, the shift and end of its row, and until where lines are of this row and whole.
    line, line_shift, row_end, plain = begin & -64, shift, out + row_bytes, begin
    while line < end:
        lead = target + shift - line - line_shift
        if count > 0 and lead < RING_LAG:
            blocks = min(count, per_row - g, (RING_LEAD - lead) // block_bytes)
            target += blocks * block_bytes
            count -= blocks
            for i in range(-blocks, 0):
                if g & 3 == 0:
                    prefetch_far(far)
                    far += stride
                    if crosswise:
                        prefetch_once(block + block_row)
                g += 1
                words = table + TABLE_LINE * load_byte(scale)
                _decode_to_ring(block, words, ring, target + shift + i * block_bytes, word)
                block += block_step
                scale += scale_step
        elif count > 0 and plain - line >= block_bytes:
            blocks = min(count, per_row - g, (plain - line) // block_bytes)
            slot = target + shift
            target += blocks * block_bytes
            count -= blocks
            for _ in range(blocks):
                if g & 3 == 0:
                    prefetch_far(far)
                    far += stride
                    if crosswise:
                        prefetch_once(block + block_row)
                g += 1
                _decode_to_ring(block, table + TABLE_LINE * load_byte(scale), ring, slot, word)
                block += block_step
                scale += scale_step
                slot += block_bytes
                for _ in range(size // 2):
                    stream_64(ring + ((line + line_shift) & (RING - 1)), line)
                    line += 64
        else:
            following = _next_shift(line_shift, gap)
            if begin <= line and line + 64 <= end:
                sources = ring + ((line + line_shift) & (RING - 1)), ring + ((line + following) & (RING - 1))
                stream_joined(sources[0], sources[1], min(64, row_end - line), line)
            else:
                for i in range(max(begin, line), min(end, line + 64)):
                    copy_1(ring + ((i + (line_shift if i < row_end else following)) & (RING - 1)), i)
            line += 64
            if line >= row_end:
                line_shift = following
                row_end += row_bytes
            plain = min(row_end, end)
        if g == per_row:
            g = 0
            block += block_row - per_row * block_step
            scale += scale_row - per_row * scale_step
            target -= gap
            shift = _next_shift(shift, gap)
            left -= per_row
            ahead, stride, place, group = _far(geometry, block_ahead, left, place, group)
            far = block + ahead
            _prefetch_rest(geometry, block + block_ahead, scale + scale_ahead)


@inner
def _copy_bytes(source, target, begin, end):
    """Copy a range of bytes, one by one."""
    for i in range(begin, end):
        copy_1(source + i, target + i)


@inner
def _join_rows(geometry, word, count, first, block, scale, out):
    """Decode and stream as `_stream_rows` does, to aligned elements, where words can be joined in registers.

    The words of a block that a line has no room for are kept for the next one.
    """
    kept, elements = reserve_kept(), reserve_line()
    table, size = number(geometry, TABLE_ADDRESS), itemsize(word)
    block_step, scale_step = number(geometry, BLOCKS_STEP), number(geometry, SCALES_STEP)
    per_row, start = number(geometry, BLOCKS_PER_ROW), number(geometry, START)
    end = start + number(geometry, LENGTH)
    block_row, scale_row = number(geometry, ROW_AXIS_BLOCKS), number(geometry, ROW_AXIS_SCALES)
    block_ahead, scale_ahead = _ahead(geometry)
    crosswise, left = number(geometry, APART) > 0, first + count
    ahead, stride, place, group = _far(geometry, block_ahead, left, 0, 0)
    far = block + ahead + first // 4 * stride
    near, pace, silent = _nearby(geometry)
    nearer = block + near + first * pace
    begin = out + size * max(0, 32 * first - start)
    line = begin & -64
    there = others = (begin - line) // size  # words for this line, and how many of them are not of this run
    block += first * block_step
    scale += first * scale_step
    g = first
    while count > 0:
        begin = start if g == 0 else 0
        added = min(32, end - 32 * g) - begin
        blocks = min(count, end // 32 - g) if others == 0 and added == 32 else 1
        count -= blocks
        if others > 0 or there + added < 32:
            words = table + TABLE_LINE * load_byte(scale)
            if there + added < 32:
                keep_words(kept, there, block, words, begin, line, word)
            else:
                join_words(kept, there, block, words, begin, elements, word)
                _copy_bytes(elements, line, others * size, 32 * size)
                others = 0
                line += 32 * size
            if g & 3 == 0:
                prefetch_far(far)
                far += stride
            nearer += pace
            block += block_step
            scale += scale_step
            g += 1
        else:
            for _ in range(blocks):
                if g & 3 == 0:
                    prefetch_far(far)
                    far += stride
                if g & silent == 0:
                    if crosswise:
                        prefetch_once(nearer)
                    else:
                        prefetch(nearer)
                nearer += pace
                stream_words(kept, there, block, table + TABLE_LINE * load_byte(scale), begin, line, word)
                line += 32 * size
                block += block_step
                scale += scale_step
                g += 1
        there = (there + added) & 31
        if g == per_row:
            g = 0
            block += block_row - per_row * block_step
            scale += scale_row - per_row * scale_step
            left -= per_row
            ahead, stride, place, group = _far(geometry, block_ahead, left, place, group)
            far, nearer = block + ahead, block + near
            _prefetch_rest(geometry, block + block_ahead, scale + scale_ahead)
    move_line(kept, elements, word)
    _copy_bytes(elements, line, others * size, there * size)


@inner
def _decode_ragged(geometry, word, count, first, block, scale, out):
    """Decode ``count`` blocks, from one of a row on, of any rows: what is not whole, or not dense, by elements."""
    while count > 0:
        last = min(number(geometry, BLOCKS_PER_ROW), first + count)
        whole, end = last, last
        if number(geometry, OUT_STEP) == itemsize(word):
            whole = min(last, max(first, (number(geometry, START) + 31) // 32))
            end = max(whole, min(last, (number(geometry, START) + number(geometry, LENGTH)) // 32))
        _decode_part(geometry, word, first, whole, block, scale, out)
        for g in range(whole, end):
            line = number(geometry, TABLE_ADDRESS) + TABLE_LINE * load_byte(scale + g * number(geometry, SCALES_STEP))
            target = out + (32 * g - number(geometry, START)) * itemsize(word)
            decode_block(block + g * number(geometry, BLOCKS_STEP), line, target, word)
        _decode_part(geometry, word, end, last, block, scale, out)
        count -= last - first
        first = 0
        block += number(geometry, ROW_AXIS_BLOCKS)
        scale += number(geometry, ROW_AXIS_SCALES)
        out += number(geometry, ROW_AXIS_OUT)


@inner
def _block_at(geometry, block):
    """Return the addresses of a block and of its scale."""
    row = block // number(geometry, BLOCKS_PER_ROW)
    step = block - row * number(geometry, BLOCKS_PER_ROW)
    block, scale, _ = _addresses(geometry, row)
    return block + step * number(geometry, BLOCKS_STEP), scale + step * number(geometry, SCALES_STEP)


@inner
def _row_at(geometry, row):
    """Return the addresses of a row and of its scales, of matrices whose rows are counted by full groups of 32."""
    rows = (number(geometry, ROWS) + 31) // 32 * 32
    matrix = row // rows
    row = min(row - matrix * rows, number(geometry, ROWS) - 1)
    block, scale, _ = _addresses(geometry, matrix)
    return block + row * number(geometry, BLOCKS_ROW), scale + row * number(geometry, SCALES_ROW)


@inner
def _populate_blocks(geometry, begin, stop):
    """Have a range of blocks, counted over all rows, and their scales mapped."""
    _populate(_block_at(geometry, begin), _block_at(geometry, stop - 1), stop - begin)


@inner
def _populate_groups(geometry, begin, stop):
    """Have a range of groups of 32 rows, counted over all matrices, and their scales mapped."""
    per_row, (block, scale) = number(geometry, BLOCKS_PER_ROW), _row_at(geometry, 32 * stop - 1)
    block += (per_row - 1) * number(geometry, BLOCKS_STEP)
    scale += (per_row - 1) * number(geometry, SCALES_STEP)
    _populate(_row_at(geometry, 32 * begin), (block, scale), 32 * per_row * (stop - begin))


def _reader(populate_units):
    @inner
    def read_ahead(geometry):
        """Have units mapped that nobody has claimed, unless many are, or another thread is about that; return if any.

        While one thread waits for the disk, others decode; where all do both, the disk waits for them now and then.
        """
        has_read = False
        for _ in range(STEPS_AHEAD):
            if replace_shared(geometry, READING, 0, 1) != 0:
                break
            next_ = shared(geometry, NEXT)
            begin = max(next_, number(geometry, READ))
            is_near = begin < min(number(geometry, UNITS), next_ + STEPS_AHEAD * number(geometry, MOST))
            if is_near:
                stop = min(number(geometry, UNITS), begin + number(geometry, MOST))
                populate_units(geometry, begin, stop)
                add_shared(geometry, READ, stop - number(geometry, READ))
                has_read = True
            replace_shared(geometry, READING, 1, 0)
            if not is_near:
                break
        return has_read

    return read_ahead


_read_blocks_ahead = _reader(_populate_blocks)
_read_groups_ahead = _reader(_populate_groups)


@inner
def _runs(geometry, row_by_row):
    """Yield what this thread is to decode, in runs of blocks along the innermost axis of rows, or in parts of one row.

    That is how many blocks, the first one's place in its row, and the addresses of this row.
    """
    for begin, stop in pieces(geometry):
        if number(geometry, MAPPED) and stop > shared(geometry, READ):
            _populate_blocks(geometry, begin, stop)
        start = begin
        while start < stop:
            per_row, rows = number(geometry, BLOCKS_PER_ROW), number(geometry, ROW_AXIS)
            row = start // per_row
            first = start - row * per_row
            left = per_row if row_by_row else (rows - row % rows) * per_row
            count = min(stop - start, left - first)
            block, scale, out = _addresses(geometry, row)
            yield count, first, block, scale, out
            start += count
        if number(geometry, STREAMING):
            fence()
        if number(geometry, MAPPED) and number(geometry, HELPERS) and _read_blocks_ahead(geometry):
            break


def decode_pieces(geometry, word):
    """Decode blocks, counted over all rows in C order, to words of the type of ``word``.

    Rows are decoded whole, to elements next to each other, and to whole lines if these are streamed.
    """
    for count, first, block, scale, out in _runs(geometry, False):
        if number(geometry, STREAMING):
            _stream_whole_rows(geometry, word, count, first, block, scale, out)
        else:
            _decode_whole_rows(geometry, word, count, first, block, scale, out)
    return are_left(geometry)


@inner
def _without_gaps(geometry, word):
    """Tell whether rows follow each other without gaps in ``out``."""
    return number(geometry, ROW_AXIS_OUT) == number(geometry, LENGTH) * itemsize(word)


def join_pieces(geometry, word):
    """Decode as `decode_pieces` does, past the cache, to rows that begin and end anywhere, where words can be joined.

    Elements are aligned, and next to each other.
    """
    for count, first, block, scale, out in _runs(geometry, not _without_gaps(geometry, word)):
        _join_rows(geometry, word, count, first, block, scale, out)
    return are_left(geometry)


def ring_pieces(geometry, word):
    """Decode as `join_pieces` does, where words cannot be joined, or elements are not aligned."""
    ring = (reserve_ring() + RING - 1) & -RING  # a frame that the compiler aligned would cost the loops a register
    for count, first, block, scale, out in _runs(geometry, not _without_gaps(geometry, word)):
        _stream_rows(geometry, word, count, first, block, scale, out, ring)
    return are_left(geometry)


def ragged_pieces(geometry, word):
    """Decode as `decode_pieces` does, through the cache, to rows that begin and end anywhere, and to any elements."""
    for count, first, block, scale, out in _runs(geometry, False):
        _decode_ragged(geometry, word, count, first, block, scale, out)
    return are_left(geometry)


def transpose_pieces(geometry, word):
    """Decode matrices whose rows are the columns of ``out``, 32 rows at a time.

    Groups of rows are counted over all matrices in C order, the last of a matrix being what is left of it. Elements of
    a column of ``out`` are next to each other.
    """
    table = number(geometry, TABLE_ADDRESS)
    size = number(geometry, ITEMSIZE)
    step = number(geometry, OUT_STEP)
    block_step = number(geometry, BLOCKS_STEP)
    block_row = number(geometry, BLOCKS_ROW)
    scale_row = number(geometry, SCALES_ROW)
    per_row = number(geometry, BLOCKS_PER_ROW)
    scale_step = number(geometry, SCALES_STEP)
    groups = (number(geometry, ROWS) + 31) // 32
    tile, codes, scales = reserve_tile(), reserve_turned(), reserve_turned()
    last, count = USUAL_BFLOAT16
    if load_word(table + TABLE_LINE * SCALE_OF_1 + 2 * CODE_OF_1) == FLOAT16_1:
        last, count = USUAL_FLOAT16
    for begin, stop in pieces(geometry):
        if number(geometry, MAPPED) and stop > shared(geometry, READ):
            _populate_groups(geometry, begin, stop)
        start = begin
        while start < stop:
            matrix = start // groups
            top = 32 * (start - matrix * groups)
            block, scale, out = _addresses(geometry, matrix)
            block += top * block_row
            scale += top * scale_row
            out += top * size
            # Blocks that are inside as a whole, where there are 32 rows, go by tiles; all else goes by elements.
            rows = min(number(geometry, ROWS) - top, 32)
            whole = end = per_row
            if rows == 32:
                rows = min(32 * min(stop - start, TILES_ABREAST), (number(geometry, ROWS) - top) & -32)
                whole = min(per_row, (number(geometry, START) + 31) // 32)
                end = max(whole, min(per_row, (number(geometry, START) + number(geometry, LENGTH)) // 32))
            start += (rows + 31) // 32
            for row in range(rows):
                source = block + row * block_row, scale + row * scale_row
                _decode_part(geometry, word, 0, whole, source[0], source[1], out + row * size)
                _decode_part(geometry, word, end, per_row, source[0], source[1], out + row * size)
            turned = -16  # where the 16 columns of scales begin that are transposed
            for g in range(whole, end):
                # Rows lie too far apart for the processor to see what comes next: a line of four blocks.
                for row in range(rows + g % 4, 2 * rows, 4):
                    prefetch(block + row * block_row + g * block_step)
                target = out + (32 * g - number(geometry, START)) * step
                aligned = number(geometry, STREAMING) and (target | step) % 64 == 0
                if by_codes() and rows == 32 * TILES_ABREAST and scale_step == 1 and per_row >= 16:
                    if g >= turned + 16:
                        turned = min(g, per_row - 16)
                        for row in range(0, rows, 32):
                            turn_bytes(scale + row * scale_row + turned, scale_row, scales + 16 * row)
                    for row in range(0, rows, 32):
                        turn_bytes(block + row * block_row + g * block_step, block_row, codes + 16 * row)
                    column = scales + 32 * (g - turned)
                    if aligned:
                        if stream_turned(codes, column, table, last, count, target, step, word):
                            continue
                    elif decode_turned(codes, column, table, last, count, target, step, word):
                        continue
                for row in range(0, rows, 32):
                    source = block + row * block_row + g * block_step, scale + row * scale_row + g * scale_step
                    decode_tile(source[0], block_row, source[1], scale_row, table, tile, word)
                    for i in range(32):
                        if aligned:
                            stream_line(tile + 64 * i, target + i * step + row * size, word)
                        else:  # parts of lines, far apart, are not for streaming
                            move_line(tile + 64 * i, target + i * step + row * size, word)
        if number(geometry, STREAMING):
            fence()
        if number(geometry, MAPPED) and number(geometry, HELPERS) and _read_groups_ahead(geometry):
            break
    return are_left(geometry)


def stream_pieces(geometry, word):
    """Do to memory what decoding the blocks of a single row does, and decode nothing."""
    block, scale, out = _addresses(geometry, 0)
    block_step, scale_step = number(geometry, BLOCKS_STEP), number(geometry, SCALES_STEP)
    size = number(geometry, ITEMSIZE)
    for start, stop in pieces(geometry):
        for g in range(start, stop):
            move_block(block + g * block_step, scale + g * scale_step, out + 32 * g * size, word)
        fence()
    return are_left(geometry)


def _load_words(builder, address, width):
    """Return 32 values, of so many bits each, as words."""
    if width == 16:
        return _load(builder, address, _vector(_I16, 32))
    values = _load(builder, address, _vector(_I32, 32))
    behind = builder.and_(values, _constants(_I32, [0xFFFF] * 32))
    behind = _call(builder, "llvm.umin.v32i32", behind.type, behind, _constants(_I32, [1] * 32))
    words = builder.or_(builder.lshr(values, _constants(_I32, [16] * 32)), behind)
    return builder.trunc(words, _vector(_I16, 32))


def _magnitudes(builder, words):
    return builder.and_(words, _constants(_I16, [0x7FFF] * words.type.count))


def _repeated(builder, value, count):
    """Return a vector that repeats a number."""
    vector = builder.insert_element(ir.Constant(_vector(value.type, count), ir.Undefined), value, _I32(0))
    return _join(builder, vector, vector, [0] * count)


def _splat(builder, address, count):
    """Return a vector that repeats a word which the table has twice."""
    both = builder.insert_element(
        ir.Constant(_vector(_I32, count // 2), ir.Undefined), _load(builder, address, _I32, 4), _I32(0)
    )
    return builder.bitcast(_join(builder, both, both, [0] * (count // 2)), _vector(_I16, count))


@intrinsic
def squeeze_block(typingctx, block, target, word):
    """Write the block at one address as words to another, if it is not words; return its largest bits."""

    def codegen(context, builder, signature, args):
        block, target, word = args
        words = _load_words(builder, block, word.type.width)
        if word.type.width != 16:
            _store(builder, words, target, 64)
        largest = _call(builder, "llvm.vector.reduce.smax.v32i16", _I16, _magnitudes(builder, words))
        return builder.zext(largest, target.type)

    return types.int64(types.int64, types.int64, word), codegen


@intrinsic
def encode_block(typingctx, words, line, out):
    """Write the codes of the words at one address to another, by a line of the table, whatever it is."""

    def codegen(context, builder, signature, args):
        words, line, out = args
        words = _load(builder, words, _vector(_I16, 32))
        magnitudes = _magnitudes(builder, words)
        codes = builder.and_(builder.lshr(words, _constants(_I16, [12] * 32)), _constants(_I16, [8] * 32))
        for code in range(7):
            beyond = builder.icmp_signed(">", magnitudes, _splat(builder, _offset(builder, line, 4 * code), 32))
            codes = builder.add(codes, builder.zext(beyond, codes.type))
        pairs = builder.bitcast(codes, _vector(_I32, 16))
        pairs = builder.or_(pairs, builder.lshr(pairs, _constants(_I32, [12] * 16)))
        pairs = builder.trunc(pairs, _vector(_I8, 16))
        builder.store(pairs, builder.inttoptr(out, pairs.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _has_avx2(context):
    _, _, features = context.codegen().magic_tuple()
    return "+avx2" in features.split(",")


@intrinsic
def has_avx2(typingctx):
    """Return whether `scale_eight` and `encode_pair` are there."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), _has_avx2(context))

    return types.boolean(), codegen


def _mantissa(word):
    return 10 if word == types.int16 else 7


def _maximum(builder, first, second):
    return _call(builder, "llvm.umax.v16i16", first.type, first, second)


def _largest_of_eight(builder, vectors):
    """Return the largest word of each of eight vectors."""
    # Interleaving two, which takes a pair of unpack instructions, brings two words of each one above the other.
    low = [8 * part + i // 2 + 16 * (i % 2) for part in range(2) for i in range(8)]
    high = [i + 4 for i in low]
    while len(vectors) > 1:
        pairs = zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True)
        vectors = [_maximum(builder, _join(builder, *pair, low), _join(builder, *pair, high)) for pair in pairs]
    both = _maximum(builder, *vectors, _join(builder, *vectors, *vectors, [*range(8, 16), *range(8)]))
    return _join(builder, both, both, range(8))


def _half_block(builder, address, word):
    """Return 16 values as words: float32 values 0 and 8, then 1 and 9, and so on."""
    if word.bitwidth == 16:
        return _load(builder, address, _vector(_I16, 16))
    first, second = (_load(builder, _offset(builder, address, offset), _vector(_I32, 8)) for offset in (0, 32))
    sixteen = _constants(_I32, [16] * 8)
    parts = (builder.lshr(first, sixteen), second), (first, builder.shl(second, sixteen))
    order = [i + i % 2 * 16 for i in range(16)]
    words, behind = (
        _join(builder, *(builder.bitcast(value, _vector(_I16, 16)) for value in part), order) for part in parts
    )
    return builder.or_(words, _call(builder, "llvm.umin.v16i16", behind.type, behind, _constants(_I16, [1] * 16)))


@intrinsic
def scale_eight(typingctx, blocks, rounding, scales, bases, bits, signs, word):
    """Write the scales of eight blocks, and what their codes are made from; return whether all of them have a base.

    That is a base for each, twice; the bits of each value, without the sign, times two, plus the tie; and a byte for
    each, in the order that packing leaves them in, which begins with the sign.
    """

    def codegen(context, builder, signature, args):
        if not _has_avx2(context):
            return ir.Constant(ir.IntType(1), 0)
        blocks, rounding, scales, bases, bits, signs, _ = args
        word = signature.args[6]
        mantissa = _mantissa(word)
        vectors = []
        for block in range(8):
            halves = [
                _half_block(builder, _offset(builder, blocks, (2 * block + i) * 2 * word.bitwidth), word)
                for i in (0, 1)
            ]
            doubled = []
            for i, words in enumerate(halves):
                tie = builder.lshr(words, _constants(_I16, [mantissa - 1] * 16))
                tie = builder.and_(tie, _constants(_I16, [1] * 16))
                doubled.append(builder.or_(builder.add(words, words), tie))
                _store(builder, doubled[i], _offset(builder, bits, 64 * block + 32 * i), 32)
            packed = _call(builder, "llvm.x86.avx2.packsswb", _vector(_I8, 32), *halves)
            _store(builder, packed, _offset(builder, signs, 32 * block), 32)
            vectors.append(_maximum(builder, *doubled))

        def constant(value):
            return _constants(_I16, [value] * 8)

        largest = builder.lshr(_largest_of_eight(builder, vectors), constant(1))
        rounded = builder.add(largest, _splat(builder, rounding, 8))
        exponents = builder.add(builder.lshr(rounded, constant(mantissa)), constant(110 if mantissa == 10 else -2))
        exponents = _call(builder, "llvm.smax.v8i16", largest.type, exponents, constant(0))
        is_zero = builder.icmp_signed("==", largest, constant(0))
        exponents = builder.trunc(builder.select(is_zero, constant(0), exponents), _vector(_I8, 8))
        _store(builder, exponents, scales)
        # All times two: a quarter less than the first bound, which is 2**-4 times the power of two. One more, since a
        # value on a bound belongs below it, if it has no tie.
        base = builder.shl(builder.and_(rounded, constant(-1 << mantissa)), constant(1))
        base = builder.sub(base, constant((8 << mantissa) + (1 << (mantissa - 1)) - 1))
        _store(builder, _join(builder, base, base, [i // 2 for i in range(16)]), bases, 4)
        is_normal = builder.icmp_signed(">=", rounded, constant(5 << mantissa))
        is_finite = builder.icmp_signed("<", largest, constant(0x7FFF >> mantissa << mantissa))
        has_base = builder.bitcast(builder.or_(is_zero, builder.and_(is_normal, is_finite)), _I8)
        return builder.icmp_unsigned("==", has_base, _I8(255))

    return types.boolean(*[types.int64] * 6, word), codegen


def _codes_avx2(builder, base, bits, signs, mantissa):
    """Return the codes of a block, in the order that packing leaves them in."""
    bytes_type = _vector(_I8, 32)
    base = _splat(builder, base, 16)
    quarters = []
    for offset in (0, 32):
        half = _load(builder, _offset(builder, bits, offset), base.type, 32)
        half = _call(builder, "llvm.usub.sat.v16i16", base.type, half, base)
        quarters.append(builder.lshr(half, _constants(_I16, [mantissa - 1] * 16)))
    quarters = _call(builder, "llvm.x86.avx2.packuswb", bytes_type, *quarters)
    codes = _call(builder, "llvm.usub.sat.v32i8", bytes_type, quarters, _constants(_I8, [5] * 32))
    codes = _call(builder, "llvm.x86.avx2.pshuf.b", bytes_type, _constants(_I8, CODES_FROM_5 * 2), codes)
    codes = _call(builder, "llvm.umin.v32i8", bytes_type, codes, quarters)  # 0 for 0, and changes no other
    negative = builder.or_(codes, _constants(_I8, [8] * 32))
    return _call(builder, "llvm.x86.avx2.pblendvb", bytes_type, codes, negative, _load(builder, signs, bytes_type, 32))


@intrinsic
def encode_pair(typingctx, bases, bits, signs, out, word):
    """Write the codes of two blocks by what `scale_eight` has written."""

    def codegen(context, builder, signature, args):
        if not _has_avx2(context):
            return context.get_dummy_value()
        bases, bits, signs, out, _ = args
        word = signature.args[4]
        codes = []
        for i in range(2):
            places = [_offset(builder, place, n * i) for place, n in ((bases, 4), (bits, 64), (signs, 32))]
            codes.append(_codes_avx2(builder, *places, _mantissa(word)))
        # Multiply and add brings two codes together: that are neighbours, or of float32, that are one apart.
        if word.bitwidth == 16:
            multiply, factors, pack = "llvm.x86.avx2.pmadd.ub.sw", _constants(_I8, [1, 16] * 16), "packuswb"
            order = [16 * (i // 4 % 2) + 8 * (i // 16) + 4 * (i // 8 % 2) + i % 4 for i in range(32)]
        else:
            multiply, factors, pack = "llvm.x86.avx2.pmadd.wd", _constants(_I16, [1, 16] * 8), "packusdw"
            order = [16 * (i // 2 % 2) + 8 * (i // 16) + 4 * (i // 8 % 2) + i // 4 % 2 + 2 * (i % 2) for i in range(32)]
        summed = _vector(_I16, 16) if word.bitwidth == 16 else _vector(_I32, 8)
        packed = _vector(_I8, 32) if word.bitwidth == 16 else _vector(_I16, 16)
        codes = [_call(builder, multiply, summed, builder.bitcast(half, factors.type), factors) for half in codes]
        codes = builder.bitcast(_call(builder, f"llvm.x86.avx2.{pack}", packed, *codes), _vector(_I8, 32))
        _store(builder, _join(builder, codes, codes, order), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, word), codegen


@intrinsic
def stand_alone(typingctx):
    """Keep the function that calls this one from becoming a part of its caller: its loops want all registers."""

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def store_byte(typingctx, value, out):
    """Write a uint8 to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[0], builder.inttoptr(args[1], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint8, types.int64), codegen


ENCODE_BLOCKS = 64
"""Blocks that are encoded together."""

reserve_values = _reserver(ENCODE_BLOCKS * 128, 64)
reserve_words = _reserver(ENCODE_BLOCKS * 64, 64)
reserve_bases = _reserver(ENCODE_BLOCKS * 4, 64)
reserve_bits = _reserver(ENCODE_BLOCKS * 64, 64)
reserve_signs = _reserver(ENCODE_BLOCKS * 32, 64)
reserve_codes = _reserver(ENCODE_BLOCKS * 16, 64)
reserve_scales = _reserver(ENCODE_BLOCKS, 64)
copy_2 = _copier(2, 1, streaming=False)
copy_16 = _copier(16, 1, streaming=False)


@njit(nogil=True, inline="always")
def _gather(source, step, target, size, count):
    """Copy so many elements of 2 or 4 bytes that lie apart."""
    for _ in range(count):
        copy_2(source, target)
        if size == 4:
            copy_2(source + 2, target + 2)
        source += step
        target += size


@intrinsic
def turn_tile(typingctx, source, step, target, word):
    """Write 32 runs of 32 values, a step apart, as the words of 32 blocks: each has one value of every run."""

    def codegen(context, builder, signature, args):
        source, step, target, word = args
        runs = []
        for _ in range(32):
            runs.append(_load_words(builder, source, word.type.width))
            source = builder.add(source, step)
        for i, block in enumerate(_transposed(builder, runs)):
            _store(builder, block, _offset(builder, target, 64 * i), 64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, word), codegen


@intrinsic
def squeezed(typingctx, word):
    """Return a word of the type of the words that values of the type of ``word`` are made into."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_I16, 0)

    return (types.int16 if word == types.int16 else types.uint16)(word), codegen


@njit(nogil=True, inline="always")
def _encode_any(table, x, word, count, codes, scales):
    """Encode up to `ENCODE_BLOCKS` blocks of any values."""
    words, size = reserve_words(), 32 * itemsize(word)
    for k in range(count):
        store_byte(load_byte(table + squeeze_block(x + size * k, words + 64 * k, word)), scales + k)
    words = x if itemsize(word) == 2 else words
    for k in range(count):
        line = table + ENCODE_LINES + ENCODE_LINE * load_byte(scales + k)
        encode_block(words + 64 * k, line, codes + 16 * k)


@inner
def _scale_blocks(x, word, count, rounding, scales, bases, bits, signs):
    """Write scales of blocks, eight or more, and what `encode_pair` wants; return whether all of them have a base."""
    stand_alone()
    based = True
    for i in range(0, count, 8):
        k = min(i, count - 8)  # the last eight may have been there
        block = x + 32 * itemsize(word) * k
        based &= scale_eight(block, rounding, scales + k, bases + 4 * k, bits + 64 * k, signs + 32 * k, word)
    return based


@inner
def _encode_based(word, count, bases, bits, signs, codes):
    """Write the codes of blocks that have bases, two or more."""
    stand_alone()
    for i in range(0, count, 2):
        k = min(i, count - 2)
        encode_pair(bases + 4 * k, bits + 64 * k, signs + 32 * k, codes + 16 * k, word)


@njit(nogil=True, inline="always")
def _encode_blocks(table, x, word, count, codes, scales):
    """Encode up to `ENCODE_BLOCKS` blocks that follow each other, to codes and scales that do."""
    # All scales before all codes: a code waits for its scale, which waits for all of its block.
    rounding = table + ENCODE_LINES + ENCODE_ROUNDING
    bases, bits, signs = reserve_bases(), reserve_bits(), reserve_signs()
    if has_avx2() and count >= 8 and _scale_blocks(x, word, count, rounding, scales, bases, bits, signs):
        _encode_based(word, count, bases, bits, signs, codes)
    else:
        _encode_any(table, x, word, count, codes, scales)


def encode_pieces(geometry, word):
    """Encode blocks, counted over all rows in C order, from words of the type of ``word``.

    The geometry is that of decoding, ``out`` being what is encoded.
    """
    step, size = number(geometry, OUT_STEP), itemsize(word)
    block_step, scale_step = number(geometry, BLOCKS_STEP), number(geometry, SCALES_STEP)
    per_row = number(geometry, BLOCKS_PER_ROW)
    values, codes, bytes_ = reserve_values(), reserve_codes(), reserve_scales()
    for begin, stop in pieces(geometry):
        start = begin
        while start < stop:
            row = start // per_row
            first = start - row * per_row
            out, scales, x = _addresses(geometry, row)
            out += first * block_step
            scales += first * scale_step
            x += 32 * first * step
            count = min(stop - start, per_row - first, ENCODE_BLOCKS)
            start += count
            if step != size:
                _gather(x, step, values, size, 32 * count)
                x = values
            dense = block_step == 16 and scale_step == 1
            _encode_blocks(
                number(geometry, TABLE_ADDRESS), x, word, count, out if dense else codes, scales if dense else bytes_
            )
            if not dense:
                for k in range(count):
                    copy_16(codes + 16 * k, out + k * block_step)
                    copy_1(bytes_ + k, scales + k * scale_step)
    return are_left(geometry)


GROUPS_ABREAST = 8
"""Groups of 32 rows that are encoded together, so that it is several cache lines in a row that are read."""


def encode_columns_pieces(geometry, word):
    """Encode matrices whose rows are columns in memory, 32 rows at a time.

    Groups of rows, of 32 or more, are counted as `transpose_pieces` does.
    """
    step, rows = number(geometry, OUT_STEP), number(geometry, ROWS)
    groups = (rows + 31) // 32
    tile, codes, bytes_ = reserve_tile(), reserve_codes(), reserve_scales()
    for begin, stop in pieces(geometry):
        start = begin
        while start < stop:
            matrix = start // groups
            group = start - matrix * groups
            abreast = min(stop - start, groups - group, GROUPS_ABREAST)
            start += abreast
            out, scales, x = _addresses(geometry, matrix)
            for _ in range(number(geometry, BLOCKS_PER_ROW)):
                for top in range(32 * group, 32 * (group + abreast), 32):
                    first = min(top, rows - 32)  # the last group may read rows of the one before
                    source = x + first * itemsize(word)
                    for i in range(32, 64):  # too far apart for the processor to see what comes next
                        for line in range(0, 32 * itemsize(word), 64):
                            prefetch(source + i * step + line)
                    turn_tile(source, step, tile, word)
                    _encode_blocks(number(geometry, TABLE_ADDRESS), tile, squeezed(word), 32, codes, bytes_)
                    for i in range(top, min(top + 32, rows)):
                        copy_16(codes + 16 * (i - first), out + i * number(geometry, BLOCKS_ROW))
                        copy_1(bytes_ + i - first, scales + i * number(geometry, SCALES_ROW))
                out += number(geometry, BLOCKS_STEP)
                scales += number(geometry, SCALES_STEP)
                x += 32 * step
    return are_left(geometry)


# Memory that a device copies from is filled by several threads, each of which has a few slots of it in turn: it claims
# some pieces, a load, and fills one slot with their bytes, while others are copied by CUDA's driver. Pieces are
# claimed in order, and loads copied as soon as they are there: small ones first, for the bus to have something to do.
# Pieces that belong together are a part; the thread that leads is told when all of a part have been queued.
#
# The bus takes lines from a processor's nearest cache at less than half its rate, and from the last one at all of it,
# which leaves the host's memory to those who read there. So a thread has several slots, whose lines push each other out
# of the nearest cache, and loads are copied the oldest first. What nothing comes behind is stored past the caches.
#
# The thread that leads fills slots only if others leave some to it: its caches keep what else it does.
#
# The driver does one thing at a time, and threads that wait for each other there wait for long. So one calls it for
# all, whichever comes first. The bus rests behind each copy, but less so within a batch: what is full meanwhile waits
# until the batch before the last one is done, or nothing more is to come, and is queued as one.
#
# The job is called `loading`. Next in it is how many pieces are claimed, are known, and may be copied (the memory that
# later ones are for is still in use); whether a thread is calling the driver, and what that said when it failed; how
# many slots were queued, how many of them are free again, and how many had been queued before the last batch; how many
# threads have come to fill slots, and which of them the leading one is; whether all goes on; bytes of a piece, pieces
# that a slot has room for, how many slots each thread has, and how many there are; the driver's functions, that for
# batches 0 if it has none, and the context of the device.
CLAIMED, KNOWN, OPEN, CALLING, STATUS, QUEUED, FREED, LAST_BATCH, FILLERS, LEADER = range(4, 14)
GOING_ON, PIECE_BYTES, SLOT_PIECES, SLOTS_EACH, SLOTS = range(14, 19)
COPY, COPY_BATCH, RECORD, QUERY, SET_CONTEXT, CONTEXT = range(19, 25)
# Then what the driver is told of a batch: attributes (that sources are read in the order of the stream), which copy
# they begin with, room for an error's place; and for each copy its slot, target, source and bytes.
ATTRIBUTES, FIRST_COPY, WRONG_COPY, BATCH = 25, 28, 29, 30
IN_ORDER = 1
MOST_COPIES = 8
TARGETS, SOURCES, SIZES = (BATCH + i * MOST_COPIES for i in range(1, 4))
# Then come parts, as in a ring: the pieces that are not queued yet, the first piece, the stream for their copies, and
# one or two arrays: pieces, bytes, where they are, in runs a step apart, and the address that they are for.
FIRST_PART, PART_NUMBERS, PARTS = BATCH + 4 * MOST_COPIES, 16, 4
NO_PIECE = (1 << 63) - 1  # the first of a part that is not there yet
MISSING, FIRST_PIECE, STREAM, ARRAYS, ARRAY_NUMBERS = 0, 1, 2, 3, 6
ARRAY_PIECES, NBYTES, SOURCE, RUN_BYTES, RUN_STEP, DESTINATION = 0, 1, 2, 3, 4, 5
# Then slots: their memory and event, what happens to them, and a place of the ring in which they were queued. If a slot
# has a load: its first piece and how many it has, part and array, its first byte there, how many bytes it has, how many
# have been filled in, and whether past the caches. Which array, part or slot it is, is said by where its numbers are.
FIRST_SLOT, SLOT_NUMBERS = FIRST_PART + PARTS * PART_NUMBERS, 16
MEMORY, EVENT, STATE, IN_QUEUE = 0, 1, 2, 3
PIECE, PIECES, PART, ARRAY, FIRST_BYTE, LOADED_BYTES, FILLED, PAST_CACHES = 4, 5, 6, 7, 8, 9, 10, 11
FREE, FILLING, FULL, COPYING = 0, 1, 2, 3

CUDA_SUCCESS, CUDA_ERROR_NOT_READY = 0, 600

PATIENCE = 16
"""How many times as often as `SPINS` a thread looks for something to do, for some milliseconds, before it rests."""

RESTS = 1000
"""How often the leading thread rests, for a tenth of a second, before it can be interrupted."""

PREFETCH_BYTES = 2048

copy_64 = _copier(64, 1, streaming=False)


@njit(nogil=True, inline="always")
def _copy_run(source, target, count, past_caches):
    """Copy so many bytes, a line at a time while there is one."""
    streaming = past_caches and target & 63 == 0
    for _ in range(count // 64):
        prefetch(source + PREFETCH_BYTES)
        if streaming:
            stream_64(source, target)
        else:
            copy_64(source, target)
        source += 64
        target += 64
    for i in range(count % 64):
        copy_1(source + i, target + i)


@inner
def _most_fillers(loading):
    """Return for how many threads there are slots."""
    return -(-number(loading, SLOTS) // number(loading, SLOTS_EACH))


@inner
def _claim_load(loading, slot):
    """Claim the next pieces for a slot, if there are any: one, and one more for each that every thread has had."""
    piece = shared(loading, CLAIMED)
    left = shared(loading, KNOWN) - piece
    if left <= 0:
        return
    # Meanwhile others may claim it, and a part that is done may be overwritten by one that comes later: then what is
    # found here is wrong, and is not claimed either.
    part, first = loading, -1
    for i in range(PARTS):
        other = loading + 8 * (FIRST_PART + PART_NUMBERS * i)
        begin = shared(other, FIRST_PIECE)
        if first < begin <= piece:
            part, first = other, begin
    array, before = part + 8 * ARRAYS, piece - first
    if before >= number(array, ARRAY_PIECES):
        before -= number(array, ARRAY_PIECES)
        array += 8 * ARRAY_NUMBERS
    threads, most = _most_fillers(loading), number(loading, SLOT_PIECES)
    count = min(most, 1 + piece // threads, number(array, ARRAY_PIECES) - before)
    if replace_shared(loading, CLAIMED, piece, piece + count) != piece:
        return
    begin = before * number(loading, PIECE_BYTES)
    set_number(slot, PIECE, piece)
    set_number(slot, PIECES, count)
    set_number(slot, PART, part)
    set_number(slot, ARRAY, array)
    set_number(slot, FIRST_BYTE, begin)
    set_number(slot, LOADED_BYTES, min(count * number(loading, PIECE_BYTES), number(array, NBYTES) - begin))
    set_number(slot, FILLED, 0)
    set_number(slot, PAST_CACHES, left <= threads * most)
    replace_shared(slot, STATE, FREE, FILLING)


@inner
def _fill_piece(loading, slot):
    """Put a piece of its load into a slot."""
    array, begin, filled = number(slot, ARRAY), number(slot, FIRST_BYTE), number(slot, FILLED)
    run_bytes, end = number(array, RUN_BYTES), number(slot, LOADED_BYTES)
    stop = min(filled + number(loading, PIECE_BYTES), end)
    while filled < stop:
        run = (begin + filled) // run_bytes
        offset = begin + filled - run * run_bytes
        count = min(stop - filled, run_bytes - offset)
        source = number(array, SOURCE) + run * number(array, RUN_STEP) + offset
        _copy_run(source, number(slot, MEMORY) + filled, count, number(slot, PAST_CACHES))
        filled += count
    set_number(slot, FILLED, filled)
    if filled == end:
        fence()
        replace_shared(slot, STATE, FILLING, FULL)


@inner
def _slot(loading, i):
    """Return where a slot is."""
    return loading + 8 * (FIRST_SLOT + SLOT_NUMBERS * i)


@inner
def _slots(loading, begin, end):
    """Return where the slots of a range are."""
    return range(_slot(loading, begin), _slot(loading, end), 8 * SLOT_NUMBERS)


@inner
def _batch(loading):
    """List slots that can be copied and are of one part, the oldest first; return how many."""
    part, last, count = 0, -1, 0
    while count < MOST_COPIES:
        slot, oldest = 0, shared(loading, OPEN)
        for other in _slots(loading, 0, number(loading, SLOTS)):
            if shared(other, STATE) == FULL and last < number(other, PIECE) < oldest:
                slot, oldest = other, number(other, PIECE)
        if slot == 0 or (count > 0 and number(slot, PART) != part):
            break
        part, last = number(slot, PART), oldest
        set_number(loading, BATCH + count, slot)
        count += 1
    return count


@inner
def _queue_batch(loading, count):
    """Have the driver copy the slots that are listed; return what it says."""
    part, status = number(number(loading, BATCH), PART), CUDA_SUCCESS
    stream = number(part, STREAM)
    for i in range(count):
        slot = number(loading, BATCH + i)
        set_number(loading, TARGETS + i, number(number(slot, ARRAY), DESTINATION) + number(slot, FIRST_BYTE))
        set_number(loading, SOURCES + i, number(slot, MEMORY))
        set_number(loading, SIZES + i, number(slot, LOADED_BYTES))
    if count > 1 and number(loading, COPY_BATCH) != 0:
        copies = loading + 8 * TARGETS, loading + 8 * SOURCES, loading + 8 * SIZES, count
        attributes = loading + 8 * ATTRIBUTES, loading + 8 * FIRST_COPY, 1
        status = call(number(loading, COPY_BATCH), (*copies, *attributes, loading + 8 * WRONG_COPY, stream))
    else:
        for i in range(count):
            if status == CUDA_SUCCESS:
                target, source = number(loading, TARGETS + i), number(loading, SOURCES + i)
                status = call(number(loading, COPY), (target, source, number(loading, SIZES + i), stream))
    place, queued = number(loading, QUEUED), 0
    set_number(loading, LAST_BATCH, place)
    for i in range(count):
        slot = number(loading, BATCH + i)
        if status == CUDA_SUCCESS:
            status = call(number(loading, RECORD), (number(slot, EVENT), stream))
        set_number(_queue_place(loading, place + i), IN_QUEUE, slot)
        queued += number(slot, PIECES)
        replace_shared(slot, STATE, FULL, COPYING)
    set_number(loading, QUEUED, place + count)
    if status == CUDA_SUCCESS:
        add_shared(part, MISSING, -queued)
    return status


@inner
def _queue_place(loading, place):
    """Return the slot that keeps which one was queued at a place."""
    return _slot(loading, place % number(loading, SLOTS))


@inner
def _free_copied(loading):
    """Free the slots that the driver has copied; return what it says, if that is an error."""
    while number(loading, FREED) < number(loading, QUEUED):
        slot = number(_queue_place(loading, number(loading, FREED)), IN_QUEUE)
        status = call(number(loading, QUERY), (number(slot, EVENT),))
        if status != CUDA_SUCCESS:
            return CUDA_SUCCESS if status == CUDA_ERROR_NOT_READY else status
        set_number(loading, FREED, number(loading, FREED) + 1)
        replace_shared(slot, STATE, COPYING, FREE)
    return CUDA_SUCCESS


@inner
def _call_driver(loading):
    """Have the driver copy what is there, and see what it has copied, unless another thread is about that."""
    if shared(loading, CALLING) != 0 or replace_shared(loading, CALLING, 0, 1) != 0:
        return
    status = _free_copied(loading)
    all_claimed = shared(loading, CLAIMED) == shared(loading, KNOWN)
    if status == CUDA_SUCCESS and (all_claimed or number(loading, FREED) >= number(loading, LAST_BATCH)):
        count = _batch(loading)
        if count > 0:
            status = _queue_batch(loading, count)
    if status != CUDA_SUCCESS:
        replace_shared(loading, STATUS, CUDA_SUCCESS, status)
    replace_shared(loading, CALLING, 1, 0)


@inner
def _load_while(vector, index, loading, thread, most):
    """Fill a thread's slots and have them copied while a number is not 0 and no error is known.

    It ends when there has been nothing to do so many times in a row.
    """
    begin = number(loading, SLOTS_EACH) * thread
    end = min(begin + number(loading, SLOTS_EACH), number(loading, SLOTS))
    i, looks = begin, 0
    while looks < most and shared(vector, index) != 0 and shared(loading, STATUS) == CUDA_SUCCESS:
        _call_driver(loading)
        slot = _slot(loading, i)
        if i < end and shared(slot, STATE) == FREE:
            _claim_load(loading, slot)
        if i < end and shared(slot, STATE) == FILLING:
            _fill_piece(loading, slot)
            looks = 0
        else:
            i = i + 1 if i + 1 < end else begin
            _wait(number(loading, CREW), looks // PATIENCE)
            looks += 1


def start_to_load(loading):
    """Have others help, when nothing is known yet, and all slots may still be copied for the call before."""
    set_number(loading, ATTRIBUTES, IN_ORDER)
    set_number(loading, LEADER, _most_fillers(loading))
    for i in range(PARTS):
        set_number(loading, FIRST_PART + PART_NUMBERS * i + FIRST_PIECE, NO_PIECE)
    for slot in _slots(loading, 0, number(loading, SLOTS)):
        set_number(slot, STATE, COPYING)
        set_number(slot, IN_QUEUE, slot)
    set_number(loading, QUEUED, number(loading, SLOTS))
    call_crew(loading)


def tell_pieces(loading, known, open_):
    """Tell other threads how many pieces are known, and how many may be copied."""
    add_shared(loading, KNOWN, known - number(loading, KNOWN))
    add_shared(loading, OPEN, open_ - number(loading, OPEN))


def load_part(loading, part):
    """Fill slots and have them copied, as the thread that leads, until a part has been queued.

    Returns what the driver says: 0, its number of an error, or the one that means that it is to be called again.
    """
    part, most = loading + 8 * (FIRST_PART + PART_NUMBERS * part), _most_fillers(loading)
    if number(loading, LEADER) == most:  # it fills no slots so far
        if number(loading, HELPERS) == most:  # some of whom may be on their way
            _load_while(part, MISSING, loading, most, SPINS)
        if shared(loading, FILLERS) < most:
            set_number(loading, LEADER, add_shared(loading, FILLERS, 1))
    _load_while(part, MISSING, loading, number(loading, LEADER), SPINS * PATIENCE + RESTS)
    status = shared(loading, STATUS)
    return CUDA_ERROR_NOT_READY if status == CUDA_SUCCESS and shared(part, MISSING) != 0 else status


def help_to_load(loading, word):
    """Fill slots and have them copied, until all has ended."""
    thread = add_shared(loading, FILLERS, 1)
    status = call(number(loading, SET_CONTEXT), (number(loading, CONTEXT),))
    if status != CUDA_SUCCESS:
        replace_shared(loading, STATUS, CUDA_SUCCESS, status)
        return False
    _load_while(loading, GOING_ON, loading, thread, 1 << 62)
    return False
