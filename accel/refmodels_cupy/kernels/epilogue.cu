// What stands before or behind a large matrix product. Behind it: cuBLAS leaves its sums in float32 (or int32), and scales, bias,
// activation, residual sum and the one rounding to the result's type follow. Before it: without sums, residual and bias are laid
// down for cuBLAS to add to.
//
//     row 0    block (0, 0): 2048 columns, thread 0 has the columns 0, 256, 512 .. | block (0, 1) ..
//     row 1    block (1, 0)
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 8;   // columns of a thread
constexpr int AHEAD = 4;  // of which it asks for the sums before it needs any

// y[r, j] = residual[r, j] + activation(factor * sums[r, j] / (row_scale[r] * scale[j]) + bias[j])
//
// sums, row_scale, scale, bias and residual may be null: 0, 1, 1, 0, 0. residual and y are of one type.
template <class S>
__global__ void __launch_bounds__(THREADS)
    epilogue(const S* sums, const float* row_scale, const float* scale, const void* bias, int bias_type, const void* residual,
             void* y, int y_type, int n, float factor, int activation) {
    int row = blockIdx.x;
    Finish finish{bias, bias_type, residual, y, y_type, n, factor, activation};
#pragma unroll 1
    for (int begin = 0; begin < EACH; begin += AHEAD) {
        int first = (int(blockIdx.y) * EACH + begin) * THREADS + int(threadIdx.x);
        float sum[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int j = first + i * THREADS;
            sum[i] = sums && j < n ? float(sums[int64_t(row) * n + j]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int j = first + i * THREADS;
            if (j < n) finish(row, j, rescaled(sum[i], row_scale, row, scale, j));
        }
    }
}
