// layer_norm and rms_norm over rows of n values, and the residual sum in front of them in the same pass.
//
//     block 0   row 0   | thread 0: 8 values | thread 1: 8 values | ... | thread 255 | thread 0 | ...
//     block 1   row 1
//
// A row is read from memory once, 16 bytes at a time where its address allows it, and kept in shared memory in float32. Of that a
// thread reads what it has written itself, so that nothing waits but for the sums. layer_norm makes two of them, as the reference:
// the mean first, then the mean squared deviation. Sums are float32, in one order whatever the number of rows and the addresses.
#include "device.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ bool aligned(const void* p) {
    return reinterpret_cast<uint64_t>(p) % 16 == 0;  // of a null pointer too
}

// total = x + (delta + bias), rounded to the type of both, if there is a delta; otherwise it is x. Then with `beta`
//     y = gamma (total - mean) / sqrt(variance + epsilon) + beta
// and without it y = gamma total / sqrt(mean(total**2) + epsilon). total may be where x is.
__global__ void __launch_bounds__(THREADS)
    norm_rows(const void* x, int x_type, const void* delta, int delta_type, const void* bias, int bias_type, void* total,
              const void* gamma, int gamma_type, const void* beta, int beta_type, void* y, int y_type, int n, float epsilon) {
    DYNAMIC_SHARED(float, row);
    int64_t begin = int64_t(blockIdx.x) * n;
    bool vectors = n % 8 == 0 && aligned(x) && aligned(delta) && aligned(bias) && aligned(total) && aligned(gamma) &&
                   aligned(beta) && aligned(y);
    float sum = 0.0f;
    for (int i = 8 * threadIdx.x; i < n; i += 8 * THREADS) {
        float values[8], added[8], more[8];
        stored_eight(x, x_type, begin + i, n - i, vectors, values);
        if (delta) {
            stored_eight(delta, delta_type, begin + i, n - i, vectors, added);
            if (bias) {
                stored_eight(bias, bias_type, i, n - i, vectors, more);
                for (int e = 0; e < 8; ++e) added[e] += more[e];
            }
            for (int e = 0; e < 8; ++e) values[e] = rounded(x_type, values[e] + added[e]);
            store_eight(total, x_type, begin + i, n - i, vectors, values);
        }
        store_eight(row + i, values);
        for (int e = 0; e < 8; ++e) sum += values[e];
    }
    float mean = beta ? block_sum<THREADS>(sum) / n : 0.0f, squares = 0.0f;
    for (int i = 8 * threadIdx.x; i < n; i += 8 * THREADS)
        for (int e = 0; e < min(8, n - i); ++e) squares += (row[i + e] - mean) * (row[i + e] - mean);
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / n + epsilon);
    for (int i = 8 * threadIdx.x; i < n; i += 8 * THREADS) {
        float values[8], factors[8], added[8];
        eight(row + i, values);
        stored_eight(gamma, gamma_type, i, n - i, vectors, factors);
        for (int e = 0; e < 8; ++e) values[e] = (values[e] - mean) * scale * factors[e];
        if (beta) {
            stored_eight(beta, beta_type, i, n - i, vectors, added);
            for (int e = 0; e < 8; ++e) values[e] += added[e];
        }
        store_eight(y, y_type, begin + i, n - i, vectors, values);
    }
}
