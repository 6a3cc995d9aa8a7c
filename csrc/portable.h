// What makes device functions compile for the host as well, where the tests hold them against PyTorch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define PYCKPT_FUNCTION __host__ __device__ __forceinline__
#define PYCKPT_DEVICE __device__ __forceinline__
#else
#define PYCKPT_FUNCTION inline
#define PYCKPT_DEVICE inline
#endif

// What only kernels need, on a GPU or emulated.
#if defined(__CUDACC__) || defined(PYCKPT_EMULATED)
#define PYCKPT_KERNELS
#endif

namespace pyckpt {

// 1 / x within 2 roundings; 0 for |x| beyond 2^126.
PYCKPT_FUNCTION float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// 1 / sqrt(x), both steps rounded as IEEE has it: one number a row, whose error is in every value of the row.
PYCKPT_FUNCTION float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(__fsqrt_rn(x));
#else
  return 1.0f / std::sqrt(x);
#endif
}

// a * b, never contracted with an addition.
PYCKPT_FUNCTION float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PYCKPT_FUNCTION uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

}  // namespace pyckpt
