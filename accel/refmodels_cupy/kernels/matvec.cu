// A few rows times a weight matrix, and what follows it: bias, activation, gate, residual sum. For what matmul_few.cu does not
// take: rows of float32, and int4 weights in small groups.
//
// The weights lie as [n, pitch], one output after the other, filled up with zeros to whole pieces (weights.py turns them when a
// model is loaded). A warp makes OUTPUTS outputs for ROWS rows of x; a lane reads a piece of each output's weights at a time:
//
//     w[j, :]       | lane 0: a piece | lane 1: a piece | ... | lane 31 | lane 0 | ...
//     w[j + 1, :]   | lane 0          | lane 1          | ... | lane 31 | lane 0 | ...
//     x[r, :]       the same values of each row, from the cache; 8 of them serve all OUTPUTS
//
//     a piece       float32: 8 values     f16, bf16: 8     int8: 16     int4: 32, two in a byte     (16 bytes, or 32 of float32)
//
// Each lane sums its own products from left to right, each rounded once (fma), then the 32 sums are added as a tree: one order,
// which no number of rows or outputs changes, so a row's bits do not depend on its batch. Of int4 it sums eight at a time, which
// have one scale.
//
// To keep 4.8 TB/s of an H200 busy for the 700 ns or so that memory takes, each of its 132 multiprocessors has to have 25 KB under
// way: a lane asks for 64 bytes before it uses the first, a warp for 2 KB, and 16 warps are enough. Four warps a block, so that 768
// outputs are already more blocks than multiprocessors. The same 4.8 TB/s are 20 bytes a multiprocessor and cycle, which has 128
// instructions of a lane for them: 5 float32 weights, 10 of half precision, 20 of int8, 41 of int4. An instruction that makes an
// integer a float is done 16 times a cycle on some GPUs, too seldom. So the integer becomes the last bits of 2**23 + q,
// whose last place is 1, and 2**23 is taken away: int8 weights take three instructions with the product and keep up, int4
// weights four and reach three quarters.
#include "device.cuh"

constexpr int WARPS = 4;

// What a lane reads at once of a row of weights: WORDS words in memory, PARTS times 8 values; PER values in an element. int4 numbers
// come without their zero: `less` is 2**23 + 8 + zero.
template <class W>
struct Piece {  // f16, bf16
    static constexpr int WORDS = 4, PARTS = 1, PER = 1;
    __device__ static void part(const uint32_t (&words)[WORDS], int, float, float (&out)[8]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) out[e] = widen(W{uint16_t(words[e / 2] >> (16 * (e % 2)))});
    }
};
template <>
struct Piece<float> {
    static constexpr int WORDS = 8, PARTS = 1, PER = 1;
    __device__ static void part(const uint32_t (&words)[WORDS], int, float, float (&out)[8]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) out[e] = __int_as_float(int(words[e]));
    }
};
template <>
struct Piece<int8_t> {
    static constexpr int WORDS = 4, PARTS = 2, PER = 1;
    __device__ static void part(const uint32_t (&words)[WORDS], int p, float, float (&out)[8]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            uint32_t raised = __byte_perm(words[2 * p + e / 4] ^ 0x80808080, 0x4b000000, 0x7650 + e % 4);  // 2**23 + (q + 128)
            out[e] = __int_as_float(int(raised)) - 8388736.0f;
        }
    }
};
template <>
struct Piece<int4x2> {
    static constexpr int WORDS = 4, PARTS = 4, PER = 2;
    __device__ static void part(const uint32_t (&words)[WORDS], int p, float less, float (&out)[8]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) out[e] = __int_as_float(int((words[p] >> (4 * e) & 15) ^ 0x4b000008)) - less;
    }
};

// The sums of products of outputs j, j + 1, ... with rows `first`, first + 1, ... of x, in every lane. Rows and outputs behind the
// last are the last again. Of int4 a piece of 8 values lies in one group of `block`.
template <int ROWS, int OUTPUTS, class X, class W>
__device__ __forceinline__ void products(const X* x, int first, int rows, const W* w, const float* scale, const int8_t* zero,
                                         int64_t j, int n, int pitch, int block, int groups, float (&sums)[OUTPUTS][ROWS]) {
    using P = Piece<W>;
    constexpr int VALUES = 8 * P::PARTS, STRIDE = VALUES * WARP_SIZE;
    constexpr int AHEAD = P::WORDS * OUTPUTS < 16 ? 16 / (P::WORDS * OUTPUTS) : 1;
    constexpr bool GROUPED = P::PER == 2;
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[o][r] = 0.0f;
#pragma unroll 1
    for (int begin = VALUES * int(threadIdx.x % WARP_SIZE); begin < pitch; begin += AHEAD * STRIDE) {
        uint32_t words[AHEAD][OUTPUTS][P::WORDS];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
                if (begin + a * STRIDE >= pitch) break;
                auto piece = reinterpret_cast<const uint4*>(w + (min(j + o, int64_t(n - 1)) * pitch + begin + a * STRIDE) / P::PER);
#pragma unroll
                for (int q = 0; q < P::WORDS; q += 4) {
                    uint4 four = streamed(piece + q / 4);
                    words[a][o][q] = four.x, words[a][o][q + 1] = four.y, words[a][o][q + 2] = four.z, words[a][o][q + 3] = four.w;
                }
            }
#pragma unroll
        for (int part = 0; part < AHEAD * P::PARTS; ++part) {
            int a = part / P::PARTS, p = part % P::PARTS, i = begin + a * STRIDE + 8 * p;
            if (begin + a * STRIDE >= pitch) break;
            float weights[OUTPUTS][8], by[OUTPUTS];
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
                float less = 0.0f;
                if constexpr (GROUPED) {
                    int64_t group = min(j + o, int64_t(n - 1)) * groups + min(i / block, groups - 1);
                    less = 8388616.0f + float(zero[group]), by[o] = scale[group];
                }
                P::part(words[a][o], p, less, weights[o]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float values[8];
                eight(x + int64_t(min(first + r, rows - 1)) * pitch + i, values);
#pragma unroll
                for (int o = 0; o < OUTPUTS; ++o) {
                    float sum = GROUPED ? 0.0f : sums[o][r];
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum = __fmaf_rn(values[e], weights[o][e], sum);
                    sums[o][r] = GROUPED ? __fmaf_rn(by[o], sum, sums[o][r]) : sum;
                }
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[o][r] = warp_sum(sums[o][r]);
}

// y[r, j] = residual[r, j] + activation(factor * (x[r] . w[j]) / scale[j] + bias[j]) * (x[r] . gate[j] / gate_scale[j])
//
// x and w have rows of `pitch` values, whole pieces with zeros at the end. bias, gate and residual may be null: 0, no gate, 0. Of
// int8 weights scale [n] is what they are divided by; of int4 scale and zero are [n, groups], and a weight is (q - zero) * scale.
// residual and y are of one type.
template <int ROWS, int OUTPUTS, class X, class W>
__global__ void __launch_bounds__(WARPS * WARP_SIZE, ROWS > 1 ? 2 : 4)
    matvec(const X* x, const W* w, const float* scale, const int8_t* zero, const W* gate, const float* gate_scale,
           const int8_t* gate_zero, const void* bias, int bias_type, const void* residual, void* y, int y_type, int rows, int n,
           int pitch, int block, int groups, float factor, int activation) {
    // Blocks that read the same weights for other rows come one after the other.
    int parts = (rows + ROWS - 1) / ROWS, first = int(blockIdx.x % parts) * ROWS, lane = threadIdx.x % WARP_SIZE;
    int64_t j = (int64_t(blockIdx.x / parts) * WARPS + threadIdx.x / WARP_SIZE) * OUTPUTS;
    if (j >= n) return;  // a whole warp: its other lanes have the same j
    // Lane l finishes the result of output l / ROWS and row l % ROWS.
    int64_t column = j + lane / ROWS;
    int row = first + lane % ROWS;
    bool mine = lane < ROWS * OUTPUTS && column < n && row < rows;
    float layer = 0.0f, gated = 1.0f;
#pragma unroll 1
    for (int pass = 0; pass < (gate ? 2 : 1); ++pass) {
        float sums[OUTPUTS][ROWS], sum = 0.0f;
        const float* over = pass ? gate_scale : scale;
        products<ROWS, OUTPUTS>(x, first, rows, pass ? gate : w, over, pass ? gate_zero : zero, j, n, pitch, block, groups, sums);
#pragma unroll
        for (int l = 0; l < ROWS * OUTPUTS; ++l) sum = lane == l ? sums[l / ROWS][l % ROWS] : sum;
        if (!mine) continue;
        sum = rescaled(sum, nullptr, row, Piece<W>::PARTS == 2 ? over : nullptr, column);
        (pass ? gated : layer) = sum;
    }
    Finish finish{bias, bias_type, residual, y, y_type, n, factor, activation};
    if (mine) finish(row, column, layer, gated);
}
