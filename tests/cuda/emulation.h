// CUDA's model of execution on the CPU, for kernels that include device.cuh: blocks one after the other, the threads of a block
// as fibers that change places at barriers, warp shuffles and matrix products of warps.
//
// A kernel with a missing barrier may still be right in one order of its threads: launch() runs it in the order it is told
// (rising, falling or shuffled), and the tests try each. Shared memory of a block is new for each, filled with bytes that are NaN in
// every type, and lies between the sanitizer's red zones. A barrier that not every thread reaches is an error that names it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Leaves one stack for another: what the C++ calling convention wants kept is pushed, and popped when the stack is taken again.
extern "C" void emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type emulation_switch, %function
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulation_switch, .-emulation_switch
)");
#else
#error "the emulation switches stacks on x86-64 and aarch64"
#endif

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 128 * 1024;

enum Order { RISING, FALLING, SHUFFLED };

struct Warp {  // one collective operation after the other; two buffers, as a lane may be one operation ahead of another's read
    uint32_t arrived = 0, wanted = 0;
    const char* where = nullptr;
    unsigned generation = 0;
    alignas(16) unsigned char values[2][WARP][64];
};

struct Copy {
    void* to;
    const void* from;
    size_t size;
    bool there;
    unsigned group;
};

struct Fiber {
    std::vector<Copy> copies;  // begun and not awaited
    unsigned groups = 0;  // of copies, closed
    void* place = nullptr;  // of its stack, while another runs
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = false;
    const unsigned* awaited = nullptr;  // it waits while this has the value `was`
    unsigned was = 0;
    void* fake_stack = nullptr;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::map<int, std::unique_ptr<unsigned char[]>> shared;
    unsigned threads = 0, living = 0, at_barrier = 0, generation = 0, current = 0;
    const char* barrier = nullptr;
    bool progress = false;
    std::string error;
    void* scheduler = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    size_t dynamic = 0;
};

inline Block* block = nullptr;
inline dim3 thread_index, block_index, block_size, grid_size;

struct Stop {};  // thrown through a fiber when the block has failed

inline void set_thread() {
    unsigned t = block->current;
    thread_index = {t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y)};
}

inline void fail(const std::string& what) {
    if (block->error.empty()) {
        char place[160];
        std::snprintf(place, sizeof place, "block (%u, %u, %u), thread (%u, %u, %u): ", block_index.x, block_index.y, block_index.z,
                      thread_index.x, thread_index.y, thread_index.z);
        block->error = place + what;
    }
    throw Stop{};
}

// Give the other threads a turn until the counter changes.
inline void await(const unsigned& counter, unsigned was) {
    if (counter != was) return;
    Fiber& fiber = block->fibers[block->current];
    fiber.awaited = &counter, fiber.was = was;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.fake_stack, block->scheduler_stack, block->scheduler_size);
#endif
    emulation_switch(&fiber.place, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &block->scheduler_stack, &block->scheduler_size);
#endif
    set_thread();
    if (!block->error.empty()) throw Stop{};
}

inline void barrier(const char* where) {
    unsigned generation = block->generation;
    if (block->at_barrier && block->barrier != where)
        fail(std::string("__syncthreads at ") + where + " while others wait at " + block->barrier);
    block->barrier = where;
    block->progress = true;
    if (++block->at_barrier == block->living) {
        block->at_barrier = 0;
        ++block->generation;
    }
    await(block->generation, generation);
}

inline unsigned lane() { return block->current % WARP; }

// Every lane of `mask` lays down a value; `read(values)` looks at all of them when they are there.
template <class T, class Read>
inline auto collective(uint32_t mask, const T& value, const char* where, Read read) {
    static_assert(sizeof(T) <= 64);
    Warp& warp = block->warps[block->current / WARP];
    uint32_t me = 1u << lane();
    if (!(mask & me)) fail(std::string(where) + ": the mask lacks the lane itself");
    if (warp.arrived && (warp.wanted != mask || warp.where != where))
        fail(std::string(where) + " while others of the warp wait at " + warp.where);
    warp.wanted = mask, warp.where = where;
    unsigned generation = warp.generation;
    std::memcpy(warp.values[generation & 1][lane()], &value, sizeof(T));
    warp.arrived |= me;
    block->progress = true;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        ++warp.generation;
    }
    await(warp.generation, generation);
    return read([&warp, generation](unsigned from) {
        T other;
        std::memcpy(&other, warp.values[generation & 1][from], sizeof(T));
        return other;
    });
}

template <class T>
inline T& shared(int key) {
    auto& memory = block->shared[key];
    if (!memory) {
        memory.reset(new unsigned char[sizeof(T)]);
        std::memset(memory.get(), 0xff, sizeof(T));
    }
    return *reinterpret_cast<T*>(memory.get());
}

template <class T>
inline T* dynamic_shared() {
    auto& memory = block->shared[-1];
    if (!memory) {
        memory.reset(new unsigned char[block->dynamic]);
        std::memset(memory.get(), 0xff, block->dynamic);
    }
    return reinterpret_cast<T*>(memory.get());
}

// cp.async: what is copied is there when it is awaited and not before, and until then its place holds what must not be read.
inline void copy_async(void* to, const void* from, size_t size, bool there) {
    if (reinterpret_cast<uintptr_t>(to) % size || (there && reinterpret_cast<uintptr_t>(from) % size))
        fail("cp.async: an address that is no multiple of " + std::to_string(size));
    std::memset(to, 0xff, size);
    block->fibers[block->current].copies.push_back({to, from, size, there, block->fibers[block->current].groups});
}

inline void close_copies() { ++block->fibers[block->current].groups; }

// All copies are there but those of the last `pending` groups; of no group that is open.
inline void finish_copies(unsigned pending) {
    Fiber& fiber = block->fibers[block->current];
    std::vector<Copy> left;
    for (auto& copy : fiber.copies) {
        if (copy.group + pending >= fiber.groups)
            left.push_back(copy);
        else if (copy.there)
            std::memcpy(copy.to, copy.from, copy.size);
        else
            std::memset(copy.to, 0, copy.size);
    }
    fiber.copies = left;
}

struct Body {
    virtual void run() = 0;
    virtual ~Body() = default;
};
inline Body* body = nullptr;

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
    set_thread();
    try {
        body->run();
    } catch (const Stop&) {
    }
    Fiber& fiber = block->fibers[block->current];
    fiber.done = true;
    block->progress = true;
    --block->living;
    if (block->at_barrier && block->at_barrier == block->living) {  // those that have ended count no more
        block->at_barrier = 0;
        ++block->generation;
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block->scheduler_stack, block->scheduler_size);
#endif
    emulation_switch(&fiber.place, block->scheduler);
}

inline void resume(unsigned thread) {
    block->current = thread;
    block->fibers[thread].awaited = nullptr;
    Fiber& fiber = block->fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block->scheduler_fake_stack, fiber.stack.get(), STACK);
#endif
    emulation_switch(&block->scheduler, fiber.place);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block->scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline std::string run_block(Order order, unsigned seed, size_t dynamic) {
    static Block reused;  // its stacks
    block = &reused;
    unsigned threads = block_size.x * block_size.y * block_size.z;
    if (block->fibers.size() < threads) block->fibers = std::vector<Fiber>(threads);
    block->warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    block->shared.clear();
    block->threads = block->living = threads;
    block->at_barrier = block->generation = 0;
    block->dynamic = dynamic;
    block->error.clear();
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = block->fibers[t];
        fiber.done = false;
        fiber.awaited = nullptr;
        fiber.copies.clear();
        fiber.groups = 0;
        // A stack as emulation_switch leaves one: room for what it pops, then where it returns to. At a function's first
        // instruction the stack is 8 bytes off a multiple of 16 on x86-64.
        auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK) & ~uintptr_t(15);
#if defined(__x86_64__)
        auto slots = reinterpret_cast<void**>(top) - 8;
        std::fill(slots, slots + 8, nullptr);
        slots[6] = reinterpret_cast<void*>(&enter);
#else
        auto slots = reinterpret_cast<void**>(top) - 20;
        std::fill(slots, slots + 20, nullptr);
        slots[11] = reinterpret_cast<void*>(&enter);
#endif
        fiber.place = slots;
    }
    std::vector<unsigned> turns(threads);
    for (unsigned t = 0; t < threads; ++t) turns[t] = order == FALLING ? threads - 1 - t : t;
    std::mt19937 random(seed);
    while (block->living) {
        block->progress = false;
        if (order == SHUFFLED) std::shuffle(turns.begin(), turns.end(), random);
        for (unsigned t : turns)
            if (auto& fiber = block->fibers[t]; !fiber.done) {
                bool waits = fiber.awaited && *fiber.awaited == fiber.was && block->error.empty();
                if (!waits) resume(t);
            }
        if (!block->progress && block->living && block->error.empty()) {
            std::string where = block->at_barrier ? block->barrier : "an operation of a warp";
            block->error = "deadlock: " + std::to_string(block->living) + " threads wait, " + std::to_string(block->at_barrier) +
                           " of them at the barrier " + where + ", the others elsewhere";
        }
    }
    block->shared.clear();
    return block->error;
}

template <class Call>
inline std::string launch(dim3 grid, dim3 threads, size_t dynamic, int order, unsigned seed, Call call) {
    struct Bound : Body {
        Call call;
        explicit Bound(Call c) : call(c) {}
        void run() override { call(); }
    } bound(call);
    body = &bound;
    grid_size = grid, block_size = threads;
    unsigned count = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < count; ++i) {
        unsigned b = order == FALLING ? count - 1 - i : i;
        block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
        std::string error = run_block(Order(order), seed + b, dynamic);
        if (!error.empty()) return error;
    }
    return "";
}

// Calls kernel(*args[0], *args[1], ...) with each argument read as the kernel's own type.
template <class... A, size_t... I>
inline void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<std::remove_reference_t<A>*>(args[I])...);
}

template <class... A>
inline int launch_kernel(void (*kernel)(A...), const unsigned* shape, size_t dynamic, int order, unsigned seed, void** args,
                         char* message, size_t room) {
    std::string error = launch({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, dynamic, order, seed,
                               [=] { apply(kernel, args, std::index_sequence_for<A...>{}); });
    std::snprintf(message, room, "%s", error.c_str());
    return error.empty() ? 0 : 1;
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
                          [&](auto at) { return at(std::min(31u, emulation::lane() + unsigned(by))); })

#define __shfl_up_sync(mask, value, by)               \
    emulation::collective(mask, value, EMULATION_HERE, \
                          [&](auto at) { return at(emulation::lane() - (emulation::lane() < unsigned(by) ? 0u : unsigned(by))); })

#define __ballot_sync(mask, predicate)                                               \
    emulation::collective(mask, int(bool(predicate)), EMULATION_HERE, [&](auto at) { \
        uint32_t bits = 0;                                                           \
        for (unsigned i = 0; i < 32; ++i) bits |= uint32_t(at(i)) << i;               \
        return bits;                                                                 \
    })
inline int __ffs(int x) { return __builtin_ffs(x); }

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
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T atomicAdd(T* p, T by) {
    T old = *p;
    *p = old + by;
    return old;
}
inline void __threadfence() {}
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
using std::max;
using std::min;

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
