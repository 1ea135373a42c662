// Gumbel-max draws from softmax(scores) + eps with counter-based random numbers: the C++ half of
// hard-negative sampling, whose scores are a matrix product.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace blipfast {

// scores (R, M) fp32, contiguous, already over the temperature. query_ids (R) and key_ids (M) int64,
// both or neither: equal ones are excluded; else column `offset + row` is.
// Returns the columns drawn, (R, num) int64 in order of drawing, -1 where none is left.
// The numbers are Philox4x32-10 of (seed; column / 4, row, step, stream), rows and columns counted
// from first_row and first_column, as `blipfast.ops.hard_negatives` states them.
torch::stable::Tensor draw_negatives(torch::stable::Tensor scores,
                                     std::optional<torch::stable::Tensor> query_ids,
                                     std::optional<torch::stable::Tensor> key_ids, double eps,
                                     int64_t offset, int64_t seed, int64_t step, int64_t stream,
                                     int64_t first_row, int64_t first_column, int64_t num);

}  // namespace blipfast
