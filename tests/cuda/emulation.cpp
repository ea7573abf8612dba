// What emulation.h promises: fibers, barriers, shared memory, copies, and the order in which threads have their turns.
#include "emulation.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

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

constexpr size_t STACK = 128 * 1024;
constexpr size_t MOST_SHARED = 99 * 1024;

enum Order { RISING, FALLING, SHUFFLED };

constexpr unsigned char FILLED[] = {0xff, 0x55, 0xaa};  // shared memory and places of copies before they are written, by order

struct Copy {
    void* to;
    const void* from;
    size_t size;
    bool there;
    unsigned group;
};

struct Fiber {
    std::vector<Copy> copies;  // begun and not awaited
    unsigned groups = 0;       // of copies, closed
    void* place = nullptr;     // of its stack, while another runs
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = false;
    const unsigned* awaited = nullptr;  // it waits while this has the value `was`
    unsigned was = 0;
    void* fake_stack = nullptr;
};

struct Shared {
    std::unique_ptr<unsigned char[]> bytes;
    size_t size = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::map<int, Shared> shared;
    unsigned living = 0, at_barrier = 0, generation = 0, current = 0;
    const char* barrier = nullptr;
    bool progress = false, failed = false;
    char error[1000] = "";
    Order order = RISING;
    size_t dynamic = 0;
    void* scheduler = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
};

dim3 thread_index, block_index, block_size, grid_size;

static Block block;  // one after the other, on the same stacks
static void (*call_thread)(void*);
static void* call_state;

struct Stop {};  // thrown through a fiber when the block has failed

static Fiber& fiber() { return block.fibers[block.current]; }

unsigned lane() { return block.current % WARP; }

Warp& warp() { return block.warps[block.current / WARP]; }

static void set_thread() {
    unsigned t = block.current;
    thread_index = {t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y)};
}

void fail(const char* format, ...) {
    if (!block.failed) {
        block.failed = true;
        int used = std::snprintf(block.error, sizeof block.error, "block (%u, %u, %u), thread (%u, %u, %u): ", block_index.x,
                                 block_index.y, block_index.z, thread_index.x, thread_index.y, thread_index.z);
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(block.error + used, sizeof block.error - size_t(used), format, arguments);
        va_end(arguments);
    }
    throw Stop{};
}

// Give the other threads a turn until the counter changes.
static void await(const unsigned& counter, unsigned was) {
    if (counter != was) return;
    Fiber& mine = fiber();
    mine.awaited = &counter, mine.was = was;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&mine.fake_stack, block.scheduler_stack, block.scheduler_size);
#endif
    emulation_switch(&mine.place, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine.fake_stack, &block.scheduler_stack, &block.scheduler_size);
#endif
    set_thread();
    if (block.failed) throw Stop{};
}

static void open_barrier() {
    block.at_barrier = 0;
    ++block.generation;
}

void barrier(const char* where) {
    unsigned generation = block.generation;
    if (block.at_barrier && block.barrier != where) fail("__syncthreads at %s while others wait at %s", where, block.barrier);
    block.barrier = where;
    block.progress = true;
    if (++block.at_barrier == block.living) open_barrier();
    await(block.generation, generation);
}

void arrive(Warp& warp, uint32_t mask) {
    unsigned generation = warp.generation;
    warp.arrived |= 1u << lane();
    block.progress = true;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        ++warp.generation;
    }
    await(warp.generation, generation);
}

void* shared_memory(int key, size_t size) {
    Shared& memory = block.shared[key];
    if (key == DYNAMIC) size = block.dynamic;
    if (!memory.bytes) {
        memory.bytes.reset(new unsigned char[size]);
        memory.size = size;
        std::memset(memory.bytes.get(), FILLED[block.order], size);
    }
    size_t all = block.shared.count(DYNAMIC) ? 0 : block.dynamic;
    for (auto& [_, one] : block.shared) all += one.size;
    if (all > MOST_SHARED) fail("%zu bytes of shared memory, and a block has %zu on some GPUs", all, MOST_SHARED);
    if (memory.size != size) fail("shared memory of %zu bytes that has %zu in another instance of its function", size, memory.size);
    return memory.bytes.get();
}

// cp.async: what is copied is there when it is awaited and not before, and until then its place holds what must not be read.
void copy_async(void* to, const void* from, size_t size, bool there) {
    if (reinterpret_cast<uintptr_t>(to) % size || (there && reinterpret_cast<uintptr_t>(from) % size))
        fail("cp.async: an address that is no multiple of %zu", size);
    std::memset(to, FILLED[block.order], size);
    fiber().copies.push_back({to, from, size, there, fiber().groups});
}

void close_copies() { ++fiber().groups; }

// All copies are there but those of the last `pending` groups; of no group that is open.
void finish_copies(unsigned pending) {
    std::vector<Copy> left;
    for (auto& copy : fiber().copies) {
        if (copy.group + pending >= fiber().groups)
            left.push_back(copy);
        else if (copy.there)
            std::memcpy(copy.to, copy.from, copy.size);
        else
            std::memset(copy.to, 0, copy.size);
    }
    fiber().copies = left;
}

// What a fiber begins with, and ends in: another's turn.
static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
    set_thread();
    try {
        call_thread(call_state);
    } catch (const Stop&) {
    }
    fiber().done = true;
    block.progress = true;
    --block.living;
    if (block.at_barrier && block.at_barrier == block.living) open_barrier();  // those that have ended count no more
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block.scheduler_stack, block.scheduler_size);
#endif
    emulation_switch(&fiber().place, block.scheduler);
}

static void resume(unsigned thread) {
    block.current = thread;
    fiber().awaited = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber().stack.get(), STACK);
#endif
    emulation_switch(&block.scheduler, fiber().place);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

static void prepare(Fiber& fiber) {
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

static void run_block(unsigned seed) {
    unsigned threads = block_size.x * block_size.y * block_size.z;
    if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
    block.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    block.shared.clear();
    block.living = threads;
    block.at_barrier = block.generation = 0;
    std::vector<unsigned> turns(threads);
    for (unsigned t = 0; t < threads; ++t) {
        prepare(block.fibers[t]);
        turns[t] = t;
    }
    std::mt19937 random(seed);
    auto give_turn = [](unsigned t) {
        auto& turn = block.fibers[t];
        bool waits = turn.awaited && *turn.awaited == turn.was && !block.failed;
        if (turn.done || waits) return false;
        resume(t);
        return true;
    };
    // A warp goes on as far as it can before the next one begins, as it may on a GPU.
    auto give_turns = [&](unsigned warp) {
        unsigned begin = warp * WARP, end = std::min(begin + WARP, threads);
        for (bool any = true; any;) {
            any = false;
            for (unsigned t = begin; t < end; ++t) any |= give_turn(block.order == FALLING ? begin + end - 1 - t : t);
        }
    };
    while (block.living) {
        block.progress = false;
        if (block.order == SHUFFLED) {
            std::shuffle(turns.begin(), turns.end(), random);
            for (unsigned t : turns) give_turn(t);
        } else {
            unsigned warps = unsigned(block.warps.size());
            for (unsigned w = 0; w < warps; ++w) give_turns(block.order == FALLING ? warps - 1 - w : w);
        }
        if (!block.progress && block.living && !block.failed) {
            block.failed = true;
            std::snprintf(block.error, sizeof block.error,
                          "deadlock: %u threads wait, %u of them at the barrier %s, the others at an operation of a warp", block.living,
                          block.at_barrier, block.at_barrier ? block.barrier : "(none)");
        }
    }
    block.shared.clear();
}

int launch(const unsigned* shape, size_t dynamic, int order, unsigned seed, void (*call)(void*), void* state, char* message,
           size_t room) {
    grid_size = {shape[0], shape[1], shape[2]}, block_size = {shape[3], shape[4], shape[5]};
    call_thread = call, call_state = state;
    block.order = Order(order), block.dynamic = dynamic, block.failed = false;
    unsigned count = grid_size.x * grid_size.y * grid_size.z;
    for (unsigned i = 0; i < count && !block.failed; ++i) {
        unsigned b = order == FALLING ? count - 1 - i : i;
        block_index = {b % grid_size.x, b / grid_size.x % grid_size.y, b / (grid_size.x * grid_size.y)};
        run_block(seed + b);
    }
    if (block.failed) std::snprintf(message, room, "%s", block.error);
    return block.failed;
}

}  // namespace emulation
