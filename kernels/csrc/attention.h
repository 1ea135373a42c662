#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace blipfast {

// softmax(q k^T / sqrt(head_dim)) v for q (B, H, L, head_dim) and k, v (B, H, S, head_dim), float32
// or bfloat16, head_dim a multiple of 32 whose elements lie side by side, other strides any. Scores
// exist for eight queries at a time.
//   key_lengths: (B,) int64, keys from there on are padding; a row without keys gives zero.
//   cu_seqlens: (N + 1,) int32, the tokens of q (1, H, T, head_dim) are those of N sequences without
//     padding. Each attends within itself where k and v are packed like q, and otherwise to an entry
//     of k and v (N, H, S, head_dim).
//   order: (T,) int64, where in q the tokens lie that cu_seqlens counts.
//   causal: query i sees keys 0 to i.
//   dropout_p: weights are zero with this probability, drawn by Philox under the seed.
// Fills out, like q, and returns what the backward needs: (B, H, L) fp32, base-2 logarithms of the
// sums of exponentials. The result does not depend on the number of threads.
torch::stable::Tensor attention_out(torch::stable::Tensor q, torch::stable::Tensor k,
                                    torch::stable::Tensor v,
                                    std::optional<torch::stable::Tensor> key_lengths,
                                    std::optional<torch::stable::Tensor> cu_seqlens,
                                    std::optional<torch::stable::Tensor> order, bool causal,
                                    double dropout_p, int64_t seed, torch::stable::Tensor out);

// Fills the gradients of q, k and v, of any strides, given that of out.
void attention_backward_out(torch::stable::Tensor grad, torch::stable::Tensor q,
                            torch::stable::Tensor k, torch::stable::Tensor v,
                            torch::stable::Tensor lse,
                            std::optional<torch::stable::Tensor> key_lengths,
                            std::optional<torch::stable::Tensor> cu_seqlens,
                            std::optional<torch::stable::Tensor> order, bool causal,
                            double dropout_p, int64_t seed, torch::stable::Tensor grad_q,
                            torch::stable::Tensor grad_k, torch::stable::Tensor grad_v);

}  // namespace blipfast
