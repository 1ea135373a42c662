// Streaming softmax by AVX-512: a block of keys is packed once for all rows, whose scores exist eight
// rows at a time.
#include "attention_tiles.h"
#include "softmax_mean.h"

namespace blipfast {

#if BLIPFAST_CLONES

namespace {

constexpr int64_t kKeys = 240;  // of a block: both their packings stay in a core's own cache

// A row's scores become weights in T, exp2((score - peak) * scale), and zeros from `keys` on. Peak and
// total move on; returns what earlier sums must be multiplied by.
template <class T>
BLIPFAST_AVX512_BF16 inline float weigh_on(const float* scores, int64_t keys, int64_t vectors,
                                           float scale, float& peak, float& total, T* weights) {
  const Columns columns(keys);
  const __m512 before = _mm512_set1_ps(peak);
  __m512 highest = before;
  for (int64_t j = 0; j < columns.used; ++j) {
    const __m512 score = _mm512_mask_load_ps(before, columns.lanes(j), scores + j * kVector);
    highest = _mm512_max_ps(score, highest);  // of NaN, the second
  }
  const float top = _mm512_reduce_max_ps(highest);
  const float fade = std::exp2((peak - top) * scale);
  peak = top;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns.used; ++j) {
    const __m512 score = _mm512_load_ps(scores + j * kVector);
    __m512 weight = exp2_nonpositive(_mm512_mul_ps(_mm512_sub_ps(score, shift), factor));
    weight = _mm512_maskz_mov_ps(columns.lanes(j), weight);
    sum = _mm512_add_ps(sum, weight);
    write_vector(weight, weights + j * kVector);
  }
  std::fill(weights + columns.used * kVector, weights + vectors * kVector, T{0});
  total = total * fade + _mm512_reduce_add_ps(sum);
  return fade;
}

template <class T>
BLIPFAST_AVX512_BF16 void stream(const T* rows, int64_t num_rows, const KeyRange& range,
                                 float scale, SoftmaxState& state) {
  const int64_t width = range.width;
  const HeadSizes<T> largest(num_rows, std::min(kKeys, range.end - range.begin), width);
  Buffer<uint32_t> q(largest.rows * largest.dim_words), keys(largest.dim_words * largest.columns),
      values(largest.column_words * width), weights(kStripRows * largest.column_words);
  Buffer<float> scores(kStripRows * largest.columns), update(kStripRows * width);
  pack_rows(Rows<const T>{rows, width}, num_rows, width, largest.rows, q.get());
  T* weight_rows = reinterpret_cast<T*>(weights.get());
  scale *= kLog2E;
  for (int64_t begin = range.begin; begin < range.end; begin += kKeys) {
    const int64_t count = std::min(kKeys, range.end - begin);
    const HeadSizes<T> sizes(num_rows, count, width);
    const Rows<const T> block{static_cast<const T*>(range.keys) + begin * width, width};
    pack_transposed(block, count, width, sizes.columns, keys.get());
    pack_lines(block, count, width, sizes.columns, values.get());
    for (int64_t first = 0; first < num_rows; first += kStripRows) {
      const Left left{q.get() + first * sizes.dim_words, sizes.dim_words, 1};
      product<T>(left, keys.get(), sizes.columns, sizes.dim_words, scores.get());
      const int64_t here = std::min(kStripRows, num_rows - first);
      float fades[kStripRows];
      for (int64_t r = 0; r < here; ++r) {
        fades[r] = weigh_on(scores.get() + r * sizes.columns, count, sizes.vectors, scale,
                            state.peak[first + r], state.total[first + r],
                            weight_rows + r * sizes.columns);
      }
      std::fill(weight_rows + here * sizes.columns, weight_rows + kStripRows * sizes.columns, T{0});
      const Left weighted{weights.get(), sizes.column_words, 1};
      product<T>(weighted, values.get(), width, sizes.column_words, update.get());
      fade_and_add(state.mean + first * width, fades, update.get(), here, width);
    }
  }
}

}  // namespace

void stream_avx512(const void* rows, int64_t num_rows, const KeyRange& range, float scale,
                   SoftmaxState& state) {
  if (range.bf16) {
    stream(static_cast<const uint16_t*>(rows), num_rows, range, scale, state);
  } else {
    stream(static_cast<const float*>(rows), num_rows, range, scale, state);
  }
}

#else

void stream_avx512(const void*, int64_t, const KeyRange&, float, SoftmaxState&) {}

#endif

}  // namespace blipfast
