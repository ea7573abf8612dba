// From one step of decoding to the next without the host: the chosen tokens become the next ones to come in.
//
//     one block, a thread for each row    ids | positions | tokens[row, step]
#include "device.cuh"

constexpr int THREADS = 128;

// ids = chosen, tokens[:, step] = chosen, positions += step < remaining, and at last step += 1
//
// A row that has no step remaining stays at its position, which is inside the cache.
__global__ void __launch_bounds__(THREADS)
    advance(const int64_t* chosen, int* ids, int* positions, const int* remaining, int* step, int64_t* tokens, int rows,
            int room) {
    int now = *step;
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        ids[row] = int(chosen[row]);
        if (now < room) tokens[int64_t(row) * room + now] = chosen[row];
        positions[row] += now < remaining[row];
    }
    __syncthreads();  // every thread has read the counter
    if (threadIdx.x == 0) *step = now + 1;
}
