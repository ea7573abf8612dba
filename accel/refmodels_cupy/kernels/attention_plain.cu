// Attention of many queries without tensor cores: float32, whose products they would round, and head sizes that do not fit them.
//
// A block makes 32 queries of one head, 4 by each of its 8 warps, and visits the keys in tiles of 32, widened into shared memory:
//
//     scores     lane l has key l:           4 queries . keys[l, :]           keys have rows of D + 1: different banks
//     context    lane l has the columns      context[:, l], [:, l + 32] ...   += 4 weights of each key * values[key, those]
//                l, l + 32, ...
//
// In between the lanes of a warp lay the weights down for each other, where the keys were: so heads of 256 numbers fit into the
// 99 KB that a block has on every GPU. The sums are float32, from the first key to the last; see attention.cuh for keys that are
// left out.
#include "attention.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int EACH = 4;  // queries of a warp
constexpr int QUERIES = EACH * WARPS;
constexpr int KEYS = WARP_SIZE;

// The parameters are those of attention_prefill; heads have `size` numbers, at most D, and `kind` is the Bias.
template <class T, int D>
__global__ void __launch_bounds__(THREADS, 2) attention_plain(
    const T* query, int64_t query_stride, const T* key, const T* value, T* context, int size, int t, int s, int heads,
    int64_t batch_stride, int64_t position_stride, float scale, const uint8_t* mask, int64_t mask_batch, int64_t mask_query, const uint8_t* key_mask,
    int64_t key_mask_batch, int causal, const int* positions, int64_t positions_batch, int kind, const float* bias,
    int64_t bias_batch, const int* firsts, int side, int reach, int bidirectional) {
    DYNAMIC_SHARED(float4, memory);
    float4* queries = memory + threadIdx.x / WARP_SIZE * D;                  // [D] of each warp: a number of all its 4 queries
    float4* weights = memory + WARPS * D + threadIdx.x / WARP_SIZE * KEYS;  // [KEYS] of each warp, in the place of keys
    float* keys = reinterpret_cast<float*>(memory + WARPS * D);
    static_assert(WARPS * KEYS * sizeof(float4) <= KEYS * (D + 1) * sizeof(float), "the weights fit where the keys were");
    float* values = keys + KEYS * (D + 1);
    float* by_distance = values + KEYS * D;

    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    int head = blockIdx.y, batch = blockIdx.z;
    int first = blockIdx.x * QUERIES;
    key += batch * batch_stride + int64_t(head) * size;
    value += batch * batch_stride + int64_t(head) * size;
    if (key_mask) key_mask += batch * key_mask_batch;
    if (positions) positions += batch * positions_batch;
    if (kind == TABLE) fill_by_distance(by_distance, reach, bias, firsts, side, bidirectional, heads, head, 1.0f);

    // Rows behind the last query are copies of that, and are not stored.
    int rows[EACH];
#pragma unroll
    for (int r = 0; r < EACH; ++r) rows[r] = min(first + EACH * warp + r, t - 1);
    for (int i = lane; i < size; i += WARP_SIZE) {
        float four[EACH];
#pragma unroll
        for (int r = 0; r < EACH; ++r) four[r] = widen(query[(int64_t(batch) * t + rows[r]) * query_stride + head * size + i]);
        queries[i] = {four[0], four[1], four[2], four[3]};
    }

    float sums[EACH][D / WARP_SIZE] = {}, total[EACH] = {}, peak[EACH];
#pragma unroll
    for (int r = 0; r < EACH; ++r) peak[r] = FORBIDDEN;

    int end = causal ? visited_keys(positions + first, min(QUERIES, t - first), key_mask, s) : s;
    for (int from = 0; from < end; from += KEYS) {
        __syncthreads();  // nobody reads the tile before this one any more
        for (int i = threadIdx.x; i < KEYS * D; i += THREADS) {
            int row = i / D, column = i % D;
            bool there = from + row < s && column < size;
            int64_t offset = (from + row) * position_stride + column;
            keys[row * (D + 1) + column] = there ? widen(key[offset]) : 0.0f;
            values[i] = there ? widen(value[offset]) : 0.0f;
        }
        __syncthreads();

        float x[EACH] = {};
        for (int i = 0; i < size; ++i) {
            float k = keys[lane * (D + 1) + i];
            float4 q = queries[i];
            x[0] += q.x * k, x[1] += q.y * k, x[2] += q.z * k, x[3] += q.w * k;
        }
        int number = from + lane;
#pragma unroll
        for (int r = 0; r < EACH; ++r) {
            float score = nothing();
            if (number < s) {
                int relative = number - (positions ? positions[rows[r]] : 0);
                score = x[r] * scale;
                if (kind == ALIBI) score += bias[head] * float(relative);
                if (kind == TABLE) score += by_distance[min(max(relative, -reach), reach) + reach];
                if (kind == GIVEN) score += bias[batch * bias_batch + (int64_t(head) * t + rows[r]) * s + number];
                bool permitted = (!key_mask || key_mask[number]) && (!causal || relative <= 0);
                if (mask && !mask[batch * mask_batch + rows[r] * mask_query + number]) permitted = false;
                if (!permitted) score = FORBIDDEN;
            }
            float largest = fmaxf(peak[r], warp_max(score)), lowered = expf(peak[r] - largest);
            peak[r] = largest;
            x[r] = expf(score - largest);
            total[r] = total[r] * lowered + warp_sum(x[r]);
#pragma unroll
            for (int c = 0; c < D / WARP_SIZE; ++c) sums[r][c] *= lowered;
        }
        __syncthreads();  // nobody reads the keys any more
        weights[lane] = {x[0], x[1], x[2], x[3]};
        __syncwarp();
        for (int j = 0; j < KEYS; ++j) {
            float4 p = weights[j];
#pragma unroll
            for (int c = 0; c < D / WARP_SIZE; ++c) {
                float v = values[j * D + lane + WARP_SIZE * c];
                sums[0][c] += p.x * v, sums[1][c] += p.y * v, sums[2][c] += p.z * v, sums[3][c] += p.w * v;
            }
        }
    }

#pragma unroll
    for (int r = 0; r < EACH; ++r) {
        if (first + EACH * warp + r >= t) continue;
#pragma unroll
        for (int c = 0; c < D / WARP_SIZE; ++c) {
            int column = lane + WARP_SIZE * c;
            if (column < size)
                context[((int64_t(batch) * t + rows[r]) * heads + head) * size + column] = narrow<T>(sums[r][c] / total[r]);
        }
    }
}
