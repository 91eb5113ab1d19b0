"""CUDA kernels that decode elements with scales: FP8, MXFP8 and NVFP4.

They take what those of `mxfp4np.backends.cuda.kernels` take.

* `decode_scaled`: to contiguous rows. A thread writes vectors of 16 bytes.
* `decode_scaled_any`: any strides. A thread writes one element.

Codes become float16 numbers, which are widened to float32 and multiplied: the bits of a code of E5M2 are the upper ones
of a float16, those of E4M3 and E2M1 of one that is a power of two too small.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from .kernels import element_wise

SCALED_VECTORS: Final = 4
"""Vectors of a row that a thread of `decode_scaled` decodes."""

_SCALED = {
    "E4M3": """
const int BITS = 8;
__device__ __forceinline__ float2 pair_of(unsigned codes) {
#if __CUDA_ARCH__ >= 890
    unsigned pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((unsigned short)codes));
    return widened(pair);
#else
    unsigned bytes = __byte_perm(codes, 0, 0x1404);  // one in the upper half of each word
    float2 pair = widened((bytes & 0x80008000u) | (bytes >> 1 & 0x3F803F80u));
    const float nan = __uint_as_float(0x7FC00000u);
    pair.x = (codes & 0x7F) == 0x7F ? nan : times(pair.x, 256.f);
    pair.y = (codes & 0x7F00) == 0x7F00 ? nan : times(pair.y, 256.f);
    return pair;
#endif
}
""",
    "E5M2": """
const int BITS = 8;
__device__ __forceinline__ float2 pair_of(unsigned codes) {
    return widened(__byte_perm(codes, 0, 0x1404));
}
""",
    "E2M1": """
const int BITS = 4;
__device__ __forceinline__ float2 pair_of(unsigned codes) {
    float2 pair = widened((codes & 7) << 9 | (codes & 8) << 12 | (codes & 0x70) << 21 | (codes & 0x80) << 24);
    return make_float2(times(pair.x, 16384.f), times(pair.y, 16384.f));
}
""",
}
"""The values of two codes, the first one in the lower bits."""

_WIDENED = """
__device__ __forceinline__ float2 widened(unsigned halves) {
    float2 pair;
    asm("cvt.f32.f16 %0, %1;" : "=f"(pair.x) : "h"((unsigned short)halves));
    asm("cvt.f32.f16 %0, %1;" : "=f"(pair.y) : "h"((unsigned short)(halves >> 16)));
    return pair;
}
"""

_NARROWED = {
    "float32": """
const int N = 4;  // elements in 16 bytes
__device__ __forceinline__ unsigned word_of(float value) {
    return __float_as_uint(value);
}
__device__ __forceinline__ void put(unsigned* words, int pair, float a, float b) {
    words[2 * pair] = __float_as_uint(a);
    words[2 * pair + 1] = __float_as_uint(b);
}
""",
    "float16": """
const int N = 8;
__device__ __forceinline__ unsigned word_of(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
__device__ __forceinline__ void put(unsigned* words, int pair, float a, float b) {
    words[pair] = word_of(a) | word_of(b) << 16;
}
""",
    "bfloat16": """
const int N = 8;
__device__ __forceinline__ unsigned word_of(float value) {
    unsigned bits = __float_as_uint(value);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : bits + 0x7FFFu + (bits >> 16 & 1) >> 16;
}
__device__ __forceinline__ void put(unsigned* words, int pair, float a, float b) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[pair]) : "f"(b), "f"(a));
#else
    words[pair] = word_of(a) | word_of(b) << 16;
#endif
}
""",
}

_FACTOR = {
    "float32": "*reinterpret_cast<const float*>(scale)",
    "E8M0": "__uint_as_float(*scale == 0 ? 0x400000u : *scale == 255 ? 0x7FC00000u : (unsigned)*scale << 23)",
    "table": "reinterpret_cast<const float*>(table)[*scale]",
}
"""The factor of a scale, by the kind of scales."""

_FACTOR_AT = """
__device__ __forceinline__ float factor_at(const unsigned char* scale, const unsigned char* table) {
    return %s;
}
"""

_DECODE_SCALED = """
const unsigned row = i / per_step, first = i - row * per_step;
const unsigned outer = rows ? row / rows : 0, inner = row - outer * rows;
const int BYTES = N * BITS / 8;
const unsigned char* source = &codes[0] + outer * codes0 + inner * codes1;
const unsigned char* scale = &scales[0] + outer * scales0 + (ptrdiff_t)(inner + first_row >> row_shift) * scales1;
if (i < threads) {
    unsigned loaded[VECTORS][2];
    float factors[VECTORS];
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const unsigned column = first + v * per_step;
        if (column < per_row) {
            const unsigned char* place = source + (ptrdiff_t)column * BYTES;
            if (BYTES == 8) {
                const uint2 both = *reinterpret_cast<const uint2*>(place);
                loaded[v][0] = both.x;
                loaded[v][1] = both.y;
            } else if (BYTES == 4) {
                loaded[v][0] = *reinterpret_cast<const unsigned*>(place);
            } else {
                loaded[v][0] = *reinterpret_cast<const unsigned short*>(place);
            }
            factors[v] = factor_at(scale + (column * N >> shift) * scales_step, &table[0]);
        }
    }
    uint4* target = reinterpret_cast<uint4*>(&out[0] + outer * out0 + inner * out1);
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const unsigned column = first + v * per_step;
        if (column < per_row) {
            unsigned words[4];
            #pragma unroll
            for (int k = 0; k < N / 2; ++k) {
                const int bit = 2 * BITS * k;
                const float2 pair = pair_of(loaded[v][bit / 32] >> bit % 32 & (1 << 2 * BITS) - 1);
                put(words, k, times(pair.x, factors[v]), times(pair.y, factors[v]));
            }
            target[column] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
"""

_DECODE_SCALED_ANY = """
const ptrdiff_t row = i / length, column = start + i % length;
unsigned code = codes[row * row_bytes + column * BITS / 8] >> column * BITS % 8 & (1 << BITS) - 1;
out = word_of(times(pair_of(code).x, FACTOR));
"""


@functools.cache
def decode_scaled(dtype: str, element: str, scales: str) -> Any:
    """Return the kernel for rows along two axes, with a scale for ``1 << row_shift`` rows of ``1 << shift`` elements.

    ``scales`` are "float32", or bytes: "E8M0", or those whose factors are in a "table".

    A thread decodes several vectors of a row, ``per_step`` vectors apart. ``rows`` is the length of the inner axis, 0
    if there is no outer one.
    """
    strides = ", ".join(f"int64 {array}{axis}" for array in ("codes", "scales", "out") for axis in range(2))
    return element_wise(
        f"decode_scaled_{element}_{scales}",
        dtype,
        "raw uint8 codes, raw uint8 scales, raw uint8 table, uint32 threads, uint32 per_row, uint32 per_step,"
        f"uint32 rows, {strides}, int64 scales_step, int32 shift,"
        "int32 row_shift, uint32 first_row",
        "raw uint8 out",
        _DECODE_SCALED,
        f"const int VECTORS = {SCALED_VECTORS};",
        _WIDENED + _SCALED[element] + _NARROWED[dtype] + _FACTOR_AT % _FACTOR[scales],
    )


@functools.cache
def decode_scaled_any(dtype: str, element: str, *, has_table: bool) -> Any:
    """Return the kernel for arrays of any strides."""
    scale = "scales[row * groups + column / width]"
    return element_wise(
        f"decode_scaled_any_{element}_{has_table}",
        dtype,
        f"raw uint8 codes, raw {'uint8' if has_table else 'float32'} scales, raw float32 table, int64 start,"
        "int64 length, int64 row_bytes, int64 groups, int64 width",
        f"{'uint32' if dtype == 'float32' else 'uint16'} out",
        _DECODE_SCALED_ANY.replace("FACTOR", f"table[{scale}]" if has_table else scale),
        _WIDENED + _SCALED[element] + _NARROWED[dtype],
    )
