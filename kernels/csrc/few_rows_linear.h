// A linear layer of few rows, as in each step of generation: bound by reading the weight, which is
// streamed once, as it lies, through AMX tiles or past AVX-512's dot products of bf16 pairs (fp32:
// its multiply-adds); bias and GELU are applied to the sums.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace blipfast {

// rows (R, K) with R at most 64, weight (N, K), bias (N): all bf16 or all fp32, contiguous, CPU, K a
// multiple of 32. Returns gelu?(rows weight^T + bias) (R, N); sums and GELU (by erf) are fp32.
// Several layers side by side, as of attention heads: all with one dimension more in front.
// amx: by AMX tiles, only bf16 and where amx_bf16_ready(); else only where avx512_bf16_ready().
torch::stable::Tensor few_rows_linear(torch::stable::Tensor rows, torch::stable::Tensor weight,
                                      torch::stable::Tensor bias, bool gelu, bool amx);

}  // namespace blipfast
