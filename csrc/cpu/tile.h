// A tile of queries against a block of keys: who sees whom, and what becomes of a product q k.
#pragma once

#include "product.h"
#include "rows.h"

namespace pyckpt {
namespace PYCKPT_ISA {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = __builtin_inff();

// Which keys of a block the queries of a tile see: those from low to high, counted from the block's first. Both grow
// with the query. Lanes beyond the tile's queries have the last one's.
struct Seen {
  int32_t low[kTile], high[kTile];
  int keys;     // of the block
  int queries;  // of the tile
  bool partly;  // some query does not see some key

  // The keys that some query of [q0, q1) sees.
  inline bool keys_of(int q0, int q1, long& from, long& to) const {
    from = low[q0];
    to = high[(q1 < kTile ? q1 : kTile) - 1];
    return from < to;
  }

  // The queries that see some key of [k0, k1).
  inline bool queries_of(int k0, int k1, long& from, long& to) const {
    from = 0;
    to = queries;
    if (partly) {
      while (from < to && high[from] <= k0) ++from;
      while (to > from && low[to - 1] >= k1) --to;
    }
    return from < to;
  }
};

// The part of a sum over keys that counts for a tile of a product whose rows are queries.
struct KeysOfQueries {
  const Seen& seen;

  inline bool operator()(int q0, int q1, int, int, long& from, long& to) const {
    to = seen.keys;
    return !seen.partly || seen.keys_of(q0, q1, from, to);
  }
};

static Seen seen_by(const Sight& sight, int64_t first_query, int queries, int64_t first_key, int keys) {
  Seen seen;
  seen.keys = keys;
  seen.queries = queries;
  seen.partly = sight.low(first_query + queries - 1) > first_key || sight.high(first_query) < first_key + keys;
  for (int i = 0; i < kTile; ++i) {
    const int64_t query = first_query + (i < queries ? i : queries - 1);
    int64_t low = sight.low(query) - first_key, high = sight.high(query) - first_key;
    low = low < 0 ? 0 : low > keys ? keys : low;
    high = high < low ? low : high > keys ? keys : high;
    seen.low[i] = static_cast<int32_t>(low);
    seen.high[i] = static_cast<int32_t>(high);
  }
  return seen;
}

// What becomes of a product: s * scale, softcap, ALiBi.
struct Score {
  float scale, softcap, slope;
  bool plain;        // the scale alone
  int64_t distance;  // of the first query to the first key of the pair at hand

  // Of the products of one key with the queries of a vector, the first of which is `lane`. `capped` becomes
  // tanh(s * scale / softcap).
  inline Vec of(Vec s, long key, long lane, Vec& capped) const {
    Vec x = s * scale;
    if (plain) return x;
    if (softcap > 0.0f) {
      capped = tanh(x / softcap);
      x = capped * softcap;
    }
    if (slope != 0.0f) {
      Vec away;
      for (int i = 0; i < kLanes; ++i) away[i] = static_cast<float>(distance + lane + i - key);
      x -= slope * absolute(away);
    }
    return x;
  }
};

static Score score_of(const Attention& a, int64_t segment, int64_t head) {
  Score score;
  score.scale = static_cast<float>(a.scale);
  score.softcap = static_cast<float>(a.softcap);
  score.slope = a.slopes == nullptr ? 0.0f : a.slopes[segment * a.slopes_segment + head];
  score.plain = a.softcap == 0.0 && a.slopes == nullptr;
  score.distance = 0;
  return score;
}

// e^x. Of a difference that was taken first: what is near 1 has then no rounding of large numbers in it.
PYCKPT_INLINE Vec exponential(Vec x) { return exp2(x * kLog2E); }

// True in the lanes whose query sees the key.
PYCKPT_INLINE Ints visible(const Seen& seen, long lane, long key) {
  const Ints at = splat(static_cast<int32_t>(key));
  return (at >= load(seen.low + lane)) & (at < load(seen.high + lane));
}

// Zeros for one vector of queries against the keys of [from, to).
PYCKPT_INLINE void clear(float* scores, long from, long to) {
  for (long key = from; key < to; ++key) store(scores + key * kTile, Vec{});
}

PYCKPT_INLINE int vectors_of(int queries) { return static_cast<int>(ceil_div(queries, kLanes)); }

// rows (keys, width), of which d count, times columns (d, kTile): (keys, kTile), where some query of a tile sees some
// key of it. A sum of more than kChain terms is made of equal parts, for the rounding of a long one.
static void products_of_pair(const Seen& seen, const float* rows, int64_t d, const float* columns, float* products) {
  constexpr int64_t kChain = 96;
  const int64_t parts = ceil_div(d, kChain), part = ceil_div(d, parts), width = padded(d);
  const int vectors = vectors_of(seen.queries);
  int64_t begin = 0, end = part;
  const auto range = [&](int k0, int k1, int q0, int q1, long& from, long& to) {
    const bool some = !seen.partly || (seen.keys_of(q0, q1, from, to) && from < k1 && to > k0);
    from = begin;
    to = end;
    return some;
  };
  product<End::write>(seen.keys, vectors, {rows, width, 1}, columns, kTile, products, kTile, nullptr, range);
  for (begin = part; begin < d; begin = end) {
    end = begin + part < d ? begin + part : d;
    product<End::add>(seen.keys, vectors, {rows, width, 1}, columns, kTile, products, kTile, nullptr, range);
  }
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
