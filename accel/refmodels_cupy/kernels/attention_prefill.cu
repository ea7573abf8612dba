// Attention of many queries, without the matrix of all scores: softmax(scale * query . key + bias, over the permitted keys) .
// value in one pass over the keys, by the tensor cores.
//
// A block makes 64 queries of one head, 16 by each of its 4 warps. It visits the keys from the first to the last in tiles of 64,
// and copies the next tile while it works on this one:
//
//                  64 keys (this tile)                      D
//                 +--------------------+             +--------------+
//     warp 0  16  |  S = Q K^T         |             |  O           |      O = O * exp(old peak - peak) + P V
//     warp 1  16  |  P = exp(S - peak) |   times V:  |              |
//     warp 2  16  |                    |   64 x D    |              |      sum of weights: the same with a column of ones
//     warp 3  16  |                    |             |              |
//                 +--------------------+             +--------------+
//
// Q, S, P and O stay in registers. A product 16x8x16 has its parts so in the lanes of a warp (l is the lane):
//
//     A (16 x 16)  rows l/4 and l/4 + 8, columns 2(l%4) + {0, 1} and 8 more       C (16 x 8)  rows l/4 and l/4 + 8,
//     B (16 x 8)   column l/4, rows 2(l%4) + {0, 1} and 8 more                                columns 2(l%4) + {0, 1}
//
// so S, made as C, is P as A of the next product without leaving its lanes. A tile in shared memory has rows of D + 8 halves:
// an odd number of 16-byte pieces, so the 8 rows that are read at once lie in different banks.
//
// Scores are float32, in units of log 2, as 2**x is what the hardware has. Weights are rounded to the stored type for the
// product with V, and their sum is that of the rounded ones, so they are a mean's. For float16 they are 2**15 times larger
// than exp(S - peak): what is far below the peak is not lost to its short range.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int QUERIES = 16 * WARPS;
constexpr int KEYS = 64;

template <class T>
constexpr float RAISED = 0.0f;
template <>
constexpr float RAISED<f16> = 15.0f;

// Begin to copy a tile; rows from `count` on are zeros.
template <int D, class T>
__device__ __forceinline__ void copy_tile(T* tile, const T* from, int64_t position_stride, int count) {
    for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        bool there = row < count;
        copy_16_async(tile + row * (D + 8) + column, from + (there ? row * position_stride + column : 0), there);
    }
}

// query, context [b, t, h, D], the queries with a stride of their own for t (and b, which is t of them); key, value [b, s, h, D]
// with strides of their own for b and s.
//
// A key is permitted if mask[b, t, s] (strides, 0 for an axis of one), key_mask[b, s] and, if `causal`, its number is not above
// positions[b, t]; null permits. `bias` is null; slopes [h]; T5's table [buckets, h] with `firsts`, `side` and `reach`, see
// attention.cuh; or an array [b, h, t, s]. The distances are those to `positions`.
template <class T, int D, int BIAS>
__global__ void __launch_bounds__(THREADS, 2) attention_prefill(
    const T* query, int64_t query_stride, const T* key, const T* value, T* context, int t, int s, int heads,
    int64_t batch_stride, int64_t position_stride, float scale, const uint8_t* mask, int64_t mask_batch, int64_t mask_query, const uint8_t* key_mask,
    int64_t key_mask_batch, int causal, const int* positions, int64_t positions_batch, const float* bias, int64_t bias_batch,
    const int* firsts, int side, int reach, int bidirectional) {
    constexpr int TILE = KEYS * (D + 8);
    DYNAMIC_SHARED(T, tiles);  // two of keys, two of values, and T5's table by distance behind them
    float* by_distance = reinterpret_cast<float*>(tiles + 4 * TILE);

    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    int head = blockIdx.y, batch = blockIdx.z;
    int first = (causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * QUERIES;  // the longest rows begin first
    key += batch * batch_stride + head * D;
    value += batch * batch_stride + head * D;
    if (key_mask) key_mask += batch * key_mask_batch;
    if (positions) positions += batch * positions_batch;

    if (BIAS == TABLE) fill_by_distance(by_distance, reach, bias, firsts, side, bidirectional, heads, head, LOG2_E);
    float slope = BIAS == ALIBI ? bias[head] * LOG2_E : 0.0f;

    // This thread's two rows. One behind the last query is a copy of that, and is not stored.
    int place[2], position[2];
    const uint8_t* permits[2];
    const float* biases[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        place[r] = first + 16 * warp + lane / 4 + 8 * r;
        int row = min(place[r], t - 1);
        position[r] = positions ? positions[row] : 0;
        permits[r] = mask ? mask + batch * mask_batch + row * mask_query : nullptr;
        biases[r] = BIAS == GIVEN ? bias + batch * bias_batch + (int64_t(head) * t + row) * s : nullptr;
    }

    uint32_t q[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int64_t row = int64_t(batch) * t + min(place[i % 2], t - 1);
            q[k][i] = *reinterpret_cast<const uint32_t*>(query + row * query_stride + head * D + 16 * k + 8 * (i / 2) + 2 * (lane % 4));
        }

    float o[D / 8][4] = {}, total[4] = {}, peak[2] = {FORBIDDEN, FORBIDDEN};
    const uint32_t ones[2] = {pair<T>(1.0f, 1.0f), pair<T>(1.0f, 1.0f)};

    int end = causal ? visited_keys(positions + first, min(QUERIES, t - first), key_mask, s) : s;
    copy_tile<D>(tiles, key, position_stride, s);
    copy_tile<D>(tiles + 2 * TILE, value, position_stride, s);
    for (int from = 0, now = 0; from < end; from += KEYS, now ^= 1) {
        await_copies();
        __syncthreads();  // this tile is there, and nobody reads the other one any more
        if (from + KEYS < end) {
            int64_t next = (from + KEYS) * position_stride;
            copy_tile<D>(tiles + (now ^ 1) * TILE, key + next, position_stride, s - from - KEYS);
            copy_tile<D>(tiles + (2 + (now ^ 1)) * TILE, value + next, position_stride, s - from - KEYS);
        }
        const T *keys = tiles + now * TILE, *values = tiles + (2 + now) * TILE;

        // S: column 2(l%4) + {0, 1} of n has the key from + 8 n + that.
        float x[KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                uint32_t b[4];
                load_matrices(b, keys + (8 * n + lane / 16 * 8 + lane % 8) * (D + 8) + 16 * k + lane / 8 % 2 * 8);
                mma_16x8x16<T>(x[n], q[k], {b[0], b[1]});
                mma_16x8x16<T>(x[n + 1], q[k], {b[2], b[3]});
            }

        // Scores, and which of them count.
        uint32_t real[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int number = from + 32 * half + lane;
            real[half] = __ballot_sync(ALL_LANES, number < s && (!key_mask || key_mask[number]));
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int number = from + 8 * n + 2 * (lane % 4) + i % 2, r = i / 2;
                float score = x[n][i] * (scale * LOG2_E);
                int relative = number - position[r];
                if (BIAS == ALIBI) score += slope * float(relative);
                if (BIAS == TABLE) score += by_distance[min(max(relative, -reach), reach) + reach];
                if (BIAS == GIVEN && number < s) score += biases[r][number] * LOG2_E;
                bool permitted = (real[n / 4] >> (number & 31) & 1) && (!causal || relative <= 0);
                if (mask && number < s && !permits[r][number]) permitted = false;
                x[n][i] = permitted ? score : number < s ? FORBIDDEN : nothing();
            }

        // The largest score so far, and what was summed by an older one in its terms.
        float lowered[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = peak[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) largest = fmaxf(largest, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            lowered[r] = power_of_2(peak[r] - largest);
            peak[r] = largest;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            total[i] *= lowered[i / 2];
#pragma unroll
            for (int n = 0; n < D / 8; ++n) o[n][i] *= lowered[i / 2];
        }

        // O += P V, 16 keys at a time
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
            uint32_t p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* two = &x[2 * k + i / 2][2 * (i % 2)];
                float raised = RAISED<T> - peak[i % 2];
                p[i] = pair<T>(power_of_2(two[0] + raised), power_of_2(two[1] + raised));
            }
            mma_16x8x16<T>(total, p, ones);
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                uint32_t b[4];
                load_transposed_matrices(b, values + (16 * k + lane % 16) * (D + 8) + 8 * n + lane / 16 * 8);
                mma_16x8x16<T>(o[n], p, {b[0], b[1]});
                mma_16x8x16<T>(o[n + 1], p, {b[2], b[3]});
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (place[r] >= t) continue;
        T* row = context + ((int64_t(batch) * t + place[r]) * heads + head) * D + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            *reinterpret_cast<uint32_t*>(row + 8 * n) = pair<T>(o[n][2 * r] / total[2 * r], o[n][2 * r + 1] / total[2 * r]);
    }
}
