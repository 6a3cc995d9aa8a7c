#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <stdexcept>
#include <vector>

namespace emulator {

Index thread, block, threads, blocks;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  ucontext_t context;  // to start it
  jmp_buf place;       // to go on: swapcontext would enter the system every time
  std::vector<char> stack;
  bool started, finished;
  long waits_for;       // the block's barrier it waits for, or -1
  long waits_for_warp;  // the same of its warp
  std::vector<Copy> asked;                // since the last group of copies
  std::deque<std::vector<Copy>> on_the_way;  // groups
};

struct Warp {
  long passed = 0;  // exchanges that all lanes have reached
  unsigned arrived = 0;
  float values[2][kWarp];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<double> memory;
ucontext_t scheduler;
jmp_buf scheduler_place;
const std::function<void()>* current_kernel;
long passed;  // barriers that all threads of the block have reached
unsigned arrived;

std::minstd_rand chance;

void arrive() {
  Fiber& f = fibers[thread.x];
  for (const Copy& c : f.on_the_way.front()) {
    if (c.from) {
      std::memcpy(c.to, c.from, 16);
    } else {
      std::memset(c.to, 0, 16);
    }
  }
  f.on_the_way.pop_front();
}

void start() {
  (*current_kernel)();
  wait_for_copies(0);
  fibers[thread.x].finished = true;
  _longjmp(scheduler_place, 1);
}

void resume(unsigned id) {
  Fiber& f = fibers[id];
  thread.x = id;
  f.waits_for = f.waits_for_warp = -1;
  if (_setjmp(scheduler_place)) return;
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  swapcontext(&scheduler, &f.context);
}

void yield() {
  if (!_setjmp(fibers[thread.x].place)) _longjmp(scheduler_place, 1);
}

bool ready(const Fiber& f, const Warp& w) {
  return !f.finished && (f.waits_for < 0 || passed > f.waits_for) && (f.waits_for_warp < 0 || w.passed > f.waits_for_warp);
}

void run_block(unsigned size) {
  passed = 0;
  arrived = 0;
  warps.assign(size / kWarp, Warp{});
  for (Fiber& f : fibers) {
    f.started = f.finished = false;
    f.waits_for = f.waits_for_warp = -1;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, start, 0);
  }
  unsigned left = size;
  while (left) {
    bool progress = false;
    for (unsigned i = 0; i < size; ++i) {
      if (!ready(fibers[i], warps[i / kWarp])) continue;
      progress = true;
      resume(i);
      left -= fibers[i].finished;
    }
    if (!progress) throw std::runtime_error("a kernel does not end: its threads wait at different barriers");
  }
}

}  // namespace

void copy_later(void* to, const void* from, bool there) {
  fibers[thread.x].asked.push_back({to, there ? from : nullptr});
}

void commit_copies() {
  Fiber& f = fibers[thread.x];
  f.on_the_way.push_back(std::move(f.asked));
  f.asked.clear();
}

void wait_for_copies(size_t groups_left) {
  while (fibers[thread.x].on_the_way.size() > groups_left) arrive();
}

void barrier() {
  if (!fibers[thread.x].on_the_way.empty() && chance() % 2) arrive();
  fibers[thread.x].waits_for = passed;
  if (++arrived == threads.x) {
    arrived = 0;
    ++passed;
  }
  yield();
}

float exchange(float value, int distance) {
  Warp& w = warps[thread.x / kWarp];
  const unsigned lane = thread.x % kWarp;
  const long turn = w.passed;
  // Two places by turns: no lane can be two exchanges ahead of another that has still to read.
  w.values[turn & 1][lane] = value;
  fibers[thread.x].waits_for_warp = turn;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.passed;
  }
  yield();
  return w.values[turn & 1][lane ^ distance];
}

void* dynamic_shared() { return memory.data(); }

void run(unsigned grid, unsigned size, size_t shared, const std::function<void()>& kernel) {
  if (size == 0 || size % kWarp || size > 1024) throw std::runtime_error("a block must have 32 to 1024 threads in warps");
  fibers.resize(size);
  for (Fiber& f : fibers) f.stack.resize(kStack);
  // Of the size that was asked for, so that tools see what lies beyond it; not a number, so that stale reads show.
  memory.assign(shared / sizeof(double), __builtin_nan(""));
  memory.shrink_to_fit();
  current_kernel = &kernel;
  threads.x = size;
  blocks.x = grid;
  for (block.x = 0; block.x < grid; ++block.x) run_block(size);
}

}  // namespace emulator

// As much of the CUDA runtime as the launchers call: one device, small, so that its blocks have several rows each.
extern "C" {

// What launches, and questions for a kernel, end in from now on: a test's choice.
static cudaError_t outcome = cudaSuccess;
__attribute__((visibility("default"))) void pyckpt_emulate_error(int error) { outcome = static_cast<cudaError_t>(error); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return outcome; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return outcome; }

const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = 2;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    default:
      *value = 9;
  }
  return cudaSuccess;
}

}  // extern "C"
