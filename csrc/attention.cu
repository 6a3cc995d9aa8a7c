// Beside attention: what its backward needs of the output, and two attentions over different keys made one.
//
// A head's values (tokens, heads, dim) belong to a part of a warp. Groups that are neighbours take neighbouring tokens
// of one head, so that the statistics, (heads, tokens), are read and written in whole sectors; a thread has the vectors
// of two tokens in flight.

#include "launch.cuh"
#include "reduce.h"
#include "softmax.h"

namespace pyckpt {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 2;  // a thread

// Where a thread works. Blocks go through the heads of a tile of tokens first: they are neighbours in memory.
struct Place {
  int lane;
  int64_t batch, head, token, step;  // its tokens are token, token + step

  __device__ __forceinline__ Place(int lanes, int64_t tokens, int64_t heads) {
    const int shift = __ffs(lanes) - 1;
    lane = threadIdx.x & (lanes - 1);
    step = kThreads >> shift;
    const unsigned tiles = static_cast<unsigned>((tokens + step * kTokens - 1) / (step * kTokens));
    const unsigned all = blockIdx.x / static_cast<unsigned>(heads);
    head = blockIdx.x % static_cast<unsigned>(heads);
    batch = all / tiles;
    token = static_cast<int64_t>(all % tiles) * (step * kTokens) + (threadIdx.x >> shift);
  }

  template <class T>
  __device__ __forceinline__ T* row(T* p, const Layout& l, int64_t i) const {
    return p + batch * l.batch + i * l.token + head * l.head;
  }
};

int64_t blocks_of(int lanes, int64_t batch, int64_t tokens, int64_t heads) {
  return batch * heads * ceil_div(tokens, kThreads / lanes * kTokens);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(const Delta a, const int lanes) {
  const Place place(lanes, a.tokens, a.heads);
  float sums[kTokens] = {};
  for (int d = place.lane * N; d < a.dim; d += lanes * N) {
    Vector<T, N> dout[kTokens], o[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t token = place.token + i * place.step;
      if (token < a.tokens) {
        dout[i] = load<T, N>(place.row(static_cast<const T*>(a.dout), a.of_dout, token) + d);
        o[i] = load<T, N>(place.row(static_cast<const T*>(a.o), a.of_o, token) + d);
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (place.token + i * place.step < a.tokens) {
        float x[N], y[N];
        unpack(dout[i], x);
        unpack(o[i], y);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[i] += x[j] * y[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = place.token + i * place.step;
    const float sum = over_lanes(sums[i], Add(), lanes);
    if (place.lane == 0 && token < a.tokens) {
      const int64_t at = (place.batch * a.heads + place.head) * a.tokens + token;
      a.delta[at] = a.dlse ? sum - a.dlse[at] : sum;
    }
  }
}

template <class T, class S, int N>
__global__ void __launch_bounds__(kThreads) attention_merge_kernel(const MergeParts a, const int lanes) {
  const Place place(lanes, a.tokens, a.heads);
  Merge shares[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = place.token + i * place.step;
    const int64_t at = (place.batch * a.heads + place.head) * a.tokens + token;
    if (token < a.tokens) shares[i] = merged(a.lse[at], a.part_lse[at]);
  }
  __syncwarp();  // all lanes of a row have read its lse before one writes it
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = place.token + i * place.step;
    if (place.lane == 0 && token < a.tokens) {
      a.lse[(place.batch * a.heads + place.head) * a.tokens + token] = shares[i].lse;
    }
  }
  for (int d = place.lane * N; d < a.dim; d += lanes * N) {
    Vector<S, N> o[kTokens];
    Vector<T, N> part[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t token = place.token + i * place.step;
      if (token < a.tokens) {
        o[i] = load<S, N>(place.row(static_cast<const S*>(a.o), a.of_o, token) + d);
        part[i] = load<T, N>(place.row(static_cast<const T*>(a.part_o), a.of_part, token) + d);
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t token = place.token + i * place.step;
      if (token < a.tokens) {
        float x[N], y[N];
        unpack(o[i], x);
        unpack(part[i], y);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = x[j] * shares[i].first + y[j] * shares[i].second;
        store(place.row(static_cast<S*>(a.o), a.of_o, token) + d, pack<S>(x));
      }
    }
  }
}

// Lanes of a head of `dim` values read N at a time.
int lanes_for(int dim, int n) {
  const int lanes = power_of_two(ceil_div(dim, n));
  return lanes < 32 ? lanes : 32;
}

bool layout_wide(const void* p, const Layout& l, int size) {
  return wide(0, {{Input{p, l.batch}, size}, {Input{p, l.token}, size}, {Input{p, l.head}, size}});
}

}  // namespace

void attention_delta(const Delta& a, Dtype dtype, cudaStream_t stream) {
  const int size = size_of(dtype);
  const bool vectors = a.dim * size % 16 == 0 && layout_wide(a.dout, a.of_dout, size) && layout_wide(a.o, a.of_o, size);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const int lanes = lanes_for(a.dim, vectors ? kWide<T> : 1);
    const auto kernel = vectors ? attention_delta_kernel<T, kWide<T>> : attention_delta_kernel<T, 1>;
    launch(kernel, blocks_of(lanes, a.batch, a.tokens, a.heads), kThreads, 0, stream, a, lanes);
  });
}

void attention_merge(const MergeParts& a, Dtype dtype, bool float_out, cudaStream_t stream) {
  const int size = size_of(dtype), size_out = float_out ? 4 : size;
  const bool vectors =
      a.dim * size % 16 == 0 && layout_wide(a.o, a.of_o, size_out) && layout_wide(a.part_o, a.of_part, size);
  with_types(dtype, float_out, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const int lanes = lanes_for(a.dim, vectors ? kWide<T> : 1);
    const auto kernel = vectors ? attention_merge_kernel<T, S, kWide<T>> : attention_merge_kernel<T, S, 1>;
    launch(kernel, blocks_of(lanes, a.batch, a.tokens, a.heads), kThreads, 0, stream, a, lanes);
  });
}

}  // namespace pyckpt
