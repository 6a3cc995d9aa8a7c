// What attention on a CPU is asked for, and the plan of its parts: shared by the entry points and the kernels, and laid
// out as pyckpt/ops/attention_cpp.py has it.
#pragma once

#include <cstddef>
#include <cstdint>

// Compiled for several instruction sets: the linker must not have one copy of it for all.
#define PYCKPT_EVERYWHERE inline __attribute__((always_inline))

namespace pyckpt {

enum Element : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What the forward finds in o and lse: nothing, lse alone (sinks), or both, with o float32.
enum BeginWith : int64_t { kNothing = 0, kSinks = 1, kRunning = 2 };

// A tensor (batch, sequence, heads, d) with a unit last stride, or a statistic (batch, heads, sequence). Strides count
// elements.
struct View {
  void* data;
  int64_t batch, seq, head;
};

// One sequence: where its queries and keys lie, and how far its first query stands behind its first key.
struct Segment {
  int64_t batch, q0, sq, k0, sk, offset;
};

struct Attention {
  View q, k, v, o, lse;               // what the forward finds in the last two says `begin`
  View grad_o, delta, dlse;           // of the backward: delta, or none, and then o and dlse (or none) to make it of
  View dq, dk, dv;                    // float32: the backward adds to them
  const float* slopes;                // ALiBi's, one for each head (of each segment), or null
  int64_t slopes_segment;             // their distance between segments
  const Segment* segments;
  int64_t n_segments, heads, kv_heads, d_k, d_v;
  int64_t element, o_element;         // of q, k, v and grad_o; of o
  int64_t left, right;                // visible keys beside a query's own; -1 has no limit
  double scale, softcap;
  int64_t drop_below, seed;           // dropout: the upper 31 bits of a word that drop, 0 for none
  double keep_factor;                 // 1 / (1 - rate)
  int64_t first_sequence, first_key;  // the first segment's number in the whole batch, the first key's position
  int64_t begin, threads;
};

// Queries of a tile, which fill the lanes of vectors, and keys of a block. A multiple of all the products' tiles.
constexpr int kTile = 96;
// Tiles of queries that share a block of keys, once it is loaded.
constexpr int kPool = 4;

// A part of the forward: tiles [tile, tile + tiles) of `heads` heads that share a key/value head.
// A part of the backward: all tiles and heads against one chunk of keys.
struct Unit {
  int64_t segment, kv_head, head, heads, tile, tiles;
};

PYCKPT_EVERYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys of a chunk of the backward, which its part holds as float32 with their gradients.
PYCKPT_EVERYWHERE int64_t chunk_keys(const Attention& a) {
  const int64_t d = a.d_k > a.d_v ? a.d_k : a.d_v;
  return kTile * (d <= 64 ? 6 : d <= 128 ? 4 : 2);
}

// The keys that a query sees: [low, high), empty where high <= low.
struct Sight {
  int64_t left, right, offset, sk;

  PYCKPT_EVERYWHERE int64_t low(int64_t query) const {
    const int64_t first = query + offset - left;
    return left < 0 || first < 0 ? 0 : first;
  }
  PYCKPT_EVERYWHERE int64_t high(int64_t query) const {
    const int64_t last = query + offset + right + 1;
    return right < 0 || last > sk ? sk : last;
  }
};

PYCKPT_EVERYWHERE Sight sight_of(const Attention& a, const Segment& s) { return {a.left, a.right, s.offset, s.sk}; }

// Lets another thread run.
void yield_thread();

// One instruction set's kernels. A part works in `scratch` floats of its thread; `turns` has a number for each query
// tile of each head of each segment: how many chunks of keys have added to its gradient.
struct Kernels {
  const char* name;
  size_t (*forward_scratch)(const Attention&);
  void (*forward)(const Attention&, const Unit&, float* scratch);
  size_t (*backward_scratch)(const Attention&);
  void (*backward)(const Attention&, const Unit&, float* scratch, int32_t* turns);
};

}  // namespace pyckpt
