// Reductions over lanes of a warp and over warps of a block, each in one fixed order: the same bits every time.
#pragma once

#include "portable.h"
#include "softmax.h"

namespace pyckpt {

struct Add {
  PYCKPT_FUNCTION float operator()(float a, float b) const { return a + b; }
};

struct Combine {
  PYCKPT_FUNCTION Exponentials operator()(Exponentials a, Exponentials b) const { return combined(a, b); }
};

#ifdef __CUDACC__
// All 32 lanes take part; on the host, where there is one thread, a test gives its own.
__device__ __forceinline__ float exchanged(float v, int distance) { return __shfl_xor_sync(~0u, v, distance); }

__device__ __forceinline__ Exponentials exchanged(Exponentials v, int distance) {
  return {exchanged(v.most, distance), exchanged(v.sum, distance)};
}
#endif

// The reduction over each group of `lanes` neighbours, a power of two; every lane gets it. V is what a lane holds.
template <class V, class Op>
#ifdef __CUDACC__
__device__ __forceinline__
#else
inline
#endif
    V
    over_lanes(V v, Op op, int lanes = 32) {
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

}  // namespace pyckpt
