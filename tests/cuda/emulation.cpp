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

constexpr unsigned AT_ONCE = 3;  // blocks, in the shuffled order

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
    dim3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::map<int, Shared> shared;
    unsigned living = 0, at_barrier = 0, generation = 0;
    unsigned last_told = 0;  // if the others have their turns first: a number that rises
    const char* barrier = nullptr;
};

dim3 thread_index, block_index, block_size, grid_size;

static Block blocks[AT_ONCE];  // those that run; each takes the place and the stacks of one that has ended
static Block* block;           // that of the thread whose turn it is
static unsigned current;       // its number there
static Order order;
static std::mt19937 chance;
static unsigned told;
static size_t dynamic_size;
static bool failed;
static char error[1000];
static void (*call_thread)(void*);
static void* call_state;
static void* scheduler;
#if defined(__SANITIZE_ADDRESS__)
static void* scheduler_fake_stack;
static const void* scheduler_stack;
static size_t scheduler_size;
#endif

struct Stop {};  // thrown through a fiber when the block has failed

static Fiber& fiber() { return block->fibers[current]; }

unsigned lane() { return current % WARP; }

Warp& warp() { return block->warps[current / WARP]; }

static void set_thread() {
    thread_index = {current % block_size.x, current / block_size.x % block_size.y, current / (block_size.x * block_size.y)};
    block_index = block->index;
}

void fail(const char* format, ...) {
    if (!failed) {
        failed = true;
        int used = std::snprintf(error, sizeof error, "block (%u, %u, %u), thread (%u, %u, %u): ", block_index.x, block_index.y,
                                 block_index.z, thread_index.x, thread_index.y, thread_index.z);
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(error + used, sizeof error - size_t(used), format, arguments);
        va_end(arguments);
    }
    throw Stop{};
}

static void give_others_a_turn() {
    [[maybe_unused]] Fiber& mine = fiber();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&mine.fake_stack, scheduler_stack, scheduler_size);
#endif
    emulation_switch(&fiber().place, scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine.fake_stack, &scheduler_stack, &scheduler_size);
#endif
    set_thread();
    if (failed) throw Stop{};
}

// Until the counter changes.
static void await(const unsigned& counter, unsigned was) {
    if (counter == was) {
        fiber().awaited = &counter, fiber().was = was;
        give_others_a_turn();
    }
}

void tell_other_blocks(const void* where) {
    auto inside = [where](auto& shared) {
        auto begin = shared.second.bytes.get();
        return begin <= where && where < begin + shared.second.size;
    };
    if (order != SHUFFLED || std::any_of(block->shared.begin(), block->shared.end(), inside)) return;
    block->last_told = ++told;
    give_others_a_turn();
}

static void open_barrier() {
    block->at_barrier = 0;
    ++block->generation;
}

void barrier(const char* where) {
    unsigned generation = block->generation;
    if (block->at_barrier && block->barrier != where) fail("__syncthreads at %s while others wait at %s", where, block->barrier);
    block->barrier = where;
    if (++block->at_barrier == block->living) open_barrier();
    await(block->generation, generation);
}

void arrive(Warp& warp, uint32_t mask) {
    unsigned generation = warp.generation;
    warp.arrived |= 1u << lane();
    if (warp.arrived == mask) {
        warp.arrived = 0;
        ++warp.generation;
    }
    await(warp.generation, generation);
}

void* shared_memory(int key, size_t size) {
    Shared& memory = block->shared[key];
    if (key == DYNAMIC) size = dynamic_size;
    if (!memory.bytes) {
        memory.bytes.reset(new unsigned char[size]);
        memory.size = size;
        std::memset(memory.bytes.get(), FILLED[order], size);
    }
    size_t all = block->shared.count(DYNAMIC) ? 0 : dynamic_size;
    for (auto& [_, one] : block->shared) all += one.size;
    if (all > MOST_SHARED) fail("%zu bytes of shared memory, and a block has %zu on some GPUs", all, MOST_SHARED);
    if (memory.size != size) fail("shared memory of %zu bytes that has %zu in another instance of its function", size, memory.size);
    return memory.bytes.get();
}

// cp.async: what is copied is there when it is awaited and not before, and until then its place holds what must not be read.
void copy_async(void* to, const void* from, size_t size, bool there) {
    if (reinterpret_cast<uintptr_t>(to) % size || (there && reinterpret_cast<uintptr_t>(from) % size))
        fail("cp.async: an address that is no multiple of %zu", size);
    std::memset(to, FILLED[order], size);
    fiber().copies.push_back({to, from, size, there, fiber().groups});
}

void close_copies() { ++fiber().groups; }

// All copies are there but those of the last `pending` groups; of no group that is open.
void finish_copies(unsigned pending) {
    std::vector<Copy> left;
    for (auto& copy : fiber().copies) {
        if (copy.group + pending >= fiber().groups) {
            left.push_back(copy);
            continue;
        }
        auto to = static_cast<unsigned char*>(copy.to);
        if (std::count(to, to + copy.size, FILLED[order]) != std::ptrdiff_t(copy.size))
            fail("cp.async: its place was written to while the copy was under way");
        if (copy.there)
            std::memcpy(to, copy.from, copy.size);
        else
            std::memset(to, 0, copy.size);
    }
    fiber().copies = left;
}

// A function of its own, since `enter` does not return: what the sanitizer guards on the stack is to be free again.
__attribute__((noinline)) static void run_thread() {
    try {
        call_thread(call_state);
        if (!fiber().copies.empty()) fail("cp.async: a copy that nobody awaits");
    } catch (const Stop&) {
    }
}

// What a fiber begins with, and ends in: another's turn.
static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    set_thread();
    run_thread();
    fiber().done = true;
    --block->living;
    if (block->at_barrier && block->at_barrier == block->living) open_barrier();  // those that have ended count no more
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
#endif
    emulation_switch(&fiber().place, scheduler);
}

static void resume() {
    fiber().awaited = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber().stack.get(), STACK);
#endif
    emulation_switch(&scheduler, fiber().place);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
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

static void begin(Block& place, dim3 index) {
    unsigned threads = block_size.x * block_size.y * block_size.z;
    if (place.fibers.size() < threads) place.fibers = std::vector<Fiber>(threads);
    place.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    place.shared.clear();
    place.index = index;
    place.living = threads;
    place.at_barrier = place.generation = place.last_told = 0;
    for (unsigned t = 0; t < threads; ++t) prepare(place.fibers[t]);
}

// A turn for each thread of a warp that does not wait. False if there is none.
static bool give_turns(Block& of, unsigned warp) {
    unsigned lanes = std::min(unsigned(WARP), block_size.x * block_size.y * block_size.z - warp * WARP), turns[WARP];
    for (unsigned l = 0; l < lanes; ++l) turns[l] = warp * WARP + (order == FALLING ? lanes - 1 - l : l);
    if (order == SHUFFLED) std::shuffle(turns, turns + lanes, chance);
    block = &of;
    bool any = false;
    for (unsigned l = 0; l < lanes; ++l) {
        Fiber& turn = of.fibers[turns[l]];
        if (turn.done || (turn.awaited && *turn.awaited == turn.was && !failed)) continue;
        current = turns[l];
        resume();
        any = true;
    }
    return any;
}

static bool has_ended(const Block* of) { return of->living == 0; }

// Has warps go on until one of their blocks has ended. Rising and falling, a warp goes on as far as it can before the next one
// begins, as it may on a GPU. Shuffled, the first one that can go on has a turn, and falls behind the others now and then; those of
// a block that has told others something are left where they are until another one has ended, or nobody else can go on.
static void go_on(std::vector<std::pair<Block*, unsigned>>& warps) {
    while (std::none_of(warps.begin(), warps.end(), [](auto& warp) { return has_ended(warp.first); })) {
        bool any = false;
        if (order == SHUFFLED) {
            auto chosen = std::find_if(warps.begin(), warps.end(), [](auto& warp) {
                return !warp.first->last_told && give_turns(*warp.first, warp.second);
            });
            any = chosen != warps.end();
            if (any && chance() % 8 == 0) std::rotate(chosen, chosen + 1, warps.end());
            auto latest = std::max_element(blocks, blocks + AT_ONCE, [](auto& a, auto& b) { return a.last_told < b.last_told; });
            if (!any && latest->last_told) latest->last_told = 0, any = true;
        } else {
            for (auto [of, w] : warps)
                while (give_turns(*of, w)) any = true;
        }
        if (any) continue;
        failed = true;
        Block& of = *warps.front().first;
        std::snprintf(error, sizeof error,
                      "deadlock: %u threads wait, %u of them at the barrier %s, the others at an operation of a warp", of.living,
                      of.at_barrier, of.at_barrier ? of.barrier : "(none)");
    }
}

int launch(const unsigned* shape, size_t dynamic, int how, unsigned seed, void (*call)(void*), void* state, char* message,
           size_t room) {
    grid_size = {shape[0], shape[1], shape[2]}, block_size = {shape[3], shape[4], shape[5]};
    call_thread = call, call_state = state;
    order = Order(how), dynamic_size = dynamic, failed = false;
    unsigned count = grid_size.x * grid_size.y * grid_size.z, next = 0;
    chance.seed(seed);
    std::vector<std::pair<Block*, unsigned>> warps;  // of the blocks that run, in the order of their turns
    std::vector<Block*> free{blocks};
    if (order == SHUFFLED)
        for (unsigned i = 1; i < AT_ONCE; ++i) free.push_back(blocks + i);
    do {
        for (; next < count && !failed && !free.empty(); ++next, free.pop_back()) {
            unsigned b = order == FALLING ? count - 1 - next : next;
            begin(*free.back(), {b % grid_size.x, b / grid_size.x % grid_size.y, b / (grid_size.x * grid_size.y)});
            for (unsigned w = 0; w < free.back()->warps.size(); ++w) {
                size_t place = order == RISING ? w : order == FALLING ? 0 : chance() % (warps.size() + 1);
                warps.insert(warps.begin() + std::ptrdiff_t(place), {free.back(), w});
            }
        }
        go_on(warps);
        for (Block& place : blocks) {
            place.last_told = 0;
            auto end = std::remove_if(warps.begin(), warps.end(), [&](auto& w) { return w.first == &place && has_ended(&place); });
            if (end != warps.end()) free.push_back(&place);
            warps.erase(end, warps.end());
        }
    } while (!warps.empty() || (next < count && !failed));
    for (Block& place : blocks) place.shared.clear();
    if (failed) std::snprintf(message, room, "%s", error);
    return failed;
}

}  // namespace emulation
