// A vector holds 16 rows of one place along K; each weight is broadcast to it where it lies.
#include "few_rows_tiles.h"

namespace blipfast {

#if BLIPFAST_CLONES

namespace {

BLIPFAST_AVX512_BF16 inline __m512 multiply_add(__m512 sum, const uint32_t* rows,
                                                const uint16_t* weight) {
  const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(weight));
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(rows), (__m512bh)pair);
}

BLIPFAST_AVX512_BF16 inline __m512 multiply_add(__m512 sum, const uint32_t* rows,
                                                const float* weight) {
  return _mm512_fmadd_ps(_mm512_loadu_ps(rows), _mm512_set1_ps(*weight), sum);
}

// Sums of kOutputs outputs (weight's lines) for all groups of rows, a tile of sums after the other.
// Each step fetches what comes next in memory: the lines of the outputs that follow.
template <class T, int kGroups, int kOutputs>
BLIPFAST_AVX512_BF16 void sums_of(const FewRows<T>& layer, const T* weight, float* sums) {
  constexpr int64_t kPerUnit = FewRows<T>::kPerUnit;
  const int64_t units = layer.units();
  __m512 total[kOutputs][kGroups];
  for (int j = 0; j < kOutputs; ++j) {
    for (int g = 0; g < kGroups; ++g) total[j][g] = _mm512_setzero_ps();
  }
  const T* next = weight + kOutputs * layer.inner;
  const uint32_t* rows = layer.rows;
  for (int64_t k = 0; k < units; ++k) {
    _mm_prefetch(reinterpret_cast<const char*>(next + k * kOutputs * kPerUnit), _MM_HINT_T0);
#pragma GCC unroll 16
    for (int j = 0; j < kOutputs; ++j) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const T* at = weight + j * layer.inner + k * kPerUnit;
        total[j][g] = multiply_add(total[j][g], rows + g * kFewRowsTile, at);
      }
    }
    rows += kGroups * kFewRowsTile;
  }
  for (int j = 0; j < kOutputs; ++j) {
    for (int g = 0; g < kGroups; ++g) {
      _mm512_store_ps(sums + (g * kFewRowsTile + j) * kFewRowsTile, total[j][g]);
    }
  }
}

// As many outputs at a time as leave registers for their sums.
template <class T, int kGroups, int kOutputs>
BLIPFAST_AVX512_BF16 void run(const FewRows<T>& layer, int64_t begin, int64_t end) {
  alignas(64) float sums[kGroups][kFewRowsTile * kFewRowsTile];
  std::vector<T> copy;
  for (int64_t tile = begin; tile < end; ++tile) {
    const T* weight = tile_weights(layer, tile, copy);
    for (int64_t j = 0; j < kFewRowsTile; j += kOutputs) {
      sums_of<T, kGroups, kOutputs>(layer, weight + j * layer.inner, sums[0] + j * kFewRowsTile);
    }
    for (int64_t g = 0; g < kGroups; ++g) finish_tile(sums[g], layer, g, tile);
  }
}

template <class T>
void run_groups(const FewRows<T>& layer, int64_t begin, int64_t end) {
  if (layer.groups == 1) return run<T, 1, 8>(layer, begin, end);
  if (layer.groups == 2) return run<T, 2, 8>(layer, begin, end);
  if (layer.groups == 3) return run<T, 3, 8>(layer, begin, end);
  return run<T, 4, 4>(layer, begin, end);
}

}  // namespace

void few_rows_avx512(const FewRows<uint16_t>& layer, int64_t begin, int64_t end) {
  run_groups(layer, begin, end);
}

void few_rows_avx512(const FewRows<float>& layer, int64_t begin, int64_t end) {
  run_groups(layer, begin, end);
}

bool avx512_bf16_ready() {
  __builtin_cpu_init();
  return isa_level() == 4 && __builtin_cpu_supports("avx512bf16");
}

#else

void few_rows_avx512(const FewRows<uint16_t>&, int64_t, int64_t) {}
void few_rows_avx512(const FewRows<float>&, int64_t, int64_t) {}
bool avx512_bf16_ready() { return false; }

#endif

}  // namespace blipfast
