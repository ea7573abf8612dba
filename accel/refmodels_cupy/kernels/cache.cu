// Rows to the places where they are read from later: keys and values to their positions in the cache, and of one step what its
// attention is to know of each row.
//
//     grid (rows, 2)     block (i, 0): row i of the keys | thread 0 | thread 1 | ... | thread 127 | thread 0 | ...
//                        block (i, 1): row i of the values
#include "device.cuh"

constexpr int THREADS = 128;

// out[b, start[b] + i] = x[b * t + i], rows of `width` values that lie `from_pitch` apart in x and `pitch` in out [b, capacity,
// pitch]
//
// start is read when the launch runs; null is 0. Nothing is written outside the cache. A second pair is for blocks (i, 1).
template <class T>
__global__ void __launch_bounds__(THREADS)
    append(const T* x, T* out, const T* second, T* second_out, const int* start, int t, int width, int from_pitch, int pitch,
           int capacity) {
    int row = blockIdx.x / t, position = blockIdx.x % t + (start ? start[row] : 0);
    if (position < 0 || position >= capacity) return;
    const T* from = (blockIdx.y ? second : x) + int64_t(blockIdx.x) * from_pitch;
    T* to = (blockIdx.y ? second_out : out) + (int64_t(row) * capacity + position) * pitch;
    for (int i = threadIdx.x; i < width; i += THREADS) to[i] = from[i];
}

// One token of each row comes in at positions[b]: mask[b, positions[b]] says whether it is real, and lengths[b] how many keys it
// looks at. One block, a thread for each row.
//
// A real token may look at itself, so what is behind it is not even read. One that is not real may have no key that is permitted;
// then it looks at all, up to the last position of the batch.
__global__ void __launch_bounds__(THREADS)
    enter(const uint8_t* real, const int* positions, uint8_t* mask, int* lengths, int rows, int capacity) {
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        int position = positions[row], last = position;
        bool is_real = !real || real[row];
        if (!is_real)
            for (int i = 0; i < rows; ++i) last = max(last, positions[i]);
        lengths[row] = min(last + 1, capacity);
        if (position >= 0 && position < capacity) mask[int64_t(row) * capacity + position] = is_real;
    }
}
