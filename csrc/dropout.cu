// Dropout by Philox on absolute positions, and the residual beside it, in one pass over memory. No mask is stored:
// what is dropped follows from the seed, the row's number and the column.

#include "launch.cuh"
#include "philox.h"

namespace pyckpt {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // a thread
constexpr int kQuad = 4;     // columns that share a counter

// Columns c ... c + N - 1, those that are there, N a multiple of four.
template <class T, class S, int N, bool WHOLE>
__device__ __forceinline__ void drop(const Dropout& a, const Vector<T, N>& raw, const Vector<S, N>& rest, S* out,
                                     int64_t row, int64_t c) {
  float x[N], r[N] = {};
  unpack(raw, x);
  if (a.residual.p) unpack(rest, r);
#pragma unroll
  for (int q = 0; q < N; q += kQuad) {
    const Words words = row_words(a.seed, a.first + row, (c + q) / kQuad);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float y = kept(words.w[j], a.threshold) ? product(x[q + j], a.factor) : 0.0f;
      x[q + j] = a.residual.p ? y + r[q + j] : y;
    }
  }
  const Vector<S, N> y = pack<S>(x);
  if constexpr (WHOLE) {
    store(out + c, y);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (c + j < a.width) out[c + j] = y.v[j];
    }
  }
}

template <class T, int N, bool WHOLE>
__device__ __forceinline__ Vector<T, N> some(const T* p, int64_t c, int64_t width) {
  if constexpr (WHOLE) {
    return load<T, N>(p + c);
  } else {
    Vector<T, N> v;
#pragma unroll
    for (int j = 0; j < N; ++j) v.v[j] = c + j < width ? p[c + j] : from_float<T>(0.0f);
    return v;
  }
}

// WHOLE: rows are made of whole vectors; else of quads, read value by value.
template <class T, class S, bool WHOLE>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const Dropout a, const unsigned blocks_a_row) {
  constexpr int N = WHOLE ? kWide<T> : kQuad;
  const int64_t row = blockIdx.x / blocks_a_row;
  const int64_t first = (static_cast<int64_t>(blockIdx.x % blocks_a_row) * (kThreads * kVectors) + threadIdx.x) * N;
  const T* x = at<T>(a.x, row);
  const S* residual = a.residual.p ? at<S>(a.residual, row) : nullptr;
  S* out = at<S>(a.out, row);
  Vector<T, N> raw[kVectors];
  Vector<S, N> rest[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = first + i * (kThreads * N);
    if (c < a.width) {
      raw[i] = some<T, N, WHOLE>(x, c, a.width);
      if (residual) rest[i] = some<S, N, WHOLE>(residual, c, a.width);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = first + i * (kThreads * N);
    if (c < a.width) drop<T, S, N, WHOLE>(a, raw[i], rest[i], out, row, c);
  }
}

}  // namespace

void dropout(const Dropout& a, Dtype dtype, bool float_out, cudaStream_t stream) {
  const int size = size_of(dtype), size_out = float_out ? 4 : size;
  const bool whole = wide(a.width * size, {{a.x, size}, {a.residual, size_out}, {a.out, size_out}});
  with_types(dtype, float_out, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const int n = whole ? kWide<T> : kQuad;
    const unsigned each = grid_of(ceil_div(a.width, kThreads * kVectors * n));
    if (whole) {
      launch(dropout_kernel<T, S, true>, a.rows * each, kThreads, 0, stream, a, each);
    } else {
      launch(dropout_kernel<T, S, false>, a.rows * each, kThreads, 0, stream, a, each);
    }
  });
}

}  // namespace pyckpt
