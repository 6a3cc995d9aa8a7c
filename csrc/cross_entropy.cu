// Cross entropy over a chunk of logits, in place: loss, log-sum-exp and the logits' gradient in one launch.
//
// A block takes a row: once for the log-sum-exp (online, Milakov & Gimelshein 2018), and once more, from its end to its
// start, to write the gradient over it: what was read last is still in the caches. With logits
// z = softcap tanh((raw + bias) / softcap), label t and smoothing e:
//
//     loss = lse - (1 - e) z_t - e mean(z) + z_loss lse^2
//     dz_j = upstream ((1 + 2 z_loss lse) exp(z_j - lse) - (1 - e) [j = t] - e / V)
//     draw = dz (1 - (z / softcap)^2)

#include "launch.cuh"
#include "reduce.h"
#include "softmax.h"

namespace pyckpt {
namespace {

constexpr int kMost = 1024;
constexpr int kVectors = 2;  // in flight in a thread
// A row longer than this has a multiprocessor to itself, so that the rows in flight fit the L2 cache.
constexpr int64_t kLongRow = 128 << 10;

// Logits z of N columns from c on; t is tanh of the uncapped ratio.
template <class T, int N, bool CAPPED>
__device__ __forceinline__ void logits_of(const CrossEntropy& a, const Vector<T, N>& raw, int64_t c, float (&z)[N],
                                          float (&t)[N]) {
  unpack(raw, z);
  if (a.bias) {
    float b[N];
    load_mixed<T, N>(a.bias, a.float_bias, c, b);
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] += b[j];
  }
  if constexpr (CAPPED) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      t[j] = tanhf(z[j] / a.softcap);
      z[j] = a.softcap * t[j];
    }
  }
}

struct Count {
  Exponentials exponentials;
  float plain;  // the sum of z

  template <int N>
  __device__ __forceinline__ void add(const float (&z)[N]) {
    float most = exponentials.most;
#pragma unroll
    for (int j = 0; j < N; ++j) most = fmaxf(most, z[j]);
    const float from = most == -INFINITY ? 0.0f : most;  // exp(-inf - -inf) would be NaN
    float sum = exponentials.sum * expf(exponentials.most - from);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum += expf(z[j] - from);
      plain += z[j];
    }
    exponentials = {most, sum};
  }
};

// What is the same for all columns of a row.
struct Row {
  int64_t label;
  bool ignored;
  float lse, factor, share, upstream, at_label;
};

template <class T, int N, bool CAPPED>
__device__ __forceinline__ Vector<T, N> gradient_of(const CrossEntropy& a, const Row& row, const Vector<T, N>& raw,
                                                    int64_t c) {
  float z[N], t[N];
  logits_of<T, N, CAPPED>(a, raw, c, z, t);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float d = expf(z[j] - row.lse) * row.factor - row.share;
    if (c + j == row.label) d -= row.at_label;
    d *= row.upstream;
    if constexpr (CAPPED) d *= 1.0f - t[j] * t[j];
    z[j] = row.ignored ? 0.0f : d;  // whatever the logits hold
  }
  return pack<T>(z);
}

// N: the vectors that rows are read in; the columns beyond the last whole one are read singly.
template <class T, int N, bool CAPPED>
__global__ void __launch_bounds__(kMost, 1) cross_entropy_kernel(const CrossEntropy a) {
  __shared__ Exponentials parts[kMost / 32];
  __shared__ float sums[kMost / 32];
  T* logits = at<T>(a.logits, blockIdx.x);
  const int64_t step = static_cast<int64_t>(blockDim.x) * N, first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t whole = a.vocab / N * N;
  Row row{};
  row.label = a.target[blockIdx.x];
  row.ignored = row.label == a.ignore_index;
  if (a.loss) {
    float loss = 0.0f;
    if (!row.ignored) {
      const bool inside = row.label >= 0 && row.label < a.vocab;
      float picked[1] = {0.0f}, ratio[1];
      if (inside) logits_of<T, 1, CAPPED>(a, load<T, 1>(logits + row.label), row.label, picked, ratio);
      Count count{no_exponentials(), 0.0f};
      for (int64_t start = first; start < whole; start += step * kVectors) {
        Vector<T, N> raw[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (start + i * step < whole) raw[i] = load<T, N>(logits + start + i * step);
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (start + i * step < whole) {
            float z[N], t[N];
            logits_of<T, N, CAPPED>(a, raw[i], start + i * step, z, t);
            count.add(z);
          }
        }
      }
      for (int64_t c = whole + threadIdx.x; c < a.vocab; c += blockDim.x) {
        float z[1], t[1];
        logits_of<T, 1, CAPPED>(a, load<T, 1>(logits + c), c, z, t);
        count.add(z);
      }
      const float plain = over_block(count.plain, Add(), sums);
      // What over_block waits for in here also lets no thread write the gradient where another still reads the label.
      row.lse = log_sum(over_block(count.exponentials, Combine(), parts));
      const float width = static_cast<float>(a.vocab);
      loss = row.lse - (1.0f - a.smoothing) * picked[0] + a.z_loss * row.lse * row.lse;
      // Not by a factor of 0: a logit of -inf (padding of the vocabulary) makes the mean one.
      if (a.smoothing != 0.0f) loss -= a.smoothing * (plain / width);
      if (!inside) loss = NAN;  // where nobody checked the labels
    }
    if (threadIdx.x == 0) {
      a.loss[blockIdx.x] = loss;
      a.lse[blockIdx.x] = row.lse;
    }
  } else {
    row.lse = a.lse[blockIdx.x];
  }
  if (!a.gradient) return;
  row.upstream = a.upstream ? a.upstream[blockIdx.x] : 1.0f;
  row.factor = 1.0f + 2.0f * a.z_loss * row.lse;
  row.share = a.smoothing / static_cast<float>(a.vocab);
  row.at_label = 1.0f - a.smoothing;
  for (int64_t c = whole + threadIdx.x; c < a.vocab; c += blockDim.x) {
    store(logits + c, gradient_of<T, 1, CAPPED>(a, row, load<T, 1>(logits + c), c));
  }
  const int64_t turns = (whole + step * kVectors - 1) / (step * kVectors);
  for (int64_t turn = turns - 1; turn >= 0; --turn) {
    const int64_t start = first + turn * step * kVectors;
    Vector<T, N> raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (start + i * step < whole) raw[i] = load<T, N>(logits + start + i * step);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t c = start + i * step;
      if (c < whole) store(logits + c, gradient_of<T, N, CAPPED>(a, row, raw[i], c));
    }
  }
}

int threads_for(int64_t vectors, int64_t row_bytes) {
  if (row_bytes > kLongRow) return kMost;
  const int threads = power_of_two(ceil_div(vectors, kVectors));
  return threads < 128 ? 128 : threads > 512 ? 512 : threads;
}

}  // namespace

void cross_entropy(const CrossEntropy& a, Dtype dtype, cudaStream_t stream) {
  const int size = size_of(dtype);
  const bool vectors = wide(0, {{a.logits, size}, {Input{a.bias, 0}, size}});
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kWide<T>;
    const int threads = threads_for(vectors ? a.vocab / N : a.vocab, a.vocab * size);
    const auto capped = vectors ? cross_entropy_kernel<T, N, true> : cross_entropy_kernel<T, 1, true>;
    const auto plain = vectors ? cross_entropy_kernel<T, N, false> : cross_entropy_kernel<T, 1, false>;
    launch(a.softcap != 0.0f ? capped : plain, a.rows, threads, 0, stream, a);
  });
}

}  // namespace pyckpt
