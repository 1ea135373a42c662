// The elementwise part of the streaming softmax. Key-major scores put rows in vector lanes, so
// that maxima and sums need no reduction within a vector. Differences are taken before scaling: the
// largest score then has the weight 1 exactly, whatever the compiler fuses.
#include <algorithm>
#include <cstdint>

#include "bf16.h"
#include "isa.h"
#include "softmax_mean.h"
#include "vec_exp.h"

namespace blipfast {

namespace {

constexpr int64_t kLanes = 64;  // rows handled together: their peaks and sums stay in registers
constexpr int64_t kRun = 64;    // keys summed on their own: long fp32 sums lose digits

BLIPFAST_INLINE void move_peaks(const float* scores, int64_t keys, int64_t rows, int64_t stride,
                                float scale, float* peak, float* fade, float* top) {
  for (int64_t r = 0; r < rows; ++r) top[r] = peak[r];
  for (int64_t k = 0; k < keys; ++k) {
    const float* line = scores + k * stride;
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      top[r] = line[r] > top[r] ? line[r] : top[r];
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    fade[r] = exp_nonpositive((peak[r] - top[r]) * scale);
    peak[r] = top[r];
  }
}

}  // namespace

BLIPFAST_MULTI_ISA
void softmax_block(float* scores, int64_t keys, int64_t rows, int64_t stride, float scale,
                   float* peak, float* total, float* fade) {
  for (int64_t start = 0; start < rows; start += kLanes) {
    const int64_t n = std::min(kLanes, rows - start);
    float top[kLanes], sum[kLanes] = {};
    move_peaks(scores + start, keys, n, stride, scale, peak + start, fade + start, top);
    for (int64_t first = 0; first < keys; first += kRun) {
      float run[kLanes] = {};
      for (int64_t k = first; k < std::min(first + kRun, keys); ++k) {
        float* line = scores + k * stride + start;
#pragma omp simd
        for (int64_t r = 0; r < n; ++r) {
          const float p = exp_nonpositive((line[r] - top[r]) * scale);
          run[r] += p;
          line[r] = p;
        }
      }
      for (int64_t r = 0; r < n; ++r) sum[r] += run[r];
    }
    for (int64_t r = 0; r < n; ++r) total[start + r] = total[start + r] * fade[start + r] + sum[r];
  }
}

BLIPFAST_MULTI_ISA
void softmax_block_bf16(float* scores, int64_t keys, int64_t rows, int64_t stride, float scale,
                        float* peak, float* total, float* fade, uint32_t* weights) {
  for (int64_t start = 0; start < rows; start += kLanes) {
    const int64_t n = std::min(kLanes, rows - start);
    float top[kLanes], sum[kLanes] = {};
    move_peaks(scores + start, keys, n, stride, scale, peak + start, fade + start, top);
    for (int64_t k = 0; k < keys; k += 2) {
      const float* even = scores + k * stride + start;
      const bool pair = k + 1 < keys;
      const float* odd = pair ? even + stride : even;
      const float keep = pair ? 1.0f : 0.0f;
      uint32_t* out = weights + (k / 2) * stride + start;
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) {
        const float a = exp_nonpositive((even[r] - top[r]) * scale);
        const float b = exp_nonpositive((odd[r] - top[r]) * scale) * keep;
        sum[r] += a + b;
        out[r] = bf16_bits(a) | (bf16_bits(b) << 16);
      }
    }
    for (int64_t r = 0; r < n; ++r) total[start + r] = total[start + r] * fade[start + r] + sum[r];
  }
}

BLIPFAST_MULTI_ISA
void fade_and_add(float* mean, const float* fade, const float* update, int64_t rows,
                  int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = fade[r];
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
      mean[r * width + d] = mean[r * width + d] * factor + update[r * width + d];
    }
  }
}

}  // namespace blipfast
