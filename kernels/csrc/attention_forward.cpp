#include "attention_tiles.h"

namespace blipfast {

#if BLIPFAST_CLONES

namespace {

// A row's scores become weights in T, not yet divided by their sum, and zeros from `seen` on.
// Returns the sum; `peak` is the largest score, scaled.
template <class T>
BLIPFAST_AVX512_BF16 inline float weigh(const float* scores, int64_t vectors, int64_t seen,
                                        float scale, const float* factors, T* weights,
                                        float& peak) {
  const Columns columns(seen);
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 highest = lowest;
  for (int64_t j = 0; j < columns.used; ++j) {
    const __m512 score = _mm512_mask_load_ps(lowest, columns.lanes(j), scores + j * kVector);
    highest = _mm512_max_ps(score, highest);
  }
  peak = _mm512_reduce_max_ps(highest) * scale;
  const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(-peak);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns.used; ++j) {
    const __m512 score = _mm512_load_ps(scores + j * kVector);
    __m512 weight = exp2_nonpositive(_mm512_fmadd_ps(score, factor, offset));
    weight = _mm512_maskz_mov_ps(columns.lanes(j), weight);
    sum = _mm512_add_ps(sum, weight);
    if (factors) weight = _mm512_mul_ps(weight, _mm512_load_ps(factors + j * kVector));
    write_vector(weight, weights + j * kVector);
  }
  std::fill(weights + columns.used * kVector, weights + vectors * kVector, T{0});
  return _mm512_reduce_add_ps(sum);
}

template <class T>
BLIPFAST_AVX512_BF16 void attend(const AttentionHead<T>& head, const Rows<T>& out, float* lse,
                                 const HeadSizes<T>& sizes, ForwardScratch<T>& scratch) {
  if (head.keys == 0) {
    for (int64_t i = 0; i < head.queries; ++i) {
      std::fill_n(out.row(i), head.dim, T{0});
      lse[i] = -INFINITY;
    }
    return;
  }
  const float scale = score_scale(head.dim);
  pack_rows(head.q, head.queries, head.dim, sizes.rows, scratch.q.get());
  pack_transposed(head.k, head.keys, head.dim, sizes.columns, scratch.keys.get());
  pack_lines(head.v, head.keys, head.dim, sizes.columns, scratch.values.get());
  Buffer<float> factors(sizes.columns);
  float* scores = scratch.scores.get();
  T* weights = reinterpret_cast<T*>(scratch.weights.get());
  for (int64_t first = 0; first < head.queries; first += kStripRows) {
    const Left q{scratch.q.get() + first * sizes.dim_words, sizes.dim_words, 1};
    product<T>(q, scratch.keys.get(), sizes.columns, sizes.dim_words, scores);
    const int64_t rows = std::min(kStripRows, head.queries - first);
    float sums[kStripRows];
    for (int64_t r = 0; r < kStripRows; ++r) {
      T* row = weights + r * sizes.columns;
      if (r >= rows) {
        std::fill_n(row, sizes.columns, T{0});
        continue;
      }
      const int64_t query = first + r;
      const int64_t seen = head.causal ? std::min(head.keys, query + 1) : head.keys;
      if (head.dropped) {
        dropout_factors(head.first_row + query, sizes.columns, head.dropped, head.seed,
                        factors.get());
      }
      float peak;
      sums[r] = weigh(scores + r * sizes.columns, sizes.vectors, seen, scale,
                      head.dropped ? factors.get() : nullptr, row, peak);
      lse[query] = peak + std::log2(sums[r]);
    }
    const Left left{scratch.weights.get(), sizes.column_words, 1};
    product<T>(left, scratch.values.get(), head.dim, sizes.column_words, scratch.out.get());
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = scratch.out.get() + r * head.dim;
      const __m512 share = _mm512_set1_ps(1.0f / sums[r]);
      T* to = out.row(first + r);
      for (int64_t d = 0; d < head.dim; d += kVector) {
        write_vector(_mm512_mul_ps(_mm512_load_ps(row + d), share), to + d);
      }
    }
  }
}

}  // namespace

template <class T>
void attention_forward(const AttentionHead<T>& head, const Rows<T>& out, float* lse,
                       const HeadSizes<T>& sizes, ForwardScratch<T>& scratch) {
  attend(head, out, lse, sizes, scratch);
}

#else

template <class T>
void attention_forward(const AttentionHead<T>&, const Rows<T>&, float*, const HeadSizes<T>&,
                       ForwardScratch<T>&) {}

#endif

template void attention_forward(const AttentionHead<float>&, const Rows<float>&, float*,
                                const HeadSizes<float>&, ForwardScratch<float>&);
template void attention_forward(const AttentionHead<uint16_t>&, const Rows<uint16_t>&, float*,
                                const HeadSizes<uint16_t>&, ForwardScratch<uint16_t>&);

}  // namespace blipfast
