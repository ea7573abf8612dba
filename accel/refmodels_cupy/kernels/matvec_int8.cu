// A few rows of int8 numbers times an int8 weight matrix: exact sums in int32, four products an instruction (dp4a).
//
// The tiling is that of matvec.cu, with pieces of 16 numbers:
//
//     w[j, :]        | lane 0: 16 numbers | lane 1: 16 numbers | ... | lane 31 | lane 0 | ...
//     values[r, :]   the same 16 of each row, from the cache
//
// Integers add up without rounding, so the order is nobody's business here.
#include "device.cuh"

constexpr int WARPS = 8;

__device__ __forceinline__ void sixteen(const int8_t* p, uint32_t (&out)[4]) {
    uint4 four = *reinterpret_cast<const uint4*>(p);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}

// The sums of products of outputs j, j + 1, ... with rows `first`, first + 1, ...: lane l has that of output l / ROWS, row l % ROWS.
template <int ROWS, int OUTPUTS>
__device__ __forceinline__ int sum_of_products(const int8_t* values, int first, int rows, const int8_t* w, int64_t j, int n,
                                               int pitch) {
    int sums[OUTPUTS][ROWS] = {}, lane = threadIdx.x % WARP_SIZE, sum = 0;
#pragma unroll 2
    for (int i = 16 * lane; i < pitch; i += 16 * WARP_SIZE) {
        uint32_t weights[OUTPUTS][4];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) sixteen(w + min(j + o, int64_t(n - 1)) * pitch + i, weights[o]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            uint32_t numbers[4];
            sixteen(values + int64_t(min(first + r, rows - 1)) * pitch + i, numbers);
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
                for (int q = 0; q < 4; ++q) sums[o][r] = dot4(weights[o][q], numbers[q], sums[o][r]);
        }
    }
#pragma unroll
    for (int l = 0; l < ROWS * OUTPUTS; ++l) {
        int total = warp_sum(sums[l / ROWS][l % ROWS]);
        sum = lane == l ? total : sum;
    }
    return sum;
}

// y[r, j] = residual[r, j] + activation(factor * s(w, scale) + bias[j]) * s(gate, gate_scale)
//     with s(w, scale) = (values[r] . w[j]) / (row_scale[r] * scale[j])
//
// values, w and gate have rows of `pitch` numbers, whole pieces with zeros at the end. bias, gate and residual may be null: 0, no
// gate, 0. residual and y are of one type.
template <int ROWS, int OUTPUTS>
__global__ void __launch_bounds__(WARPS * WARP_SIZE)
    matvec_int8(const int8_t* values, const float* row_scale, const int8_t* w, const float* scale, const int8_t* gate,
                const float* gate_scale, const void* bias, int bias_type, const void* residual, void* y, int y_type, int rows,
                int n, int pitch, float factor, int activation) {
    int parts = (rows + ROWS - 1) / ROWS, first = int(blockIdx.x % parts) * ROWS, lane = threadIdx.x % WARP_SIZE;
    int64_t j = (int64_t(blockIdx.x / parts) * WARPS + threadIdx.x / WARP_SIZE) * OUTPUTS;
    if (j >= n) return;  // a whole warp
    int64_t column = j + lane / ROWS;
    int row = first + lane % ROWS;
    bool mine = lane < ROWS * OUTPUTS && column < n && row < rows;
    float result[2] = {0.0f, 1.0f};  // the layer's, the gate's
#pragma unroll 1
    for (int pass = 0; pass < (gate ? 2 : 1); ++pass) {
        int sum = sum_of_products<ROWS, OUTPUTS>(values, first, rows, pass ? gate : w, j, n, pitch);
        if (mine) result[pass] = rescaled(float(sum), row_scale, row, pass ? gate_scale : scale, column);
    }
    Finish finish{bias, bias_type, residual, y, y_type, n, factor, activation};
    if (mine) finish(row, column, result[0], result[1]);
}
