#include "attention_tiles.h"

namespace blipfast {

#if BLIPFAST_CLONES

namespace {

// A strip of scores and of gradients by the weights, which become weights (after dropout) and
// gradients of the scores.
struct Strip {
  float* scores;
  float* moved;
  int64_t columns;
};

BLIPFAST_AVX512 inline void differentiate_row(const Strip& strip, int64_t r, int64_t seen,
                                              float lse, float score_factor, float root,
                                              const float* factors) {
  float* scores = strip.scores + r * strip.columns;
  float* moved = strip.moved + r * strip.columns;
  const __m512 factor = _mm512_set1_ps(score_factor), offset = _mm512_set1_ps(-lse);
  const Columns columns(seen);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns.used; ++j) {
    const __m512 score = _mm512_load_ps(scores + j * kVector);
    __m512 weight = exp2_nonpositive(_mm512_fmadd_ps(score, factor, offset));
    weight = _mm512_maskz_mov_ps(columns.lanes(j), weight);
    __m512 grad = _mm512_load_ps(moved + j * kVector);
    if (factors) {
      grad = _mm512_mul_ps(grad, _mm512_load_ps(factors + j * kVector));
      _mm512_store_ps(moved + j * kVector, grad);
    }
    total = _mm512_fmadd_ps(weight, grad, total);
    _mm512_store_ps(scores + j * kVector, weight);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total)), size = _mm512_set1_ps(root);
  for (int64_t j = 0; j < columns.used; ++j) {
    const __m512 weight = _mm512_load_ps(scores + j * kVector);
    const __m512 apart = _mm512_sub_ps(_mm512_load_ps(moved + j * kVector), mean);
    _mm512_store_ps(moved + j * kVector, _mm512_mul_ps(_mm512_mul_ps(weight, apart), size));
    if (factors) {
      const __m512 kept = _mm512_load_ps(factors + j * kVector);
      _mm512_store_ps(scores + j * kVector, _mm512_mul_ps(weight, kept));
    }
  }
  std::fill(scores + columns.used * kVector, scores + strip.columns, 0.0f);
  std::fill(moved + columns.used * kVector, moved + strip.columns, 0.0f);
}

// Rows of a strip as lines of words along the queries and, where asked for, as rows.
template <class T>
BLIPFAST_AVX512_BF16 inline void pack_strip(const float* strip, int64_t columns, uint32_t* lines,
                                            uint32_t* rows) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(lines, strip, kStripRows * columns * sizeof(float));
    if (rows) std::memcpy(rows, strip, kStripRows * columns * sizeof(float));
  } else {
    auto* to = reinterpret_cast<uint16_t*>(rows);
    for (int64_t r = 0; r < kStripRows; r += 2) {
      for (int64_t c = 0; c < columns; c += kVector) {
        const float* at = strip + r * columns + c;
        const __m256i even = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(at));
        const __m256i odd = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(at + columns));
        _mm512_store_si512(lines + r / 2 * columns + c, pairs_of(even, odd));
        if (rows) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + r * columns + c), even);
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + (r + 1) * columns + c), odd);
        }
      }
    }
  }
}

// Adds what a block of queries gives to the gradient of keys or values, a line a key.
template <class T>
BLIPFAST_AVX512_BF16 inline void add_to_keys(const uint32_t* weights, const uint32_t* lines,
                                             int64_t steps, const HeadSizes<T>& sizes,
                                             float* out) {
  for (int64_t key = 0; key < sizes.columns; key += kStripRows) {
    const Left left{weights + key, 1, sizes.columns};
    product<T, true>(left, lines, sizes.dim, steps, out + key * sizes.dim);
  }
}

template <class T>
BLIPFAST_AVX512_BF16 void differentiate(const AttentionHead<T>& head, const Rows<const T>& grad,
                                        const float* lse, const Rows<T>& grad_q,
                                        const Rows<T>& grad_k, const Rows<T>& grad_v,
                                        const HeadSizes<T>& sizes, BackwardScratch<T>& scratch) {
  constexpr int64_t kPerWord = HeadSizes<T>::kPerWord;
  const float scale = score_scale(head.dim);
  const float root = 1.0f / std::sqrt(static_cast<float>(head.dim));
  const Strip strip{scratch.scores.get(), scratch.moved.get(), sizes.columns};
  pack_rows(head.q, head.queries, head.dim, sizes.rows, scratch.q.get());
  pack_rows(grad, head.queries, head.dim, sizes.rows, scratch.grad.get());
  pack_transposed(head.k, head.keys, head.dim, sizes.columns, scratch.keys.get());
  pack_transposed(head.v, head.keys, head.dim, sizes.columns, scratch.values.get());
  pack_lines(head.k, head.keys, head.dim, sizes.columns, scratch.key_lines.get());
  std::fill_n(scratch.grad_k.get(), sizes.columns * head.dim, 0.0f);
  std::fill_n(scratch.grad_v.get(), sizes.columns * head.dim, 0.0f);
  Buffer<float> factors(sizes.columns);
  for (int64_t block = 0; block < head.queries; block += kBlockRows) {
    const int64_t block_rows = std::min(kBlockRows, head.queries - block);
    const int64_t padded = whole(block_rows, kStripRows);
    for (int64_t first = block; first < block + padded; first += kStripRows) {
      const int64_t words = first * sizes.dim_words;
      product<T>({scratch.q.get() + words, sizes.dim_words, 1}, scratch.keys.get(), sizes.columns,
                 sizes.dim_words, strip.scores);
      product<T>({scratch.grad.get() + words, sizes.dim_words, 1}, scratch.values.get(),
                 sizes.columns, sizes.dim_words, strip.moved);
      for (int64_t r = 0; r < kStripRows; ++r) {
        const int64_t query = first + r;
        if (query >= head.queries || head.keys == 0) {
          std::fill_n(strip.scores + r * sizes.columns, sizes.columns, 0.0f);
          std::fill_n(strip.moved + r * sizes.columns, sizes.columns, 0.0f);
          continue;
        }
        if (head.dropped) {
          dropout_factors(head.first_row + query, sizes.columns, head.dropped, head.seed,
                          factors.get());
        }
        const int64_t seen = head.causal ? std::min(head.keys, query + 1) : head.keys;
        differentiate_row(strip, r, seen, lse[query], scale, root,
                          head.dropped ? factors.get() : nullptr);
      }
      const int64_t line = (first - block) / kPerWord * sizes.columns;
      pack_strip<T>(strip.scores, sizes.columns, scratch.weights.get() + line, nullptr);
      pack_strip<T>(strip.moved, sizes.columns, scratch.slopes.get() + line,
                    scratch.slope_rows.get());
      product<T>({scratch.slope_rows.get(), sizes.column_words, 1}, scratch.key_lines.get(),
                 head.dim, sizes.column_words, scratch.out.get());
      const int64_t rows = std::min(kStripRows, head.queries - first);
      for (int64_t r = 0; r < rows; ++r) {
        write_row(scratch.out.get() + r * head.dim, head.dim, grad_q.row(first + r));
      }
    }
    pack_lines(head.q.after(block), block_rows, head.dim, padded, scratch.q_lines.get());
    pack_lines(grad.after(block), block_rows, head.dim, padded, scratch.grad_lines.get());
    const int64_t steps = padded / kPerWord;
    add_to_keys(scratch.weights.get(), scratch.grad_lines.get(), steps, sizes,
                scratch.grad_v.get());
    add_to_keys(scratch.slopes.get(), scratch.q_lines.get(), steps, sizes, scratch.grad_k.get());
  }
  for (int64_t i = 0; i < head.keys; ++i) {
    write_row(scratch.grad_k.get() + i * head.dim, head.dim, grad_k.row(i));
    write_row(scratch.grad_v.get() + i * head.dim, head.dim, grad_v.row(i));
  }
}

}  // namespace

template <class T>
void attention_backward(const AttentionHead<T>& head, const Rows<const T>& grad, const float* lse,
                        const Rows<T>& grad_q, const Rows<T>& grad_k, const Rows<T>& grad_v,
                        const HeadSizes<T>& sizes, BackwardScratch<T>& scratch) {
  differentiate(head, grad, lse, grad_q, grad_k, grad_v, sizes, scratch);
}

#else

template <class T>
void attention_backward(const AttentionHead<T>&, const Rows<const T>&, const float*,
                        const Rows<T>&, const Rows<T>&, const Rows<T>&, const HeadSizes<T>&,
                        BackwardScratch<T>&) {}

#endif

template void attention_backward(const AttentionHead<float>&, const Rows<const float>&,
                                 const float*, const Rows<float>&, const Rows<float>&,
                                 const Rows<float>&, const HeadSizes<float>&,
                                 BackwardScratch<float>&);
template void attention_backward(const AttentionHead<uint16_t>&, const Rows<const uint16_t>&,
                                 const float*, const Rows<uint16_t>&, const Rows<uint16_t>&,
                                 const Rows<uint16_t>&, const HeadSizes<uint16_t>&,
                                 BackwardScratch<uint16_t>&);

}  // namespace blipfast
