// Philox4x32-10, a counter-based random number generator, for many counters side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "isa.h"

namespace blipfast {

constexpr int64_t kPhiloxLanes = 16;

// Dropout with 16 random bits an element: how many of 65,536 are dropped, and what scales the rest.
inline uint32_t dropped_of(double p) {
  return static_cast<uint32_t>(std::min(std::lround(p * 65536.0), 65535L));
}
BLIPFAST_INLINE float kept_scale(uint32_t dropped) {
  return 65536.0f / (65536.0f - static_cast<float>(dropped));
}

// Counters c (word, lane) become random words, under the key.
BLIPFAST_INLINE void philox(uint32_t (*c)[kPhiloxLanes], uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int64_t i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t first = static_cast<uint64_t>(c[0][i]) * 0xD2511F53u;
      const uint64_t second = static_cast<uint64_t>(c[2][i]) * 0xCD9E8D57u;
      const uint32_t c1 = c[1][i], c3 = c[3][i];
      c[0][i] = static_cast<uint32_t>(second >> 32) ^ c1 ^ key_low;
      c[1][i] = static_cast<uint32_t>(second);
      c[2][i] = static_cast<uint32_t>(first >> 32) ^ c3 ^ key_high;
      c[3][i] = static_cast<uint32_t>(first);
    }
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

}  // namespace blipfast
