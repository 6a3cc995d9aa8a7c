// What the launchers share: the choice of a dtype and of wide accesses, and sizes of grids.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

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

}  // namespace pyckpt
