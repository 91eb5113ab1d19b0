"""CUDA kernels, built by CuPy when they are first used: no policy.

A kernel is given addresses, as arrays of one element, and strides in bytes. It checks nothing: `mxfp4np.backends.cuda`
chooses one whose conditions hold.

* `decode` gives each thread vectors of 16 bytes of output, so that neighbours write next to each other.
* `transpose` gives each thread one block of 8 rows, whose nibbles it turns, 8 x 8 at a time, in registers.
* `decode_any` gives each thread one element, and takes any strides.
* `encode` gives each thread 8 values, and 4 threads a block.

CuPy compiles with ``-ftz=true``, under which plain products lose subnormal numbers: those of PTX do not.
"""

from __future__ import annotations

import functools
from typing import Any, Final

THREADS: Final = 128
"""Threads of a CUDA block."""

VECTORS: Final = 2
"""Vectors that a thread of `decode` has, whose loads are under way at the same time."""

ROWS: Final = 256
"""Rows that a warp of `transpose` has."""

VALUES: Final = {"bfloat16": 16, "float16": 16, "float32": 8}
"""Values that a thread of `encode` has: 8, 16 or 32."""

_COMMON = """
// A product that keeps subnormal numbers.
__device__ __forceinline__ float times(float a, float b) {
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}
"""

_DECODING = """
// 2**(scale - 127): subnormal for scale 0, NaN for 255.
__device__ __forceinline__ float factor_of(unsigned scale) {
    return __uint_as_float(scale == 0 ? 0x00400000u : scale == 255 ? 0x7FC00000u : scale << 23);
}
// The four bits of E2M1, put where a float has its sign, its exponent and the first bit of its fraction, are the value
// times 2**-126, the subnormal ones included.
__device__ __forceinline__ float value_of(unsigned code, float factor) {
    float small = __uint_as_float((code & 8) << 28 | (code & 7) << 22);
    return times(times(small, __uint_as_float(253u << 23)), factor);
}
// The low nibbles of four bytes, next to each other.
__device__ __forceinline__ unsigned squeeze(unsigned x) {
    x &= 0x0F0F0F0Fu;
    x = (x | x >> 4) & 0x00FF00FFu;
    return (x | x >> 8) & 0xFFFFu;
}
"""

_WORDS = {
    "bfloat16": """
typedef unsigned short Word;
__device__ __forceinline__ Word word_of(float value) {
    return __float_as_uint(value) >> 16;
}
__device__ __forceinline__ unsigned pair_of(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
""",
    "float16": """
typedef unsigned short Word;
__device__ __forceinline__ Word word_of(float value) {
    Word word;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
}
__device__ __forceinline__ unsigned pair_of(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return word_of(low) | (unsigned)word_of(high) << 16;
#endif
}
""",
    "float32": """
typedef unsigned Word;
__device__ __forceinline__ Word word_of(float value) {
    return __float_as_uint(value);
}
""",
}

_VECTORS = {
    16: """
const int N = 8;  // elements in 16 bytes
// A vector of N elements from their codes, the first in the lowest bits, and their factors.
__device__ __forceinline__ uint4 vector_of(unsigned codes, const float* factors) {
    unsigned pairs[4];
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        pairs[j] = pair_of(value_of(codes >> 8 * j, factors[2 * j]), value_of(codes >> 8 * j + 4, factors[2 * j + 1]));
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
// The codes of a block's vector.
__device__ __forceinline__ unsigned codes_of(const unsigned char* block, int vector, bool halves) {
    const unsigned* words = reinterpret_cast<const unsigned*>(block);
    if (!halves)
        return __ldg(words + vector);
    words += (vector & 1) * 2;
    int shift = vector / 2 * 4;
    return squeeze(__ldg(words) >> shift) | squeeze(__ldg(words + 1) >> shift) << 16;
}
""",
    32: """
const int N = 4;
__device__ __forceinline__ uint4 vector_of(unsigned codes, const float* factors) {
    Word words[4];
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        words[j] = word_of(value_of(codes >> 4 * j, factors[j]));
    return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ unsigned codes_of(const unsigned char* block, int vector, bool halves) {
    if (!halves)
        return __ldg(reinterpret_cast<const unsigned short*>(block) + vector);
    return squeeze(__ldg(reinterpret_cast<const unsigned*>(block) + (vector & 3)) >> vector / 4 * 4);
}
""",
}

_DECODE = """
    const int per_block = 32 / N;
    ptrdiff_t first = (ptrdiff_t)blockIdx.x * blockDim.x * VECTORS + threadIdx.x;
    unsigned codes[VECTORS], scale[VECTORS];
    uint4* target[VECTORS];
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        ptrdiff_t vector = first + v * (int)blockDim.x, row = 0;
        target[v] = 0;
        if (vector < vectors) {
            if (per_row) {  // there are several rows, and fewer than 2**31 vectors
                row = __umulhi((unsigned)vector, (unsigned)reciprocal) >> shift;
                vector -= row * per_row;
            }
            ptrdiff_t block = vector / per_block;
            codes[v] = codes_of(&blocks[row * blocks_row + 16 * block], vector % per_block, halves);
            scale[v] = __ldg(&scales[row * scales_row + block]);
            target[v] = reinterpret_cast<uint4*>(&out[row * out_row]) + vector;
        }
    }
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        if (target[v]) {
            float factors[N];
            #pragma unroll
            for (int j = 0; j < N; ++j)
                factors[j] = factor_of(scale[v]);
            __stcs(target[v], vector_of(codes[v], factors));
        }
"""

_TURN = """
// Turn 8 x 8 nibbles: nibble k of word j changes places with nibble j of word k.
__device__ __forceinline__ void turn(unsigned* x) {
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        unsigned low = x[j], high = x[j + 4];
        x[j] = __byte_perm(low, high, 0x5410);
        x[j + 4] = __byte_perm(low, high, 0x7632);
    }
    #pragma unroll
    for (int j = 0; j < 8; ++j)
        if (!(j & 2)) {
            unsigned low = x[j], high = x[j + 2];
            x[j] = __byte_perm(low, high, 0x6240);
            x[j + 2] = __byte_perm(low, high, 0x7351);
        }
    #pragma unroll
    for (int j = 0; j < 8; j += 2) {
        unsigned low = x[j], high = x[j + 1];
        x[j] = (low & 0x0F0F0F0Fu) | (high & 0x0F0F0F0Fu) << 4;
        x[j + 1] = (low & 0xF0F0F0F0u) >> 4 | (high & 0xF0F0F0F0u);
    }
}
"""

_TRANSPOSE = """
    // A warp has one block of each of 256 rows; a thread has N rows next to each other and, if that is not 8, N more.
    ptrdiff_t group = i >> 5;
    ptrdiff_t chunk = group / groups;
    group -= chunk * groups;
    ptrdiff_t matrix = chunk / chunks;
    chunk -= matrix * chunks;
    ptrdiff_t first = chunk * 256 + (i & 31) * N;
    uint4 codes[8];
    float factors[8];
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
        ptrdiff_t row = first + j / N * (32 * N) + j % N;
        if (row < rows) {
            const unsigned char* block = &blocks[matrix * blocks_matrix + row * blocks_row + group * 16];
            codes[j] = __ldg(reinterpret_cast<const uint4*>(block));
            factors[j] = factor_of(__ldg(&scales[matrix * scales_matrix + row * scales_row + group]));
        }
    }
    unsigned char* column = &out[matrix * out_matrix + first * (int)sizeof(Word)];
    #pragma unroll
    for (int w = 0; w < 4; ++w) {
        unsigned x[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            x[j] = w == 0 ? codes[j].x : w == 1 ? codes[j].y : w == 2 ? codes[j].z : codes[j].w;
        turn(x);
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            ptrdiff_t element = 32 * group + (halves ? 16 * (k & 1) + 4 * w + k / 2 : 8 * w + k);
            uint4* target = reinterpret_cast<uint4*>(column + element * out_column);
            #pragma unroll
            for (int h = 0; h < 8 / N; ++h)
                if (first + h * (32 * N) < rows)
                    __stcs(target + 32 * h, vector_of(x[k] >> 4 * N * h % 32, factors + N * h));
        }
    }
"""

_DECODE_ANY = """
    ptrdiff_t row = i / length;
    ptrdiff_t at = i - row * length + start;
    ptrdiff_t block = row * groups + at / 32;
    int element = at % 32;
    unsigned code = blocks[block * 16 + (halves ? element % 16 : element / 2)];
    if (halves ? element >= 16 : element & 1)
        code >>= 4;
    out = word_of(value_of(code, factor_of(scales[block])));
"""

_LOADS = {
    "bfloat16": """
// 8 values, as floats.
__device__ __forceinline__ void load(const uint4* x, ptrdiff_t i, float* values) {
    uint4 vector = __ldcs(x + i);
    unsigned pairs[4] = {vector.x, vector.y, vector.z, vector.w};
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        values[2 * j] = __uint_as_float(pairs[j] << 16);
        values[2 * j + 1] = __uint_as_float(pairs[j] & 0xFFFF0000u);
    }
}
""",
    "float16": """
__device__ __forceinline__ void load(const uint4* x, ptrdiff_t i, float* values) {
    uint4 vector = __ldcs(x + i);
    unsigned pairs[4] = {vector.x, vector.y, vector.z, vector.w};
    #pragma unroll
    for (int j = 0; j < 8; ++j)
        asm("cvt.f32.f16 %0, %1;" : "=f"(values[j]) : "h"((unsigned short)(pairs[j / 2] >> 16 * (j % 2))));
}
""",
    "float32": """
__device__ __forceinline__ void load(const uint4* x, ptrdiff_t i, float* values) {
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        uint4 vector = __ldg(x + 2 * i + j);
        values[4 * j] = __uint_as_float(vector.x);
        values[4 * j + 1] = __uint_as_float(vector.y);
        values[4 * j + 2] = __uint_as_float(vector.z);
        values[4 * j + 3] = __uint_as_float(vector.w);
    }
}
""",
}

_ENCODE = """
    const int threads = 32 / VALUES;  // of a block, next to each other in a warp
    float values[VALUES];
    if (i < units) {
        #pragma unroll
        for (int j = 0; j < VALUES; j += 8)
            load(reinterpret_cast<const uint4*>(&x[0]), i * (VALUES / 8) + j / 8, values + j);
    }
    unsigned largest = 0;
    #pragma unroll
    for (int j = 0; j < VALUES; ++j)
        largest = max(largest, __float_as_uint(values[j]) & 0x7FFFFFFFu);
    #pragma unroll
    for (int j = 1; j < threads; j *= 2)
        largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, j));
    // The exponent of the largest magnitude, one more if its fraction is beyond what the rule leaves, and 2 less.
    bool finite = largest < 0x7F800000u;
    int scale = finite ? max((int)(largest + round_up >> 23) - 2, 0) : 255;
    float factor = __uint_as_float(finite ? 254 - scale << 23 : 0);
    unsigned words[VALUES / 8];
    #pragma unroll
    for (int w = 0; w < VALUES / 8; ++w) {
        unsigned codes = 0, signs = 0;
        #pragma unroll
        for (int j = 8 * w + 7; j >= 8 * w; --j) {
            float value = fminf(times(fabsf(values[j]), factor), 6);
            // Added to 2**22 times its power of two, at least 1, it is rounded to halves of that power, which are in
            // the lowest bits of the sum. A power more is two codes more; 2 makes 2 * 127 a multiple of 8.
            unsigned power = __float_as_uint(fmaxf(value, 1)) & 0x7F800000u;
            float sum = value + __uint_as_float(power + (22u << 23) + 2);
            codes = codes << 4 | (__float_as_uint(sum) + (power >> 22) & 7);
            signs = __funnelshift_l(__float_as_uint(values[j]), signs, 1);
        }
        signs = (signs | signs << 12) & 0x000F000Fu;
        signs = (signs | signs << 6) & 0x03030303u;
        signs = (signs | signs << 3) & 0x11111111u;
        words[w] = (finite ? codes : 0) | signs << 3;
    }
    if (i < units) {
        store(&blocks[0], i, words);
        if (i % threads == 0)
            scales[i / threads] = scale;
    }
"""

_STORES = {
    8: """
__device__ __forceinline__ void store(unsigned char* blocks, ptrdiff_t i, const unsigned* words) {
    reinterpret_cast<unsigned*>(blocks)[i] = words[0];
}
""",
    16: """
__device__ __forceinline__ void store(unsigned char* blocks, ptrdiff_t i, const unsigned* words) {
    reinterpret_cast<uint2*>(blocks)[i] = make_uint2(words[0], words[1]);
}
""",
    32: """
__device__ __forceinline__ void store(unsigned char* blocks, ptrdiff_t i, const unsigned* words) {
    reinterpret_cast<uint4*>(blocks)[i] = make_uint4(words[0], words[1], words[2], words[3]);
}
""",
}

_STRIDES = "int64 blocks_row, int64 scales_row, int64 out_row"


def _element_wise(name: str, dtype: str, inputs: str, outputs: str, operation: str, *preamble: str) -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        inputs, outputs, operation, f"mxfp4np_{name}_{dtype}", preamble=_COMMON + "".join(preamble), no_return=True
    )


def _decoder(name: str, dtype: str, inputs: str, outputs: str, operation: str, *preamble: str) -> Any:
    vectors = _VECTORS[32 if dtype == "float32" else 16]
    inputs = f"raw uint8 blocks, raw uint8 scales, bool halves, {inputs}"
    return _element_wise(name, dtype, inputs, outputs, operation, _DECODING, _WORDS[dtype], vectors, *preamble)


@functools.cache
def decode(dtype: str) -> Any:
    """Return the kernel for rows of whole blocks, 16 bytes of output a time."""
    return _decoder(
        "decode",
        dtype,
        f"int64 vectors, int64 per_row, int64 reciprocal, int64 shift, {_STRIDES}",
        "raw uint8 out",
        _DECODE,
        f"const int VECTORS = {VECTORS};",
    )


@functools.cache
def transpose(dtype: str) -> Any:
    """Return the kernel for matrices whose columns follow each other in the output."""
    return _decoder(
        "transpose",
        dtype,
        "int64 rows, int64 groups, int64 chunks, int64 blocks_matrix, int64 scales_matrix, int64 out_matrix,"
        "int64 blocks_row, int64 scales_row, int64 out_column",
        "raw uint8 out",
        _TRANSPOSE,
        _TURN,
    )


@functools.cache
def decode_any(dtype: str) -> Any:
    """Return the kernel for everything else."""
    word = "uint32" if dtype == "float32" else "uint16"
    return _decoder("decode_any", dtype, "int64 start, int64 length, int64 groups", f"{word} out", _DECODE_ANY)


@functools.cache
def encode(dtype: str) -> Any:
    """Return the kernel that encodes."""
    values = VALUES[dtype]
    return _element_wise(
        "encode",
        dtype,
        "raw uint8 x, int64 units, uint32 round_up",
        "raw uint8 blocks, raw uint8 scales",
        _ENCODE,
        f"const int VALUES = {values};",
        _LOADS[dtype],
        _STORES[values],
    )
