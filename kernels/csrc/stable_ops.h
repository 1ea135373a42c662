// PyTorch's operators on the stable ABI, under the names that torch 2.13 has for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
