// The library's entry points, called through ctypes: which instruction sets this machine has, and attention's forward and
// backward, as parts that PyTorch's own threads take one after another. Needs nothing of PyTorch's headers, so that it
// is built where PyTorch is not installed yet.

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "attention.h"

#define PYCKPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace pyckpt {

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

void yield_thread() { std::this_thread::yield(); }

namespace {

#if defined(__x86_64__)
// Conversions of float16. GCC before 11 and clang before 18 know no such name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Those that run on this machine, the best first.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      all.push_back(&kernels_avx512);
    if (fma) all.push_back(&kernels_avx2);
#elif defined(__aarch64__)
    all.push_back(&kernels_neon);
#endif
    return all;
  }();
  return found;
}

// A thread's working memory: kept between calls, as large as any of them needed.
float* scratch_of_thread(size_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    constexpr size_t line = 64;
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(line, (floats * sizeof(float) + line - 1) / line * line)));
    if (memory == nullptr) return nullptr;
    size = floats;
  }
  return memory.get();
}

// PyTorch's torch_parallel_for.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

struct Job {
  const Attention& attention;
  const Kernels& kernels;
  const std::vector<Unit>& units;
  const std::vector<int64_t>& first_turn;  // of each segment, backward only
  int32_t* turns;                          // null in the forward
  size_t scratch;
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};
};

// A part waits for parts before it alone, and those were taken before: by threads that are at work on them.
void work(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  float* scratch = scratch_of_thread(job.scratch);
  if (scratch == nullptr) {
    job.out_of_memory = true;
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    for (size_t at; (at = job.next.fetch_add(1)) < job.units.size();) {
      const Unit& unit = job.units[at];
      if (job.turns == nullptr)
        job.kernels.forward(job.attention, unit, scratch);
      else
        job.kernels.backward(job.attention, unit, scratch, job.turns + job.first_turn[unit.segment]);
    }
  }
}

int32_t run(Job& job, ParallelFor parallel_for) {
  const int64_t units = static_cast<int64_t>(job.units.size());
  const int64_t threads = job.attention.threads < units ? job.attention.threads : units;
  if (threads <= 1 || parallel_for == nullptr)
    work(0, 1, &job);
  else if (parallel_for(0, threads, 1, work, &job) != 0)
    return 2;
  // A thread without memory left its parts to the others, which are done with all of them, or there was none.
  return job.out_of_memory && job.next.load() < job.units.size() ? 1 : 0;
}

// The longest first: under a causal mask the last tiles.
std::vector<Unit> forward_units(const Attention& a) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t heads = group < kPool ? group : kPool;
  int64_t tiles = 0;
  for (int64_t i = 0; i < a.n_segments; ++i) tiles += ceil_div(a.segments[i].sq, kTile);
  // Few parts, and threads would wait for the last.
  int64_t pool = kPool / heads;
  while (pool > 1 && tiles / pool * a.kv_heads * ceil_div(group, heads) < 8 * a.threads) pool /= 2;
  std::vector<Unit> units;
  for (int64_t i = 0; i < a.n_segments; ++i) {
    const int64_t n = ceil_div(a.segments[i].sq, kTile);
    for (int64_t stop = n; stop > 0; stop -= pool) {
      const int64_t first = stop < pool ? 0 : stop - pool;
      for (int64_t h = 0; h < a.kv_heads; ++h)
        for (int64_t g = 0; g < group; g += heads)
          units.push_back({i, h, h * group + g, group - g < heads ? group - g : heads, first, stop - first});
    }
  }
  return units;
}

std::vector<Unit> backward_units(const Attention& a) {
  const int64_t group = a.heads / a.kv_heads, size = chunk_keys(a);
  std::vector<Unit> units;
  for (int64_t i = 0; i < a.n_segments; ++i)
    for (int64_t c = 0; c < ceil_div(a.segments[i].sk, size); ++c)
      for (int64_t h = 0; h < a.kv_heads; ++h) units.push_back({i, h, h * group, group, c, 1});
  return units;
}

}  // namespace
}  // namespace pyckpt

using namespace pyckpt;

// The name of instruction set i of those that run here, the best first; null beyond the last.
PYCKPT_EXPORT const char* pyckpt_instruction_set(int64_t i) {
  return i >= 0 && i < static_cast<int64_t>(available().size()) ? available()[i]->name : nullptr;
}

// What a caller's argument has to measure: another size was built from other sources.
PYCKPT_EXPORT int64_t pyckpt_argument_size() { return sizeof(Attention); }

// What is divided by, and without a rest.
static bool possible(const Attention& a) {
  return a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.d_k > 0 && a.d_v > 0;
}

// Both return 0, 1 where there is no memory for a thread's work, 2 where PyTorch's threads failed, 3 where the argument
// is no attention.
PYCKPT_EXPORT int32_t pyckpt_attention_forward(const Attention* a, int64_t instruction_set, ParallelFor parallel_for) try {
  if (!possible(*a)) return 3;
  const Kernels& kernels = *available().at(instruction_set);
  const std::vector<Unit> units = forward_units(*a);
  const std::vector<int64_t> none;
  Job job{*a, kernels, units, none, nullptr, kernels.forward_scratch(*a)};
  return run(job, parallel_for);
} catch (const std::bad_alloc&) {
  return 1;
} catch (...) {
  return 3;
}

PYCKPT_EXPORT int32_t pyckpt_attention_backward(const Attention* a, int64_t instruction_set, ParallelFor parallel_for) try {
  if (!possible(*a)) return 3;
  const Kernels& kernels = *available().at(instruction_set);
  const std::vector<Unit> units = backward_units(*a);
  std::vector<int64_t> first_turn;
  int64_t turns = 0;
  for (int64_t i = 0; i < a->n_segments; ++i) {
    first_turn.push_back(turns);
    turns += a->heads * ceil_div(a->segments[i].sq, kTile);
  }
  std::vector<int32_t> counters(turns);
  Job job{*a, kernels, units, first_turn, counters.data(), kernels.backward_scratch(*a)};
  return run(job, parallel_for);
} catch (const std::bad_alloc&) {
  return 1;
} catch (...) {
  return 3;
}
