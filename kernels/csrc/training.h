// What training spends time on beside matrix products: each in one pass over memory, on all threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace blipfast {

// All tensors are contiguous, on the CPU, fp32 or bf16 (computed in fp32).

// out (R, C) becomes gelu(x + bias); it may be x itself.
void bias_gelu_out(torch::stable::Tensor x, torch::stable::Tensor bias, torch::stable::Tensor out);

// grad (R, C), that of gelu(x + bias), becomes x's, in place. Returns gelu(x + bias), which the layer
// after it needs for its weight's gradient, and the bias's gradient (C).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> gelu_backward_(torch::stable::Tensor grad,
                                                                        torch::stable::Tensor x,
                                                                        torch::stable::Tensor bias);

// x where it is kept, over the share that is kept, and zero elsewhere. The same seed drops the same
// elements of a tensor of as many, whatever its dtype and the number of threads, so that a backward
// needs no mask. Kept is a share of 1 - p, to the next 65,536th.
torch::stable::Tensor dropout(torch::stable::Tensor x, double p, int64_t seed);

// x (R, C) to its transpose (C, R) and the sums of its columns (C). Needs AVX-512.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> transpose_and_sum(torch::stable::Tensor x);

}  // namespace blipfast
