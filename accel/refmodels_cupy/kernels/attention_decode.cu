// Attention of one query of each row of the batch: the next token's. Reading the keys and values is all the time there is, and one
// row has few heads, so the keys are split into pieces of 128 that different blocks read:
//
//     row b, head h     | keys 0..127 | 128..255 | 256..383 | 384.. |          a block for each piece
//                          peak, sum of weights, weighted sum of values
//                                         |
//                                     context[b, h]                            by the block that is the last to end
//
// In a piece each of 4 warps has 32 keys, and each key is read by a group of G lanes, 16 bytes each:
//
//     key j      | lane 0: W numbers | lane 1 | ... | lane G - 1 |  and again, C times
//     key j + 1  | lane G            | ...
//
// A lane asks for AHEAD keys before it uses the first: memory takes as long for all of them as for one, and of one row there are
// few blocks that could wait at the same time. Where there is no key it reads another one and takes zeros, since a load behind a
// condition waits until the one before it has been used.
//
// Pieces are the same whatever the batch and however many keys there are, and whichever block comes last adds them from the first
// to the last: so a row's result is the same in every run.
// How many keys a row has may stand in `lengths` on the device: a captured graph has a grid for the whole cache, and blocks that
// have nothing to read end at once.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int PIECE = THREADS;  // keys: one for each thread

// W numbers that lie side by side, widened.
__device__ __forceinline__ void load(const float* p, float (&to)[4]) {
    float4 four = *reinterpret_cast<const float4*>(p);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
template <class T>
__device__ __forceinline__ void load(const T* p, float (&to)[8]) {
    uint4 bits = *reinterpret_cast<const uint4*>(p);
    uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = widen(T{uint16_t(pairs[i / 2] >> (16 * (i % 2)))});
}
template <class T>
__device__ __forceinline__ void load(const T* p, float (&to)[1]) {
    to[0] = widen(*p);
}

// What a member of a group has of one of `count` rows, C times W numbers of `size`; zeros of what is not there.
template <int G, class T, int C, int W>
__device__ __forceinline__ void load_row(const T* rows, int row, int count, int64_t stride, int size, int member,
                                         float (&to)[C][W]) {
    const T* from = rows + min(row, count - 1) * stride;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        int column = (c * G + member) * W;
        load(from + min(column, size - W), to[c]);
#pragma unroll
        for (int w = 0; w < W; ++w) to[c][w] = row < count && column < size ? to[c][w] : 0.0f;
    }
}

// The last of `pieces` blocks to come here puts their sums together.
template <class T>
__device__ __forceinline__ void merge(const float* partial, T* context, int* arrived, int size, int pieces) {
    SHARED(int, before, [1]);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what this block has written is there for all, and only then does it say so
        before[0] = atomicAdd(arrived, 1);
        __threadfence();  // and only then does it look at what others have written
    }
    __syncthreads();
    if (before[0] + 1 != pieces) return;
    float peak = FORBIDDEN;
    for (int i = 0; i < pieces; ++i) peak = fmaxf(peak, of_others(partial + int64_t(i) * (size + 2)));
    for (int column = threadIdx.x; column < size; column += THREADS) {
        float total = 0.0f, sum = 0.0f;
        for (int i = 0; i < pieces; ++i) {
            const float* piece = partial + int64_t(i) * (size + 2);
            float by = expf(of_others(piece) - peak);
            total += by * of_others(piece + 1);
            sum += by * of_others(piece + 2 + column);
        }
        context[column] = narrow<T>(sum / total);
    }
    if (threadIdx.x == 0) *arrived = 0;
}

// The parameters are those of attention_plain, of one query each: t is 1, and `lengths` [b] says how many of the s keys there
// are (null: all). partial [b, h, pieces, 2 + size] is between the blocks, and so is arrived [b, h], which is zero before and
// after. Where there is no key, the context is zero.
template <class T, int W, int G, int C>
__global__ void __launch_bounds__(THREADS, 8) attention_decode(
    const T* query, int64_t query_stride, const T* key, const T* value, T* context, float* partial, int* arrived,
    const int* lengths, int size, int s, int heads, int64_t batch_stride, int64_t position_stride, float scale, const uint8_t* key_mask, int64_t key_mask_batch,
    int causal, const int* positions, int64_t positions_batch, int kind, const float* bias,
    int64_t bias_batch, const int* firsts, int side, int bidirectional) {
    constexpr int AT_ONCE = WARP_SIZE / G;  // keys that a warp reads at once
    constexpr int AHEAD = 8 / C;            // eight loads of a lane
    SHARED(float, scores, [PIECE]);
    SHARED(float, sums, [WARPS][G * W * C]);
    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE, group = lane / G, member = lane % G;
    int head = blockIdx.y, batch = blockIdx.z, from = blockIdx.x * PIECE;
    int count = lengths ? min(lengths[batch], s) : s;
    int64_t row = int64_t(batch) * heads + head;
    context += row * size;
    if (from >= count) {  // the whole block
        if (from == 0)
            for (int i = threadIdx.x; i < size; i += THREADS) context[i] = narrow<T>(0.0f);
        return;
    }
    key += batch * batch_stride + int64_t(head) * size;
    value += batch * batch_stride + int64_t(head) * size;
    float q[C][W];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        int column = (c * G + member) * W;
#pragma unroll
        for (int w = 0; w < W; ++w) q[c][w] = column < size ? widen(query[batch * query_stride + int64_t(head) * size + column + w]) : 0.0f;
    }

    // Products: those of one key are summed over its group.
    int first = WARP_SIZE * warp + group;
#pragma unroll 1
    for (int i = 0; i < WARP_SIZE; i += AHEAD * AT_ONCE) {
        float numbers[AHEAD][C][W];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
            load_row<G>(key, from + first + i + a * AT_ONCE, count, position_stride, size, member, numbers[a]);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            float product = 0.0f;
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int w = 0; w < W; ++w) product += q[c][w] * numbers[a][c][w];
#pragma unroll
            for (int by = G / 2; by > 0; by /= 2) product += __shfl_xor_sync(ALL_LANES, product, by);
            if (member == 0) scores[first + i + a * AT_ONCE] = product;
        }
    }
    __syncwarp();

    // Weights: each thread has one key.
    int number = from + int(threadIdx.x);
    float score = nothing();
    if (number < count) {
        int relative = number - (positions ? positions[batch * positions_batch] : 0);
        score = scores[threadIdx.x] * scale;
        if (kind == ALIBI) score += bias[head] * float(relative);
        if (kind == TABLE) score += bias[int64_t(bucket(relative, firsts, side, bidirectional)) * heads + head];
        if (kind == GIVEN) score += bias[batch * bias_batch + int64_t(head) * s + number];
        bool permitted = (!key_mask || key_mask[batch * key_mask_batch + number]) && (!causal || relative <= 0);
        if (!permitted) score = FORBIDDEN;
    }
    float peak = fmaxf(block_max<THREADS>(score), FORBIDDEN);  // a bias may make every score -inf
    float weight = expf(score - peak);
    float total = block_sum<THREADS>(weight);
    scores[threadIdx.x] = weight;
    __syncwarp();

    // Values: each group sums those of its keys, then the groups of a warp, then the warps are added.
    float sum[C][W] = {};
#pragma unroll 1
    for (int i = 0; i < WARP_SIZE; i += AHEAD * AT_ONCE) {
        float numbers[AHEAD][C][W];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
            load_row<G>(value, from + first + i + a * AT_ONCE, count, position_stride, size, member, numbers[a]);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int w = 0; w < W; ++w) sum[c][w] += scores[first + i + a * AT_ONCE] * numbers[a][c][w];
    }
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int w = 0; w < W; ++w) {
#pragma unroll
            for (int by = G; by < WARP_SIZE; by *= 2) sum[c][w] += __shfl_xor_sync(ALL_LANES, sum[c][w], by);
            if (group == 0) sums[warp][(c * G + member) * W + w] = sum[c][w];
        }
    __syncthreads();
    partial += row * gridDim.x * (size + 2);
    float* own = partial + int64_t(blockIdx.x) * (size + 2);
    if (threadIdx.x == 0) own[0] = peak, own[1] = total;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        float all = 0.0f;
        for (int w = 0; w < WARPS; ++w) all += sums[w][i];
        own[2 + i] = all;
    }
    merge(partial, context, arrived + row, size, (count + PIECE - 1) / PIECE);
}
