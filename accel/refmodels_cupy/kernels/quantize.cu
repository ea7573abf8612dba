// Rows of activations to int8, by the largest value of each row.
//
//     block 0   row 0 of x    | thread 0 | thread 1 | ... | thread 255 | thread 0 | ...      each thread strides over the row
//     block 1   row 1 of x
#include "device.cuh"

constexpr int THREADS = 256;

// The largest x of a block of threads, for every thread; x is 0 or more, and infinity stands for NaN as well.
__device__ __forceinline__ float block_max(float x) {
    SHARED(float, partial, [THREADS / WARP_SIZE]);
    x = warp_max(x);
    if (threadIdx.x % WARP_SIZE == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    float largest = 0.0f;
    for (int i = 0; i < THREADS / WARP_SIZE; ++i) largest = fmaxf(largest, partial[i]);
    return largest;
}

// scale[r] = 127 / (max |x[r]| + 1e-7), every step in float32; NaN for a row that is not finite
template <class X>
__global__ void __launch_bounds__(THREADS) row_scale(const X* x, float* scale, int k) {
    const float INFINITE = __int_as_float(0x7f800000);
    const X* row = x + int64_t(blockIdx.x) * k;
    float largest = 0.0f;
    for (int i = threadIdx.x; i < k; i += THREADS) {
        float value = fabsf(widen(row[i]));
        largest = fmaxf(largest, value == value ? value : INFINITE);
    }
    largest = block_max(largest);
    if (threadIdx.x == 0) scale[blockIdx.x] = largest < INFINITE ? 127.0f / (largest + 1e-7f) : __int_as_float(0x7fc00000);
}

// values = x * scale[r], rounded to the nearest integer, ties to even, from -127 to 127; 0 where that is NaN
template <class X>
__global__ void __launch_bounds__(THREADS) quantize_rows(const X* x, const float* scale, int8_t* values, int k) {
    int64_t begin = int64_t(blockIdx.x) * k;
    float by = scale[blockIdx.x];
    for (int i = threadIdx.x; i < k; i += THREADS) {
        float level = rintf(widen(x[begin + i]) * by);
        values[begin + i] = level == level ? int8_t(fminf(fmaxf(level, -127.0f), 127.0f)) : int8_t(0);
    }
}
