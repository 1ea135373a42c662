// GELU by the error function, value and slope, for loops that the compiler vectorises.
#pragma once

#include <cmath>

#include "isa.h"
#include "vec_exp.h"

namespace blipfast {

struct Gelu {
  float value;
  float slope;
};

// x Phi(x) and Phi(x) + x phi(x). The normal distribution's tail is that of Abramowitz and Stegun,
// 7.1.26 (error below 1e-7 of Phi), which shares its exponential with the density phi.
BLIPFAST_INLINE Gelu gelu(float x) {
  const float e = exp_nonpositive(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.23164190f * std::fabs(x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * e;
  const float phi = x < 0.0f ? tail : 1.0f - tail;
  return {x * phi, phi + x * e * 0.39894228f};
}

}  // namespace blipfast
