// What both directions of attention are made of: packed operands, products of them, exponentials.
//
// All products read their left factor word by word, broadcast, and their right factor by vectors of
// 16 columns. A word holds one fp32 number, or a pair of bf16 along the dimension that is summed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_head.h"
#include "bf16.h"
#include "philox.h"

#if BLIPFAST_CLONES

namespace blipfast {

namespace {

template <class T>
BLIPFAST_AVX512_BF16 inline __m512 multiply_add(__m512 sum, __m512i left, __m512i right) {
  if constexpr (sizeof(T) == 2) return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
}

// ---- operands

// Rows side by side, and zeros up to `padded` rows.
template <class T>
inline void pack_rows(const Rows<const T>& from, int64_t rows, int64_t dim, int64_t padded,
                      uint32_t* out) {
  T* to = reinterpret_cast<T*>(out);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from.row(r), dim, to + r * dim);
  std::fill_n(to + rows * dim, (padded - rows) * dim, T{0});
}

// Columns become lines: word w of row r is word r of line w. Zeros up to `columns` rows.
template <class T>
BLIPFAST_AVX512 inline void pack_transposed(const Rows<const T>& from, int64_t rows, int64_t dim,
                                            int64_t columns, uint32_t* out) {
  constexpr int64_t kPerWord = HeadSizes<T>::kPerWord;
  for (int64_t first = 0; first < columns; first += kVector) {
    for (int64_t word = 0; word < dim / kPerWord; word += kVector) {
      __m512i lines[kVector];
      for (int64_t i = 0; i < kVector; ++i) {
        const int64_t r = first + i;
        lines[i] = r < rows ? _mm512_loadu_si512(from.row(r) + word * kPerWord)
                            : _mm512_setzero_si512();
      }
      transpose_16x16(lines);
      for (int64_t i = 0; i < kVector; ++i) {
        _mm512_store_si512(out + (word + i) * columns + first, lines[i]);
      }
    }
  }
}

// Words of bf16 from two rows.
BLIPFAST_AVX512 inline __m512i pairs_of(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Words hold what lies above each other: of bf16 lines of pairs of rows, of fp32 the rows. Zeros up
// to `padded` rows.
template <class T>
BLIPFAST_AVX512 inline void pack_lines(const Rows<const T>& from, int64_t rows, int64_t dim,
                                       int64_t padded, uint32_t* out) {
  if constexpr (sizeof(T) == 4) {
    pack_rows(from, rows, dim, padded, out);
  } else {
    for (int64_t r = 0; r < padded; r += 2) {
      const T* upper = r < rows ? from.row(r) : nullptr;
      const T* lower = r + 1 < rows ? from.row(r + 1) : nullptr;
      for (int64_t d = 0; d < dim; d += kVector) {
        __m256i even = _mm256_setzero_si256(), odd = even;
        if (upper) even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper + d));
        if (lower) odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower + d));
        _mm512_store_si512(out + r / 2 * dim + d, pairs_of(even, odd));
      }
    }
  }
}

// ---- products

// The left factor: word `step` of row i is at data[i * row + step * stride].
struct Left {
  const uint32_t* data;
  int64_t row, stride;
};

// kStripRows x (16 kVectors) sums over `steps` words; on top of out where kAdd.
template <class T, int kVectors, bool kAdd>
BLIPFAST_AVX512_BF16 inline void product_tile(const Left& left, const uint32_t* right,
                                              int64_t width, int64_t steps, float* out) {
  __m512 sums[kStripRows][kVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kStripRows; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) {
      sums[i][j] = kAdd ? _mm512_load_ps(out + i * width + j * kVector) : _mm512_setzero_ps();
    }
  }
  const uint32_t* from = left.data;
  for (int64_t step = 0; step < steps; ++step) {
    __m512i line[kVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) line[j] = _mm512_load_si512(right + j * kVector);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStripRows; ++i) {
      const __m512i word = _mm512_set1_epi32(static_cast<int32_t>(from[i * left.row]));
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) {
        sums[i][j] = multiply_add<T>(sums[i][j], word, line[j]);
      }
    }
    from += left.stride;
    right += width;
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kStripRows; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) _mm512_store_ps(out + i * width + j * kVector, sums[i][j]);
  }
}

// out (kStripRows, width) = left right, or += where kAdd; right and out have lines of `width`, a
// multiple of 16.
template <class T, bool kAdd = false>
BLIPFAST_AVX512_BF16 inline void product(const Left& left, const uint32_t* right, int64_t width,
                                         int64_t steps, float* out) {
  int64_t column = 0;
  while (column < width) {
    const int64_t vectors = (width - column) / kVector;
    if (vectors >= 3 && vectors != 4) {
      product_tile<T, 3, kAdd>(left, right + column, width, steps, out + column);
      column += 3 * kVector;
    } else if (vectors >= 2) {
      product_tile<T, 2, kAdd>(left, right + column, width, steps, out + column);
      column += 2 * kVector;
    } else {
      product_tile<T, 1, kAdd>(left, right + column, width, steps, out + column);
      column += kVector;
    }
  }
}

// ---- weights

// 2^x for x <= 0, below -126 that of -126; within 1e-7 of it. NaN gives NaN.
BLIPFAST_AVX512 inline __m512 exp2_nonpositive(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // of NaN, the second
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.327647196e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.675541503e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.550713275e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.402211972e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.931469671e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.000000072f));
  return _mm512_scalef_ps(p, whole);
}

// The first columns of a row by vectors: all lanes of each, but of the last those that are left.
struct Columns {
  explicit Columns(int64_t count)
      : used((count + kVector - 1) / kVector),
        tail(static_cast<__mmask16>(0xffff >> (used * kVector - count))) {}
  __mmask16 lanes(int64_t j) const { return j == used - 1 ? tail : __mmask16{0xffff}; }

  int64_t used;
  __mmask16 tail;
};

constexpr float kLog2E = 1.44269504088896341f;

// Scores of a base-2 softmax: times log2(e) / sqrt(dim).
inline float score_scale(int64_t dim) { return kLog2E / std::sqrt(static_cast<float>(dim)); }

// What dropout multiplies a row's weights by: zero, or the kept ones' scale. The draw depends on the
// row's number and the column alone.
BLIPFAST_AVX512 inline void dropout_factors(uint64_t row, int64_t columns, uint32_t dropped,
                                            uint64_t seed, float* out) {
  constexpr int64_t kDraws = 8 * kPhiloxLanes;  // 16 bits each
  const float scale = kept_scale(dropped);
  for (int64_t start = 0; start < columns; start += kDraws) {
    uint32_t c[4][kPhiloxLanes];
    for (uint32_t i = 0; i < kPhiloxLanes; ++i) {
      c[0][i] = static_cast<uint32_t>(row);
      c[1][i] = static_cast<uint32_t>(row >> 32);
      c[2][i] = static_cast<uint32_t>(start / kDraws) * kPhiloxLanes + i;
      c[3][i] = 1;  // apart from the streams of other operators
    }
    philox(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const int64_t vectors = std::min<int64_t>(8, (columns - start) / kVector);
    const __m512i limit = _mm512_set1_epi32(static_cast<int32_t>(dropped));
    for (int64_t j = 0; j < vectors; ++j) {
      __m512i bits = _mm512_loadu_si512(c[j / 2]);
      bits = j % 2 ? _mm512_srli_epi32(bits, 16)
                   : _mm512_and_si512(bits, _mm512_set1_epi32(0xffff));
      const __mmask16 kept = _mm512_cmpge_epu32_mask(bits, limit);
      _mm512_storeu_ps(out + start + j * kVector,
                       _mm512_maskz_mov_ps(kept, _mm512_set1_ps(scale)));
    }
  }
}

// Rounds and writes.
template <class T>
BLIPFAST_AVX512_BF16 inline void write_vector(__m512 value, T* to) {
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
  } else {
    _mm512_storeu_ps(to, value);
  }
}

// The same of a row, whose columns are a multiple of 16.
template <class T>
BLIPFAST_AVX512_BF16 inline void write_row(const float* from, int64_t columns, T* to) {
  for (int64_t d = 0; d < columns; d += kVector) write_vector(_mm512_load_ps(from + d), to + d);
}

}  // namespace

}  // namespace blipfast

#endif
