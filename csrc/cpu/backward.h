// The backward (Dao et al. 2022, algorithm 4), one chunk of keys at a time: its k and v, dk and dv stay at hand while
// all tiles of queries pass. Chunks add to a tile's dq in their order, each waiting for its turn: the sums are the same
// whichever threads compute them. Scores are (keys, queries) again, so all five products read what lies there as it lies.
#pragma once

#include "dropout.h"

namespace pyckpt {
namespace PYCKPT_ISA {

struct Chunk {
  int64_t first;
  int keys;
  float *k, *v, *dk, *dv;  // (keys, width)
};

struct GradTile {
  int64_t head, first;
  int queries;
  Score score;
  float *q, *q_columns, *grad_o, *o_columns, *dq;  // (kTile, width), and turned (d, kTile)
  float *lse, *delta, *o_row;                      // (kTile), and a row of o (width)
};

static size_t backward_scratch(const Attention& a) {
  const size_t k_width = padded(a.d_k), v_width = padded(a.d_v), chunk = chunk_keys(a);
  return 2 * chunk * (k_width + v_width) + 3 * kTile * kTile +
         kTile * (2 * k_width + a.d_k + v_width + a.d_v + 2) + v_width;
}

// A statistic of a tile's first query.
PYCKPT_INLINE const float* statistic(const View& view, const Segment& s, const GradTile& t) {
  return row_of<float>(view, s.batch, s.q0 + t.first, t.head);
}

static void load_delta(const Attention& a, const Segment& s, GradTile& t) {
  const float* delta = statistic(a.delta, s, t);
  for (int i = 0; i < t.queries; ++i) t.delta[i] = delta[i * a.delta.seq];
}

// rowsum(do * o) - dlse.
static void make_delta(const Attention& a, const Segment& s, GradTile& t) {
  const int64_t width = padded(a.d_v);
  for (int i = 0; i < t.queries; ++i) {
    load_rows(a.o_element, a.o, s.batch, s.q0 + t.first + i, 1, t.head, a.d_v, t.o_row, width);
    Vec sums = {};
    for (int64_t j = 0; j < width; j += kLanes) sums += load(t.o_row + j) * load(t.grad_o + i * width + j);
    float sum = 0.0f;
    for (int j = 0; j < kLanes; ++j) sum += sums[j];
    t.delta[i] = sum;
  }
  if (a.dlse.data == nullptr) return;
  const float* dlse = statistic(a.dlse, s, t);
  for (int i = 0; i < t.queries; ++i) t.delta[i] -= dlse[i * a.dlse.seq];
}

static void load_tile(const Attention& a, const Segment& s, GradTile& t) {
  const int64_t k_width = padded(a.d_k), v_width = padded(a.d_v);
  load_rows(a.element, a.q, s.batch, s.q0 + t.first, t.queries, t.head, a.d_k, t.q, k_width);
  load_rows(a.element, a.grad_o, s.batch, s.q0 + t.first, t.queries, t.head, a.d_v, t.grad_o, v_width);
  turn_rows(t.q, t.queries, a.d_k, k_width, t.q_columns);
  turn_rows(t.grad_o, t.queries, a.d_v, v_width, t.o_columns);
  const float* lse = statistic(a.lse, s, t);
  for (int i = 0; i < kTile; ++i) {
    // A query that sees nothing has lse = -inf, and one beyond the tile none: p = exp(s - inf) = 0 for both.
    const float x = i < t.queries ? lse[i * a.lse.seq] : -kInfinity;
    t.lse[i] = x == -kInfinity ? kInfinity : x;
    t.delta[i] = 0.0f;
  }
  if (a.delta.data != nullptr)
    load_delta(a, s, t);
  else
    make_delta(a, s, t);
  std::memset(t.dq, 0, sizeof(float) * kTile * k_width);
}

// From the products q k and do v of one vector of queries: the probabilities, and the gradients of q k over scale.
template <bool plain, bool partly>
static void differentiate(const Seen& seen, const GradTile& t, int lane, float* scores, float* slopes) {
  long from = 0, to = seen.keys;
  if (partly) {
    seen.keys_of(lane, lane + kLanes, from, to);
    clear(scores + lane, 0, from);
    clear(slopes + lane, 0, from);
    clear(scores + lane, to, seen.keys);
    clear(slopes + lane, to, seen.keys);
  }
  const Score& score = t.score;
  const Vec lse = load(t.lse + lane), delta = load(t.delta + lane);
  for (long key = from; key < to; ++key) {
    float* p_at = scores + key * kTile + lane;
    float* ds_at = slopes + key * kTile + lane;
    Vec capped = {}, p;
    if (plain)
      p = exponential(load(p_at) * score.scale - lse);
    else
      p = exponential(score.of(load(p_at), key, lane, capped) - lse);
    if (partly) p = visible(seen, lane, key) ? p : Vec{};
    Vec ds = p * (load(ds_at) - delta);
    if (!plain && score.softcap > 0.0f) ds *= 1.0f - capped * capped;
    if (partly) ds = visible(seen, lane, key) ? ds : Vec{};
    store(p_at, p);
    store(ds_at, ds);
  }
}

static void differentiate_all(const Seen& seen, const GradTile& t, float* scores, float* slopes) {
  for (int lane = 0; lane < vectors_of(t.queries) * kLanes; lane += kLanes) {
    if (t.score.plain && seen.partly)
      differentiate<true, true>(seen, t, lane, scores, slopes);
    else if (t.score.plain)
      differentiate<true, false>(seen, t, lane, scores, slopes);
    else
      differentiate<false, true>(seen, t, lane, scores, slopes);
  }
}

// `factors` (keys, kTile) are dropout's, or null.
static void backward_block(const Attention& a, const Seen& seen, GradTile& t, const float* k, const float* v, float* dk,
                           float* dv, float* scores, float* slopes, const float* factors) {
  const int64_t k_width = padded(a.d_k), v_width = padded(a.d_v);
  const int k_vectors = static_cast<int>(k_width / kLanes), v_vectors = static_cast<int>(v_width / kLanes);
  const auto queries = [&](int k0, int k1, int, int, long& from, long& to) {
    return seen.queries_of(k0, k1, from, to);
  };
  products_of_pair(seen, k, a.d_k, t.q_columns, scores);
  products_of_pair(seen, v, a.d_v, t.o_columns, slopes);
  if (factors != nullptr) multiply(seen, factors, slopes);
  differentiate_all(seen, t, scores, slopes);
  if (factors != nullptr) multiply(seen, factors, scores);
  product<End::add>(seen.keys, v_vectors, {scores, kTile, 1}, t.grad_o, v_width, dv, v_width, nullptr, queries);
  product<End::add>(seen.keys, k_vectors, {slopes, kTile, 1}, t.q, k_width, dk, k_width, nullptr, queries);
  product<End::add>(t.queries, k_vectors, {slopes, 1, kTile}, k, k_width, t.dq, k_width, nullptr, KeysOfQueries{seen});
}

static void add_rows(const View& view, int64_t batch, int64_t first, int64_t rows, int64_t head, int64_t d,
                     const float* from, int64_t width, float factor) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = row_of<float>(view, batch, first + r, head);
    if (r + kAhead < rows) fetch(to + kAhead * view.seq, d);
    for (int64_t i = 0; i < d; ++i) to[i] += from[r * width + i] * factor;
  }
}

PYCKPT_INLINE void pause_a_little(int& waited) {
  if (++waited < 64) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    yield_thread();
  }
}

static void backward(const Attention& a, const Unit& u, float* scratch, int32_t* turns) {
  const Segment& s = a.segments[u.segment];
  const Sight sight = sight_of(a, s);
  const int64_t k_width = padded(a.d_k), v_width = padded(a.d_v), size = chunk_keys(a);
  const float scale = static_cast<float>(a.scale);
  Chunk c;
  c.first = u.tile * size;
  c.keys = static_cast<int>(s.sk - c.first < size ? s.sk - c.first : size);
  c.k = scratch;
  c.v = c.k + size * k_width;
  c.dk = c.v + size * v_width;
  c.dv = c.dk + size * k_width;
  float* scores = c.dv + size * v_width;
  float* slopes = scores + kTile * kTile;
  float* factors = a.drop_below > 0 ? slopes + kTile * kTile : nullptr;
  GradTile t;
  t.q = slopes + 2 * kTile * kTile;
  t.dq = t.q + kTile * k_width;
  t.q_columns = t.dq + kTile * k_width;
  t.grad_o = t.q_columns + kTile * a.d_k;
  t.o_columns = t.grad_o + kTile * v_width;
  t.lse = t.o_columns + kTile * a.d_v;
  t.delta = t.lse + kTile;
  t.o_row = t.delta + kTile;
  load_rows(a.element, a.k, s.batch, s.k0 + c.first, c.keys, u.kv_head, a.d_k, c.k, k_width);
  load_rows(a.element, a.v, s.batch, s.k0 + c.first, c.keys, u.kv_head, a.d_v, c.v, v_width);
  std::memset(c.dk, 0, sizeof(float) * size * (k_width + v_width));  // dv lies behind it
  const int64_t tiles = ceil_div(s.sq, kTile);
  for (int64_t i = 0; i < tiles; ++i) {
    t.first = i * kTile;
    t.queries = static_cast<int>(s.sq - t.first < kTile ? s.sq - t.first : kTile);
    const int64_t low = sight.low(t.first), high = sight.high(t.first + t.queries - 1);
    if (low >= c.first + c.keys || high <= c.first || low >= high) continue;
    const int32_t turn = static_cast<int32_t>(u.tile - low / size);
    for (int64_t h = 0; h < u.heads; ++h) {
      t.head = u.head + h;
      t.score = score_of(a, u.segment, t.head);
      load_tile(a, s, t);
      for (int first = 0; first < c.keys; first += kTile) {
        const int keys = c.keys - first < kTile ? c.keys - first : kTile;
        const Seen seen = seen_by(sight, t.first, t.queries, c.first + first, keys);
        long from, to;
        if (!seen.keys_of(0, kTile, from, to)) continue;
        t.score.distance = t.first + s.offset - c.first - first;
        if (factors != nullptr)
          draw(a, seen, a.first_sequence + u.segment, t.head, a.first_key + t.first + s.offset,
               a.first_key + c.first + first, factors);
        backward_block(a, seen, t, c.k + first * k_width, c.v + first * v_width, c.dk + first * k_width,
                       c.dv + first * v_width, scores, slopes, factors);
      }
      int32_t* mine = turns + t.head * tiles + i;
      int waited = 0;
      while (__atomic_load_n(mine, __ATOMIC_ACQUIRE) != turn) pause_a_little(waited);
      add_rows(a.dq, s.batch, s.q0 + t.first, t.queries, t.head, a.d_k, t.dq, k_width, scale);
      __atomic_store_n(mine, turn + 1, __ATOMIC_RELEASE);
    }
  }
  add_rows(a.dk, s.batch, s.k0 + c.first, c.keys, u.kv_head, a.d_k, c.dk, k_width, scale);
  add_rows(a.dv, s.batch, s.k0 + c.first, c.keys, u.kv_head, a.d_v, c.dv, v_width, 1.0f);
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
