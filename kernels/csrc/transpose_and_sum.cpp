#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>

#include "avx512.h"
#include "bf16.h"
#include "isa.h"
#include "training.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if BLIPFAST_CLONES

constexpr int64_t kColumns = 16;          // of a block: a vector of fp32
constexpr int64_t kStrip = 2 * kColumns;  // of a strip: a line of bf16, two of fp32

// Rows of a block fill a line of the transpose.
template <class T>
constexpr int64_t kRows = 64 / static_cast<int64_t>(sizeof(T));

BLIPFAST_AVX512 inline __mmask32 first_of(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << count) - 1);
}

// Loads rows [row, row + 16) of x (rows, columns) from `first`, with zeros beyond the edges; returns
// their sum.
BLIPFAST_AVX512 inline __m512 load_block(const float* x, int64_t rows, int64_t columns,
                                         int64_t row, int64_t first, __m512i* v) {
  __m512 total = _mm512_setzero_ps();
  const auto valid = static_cast<__mmask16>(first_of(std::min(kColumns, columns - first)));
  for (int64_t i = 0; i < 16; ++i) {
    __m512 line = _mm512_setzero_ps();
    if (row + i < rows) line = _mm512_maskz_loadu_ps(valid, x + (row + i) * columns + first);
    total = _mm512_add_ps(total, line);
    v[i] = _mm512_castps_si512(line);
  }
  return total;
}

// The same of 32 rows in bf16, two neighbours in each element.
BLIPFAST_AVX512 inline __m512 load_block(const uint16_t* x, int64_t rows, int64_t columns,
                                         int64_t row, int64_t first, __m512i* v) {
  __m512 total = _mm512_setzero_ps();
  const auto valid = static_cast<__mmask16>(first_of(std::min(kColumns, columns - first)));
  for (int64_t pair = 0; pair < 16; ++pair) {
    const int64_t r = row + 2 * pair;
    const uint16_t* at = x + r * columns + first;
    __m256i even = _mm256_setzero_si256(), odd = even;
    if (r < rows) even = _mm256_maskz_loadu_epi16(valid, at);
    if (r + 1 < rows) odd = _mm256_maskz_loadu_epi16(valid, at + columns);
    const __m512i low = _mm512_cvtepu16_epi32(even);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
    total = _mm512_add_ps(total, _mm512_castsi512_ps(high));
    v[pair] = _mm512_or_si512(low, high);
  }
  return total;
}

BLIPFAST_AVX512 inline void store_first(float* out, int64_t count, __m512i v) {
  _mm512_mask_storeu_epi32(out, static_cast<__mmask16>(first_of(count)), v);
}

BLIPFAST_AVX512 inline void store_first(uint16_t* out, int64_t count, __m512i v) {
  _mm512_mask_storeu_epi16(out, first_of(count), v);
}

inline void store_sum(float sum, float* out) { *out = sum; }
inline void store_sum(float sum, uint16_t* out) { *out = float_to_bf16(sum); }

// Columns [first, first + kStrip) of x (rows, columns) into as many lines of out, and their sums.
template <class T>
BLIPFAST_AVX512 void transpose_strip(const T* x, int64_t rows, int64_t columns, int64_t first,
                                     T* out, T* sums) {
  __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const int64_t blocks = first + kColumns < columns ? 2 : 1;
  for (int64_t row = 0; row < rows; row += kRows<T>) {
    const int64_t length = std::min(kRows<T>, rows - row);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t start = first + block * kColumns;
      __m512i v[16];
      totals[block] = _mm512_add_ps(totals[block], load_block(x, rows, columns, row, start, v));
      transpose_16x16(v);
      const int64_t width = std::min(kColumns, columns - start);
      for (int64_t c = 0; c < width; ++c) store_first(out + (start + c) * rows + row, length, v[c]);
    }
  }
  alignas(64) float sum[kStrip];
  _mm512_store_ps(sum, totals[0]);
  _mm512_store_ps(sum + kColumns, totals[1]);
  const int64_t count = std::min(kStrip, columns - first);
  for (int64_t c = 0; c < count; ++c) store_sum(sum[c], sums + first + c);
}

template <class T>
void transpose(const Tensor& x, Tensor& out, Tensor& sums) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  auto* sum = static_cast<T*>(sums.mutable_data_ptr());
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  torch::stable::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      transpose_strip(from, rows, columns, s * kStrip, to, sum);
    }
  });
}

#endif

}  // namespace

std::tuple<Tensor, Tensor> transpose_and_sum(Tensor x) {
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_contiguous() && (bf16 || x.scalar_type() == ScalarType::Float),
      "transpose_and_sum: takes a contiguous float32 or bfloat16 matrix");
  STD_TORCH_CHECK(isa_level() == 4, "transpose_and_sum: needs AVX-512");
  const std::array<int64_t, 2> shape{x.size(1), x.size(0)};
  Tensor out = torch::stable::new_empty(x, {shape.data(), 2});
  Tensor sums = torch::stable::new_empty(x, {shape.data(), 1});
#if BLIPFAST_CLONES
  if (bf16) {
    transpose<uint16_t>(x, out, sums);
  } else {
    transpose<float>(x, out, sums);
  }
#endif
  return {out, sums};
}

}  // namespace blipfast
