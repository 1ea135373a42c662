// A linear layer of few rows in tiles of 16 outputs x 16 rows, whichever instructions make the sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "avx512.h"
#include "bf16.h"
#include "gelu.h"

namespace blipfast {

constexpr int64_t kFewRowsTile = 16, kFewRowsGroups = 4;

// One layer, or one of several side by side, in T: float, or uint16_t for bf16.
template <class T>
struct FewRows {
  static constexpr int64_t kPerUnit = 4 / sizeof(T);  // elements along K in 4 bytes

  const uint32_t* rows;  // packed: (K / kPerUnit, 16 * groups)
  const T* weight;
  const T* bias;
  T* out;
  int64_t num_rows, groups, inner, size;
  bool gelu;

  int64_t tiles() const { return (size + kFewRowsTile - 1) / kFewRowsTile; }
  int64_t units() const { return inner / kPerUnit; }
  int64_t stride() const { return groups * kFewRowsTile; }
  FewRows operator+(int64_t n) const {
    FewRows other = *this;
    other.rows += n * units() * stride();
    other.weight += n * size * inner;
    other.bias += n * size;
    other.out += n * num_rows * size;
    return other;
  }
};

// The weights of a tile's 16 outputs; where there are fewer, a copy with zeros for the others, since
// whole tiles are read.
template <class T>
const T* tile_weights(const FewRows<T>& layer, int64_t tile, std::vector<T>& copy) {
  const int64_t first = tile * kFewRowsTile, count = std::min(kFewRowsTile, layer.size - first);
  const T* weight = layer.weight + first * layer.inner;
  if (count == kFewRowsTile) return weight;
  copy.assign(kFewRowsTile * layer.inner, T{0});
  std::copy_n(weight, count * layer.inner, copy.data());
  return copy.data();
}

#if BLIPFAST_CLONES

// Sums (16 outputs x 16 rows) of a tile become outputs of a group's rows.
template <class T>
BLIPFAST_AVX512 inline void finish_tile(const float* sums, const FewRows<T>& layer, int64_t group,
                                        int64_t tile) {
  constexpr int64_t kTile = kFewRowsTile;
  const int64_t first = tile * kTile, count = std::min(kTile, layer.size - first);
  __m512i lines[kTile];
  for (int64_t i = 0; i < kTile; ++i) lines[i] = _mm512_load_si512(sums + i * kTile);
  transpose_16x16(lines);
  float bias[kTile] = {};
  for (int64_t j = 0; j < count; ++j) bias[j] = load(layer.bias + first + j);
  const int64_t rows = std::min(kTile, layer.num_rows - group * kTile);
  for (int64_t r = 0; r < rows; ++r) {
    alignas(64) float values[kTile];
    T results[kTile];
    _mm512_store_si512(values, lines[r]);
#pragma omp simd
    for (int64_t j = 0; j < kTile; ++j) values[j] += bias[j];
    if (layer.gelu) {
#pragma omp simd
      for (int64_t j = 0; j < kTile; ++j) values[j] = gelu(values[j]).value;
    }
#pragma omp simd
    for (int64_t j = 0; j < kTile; ++j) store(values[j], results + j);
    std::memcpy(layer.out + (group * kTile + r) * layer.size + first, results, count * sizeof(T));
  }
}

#endif

// Outputs of tiles [begin, end). The first only where amx_bf16_ready(), the others where
// avx512_bf16_ready().
void few_rows_amx(const FewRows<uint16_t>& layer, int64_t begin, int64_t end);
void few_rows_avx512(const FewRows<uint16_t>& layer, int64_t begin, int64_t end);
void few_rows_avx512(const FewRows<float>& layer, int64_t begin, int64_t end);

}  // namespace blipfast
