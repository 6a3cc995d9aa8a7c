// What the kernels are launched with: plain structures, so that the kernels know nothing of PyTorch and the bindings
// nothing of CUDA C++. Strides are in elements, pointers may be null where that is said, sums are float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyckpt {

enum class Dtype { float16, bfloat16, float32 };

inline int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Rows of values, `stride` apart.
struct Input {
  const void* p = nullptr;
  int64_t stride = 0;
};
struct Output {
  void* p = nullptr;
  int64_t stride = 0;
};

// act = phi(gate) up, or phi(gate) without `up`. Of one dtype; act may be gate. `function` is an Activation.
struct GluForward {
  int64_t rows, width;
  Input gate, up;
  Output act;
};
void glu_forward(const GluForward& a, Dtype dtype, int function, cudaStream_t stream);

// act, dgate, dup from dact, gate, up, and over them if wanted; without `up`, act and dgate from dact and gate.
struct GluBackward {
  int64_t rows, width;
  Input dact, gate, up;
  Output act, dgate, dup;
};
void glu_backward(const GluBackward& a, Dtype dtype, int function, cudaStream_t stream);

}  // namespace pyckpt
