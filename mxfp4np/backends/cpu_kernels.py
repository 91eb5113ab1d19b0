"""Range kernels: the loops that turn packed bytes into values on the CPU, and the intrinsics they stand on.

No policy here: no validation, no allocation, no threads. A kernel works on raw addresses that its driver
(`mxfp4np.backends.cpu`) has checked, so that one compiled form serves every stride, alignment and rank, releases the
GIL, and can be called for disjoint ranges from any thread. Importing this module imports Numba and compiles nothing.

The loops are plain Numba. What they do with one block is an intrinsic, `decode_block`, whose machine code depends on
the features that Numba's own code generator reports. A scale and a code have 256 * 16 possible values, which a table holds;
16 entries are what a byte shuffle can look up, for all codes of a block at once. Every form looks up the same table, so
that all give the same bits.

Everything that is compiled together stays in this file: Numba's cache on disk notices changes of the file a kernel is
in, not of the files it calls into.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Positions in a kernel's `geometry`, an int64 vector. Rows are the leading axes, outermost first; after the fixed part
# come four numbers for each: its size and the strides of blocks, scales and out along it. Strides are in bytes.
BLOCKS_ADDRESS, SCALES_ADDRESS, OUT_ADDRESS, TABLE_ADDRESS = 0, 1, 2, 3
BLOCKS_STEP, SCALES_STEP, OUT_STEP = 4, 5, 6  # strides from block to block, and from element to element of `out`
BLOCKS_PER_ROW, START, LENGTH = 7, 8, 9  # elements of a row: `LENGTH`, beginning at `START` of its first block
ITEMSIZE, STREAMING = 10, 11  # bytes of an element of `out`; whether `out` is too large to stay in the cache
ROW_AXES = 12

# The table has one line of 64 bytes for each scale: the 16 words that its codes stand for, then their low bytes, then
# their high bytes. Words are bfloat16 or float16; a float32 is the bfloat16 with 16 zeros behind, since four bits and a
# power of two need no more.
TABLE_LINE, LOW_BYTES, HIGH_BYTES = 64, 32, 48

# What is compiled follows from the type of a kernel's argument `word`: its width is that of the elements, its sign says
# in which order they lie in a block: unsigned in pairs, signed in halves (see `mxfp4np.format.ORDERS`).

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_INTERLEAVED = [i // 2 + 16 * (i % 2) for i in range(32)]


def simd(triple, features):
    """Return which form of `decode_block` suits a code generator: its LLVM triple and its list of features."""
    enabled = features.split(",")
    if "+avx512bw" in enabled:
        return "avx512"
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


def _block_decoder(align, *, streaming):
    @intrinsic
    def decode_block(typingctx, block, line, out, word):
        """Write the 32 elements of the block at one address, by the table's line at another, as words to a third."""

        def codegen(context, builder, signature, args):
            block, line, out, word = args
            triple, _, features = context.codegen().magic_tuple()
            form = simd(triple, features)
            halves = signature.args[3].signed
            codes = None if form == "portable" else _load(builder, block, _vector(_I8, 16))
            if form == "avx512":
                words = _lookup_avx512(builder, codes, line, halves=halves)
            elif form == "ssse3":
                words = _lookup_bytes(builder, codes, line, "llvm.x86.ssse3.pshuf.b.128", halves=halves)
            elif form == "neon":
                words = _lookup_bytes(builder, codes, line, "llvm.aarch64.neon.tbl1.v16i8", halves=halves)
            else:
                words = _lookup_portable(builder, block, line, halves=halves)
            if word.type.width == 32:
                words = builder.shl(builder.zext(words, _vector(_I32, 32)), _constants(_I32, [16] * 32))
            store = builder.store(words, builder.inttoptr(out, words.type.as_pointer()), align=align)
            if streaming:
                store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, word), codegen

    return decode_block


decode_block = _block_decoder(1, streaming=False)
stream_block_16 = _block_decoder(16, streaming=True)
stream_block_64 = _block_decoder(64, streaming=True)


@intrinsic
def load_byte(typingctx, address):
    """Read the uint8 at an address."""

    def codegen(context, builder, signature, args):
        return _load(builder, args[0], _I8)

    return types.uint8(types.int64), codegen


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


@njit(nogil=True, inline="always")
def _decode_part(geometry, word, first, last, block, scale, out):
    """Decode the elements that belong to the row of blocks ``first`` to ``last - 1``, one by one."""
    for g in range(first, last):
        offset = 32 * g - geometry[START]  # of the block's first element in the row of `out`
        line = geometry[TABLE_ADDRESS] + TABLE_LINE * load_byte(scale + g * geometry[SCALES_STEP])
        for i in range(max(0, offset), min(geometry[LENGTH], offset + 32)):
            code = load_code(block + g * geometry[BLOCKS_STEP], i - offset, word)
            store_element(line, code, out + i * geometry[OUT_STEP], word)


def decode_range(geometry, word, start, stop):
    """Decode blocks ``start`` to ``stop - 1``, counted over all rows in C order, to words of the type of ``word``."""
    table = geometry[TABLE_ADDRESS]
    per_row = geometry[BLOCKS_PER_ROW]
    block_step = geometry[BLOCKS_STEP]
    scale_step = geometry[SCALES_STEP]
    size = geometry[ITEMSIZE]
    while start < stop:
        row = start // per_row
        first = start - row * per_row
        last = min(per_row, first + stop - start)
        start += last - first
        block = geometry[BLOCKS_ADDRESS]
        scale = geometry[SCALES_ADDRESS]
        out = geometry[OUT_ADDRESS]
        for axis in range(len(geometry) - 4, ROW_AXES - 1, -4):
            index = row % geometry[axis]
            row //= geometry[axis]
            block += index * geometry[axis + 1]
            scale += index * geometry[axis + 2]
            out += index * geometry[axis + 3]
        # Blocks that are in the row as a whole, one after the other; those before and after them may be in it in part.
        whole = last
        end = last
        if geometry[OUT_STEP] == size:
            whole = min(last, max(first, (geometry[START] + 31) // 32))
            end = max(whole, min(last, (geometry[START] + geometry[LENGTH]) // 32))
        _decode_part(geometry, word, first, whole, block, scale, out)
        target = out + (32 * whole - geometry[START]) * size
        if geometry[STREAMING] and target % 64 == 0:
            for g in range(whole, end):
                line = table + TABLE_LINE * load_byte(scale + g * scale_step)
                stream_block_64(block + g * block_step, line, out + (32 * g - geometry[START]) * size, word)
        elif geometry[STREAMING] and target % 16 == 0:
            for g in range(whole, end):
                line = table + TABLE_LINE * load_byte(scale + g * scale_step)
                stream_block_16(block + g * block_step, line, out + (32 * g - geometry[START]) * size, word)
        else:
            for g in range(whole, end):
                line = table + TABLE_LINE * load_byte(scale + g * scale_step)
                decode_block(block + g * block_step, line, out + (32 * g - geometry[START]) * size, word)
        _decode_part(geometry, word, end, last, block, scale, out)
    if geometry[STREAMING]:
        fence()
