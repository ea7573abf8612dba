// The next token of each row of scores: the best one, or one drawn from the best. Nothing is sorted.
//
// A token's place is an integer: its score, as one that falls where the score rises, and behind that its id. So the tokens of a
// row from the best to the worst, equal ones by id, have rising places, all different. Each choice is then the same search: the
// first place at which the running sum of an amount exceeds a goal.
//
//     TOP_K    the amount is 1         the goal top_k - 1               the last place that is kept
//     TOP_P    a token's weight        top_p * the sum of all           the last place that is kept of those
//     DRAW     the same, from min_p    uniform * the sum of all         the token
//
// A weight is exp((score - best score) / temperature) as an integer, in units of 2**-44 for 2**18 tokens and finer for fewer: its
// sums are exact, and the same in any order.
// A search finds a place by its digits of 10 bits, the highest first, each by a launch over all tokens and the begin of the next:
//
//     launch of a digit     | part 0: 2048 tokens | part 1 | ... |    blockIdx.x, a block each; blockIdx.y is the row
//     sums[1024]            the amounts of the tokens whose place begins with the digits found so far, by their next digit
//     the launch after it   each block adds these up until they exceed the goal: there is the digit, and the rest of the goal
//
// Blocks tell each other nothing but by the launch that ends, so that none ever waits. What one launch leaves to the next is in
// the row's scratch memory: three arrays of sums (one is read, one added to, one emptied for the next) and two searches.
#include "device.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP_SIZE;
constexpr int TOKENS = 8, PART = THREADS * TOKENS;
constexpr int DIGIT = 10, BINS = 1 << DIGIT, EACH = BINS / THREADS;

__device__ __forceinline__ int parts_of(int v) {
    return (v + PART - 1) / PART;
}

enum Choice { TOP_K, TOP_P, DRAW, NONE };

struct Search {
    uint64_t found;  // the digits so far
    uint64_t goal;   // what the running sum must still exceed behind the places before those digits
    uint64_t last;   // the last place that earlier searches keep
};

// A row's scratch memory; `best` has the best place of each part.
struct Scratch {
    uint64_t (*sums)[BINS];  // three; an array of pointers would lie in memory, for its numbers are known at the launch alone
    Search* searches;
    uint64_t* best;
};

__device__ __forceinline__ Scratch scratch_of(uint64_t* memory, int row, int v) {
    constexpr int SEARCHES = 2 * sizeof(Search) / sizeof(uint64_t);
    memory += int64_t(row) * (3 * BINS + SEARCHES + parts_of(v));
    return {reinterpret_cast<uint64_t (*)[BINS]>(memory),
            reinterpret_cast<Search*>(memory + 3 * BINS),
            memory + 3 * BINS + SEARCHES};
}

// Bits of a score that its order depends on: as float32, half precision has zeros or ones in the others.
template <class T>
constexpr int SCORE_BITS = 32;
template <>
constexpr int SCORE_BITS<f16> = 19;
template <>
constexpr int SCORE_BITS<bf16> = 16;

// NaN is the best score for `nan_first`, otherwise the worst.
template <class T>
__device__ __forceinline__ uint64_t place_of(T score, int id, int id_bits, bool nan_first) {
    float x = widen(score);
    uint32_t bits = x == 0.0f ? 0u : uint32_t(__float_as_int(x));  // -0 is 0
    uint32_t order = bits >> 31 ? bits : bits ^ 0x7fffffffu;
    if (x != x) order = nan_first ? 0u : ~0u;
    return uint64_t(order >> (32 - SCORE_BITS<T>)) << id_bits | uint64_t(id);
}

__device__ __forceinline__ int64_t id_of(uint64_t place, int id_bits) {
    return int64_t(place & ((uint64_t(1) << id_bits) - 1));
}

// The least x of a block, for every thread.
__device__ __forceinline__ uint64_t block_min(uint64_t x) {
    SHARED(uint64_t, partial, [WARPS]);
    for (int by = 16; by > 0; by /= 2) x = min(x, __shfl_xor_sync(ALL_LANES, x, by));
    if (threadIdx.x % WARP_SIZE == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    for (int i = 0; i < WARPS; ++i) x = min(x, partial[i]);
    return x;
}

// The sum of x over the threads before this one, and over all of them.
__device__ __forceinline__ uint64_t sum_before(uint64_t x, uint64_t& total) {
    SHARED(uint64_t, partial, [WARPS]);
    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    uint64_t through = x;
    for (int by = 1; by < WARP_SIZE; by *= 2) {
        uint64_t earlier = __shfl_up_sync(ALL_LANES, through, by);
        if (lane >= by) through += earlier;
    }
    if (lane == WARP_SIZE - 1) partial[warp] = through;
    __syncthreads();
    uint64_t before = through - x;
    total = 0;
    for (int i = 0; i < WARPS; ++i) {
        if (i < warp) before += partial[i];
        total += partial[i];
    }
    return before;
}

// The best place of each part of a row. Of the scratch memory's sums, those that the first search begins with are emptied.
template <class T>
__global__ void __launch_bounds__(THREADS) best_of_parts(const T* logits, uint64_t* memory, int v, int id_bits, int nan_first) {
    Scratch scratch = scratch_of(memory, blockIdx.y, v);
    uint64_t best = ~uint64_t(0);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        int id = blockIdx.x * PART + t * THREADS + threadIdx.x;
        if (id < v) best = min(best, place_of(logits[int64_t(blockIdx.y) * v + id], id, id_bits, nan_first));
    }
    best = block_min(best);
    if (threadIdx.x == 0) scratch.best[blockIdx.x] = best;
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < BINS; i += THREADS) scratch.sums[0][i] = 0;
}

__device__ __forceinline__ uint64_t best_of_row(const Scratch& scratch, int v) {
    uint64_t least = ~uint64_t(0);
    for (int i = threadIdx.x; i < parts_of(v); i += THREADS) least = min(least, scratch.best[i]);
    return block_min(least);
}

// tokens[row] = the token at the best place
__global__ void __launch_bounds__(THREADS) best_of_rows(uint64_t* memory, int64_t* tokens, int v, int id_bits) {
    uint64_t best = best_of_row(scratch_of(memory, blockIdx.x, v), v);
    if (threadIdx.x == 0) tokens[blockIdx.x] = id_of(best, id_bits);
}

// The next digit of a place and the rest of the goal, out of the sums for each digit. The first digit's add up to all there is,
// so that the goal is set there: count - 1 or a fraction of all, but less than all, which the last place of some amount exceeds.
__device__ __forceinline__ void find_digit(Search& search, const uint64_t* sums, bool first, bool counted, int64_t count,
                                           double fraction) {
    SHARED(Search, next, [1]);
    uint64_t mine[EACH], sum = 0, total;
    for (int i = 0; i < EACH; ++i) sum += mine[i] = sums[threadIdx.x * EACH + i];
    uint64_t before = sum_before(sum, total);
    if (first) {
        double goal = counted ? double(count - 1) : fraction * double(total);
        search.goal = goal < double(total - 1) ? uint64_t(goal > 0.0 ? goal : 0.0) : total - 1;
    }
    for (int i = 0; i < EACH; before += mine[i], ++i)
        if (before <= search.goal && search.goal < before + mine[i])
            next[0] = {search.found << DIGIT | uint64_t(threadIdx.x * EACH + i), search.goal - before, search.last};
    __syncthreads();
    search = next[0];
}

// sum += amount for a sum in shared memory in two halves: 32 bits are added in one instruction, 64 bits by a loop that tries.
__device__ __forceinline__ void add(uint32_t* low, uint32_t* high, uint64_t amount) {
    uint32_t lower = uint32_t(amount), before = atomicAdd(low, lower);
    uint32_t upper = uint32_t(amount >> 32) + (before + lower < before ? 1u : 0u);
    if (upper) atomicAdd(high, upper);
}

// Launch `turn` of the searches for a row's token: the sums of digit `level` of `levels` for this choice, or for NONE the end.
//
// At level 0 the launch before was the last of another search, or there was none (turn 0). uniform is [count, b], of which row
// `step` is used, or row 0 without one; top_k, top_p, min_p may be null. A row with temperature 0 is given the best token.
template <class T>
__global__ void __launch_bounds__(THREADS)
    search(const T* logits, const double* uniform, const int* step, const double* temperature, const int64_t* top_k,
           const double* top_p, const double* min_p, int64_t* tokens, uint64_t* memory, int v, int id_bits, int turn, int choice,
           int level, int levels) {
    SHARED(uint32_t, low, [BINS]);
    SHARED(uint32_t, high, [BINS]);
    int row = blockIdx.y;
    Scratch scratch = scratch_of(memory, row, v);
    Search now = {0, 0, ~uint64_t(0)};
    if (turn > 0) {
        now = scratch.searches[(turn - 1) % 2];
        double fraction = choice == TOP_P ? top_p[row] : uniform[int64_t(step ? *step : 0) * gridDim.y + row];
        find_digit(now, scratch.sums[(turn - 1) % 3], level == 1, choice == TOP_K, choice == TOP_K ? top_k[row] : 0, fraction);
        if (level == 0) now = {0, 0, now.found};
    }
    if (choice == NONE) {
        if (threadIdx.x == 0) tokens[row] = id_of(now.last, id_bits);
        return;
    }

    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        low[i] = high[i] = 0;
        if (blockIdx.x == 0) scratch.sums[(turn + 1) % 3][i] = 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) scratch.searches[turn % 2] = now;
    uint64_t best = best_of_row(scratch, v);  // its barrier is also that of the sums just emptied
    float largest = widen(logits[int64_t(row) * v + id_of(best, id_bits)]);
    double divisor = temperature ? temperature[row] : 1.0, least = choice == DRAW && min_p ? min(min_p[row], 1.0) : 0.0;
    double one = double(uint64_t(1) << min(52, 62 - id_bits));  // the sum of a row's weights has at most 63 bits
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        int id = blockIdx.x * PART + t * THREADS + threadIdx.x;
        if (id >= v) continue;
        T score = logits[int64_t(row) * v + id];
        uint64_t place = place_of(score, id, id_bits, false);
        if (place > now.last || place >> (DIGIT * (levels - level)) != now.found) continue;
        uint64_t amount = 1;
        if (choice != TOP_K) {
            double relative = exp(double(widen(score) - largest) / divisor);
            if (place == best) relative = 1.0;  // also if its score is infinite, or the temperature 0
            amount = relative >= least ? uint64_t(relative * one + 0.5) : 0;  // NaN weighs nothing
        }
        int digit = int(place >> (DIGIT * (levels - 1 - level)) & (BINS - 1));
        if (amount) add(&low[digit], &high[digit], amount);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (low[i] | high[i]) atomicAdd(&scratch.sums[turn % 3][i], uint64_t(high[i]) << 32 | low[i]);
}
