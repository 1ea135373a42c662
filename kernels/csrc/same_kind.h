// Whether two tensors have one dtype and shape.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace blipfast {

inline bool same_kind(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

}  // namespace blipfast
