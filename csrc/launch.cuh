// What the launchers share: the choice of a dtype and of wide accesses, and sizes of grids.
#pragma once

#ifdef PYCKPT_EMULATED
#include "emulator.h"
#define PYCKPT_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::emulator::dynamic_shared())
#else
#define PYCKPT_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"
#include "vector.cuh"

namespace pyckpt {

// f(T{}) with the C++ type of a dtype.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float16:
      return f(half{});
    case Dtype::bfloat16:
      return f(bfloat16{});
    case Dtype::float32:
      return f(float{});
  }
}

template <class T>
__device__ __forceinline__ const T* at(Input rows, int64_t row) {
  return static_cast<const T*>(rows.p) + row * rows.stride;
}

template <class T>
__device__ __forceinline__ T* at(Output rows, int64_t row) {
  return static_cast<T*>(rows.p) + row * rows.stride;
}

// f(T{}, S{}), S the C++ type of what is written: T, or float.
template <class F>
void with_types(Dtype dtype, bool float_out, F f) {
  with_type(dtype, [&](auto t) {
    if (float_out) {
      f(t, float{});
    } else {
      f(t, t);
    }
  });
}

struct Rows {
  Rows(Input r, int size) : p(r.p), stride(r.stride * size) {}
  Rows(Output r, int size) : p(r.p), stride(r.stride * size) {}
  const void* p;
  int64_t stride;  // bytes
};

// Whether every row starts at a multiple of 16 bytes, and is one long.
inline bool wide(int64_t width_bytes, std::initializer_list<Rows> all) {
  if (width_bytes % 16) return false;
  for (const Rows& r : all) {
    if (reinterpret_cast<uintptr_t>(r.p) % 16 || r.stride % 16) return false;
  }
  return true;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("too many rows for one launch: " + std::to_string(blocks) + " blocks");
  return static_cast<unsigned>(blocks);
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// A chip's limits count a kernel's static shared memory too. None that asks for dynamic memory has more than this, which
// a test of the compiler's report holds them to. More would send rows of 12,288 bytes to the pieces on sm_86.
constexpr size_t kStaticShared = 1024;
constexpr size_t kSharedUnasked = (48 << 10) - kStaticShared;

inline size_t most_dynamic_shared(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStaticShared;
}

// kernel(arguments...) by blocks of `threads`, with `shared` bytes of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
#ifdef PYCKPT_EMULATED
  static_cast<void>(stream);
  emulator::run(grid_of(blocks), threads, shared, [&] { kernel(arguments...); });
#else
  if (shared > kSharedUnasked) {
    // All that there is, not `shared`: the kernel keeps it, and another thread may be about to launch it with more.
    int device = 0;
    cudaGetDevice(&device);
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(most_dynamic_shared(device)));
  }
  kernel<<<grid_of(blocks), threads, shared, stream>>>(arguments...);
#endif
}

// The smallest power of two that is not below n.
inline int power_of_two(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

}  // namespace pyckpt
