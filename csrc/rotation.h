// Rotary position embedding (Su et al. 2021, eq. 34) of one pair.
#pragma once

#include "portable.h"

namespace pyckpt {

// (a, b) turned by the angle of (cos, sin); by its negative with -sin.
PYCKPT_FUNCTION void rotate(float& a, float& b, float cos, float sin) {
  const float first = a * cos - b * sin;
  b = b * cos + a * sin;
  a = first;
}

}  // namespace pyckpt
