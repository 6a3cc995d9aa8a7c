// Sums of exponentials that are carried by their maximum, and what merges or differentiates them.
#pragma once

#include "portable.h"

namespace pyckpt {

// sum of exp(z - most), carried with the maximum (Milakov & Gimelshein 2018).
struct Exponentials {
  float most, sum;
};

PYCKPT_FUNCTION Exponentials no_exponentials() { return {-INFINITY, 0.0f}; }

// exp(a - b) where a may be -inf, and b too: then a adds nothing.
PYCKPT_FUNCTION float shifted_exp(float a, float b) { return a == -INFINITY ? 0.0f : expf(a - b); }

// NaN in either shows in the result.
PYCKPT_FUNCTION Exponentials combined(Exponentials a, Exponentials b) {
  const float most = a.most >= b.most || a.most != a.most ? a.most : b.most;
  return {most, a.sum * shifted_exp(a.most, most) + b.sum * shifted_exp(b.most, most)};
}

PYCKPT_FUNCTION float log_sum(Exponentials e) { return e.most + logf(e.sum); }

// Two attentions over different keys as one: their log-sum-exps merged, and the share of each in the output.
struct Merge {
  float lse, first, second;
};

// The shares come from the parts' distances to their maximum: from the distance to lse they would have its rounding.
PYCKPT_FUNCTION Merge merged(float lse0, float lse1) {
  const float most = lse0 >= lse1 || lse0 != lse0 ? lse0 : lse1;
  if (most == -INFINITY) return {-INFINITY, 0.0f, 0.0f};
  const float first = expf(lse0 - most), second = expf(lse1 - most), sum = first + second;
  return {most + logf(sum), first / sum, second / sum};
}

}  // namespace pyckpt
