// Rows of a table by their numbers, and rows of a table of positions added to them in the same pass.
//
//     block 0   row ids[0]   | thread 0 | thread 1 | ... | thread 127 | thread 0 | ...      each thread strides over the row
//     block 1   row ids[1]
//
// An id that is no row of the table gives a row of NaN: nothing outside the table is read.
#include "device.cuh"

constexpr int THREADS = 128;

// Value j of a row as it is stored; of int8 and int4 the integer.
template <class W>
__device__ __forceinline__ float entry(const W* row, int j) {
    return widen(row[j]);
}
template <>
__device__ __forceinline__ float entry<int8_t>(const int8_t* row, int j) {
    return float(row[j]);
}
template <>
__device__ __forceinline__ float entry<int4x2>(const int4x2* row, int j) {
    return float(int8_t(j % 2 ? row[j / 2].pair : row[j / 2].pair << 4) >> 4);
}

template <class W>
constexpr bool IS_INT8 = false;
template <>
constexpr bool IS_INT8<int8_t> = true;

template <class W>
constexpr bool IS_INT4 = false;
template <>
constexpr bool IS_INT4<int4x2> = true;

// y[i] = table[ids[i]] (+ positions[position_ids[i]])
//
// Of int8 tables a value is q / scale[row], of int4 tables (q - zero[row, g]) * scale[row, g] with groups of `block`. With
// positions (of the type that `positions_type` says) the row is rounded to y's type before they are added, as by the two ops.
// A plain table's form has none of that arithmetic: a division is a call, for which registers would be spilled.
template <class I, class W>
__global__ void __launch_bounds__(THREADS)
    embedding(const I* ids, const W* table, const float* scale, const int8_t* zero, const I* position_ids, const void* positions,
              int positions_type, int positions_count, void* y, int y_type, int v, int n, int pitch, int block) {
    int64_t i = blockIdx.x;
    int64_t id = int64_t(ids[i]), position = position_ids ? int64_t(position_ids[i]) : 0;
    bool known = id >= 0 && id < v && (!position_ids || (position >= 0 && position < positions_count));
    const W* row = table + id * pitch / (IS_INT4<W> ? 2 : 1);
    for (int j = threadIdx.x; j < n; j += THREADS) {
        float value = __int_as_float(0x7fc00000);
        if (known) {
            value = entry(row, j);
            if constexpr (IS_INT8<W>) value /= scale[id];
            if constexpr (IS_INT4<W>) {
                int64_t group = id * ((n + block - 1) / block) + j / block;
                value = (value - float(zero[group])) * scale[group];
            }
            if (position_ids) value = rounded(y_type, value) + stored(positions, positions_type, position * n + j);
        }
        store(y, y_type, i * n + j, value);
    }
}
