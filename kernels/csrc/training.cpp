#include "training.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "bf16.h"
#include "gelu.h"
#include "isa.h"
#include "philox.h"
#include "same_kind.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

template <class T>
BLIPFAST_INLINE void bias_gelu_loop(const T* x, const T* bias, T* out, int64_t rows,
                                    int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* line = x + r * columns;
    T* to = out + r * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      store(gelu(load(line + i) + load(bias + i)).value, to + i);
    }
  }
}

BLIPFAST_MULTI_ISA
void bias_gelu_fp32(const float* x, const float* bias, float* out, int64_t rows, int64_t columns) {
  bias_gelu_loop(x, bias, out, rows, columns);
}

BLIPFAST_MULTI_ISA
void bias_gelu_bf16(const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t rows,
                    int64_t columns) {
  bias_gelu_loop(x, bias, out, rows, columns);
}

// Adds to sums, which hold the columns' sums of the gradient.
template <class T>
BLIPFAST_INLINE void gelu_backward_loop(T* grad, const T* x, const T* bias, T* value, float* sums,
                                        int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t start = r * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const Gelu at = gelu(load(x + start + i) + load(bias + i));
      const float moved = load(grad + start + i) * at.slope;
      sums[i] += moved;
      store(moved, grad + start + i);
      store(at.value, value + start + i);
    }
  }
}

BLIPFAST_MULTI_ISA
void gelu_backward_fp32(float* grad, const float* x, const float* bias, float* value, float* sums,
                        int64_t rows, int64_t columns) {
  gelu_backward_loop(grad, x, bias, value, sums, rows, columns);
}

BLIPFAST_MULTI_ISA
void gelu_backward_bf16(uint16_t* grad, const uint16_t* x, const uint16_t* bias, uint16_t* value,
                        float* sums, int64_t rows, int64_t columns) {
  gelu_backward_loop(grad, x, bias, value, sums, rows, columns);
}

// A call of Philox decides for 16 bits each: 8 of a counter's words' halves, 16 counters, 128 elements.
constexpr int64_t kHalves = 8, kElements = kHalves * kPhiloxLanes;

template <class T>
BLIPFAST_INLINE void dropout_loop(const T* x, T* out, int64_t begin, int64_t end, uint32_t dropped,
                                  uint64_t seed) {
  const float scale = kept_scale(dropped);
  for (int64_t start = begin; start < end; start += kElements) {
    uint32_t c[4][kPhiloxLanes];
    const uint64_t first = static_cast<uint64_t>(start) / kHalves;
    for (uint64_t i = 0; i < kPhiloxLanes; ++i) {
      c[0][i] = static_cast<uint32_t>(first + i);
      c[1][i] = static_cast<uint32_t>((first + i) >> 32);
      c[2][i] = 0;
      c[3][i] = 0;
    }
    philox(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    float factor[kElements];
    for (int64_t word = 0; word < 4; ++word) {
#pragma omp simd
      for (int64_t i = 0; i < kPhiloxLanes; ++i) {
        const uint32_t bits = c[word][i];
        factor[2 * word * kPhiloxLanes + i] = (bits & 0xffffu) < dropped ? 0.0f : scale;
        factor[(2 * word + 1) * kPhiloxLanes + i] = (bits >> 16) < dropped ? 0.0f : scale;
      }
    }
    const int64_t count = std::min(kElements, end - start);
    // A dropped infinity or NaN gives zero too.
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float kept = load(x + start + i) * scale;
      store(factor[i] == 0.0f ? 0.0f : kept, out + start + i);
    }
  }
}

BLIPFAST_MULTI_ISA
void dropout_fp32(const float* x, float* out, int64_t begin, int64_t end, uint32_t dropped,
                  uint64_t seed) {
  dropout_loop(x, out, begin, end, dropped, seed);
}

BLIPFAST_MULTI_ISA
void dropout_bf16(const uint16_t* x, uint16_t* out, int64_t begin, int64_t end, uint32_t dropped,
                  uint64_t seed) {
  dropout_loop(x, out, begin, end, dropped, seed);
}

bool float_and_contiguous(const Tensor& x) {
  const auto type = x.scalar_type();
  return x.is_contiguous() && (type == ScalarType::Float || type == ScalarType::BFloat16);
}

// Rows that are worth a thread.
int64_t rows_for(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

void check_layer(const char* name, const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(float_and_contiguous(x) && x.dim() == 2 && bias.is_contiguous() &&
                      bias.dim() == 1 && bias.size(0) == x.size(1) &&
                      bias.scalar_type() == x.scalar_type(),
                  name, ": takes a contiguous float32 or bfloat16 matrix and as wide a bias");
}

}  // namespace

void bias_gelu_out(Tensor x, Tensor bias, Tensor out) {
  check_layer("bias_gelu_out", x, bias);
  STD_TORCH_CHECK(out.is_contiguous() && same_kind(out, x), "bias_gelu_out: out must be like x");
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t columns = x.size(1);
  const void* from = x.const_data_ptr();
  const void* offset = bias.const_data_ptr();
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, x.size(0), rows_for(columns), [&](int64_t begin, int64_t end) {
    const int64_t start = begin * columns;
    if (bf16) {
      bias_gelu_bf16(static_cast<const uint16_t*>(from) + start,
                     static_cast<const uint16_t*>(offset), static_cast<uint16_t*>(to) + start,
                     end - begin, columns);
    } else {
      bias_gelu_fp32(static_cast<const float*>(from) + start, static_cast<const float*>(offset),
                     static_cast<float*>(to) + start, end - begin, columns);
    }
  });
}

std::tuple<Tensor, Tensor> gelu_backward_(Tensor grad, Tensor x, Tensor bias) {
  check_layer("gelu_backward_", x, bias);
  STD_TORCH_CHECK(grad.is_contiguous() && same_kind(grad, x),
                  "gelu_backward_: grad must be contiguous and like x");
  Tensor value = torch::stable::empty_like(x), bias_grad = torch::stable::empty_like(bias);
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t rows = x.size(0), columns = x.size(1);
  // Partial sums of fixed pieces, so that the number of threads does not matter.
  constexpr int64_t kPiece = 64;
  const int64_t pieces = (rows + kPiece - 1) / kPiece;
  std::vector<float> sums(pieces * columns, 0.0f);
  void* to = grad.mutable_data_ptr();
  const void* from = x.const_data_ptr();
  const void* offset = bias.const_data_ptr();
  void* out = value.mutable_data_ptr();
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t start = piece * kPiece * columns;
      const int64_t count = std::min(kPiece, rows - piece * kPiece);
      float* sum = sums.data() + piece * columns;
      if (bf16) {
        gelu_backward_bf16(static_cast<uint16_t*>(to) + start,
                           static_cast<const uint16_t*>(from) + start,
                           static_cast<const uint16_t*>(offset),
                           static_cast<uint16_t*>(out) + start, sum, count, columns);
      } else {
        gelu_backward_fp32(static_cast<float*>(to) + start, static_cast<const float*>(from) + start,
                           static_cast<const float*>(offset), static_cast<float*>(out) + start,
                           sum, count, columns);
      }
    }
  });
  for (int64_t i = 0; i < columns; ++i) {
    float total = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * columns + i];
    if (bf16) {
      store(total, static_cast<uint16_t*>(bias_grad.mutable_data_ptr()) + i);
    } else {
      store(total, static_cast<float*>(bias_grad.mutable_data_ptr()) + i);
    }
  }
  return {value, bias_grad};
}

Tensor dropout(Tensor x, double p, int64_t seed) {
  STD_TORCH_CHECK(float_and_contiguous(x), "dropout: takes contiguous float32 or bfloat16");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: p is ", p, ", but must be from 0 to below 1");
  const uint32_t dropped = dropped_of(p);
  Tensor out = torch::stable::empty_like(x);
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const int64_t count = x.numel(), pieces = (count + kElements - 1) / kElements;
  const auto key = static_cast<uint64_t>(seed);
  torch::stable::parallel_for(0, pieces, kGrain / kElements, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kElements, end = std::min(last * kElements, count);
    if (bf16) {
      dropout_bf16(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), begin, end,
                   dropped, key);
    } else {
      dropout_fp32(static_cast<const float*>(from), static_cast<float*>(to), begin, end, dropped,
                   key);
    }
  });
  return out;
}

}  // namespace blipfast
