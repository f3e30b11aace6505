// Runs the blocks of a launch one after another, the threads of a block as fibers that change at barriers only.
//
// What it finds: a barrier that some threads do not reach, lanes that leave before a warp-wide operation, and, since one
// thread runs up to a barrier before the next one starts (in either order) over shared memory full of NaN, most reads of
// what another thread has not written yet.
#include "cuda_on_host.h"

#include <csetjmp>
#include <cstdlib>
#include <map>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulation {

thread_local Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t STACK = 128 << 10;

enum class State { Ready, AtWarp, AtBlock, Done };

struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK);
    ucontext_t start;
    jmp_buf at;
    State state;
    bool started;
    // Warp-wide operations so far; two in a row use different slots.
    unsigned exchanges;
};

struct Block {
    std::vector<Fiber *> fibers;
    std::vector<char> slots;
    std::vector<char> shared;
    Call call;
    void **args;
    unsigned current;
    ucontext_t entered;
    jmp_buf scheduler;
};

thread_local Block block;

void yield(State state) {
    Fiber &fiber = *block.fibers[block.current];
    fiber.state = state;
    if (!_setjmp(fiber.at)) _longjmp(block.scheduler, 1);
}

void entry() {
    block.call(block.args);
    block.fibers[block.current]->state = State::Done;
    _longjmp(block.scheduler, 1);
}

void resume(unsigned thread) {
    Fiber &fiber = *block.fibers[thread];
    block.current = thread;
    thread_index = Index{thread, 0, 0};
    if (!_setjmp(block.scheduler)) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, entry, 0);
        swapcontext(&block.entered, &fiber.start);
    }
}

const char *run_block(unsigned threads, bool backwards) {
    for (unsigned t = 0; t < threads; t++) {
        Fiber &fiber = *block.fibers[t];
        fiber.state = State::Ready;
        fiber.started = false;
        fiber.exchanges = 0;
    }
    for (;;) {
        unsigned ran = 0, done = 0, waiting = 0;
        for (unsigned i = 0; i < threads; i++) {
            unsigned t = backwards ? threads - 1 - i : i;
            if (block.fibers[t]->state == State::Ready) {
                resume(t);
                ran++;
            }
        }
        for (unsigned first = 0; first < threads; first += 32) {
            unsigned last = first + 32 < threads ? first + 32 : threads, at_warp = 0;
            for (unsigned t = first; t < last; t++) at_warp += block.fibers[t]->state == State::AtWarp;
            if (at_warp == last - first) {
                for (unsigned t = first; t < last; t++) block.fibers[t]->state = State::Ready;
                ran++;
            }
        }
        for (unsigned t = 0; t < threads; t++) {
            done += block.fibers[t]->state == State::Done;
            waiting += block.fibers[t]->state == State::AtBlock;
        }
        if (done == threads) return nullptr;
        if (waiting == threads) {
            for (unsigned t = 0; t < threads; t++) block.fibers[t]->state = State::Ready;
        } else if (ran == 0) {
            return waiting ? "threads of a block wait at a barrier that others do not reach"
                           : "lanes of a warp wait for lanes that do not come";
        }
    }
}

std::map<std::string, Call> &kernels() {
    static std::map<std::string, Call> all;
    return all;
}

} // namespace

void add(const char *name, Call call) { kernels()[name] = call; }

void block_barrier() { yield(State::AtBlock); }

const char *exchange(const void *mine, int bytes) {
    unsigned thread = block.current;
    unsigned parity = block.fibers[thread]->exchanges++ & 1;
    char *slots = block.slots.data() + (thread / 32 * 2 + parity) * 32 * SLOT;
    std::memcpy(slots + thread % 32 * SLOT, mine, bytes);
    yield(State::AtWarp);
    return slots;
}

void *shared() {
    // 16-byte aligned, as dynamic shared memory is.
    return reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(block.shared.data()) + 15) & ~uintptr_t(15));
}

} // namespace emulation

using namespace emulation;

// Runs a launch; null, or what is wrong with it. Blocks and threads run in order or backwards.
extern "C" const char *peft_emulate(const char *name, const unsigned *grid, unsigned threads, unsigned shared_bytes,
                                    void **args, int backwards) {
    auto found = kernels().find(name);
    if (found == kernels().end()) return "there is no kernel of this name";
    if (threads == 0 || threads > 1024 || threads % 32) return "a block has whole warps and up to 1024 threads";
    while (block.fibers.size() < threads) block.fibers.push_back(new Fiber);
    block.slots.resize(threads / 32 * 2 * 32 * SLOT);
    block.call = found->second;
    block.args = args;
    block_size = Index{threads, 1, 1};
    grid_size = Index{grid[0], grid[1], grid[2]};
    uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t b = backwards ? blocks - 1 - i : i;
        block_index = Index{unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
        block.shared.assign(shared_bytes + 16, char(0xff));
        if (const char *wrong = run_block(threads, backwards)) return wrong;
    }
    return nullptr;
}
