#include <cuda_runtime.h>
#include <ucontext.h>

#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(EMULATION_WITH_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStack = 64 * 1024;  // of a fiber

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  ucontext_t beginning{};
  bool started = false;
  void* here[5];  // where it gave way
  std::unique_ptr<char[]> stack;
  uint3 index;
  State state = State::done;
  int line = 0;       // of the rendezvous
  unsigned mask = 0;  // of the warp's rendezvous
  uint64_t given = 0, got = 0;
  int from_lane = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
const std::function<void()>* kernel = nullptr;
void* scheduler[5];
size_t current = 0;

std::vector<unsigned char> shared;  // of exactly the bytes asked for: beyond them the sanitizer sees it

const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

// What the address sanitizer must be told about a change of stacks.
#if defined(EMULATION_WITH_ASAN)
void leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
void enter(void* fake, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(fake, stack, size); }
#else
void leave(void**, const void*, size_t) {}
void enter(void*, const void**, size_t*) {}
#endif

// Jumps, and not swapcontext, which asks the kernel for the mask of signals every time. This file is compiled without
// sanitizers: they would take a jump for the end of a stack.
[[gnu::noinline]] void to_scheduler() {
  void* fake = nullptr;
  leave(&fake, scheduler_stack, scheduler_stack_size);
  if (__builtin_setjmp(fibers[current]->here) == 0) __builtin_longjmp(scheduler, 1);
  enter(fake, &scheduler_stack, &scheduler_stack_size);
}

[[gnu::noinline]] void to_fiber(Fiber& fiber) {
  void* fake = nullptr;
  leave(&fake, fiber.stack.get(), kStack);
  if (__builtin_setjmp(scheduler) == 0) {
    if (fiber.started) __builtin_longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.beginning);
  }
  enter(fake, nullptr, nullptr);
}

// A fiber outlives its block: it takes the same place in the next one.
void live() {
  enter(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*kernel)();
    fibers[current]->state = State::done;
    to_scheduler();
  }
}

void make_fibers(size_t count) {
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber->beginning);
    fiber->beginning.uc_stack.ss_sp = fiber->stack.get();
    fiber->beginning.uc_stack.ss_size = kStack;
    fiber->beginning.uc_link = nullptr;
    makecontext(&fiber->beginning, live, 0);
    fibers.push_back(std::move(fiber));
  }
}

// Lets the warp that begins at `first` go on if all its lanes wait at one place.
bool release_warp(size_t first) {
  for (size_t t = first; t < first + 32; ++t) {
    const Fiber& f = *fibers[t];
    if (f.state != State::at_warp || f.line != fibers[first]->line || f.mask != ~0u) return false;
  }
  for (size_t t = first; t < first + 32; ++t) fibers[t]->got = fibers[first + size_t(fibers[t]->from_lane)]->given;
  for (size_t t = first; t < first + 32; ++t) fibers[t]->state = State::ready;
  return true;
}

bool release_block(size_t count) {
  for (size_t t = 0; t < count; ++t)
    if (fibers[t]->state != State::at_block || fibers[t]->line != fibers[0]->line) return false;
  for (size_t t = 0; t < count; ++t) fibers[t]->state = State::ready;
  return true;
}

// Fibers that still hold a frame cannot be reused, nor can their frames be unwound: they are dropped.
[[noreturn]] void fail(size_t count) {
  std::ostringstream out;
  out << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ") hangs:";
  State state = State::ready;
  int line = -1;
  for (size_t t = 0; t < count; ++t) {
    const Fiber& f = *fibers[t];
    if (f.state == state && (f.line == line || state == State::done)) continue;
    state = f.state;
    line = f.line;
    out << " from thread " << t << " on ";
    if (state == State::done)
      out << "returned;";
    else
      out << "at the " << (state == State::at_warp ? "warp's" : "block's") << " rendezvous in line " << line << ";";
  }
  fibers.clear();
  throw std::logic_error(out.str());
}

void run_block(size_t count) {
  for (size_t t = 0; t < count; ++t) fibers[t]->state = State::ready;
  for (;;) {
    for (size_t step = 0; step < count; ++step) {
      current = backwards ? count - 1 - step : step;
      Fiber& fiber = *fibers[current];
      if (fiber.state != State::ready) continue;
      threadIdx = fiber.index;
      to_fiber(fiber);
    }
    bool released = release_block(count);
    for (size_t first = 0; first + 32 <= count; first += 32) released = release_warp(first) || released;
    if (released) continue;
    for (size_t t = 0; t < count; ++t)
      if (fibers[t]->state != State::done) fail(count);
    return;
  }
}

}  // namespace

int lane() { return int(current % 32); }

void meet_block(int line) {
  Fiber& f = *fibers[current];
  f.state = State::at_block;
  f.line = line;
  to_scheduler();
}

uint64_t meet_warp(unsigned mask, uint64_t value, int from_lane, int line) {
  Fiber& f = *fibers[current];
  f.state = State::at_warp;
  f.line = line;
  f.mask = mask;
  f.given = value;
  f.from_lane = from_lane;
  to_scheduler();
  return f.got;
}

void* launched_shared() { return shared.data(); }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  shared = std::vector<unsigned char>(shared_bytes, 0xFF);  // NaN in every type
  const size_t threads = size_t(block.x) * block.y * block.z;
  make_fibers(threads);
  for (size_t t = 0; t < threads; ++t)
    fibers[t]->index = {unsigned(t % block.x), unsigned(t / block.x % block.y), unsigned(t / block.x / block.y)};
  kernel = &body;
  blockDim = block;
  gridDim = grid;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t step = 0; step < blocks; ++step) {
    const uint64_t b = backwards ? blocks - 1 - step : step;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(threads);
  }
}

}  // namespace emulation
