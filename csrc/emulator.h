// Runs the kernels on a CPU, a block after the other and its threads as fibers, so that tests need no GPU.
//
// Compiled with -DPYCKPT_EMULATED by the host compiler. Shared memory is static, barriers and shuffles let the other
// fibers go on. Device intrinsics take their host forms (portable.h). Copies to shared memory arrive when they are waited
// for, or at a barrier before, by chance: what reads or writes there too early shows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)

namespace emulator {

struct Index {
  unsigned x;
};
extern Index thread, block, threads, blocks;

void barrier();
float exchange(float value, int distance);
void* dynamic_shared();
// 16 bytes, or zeros, into shared memory; the copies since the last commit are a group, and the oldest arrive first.
void copy_later(void* to, const void* from, bool there);
void commit_copies();
void wait_for_copies(size_t groups_left);
void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& kernel);

}  // namespace emulator

#define threadIdx ::emulator::thread
#define blockIdx ::emulator::block
#define blockDim ::emulator::threads
#define gridDim ::emulator::blocks

inline void __syncthreads() { ::emulator::barrier(); }
inline float __shfl_xor_sync(unsigned, float value, int distance) { return ::emulator::exchange(value, distance); }
inline void __syncwarp() { ::emulator::exchange(0.0f, 0); }
inline int __ffs(int v) { return __builtin_ffs(v); }
