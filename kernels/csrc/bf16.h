// bfloat16, which C++17 lacks, to fp32 and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace blipfast {

BLIPFAST_INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// The bits of x rounded to bfloat16 (to nearest, ties to even), for finite or infinite x; of NaN
// those that its payload gives.
BLIPFAST_INLINE uint32_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// The same for any x: NaN stays NaN.
BLIPFAST_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = bf16_bits(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : bits);
}

// An element of either dtype as fp32, and back.
BLIPFAST_INLINE float load(const float* from) { return *from; }
BLIPFAST_INLINE float load(const uint16_t* from) { return bf16_to_float(*from); }
BLIPFAST_INLINE void store(float value, float* to) { *to = value; }
BLIPFAST_INLINE void store(float value, uint16_t* to) { *to = float_to_bf16(value); }

}  // namespace blipfast
