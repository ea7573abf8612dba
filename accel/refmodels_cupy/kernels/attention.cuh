// What the attention kernels have in common: which keys a query may look at, and what its position adds to a score.
#pragma once
#include "device.cuh"

// What is added to the score of (query, key) before the softmax, by the distance key - query but for a given array.
enum Bias {
    NO_BIAS,
    ALIBI,  // slope of the head times the distance
    TABLE,  // T5: a learned number for each head and bucket of distances
    GIVEN,  // an array
};

// A forbidden key has this score, which is below all that occur and, unlike -inf, may be subtracted from itself. So a row
// without a permitted key gives every key exp(FORBIDDEN - FORBIDDEN) = 1: the mean of all. Once a key is permitted the largest
// score is that of a permitted key, what was summed before is multiplied by exp(FORBIDDEN - largest), which is exactly 0, and
// so is every later forbidden key's weight: they are left out, not lowered. A key that does not exist (behind the last one,
// in the last tile) has -inf, whose weight is 0 in either case.
constexpr float FORBIDDEN = -1e30f;

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float nothing() { return __int_as_float(int(0xff800000u)); }  // -inf

// T5's bucket of the distance key - query. firsts[i] is the smallest distance of bucket i, of `side` buckets: of all, or of
// those on each side of the query. Integers alone decide.
__device__ __forceinline__ int bucket(int relative, const int* firsts, int side, bool bidirectional) {
    int distance = bidirectional ? (relative < 0 ? -relative : relative) : max(-relative, 0);
    int found = 0;
    for (int i = 1; i < side; ++i)
        if (firsts[i] <= distance) found = i;
    return found + (bidirectional && relative > 0 ? side : 0);
}

// T5's table by distance, for one head: place reach + r has factor * table[bucket(r), head] for the distances r from -reach to
// reach, the smallest distance of the last bucket. What is further away is as far as that. A barrier is to follow.
__device__ __forceinline__ void fill_by_distance(float* by_distance, int reach, const float* table, const int* firsts, int side,
                                                 bool bidirectional, int heads, int head, float factor) {
    for (int i = threadIdx.x; i <= 2 * reach; i += blockDim.x)
        by_distance[i] = factor * table[int64_t(bucket(i - reach, firsts, side, bidirectional)) * heads + head];
}

// How many keys a block of queries has to visit, of s, when a query may not look behind its own position: up to the last of
// its positions. But all, if one of its queries is permitted no key: none of the real keys is before it. All lanes of a
// warp call this; the positions are those of `count` queries.
__device__ __forceinline__ int visited_keys(const int* positions, int count, const uint8_t* key_mask, int s) {
    int lane = threadIdx.x % WARP_SIZE;
    int first = positions[0], last = first;
    for (int i = lane; i < count; i += WARP_SIZE) first = min(first, positions[i]), last = max(last, positions[i]);
    for (int by = 16; by > 0; by /= 2) {
        first = min(first, __shfl_xor_sync(ALL_LANES, first, by));
        last = max(last, __shfl_xor_sync(ALL_LANES, last, by));
    }
    int real = 0;
    if (key_mask) {
        real = s;
        for (int from = 0; from < s; from += WARP_SIZE) {
            int key = from + lane;
            uint32_t found = __ballot_sync(ALL_LANES, key < s && key_mask[key]);
            if (found) {
                real = from + __ffs(int(found)) - 1;
                break;
            }
        }
    }
    return first < real ? s : min(s, last + 1);
}
