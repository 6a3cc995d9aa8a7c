// The functions that the CUDA kernels are made of, built for the host: test_cuda_functions.py calls them by ctypes.

#include "activation.h"
#include "philox.h"
#include "reduce.h"
#include "rotation.h"
#include "softmax.h"

namespace pyckpt {

// What the 32 lanes of a warp hold.
template <class V>
struct Lanes {
  V v[32];
};

template <class V>
Lanes<V> exchanged(const Lanes<V>& all, int distance) {
  Lanes<V> out;
  for (int i = 0; i < 32; ++i) out.v[i] = all.v[i ^ distance];
  return out;
}

template <class Op>
struct InEveryLane {
  template <class V>
  Lanes<V> operator()(const Lanes<V>& a, const Lanes<V>& b) const {
    Lanes<V> out;
    for (int i = 0; i < 32; ++i) out.v[i] = Op()(a.v[i], b.v[i]);
    return out;
  }
};

template <Activation F>
void apply(int64_t n, const float* x, float* value, float* value_too, float* slope) {
  for (int64_t i = 0; i < n; ++i) {
    value[i] = phi<F>(x[i]);
    const ValueAndSlope both = phi_and_slope<F>(x[i]);
    value_too[i] = both.value;
    slope[i] = both.slope;
  }
}

}  // namespace pyckpt

using namespace pyckpt;

extern "C" {

void activation(int function, int64_t n, const float* x, float* value, float* value_too, float* slope) {
  switch (static_cast<Activation>(function)) {
    case Activation::silu:
      return apply<Activation::silu>(n, x, value, value_too, slope);
    case Activation::gelu:
      return apply<Activation::gelu>(n, x, value, value_too, slope);
    case Activation::gelu_tanh:
      return apply<Activation::gelu_tanh>(n, x, value, value_too, slope);
    case Activation::relu2:
      return apply<Activation::relu2>(n, x, value, value_too, slope);
  }
}

// words (n, 4) of counters (n, 4)
void philox_words(uint64_t key, int64_t n, const uint32_t* counters, uint32_t* words) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t* c = counters + 4 * i;
    const Words w = philox(key, c[0], c[1], c[2], c[3]);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = w.w[j];
  }
}

// keep (rows, width), as a thread of the dropout kernel decides it
void kept_rows(uint64_t seed, int64_t first, int64_t rows, int64_t width, uint32_t threshold, uint8_t* keep) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      keep[r * width + c] = kept(row_words(seed, first + r, c / 4).w[c % 4], threshold);
    }
  }
}

void rotate_pairs(int64_t n, float* a, float* b, const float* cos, const float* sin) {
  for (int64_t i = 0; i < n; ++i) rotate(a[i], b[i], cos[i], sin[i]);
}

void merge(int64_t n, const float* lse0, const float* lse1, float* lse, float* first, float* second) {
  for (int64_t i = 0; i < n; ++i) {
    const Merge m = merged(lse0[i], lse1[i]);
    lse[i] = m.lse;
    first[i] = m.first;
    second[i] = m.second;
  }
}

void sum_over_lanes(const float* values, int lanes, float* sums) {
  Lanes<float> all;
  for (int i = 0; i < 32; ++i) all.v[i] = values[i];
  all = over_lanes(all, InEveryLane<Add>(), lanes);
  for (int i = 0; i < 32; ++i) sums[i] = all.v[i];
}

// log-sum-exp as a block makes it: every thread its own columns, then lanes, then warps
float log_sum_exp(int64_t n, const float* z, int warps) {
  Exponentials parts[32];
  for (int w = 0; w < warps; ++w) {
    Lanes<Exponentials> all;
    for (int lane = 0; lane < 32; ++lane) {
      Exponentials mine = no_exponentials();
      for (int64_t i = w * 32 + lane; i < n; i += 32 * warps) mine = combined(mine, {z[i], 1.0f});
      all.v[lane] = mine;
    }
    parts[w] = over_lanes(all, InEveryLane<Combine>()).v[w % 32];
  }
  return log_sum(over_warps(parts, warps, Combine()));
}

float sum_over_warps(const float* parts, int warps) { return over_warps(parts, warps, Add()); }

void reciprocal_roots(int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = reciprocal_root(x[i]);
}

}  // extern "C"
