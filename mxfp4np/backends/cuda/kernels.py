"""CUDA kernels that decode and encode, compiled by CuPy when they are first used.

A kernel takes addresses, as arrays of one element, and strides in bytes. It checks nothing and chooses nothing:
`mxfp4np.backends.cuda.driver` selects a kernel whose conditions hold.

* `decode`: contiguous arrays. A thread writes vectors of 16 bytes; neighbouring threads write adjacent vectors.
* `decode_rows`: the same for rows that are not adjacent.
* `transpose`: transposed output. A thread loads one block from each of 8 rows and transposes 8 x 8 nibbles at a time,
  in registers.
* `decode_any`: any strides. A thread writes one element.
* `encode`: a thread loads 8 or 16 values; the threads of a block of 32 values exchange their largest magnitude.

Values are decoded in pairs, two of 16 bits in a word. The sign, exponent and fraction of an E2M1 code are moved to the
sign, the lowest bits of the exponent and the highest bit of the fraction of a bfloat16 or float16. The result, normal
or subnormal, is the value times a power of two. Two multiplications correct that power and apply the scale. A float32
is a bfloat16 followed by 16 zero bits.

CuPy compiles with ``-ftz=true``, which flushes subnormal products to zero. Products written in PTX keep them.
"""

from __future__ import annotations

import functools
from typing import Any, Final

THREADS: Final = 128
"""Threads of a CUDA block."""

VECTORS: Final = 2
"""Vectors that a thread decodes. Their loads overlap."""

ROW_AXES: Final = 3
"""Axes of rows that `decode_rows` takes."""

ROWS: Final = 256
"""Rows that a warp of `transpose` decodes, one block of each."""

VALUES: Final = {"bfloat16": 16, "float16": 16, "float32": 8}
"""Values that a thread of `encode` encodes: 8, 16 or 32."""

_COMMON = """
// A product that keeps subnormal numbers.
__device__ __forceinline__ float times(float a, float b) {
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}
"""

_BFLOAT16 = """
const int CODE_BIT = 6;  // where the lowest bit of a code is moved, which gives the value times 2**-126
const unsigned MAGNITUDES = 0x01C001C0u;
__device__ __forceinline__ unsigned product(unsigned a, unsigned b) {
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000u));
    return pair;
#else
    float low = times(__uint_as_float(a << 16), __uint_as_float(b << 16));
    float high = times(__uint_as_float(a & 0xFFFF0000u), __uint_as_float(b & 0xFFFF0000u));
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
#endif
}
__device__ __forceinline__ Factors factors_of(unsigned scale) {
    Factors factors = {0x7E80, scale == 0 ? 0x40u : scale == 255 ? 0x7FC0u : scale << 7};
    return factors;
}
"""

_FLOAT16 = """
const int CODE_BIT = 9;  // gives the value times 2**-14
const unsigned MAGNITUDES = 0x0E000E00u;
__device__ __forceinline__ unsigned product(unsigned a, unsigned b) {
    unsigned pair;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
// The result is rounded once: the second factor is 1, or the first product is exact, twice the value of the code.
__device__ __forceinline__ Factors factors_of(unsigned scale) {
    int power = max((int)scale, 89) - 113;  // at a scale of 2**-38, all values round to zero
    Factors factors = {power < -14 ? 1u << power + 24 : power + 15 << 10, 0x3C00};
    if (power > 15) {
        factors.first = 0x7800;
        factors.second = (unsigned)power << 10;
    }
    if (scale > 143)  // all values but zero overflow to infinity
        factors.first = factors.second = scale == 255 ? 0x7E00 : 0x7BFF;
    return factors;
}
"""

_DECODING = """
// The two factors of a block: one number in the low 16 bits, or the numbers of two blocks in both halves.
struct Factors {
    unsigned first, second;
};
%s
__device__ __forceinline__ Factors pair_of(Factors low, Factors high) {
    Factors factors = {__byte_perm(low.first, high.first, 0x5410), __byte_perm(low.second, high.second, 0x5410)};
    return factors;
}
// The values of two codes, whose lowest bits are bits `bit` and `bit + 16` of a word.
__device__ __forceinline__ unsigned values_at(unsigned codes, int bit, Factors factors) {
    unsigned magnitudes = CODE_BIT < bit ? codes >> (bit - CODE_BIT & 31) : codes << (CODE_BIT - bit & 31);
    unsigned bits = (magnitudes & MAGNITUDES) | (codes << 12 - bit & 0x80008000u);
    return product(product(bits, factors.first), factors.second);
}
// The low nibbles of four bytes, packed into the low 16 bits.
__device__ __forceinline__ unsigned pack_low_nibbles(unsigned x) {
    x &= 0x0F0F0F0Fu;
    x = (x | x >> 4) & 0x00FF00FFu;
    return (x | x >> 8) & 0xFFFFu;
}
"""

_VECTORS = {
    16: """
typedef unsigned short Word;
const int N = 8;  // elements in 16 bytes
__device__ __forceinline__ Word word_of(unsigned value) {
    return value;
}
// A vector of N elements from their codes, the first in the lowest bits. factors[j] belong to elements j and j + N / 2.
__device__ __forceinline__ uint4 vector_of(unsigned codes, const Factors* factors) {
    unsigned pairs[4];
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        pairs[j] = values_at(codes, 4 * j, factors[j]);
    return make_uint4(
        __byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410),
        __byte_perm(pairs[0], pairs[1], 0x7632), __byte_perm(pairs[2], pairs[3], 0x7632)
    );
}
// The codes of one vector of a block.
__device__ __forceinline__ unsigned codes_of(const unsigned char* block, int vector, bool halves) {
    const unsigned* words = reinterpret_cast<const unsigned*>(block);
    if (!halves)
        return __ldg(words + vector);
    words += (vector & 1) * 2;
    int shift = vector / 2 * 4;
    return pack_low_nibbles(__ldg(words) >> shift) | pack_low_nibbles(__ldg(words + 1) >> shift) << 16;
}
""",
    32: """
typedef unsigned Word;
const int N = 4;
__device__ __forceinline__ Word word_of(unsigned value) {
    return value << 16;
}
__device__ __forceinline__ uint4 vector_of(unsigned codes, const Factors* factors) {
    codes = __byte_perm(codes, 0, 0x4140);
    unsigned even = values_at(codes, 0, factors[0]), odd = values_at(codes, 4, factors[1]);
    return make_uint4(even << 16, odd << 16, even & 0xFFFF0000u, odd & 0xFFFF0000u);
}
__device__ __forceinline__ unsigned codes_of(const unsigned char* block, int vector, bool halves) {
    if (!halves)
        return __ldg(reinterpret_cast<const unsigned short*>(block) + vector);
    return pack_low_nibbles(__ldg(reinterpret_cast<const unsigned*>(block) + (vector & 3)) >> vector / 4 * 4);
}
""",
}

_VECTOR_OF_BLOCK = """
__device__ __forceinline__ uint4 vector_of_block(unsigned codes, unsigned scale) {
    Factors one = factors_of(scale), factors[N / 2];
    #pragma unroll
    for (int j = 0; j < N / 2; ++j)
        factors[j] = pair_of(one, one);
    return vector_of(codes, factors);
}
"""

_DECODE = """
    const int per_block = 32 / N;
    size_t first = (size_t)(i - threadIdx.x) * VECTORS + threadIdx.x;
    unsigned codes[VECTORS], scale[VECTORS];
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        size_t vector = first + v * blockDim.x;
        if (vector < vectors) {
            codes[v] = codes_of(&blocks[vector / per_block * 16], vector % per_block, halves);
            scale[v] = __ldg(&scales[vector / per_block]);
        }
    }
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        size_t vector = first + v * blockDim.x;
        if (vector < vectors)
            __stcs(reinterpret_cast<uint4*>(&out[0]) + vector, vector_of_block(codes[v], scale[v]));
    }
"""

_DECODE_ROWS = """
    const unsigned per_block = 32 / N;
    unsigned first = ((unsigned)i - threadIdx.x) * VECTORS + threadIdx.x;
    unsigned codes[VECTORS], scale[VECTORS];
    uint4* target[VECTORS];
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        unsigned vector = first + v * blockDim.x;
        target[v] = 0;
        if (vector < vectors) {
            unsigned row = vector / per_row;
            vector -= row * per_row;
            ptrdiff_t i2 = row % size2, i1 = row / size2 % size1, i0 = row / size2 / size1;
            const unsigned char* block = &blocks[i0 * blocks0 + i1 * blocks1 + i2 * blocks2];
            codes[v] = codes_of(block + vector / per_block * 16, vector % per_block, halves);
            scale[v] = __ldg(&scales[i0 * scales0 + i1 * scales1 + i2 * scales2 + vector / per_block]);
            target[v] = reinterpret_cast<uint4*>(&out[i0 * out0 + i1 * out1 + i2 * out2]) + vector;
        }
    }
    #pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        if (target[v])
            __stcs(target[v], vector_of_block(codes[v], scale[v]));
"""

_TRANSPOSE_NIBBLES = """
// Transpose 8 x 8 nibbles: swap nibble k of word j with nibble j of word k.
__device__ __forceinline__ void transpose_nibbles(unsigned* x) {
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
    // A warp decodes one block of each of 256 rows. A thread decodes 8 of them: N adjacent rows and, if N is 4, the N
    // rows that are 32 * N further.
    ptrdiff_t block_index = i >> 5;
    ptrdiff_t row_group = block_index / per_row;
    block_index -= row_group * per_row;
    ptrdiff_t matrix = row_group / row_groups;
    row_group -= matrix * row_groups;
    ptrdiff_t first = row_group * 256 + (i & 31) * N;
    uint4 codes[8];
    Factors factors[8];
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
        ptrdiff_t row = first + j / N * (32 * N) + j % N;
        if (row < rows) {
            const unsigned char* block = &blocks[matrix * blocks_matrix + row * blocks_row + block_index * 16];
            codes[j] = __ldg(reinterpret_cast<const uint4*>(block));
            factors[j] = factors_of(__ldg(&scales[matrix * scales_matrix + row * scales_row + block_index]));
        }
    }
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        int low = j / (N / 2) * N + j % (N / 2);
        factors[j] = pair_of(factors[low], factors[low + N / 2]);
    }
    unsigned char* column = &out[matrix * out_matrix + first * (int)sizeof(Word)];
    #pragma unroll
    for (int w = 0; w < 4; ++w) {
        unsigned x[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            x[j] = w == 0 ? codes[j].x : w == 1 ? codes[j].y : w == 2 ? codes[j].z : codes[j].w;
        transpose_nibbles(x);
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            ptrdiff_t element = 32 * block_index + (halves ? 16 * (k & 1) + 4 * w + k / 2 : 8 * w + k);
            uint4* target = reinterpret_cast<uint4*>(column + element * out_column);
            #pragma unroll
            for (int h = 0; h < 8 / N; ++h)
                if (first + h * (32 * N) < rows)
                    __stcs(target + 32 * h, vector_of(x[k] >> 4 * N * h % 32, factors + N / 2 * h));
        }
    }
"""

_DECODE_ANY = """
    ptrdiff_t row = i / length;
    ptrdiff_t at = i - row * length + start;
    ptrdiff_t block = row * per_row + at / 32;
    int element = at % 32;
    unsigned code = blocks[block * 16 + (halves ? element % 16 : element / 2)];
    if (halves ? element >= 16 : element & 1)
        code >>= 4;
    out = word_of(values_at(code & 15, 0, factors_of(scales[block])));
"""

_LOADS = {
    "bfloat16": """
typedef unsigned short Word;
// Load 8 values as floats.
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
typedef unsigned short Word;
__device__ __forceinline__ void load(const uint4* x, ptrdiff_t i, float* values) {
    uint4 vector = __ldcs(x + i);
    unsigned pairs[4] = {vector.x, vector.y, vector.z, vector.w};
    #pragma unroll
    for (int j = 0; j < 8; ++j)
        asm("cvt.f32.f16 %0, %1;" : "=f"(values[j]) : "h"((unsigned short)(pairs[j / 2] >> 16 * (j % 2))));
}
""",
    "float32": """
typedef unsigned Word;
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
    const int per_block = 32 / VALUES;  // threads, adjacent in a warp
    float values[VALUES];
    if (i < threads) {
        #pragma unroll
        for (int j = 0; j < VALUES; j += 8)
            load(reinterpret_cast<const uint4*>(&x[0]), i * (VALUES / 8) + j / 8, values + j);
    }
    unsigned largest = 0;
    #pragma unroll
    for (int j = 0; j < VALUES; ++j)
        largest = max(largest, __float_as_uint(values[j]) & 0x7FFFFFFFu);
    #pragma unroll
    for (int j = 1; j < per_block; j *= 2)
        largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, j));
    // The exponent of the largest magnitude, rounded up where the rule says so, minus 2, the largest exponent of E2M1.
    bool finite = largest < 0x7F800000u;
    int scale = finite ? max((int)(largest + round_up >> 23) - 2, 0) : 255;
    if (finite && largest >= 0x7F600000u)  // 1.75 * 2**127: the next scale would make it infinite
        scale = 252;
    float factor = __uint_as_float(finite ? 254 - scale << 23 : 0);
    unsigned words[VALUES / 8];
    #pragma unroll
    for (int w = 0; w < VALUES / 8; ++w) {
        unsigned codes = 0, signs = 0;
        #pragma unroll
        for (int j = 8 * w + 7; j >= 8 * w; --j) {
            float value = fminf(fabsf(times(values[j], factor)), 6);
            // Round to E2M1 by an addition: with a power of two that is 2**22 times that of the value (of 1, if it is
            // smaller), the lowest bit of the sum counts halves of the value's power of two. Each further power adds 2
            // to the code. The bias of exponents adds 2 * 127, which the 2 makes a multiple of 8.
            unsigned power = __float_as_uint(fmaxf(value, 1)) & 0x7F800000u;
            float sum = value + __uint_as_float(power + (22u << 23) + 2);
            codes = codes << 4 | (__float_as_uint(sum) + (power >> 22) & 7);
            signs = __funnelshift_l(__float_as_uint(values[j]), signs, 1);
        }
        signs = (signs | signs << 12) & 0x000F000Fu;
        signs = (signs | signs << 6) & 0x03030303u;
        signs = (signs | signs << 3) & 0x11111111u;
        words[w] = codes | signs << 3;
    }
    if (!finite) {  // zeros with the signs of the values, read again because a product may change the sign of NaN
        #pragma unroll
        for (int w = 0; w < VALUES / 8; ++w) {
            words[w] = 0;
            for (int j = 0; j < 8 && i < threads; ++j) {
                const unsigned char* value = &x[(i * VALUES + 8 * w + j + 1) * (int)sizeof(Word) - 1];
                words[w] |= (*value >> 7) << 4 * j + 3;
            }
        }
    }
    if (i < threads) {
        store(&blocks[0], i, words);
        if (i % per_block == 0)
            scales[i / per_block] = scale;
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


def element_wise(
    name: str, dtype: str, inputs: str, outputs: str, operation: str, *preamble: str, options: tuple[str, ...] = ()
) -> Any:
    """Return a kernel that CuPy compiles when it is first called."""
    import cupy

    return cupy.ElementwiseKernel(
        inputs,
        outputs,
        operation,
        f"mxfp4np_{name}_{dtype}",
        preamble=_COMMON + "".join(preamble),
        no_return=True,
        options=options,
    )


DECODING_BFLOAT16: Final = _DECODING % _BFLOAT16
"""What decodes to bfloat16, for other kernels."""


def _decoder(name: str, dtype: str, inputs: str, outputs: str, operation: str, *preamble: str) -> Any:
    values = _DECODING % (_FLOAT16 if dtype == "float16" else _BFLOAT16)
    vectors = _VECTORS[32 if dtype == "float32" else 16]
    inputs = f"raw uint8 blocks, raw uint8 scales, bool halves, {inputs}"
    return element_wise(name, dtype, inputs, outputs, operation, values, vectors, *preamble)


@functools.cache
def decode(dtype: str) -> Any:
    """Return the kernel for contiguous arrays of whole blocks."""
    count = f"const int VECTORS = {VECTORS};"
    return _decoder("decode", dtype, "uint64 vectors", "raw uint8 out", _DECODE, _VECTOR_OF_BLOCK, count)


@functools.cache
def decode_rows(dtype: str) -> Any:
    """Return the kernel for contiguous rows of whole blocks, along three axes, of fewer than 2**31 vectors in total."""
    strides = (f"int64 {array}{axis}" for array in ("blocks", "scales", "out") for axis in range(ROW_AXES))
    inputs = f"uint32 vectors, uint32 per_row, uint32 size1, uint32 size2, {', '.join(strides)}"
    count = f"const int VECTORS = {VECTORS};"
    return _decoder("decode_rows", dtype, inputs, "raw uint8 out", _DECODE_ROWS, _VECTOR_OF_BLOCK, count)


@functools.cache
def transpose(dtype: str) -> Any:
    """Return the kernel for a stack of matrices with a transposed output: contiguous along the axis of rows."""
    return _decoder(
        "transpose",
        dtype,
        "int64 rows, int64 per_row, int64 row_groups, int64 blocks_matrix, int64 scales_matrix, int64 out_matrix,"
        "int64 blocks_row, int64 scales_row, int64 out_column",
        "raw uint8 out",
        _TRANSPOSE,
        _TRANSPOSE_NIBBLES,
    )


@functools.cache
def decode_any(dtype: str) -> Any:
    """Return the kernel for arrays of any strides."""
    word = "uint32" if dtype == "float32" else "uint16"
    return _decoder("decode_any", dtype, "int64 start, int64 length, int64 per_row", f"{word} out", _DECODE_ANY)


@functools.cache
def encode(dtype: str) -> Any:
    """Return the kernel that encodes contiguous arrays."""
    values = VALUES[dtype]
    return element_wise(
        "encode",
        dtype,
        "raw uint8 x, int64 threads, uint32 round_up",
        "raw uint8 blocks, raw uint8 scales",
        _ENCODE,
        f"const int VALUES = {values};",
        _LOADS[dtype],
        _STORES[values],
    )
