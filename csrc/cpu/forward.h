// The forward: tiles of queries of heads that share a key/value head, against block after block of keys, by the online
// softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1). Scores are kept as (keys, queries), so that a
// query has a lane of its own: its maximum and its sum need no step across lanes.
#pragma once

#include <cmath>

#include "dropout.h"

namespace pyckpt {
namespace PYCKPT_ISA {

struct QueryTile {
  int64_t head, first;
  int queries;
  Score score;
  float *columns, *o, *most, *sum, *shrink;  // q turned (d_k, kTile), o (kTile, width), statistics (kTile)
};

static size_t query_tile_floats(const Attention& a) { return kTile * (a.d_k + padded(a.d_v) + 3); }

static size_t forward_scratch(const Attention& a) {
  const size_t rows = kTile * (padded(a.d_k) + padded(a.d_v) + 2 * kTile);
  return rows + kPool * query_tile_floats(a) + kTile * padded(a.d_k);
}

// What is in o and lse already counts as one key more, of score lse and with o as its value.
static void begin_tile(const Attention& a, const Segment& s, QueryTile& t, float* rows) {
  const int64_t k_width = padded(a.d_k), v_width = padded(a.d_v);
  load_rows(a.element, a.q, s.batch, s.q0 + t.first, t.queries, t.head, a.d_k, rows, k_width);
  turn_rows(rows, t.queries, a.d_k, k_width, t.columns);
  std::memset(t.o, 0, sizeof(float) * kTile * v_width);
  if (a.begin == kRunning) load_rows(kFloat32, a.o, s.batch, s.q0 + t.first, t.queries, t.head, a.d_v, t.o, v_width);
  const float* lse = row_of<float>(a.lse, s.batch, s.q0 + t.first, t.head);
  for (int i = 0; i < kTile; ++i) {
    const bool some = a.begin != kNothing && i < t.queries;
    t.most[i] = some ? lse[i * a.lse.seq] : -kInfinity;
    t.sum[i] = t.most[i] == -kInfinity ? 0.0f : 1.0f;
    if (t.sum[i] == 0.0f) std::memset(t.o + i * v_width, 0, sizeof(float) * v_width);
  }
}

// Turns a block's scores of one vector of queries into exp(score - maximum), and brings the statistics forward.
template <bool partly>
static void soften(const Seen& seen, const Score& score, int lane, float* scores, QueryTile& t) {
  long from = 0, to = seen.keys;
  if (partly) seen.keys_of(lane, lane + kLanes, from, to);
  const Vec old = load(t.most + lane), nothing = splat(-kInfinity);
  Vec most = nothing, ignored;
  const bool ready = score.plain && !partly && score.scale > 0.0f;
  for (long key = from; key < to; ++key) {
    float* at = scores + key * kTile + lane;
    Vec x = load(at);
    if (!ready) {
      x = score.of(x, key, lane, ignored);
      if (partly) x = visible(seen, lane, key) ? x : nothing;
      store(at, x);
    }
    most = larger(x, most);  // a NaN is passed over here, and shows in the sum
  }
  const float factor = ready ? score.scale : 1.0f;
  most = larger(ready ? most * factor : most, old);
  const Vec base = most == nothing ? Vec{} : most, shrink = exponential(old - base);
  Vec sum = {};
  clear(scores + lane, 0, from);
  for (long key = from; key < to; ++key) {
    float* at = scores + key * kTile + lane;
    const Vec p = exponential(load(at) * factor - base);
    store(at, p);
    sum += p;
  }
  clear(scores + lane, to, seen.keys);
  store(t.most + lane, most);
  store(t.sum + lane, load(t.sum + lane) * shrink + sum);
  store(t.shrink + lane, shrink);
}

// `factors` (keys, kTile) are dropout's, or null.
static void attend(const Attention& a, const Seen& seen, QueryTile& t, const float* k, const float* v, float* scores,
                   const float* factors) {
  const int64_t v_width = padded(a.d_v);
  products_of_pair(seen, k, a.d_k, t.columns, scores);
  for (int lane = 0; lane < vectors_of(t.queries) * kLanes; lane += kLanes) {
    if (seen.partly)
      soften<true>(seen, t.score, lane, scores, t);
    else
      soften<false>(seen, t.score, lane, scores, t);
  }
  // The sum has all probabilities: what dropout leaves of them is not made to add up to 1.
  if (factors != nullptr) multiply(seen, factors, scores);
  product<End::rescale>(t.queries, static_cast<int>(v_width / kLanes), {scores, 1, kTile}, v, v_width, t.o, v_width,
                         t.shrink, KeysOfQueries{seen});
}

// Writes o and lse of a tile.
static void end_tile(const Attention& a, const Segment& s, QueryTile& t) {
  const int64_t width = padded(a.d_v);
  for (int i = 0; i < t.queries; ++i) {
    const int64_t row = s.q0 + t.first + i;
    float* o = t.o + i * width;
    const double sum = t.sum[i], share = sum == 0.0 ? 0.0 : 1.0 / sum;
    for (int64_t j = 0; j < a.d_v; ++j) o[j] = static_cast<float>(o[j] * share);
    *row_of<float>(a.lse, s.batch, row, t.head) =
        sum == 0.0 ? -kInfinity : static_cast<float>(t.most[i] + ::log(sum));
    store_row(a.o_element, a.o, s.batch, row, t.head, a.d_v, o);
  }
}

static void forward(const Attention& a, const Unit& u, float* scratch) {
  const Segment& s = a.segments[u.segment];
  const Sight sight = sight_of(a, s);
  const int64_t k_width = padded(a.d_k), v_width = padded(a.d_v);
  float* k = scratch;
  float* v = k + kTile * k_width;
  float* scores = v + kTile * v_width;
  float* factors = a.drop_below > 0 ? scores + kTile * kTile : nullptr;
  float* rows = scores + 2 * kTile * kTile;
  float* next = rows + kTile * k_width;
  QueryTile tiles[kPool];
  int n = 0;
  int64_t low = s.sk, high = 0;
  for (int64_t i = 0; i < u.tiles; ++i) {
    for (int64_t h = 0; h < u.heads; ++h) {
      QueryTile& t = tiles[n++];
      t.head = u.head + h;
      t.first = (u.tile + i) * kTile;
      t.queries = static_cast<int>(s.sq - t.first < kTile ? s.sq - t.first : kTile);
      t.score = score_of(a, u.segment, t.head);
      t.columns = next;
      t.o = t.columns + kTile * a.d_k;
      t.most = t.o + kTile * v_width;
      t.sum = t.most + kTile;
      t.shrink = t.sum + kTile;
      next += query_tile_floats(a);
      begin_tile(a, s, t, rows);
      const int64_t first = sight.low(t.first), last = sight.high(t.first + t.queries - 1);
      low = first < low ? first : low;
      high = last > high ? last : high;
    }
  }
  // Blocks begin at multiples of their size, whichever tiles share them: so a tile's result depends on nothing else.
  for (int64_t first = low / kTile * kTile; first < high; first += kTile) {
    const int keys = static_cast<int>(s.sk - first < kTile ? s.sk - first : kTile);
    load_rows(a.element, a.k, s.batch, s.k0 + first, keys, u.kv_head, a.d_k, k, k_width);
    load_rows(a.element, a.v, s.batch, s.k0 + first, keys, u.kv_head, a.d_v, v, v_width);
    for (int i = 0; i < n; ++i) {
      QueryTile& t = tiles[i];
      const Seen seen = seen_by(sight, t.first, t.queries, first, keys);
      long from, to;
      if (!seen.keys_of(0, kTile, from, to)) continue;
      t.score.distance = t.first + s.offset - first;
      if (factors != nullptr)
        draw(a, seen, a.first_sequence + u.segment, t.head, a.first_key + t.first + s.offset, a.first_key + first, factors);
      attend(a, seen, t, k, v, scores, factors);
    }
  }
  for (int i = 0; i < n; ++i) end_tile(a, s, tiles[i]);
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
