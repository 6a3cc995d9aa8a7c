// Dropout of probabilities: Philox4x32-10 (Salmon et al. 2011) in the lanes of a vector, bit for bit what
// pyckpt/ops/philox.py and the GPU's kernels draw. The key is the seed, the counter (key position / 4, query position,
// head, sequence), the word the key position modulo 4.
#pragma once

#include "tile.h"

namespace pyckpt {
namespace PYCKPT_ISA {

typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

// The upper and lower halves of the products with m.
PYCKPT_INLINE void wide_product(Words a, uint32_t m, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), by = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  high = reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  low = reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), by = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
  high = reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = reinterpret_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  typedef uint64_t Wide __attribute__((vector_size(kLanes * 8)));
  const Wide product = __builtin_convertvector(a, Wide) * static_cast<uint64_t>(m);
  high = __builtin_convertvector(product >> 32, Words);
  low = __builtin_convertvector(product, Words);
#endif
}

struct Philox {
  Words w[4];
};

PYCKPT_INLINE Philox philox(uint64_t seed, Words c0, Words c1, Words c2, Words c3) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    wide_product(c0, 0xD2511F53u, high0, low0);
    wide_product(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What probabilities of a pair are multiplied by, (keys, kTile): 0 or 1 / (1 - rate). `first_query` and `first_key` are
// positions in the whole sequence.
static void draw(const Attention& a, const Seen& seen, int64_t sequence, int64_t head, int64_t first_query,
                 int64_t first_key, float* factors) {
  const Words none = {};
  const Words of_head = none + static_cast<uint32_t>(head), of_sequence = none + static_cast<uint32_t>(sequence);
  const Vec kept = splat(static_cast<float>(a.keep_factor));
  for (int lane = 0; lane < vectors_of(seen.queries) * kLanes; lane += kLanes) {
    Words query;
    for (int i = 0; i < kLanes; ++i) query[i] = static_cast<uint32_t>(first_query + lane + i);
    for (int64_t key = first_key - first_key % 4; key < first_key + seen.keys; key += 4) {
      const Philox drawn = philox(static_cast<uint64_t>(a.seed), none + static_cast<uint32_t>(key / 4), query, of_head,
                                  of_sequence);
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t at = key + i - first_key;
        if (at < 0 || at >= seen.keys) continue;
        const Ints drops = reinterpret_cast<Ints>(drawn.w[i] >> 1) < static_cast<int32_t>(a.drop_below);
        store(factors + at * kTile + lane, drops ? Vec{} : kept);
      }
    }
  }
}

// Products of a pair (keys, kTile) with factors.
static void multiply(const Seen& seen, const float* factors, float* products) {
  for (int key = 0; key < seen.keys; ++key)
    for (int lane = 0; lane < vectors_of(seen.queries) * kLanes; lane += kLanes) {
      float* at = products + key * kTile + lane;
      store(at, load(at) * load(factors + key * kTile + lane));
    }
}

}  // namespace PYCKPT_ISA
}  // namespace pyckpt
