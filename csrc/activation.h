// The MLP's functions and their derivatives.
#pragma once

#include "portable.h"

namespace pyckpt {

enum class Activation { silu, gelu, gelu_tanh, relu2 };

struct ValueAndSlope {
  float value, slope;
};

PYCKPT_FUNCTION float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

// The probability that a normal number is below x.
PYCKPT_FUNCTION float normal_below(float x) { return 0.5f + 0.5f * erff(x * 0.70710678118654752f); }

// GELU's tanh form is x times a sigmoid of this, since (1 + tanh u) / 2 = sigmoid(2 u).
PYCKPT_FUNCTION float gelu_tanh_argument(float x) { return (x + x * x * x * 0.044715f) * 1.5957691216057308f; }

template <Activation F>
PYCKPT_FUNCTION float phi(float x) {
  if constexpr (F == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (F == Activation::gelu) {
    return x * normal_below(x);
  } else if constexpr (F == Activation::gelu_tanh) {
    return x * sigmoid(gelu_tanh_argument(x));
  } else {
    const float r = x < 0.0f ? 0.0f : x;  // a maximum would lose NaN
    return r * r;
  }
}

template <Activation F>
PYCKPT_FUNCTION ValueAndSlope phi_and_slope(float x) {
  if constexpr (F == Activation::silu) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (F == Activation::gelu) {
    const float s = normal_below(x);
    return {x * s, s + x * (expf(-0.5f * x * x) * 0.39894228040143268f)};
  } else if constexpr (F == Activation::gelu_tanh) {
    const float v = gelu_tanh_argument(x), s = sigmoid(v), y = x * s;
    // sigmoid(-v), not 1 - s: the factor after it is large enough to show the difference's rounding.
    return {y, s + y * sigmoid(-v) * ((1.0f + 3.0f * (x * x * 0.044715f)) * 1.5957691216057308f)};
  } else {
    const float r = x < 0.0f ? 0.0f : x;
    return {r * r, 2.0f * r};
  }
}

}  // namespace pyckpt
