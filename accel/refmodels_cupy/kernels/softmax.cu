// masked_softmax: exp(score) / sum of exp(score) over the permitted keys of each row of s scores; 0 for the others. A row that
// permits no key gives each the same weight.
//
//     block 0   warp 0: row 0 of scores   | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...        a row is (b, h, t)
//               warp 1: row 1
//               ...
//
// Three passes over the row, which stays in the cache: the largest permitted score, the sum, the weights. Sums are float32, in
// one order whatever the number of rows. Warps wait for nobody.
#include "device.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP_SIZE;

// The mask has strides of its own for b and t, 0 for an axis of one; rows_of_batch is h * t.
template <class T>
__global__ void __launch_bounds__(THREADS) masked_softmax(const T* scores, const uint8_t* mask, float* weights, int64_t rows, int s,
                                                          int t, int rows_of_batch, int64_t mask_batch, int64_t mask_query) {
    int lane = threadIdx.x % WARP_SIZE;
    int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP_SIZE;
    if (row >= rows) return;  // a whole warp
    scores += row * s;
    weights += row * s;
    mask += row / rows_of_batch * mask_batch + row % t * mask_query;
    float peak = __int_as_float(int(0xff800000u)), some = 0.0f;
    for (int i = lane; i < s; i += WARP_SIZE)
        if (mask[i]) peak = fmaxf(peak, widen(scores[i])), some = 1.0f;
    peak = warp_max(peak);
    some = warp_max(some);
    float sum = 0.0f;
    for (int i = lane; i < s; i += WARP_SIZE)
        if (mask[i]) sum += expf(widen(scores[i]) - peak);
    float total = warp_sum(sum);
    for (int i = lane; i < s; i += WARP_SIZE) {
        float weight = mask[i] ? expf(widen(scores[i]) - peak) / total : 0.0f;
        weights[i] = some != 0.0f ? weight : 1.0f / s;
    }
}
