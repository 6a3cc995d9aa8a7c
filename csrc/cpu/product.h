// Products of small matrices whose accumulators stay in registers.
#pragma once

#include "vector.h"

namespace pyckpt {
namespace PYCKPT_ISA {

// What becomes of a product: c is written over, or added to, or shrunk by a factor of each row and added to. The sum is
// complete before that: a long sum has then the rounding of its parts' number, not of all its terms'.
enum class End { write, add, rescale };

struct Matrix {
  const float* data;
  long row, step;  // distances of rows, and of what is summed over
};

// c (R, C vectors) from a (R, k) and b (k, C vectors), whose rows lie b_step apart.
template <int R, int C, End end>
static __attribute__((noinline)) void tile_product(long k, const float* a, long a_row, long a_step, const float* b,
                                                   long b_step, float* c, long c_row, const float* factors) {
  Vec sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[r][j] = Vec{};
  }
  for (long i = 0; i < k; ++i) {
    Vec row[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float x = a[r * a_row];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r][j] += x * row[j];
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float* to = c + r * c_row + j * kLanes;
      if (end == End::add) sums[r][j] += load(to);
      if (end == End::rescale) sums[r][j] += load(to) * factors[r];
      store(to, sums[r][j]);
    }
  }
}

// Accumulators, a row of b and one broadcast value: 16 registers of AVX2, 32 of AVX-512 and NEON.
constexpr bool kManyRegisters = PYCKPT_REGISTERS >= 32;
constexpr int kWidest = kManyRegisters ? 4 : 2;

constexpr int rows_of(int columns) {
  if (!kManyRegisters) return columns == 2 ? 6 : 12;
  return columns == 4 ? 6 : columns == 3 ? 8 : 12;
}

// How many of `left` vectors the next tile takes: 3 and 2 of 5 rather than 4 and 1.
constexpr int next_columns(int left) {
  if (!kManyRegisters) return left < kWidest ? left : kWidest;
  return left == 5 || left == 6 || left == 9 ? 3 : left < kWidest ? left : kWidest;
}

template <int C, End end, class Range>
PYCKPT_INLINE void columns_product(int rows, int first, Matrix a, const float* b, long b_step, float* c, long c_row,
                                   const float* factors, Range range) {
  constexpr int R = rows_of(C);
  for (int r = 0; r < rows; r += R) {
    long from = 0, to = 0;
    if (!range(r, r + R, first * kLanes, (first + C) * kLanes, from, to)) continue;
    tile_product<R, C, end>(to - from, a.data + r * a.row + from * a.step, a.row, a.step,
                              b + from * b_step + first * kLanes, b_step, c + r * c_row + first * kLanes, c_row,
                              factors + r);
  }
}

// c (rows, vectors) from a (rows, k) and b (k, vectors). Rows are rounded up to whole tiles (at most 12): all buffers
// have them. range(r0, r1, c0, c1, from, to) gives the part of k that counts for a tile, false where none does: such a
// tile of c stays as it is.
template <End end, class Range>
PYCKPT_INLINE void product(int rows, int vectors, Matrix a, const float* b, long b_step, float* c, long c_row,
                           const float* factors, Range range) {
  for (int first = 0; first < vectors;) {
    const int columns = next_columns(vectors - first);
    switch (columns) {
      case 1:
        columns_product<1, end>(rows, first, a, b, b_step, c, c_row, factors, range);
        break;
      case 2:
        columns_product<2, end>(rows, first, a, b, b_step, c, c_row, factors, range);
        break;
#if PYCKPT_REGISTERS >= 32
      case 3:
        columns_product<3, end>(rows, first, a, b, b_step, c, c_row, factors, range);
        break;
      default:
        columns_product<4, end>(rows, first, a, b, b_step, c, c_row, factors, range);
#endif
    }
    first += columns;
  }
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
