// What follows a large matrix product, whose sums cuBLAS leaves in float32 (or int32): scales, bias, activation, residual sum, and
// the one rounding to the result's type.
//
//     sums[rows, n]   one value a thread, one after the other
#include "device.cuh"

constexpr int THREADS = 256;

// y[r, j] = residual[r, j] + activation(factor * sums[r, j] / (row_scale[r] * scale[j]) + bias[j])
//
// row_scale, scale, bias and residual may be null: 1, 1, 0, 0. residual and y are of one type.
template <class S>
__global__ void __launch_bounds__(THREADS)
    epilogue(const S* sums, const float* row_scale, const float* scale, const void* bias, int bias_type, const void* residual,
             void* y, int y_type, int rows, int n, float factor, int activation) {
    int64_t place = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (place >= int64_t(rows) * n) return;
    int r = int(place / n), j = int(place % n);
    Finish finish{bias, bias_type, residual, y, y_type, n, factor, activation};
    finish(r, j, rescaled(float(sums[place]), row_scale, r, scale, j));
}
