// Self-attention within short packed sequences, forward only:
//   out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j
// for each sequence and head. Texts of ten or twenty tokens are too little work for padded batches
// and matrix products; here one worker takes a head of a sequence from end to end, in its cache.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace blipfast {

// qkv (T, 3, H, head_dim) contiguous, fp32 or bf16; cu_seqlens (N + 1) int32, from 0 to T.
// Returns (T, H, head_dim) in qkv's dtype; all arithmetic is fp32.
torch::stable::Tensor varlen_attention(torch::stable::Tensor qkv, torch::stable::Tensor cu_seqlens,
                                       bool causal);

}  // namespace blipfast
