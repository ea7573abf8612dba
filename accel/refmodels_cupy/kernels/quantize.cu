// Rows of activations to int8, by the largest value of each row.
//
//     block 0   row 0 of x    | thread 0 | thread 1 | ... | thread 255 | thread 0 | ...      each thread strides over the row
//     block 1   row 1 of x
#include "device.cuh"

constexpr int THREADS = 256;

// 127 / (max |row| + 1e-7), every step in float32; NaN for a row that is not finite. For every thread.
template <class X>
__device__ __forceinline__ float scale_of(const X* row, int k) {
    const float INFINITE = __int_as_float(0x7f800000);
    float largest = 0.0f;
    for (int i = threadIdx.x; i < k; i += THREADS) {
        float value = fabsf(widen(row[i]));
        largest = fmaxf(largest, value == value ? value : INFINITE);
    }
    largest = block_max<THREADS>(largest);
    return largest < INFINITE ? 127.0f / (largest + 1e-7f) : __int_as_float(0x7fc00000);
}

// row * scale, rounded to the nearest integer, ties to even, from -127 to 127; 0 where that is NaN, and from k to pitch
template <class X>
__device__ __forceinline__ void quantize(const X* row, float scale, int8_t* values, int k, int pitch) {
    for (int i = threadIdx.x; i < pitch; i += THREADS) {
        float level = i < k ? rintf(widen(row[i]) * scale) : 0.0f;
        values[i] = level == level ? int8_t(fminf(fmaxf(level, -127.0f), 127.0f)) : int8_t(0);
    }
}

template <class X>
__global__ void __launch_bounds__(THREADS) row_scale(const X* x, float* scale, int k) {
    float found = scale_of(x + int64_t(blockIdx.x) * k, k);
    if (threadIdx.x == 0) scale[blockIdx.x] = found;
}

template <class X>
__global__ void __launch_bounds__(THREADS) quantize_rows(const X* x, const float* scale, int8_t* values, int k) {
    int64_t begin = int64_t(blockIdx.x) * k;
    quantize(x + begin, scale[blockIdx.x], values + begin, k, k);
}

// Both in one launch: a row is read from memory once and from the cache once more. values [rows, pitch].
template <class X>
__global__ void __launch_bounds__(THREADS) rows_to_int8(const X* x, float* scale, int8_t* values, int k, int pitch) {
    const X* row = x + int64_t(blockIdx.x) * k;
    float by = scale_of(row, k);
    if (threadIdx.x == 0) scale[blockIdx.x] = by;
    quantize(row, by, values + int64_t(blockIdx.x) * pitch, k, pitch);
}
