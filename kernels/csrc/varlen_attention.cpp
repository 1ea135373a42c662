#include "varlen_attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "bf16.h"
#include "isa.h"
#include "vec_exp.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;   // keys of a vector
constexpr int64_t kQueries = 4;  // queries whose sums run side by side

// One head of one sequence: where its tokens lie, in elements.
struct Head {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  int64_t stride;      // from a token to the next, in qkv
  int64_t out_stride;  // and in the output
  int64_t length;
  int64_t dim;
  bool causal;
};

int64_t padded_to(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// What a worker needs for sequences up to a length, made once. Columns fill whole vectors and rows
// whole groups of queries; the padding is finite and never read out.
struct Scratch {
  Scratch(int64_t length, int64_t dim)
      : keys(padded_to(length, kLanes)), width(padded_to(dim, kLanes)),
        q(padded_to(length, kQueries) * dim), k(dim * keys), v(length * width),
        scores(kQueries * keys), out(kQueries * width) {}
  int64_t keys, width;
  std::vector<float> q, k, v, scores, out;
};

// q scaled, keys transposed so that they fill vectors, v as it is; all fp32.
template <typename T>
BLIPFAST_INLINE void unpack(const Head& head, Scratch& s) {
  const auto* q = static_cast<const T*>(head.q);
  const auto* k = static_cast<const T*>(head.k);
  const auto* v = static_cast<const T*>(head.v);
  const int64_t dim = head.dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int64_t i = 0; i < head.length; ++i) {
    const int64_t at = i * head.stride;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
      s.q[i * dim + d] = load(q + at + d) * scale;
      s.v[i * s.width + d] = load(v + at + d);
    }
    for (int64_t d = 0; d < dim; ++d) s.k[d * s.keys + i] = load(k + at + d);
  }
}

// out (kQueries x columns) = left (kQueries x inner) right (inner x columns).
BLIPFAST_INLINE void multiply(const float* left, int64_t left_stride, const float* right,
                              int64_t right_stride, int64_t inner, int64_t columns, float* out,
                              int64_t out_stride) {
  for (int64_t block = 0; block < columns; block += kLanes) {
    float sums[kQueries][kLanes] = {};
    for (int64_t x = 0; x < inner; ++x) {
      const float* line = right + x * right_stride + block;
      for (int64_t i = 0; i < kQueries; ++i) {
        const float factor = left[i * left_stride + x];
#pragma omp simd
        for (int64_t j = 0; j < kLanes; ++j) sums[i][j] += factor * line[j];
      }
    }
    for (int64_t i = 0; i < kQueries; ++i) {
      std::memcpy(out + i * out_stride + block, sums[i], sizeof(sums[i]));
    }
  }
}

// Scores of the first `keys` keys become weights; returns their sum.
BLIPFAST_INLINE float weigh(float* scores, int64_t keys) {
  float peak = std::numeric_limits<float>::lowest(), total = 0.0f;
  bool nan = false;
#pragma omp simd reduction(max : peak) reduction(| : nan)
  for (int64_t j = 0; j < keys; ++j) {
    nan |= scores[j] != scores[j];
    peak = scores[j] > peak ? scores[j] : peak;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < keys; ++j) {
    scores[j] = exp_nonpositive(scores[j] - peak);
    total += scores[j];
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : total;
}

template <typename T>
BLIPFAST_INLINE void attend(const Head& head, Scratch& s) {
  unpack<T>(head, s);
  const int64_t dim = head.dim;
  for (int64_t first = 0; first < head.length; first += kQueries) {
    const int64_t last = std::min(first + kQueries, head.length);
    const int64_t seen = head.causal ? last : head.length;
    float* scores = s.scores.data();
    multiply(s.q.data() + first * dim, dim, s.k.data(), s.keys, dim, seen, scores, s.keys);
    float totals[kQueries];
    for (int64_t i = first; i < last; ++i) {
      float* weights = scores + (i - first) * s.keys;
      const int64_t keys = head.causal ? i + 1 : head.length;
      totals[i - first] = weigh(weights, keys);
      std::fill(weights + keys, weights + seen, 0.0f);
    }
    multiply(scores, s.keys, s.v.data(), s.width, seen, dim, s.out.data(), s.width);
    for (int64_t i = first; i < last; ++i) {
      const float* sum = s.out.data() + (i - first) * s.width;
      T* out = static_cast<T*>(head.out) + i * head.out_stride;
      const float share = 1.0f / totals[i - first];
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) store(sum[d] * share, out + d);
    }
  }
}

BLIPFAST_MULTI_ISA
void attend_fp32(const Head& head, Scratch& s) { attend<float>(head, s); }
BLIPFAST_MULTI_ISA
void attend_bf16(const Head& head, Scratch& s) { attend<uint16_t>(head, s); }

void check(const Tensor& qkv, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.is_contiguous() &&
                      (qkv.scalar_type() == ScalarType::Float ||
                       qkv.scalar_type() == ScalarType::BFloat16),
                  "varlen_attention: qkv must be contiguous (T, 3, H, head_dim), float32 or bfloat16");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.is_contiguous() &&
                      cu_seqlens.scalar_type() == ScalarType::Int,
                  "varlen_attention: cu_seqlens must be contiguous (N + 1,) int32");
  const auto* starts = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t count = cu_seqlens.size(0) - 1;
  bool good = starts[0] == 0 && starts[count] == qkv.size(0);
  for (int64_t n = 0; n < count; ++n) good &= starts[n] <= starts[n + 1];
  STD_TORCH_CHECK(good, "varlen_attention: cu_seqlens must rise from 0 to the ", qkv.size(0),
                  " tokens of qkv");
}

}  // namespace

Tensor varlen_attention(Tensor qkv, Tensor cu_seqlens, bool causal) {
  check(qkv, cu_seqlens);
  const int64_t heads = qkv.size(2), dim = qkv.size(3), count = cu_seqlens.size(0) - 1;
  const std::array<int64_t, 3> size{qkv.size(0), heads, dim};
  Tensor out = torch::stable::new_empty(qkv, {size.data(), 3});
  const auto* starts = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const bool bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  const int64_t bytes = bf16 ? 2 : 4, width = heads * dim;
  const auto* from = static_cast<const char*>(qkv.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  int64_t longest = 0;
  for (int64_t n = 0; n < count; ++n) {
    longest = std::max<int64_t>(longest, starts[n + 1] - starts[n]);
  }
  torch::stable::parallel_for(0, count * heads, heads, [&](int64_t begin, int64_t end) {
    Scratch scratch(longest, dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / heads, h = task % heads, start = starts[n];
      const char* q = from + (start * 3 * width + h * dim) * bytes;
      const Head head{q,
                      q + width * bytes,
                      q + 2 * width * bytes,
                      to + (start * width + h * dim) * bytes,
                      3 * width,
                      width,
                      starts[n + 1] - start,
                      dim,
                      causal};
      bf16 ? attend_bf16(head, scratch) : attend_fp32(head, scratch);
    }
  });
  return out;
}

}  // namespace blipfast
