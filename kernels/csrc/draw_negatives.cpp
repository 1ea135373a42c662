#include "draw_negatives.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "isa.h"
#include "philox.h"
#include "vec_exp.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGroups = kPhiloxLanes, kBlock = 4 * kGroups;  // counters at a time, and their numbers

struct Draw {
  const int64_t* query_ids;  // or null
  const int64_t* key_ids;
  float eps;
  int64_t offset, first_row, first_column, num, keys;
  uint32_t seed[2], step, stream;
};

// Numbers u of columns 4 * group to 4 * (group + kGroups) - 1 of a row, strictly between 0 and 1.
BLIPFAST_INLINE void uniforms(const Draw& draw, uint32_t row, uint32_t group, float* u) {
  uint32_t c[4][kGroups];
  for (uint32_t i = 0; i < kGroups; ++i) {
    c[0][i] = group + i;
    c[1][i] = row;
    c[2][i] = draw.step;
    c[3][i] = draw.stream;
  }
  philox(c, draw.seed[0], draw.seed[1]);
  for (int64_t i = 0; i < kGroups; ++i) {
    for (int64_t w = 0; w < 4; ++w) {
      u[4 * i + w] = (static_cast<float>(c[w][i] >> 9) + 0.5f) * 1.1920928955078125e-7f;
    }
  }
}

// log of the sum of exponentials of a row; NaN where one is NaN or infinite upwards.
BLIPFAST_INLINE float log_sum_exp(const float* scores, int64_t keys) {
  float peak = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t j = 0; j < keys; ++j) peak = scores[j] > peak ? scores[j] : peak;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < keys; ++j) total += exp_nonpositive(scores[j] - peak);
  return peak + std::log(total);
}

BLIPFAST_MULTI_ISA
void draw_row(const Draw& draw, int64_t row, const float* scores, float* best, int64_t* out) {
  std::fill_n(best, draw.num, -std::numeric_limits<float>::infinity());
  std::fill_n(out, draw.num, int64_t{-1});
  const float lse = log_sum_exp(scores, draw.keys);
  const int64_t skip = draw.first_column % 4, first_group = draw.first_column / 4;
  for (int64_t start = -skip; start < draw.keys; start += kBlock) {
    float u[kBlock], values[kBlock];
    const auto group = static_cast<uint32_t>(first_group + (start + skip) / 4);
    uniforms(draw, static_cast<uint32_t>(draw.first_row + row), group, u);
    const int64_t from = std::max(start, int64_t{0}), to = std::min(start + kBlock, draw.keys);
    const float* line = scores + from;
    const float* noise = u + (from - start);
    if (draw.eps > 0.0f) {
#pragma omp simd
      for (int64_t j = 0; j < to - from; ++j) {
        const float weight = exp_nonpositive(line[j] - lse) + draw.eps;
        values[j] = log_positive(weight) - log_positive(-log_positive(noise[j]));
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < to - from; ++j) {
        values[j] = (line[j] - lse) - log_positive(-log_positive(noise[j]));
      }
    }
    for (int64_t j = 0; j < to - from; ++j) {
      const int64_t column = from + j;
      // Finite and better than the worst that is kept; NaN compares as neither.
      if (!(values[j] > best[draw.num - 1] && values[j] <= std::numeric_limits<float>::max())) {
        continue;
      }
      const bool excluded = draw.query_ids ? draw.query_ids[row] == draw.key_ids[column]
                                           : row + draw.offset == column;
      if (excluded) continue;
      int64_t place = draw.num - 1;
      for (; place > 0 && best[place - 1] < values[j]; --place) {
        best[place] = best[place - 1];
        out[place] = out[place - 1];
      }
      best[place] = values[j];
      out[place] = column;
    }
  }
}

const int64_t* ids_of(const std::optional<Tensor>& ids, int64_t count) {
  if (!ids.has_value()) return nullptr;
  STD_TORCH_CHECK(ids->dim() == 1 && ids->is_contiguous() && ids->size(0) == count &&
                      ids->scalar_type() == ScalarType::Long,
                  "draw_negatives: ids must be contiguous int64, one for each of ", count);
  return static_cast<const int64_t*>(ids->const_data_ptr());
}

}  // namespace

Tensor draw_negatives(Tensor scores, std::optional<Tensor> query_ids,
                      std::optional<Tensor> key_ids, double eps, int64_t offset, int64_t seed,
                      int64_t step, int64_t stream, int64_t first_row, int64_t first_column,
                      int64_t num) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.is_contiguous() &&
                      scores.scalar_type() == ScalarType::Float,
                  "draw_negatives: scores must be a contiguous float32 matrix");
  STD_TORCH_CHECK(num >= 1 && query_ids.has_value() == key_ids.has_value(),
                  "draw_negatives: needs num >= 1, and ids of both sides or of neither");
  const int64_t rows = scores.size(0), keys = scores.size(1);
  const Draw draw{ids_of(query_ids, rows),
                  ids_of(key_ids, keys),
                  static_cast<float>(eps),
                  offset,
                  first_row,
                  first_column,
                  num,
                  keys,
                  {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                  static_cast<uint32_t>(step),
                  static_cast<uint32_t>(stream)};
  const std::array<int64_t, 2> shape{rows, num};
  Tensor out = torch::stable::new_empty(scores, {shape.data(), 2}, ScalarType::Long);
  const auto* from = static_cast<const float*>(scores.const_data_ptr());
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> best(num);
    for (int64_t r = begin; r < end; ++r) {
      draw_row(draw, r, from + r * keys, best.data(), to + r * num);
    }
  });
  return out;
}

}  // namespace blipfast
