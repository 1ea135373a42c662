// One head of one batch entry, for both directions of attention.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "avx512.h"

namespace blipfast {

constexpr int64_t kVector = 16;   // fp32 numbers of a vector
constexpr int64_t kStripRows = 8;  // queries whose scores are in hand at a time
constexpr int64_t kBlockRows = 64;  // queries whose weights the backward keeps; whole strips

// A matrix whose rows are `stride` elements apart; in another order where `index` says which is where.
template <class T>
struct Rows {
  T* row(int64_t i) const { return data + (index ? index[i] : i) * stride; }
  // The rows from `first` on.
  Rows after(int64_t first) const {
    return index ? Rows{data, stride, index + first} : Rows{data + first * stride, stride};
  }

  T* data;
  int64_t stride;
  const int64_t* index = nullptr;
};

// T: float, or uint16_t for bf16.
template <class T>
struct AttentionHead {
  Rows<const T> q, k, v;
  int64_t queries, keys, dim;
  bool causal;
  uint32_t dropped;    // of 65,536 weights
  uint64_t seed;
  uint64_t first_row;  // number of the first query among those of all heads
};

// Memory whose contents are nothing yet, at a multiple of a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

inline int64_t whole(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Sizes of a head's buffers in 32-bit words: one fp32 number, or a pair of bf16.
template <class T>
struct HeadSizes {
  static constexpr int64_t kPerWord = 4 / sizeof(T);

  HeadSizes(int64_t queries, int64_t keys, int64_t dim)
      : dim(dim), dim_words(dim / kPerWord), rows(whole(queries, kStripRows)),
        vectors((keys + kVector - 1) / kVector | 1), columns(vectors * kVector),
        column_words(columns / kPerWord) {}
  int64_t dim, dim_words;
  int64_t rows;     // queries in whole strips
  int64_t vectors;  // of keys; an odd number, so that lines of a matrix fall into different sets
  int64_t columns;  // keys in whole vectors
  int64_t column_words;
};

template <class T>
struct ForwardScratch {
  explicit ForwardScratch(const HeadSizes<T>& s)
      : q(s.rows * s.dim_words), keys(s.dim_words * s.columns), values(s.column_words * s.dim),
        weights(kStripRows * s.column_words), scores(kStripRows * s.columns),
        out(kStripRows * s.dim) {}
  Buffer<uint32_t> q, keys, values, weights;
  Buffer<float> scores, out;
};

template <class T>
struct BackwardScratch {
  static constexpr int64_t kLines = kBlockRows / HeadSizes<T>::kPerWord;

  explicit BackwardScratch(const HeadSizes<T>& s)
      : q(s.rows * s.dim_words), grad(s.rows * s.dim_words), keys(s.dim_words * s.columns),
        values(s.dim_words * s.columns), key_lines(s.column_words * s.dim),
        q_lines(kLines * s.dim), grad_lines(kLines * s.dim), weights(kLines * s.columns),
        slopes(kLines * s.columns), slope_rows(kStripRows * s.column_words),
        scores(kStripRows * s.columns), moved(kStripRows * s.columns), out(kStripRows * s.dim),
        grad_k(s.columns * s.dim), grad_v(s.columns * s.dim) {}
  Buffer<uint32_t> q, grad, keys, values, key_lines, q_lines, grad_lines, weights, slopes,
      slope_rows;
  Buffer<float> scores, moved, out, grad_k, grad_v;
};

// Only where isa_level() is 4, for bf16 where avx512_bf16_ready(). lse: one number a query.
template <class T>
void attention_forward(const AttentionHead<T>& head, const Rows<T>& out, float* lse,
                       const HeadSizes<T>& sizes, ForwardScratch<T>& scratch);
template <class T>
void attention_backward(const AttentionHead<T>& head, const Rows<const T>& grad, const float* lse,
                        const Rows<T>& grad_q, const Rows<T>& grad_k, const Rows<T>& grad_v,
                        const HeadSizes<T>& sizes, BackwardScratch<T>& scratch);

}  // namespace blipfast
