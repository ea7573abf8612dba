// A few rows times a weight matrix, and what follows it: bias, activation, gate, residual sum. For decoding, where reading the
// weights is all the time there is.
//
// The weights lie as [n, k], one output after the other (accelerator.py turns them when a model is loaded). A warp makes one
// output for all rows of x:
//
//     w[j, :]   | lane 0: 8 values | lane 1: 8 values | ... | lane 31 | lane 0 | ...    16 bytes a lane, so 512 in one piece
//     x[r, :]   the same 8 values of each row, from the cache
//
// Each lane sums its own products from left to right, then the 32 sums are added as a tree: one order, whatever the number of
// rows, so a row's result does not depend on its batch.
#include "device.cuh"

constexpr int WARPS = 8;  // outputs of a block

enum Activation { LINEAR, RELU, GELU, GELU_APPROXIMATE, SILU };

template <int ACTIVATION>
__device__ __forceinline__ float activated(float x) {
    if (ACTIVATION == RELU) return fmaxf(x, 0.0f);
    if (ACTIVATION == GELU) return 0.5f * x * erfcf(-x * 0.70710678118654752f);
    if (ACTIVATION == GELU_APPROXIMATE) {
        float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));
    }
    if (ACTIVATION == SILU) return x / (1.0f + expf(-x));
    return x;
}

// Eight values of a row from place i on, widened. Rows begin at multiples of 8 values.
__device__ __forceinline__ void eight(const float* p, float (&out)[8]) {
    float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

template <class T>
__device__ __forceinline__ void eight_halves(const T* p, float (&out)[8]) {
    uint4 bits = *reinterpret_cast<const uint4*>(p);
    uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = widen(T{uint16_t(pairs[i / 2] >> (16 * (i % 2)))});
}
__device__ __forceinline__ void eight(const f16* p, float (&out)[8]) { eight_halves(p, out); }
__device__ __forceinline__ void eight(const bf16* p, float (&out)[8]) { eight_halves(p, out); }

__device__ __forceinline__ void eight(const int8_t* p, float (&out)[8]) {
    uint2 bits = *reinterpret_cast<const uint2*>(p);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = float(int8_t((i < 4 ? bits.x : bits.y) >> (8 * (i % 4))));
}

// The sum of products of output j with each of ROWS rows of x, in every lane. k is a multiple of 8.
template <int ROWS, class X, class W>
__device__ __forceinline__ void products(const X* x, const W* w, int k, float (&sums)[ROWS]) {
    int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = 0.0f;
#pragma unroll 4
    for (int i = 8 * lane; i < k; i += 8 * WARP_SIZE) {
        float weights[8], values[8];
        eight(w + i, weights);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            eight(x + int64_t(r) * k + i, values);
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[r] += values[e] * weights[e];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = warp_sum(sums[r]);
}

// y[r, j] = residual[r, j] + activation(x[r] . w[j] / scale[j] + bias[j]) * (x[r] . gate[j] / gate_scale[j])
//
// scale, bias, gate, gate_scale and residual may be null: 1, 0, no gate, 1, 0. A scale is what int8 numbers are divided by.
template <int ROWS, int ACTIVATION, class X, class W, class P, class Y>
__global__ void __launch_bounds__(WARPS * WARP_SIZE)
    matvec(const X* x, const W* w, const float* scale, const P* bias, const W* gate, const float* gate_scale, const Y* residual,
           Y* y, int n, int k) {
    int64_t j = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP_SIZE;
    if (j >= n) return;  // a whole warp: its other lanes have the same j
    x += int64_t(blockIdx.y) * ROWS * k;
    float sums[ROWS], gates[ROWS];
    products<ROWS>(x, w + j * k, k, sums);
    if (gate) products<ROWS>(x, gate + j * k, k, gates);
    if (threadIdx.x % WARP_SIZE) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float value = scale ? sums[r] / scale[j] : sums[r];
        value = activated<ACTIVATION>(bias ? value + widen(bias[j]) : value);
        if (gate) value *= gate_scale ? gates[r] / gate_scale[j] : gates[r];
        int64_t place = (int64_t(blockIdx.y) * ROWS + r) * n + j;
        y[place] = narrow<Y>(residual ? widen(residual[place]) + value : value);
    }
}
