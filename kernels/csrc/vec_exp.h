// exp and log for loops that the compiler vectorises: no branch, no table, no call.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace blipfast {

// e^x for x <= 0, within 2 units in the last place; below -87 it stays at e^-87 (about 1e-38).
// NaN gives NaN. Range reduction to |r| <= ln(2)/2, then the Taylor polynomial of degree 7.
BLIPFAST_INLINE float exp_nonpositive(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + magic;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const float k = shifted - magic;
  // ln(2) in two parts, so that k * ln(2) loses nothing.
  float r = x - k * 0.693145751953125f;
  r = r - k * 1.428606765330187e-6f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t power_bits = (static_cast<uint32_t>(bits) + 127u) << 23;
  float power;
  std::memcpy(&power, &power_bits, sizeof(power));
  return p * power;
}

// log x for normal x > 0, within 2 units in the last place (Cephes). NaN gives NaN, 0 a number below
// -87.
BLIPFAST_INLINE float log_positive(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // x = m 2^e with m from sqrt(1/2) to sqrt(2)
  const int32_t shifted = bits - 0x3f3504f3;
  const float e = static_cast<float>(shifted >> 23);
  const int32_t mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
  float m;
  std::memcpy(&m, &mantissa, sizeof(m));
  m -= 1.0f;
  const float square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * square - 2.12194440e-4f * e - 0.5f * square;
  const float log = m + p + 0.693359375f * e;
  return x != x ? x : log;
}

}  // namespace blipfast
