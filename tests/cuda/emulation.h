// CUDA's model of execution on the CPU, for kernels that include device.cuh: the threads of a block as fibers that change places at
// barriers, warp shuffles and matrix products of warps.
//
// A kernel with a missing barrier may still be right in one order of its threads: launch() runs it in the order it is told, and the
// tests try each. Blocks come one after the other and their warps rising or falling, each as far as it comes; or three blocks run at
// once, whose warps have their turns at random. Shared memory of a block is new for each and lies between the sanitizer's red
// zones. It is filled with bytes that are NaN or huge in most types, other ones for each order: what a kernel reads before it was
// written differs too. A barrier that not every thread reaches is an error that names it.
//
// This is what kernels see of it, and few headers, since it is compiled anew with each; the rest is compiled once: emulation.cpp.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

constexpr int WARP = 32;

struct Warp {  // one collective operation after the other; two buffers, as a lane may be one operation ahead of another's read
    uint32_t arrived = 0, wanted = 0;
    const char* where = nullptr;
    unsigned generation = 0;
    alignas(16) unsigned char values[2][WARP][64];
};

extern dim3 thread_index, block_index, block_size, grid_size;

unsigned lane();
Warp& warp();

// The block has failed: this thread ends here, and the others when it is their turn. The text is printf's.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of a warp's operation this lane has laid down its value; gives the others a turn until all lanes of `mask` have.
void arrive(Warp& warp, uint32_t mask);

void barrier(const char* where);

// An atomic operation at this place, which may be what other blocks look at: they have their turns first. Not in shared memory.
void tell_other_blocks(const void* where);

// Memory of the block by its number; the launch tells the size of the dynamic one.
constexpr int DYNAMIC = -1;
void* shared_memory(int key, size_t size = 0);

void copy_async(void* to, const void* from, size_t size, bool there);
void close_copies();
void finish_copies(unsigned pending);

// Runs call(state) as every thread of every block. Gives 0, or 1 and what went wrong in `message`.
int launch(const unsigned* shape, size_t dynamic, int order, unsigned seed, void (*call)(void*), void* state, char* message,
           size_t room);

// Every lane of `mask` lays down a value; `read(at)` looks at those of all lanes when they are there.
template <class T, class Read>
inline auto collective(uint32_t mask, const T& value, const char* where, Read read) {
    static_assert(sizeof(T) <= 64);
    Warp& mine = warp();
    if (!(mask >> lane() & 1)) fail("%s: the mask lacks the lane itself", where);
    if (mine.arrived && (mine.wanted != mask || mine.where != where)) fail("%s while others of the warp wait at %s", where, mine.where);
    mine.wanted = mask, mine.where = where;
    auto& values = mine.values[mine.generation & 1];
    std::memcpy(values[lane()], &value, sizeof(T));
    arrive(mine, mask);
    return read([&](unsigned from) {
        T other;
        if (!(mask >> from & 1)) fail("%s: a value of lane %u, which is not in the mask", where, from);
        std::memcpy(&other, values[from], sizeof(T));
        return other;
    });
}

template <class T>
inline T& shared(int key) {
    return *static_cast<T*>(shared_memory(key, sizeof(T)));
}

template <class T>
inline T* dynamic_shared() {
    return static_cast<T*>(shared_memory(DYNAMIC));
}

// Calls kernel(*args[0], *args[1], ...) with each argument read as the kernel's own type.
template <class... A, size_t... I>
inline void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<std::remove_reference_t<A>*>(args[I])...);
}

template <class... A>
inline int launch_kernel(void (*kernel)(A...), const unsigned* shape, size_t dynamic, int order, unsigned seed, void** args,
                         char* message, size_t room) {
    struct Call {
        void (*kernel)(A...);
        void** args;
    } call{kernel, args};
    auto run = [](void* state) {
        auto& called = *static_cast<Call*>(state);
        apply(called.kernel, called.args, std::index_sequence_for<A...>{});
    };
    return launch(shape, dynamic, order, seed, run, &call, message, room);
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

#define EMULATION_TEXT_(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_(x)
#define EMULATION_HERE __FILE__ ":" EMULATION_TEXT(__LINE__)

#define __syncthreads() emulation::barrier(EMULATION_HERE)
#define __syncwarp(...) \
    emulation::collective(0xffffffffu, 0, EMULATION_HERE, [](auto) { return 0; })
#define __shfl_xor_sync(mask, value, by)              \
    emulation::collective(mask, value, EMULATION_HERE, \
                          [&](auto at) { return at((emulation::lane() ^ unsigned(by)) & 31u); })
#define __shfl_sync(mask, value, from) \
    emulation::collective(mask, value, EMULATION_HERE, [&](auto at) { return at(unsigned(from) & 31u); })
#define __shfl_down_sync(mask, value, by)             \
    emulation::collective(mask, value, EMULATION_HERE, \
                          [&](auto at) { return at(emulation::lane() + (emulation::lane() + unsigned(by) < 32u ? unsigned(by) : 0u)); })
#define __shfl_up_sync(mask, value, by)               \
    emulation::collective(mask, value, EMULATION_HERE, \
                          [&](auto at) { return at(emulation::lane() - (emulation::lane() < unsigned(by) ? 0u : unsigned(by))); })
#define __ballot_sync(mask, predicate)                                               \
    emulation::collective(mask, int(bool(predicate)), EMULATION_HERE, [&](auto at) { \
        uint32_t bits = 0;                                                           \
        for (unsigned i = 0; i < 32; ++i)                                             \
            if (uint32_t(mask) >> i & 1) bits |= uint32_t(at(i)) << i;                \
        return bits;                                                                 \
    })

#define SHARED(type, name, ...) auto& name = emulation::shared<type __VA_ARGS__>(__COUNTER__)
#define DYNAMIC_SHARED(type, name) type* name = emulation::dynamic_shared<type>()

// -- numbers -----------------------------------------------------------------------------------------------------------------

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

// Bytes of two words, x's numbered from 0 and y's from 4: the lowest nibble of `which` says what the lowest byte is to be.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t which) {
    uint64_t both = x | uint64_t(y) << 32;
    uint32_t chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= uint32_t(both >> (8 * (which >> (4 * i) & 7)) & 0xff) << (8 * i);
    return chosen;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T atomicAdd(T* p, T by) {
    T old = *p;
    *p = old + by;
    emulation::tell_other_blocks(p);
    return old;
}
inline void __threadfence() {}  // what a thread writes is there for all at once
inline float __int_as_float(int x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline int __float_as_int(float x) {
    int y;
    std::memcpy(&y, &x, 4);
    return y;
}

// mma.sync.aligned.m16n8kK.row.col, by the layouts of PTX ISA, sections on m16n8k16 of halves and m16n8k32 of int8. PER numbers share
// a register: lane l holds of A the rows l/4 and l/4 + 8, columns PER(l%4) + {0, 1, ..} and 4 PER more; of B the column l/4, rows as
// A's columns; of C and D rows l/4 and l/4 + 8, columns 2(l%4) + {0, 1}. `number(register, e)` is the e-th number in it.
template <int PER, class Sum, class Number>
inline void emulated_mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number number) {
    struct Part {
        uint32_t a[4], b[2];
    } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    emulation::collective(0xffffffffu, mine, "mma.sync", [&](auto at) {
        unsigned l = emulation::lane();
        for (int i = 0; i < 4; ++i) {
            unsigned row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
            for (int half = 0; half < 2; ++half)
                for (int q = 0; q < 4; ++q) {
                    uint32_t x = at((row % 8) * 4 + q).a[row / 8 + 2 * half], y = at(column * 4 + q).b[half];
                    for (int e = 0; e < PER; ++e) d[i] += number(x, e) * number(y, e);
                }
        }
        return 0;
    });
}

// ldmatrix.sync.aligned.m8n8.x4: lane l names row l % 8 of matrix l / 8, and is given two numbers of each matrix.
inline void emulated_ldmatrix(uint32_t (&to)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix: a row that begins at no multiple of 16 bytes");
    emulation::collective(0xffffffffu, row, transposed ? "ldmatrix.trans" : "ldmatrix", [&](auto at) {
        unsigned l = emulation::lane(), one = l / 4, two = 2 * (l % 4);
        for (unsigned i = 0; i < 4; ++i) {
            uint16_t halves[2];
            for (unsigned e = 0; e < 2; ++e) {
                unsigned of_row = transposed ? two + e : one, column = transposed ? one : two + e;
                halves[e] = static_cast<const uint16_t*>(at(8 * i + of_row))[column];
            }
            to[i] = uint32_t(halves[0]) | uint32_t(halves[1]) << 16;
        }
        return 0;
    });
}
