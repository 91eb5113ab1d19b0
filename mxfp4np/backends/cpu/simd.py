"""Vectors, stack memory, prefetches and atomics for Numba's kernels, as LLVM IR.

Numba has no types for SIMD registers, so whatever works on a register is an intrinsic: a function that emits LLVM IR.
First come helpers that emit it, then intrinsics that kernels call with addresses. Nothing here knows MXFP4. Importing
this module imports Numba and compiles nothing.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

SIZE_OF_CACHE_LINE = 64
"""Bytes."""

inner = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that only compiled code calls, in a tenth of the time."""


# Instruction sets


def instruction_set(triple: str, features: str) -> str:
    """Return the widest instruction set that kernels have code for, by LLVM's target triple and list of features."""
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


def target_of(context):
    """Return the instruction set of a code generator."""
    triple, _, features = context.codegen().magic_tuple()
    return instruction_set(triple, features)


def _is_x86(context):
    return "+sse2" in context.codegen().magic_tuple()[2].split(",")


# Emitting IR


def vector(element, count):
    """Return a vector type."""
    return ir.VectorType(element, count)


def constants(element, values):
    """Return a constant vector."""
    return ir.Constant(vector(element, len(values)), [ir.Constant(element, value) for value in values])


def repeated(value, like):
    """Return a constant vector of the type of ``like`` that repeats a value."""
    return constants(like.type.element, [value] * like.type.count)


def broadcast(builder, value, count):
    """Return a vector that repeats a number."""
    first = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, I32(0))
    return shuffle(builder, first, first, [0] * count)


def shuffle(builder, first, second, order):
    """Return the lanes of two vectors in the given order; lanes of the second follow those of the first."""
    return builder.shuffle_vector(first, second, constants(I32, order))


def transpose(builder, vectors):
    """Transpose n vectors, each part of n lanes on its own. With parts of 16 bytes, a shuffle is one instruction."""
    # Number vectors and lanes in binary. A round of interleaving moves the first bit of a vector's number to the end of
    # the lane's number, and the first bit of a lane's number to the end of the vector's. After log2(n) rounds, the two
    # numbers have changed places.
    n, lanes = len(vectors), vectors[0].type.count
    low = [n * part + i // 2 + lanes * (i % 2) for part in range(lanes // n) for i in range(n)]
    high = [i + n // 2 for i in low]
    for _ in range(n.bit_length() - 1):
        pairs = list(zip(vectors[: n // 2], vectors[n // 2 :], strict=True))
        vectors = [shuffle(builder, *pair, order) for pair in pairs for order in (low, high)]
    return vectors


def byte_lookup(builder, target, table, indices):
    """Look up 32 bytes in a table of 16 bytes; indices are 0 to 15."""
    if target in ("avx512", "avx2"):  # their byte shuffles look up within each 16 bytes of a register
        table = shuffle(builder, table, table, [i % 16 for i in range(32)])
        return call(builder, "llvm.x86.avx2.pshuf.b", indices.type, table, indices)
    if target in ("ssse3", "neon"):
        name = {"ssse3": "llvm.x86.ssse3.pshuf.b.128", "neon": "llvm.aarch64.neon.tbl1.v16i8"}[target]
        halves = [shuffle(builder, indices, indices, range(i, i + 16)) for i in (0, 16)]
        return shuffle(builder, *(call(builder, name, half.type, table, half) for half in halves), range(32))
    found = repeated(0, indices)
    for i in range(16):
        entry = broadcast(builder, builder.extract_element(table, I32(i)), 32)
        found = builder.select(builder.icmp_unsigned("==", indices, repeated(i, indices)), entry, found)
    return found


def call(builder, name, result, *arguments):
    """Call an LLVM intrinsic by its full name."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), function_type), arguments)


def offset(builder, address, count):
    """Return an address ``count`` bytes further."""
    return builder.add(address, ir.Constant(address.type, count))


def load(builder, address, type_, align=1):
    """Load a value from an address."""
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=align)


def store(builder, value, address, align=1, *, streaming=False):
    """Store a value to an address. ``streaming`` stores bypass the cache and need to be aligned to their size."""
    instruction = builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)
    if streaming:
        instruction.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


# Intrinsics for memory


@intrinsic(prefer_literal=True)
def stack_buffer(typingctx, nbytes):
    """Return the address of ``nbytes`` bytes on the stack, aligned to a cache line."""

    def codegen(context, builder, signature, args):
        memory = cgutils.alloca_once(builder, I8, nbytes.literal_value)
        memory.align = SIZE_OF_CACHE_LINE
        return builder.ptrtoint(memory, I64)

    return types.int64(nbytes), codegen


def _loader(numba_type, llvm_type):
    @intrinsic
    def load_number(typingctx, address):
        """Read a number at an address of any alignment."""

        def codegen(context, builder, signature, args):
            return load(builder, args[0], llvm_type)

        return numba_type(types.int64), codegen

    return load_number


load_uint8, load_uint16, load_uint32 = _loader(types.uint8, I8), _loader(types.uint16, I16), _loader(types.uint32, I32)
load_float32 = _loader(types.float32, ir.FloatType())


@intrinsic
def store_uint8(typingctx, value, address):
    """Write a uint8 to an address."""

    def codegen(context, builder, signature, args):
        store(builder, *args)
        return context.get_dummy_value()

    return types.void(types.uint8, types.int64), codegen


@intrinsic(prefer_literal=True)
def copy_bytes(typingctx, source, target, count, streaming):
    """Copy ``count`` bytes. ``count`` and ``streaming`` are literals; streaming needs a target on a cache line."""

    def codegen(context, builder, signature, args):
        value = load(builder, args[0], vector(I8, count.literal_value))
        is_streaming = streaming.literal_value
        align = SIZE_OF_CACHE_LINE if is_streaming else 1
        store(builder, value, args[1], align, streaming=is_streaming)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, count, streaming), codegen


@inner
def copy_run(source, target, count, streaming):
    """Copy any number of bytes. With ``streaming``, whole cache lines of the target are written by streaming stores."""
    end = target + count
    if streaming and count >= SIZE_OF_CACHE_LINE:
        while target % SIZE_OF_CACHE_LINE:
            copy_bytes(source, target, 1, False)
            source += 1
            target += 1
    while target + SIZE_OF_CACHE_LINE <= end:
        if streaming:
            copy_bytes(source, target, SIZE_OF_CACHE_LINE, True)
        else:
            copy_bytes(source, target, SIZE_OF_CACHE_LINE, False)
        source += SIZE_OF_CACHE_LINE
        target += SIZE_OF_CACHE_LINE
    while target < end:
        copy_bytes(source, target, 1, False)
        source += 1
        target += 1


@intrinsic
def prefetch(typingctx, address):
    """Prefetch the cache line at an address. It is no error if the address is not mapped."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        arguments = pointer, I32(0), I32(3), I32(1)  # to read, into all levels of the cache, as data
        signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), signature), arguments)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def store_fence(typingctx):
    """Order streaming stores before any later store, such as one that tells another thread that they are done."""

    def codegen(context, builder, signature, args):
        if _is_x86(context):
            call(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


# Atomic operations


@intrinsic
def atomic_load(typingctx, address):
    """Read the int64 at an address atomically."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the int64 at an address atomically, and return its old value."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_replace(typingctx, address, old, new):
    """Replace the int64 at an address by ``new`` if it is ``old``, atomically; return whether it was."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a spin-wait loop."""

    def codegen(context, builder, signature, args):
        if _is_x86(context):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_c(typingctx, function, arguments):
    """Call the C function at an address with a tuple of integers, and ignore what it returns."""

    def codegen(context, builder, signature, args):
        integers = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        function_type = ir.FunctionType(ir.VoidType(), [integer.type for integer in integers])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), integers)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen
