// What every kernel here is written with: the stored types, reductions, and the tensor cores' product.
//
// Nothing is included from CUDA's own headers, so a kernel needs NVRTC alone; and the few lines that only a GPU can run are in
// this file, so that the tests can put an emulation on the CPU in their place (EMULATED).
#pragma once

#ifdef EMULATED
#include "emulation.h"
#else
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; type* name = (type*)name##_bytes
#endif

constexpr int WARP_SIZE = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

// -- stored types: half precision is kept as bits and widened in registers ----------------------------------------------------

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

// Two int4 numbers: the even one in the low four bits, the odd one in the high four.
struct int4x2 {
    uint8_t pair;
};

__device__ __forceinline__ float widen(float x) { return x; }

__device__ __forceinline__ float widen(bf16 x) {
    return __int_as_float(int(uint32_t(x.bits) << 16));
}

__device__ __forceinline__ float widen(f16 x) {
#ifdef EMULATED
    _Float16 value;
    std::memcpy(&value, &x, 2);
    return float(value);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

template <class T>
__device__ __forceinline__ T narrow(float x);

template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
    f16 y;
#ifdef EMULATED
    _Float16 value = _Float16(x);
    std::memcpy(&y, &value, 2);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
}

template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    bf16 y;
#ifdef EMULATED
    uint32_t bits = uint32_t(__float_as_int(x));
    y.bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
}

// Two values side by side in 32 bits, the first in the low half: as fragments of a matrix product have them.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
    return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}
#ifndef EMULATED  // in one instruction
template <>
__device__ __forceinline__ uint32_t pair<f16>(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
__device__ __forceinline__ uint32_t pair<bf16>(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
#endif

// Two halves less two halves, each rounded.
template <class T>
__device__ __forceinline__ uint32_t difference(uint32_t a, uint32_t b) {
    auto low = [](uint32_t x) { return widen(T{uint16_t(x)}); };
    return pair<T>(low(a) - low(b), low(a >> 16) - low(b >> 16));
}
#ifndef EMULATED  // in one instruction; of bf16 as b * -1 + a, since sm_80 has no other
template <>
__device__ __forceinline__ uint32_t difference<f16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ __forceinline__ uint32_t difference<bf16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return y;
}
#endif

// 2**x, within 2 units in the last place; 0 for -inf and wherever the result is no normal number
__device__ __forceinline__ float power_of_2(float x) {
#ifdef EMULATED
    return std::exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// -- arrays whose type is known when they are launched: read or written once for each result, where the branch costs nothing ----

enum Stored { FLOAT32, FLOAT16, BFLOAT16 };

__device__ __forceinline__ float stored(const void* p, int type, int64_t i) {
    if (type == FLOAT16) return widen(static_cast<const f16*>(p)[i]);
    if (type == BFLOAT16) return widen(static_cast<const bf16*>(p)[i]);
    return static_cast<const float*>(p)[i];
}

__device__ __forceinline__ void store(void* p, int type, int64_t i, float x) {
    if (type == FLOAT16)
        static_cast<f16*>(p)[i] = narrow<f16>(x);
    else if (type == BFLOAT16)
        static_cast<bf16*>(p)[i] = narrow<bf16>(x);
    else
        static_cast<float*>(p)[i] = x;
}

// x as it would be read again
__device__ __forceinline__ float rounded(int type, float x) {
    if (type == FLOAT16) return widen(narrow<f16>(x));
    if (type == BFLOAT16) return widen(narrow<bf16>(x));
    return x;
}

// -- what is done to each value -----------------------------------------------------------------------------------------------

enum Activation { LINEAR, RELU, GELU, GELU_APPROXIMATE, SILU };

__device__ __forceinline__ float activated(int activation, float x) {
    if (activation == RELU) return x < 0.0f ? 0.0f : x;  // NaN stays
    if (activation == GELU) return 0.5f * x * erfcf(-x * 0.70710678118654752f);
    if (activation == GELU_APPROXIMATE) {
        float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));
    }
    if (activation == SILU) return x / (1.0f + expf(-x));
    return x;
}

// -- 16 bytes at once, from an address that is a multiple of 16 ----------------------------------------------------------------

// What is read once and then no more, as weights are: the first cache is left to others.
__device__ __forceinline__ uint4 streamed(const void* p) {
#ifdef EMULATED
    return *static_cast<const uint4*>(p);
#else
    uint4 y;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "l"(p));
    return y;
#endif
}

// -- what becomes of a layer's sums of products -------------------------------------------------------------------------------

// A sum over what its numbers were multiplied by when they became int8. A null scale is 1; row_scale comes with a scale only.
__device__ __forceinline__ float rescaled(float sum, const float* row_scale, int row, const float* scale, int64_t column) {
    if (row_scale) return sum / (row_scale[row] * scale[column]);
    return scale ? sum / scale[column] : sum;
}

// What follows, and where the results go: bias and residual may be null, residual and y [rows, n] are of one type.
struct Finish {
    const void* bias;
    int bias_type;
    const void* residual;
    void* y;
    int y_type, n;
    float factor;
    int activation;

    // y = residual + activation(factor * sum + bias) * gate, rounded once
    __device__ __forceinline__ void operator()(int row, int64_t column, float sum, float gate = 1.0f) const {
        int64_t place = int64_t(row) * n + column;
        float value = factor * sum;
        value = activated(activation, bias ? value + stored(bias, bias_type, column) : value) * gate;
        store(y, y_type, place, residual ? stored(residual, y_type, place) + value : value);
    }
};

// -- eight values at once, from an address that is a multiple of 16 ------------------------------------------------------------

__device__ __forceinline__ void eight(const float* p, float (&out)[8]) {
    float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

template <class T>
__device__ __forceinline__ void eight(const T* p, float (&out)[8]) {
    uint4 bits = *reinterpret_cast<const uint4*>(p);
    uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = widen(T{uint16_t(pairs[i / 2] >> (16 * (i % 2)))});
}

__device__ __forceinline__ void store_eight(float* p, const float (&x)[8]) {
    *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]};
    *reinterpret_cast<float4*>(p + 4) = {x[4], x[5], x[6], x[7]};
}

template <class T>
__device__ __forceinline__ void store_eight(T* p, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(p) = {pair<T>(x[0], x[1]), pair<T>(x[2], x[3]), pair<T>(x[4], x[5]), pair<T>(x[6], x[7])};
}

// Values i to i + 7 of an array whose type is known when it is launched, the first `count` of them alone if they are fewer; or one
// by one, if the address is no multiple of 16. What is not there is 0.
__device__ __forceinline__ void stored_eight(const void* p, int type, int64_t i, int count, bool aligned, float (&x)[8]) {
    if (!aligned) {
        for (int e = 0; e < 8; ++e) x[e] = e < count ? stored(p, type, i + e) : 0.0f;
    } else if (type == FLOAT16) {
        eight(static_cast<const f16*>(p) + i, x);
    } else if (type == BFLOAT16) {
        eight(static_cast<const bf16*>(p) + i, x);
    } else {
        eight(static_cast<const float*>(p) + i, x);
    }
}

__device__ __forceinline__ void store_eight(void* p, int type, int64_t i, int count, bool aligned, const float (&x)[8]) {
    if (!aligned) {
        for (int e = 0; e < min(count, 8); ++e) store(p, type, i + e, x[e]);
    } else if (type == FLOAT16) {
        store_eight(static_cast<f16*>(p) + i, x);
    } else if (type == BFLOAT16) {
        store_eight(static_cast<bf16*>(p) + i, x);
    } else {
        store_eight(static_cast<float*>(p) + i, x);
    }
}

// -- sums over a warp and over a block: the same tree whatever the data, so the same bits in every run ------------------------

__device__ __forceinline__ float warp_sum(float x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(ALL_LANES, x, by);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int by = 16; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, by));
    return x;
}

// The largest x of a block of THREADS threads, for every thread.
template <int THREADS>
__device__ __forceinline__ float block_max(float x) {
    SHARED(float, partial, [THREADS / WARP_SIZE]);
    x = warp_max(x);
    __syncthreads();  // one before this may still be read
    if (threadIdx.x % WARP_SIZE == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    float largest = partial[0];
    for (int i = 1; i < THREADS / WARP_SIZE; ++i) largest = fmaxf(largest, partial[i]);
    return largest;
}

// The sum of x over a block of THREADS threads (a multiple of 32, at most 1024), for every thread.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x) {
    SHARED(float, partial, [THREADS / WARP_SIZE]);
    x = warp_sum(x);
    __syncthreads();  // a sum before this one may still be read
    if (threadIdx.x % WARP_SIZE == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < THREADS / WARP_SIZE; ++i) total += partial[i];
    return total;
}

// -- between blocks -----------------------------------------------------------------------------------------------------------

// What another block may have written: not from this multiprocessor's own cache.
__device__ __forceinline__ float of_others(const float* p) {
#ifdef EMULATED
    return *p;
#else
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
    return x;
#endif
}

// -- tensor cores -------------------------------------------------------------------------------------------------------------

// d += a b for one 16x8x16 tile of a warp; d in float32. The fragments lie as in PTX's mma.m16n8k16: see attention_prefill.cu.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef EMULATED
template <>
inline void mma_16x8x16<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<2>(d, a, b, [](uint32_t pair, int e) { return widen(f16{uint16_t(pair >> (16 * e))}); });
}
template <>
inline void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<2>(d, a, b, [](uint32_t pair, int e) { return widen(bf16{uint16_t(pair >> (16 * e))}); });
}
#else
#define MMA(T, NAME)                                                                                                  \
    template <>                                                                                                       \
    __device__ __forceinline__ void mma_16x8x16<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "      \
                     "{%8,%9}, {%0,%1,%2,%3};"                                                                         \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }
MMA(f16, "f16")
MMA(bf16, "bf16")
#undef MMA
#endif

// The same for a 16x8x32 tile of int8 numbers, four in a register; exact, in int32.
__device__ __forceinline__ void mma_16x8x32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef EMULATED
    emulated_mma<4>(d, a, b, [](uint32_t four, int e) { return int(int8_t(four >> (8 * e))); });
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8x8 matrices of halves out of shared memory. Lane l names the begin of row l % 8 of matrix l / 8, at a multiple of 16
// bytes; of each matrix it is given the numbers 2(l % 4) + {0, 1} of row l / 4, which is what an operand of the product has.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef EMULATED
    emulated_ldmatrix(to, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// The same of the transposed matrices: numbers l / 4 of the rows 2(l % 4) + {0, 1}.
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&to)[4], const void* row) {
#ifdef EMULATED
    emulated_ldmatrix(to, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// -- copies that go on beside the arithmetic: from global to shared memory, 16 bytes each, both at multiples of 16 ------------

// Zeros if `there` is false; `from` is not read then.
__device__ __forceinline__ void copy_16_async(void* to, const void* from, bool there) {
#ifdef EMULATED
    emulation::copy_async(to, from, 16, there);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#endif
}

// What this thread has begun to copy since the last such call is a group.
__device__ __forceinline__ void close_copies() {
#ifdef EMULATED
    emulation::close_copies();
#else
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// What this thread has begun to copy is in place, but for the last PENDING groups. Of the others' copies a barrier after this
// tells.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
#ifdef EMULATED
    emulation::finish_copies(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
#endif
}

// The same of all, in a group or not.
__device__ __forceinline__ void await_copies() {
    close_copies();
    await_copies<0>();
}
