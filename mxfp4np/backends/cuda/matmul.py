"""CUDA kernels that multiply packed rows by up to 16 vectors.

They take what those of `mxfp4np.backends.cuda.kernels` take.

* `split`: writes each number of x as the sum of three bfloat16 numbers, which is exact, in the order in which a warp of
  `multiply` loads them. Small vectors are first multiplied by a power of two, so that none of the three underflows.
* `multiply`: the warps of a CUDA block compute `ROWS` rows together; a warp takes every `WARPS`-th step of 4 blocks of
  each. A thread decodes one block of every eighth row at a time, to bfloat16, which is exact too, and tensor cores
  multiply it by the three parts. They add up 32 products of each row in float32. All further additions are ordinary
  ones of float32. Their order depends on the length of the rows only.

Rows with a scale above 2**6, with which weights or sums may be infinite, or a scale of NaN are computed a second time,
by multiplications and additions in float32: lane k of a warp takes element k of each block. So are all rows on devices
older than Ampere, which have no tensor cores for bfloat16. That is slower by far.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from .kernels import DECODING_BFLOAT16, THREADS, element_wise

TILE: Final = 8
"""Vectors that tensor cores multiply at once."""

PARTS: Final = 3
"""Numbers of bfloat16 whose sum is one of float32: 8 bits of the 24 each."""

STEP: Final = 4
"""Blocks of a row that a warp decodes at once."""

BYTES_PER_STEP: Final = 2 * TILE * 32 * STEP
"""Bytes of one part of a tile of vectors."""

THREADS_PER_STEP: Final = 4 * STEP
"""Threads of `split` for each vector: one for 8 numbers."""

MOST_VECTORS: Final = 2 * TILE
"""Vectors that `multiply` takes at most. With more, sums do not fit in registers."""

ROWS: Final = 32
"""Rows of a CUDA block."""

WARPS: Final = THREADS // 32

REGISTERS: Final = 128
"""Registers of a thread of `multiply`: 4 CUDA blocks run on a multiprocessor at once."""

_EXPONENT = 64  # of the power of two that the largest number of a small vector is brought to
_BIAS = 5  # weights are multiplied by 2**-5: the smallest, of scale 0, is the smallest bfloat16 number then
_LARGEST_SCALE = 128 + _BIAS  # its `factor_of` is the largest power of two of bfloat16

_COMMON = f"""
const int PARTS = {PARTS}, ROWS = {ROWS}, WARPS = {WARPS};
__device__ __forceinline__ float sum_of(float a, float b) {{
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));  // keeps subnormal numbers, as what follows
    return sum;
}}
__device__ __forceinline__ float product_sum(float a, float b, float c) {{
    float sum;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
    return sum;
}}
"""

_SPLIT = f"""
    const int vector = i / per_vector;
    const ptrdiff_t item = i - vector * per_vector;
    const unsigned char* numbers = &x[0] + vector * x_vector;
    __shared__ unsigned shared_largest;
    if (threadIdx.x == 0)
        shared_largest = 0;
    __syncthreads();
    unsigned largest = 0;
    #pragma unroll 8
    for (ptrdiff_t k = threadIdx.x; k < 32 * groups; k += blockDim.x) {{
        const unsigned magnitude = __ldg(reinterpret_cast<const unsigned*>(numbers + k * x_step)) & 0x7FFFFFFFu;
        largest = max(largest, magnitude < 0x7F800000u ? magnitude : 0);
    }}
    atomicMax(&shared_largest, largest);
    __syncthreads();
    const int exponent = max(0, min({_EXPONENT} + 127 - (int)(shared_largest >> 23), 127));
    const float factor = __uint_as_float(exponent + 127 << 23);
    const int lane = item % 4, word = item / 4 % 4;
    const ptrdiff_t step = item / 16, group = 4 * step + lane;
    unsigned parts[PARTS][8];
    #pragma unroll
    for (int n = 0; n < 8; ++n) {{
        float value = 0;
        if (group < groups) {{
            const ptrdiff_t k = 32 * group + (halves ? 4 * word + n / 2 + n % 2 * 16 : 8 * word + n);
            value = times(__ldg(reinterpret_cast<const float*>(numbers + k * x_step)), factor);
        }}
        #pragma unroll
        for (int p = 0; p < PARTS; ++p) {{
            const unsigned part = isnan(value) ? 0x7FC00000u : __float_as_uint(value) & 0xFFFF0000u;
            parts[p][n] = part;
            value = isfinite(value) ? sum_of(value, -__uint_as_float(part)) : 0;
        }}
    }}
    if (step < steps) {{
        uint4* target = reinterpret_cast<uint4*>(&out[0]) + (step * 4 + word) * TILES * CHAIN * 32 + lane;
        #pragma unroll
        for (int p = 0; p < PARTS; ++p) {{
            const int place = CHAIN == 1 ? 4 * (4 * vector + p) : (vector / 8 * CHAIN + p) * 32 + vector % 8 * 4;
            target[place] = make_uint4(
                __byte_perm(parts[p][0], parts[p][4], 0x7632), __byte_perm(parts[p][1], parts[p][5], 0x7632),
                __byte_perm(parts[p][2], parts[p][6], 0x7632), __byte_perm(parts[p][3], parts[p][7], 0x7632)
            );
        }}
        if (item == 0)
            reinterpret_cast<float*>(&out[steps * TILES * CHAIN * {BYTES_PER_STEP}])[vector] =
                __uint_as_float(127 + {_BIAS} - exponent << 23);
    }}
"""

_LOADS = {
    True: """
__device__ __forceinline__ uint4 block_at(const unsigned char* address) {
    uint4 block;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(block.x), "=r"(block.y), "=r"(block.z), "=r"(block.w) : "l"(address));
    return block;
}
""",
    False: """
// Words that hold a byte of the block at least are loaded, so that nothing outside of the array's memory is.
__device__ __forceinline__ uint4 block_at(const unsigned char* address) {
    const unsigned bytes = (size_t)address % 4;
    const unsigned* words = reinterpret_cast<const unsigned*>(address - bytes);
    const unsigned a = __ldg(words), b = __ldg(words + 1), c = __ldg(words + 2), d = __ldg(words + 3);
    const unsigned e = bytes ? __ldg(words + 4) : 0, shift = 8 * bytes;
    return make_uint4(
        __funnelshift_r(a, b, shift), __funnelshift_r(b, c, shift),
        __funnelshift_r(c, d, shift), __funnelshift_r(d, e, shift)
    );
}
""",
}

_TENSOR_CORES = f"""
// A factor of a block, twice: the scale times 2**(126 - {_BIAS}).
__device__ __forceinline__ unsigned factor_of(unsigned scale) {{
    return scale * 0x800080u + {126 - _BIAS << 7}u * 0x10001u;
}}
// Bits 6 to 8 and 22 to 24 of a, all others of b.
__device__ __forceinline__ unsigned merged(unsigned a, unsigned b) {{
    unsigned bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(bits) : "r"(a), "r"(b), "n"(0x01C001C0));
    return bits;
}}
// The values of codes 0 and 4, 1 and 5, 2 and 6, 3 and 7 of a word. As bits of bfloat16, magnitudes mean 2**-126.
__device__ __forceinline__ void values_of(unsigned word, unsigned factor, unsigned* pairs) {{
    const unsigned magnitudes[4] = {{word << 6, word << 2, word >> 2, word >> 6}};
    unsigned even, odd;
    asm("and.b32 %0, %1, 0x08080808;" : "=r"(even) : "r"(word));
    asm("and.b32 %0, %1, 0x80808080;" : "=r"(odd) : "r"(word));
    const unsigned signs[4] = {{even << 12, odd << 8, even << 4, odd}};
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        pairs[j] = product(merged(magnitudes[j], signs[j]), factor);
}}
__device__ __forceinline__ void multiply_add(float* sums, const unsigned* weights, unsigned first, unsigned second) {{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, "
        "{{%0, %1, %2, %3}};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
}}
"""

_MULTIPLY = f"""
    const ptrdiff_t first_row = i / blockDim.x * ROWS;
    const int here = rows - first_row < ROWS ? rows - first_row : ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned plain = 0;  // rows that tensor cores cannot compute, a bit each
#if __CUDA_ARCH__ >= 800
    const int row = lane / 4, column = lane % 4;  // of fragments: of 8 rows, and of 4 pairs of columns
    float sums[ROWS / 16][TILES][4] = {{}};
    const unsigned char* block = &blocks[0] + (first_row + row) * blocks_row + (4 * warp + column) * blocks_group;
    const unsigned char* scale = &scales[0] + (first_row + row) * scales_row + (4 * warp + column) * scales_group;
    unsigned largest[ROWS / 8] = {{}};  // scales
    const auto load = [&](int step, uint4* codes, unsigned* scale_bytes) {{
        // Beyond the last group, any codes do, since x is 0; sums of rows beyond the last are not stored.
        const bool valid = 4 * step + column < groups;
        #pragma unroll
        for (int r = 0; r < ROWS / 8; ++r) {{
            if (valid && 8 * r + row < here) {{
                codes[r] = block_at(block + 8 * r * blocks_row);
                scale_bytes[r] = __ldg(scale + 8 * r * scales_row);
            }}
        }}
        block += 4 * WARPS * blocks_group;
        scale += 4 * WARPS * scales_group;
    }};
    const auto multiply = [&](int step, const uint4* codes, const unsigned* scale_bytes) {{
        const uint4* parts = reinterpret_cast<const uint4*>(&x_parts[0]) + lane;
        parts += (ptrdiff_t)step * (4 * TILES * CHAIN * 32);
        unsigned factors[ROWS / 8];
        #pragma unroll
        for (int r = 0; r < ROWS / 8; ++r) {{
            factors[r] = factor_of(scale_bytes[r]);
            largest[r] = max(largest[r], scale_bytes[r]);
        }}
        #pragma unroll
        for (int w = 0; w < 4; ++w) {{
            uint4 values[TILES][CHAIN];
            #pragma unroll
            for (int p = 0; p < TILES * CHAIN; ++p)
                values[p / CHAIN][p % CHAIN] = __ldg(parts + (w * TILES * CHAIN + p) * 32);
            #pragma unroll
            for (int r = 0; r < ROWS / 16; ++r) {{
                unsigned weights[2][4];
                #pragma unroll
                for (int j = 0; j < 2; ++j) {{
                    const uint4& from = codes[2 * r + j];
                    unsigned pairs[4];
                    values_of(w == 0 ? from.x : w == 1 ? from.y : w == 2 ? from.z : from.w, factors[2 * r + j], pairs);
                    #pragma unroll
                    for (int k = 0; k < 4; ++k)
                        weights[k / 2][k % 2 * 2 + j] = pairs[k];
                }}
                #pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {{
                    float part[4] = {{}};
                    #pragma unroll
                    for (int p = CHAIN - 1; p >= 0; --p) {{
                        multiply_add(part, weights[0], values[tile][p].x, values[tile][p].y);
                        multiply_add(part, weights[1], values[tile][p].z, values[tile][p].w);
                    }}
                    #pragma unroll
                    for (int j = 0; j < 4; ++j)
                        sums[r][tile][j] = sum_of(sums[r][tile][j], part[j]);
                }}
            }}
        }}
    }};
    uint4 codes[2][ROWS / 8] = {{}};
    unsigned scale_bytes[2][ROWS / 8] = {{}};
    if (warp < steps)
        load(warp, codes[0], scale_bytes[0]);
    for (int step = warp; step < steps; step += 2 * WARPS) {{
        if (step + WARPS < steps)
            load(step + WARPS, codes[1], scale_bytes[1]);
        multiply(step, codes[0], scale_bytes[0]);
        if (step + WARPS >= steps)
            break;
        if (step + 2 * WARPS < steps)
            load(step + 2 * WARPS, codes[0], scale_bytes[0]);
        multiply(step + WARPS, codes[1], scale_bytes[1]);
    }}
    __shared__ float shared[WARPS][8 * TILES][ROWS + 4];
    __shared__ unsigned shared_plain[WARPS];
    #pragma unroll
    for (int r = 0; r < ROWS / 16; ++r) {{
        #pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {{
            #pragma unroll
            for (int j = 0; j < 4; ++j)
                shared[warp][8 * tile + 2 * column + j % 2][16 * r + j / 2 * 8 + row] = sums[r][tile][j];
        }}
    }}
    const ptrdiff_t parts_bytes = (ptrdiff_t)steps * TILES * CHAIN * {BYTES_PER_STEP};
    const float* factors = reinterpret_cast<const float*>(&x_parts[parts_bytes]);
    #pragma unroll
    for (int r = 0; r < ROWS / 8; ++r)
        plain |= (largest[r] > {_LARGEST_SCALE} ? 1u : 0u) << 8 * r + row;
    for (int r = 1; r < 32; r *= 2)
        plain |= __shfl_xor_sync(0xFFFFFFFFu, plain, r);
    if (lane == 0)
        shared_plain[warp] = plain;
    __syncthreads();
    #pragma unroll
    for (int w = 0; w < WARPS; ++w)
        plain |= shared_plain[w];
    for (int n = threadIdx.x; n < ROWS * vectors; n += blockDim.x) {{
        const int row = n % ROWS, m = n / ROWS;
        float sum = 0;
        #pragma unroll
        for (int c = CHAIN == 1 ? 2 : 0; c >= 0; --c) {{
            #pragma unroll
            for (int w = 0; w < WARPS; ++w)
                sum = sum_of(sum, shared[w][CHAIN == 1 ? 4 * m + c : m][row]);
        }}
        if (row < here && !(plain >> row & 1))
            *reinterpret_cast<float*>(&out[(first_row + row) * out_row + m * out_vector]) = times(sum, factors[m]);
    }}
#else
    plain = ~0u;
#endif
    for (int r = warp; plain && r < here; r += WARPS) {{
        if (plain >> r & 1) {{
            const ptrdiff_t row = first_row + r;
            float sums[8 * TILES] = {{}};
            for (ptrdiff_t group = 0; group < groups; ++group) {{
                const unsigned char* block = &blocks[row * blocks_row + group * blocks_group];
                const unsigned code = halves ? block[lane % 16] >> lane / 16 * 4 : block[lane / 2] >> lane % 2 * 4;
                const unsigned scale = scales[row * scales_row + group * scales_group];
                const float weight = __uint_as_float(values_at(code & 15, 0, factors_of(scale)) << 16);
                const unsigned char* numbers = &x[(32 * group + lane) * x_step];
                #pragma unroll
                for (int m = 0; m < 8 * TILES; ++m)
                    if (m < vectors)
                        sums[m] = product_sum(weight, *reinterpret_cast<const float*>(numbers + m * x_vector), sums[m]);
            }}
            #pragma unroll
            for (int m = 0; m < 8 * TILES; ++m) {{
                #pragma unroll
                for (int j = 16; j; j /= 2)
                    sums[m] = sum_of(sums[m], __shfl_xor_sync(0xFFFFFFFFu, sums[m], j));
                if (m < vectors && lane == 0)
                    *reinterpret_cast<float*>(&out[row * out_row + m * out_vector]) = sums[m];
            }}
        }}
    }}
"""


def tiles_of(vectors: int) -> tuple[int, int]:
    """Return how many tiles hold the parts of vectors, and how many numbers of each are added up by one accumulator.

    The three parts of one or two vectors are columns of one tile; tensor cores add up those of more vectors. Columns
    that no vector has are not written: what they hold changes no other column.
    """
    return (1, 1) if vectors <= 2 else (-(-vectors // TILE), PARTS)


@functools.cache
def split(dtype: str, tiles: int, chain: int) -> Any:
    """Return the kernel that writes the parts of vectors, for so many tiles of vectors."""
    return element_wise(
        f"split_{tiles}_{chain}",
        dtype,
        "raw uint8 x, int64 x_step, int64 x_vector, int64 groups, int64 steps, int64 per_vector, bool halves",
        "raw uint8 out",
        _SPLIT,
        f"const int TILES = {tiles}, CHAIN = {chain};",
        _COMMON,
    )


@functools.cache
def multiply(dtype: str, tiles: int, chain: int, *, aligned: bool) -> Any:
    """Return the kernel that multiplies rows by vectors. Aligned blocks are at multiples of 16 bytes."""
    return element_wise(
        f"multiply_{tiles}_{chain}_{aligned}",
        dtype,
        "raw uint8 blocks, raw uint8 scales, raw uint8 x_parts, raw uint8 x, int64 rows, int64 groups, int32 steps,"
        "int64 blocks_row, int64 blocks_group, int64 scales_row, int64 scales_group, int64 x_step, int64 x_vector,"
        "int64 out_row, int64 out_vector, int32 vectors, bool halves",
        "raw uint8 out",
        _MULTIPLY,
        f"const int TILES = {tiles}, CHAIN = {chain};",
        _COMMON,
        DECODING_BFLOAT16,
        _LOADS[aligned] + _TENSOR_CORES,
        options=(f"--maxrregcount={REGISTERS}",),
    )
