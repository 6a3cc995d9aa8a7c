// The MLP's activations in one pass over memory: phi(gate) up and phi(x), and backwards that make phi again.
//
// A thread reads two vectors of each input before it computes, so that 64 bytes a thread are in flight forward and 96
// backward. Outputs may be inputs: a value is read before it is written, by the same thread.

#include "activation.h"
#include "launch.cuh"

namespace pyckpt {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // a thread

// Where a thread works: its row, and its first column.
template <int N>
struct Place {
  int64_t row, column;
  __device__ explicit Place(unsigned blocks_a_row) {
    row = blockIdx.x / blocks_a_row;
    column = (static_cast<int64_t>(blockIdx.x % blocks_a_row) * (kThreads * kVectors) + threadIdx.x) * N;
  }
};

template <class T, int N, Activation F>
__global__ void __launch_bounds__(kThreads) glu_fwd_kernel(const GluForward a, const unsigned blocks_a_row) {
  const Place<N> place(blocks_a_row);
  const T* gate = at<T>(a.gate, place.row);
  const T* up = a.up.p ? at<T>(a.up, place.row) : nullptr;
  T* act = at<T>(a.act, place.row);
  Vector<T, N> g[kVectors], u[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = place.column + i * (kThreads * N);
    if (c < a.width) {
      g[i] = load<T, N>(gate + c);
      if (up) u[i] = load<T, N>(up + c);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = place.column + i * (kThreads * N);
    if (c < a.width) {
      float x[N], y[N];
      unpack(g[i], x);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = phi<F>(x[j]);
      if (up) {
        unpack(u[i], y);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] *= y[j];
      }
      store(act + c, pack<T>(x));
    }
  }
}

template <class T, int N, Activation F>
__global__ void __launch_bounds__(kThreads) glu_bwd_kernel(const GluBackward a, const unsigned blocks_a_row) {
  const Place<N> place(blocks_a_row);
  const T* dact = at<T>(a.dact, place.row);
  const T* gate = at<T>(a.gate, place.row);
  const T* up = a.up.p ? at<T>(a.up, place.row) : nullptr;
  T* act = at<T>(a.act, place.row);
  T* dgate = at<T>(a.dgate, place.row);
  T* dup = at<T>(a.dup, place.row);
  Vector<T, N> d[kVectors], g[kVectors], u[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = place.column + i * (kThreads * N);
    if (c < a.width) {
      d[i] = load<T, N>(dact + c);
      g[i] = load<T, N>(gate + c);
      if (up) u[i] = load<T, N>(up + c);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = place.column + i * (kThreads * N);
    if (c < a.width) {
      float da[N], x[N], y[N];
      unpack(d[i], da);
      unpack(g[i], x);
      if (up) {
        unpack(u[i], y);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) y[j] = 1.0f;
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const ValueAndSlope f = phi_and_slope<F>(x[j]);
        x[j] = da[j] * (f.slope * y[j]);
        y[j] = f.value * y[j];
        da[j] = da[j] * f.value;
      }
      if (up) store(dup + c, pack<T>(da));
      store(dgate + c, pack<T>(x));
      store(act + c, pack<T>(y));
    }
  }
}

// launch(T{}, vector length, function) for the types and the widest accesses that the arguments allow.
template <class F>
void with_kernel(Dtype dtype, bool wide, int function, F launch) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const auto with_function = [&](auto n) {
      switch (static_cast<Activation>(function)) {
        case Activation::silu:
          return launch(t, n, std::integral_constant<Activation, Activation::silu>{});
        case Activation::gelu:
          return launch(t, n, std::integral_constant<Activation, Activation::gelu>{});
        case Activation::gelu_tanh:
          return launch(t, n, std::integral_constant<Activation, Activation::gelu_tanh>{});
        case Activation::relu2:
          return launch(t, n, std::integral_constant<Activation, Activation::relu2>{});
      }
    };
    if (wide) {
      with_function(std::integral_constant<int, kWide<T>>{});
    } else {
      with_function(std::integral_constant<int, 1>{});
    }
  });
}

unsigned blocks_a_row(int64_t width, int n) { return grid_of(ceil_div(width, kThreads * kVectors * n)); }

}  // namespace

void glu_forward(const GluForward& a, Dtype dtype, int function, cudaStream_t stream) {
  const int size = size_of(dtype);
  const bool vectors = wide(a.width * size, {{a.gate, size}, {a.up, size}, {a.act, size}});
  with_kernel(dtype, vectors, function, [&](auto t, auto n, auto f) {
    const unsigned each = blocks_a_row(a.width, n.value);
    launch(glu_fwd_kernel<decltype(t), n.value, f.value>, a.rows * each, kThreads, 0, stream, a, each);
  });
}

void glu_backward(const GluBackward& a, Dtype dtype, int function, cudaStream_t stream) {
  const int size = size_of(dtype);
  const bool vectors = wide(a.width * size, {{a.dact, size}, {a.gate, size}, {a.up, size}, {a.act, size}, {a.dgate, size},
                                             {a.dup, size}});
  with_kernel(dtype, vectors, function, [&](auto t, auto n, auto f) {
    const unsigned each = blocks_a_row(a.width, n.value);
    launch(glu_bwd_kernel<decltype(t), n.value, f.value>, a.rows * each, kThreads, 0, stream, a, each);
  });
}

}  // namespace pyckpt
