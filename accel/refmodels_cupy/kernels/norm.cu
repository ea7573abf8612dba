// layer_norm and rms_norm over rows of n values, and the residual sum in front of them in the same pass.
//
//     block 0   row 0 of x    | thread 0 | thread 1 | ... | thread 255 | thread 0 | ...      each thread strides over the row
//     block 1   row 1 of x
//
// Two passes over the row for layer_norm, as the reference: the mean first, then the mean squared deviation. A row of up to
// 32 KB stays in the cache between them. Sums are float32, in one order whatever the number of rows.
#include "device.cuh"

constexpr int THREADS = 256;

// y = gamma (x - mean) / sqrt(variance + epsilon) + beta
template <class T, class P>
__global__ void __launch_bounds__(THREADS) layer_norm(const T* x, const P* gamma, const P* beta, T* y, int n, float epsilon) {
    const T* row = x + int64_t(blockIdx.x) * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += widen(row[i]);
    float mean = block_sum<THREADS>(sum) / n;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float deviation = widen(row[i]) - mean;
        squares += deviation * deviation;
    }
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / n + epsilon);
    for (int i = threadIdx.x; i < n; i += THREADS)
        y[int64_t(blockIdx.x) * n + i] = narrow<T>((widen(row[i]) - mean) * scale * widen(gamma[i]) + widen(beta[i]));
}

// y = weight x / sqrt(mean(x**2) + epsilon), from the type of the residual stream to that of the activations
template <class T, class P, class Y>
__global__ void __launch_bounds__(THREADS) rms_norm(const T* x, const P* weight, Y* y, int n, float epsilon) {
    const T* row = x + int64_t(blockIdx.x) * n;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) squares += widen(row[i]) * widen(row[i]);
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / n + epsilon);
    for (int i = threadIdx.x; i < n; i += THREADS)
        y[int64_t(blockIdx.x) * n + i] = narrow<Y>(widen(row[i]) * scale * widen(weight[i]));
}
