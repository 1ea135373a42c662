// Streaming softmax over a long list of keys, for the contrastive loss:
//   lse_r  = log sum_n exp(rows_r . keys_n / T)
//   mean_r = sum_n softmax_n(rows_r . keys_n / T) keys_n
// in one pass over the keys; scores exist for one block of keys at a time.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace blipfast {

// Running softmax of some rows over a range of keys. `mean` is not yet divided by `total`; element
// (r, d) lies at mean[r * row_stride + d * width_stride]. `peak` is the largest score before scaling.
// All fp32, zeroed, `peak` at the lowest finite number.
struct SoftmaxState {
  float* peak;   // (rows)
  float* total;  // (rows)
  float* mean;   // rows x width
  int64_t row_stride;
  int64_t width_stride;
};

// What one worker reads: keys [begin, end) of `keys` (N, width), contiguous.
struct KeyRange {
  const void* keys;
  bool bf16;
  int64_t begin;
  int64_t end;
  int64_t width;
};

// rows (R, width) fp32 contiguous.
void stream_plain(const float* rows, int64_t num_rows, const KeyRange& range, float scale,
                  SoftmaxState& state);

// rows (R, width) contiguous, in the keys' dtype; width a multiple of 32. Only where isa_level() is 4,
// for bf16 where avx512_bf16_ready(): their weights are rounded to bf16.
void stream_avx512(const void* rows, int64_t num_rows, const KeyRange& range, float scale,
                   SoftmaxState& state);

// Rows as AMX wants them, made once for a call: bf16 pairs along the width, row index fastest.
int64_t amx_padded_rows(int64_t num_rows);
int64_t amx_padded_width(int64_t width);
void amx_pack_rows(const uint16_t* rows, int64_t num_rows, int64_t width, uint32_t* packed);
// Keys must be bf16; state arrays hold amx_padded_rows rows and amx_padded_width columns, transposed.
void stream_amx(const uint32_t* packed_rows, int64_t num_rows, const KeyRange& range, float scale,
                SoftmaxState& state);

// One block of scores, key-major (keys x stride), becomes weights exp((score - new peak) * scale),
// scale >= 0 or NaN; peak and total move on, and fade (rows) is what earlier sums must be multiplied by.
void softmax_block(float* scores, int64_t keys, int64_t rows, int64_t stride, float scale,
                   float* peak, float* total, float* fade);
// The same with the weights written as bf16 pairs of keys (ceil(keys / 2) x stride) for AMX.
void softmax_block_bf16(float* scores, int64_t keys, int64_t rows, int64_t stride, float scale,
                        float* peak, float* total, float* fade, uint32_t* weights);

// mean (rows x width) = mean * fade (rows) + update.
void fade_and_add(float* mean, const float* fade, const float* update, int64_t rows,
                  int64_t width);

// rows (R, D) and keys (N, D), fp32 or bf16, CPU, contiguous; temperature one fp32 element.
// Returns lse (R) and mean (R, D), fp32. `amx` and `avx512` allow what the processor has of them.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> softmax_mean(
    torch::stable::Tensor rows, torch::stable::Tensor keys, torch::stable::Tensor temperature,
    bool amx, bool avx512);

}  // namespace blipfast
