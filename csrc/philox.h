// Philox4x32-10 (Salmon et al. 2011): four random words for a counter and a key, and nothing kept between calls.
#pragma once

#include "portable.h"

namespace pyckpt {

struct Words {
  uint32_t w[4];
};

PYCKPT_FUNCTION Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_product(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of columns 4 quad ... 4 quad + 3 of a row: the counter of pyckpt.ops.philox.kept_rows.
PYCKPT_FUNCTION Words row_words(uint64_t seed, int64_t row, int64_t quad) {
  return philox(seed, static_cast<uint32_t>(quad), static_cast<uint32_t>(row),
                static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 0u);
}

// Whether dropout keeps the value of this word: its upper 31 bits reach the threshold.
PYCKPT_FUNCTION bool kept(uint32_t word, uint32_t threshold) { return (word >> 1) >= threshold; }

}  // namespace pyckpt
