// Rotary position embedding (Su et al. 2021, eq. 34), also in place, of q and k in one launch. The inverse rotation is
// its backward.
//
// A thread turns the same dims of four heads: the angles are read once for them, and eight vectors are in flight.

#include "launch.cuh"
#include "rotation.h"

namespace pyckpt {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // a thread

// The vectors of N dims (or single pairs, for N = 1) that a thread reads of a head, and their angles.
template <int N, bool INTERLEAVED>
struct Shape {
  // Interleaved vectors of N dims hold N / 2 pairs; else there are two vectors, of N pairs.
  static constexpr int pairs = INTERLEAVED && N > 1 ? N / 2 : N;
};

template <class T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads) rope_kernel(const Rope a, const int groups, const int vectors, const int rest) {
  constexpr int P = Shape<N, INTERLEAVED>::pairs;
  const unsigned items = groups * (vectors + rest);  // of a token
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = index / items;
  if (token >= a.tokens) return;
  const unsigned item = static_cast<unsigned>(index - token * items);
  const int group = item / (vectors + rest), vector = item % (vectors + rest);
  const int all = a.first.heads + a.second.heads;

  const T* in[kHeads];
  T* out[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = group * kHeads + i;
    in[i] = nullptr;
    if (head < all) {
      const bool second = head >= a.first.heads;
      const Heads& h = second ? a.second : a.first;
      const int number = second ? head - a.first.heads : head;
      in[i] = static_cast<const T*>(h.in) + token * h.in_token + number * h.in_head;
      out[i] = static_cast<T*>(h.out) + token * h.out_token + number * h.out_head;
    }
  }
  if (vector >= vectors) {  // dims that are not turned
    const int d = 2 * a.half + (vector - vectors) * N;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (in[i]) store(out[i] + d, load<T, N>(in[i] + d));
    }
    return;
  }

  const int pair = vector * P;
  const int64_t row = (token < a.angles ? token : token % a.angles) * a.half;
  Vector<T, N> first[kHeads], second[kHeads];
  const int d0 = INTERLEAVED ? 2 * pair : pair, d1 = INTERLEAVED ? 2 * pair + 1 : pair + a.half;
  constexpr bool TWO = !INTERLEAVED || N == 1;  // vectors of a head
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (in[i]) {
      first[i] = load<T, N>(in[i] + d0);
      if constexpr (TWO) second[i] = load<T, N>(in[i] + d1);
    }
  }
  float cos[P], sin[P];
  unpack(load<float, P>(a.cos + row + pair), cos);
  unpack(load<float, P>(a.sin + row + pair), sin);
  if (a.inverse) {
#pragma unroll
    for (int j = 0; j < P; ++j) sin[j] = -sin[j];
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (in[i]) {
      float x[N];
      unpack(first[i], x);
      if constexpr (TWO) {
        float y[N];
        unpack(second[i], y);
#pragma unroll
        for (int j = 0; j < N; ++j) rotate(x[j], y[j], cos[j], sin[j]);
        store(out[i] + d1, pack<T>(y));
      } else {
#pragma unroll
        for (int j = 0; j < P; ++j) rotate(x[2 * j], x[2 * j + 1], cos[j], sin[j]);
      }
      store(out[i] + d0, pack<T>(x));
    }
  }
}

bool heads_wide(const Heads& h, int size) {
  return !h.heads || wide(0, {{Input{h.in, h.in_token}, size}, {Input{h.in, h.in_head}, size},
                              {Input{h.out, h.out_token}, size}, {Input{h.out, h.out_head}, size}});
}

template <class T, int N, bool INTERLEAVED>
void launch_rope(const Rope& a, cudaStream_t stream) {
  const int groups = static_cast<int>(ceil_div(a.first.heads + a.second.heads, kHeads));
  const int vectors = a.half / Shape<N, INTERLEAVED>::pairs, rest = a.copy_rest ? (a.dim - 2 * a.half) / N : 0;
  const int64_t items = a.tokens * groups * (vectors + rest);
  launch(rope_kernel<T, N, INTERLEAVED>, ceil_div(items, kThreads), kThreads, 0, stream, a, groups, vectors, rest);
}

}  // namespace

void rope(const Rope& a, Dtype dtype, bool interleaved, cudaStream_t stream) {
  const int size = size_of(dtype), n = 16 / size;
  const bool divides = a.half % (interleaved ? n / 2 : n) == 0 && (!a.copy_rest || (a.dim - 2 * a.half) % n == 0);
  const bool tables = wide(0, {{Input{a.cos, 0}, 4}, {Input{a.sin, 0}, 4}});
  const bool vectors = divides && tables && heads_wide(a.first, size) && heads_wide(a.second, size);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    if (vectors && interleaved) {
      launch_rope<T, kWide<T>, true>(a, stream);
    } else if (vectors) {
      launch_rope<T, kWide<T>, false>(a, stream);
    } else if (interleaved) {
      launch_rope<T, 1, true>(a, stream);
    } else {
      launch_rope<T, 1, false>(a, stream);
    }
  });
}

}  // namespace pyckpt
