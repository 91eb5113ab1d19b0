"""Vectors of float32 as values of kernels.

Numba has no types for SIMD registers. `Floats` is one: LLVM keeps such a value in as many registers as it needs. What
kernels do with it are intrinsics, here and beside the kernels.
"""

# Numba infers the types of these functions, and has none for mypy.
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .simd import I32, call, constants, load, offset, shuffle, store, vector

FLOAT = ir.FloatType()


class Floats(types.Type):
    """The type of a vector of float32."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(f"Floats({lanes})")


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, vector(FLOAT, type_.lanes))


@intrinsic(prefer_literal=True)
def zero_sums(typingctx, count, lanes):
    """Return a tuple of vectors of zeros."""
    type_ = types.UniTuple(Floats(lanes.literal_value), count.literal_value)

    def codegen(context, builder, signature, args):
        zeros = constants(FLOAT, [0.0] * lanes.literal_value)
        return context.make_tuple(builder, type_, [zeros] * count.literal_value)

    return type_(count, lanes), codegen


@intrinsic
def add_sums(typingctx, first, second):
    """Add two tuples of vectors."""

    def codegen(context, builder, signature, args):
        pairs = zip(*(cgutils.unpack_tuple(builder, sums) for sums in args), strict=True)
        return context.make_tuple(builder, first, [builder.fadd(*pair) for pair in pairs])

    return first(first, second), codegen


@intrinsic(prefer_literal=True)
def store_sums(typingctx, sums, address, row_step, step, per_row):
    """Store the sum of each vector's lanes: ``per_row`` to each row, at addresses ``row_step`` and ``step`` apart."""

    def codegen(context, builder, signature, args):
        vectors, row, row_step, step = cgutils.unpack_tuple(builder, args[0]), *args[1:4]
        for begin in range(0, len(vectors), per_row.literal_value):
            place = row
            for values in vectors[begin : begin + per_row.literal_value]:
                store(builder, _sum_of_lanes(builder, values), place)
                place = builder.add(place, step)
            row = builder.add(row, row_step)
        return context.get_dummy_value()

    return types.void(sums, *[types.int64] * 3, per_row), codegen


def _sum_of_lanes(builder, values):
    lanes = values.type.count
    while lanes > 1:
        lanes //= 2
        halves = (shuffle(builder, values, values, range(begin, begin + lanes)) for begin in (0, lanes))
        values = builder.fadd(*halves)
    return builder.extract_element(values, I32(0))


def multiply_add(builder, x, y, z):
    """Emit ``x * y + z``, rounded once where the processor can."""
    return call(builder, f"llvm.fmuladd.v{x.type.count}f32", x.type, x, y, z)


def load_floats(builder, address, first, lanes):
    """Load ``lanes`` numbers, beginning with number ``first`` at an address on a cache line."""
    return load(builder, offset(builder, address, 4 * first), vector(FLOAT, lanes), 4 * min(lanes, 16))
