// Rows of a tensor into float32 and back.
#pragma once

#include <cstring>

#include "attention.h"
#include "vector.h"

namespace pyckpt {
namespace PYCKPT_ISA {

struct Half {
  uint16_t bits;
};
typedef uint16_t Brain;  // the upper half of a float

PYCKPT_INLINE float widened(float x) { return x; }
#if defined(__x86_64__)
PYCKPT_INLINE float widened(Half x) { return _cvtsh_ss(x.bits); }
#else
PYCKPT_INLINE float widened(Half x) {
  __fp16 y;
  std::memcpy(&y, &x, sizeof y);
  return static_cast<float>(y);
}
#endif
PYCKPT_INLINE float widened(Brain x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

PYCKPT_INLINE void narrow(float x, float* to) { *to = x; }
#if defined(__x86_64__)
PYCKPT_INLINE void narrow(float x, Half* to) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
PYCKPT_INLINE void narrow(float x, Half* to) {
  const __fp16 y = static_cast<__fp16>(x);
  std::memcpy(to, &y, sizeof y);
}
#endif
PYCKPT_INLINE void narrow(float x, Brain* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  *to = static_cast<Brain>(x != x ? 0x7fc0 : rounded);
}

constexpr int64_t padded(int64_t d) { return ceil_div(d, kLanes) * kLanes; }

template <class T>
PYCKPT_INLINE T* row_of(const View& view, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.batch + row * view.seq + head * view.head;
}

// A head's rows lie far apart, so that no hardware foresees the next one. kAhead rows on, it has come from the last cache.
constexpr int64_t kAhead = 12;

template <class T>
PYCKPT_INLINE void fetch(const T* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

template <class T>
static void load_rows_as(const View& view, int64_t batch, int64_t first, int64_t rows, int64_t head, int64_t d,
                         float* to, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = row_of<T>(view, batch, first + r, head);
    if (r + kAhead < rows) fetch(from + kAhead * view.seq, d);
    float* row = to + r * width;
    for (int64_t i = 0; i < d; ++i) row[i] = widened(from[i]);
    for (int64_t i = d; i < width; ++i) row[i] = 0.0f;
  }
}

// Rows [first, first + rows) of a head, as float32 (rows, width) with zeros beyond d.
static void load_rows(int64_t element, const View& view, int64_t batch, int64_t first, int64_t rows, int64_t head,
                      int64_t d, float* to, int64_t width) {
  if (element == kFloat32)
    load_rows_as<float>(view, batch, first, rows, head, d, to, width);
  else if (element == kBFloat16)
    load_rows_as<Brain>(view, batch, first, rows, head, d, to, width);
  else
    load_rows_as<Half>(view, batch, first, rows, head, d, to, width);
}

#if !defined(__clang__)  // which has no __builtin_shuffle
// A square of kLanes by kLanes, turned in registers: in each step pairs of rows a distance apart exchange the halves of
// their parts of twice that distance.
template <int distance>
PYCKPT_INLINE void exchange(Vec* square) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & distance ? i - distance + kLanes : i;
    high[i] = i & distance ? i + kLanes : i + distance;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (r & distance) continue;
    const Vec a = square[r], b = square[r + distance];
    square[r] = __builtin_shuffle(a, b, low);
    square[r + distance] = __builtin_shuffle(a, b, high);
  }
}

PYCKPT_INLINE void turn_square(const float* from, int64_t width, float* to) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) square[r] = load(from + r * width);
#if PYCKPT_LANES >= 16
  exchange<8>(square);
#endif
#if PYCKPT_LANES >= 8
  exchange<4>(square);
#endif
  exchange<2>(square);
  exchange<1>(square);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) store(to + r * kTile, square[r]);
}

#endif

// rows (n, width), of which d count, as columns (d, kTile). Columns beyond n are zeros.
static void turn_rows(const float* rows, int64_t n, int64_t d, int64_t width, float* columns) {
#if defined(__clang__)
  const int64_t whole_rows = 0, whole = 0;
#else
  const int64_t whole_rows = n / kLanes * kLanes, whole = d / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t r = 0; r < whole_rows; r += kLanes) turn_square(rows + r * width + i, width, columns + i * kTile + r);
#endif
  for (int64_t i = 0; i < d; ++i) {
    float* column = columns + i * kTile;
    for (int64_t r = i < whole ? whole_rows : 0; r < n; ++r) column[r] = rows[r * width + i];
    for (int64_t r = n; r < kTile; ++r) column[r] = 0.0f;
  }
}

template <class T>
static void store_row_as(const float* from, int64_t d, T* row) {
  for (int64_t i = 0; i < d; ++i) narrow(from[i], row + i);
}

static void store_row(int64_t element, const View& view, int64_t batch, int64_t row, int64_t head, int64_t d,
                      const float* from) {
  if (element == kFloat32)
    store_row_as(from, d, row_of<float>(view, batch, row, head));
  else if (element == kBFloat16)
    store_row_as(from, d, row_of<Brain>(view, batch, row, head));
  else
    store_row_as(from, d, row_of<Half>(view, batch, row, head));
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
