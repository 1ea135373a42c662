#include "attention.h"

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

// What both directions are given beside tensors of heads.
struct Options {
  std::optional<Tensor> key_lengths, cu_seqlens, order;
  bool causal;
  double dropout_p;
  int64_t seed;
};

template <class E>
const E* elements(const std::optional<Tensor>& x) {
  return x ? static_cast<const E*>(x->const_data_ptr()) : nullptr;
}

struct Problem {
  Problem(const Tensor& q, const Tensor& k, const Options& options)
      : starts(elements<int32_t>(options.cu_seqlens)), order(elements<int64_t>(options.order)),
        lengths(elements<int64_t>(options.key_lengths)),
        entries(starts ? options.cu_seqlens->size(0) - 1 : q.size(0)), heads(q.size(1)),
        rows(q.size(2)), keys(k.size(2)), dim(q.size(3)),
        packed_keys(starts && k.size(0) != entries), causal(options.causal),
        dropped(dropped_of(options.dropout_p)), seed(static_cast<uint64_t>(options.seed)) {}

  int64_t start(int64_t n) const { return starts ? starts[n] : 0; }
  int64_t queries(int64_t n) const { return starts ? starts[n + 1] - starts[n] : rows; }
  int64_t seen(int64_t n) const {
    if (packed_keys) return queries(n);
    return lengths ? std::clamp<int64_t>(lengths[n], 0, keys) : keys;
  }
  // Number of an entry's first query among those of all heads.
  int64_t first_row(int64_t n, int64_t h) const {
    return (starts ? h : n * heads + h) * rows + start(n);
  }

  template <class T>
  Rows<T> queries_of(const Heads<T>& x, int64_t n, int64_t h) const {
    if (!starts) return x.at(n, h);
    Rows<T> all = x.at(0, h);
    all.index = order;
    return all.after(start(n));
  }
  template <class T>
  Rows<T> keys_of(const Heads<T>& x, int64_t n, int64_t h) const {
    return packed_keys ? x.at(0, h).after(start(n)) : x.at(n, h);
  }

  template <class T>
  AttentionHead<T> head(int64_t n, int64_t h, const Heads<const T>& q, const Heads<const T>& k,
                        const Heads<const T>& v) const {
    return {queries_of(q, n, h), keys_of(k, n, h), keys_of(v, n, h), queries(n), seen(n), dim,
            causal, dropped, seed, static_cast<uint64_t>(first_row(n, h))};
  }

  // Of the largest entry.
  template <class T>
  HeadSizes<T> sizes() const {
    int64_t longest = starts ? 0 : rows;
    for (int64_t n = 0; starts && n < entries; ++n) longest = std::max(longest, queries(n));
    return {longest, packed_keys ? longest : keys, dim};
  }

  // Calls task(n, h, sizes, scratch) for all heads of all entries, in parallel.
  template <class T, class Scratch, class Task>
  void for_each(const Task& task) const {
    const HeadSizes<T> largest = sizes<T>();
    torch::stable::parallel_for(0, entries * heads, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(largest);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / heads;
        task(n, i % heads, HeadSizes<T>(queries(n), seen(n), dim), scratch);
      }
    });
  }

  const int32_t* starts;
  const int64_t* order;
  const int64_t* lengths;
  int64_t entries, heads, rows, keys, dim;
  bool packed_keys, causal;
  uint32_t dropped;
  uint64_t seed;
};

bool like(const Tensor& x, const Tensor& other) {
  return same_kind(x, other) && x.stride(3) == 1;
}

// That what is packed lies within q, so that nothing is read or written out of bounds.
void check_packing(const Tensor& q, const Tensor& k, const Options& options) {
  const Tensor& cu_seqlens = *options.cu_seqlens;
  STD_TORCH_CHECK(q.size(0) == 1 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 &&
                      cu_seqlens.is_contiguous() && cu_seqlens.scalar_type() == ScalarType::Int,
                  "attention: with cu_seqlens, contiguous (N + 1,) int32, q must be (1, H, T, "
                  "head_dim)");
  const int64_t count = cu_seqlens.size(0) - 1, total = q.size(2);
  const auto* starts = elements<int32_t>(options.cu_seqlens);
  bool rises = starts[0] == 0 && starts[count] == total;
  for (int64_t n = 0; n < count; ++n) rises &= starts[n] <= starts[n + 1];
  STD_TORCH_CHECK(rises, "attention: cu_seqlens must rise from 0 to the ", total, " tokens of q");
  STD_TORCH_CHECK(k.size(0) == count ||
                      (k.size(0) == 1 && k.size(2) == total && !options.key_lengths),
                  "attention: k and v must be packed like q, or have an entry for each of the ",
                  count, " sequences");
  if (!options.order) return;
  const Tensor& order = *options.order;
  STD_TORCH_CHECK(order.dim() == 1 && order.size(0) == total && order.is_contiguous() &&
                      order.scalar_type() == ScalarType::Long,
                  "attention: order must be contiguous (", total, ",) int64");
  const auto* places = elements<int64_t>(options.order);
  bool within = true;
  for (int64_t i = 0; i < total; ++i) within &= places[i] >= 0 && places[i] < total;
  STD_TORCH_CHECK(within, "attention: order must name tokens from 0 to ", total - 1);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  const auto type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "attention: takes float32 or bfloat16");
  STD_TORCH_CHECK(isa_level() == 4 && (type == ScalarType::Float || avx512_bf16_ready()),
                  "attention: needs AVX-512, with dot products of bfloat16 for these");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && (options.cu_seqlens || q.size(0) == k.size(0)) &&
                      q.size(1) == k.size(1) && q.size(3) == k.size(3) && like(q, q) &&
                      k.scalar_type() == type && like(k, k) && like(v, k),
                  "attention: q must be (B, H, L, head_dim) and k, v (B, H, S, head_dim), the last "
                  "dimension contiguous, of one dtype");
  STD_TORCH_CHECK(q.size(3) > 0 && q.size(3) % 32 == 0, "attention: head_dim is ", q.size(3),
                  ", but must be a multiple of 32");
  STD_TORCH_CHECK(options.dropout_p >= 0.0 && options.dropout_p < 1.0, "attention: dropout_p is ",
                  options.dropout_p, ", but must be from 0 to below 1");
  if (options.cu_seqlens) check_packing(q, k, options);
  STD_TORCH_CHECK(options.cu_seqlens || !options.order, "attention: order needs cu_seqlens");
  if (!options.key_lengths) return;
  const Tensor& lengths = *options.key_lengths;
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == k.size(0) &&
                      lengths.scalar_type() == ScalarType::Long && lengths.is_contiguous(),
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
  using Scratch = ForwardScratch<T>;
  p.for_each<T, Scratch>([&](int64_t n, int64_t h, const HeadSizes<T>& sizes, Scratch& scratch) {
    attention_forward(p.head(n, h, from_q, from_k, from_v), p.queries_of(to, n, h),
                      lse + p.first_row(n, h), sizes, scratch);
  });
}

// Gradients of keys that are padding.
template <class T>
void clear(const Rows<T>& rows, int64_t from, int64_t to, int64_t dim) {
  for (int64_t i = from; i < to; ++i) std::fill_n(rows.row(i), dim, T{0});
}

template <class T>
void backward(const Problem& p, const Tensor& grad, const Tensor& q, const Tensor& k,
              const Tensor& v, const float* lse, Tensor& grad_q, Tensor& grad_k, Tensor& grad_v) {
  const Heads<const T> from(grad), from_q(q), from_k(k), from_v(v);
  const Heads<T> to_q(grad_q), to_k(grad_k), to_v(grad_v);
  using Scratch = BackwardScratch<T>;
  p.for_each<T, Scratch>([&](int64_t n, int64_t h, const HeadSizes<T>& sizes, Scratch& scratch) {
    const auto head = p.head(n, h, from_q, from_k, from_v);
    const Rows<T> keys = p.keys_of(to_k, n, h), values = p.keys_of(to_v, n, h);
    attention_backward(head, p.queries_of(from, n, h), lse + p.first_row(n, h),
                       p.queries_of(to_q, n, h), keys, values, sizes, scratch);
    if (p.packed_keys) return;
    clear(keys, head.keys, p.keys, p.dim);
    clear(values, head.keys, p.keys, p.dim);
  });
}

}  // namespace

Tensor attention_out(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_lengths,
                     std::optional<Tensor> cu_seqlens, std::optional<Tensor> order, bool causal,
                     double dropout_p, int64_t seed, Tensor out) {
  const Options options{key_lengths, cu_seqlens, order, causal, dropout_p, seed};
  check(q, k, v, options);
  STD_TORCH_CHECK(like(out, q), "attention: out must be like q");
  const Problem problem(q, k, options);
  const std::array<int64_t, 3> shape{q.size(0), q.size(1), q.size(2)};
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
                            std::optional<Tensor> key_lengths, std::optional<Tensor> cu_seqlens,
                            std::optional<Tensor> order, bool causal, double dropout_p,
                            int64_t seed, Tensor grad_q, Tensor grad_k, Tensor grad_v) {
  const Options options{key_lengths, cu_seqlens, order, causal, dropout_p, seed};
  check(q, k, v, options);
  check_lse(lse, q);
  STD_TORCH_CHECK(like(grad, q) && like(grad_q, q) && like(grad_k, k) && like(grad_v, v),
                  "attention: gradients must be like what they are of");
  const Problem problem(q, k, options);
  const auto* logs = static_cast<const float*>(lse.const_data_ptr());
  if (q.scalar_type() == ScalarType::BFloat16) {
    backward<uint16_t>(problem, grad, q, k, v, logs, grad_q, grad_k, grad_v);
  } else {
    backward<float>(problem, grad, q, k, v, logs, grad_q, grad_k, grad_v);
  }
}

}  // namespace blipfast
