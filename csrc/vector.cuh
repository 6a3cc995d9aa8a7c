// Vectors of up to 16 bytes a load, for float16, bfloat16 and float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pyckpt {

using half = __half;
using bfloat16 = __nv_bfloat16;

// Elements of T in 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);

// N elements as they lie in memory.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T v[N];
};

namespace detail {

template <int BYTES>
struct Word {
  using type = uint4;  // more than 16 bytes: several of them
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

}  // namespace detail

template <class T, int N>
using WordOf = typename detail::Word<sizeof(Vector<T, N>)>::type;

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* p) {
  using W = WordOf<T, N>;
  Vector<T, N> out;
#pragma unroll
  for (unsigned i = 0; i < sizeof(out) / sizeof(W); ++i) {
    reinterpret_cast<W*>(&out)[i] = reinterpret_cast<const W*>(p)[i];
  }
  return out;
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v) {
  using W = WordOf<T, N>;
#pragma unroll
  for (unsigned i = 0; i < sizeof(v) / sizeof(W); ++i) {
    reinterpret_cast<W*>(p)[i] = reinterpret_cast<const W*>(&v)[i];
  }
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ half from_float<half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// As float32.
template <class T, int N>
__device__ __forceinline__ void unpack(const Vector<T, N>& v, float (&out)[N]) {
  if constexpr (N % 2 == 0 && std::is_same_v<T, bfloat16>) {  // a bfloat16 is the upper half of a float
    const uint32_t* words = reinterpret_cast<const uint32_t*>(v.v);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      out[i] = detail::float_of(words[i / 2] << 16);
      out[i + 1] = detail::float_of(words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(v.v[i]);
  }
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> pack(const float (&in)[N]) {
  Vector<T, N> out;
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {  // two values to an instruction
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        reinterpret_cast<__nv_bfloat162*>(out.v)[i / 2] = __floats2bfloat162_rn(in[i], in[i + 1]);
      } else {
        reinterpret_cast<__half2*>(out.v)[i / 2] = __floats2half2_rn(in[i], in[i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(in[i]);
  }
  return out;
}

// Hides from the compiler that v is what it was, so that it keeps v and not the floats that it made of it.
template <class T, int N>
__device__ __forceinline__ void forget(Vector<T, N>& v) {
  static_assert(sizeof(v) % 4 == 0 || sizeof(v) == 2);
  if constexpr (sizeof(v) % 4 == 0) {
#pragma unroll
    for (unsigned i = 0; i < sizeof(v) / 4; ++i) asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&v)[i]));
  }
}

// N float32 at p + i, which holds float32 or T.
template <class T, int N>
__device__ __forceinline__ void load_mixed(const void* p, bool is_float, int64_t i, float (&out)[N]) {
  if (sizeof(T) == 4 || is_float) {
    unpack(load<float, N>(static_cast<const float*>(p) + i), out);
  } else if constexpr (sizeof(T) != 4) {
    unpack(load<T, N>(static_cast<const T*>(p) + i), out);
  }
}

}  // namespace pyckpt
