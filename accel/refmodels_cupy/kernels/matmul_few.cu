// Up to 64 rows times a weight matrix by the tensor cores, and what follows it: bias, activation, gate, residual sum. For
// decoding, where reading the weights is all the time there is: one read of them serves all rows.
//
// The weights lie as [n, pitch], one output after the other. A block makes 16 or 32 outputs of all rows. Its 8 warps share out k in
// tiles of 64 bytes an output, and their sums are added in the end, in the order of the warps:
//
//                           k:  a tile
//                              +--------+--------+-- ... --+--------+--------+-- ...
//     OUTPUTS of w,            | warp 0 | warp 1 |         | warp 7 | warp 0 |           A of the products, 16 outputs each
//     ROWS of x                | warp 0 | warp 1 |         | warp 7 | warp 0 |           B, 8 rows each
//                              +--------+--------+-- ... --+--------+--------+-- ...
//
// A product 16x8x16 (of int8 numbers 16x8x32) takes of a lane l two registers of each of the outputs l/4 and l/4 + 8, and two of
// the row l/4 of x: at the columns 2(l%4) + {0, 1} and 8 more. Which k a column is does not matter if it is the same for w and x.
// So a lane reads 16 bytes of an output, one piece, and its first two registers are its part of the first product, the next two of
// the second; x is read in the same way. Nothing is to be turned, neither in shared memory nor by ldmatrix:
//
//     a tile of an output    | lane l%4 = 0: a piece | 1: a piece | 2: a piece | 3: a piece |
//     a piece                f16, bf16: 8 values, 2 products     int8: 16 values, 4 products     int4: 32 values, 8 products
//
// What must be under way to keep 4.8 TB/s of an H200 busy for the 700 ns or so that memory takes is 3.4 MB, 25 KB on each of its
// 132 multiprocessors. A block has QUEUE = 64 KB of weights under way, copied to shared memory: that takes no registers, and no
// barrier, since a lane copies what itself will read. x comes from the cache while they do. Every block reads all of x: with 32
// rows as many bytes as 32 outputs of half precision have, which is why fewer outputs are for few rows, or when there would be
// fewer blocks than multiprocessors. 4.8 TB/s are also 20 bytes a multiprocessor and cycle, which has 128 instructions of a lane
// for them: 41 int4 numbers, so that three for each would be all. Conversion takes 1.5: int8 and int4 numbers become
// halves by their bits, two at once, since 1024 + q of f16 and 128 + q of bf16 have q in their last bits. That is exact; scales
// come afterwards, in float32: those of int8 to the whole sum, those of int4 to the sum of a tile, which lies in one group.
//
// The order of a sum is that of the tiles, whatever ROWS and OUTPUTS are: a row's bits do not depend on its batch.
//
// Rows of float32 are left to matvec.cu: tensor cores would round them to 10 bits, and a batch of them is rare.
#include "device.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int QUEUE = 64 * 1024;

// How a piece of weights becomes operands beside rows of X: PARTS times 4 registers, each part beside 16 bytes of x, which `order`
// puts into the same order. PER values in an element; SUM is the type of the sums.
struct AsItIs {
    using SUM = float;
    static constexpr int PARTS = 1, PER = 1;
    __device__ static void part(const uint32_t (&piece)[4], int, uint32_t, uint32_t (&to)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = piece[i];
    }
    __device__ static void order(uint32_t (&)[4]) {}
};

template <class X, class W>
struct Operand : AsItIs {};

template <>
struct Operand<int8_t, int8_t> : AsItIs {
    using SUM = int;
};

// Two of four int8 numbers as halves: `which` says which bytes of the word, each below a byte that makes it 1024 or 128 and more.
template <class X>
__device__ uint32_t two_int8(uint32_t word, uint32_t which);
template <>
__device__ __forceinline__ uint32_t two_int8<f16>(uint32_t word, uint32_t which) {
    return difference<f16>(__byte_perm(word ^ 0x80808080, 0x64, which), 0x64806480);  // 1024 + (q + 128) - 1152
}
template <>
__device__ __forceinline__ uint32_t two_int8<bf16>(uint32_t word, uint32_t which) {
    uint32_t two = __byte_perm(word, 0x43, which);  // 128 + q's low seven bits, less 128 or, if its sign is set, 256
    return difference<bf16>(two & 0xff7fff7f, two & 0xff80ff80);
}

template <class X>
struct Operand<X, int8_t> {
    using SUM = float;
    static constexpr int PARTS = 2, PER = 1;
    __device__ static void part(const uint32_t (&piece)[4], int p, uint32_t, uint32_t (&to)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = two_int8<X>(piece[2 * p + i / 2], i % 2 ? 0x4342 : 0x4140);
    }
    __device__ static void order(uint32_t (&)[4]) {}
};

// 1024 or 128, whose last place is 1
template <class X>
constexpr float WHOLE = 1024.0f;
template <>
constexpr float WHOLE<bf16> = 128.0f;
template <class X>
constexpr uint32_t TWO_WHOLE = 0x64006400;
template <>
constexpr uint32_t TWO_WHOLE<bf16> = 0x43004300;

template <class X>
struct Operand<X, int4x2> {
    using SUM = float;
    static constexpr int PARTS = 4, PER = 2;
    // Of eight numbers the pairs 0 and 4, 1 and 5, 2 and 6, 3 and 7: q - zero, of WHOLE + (q + 8) and `less`, WHOLE + (zero + 8).
    __device__ static void part(const uint32_t (&piece)[4], int p, uint32_t less, uint32_t (&to)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to[i] = difference<X>((piece[p] >> (4 * i) & 0x000f000f) ^ (TWO_WHOLE<X> | 0x00080008), less);
    }
    __device__ static void order(uint32_t (&x)[4]) {
        uint32_t first = x[0], second = x[1];
        x[0] = __byte_perm(first, x[2], 0x5410), x[1] = __byte_perm(first, x[2], 0x7632);
        x[2] = __byte_perm(second, x[3], 0x5410), x[3] = __byte_perm(second, x[3], 0x7632);
    }
};

template <class X>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16<X>(d, a, b);
}
template <class X>
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x32(d, a, b);
}

// The sums of this warp's tiles, of the outputs from `first` on. Outputs and rows behind the last are the last again.
template <int ROWS, int OUTPUTS, class X, class W, class SUM>
__device__ __forceinline__ void products(const X* x, const W* w, const float* scale, const int8_t* zero, int64_t first, int rows,
                                         int n, int pitch, int block, int groups, uint4* queue,
                                         SUM (&sums)[OUTPUTS / 16][ROWS / 8][4]) {
    using O = Operand<X, W>;
    constexpr int EACH = 16 / sizeof(X), PIECE = O::PARTS * EACH, TILE = 4 * PIECE;  // values: of x, of a piece, of a tile
    constexpr int LINES = OUTPUTS / 8, SLOTS = QUEUE / (THREADS * LINES * 16);        // pieces of a lane; tiles under way
    constexpr bool GROUPED = O::PER == 2;
    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    int inside = lane % 4 * PIECE, tiles = (pitch + TILE - 1) / TILE;

    const W* from[LINES];
    int group[LINES];
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        int64_t output = min(first + 8 * i + lane / 4, int64_t(n - 1));
        from[i] = w + (output * pitch + inside) / O::PER;
        group[i] = int(output) * groups;
    }

    // A place in the queue: of `slot`, a piece for each line, each thread's beside the next one's.
    auto place = [queue](int slot, int i) { return queue + (slot * LINES + i) * THREADS + threadIdx.x; };
    auto begin = [&](int tile, int slot) {
        if (tile < tiles) {
            bool there = tile * TILE + inside < pitch;
#pragma unroll
            for (int i = 0; i < LINES; ++i) copy_16_async(place(slot, i), from[i] + tile * (TILE / O::PER), there);
        }
        close_copies();  // a group even if there is nothing in it: they are counted
    };
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) begin(warp + slot * WARPS, slot);

    // A part of the rows of x. Where there are registers for it, it is read before the part ahead of it is used.
    constexpr int AHEAD = ROWS > 32 || (GROUPED && ROWS > 8) ? 0 : 1;
    uint32_t values[AHEAD + 1][ROWS / 8][4] = {};
    auto read = [&](int k, int p) {
#pragma unroll
        for (int r = 0; r < ROWS / 8; ++r) {
            const X* row = x + min(8 * r + lane / 4, rows - 1) * pitch;
            uint4 four = k < pitch ? *reinterpret_cast<const uint4*>(row + k + p * EACH) : uint4{0, 0, 0, 0};
            auto& to = values[p % (AHEAD + 1)][r];
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
    };

#pragma unroll 1
    for (int tile = warp, slot = 0; tile < tiles; tile += WARPS, slot = (slot + 1) % SLOTS) {
        int k = tile * TILE + inside;
        read(k, 0);
        float by[LINES];
        uint32_t less[LINES] = {};
        if constexpr (GROUPED) {
#pragma unroll
            for (int i = 0; i < LINES; ++i) {
                int number = group[i] + min(tile * TILE / block, groups - 1);
                float whole = WHOLE<X> + 8.0f + float(zero[number]);
                by[i] = scale[number], less[i] = pair<X>(whole, whole);
            }
        }
        SUM of_group[OUTPUTS / 16][ROWS / 8][4] = {};
        auto& to = GROUPED ? of_group : sums;

        await_copies<SLOTS - 1>();
        uint32_t piece[LINES][4];
#pragma unroll
        for (int i = 0; i < LINES; ++i) {
            uint4 four = *place(slot, i);
            piece[i][0] = four.x, piece[i][1] = four.y, piece[i][2] = four.z, piece[i][3] = four.w;
        }
#pragma unroll
        for (int p = 0; p < O::PARTS; ++p) {
            if (AHEAD ? p + 1 < O::PARTS : p > 0) read(k, p + AHEAD);
            auto& b = values[p % (AHEAD + 1)];
#pragma unroll
            for (int r = 0; r < ROWS / 8; ++r) O::order(b[r]);
#pragma unroll
            for (int m = 0; m < OUTPUTS / 16; ++m) {
                uint32_t upper[4], lower[4];
                O::part(piece[2 * m], p, less[2 * m], upper);
                O::part(piece[2 * m + 1], p, less[2 * m + 1], lower);
#pragma unroll
                for (int i = 0; i < 4; i += 2)
#pragma unroll
                    for (int r = 0; r < ROWS / 8; ++r)
                        multiply<X>(to[m][r], {upper[i], lower[i], upper[i + 1], lower[i + 1]}, {b[r][i], b[r][i + 1]});
            }
        }
        if constexpr (GROUPED) {
#pragma unroll
            for (int m = 0; m < OUTPUTS / 16; ++m)
#pragma unroll
                for (int r = 0; r < ROWS / 8; ++r)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m][r][i] = __fmaf_rn(by[2 * m + i / 2], of_group[m][r][i], sums[m][r][i]);
        }
        begin(tile + SLOTS * WARPS, slot);  // its weights have been used
    }
}

// y[r, j] = residual[r, j] + activation(factor * s(w, scale) + bias[j]) * s(gate, gate_scale)
//
// where s is x[r] . w[j], over row_scale[r] * scale[j] of int8 rows, and over scale[j] of int8 weights; an int4 weight is
// (q - zero) * scale, with scale and zero [n, groups]. x, w and gate have rows of `pitch` values, whole pieces with zeros at the
// end. bias, gate and residual may be null: 0, no gate, 0. residual and y are of one type. A tile of int4 lies in one group:
// `block` is a multiple of 128, or there is one group.
template <int ROWS, int OUTPUTS, class X, class W>
__global__ void __launch_bounds__(THREADS, ROWS * Operand<X, W>::PER > 32 ? 1 : 2)
    matmul_few(const X* x, const float* row_scale, const W* w, const float* scale, const int8_t* zero, const W* gate,
               const float* gate_scale, const int8_t* gate_zero, const void* bias, int bias_type, const void* residual, void* y,
               int y_type, int rows, int n, int pitch, int block, int groups, float factor, int activation) {
    using SUM = typename Operand<X, W>::SUM;
    constexpr int RESULTS = OUTPUTS * ROWS;
    constexpr bool RESCALED = Operand<X, W>::PER == 1;
    static_assert(RESULTS * WARPS * sizeof(SUM) <= QUEUE, "the warps' sums take the place of the queue");
    DYNAMIC_SHARED(uint4, queue);
    SUM* partial = reinterpret_cast<SUM*>(queue);
    float* layer = reinterpret_cast<float*>(queue + QUEUE / 16);  // the layer's sums while the gate's are made

    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    int64_t first = int64_t(blockIdx.x) * OUTPUTS;
    Finish finish{bias, bias_type, residual, y, y_type, n, factor, activation};
#pragma unroll 1
    for (int pass = 0; pass < (gate ? 2 : 1); ++pass) {
        SUM sums[OUTPUTS / 16][ROWS / 8][4] = {};
        const float* over = pass ? gate_scale : scale;
        products<ROWS, OUTPUTS>(x, pass ? gate : w, over, pass ? gate_zero : zero, first, rows, n, pitch, block, groups, queue,
                                sums);
        __syncthreads();  // all weights of the queue have been used
#pragma unroll
        for (int m = 0; m < OUTPUTS / 16; ++m)
#pragma unroll
            for (int r = 0; r < ROWS / 8; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    partial[warp * RESULTS + ((m * (ROWS / 8) + r) * 4 + i) * WARP_SIZE + lane] = sums[m][r][i];
        __syncthreads();
#pragma unroll 1
        for (int place = threadIdx.x; place < RESULTS; place += THREADS) {
            // What the place means: register i of lane l in the product of 16 outputs m and 8 rows r.
            int l = place % 32, i = place / 32 % 4, r = place / 128 % (ROWS / 8), m = place / (16 * ROWS);
            int row = 8 * r + 2 * (l % 4) + i % 2;
            int64_t column = first + 16 * m + l / 4 + 8 * (i / 2);
            if (row >= rows || column >= n) continue;
            SUM total = 0;
#pragma unroll
            for (int from = 0; from < WARPS; ++from) total += partial[from * RESULTS + place];
            float sum = rescaled(float(total), row_scale, row, RESCALED ? over : nullptr, column);
            if (gate && !pass)
                layer[place] = sum;
            else
                finish(row, column, gate ? layer[place] : sum, gate ? sum : 1.0f);
        }
        __syncthreads();  // the gate's weights may take the place of the sums
    }
}
