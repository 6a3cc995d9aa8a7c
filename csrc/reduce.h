// Reductions over lanes of a warp and over warps of a block, each in one fixed order: the same bits every time.
#pragma once

#include "portable.h"
#include "softmax.h"

namespace pyckpt {

struct Add {
  PYCKPT_FUNCTION float operator()(float a, float b) const { return a + b; }
};

// Two sums at once.
struct Sums {
  float a, b;
};

struct AddBoth {
  PYCKPT_FUNCTION Sums operator()(Sums x, Sums y) const { return {x.a + y.a, x.b + y.b}; }
};

struct Combine {
  PYCKPT_FUNCTION Exponentials operator()(Exponentials a, Exponentials b) const { return combined(a, b); }
};

#ifdef PYCKPT_KERNELS
// All 32 lanes take part; on the host, where there is one thread, a test gives its own.
__device__ __forceinline__ float exchanged(float v, int distance) { return __shfl_xor_sync(~0u, v, distance); }

__device__ __forceinline__ Exponentials exchanged(Exponentials v, int distance) {
  return {exchanged(v.most, distance), exchanged(v.sum, distance)};
}

__device__ __forceinline__ Sums exchanged(Sums v, int distance) {
  return {exchanged(v.a, distance), exchanged(v.b, distance)};
}
#endif

// The reduction over each group of `lanes` neighbours, a power of two; every lane gets it. V is what a lane holds.
template <class V, class Op>
PYCKPT_DEVICE V over_lanes(V v, Op op, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) v = op(v, exchanged(v, distance));
  return v;
}

// The reduction of what the warps of a block have, in their order.
template <class V, class Op>
PYCKPT_FUNCTION V over_warps(const V* parts, int warps, Op op) {
  V v = parts[0];
  for (int i = 1; i < warps; ++i) v = op(v, parts[i]);
  return v;
}

#ifdef PYCKPT_KERNELS
// The reduction over a block; every thread gets it. `parts` is shared, one for each warp, and is free again after the
// next __syncthreads(): calls that follow one another take turns with two.
template <class V, class Op>
__device__ __forceinline__ V over_block(V v, Op op, V* parts) {
  v = over_lanes(v, op);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  return over_warps(parts, static_cast<int>(blockDim.x / 32), op);
}
#endif

}  // namespace pyckpt
