// A linear layer of few rows, as in each step of generation: bound by reading the weight, which is
// streamed once, as it lies, through AMX tiles; bias and GELU are applied to the sums.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace blipfast {

// rows (R, K) with R at most 64, weight (N, K), bias (N): bf16, contiguous, CPU, K a multiple of 32.
// Returns gelu?(rows weight^T + bias) (R, N), bf16; sums and GELU (by erf) are fp32.
// Several layers side by side, as of attention heads: all with one dimension more in front.
// Only where amx_bf16_ready().
torch::stable::Tensor few_rows_linear(torch::stable::Tensor rows, torch::stable::Tensor weight,
                                      torch::stable::Tensor bias, bool gelu);

}  // namespace blipfast
