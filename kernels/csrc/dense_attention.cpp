#include "dense_attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "attention_head.h"
#include "isa.h"
#include "philox.h"
#include "same_kind.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (B, H, rows, dim) of T, by its strides.
template <class T>
struct Heads {
  explicit Heads(const Tensor& x)
      : data(static_cast<T*>(const_cast<void*>(x.const_data_ptr()))), batch(x.stride(0)),
        head(x.stride(1)), row(x.stride(2)) {}
  Rows<T> at(int64_t b, int64_t h) const { return {data + b * batch + h * head, row}; }

  T* data;
  int64_t batch, head, row;
};

struct Problem {
  Problem(const Tensor& q, const Tensor& k, const std::optional<Tensor>& key_lengths, bool causal,
          double dropout_p, int64_t seed)
      : batch(q.size(0)), heads(q.size(1)), queries(q.size(2)), keys(k.size(2)), dim(q.size(3)),
        lengths(key_lengths ? static_cast<const int64_t*>(key_lengths->const_data_ptr())
                            : nullptr),
        causal(causal),
        dropped(dropped_of(dropout_p)), seed(static_cast<uint64_t>(seed)) {}

  template <class T>
  AttentionHead<T> head(int64_t b, int64_t h, const Heads<const T>& q, const Heads<const T>& k,
                        const Heads<const T>& v) const {
    const int64_t seen = lengths ? std::clamp<int64_t>(lengths[b], 0, keys) : keys;
    return {q.at(b, h), k.at(b, h), v.at(b, h), queries, seen, dim, causal, dropped, seed,
            static_cast<uint64_t>((b * heads + h) * queries)};
  }

  int64_t batch, heads, queries, keys, dim;
  const int64_t* lengths;
  bool causal;
  uint32_t dropped;
  uint64_t seed;
};

bool like(const Tensor& x, const Tensor& other) {
  return same_kind(x, other) && x.stride(3) == 1;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v,
           const std::optional<Tensor>& key_lengths, double dropout_p) {
  const auto type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "attention: takes float32 or bfloat16");
  STD_TORCH_CHECK(isa_level() == 4 && (type == ScalarType::Float || avx512_bf16_ready()),
                  "attention: needs AVX-512, with dot products of bfloat16 for these");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) &&
                      q.size(1) == k.size(1) && q.size(3) == k.size(3) && like(q, q) &&
                      k.scalar_type() == type && like(k, k) && like(v, k),
                  "attention: q must be (B, H, L, head_dim) and k, v (B, H, S, head_dim), the last "
                  "dimension contiguous, of one dtype");
  STD_TORCH_CHECK(q.size(3) > 0 && q.size(3) % 32 == 0, "attention: head_dim is ", q.size(3),
                  ", but must be a multiple of 32");
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "attention: dropout_p is ", dropout_p,
                  ", but must be from 0 to below 1");
  if (!key_lengths) return;
  STD_TORCH_CHECK(key_lengths->dim() == 1 && key_lengths->size(0) == q.size(0) &&
                      key_lengths->scalar_type() == ScalarType::Long &&
                      key_lengths->is_contiguous(),
                  "attention: key_lengths must be contiguous (B,) int64");
}

void check_lse(const Tensor& lse, const Tensor& q) {
  bool good = lse.dim() == 3 && lse.scalar_type() == ScalarType::Float && lse.is_contiguous();
  for (int64_t i = 0; i < 3 && good; ++i) good = lse.size(i) == q.size(i);
  STD_TORCH_CHECK(good, "attention: lse must be contiguous (B, H, L) float32");
}

template <class T>
void forward(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out,
             float* lse) {
  const Heads<const T> from_q(q), from_k(k), from_v(v);
  const Heads<T> to(out);
  const HeadSizes<T> sizes(p.queries, p.keys, p.dim);
  torch::stable::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    ForwardScratch<T> scratch(sizes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.heads, h = task % p.heads;
      attention_forward(p.head(b, h, from_q, from_k, from_v), to.at(b, h), lse + task * p.queries,
                        sizes, scratch);
    }
  });
}

// Gradients of keys that are padding.
template <class T>
void clear(const Rows<T>& rows, int64_t from, int64_t to, int64_t dim) {
  for (int64_t i = from; i < to; ++i) std::fill_n(rows.data + i * rows.stride, dim, T{0});
}

template <class T>
void backward(const Problem& p, const Tensor& grad, const Tensor& q, const Tensor& k,
              const Tensor& v, const float* lse, Tensor& grad_q, Tensor& grad_k, Tensor& grad_v) {
  const Heads<const T> from(grad), from_q(q), from_k(k), from_v(v);
  const Heads<T> to_q(grad_q), to_k(grad_k), to_v(grad_v);
  const HeadSizes<T> sizes(p.queries, p.keys, p.dim);
  torch::stable::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    BackwardScratch<T> scratch(sizes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.heads, h = task % p.heads;
      const auto head = p.head(b, h, from_q, from_k, from_v);
      attention_backward(head, from.at(b, h), lse + task * p.queries, to_q.at(b, h), to_k.at(b, h),
                         to_v.at(b, h), sizes, scratch);
      clear(to_k.at(b, h), head.keys, p.keys, p.dim);
      clear(to_v.at(b, h), head.keys, p.keys, p.dim);
    }
  });
}

}  // namespace

Tensor attention_out(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_lengths, bool causal,
                     double dropout_p, int64_t seed, Tensor out) {
  check(q, k, v, key_lengths, dropout_p);
  STD_TORCH_CHECK(like(out, q), "attention: out must be like q");
  const Problem problem(q, k, key_lengths, causal, dropout_p, seed);
  const std::array<int64_t, 3> shape{problem.batch, problem.heads, problem.queries};
  Tensor lse = torch::stable::new_empty(q, {shape.data(), 3}, ScalarType::Float);
  auto* logs = static_cast<float*>(lse.mutable_data_ptr());
  if (q.scalar_type() == ScalarType::BFloat16) {
    forward<uint16_t>(problem, q, k, v, out, logs);
  } else {
    forward<float>(problem, q, k, v, out, logs);
  }
  return lse;
}

void attention_backward_out(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse,
                            std::optional<Tensor> key_lengths, bool causal, double dropout_p,
                            int64_t seed, Tensor grad_q, Tensor grad_k, Tensor grad_v) {
  check(q, k, v, key_lengths, dropout_p);
  check_lse(lse, q);
  STD_TORCH_CHECK(like(grad, q) && like(grad_q, q) && like(grad_k, k) && like(grad_v, v),
                  "attention: gradients must be like what they are of");
  const Problem problem(q, k, key_lengths, causal, dropout_p, seed);
  const auto* logs = static_cast<const float*>(lse.const_data_ptr());
  if (q.scalar_type() == ScalarType::BFloat16) {
    backward<uint16_t>(problem, grad, q, k, v, logs, grad_q, grad_k, grad_v);
  } else {
    backward<float>(problem, grad, q, k, v, logs, grad_q, grad_k, grad_v);
  }
}

}  // namespace blipfast
