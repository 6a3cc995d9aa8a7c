// Vectors of floats as the compiler has them, for an instruction set that is named by the compiler's options:
// PYCKPT_LANES floats each, in the namespace PYCKPT_ISA, since the same sources are compiled for several.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
// GCC 12 warns of what its own header leaves open on purpose.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#ifndef PYCKPT_ISA
#error "compiled by csrc/build.py, once for each instruction set"
#endif

#define PYCKPT_INLINE static inline __attribute__((always_inline))

namespace pyckpt {
namespace PYCKPT_ISA {

constexpr int kLanes = PYCKPT_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef Vec LooseVec __attribute__((aligned(4), may_alias));
typedef Ints LooseInts __attribute__((aligned(4), may_alias));

PYCKPT_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
PYCKPT_INLINE Ints load(const int32_t* p) { return *reinterpret_cast<const LooseInts*>(p); }
PYCKPT_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
PYCKPT_INLINE Vec splat(float x) { return x - Vec{}; }
PYCKPT_INLINE Ints splat(int32_t x) { return x - Ints{}; }

PYCKPT_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
PYCKPT_INLINE Vec absolute(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Ints>(x) & 0x7fffffff); }

// 2^x within 2 roundings; 0 below 2^-126, and NaN of NaN. The polynomial is the best of its degree for 2^f on
// [-1/2, 1/2], relative error 2e-9.
PYCKPT_INLINE Vec exp2(Vec x) {
  const Vec least = splat(-127.0f), most = splat(128.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to integers
  Vec t = x < least ? least : x;  // in this order a NaN stays
  t = t > most ? most : t;
  const Vec shifted = t + magic, f = t - (shifted - magic);
  Vec y = splat(1.5345811e-4f);
  y = y * f + 1.3399931e-3f;
  y = y * f + 9.618489e-3f;
  y = y * f + 5.5503286e-2f;
  y = y * f + 0.24022646f;
  y = y * f + 0.6931472f;
  y = y * f + 1.0f;
  const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;  // the magic number's own bits are shifted out
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<Ints>(y) + exponent);
  const Vec flushed = x < splat(-126.0f) ? Vec{} : power;
  return x == x ? flushed : x;  // the low bits of a NaN would have gone into the exponent, and made it a number
}

// tanh x: an odd polynomial where 1 - 2 / (e^2x + 1) would lose bits, relative error 5e-9 there.
PYCKPT_INLINE Vec tanh(Vec x) {
  const Vec z = x * x, size = absolute(x);
  Vec small = splat(-5.679235e-3f);
  small = small * z + 2.0618064e-2f;
  small = small * z - 5.3733982e-2f;
  small = small * z + 0.13331383f;
  small = small * z - 0.3333328f;
  small = small * z * x + x;
  const Vec large = 1.0f - 2.0f / (exp2(size * 2.8853901f) + 1.0f);
  return size < splat(0.625f) ? small : (x < Vec{} ? -large : large);
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
