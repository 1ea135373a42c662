// Streaming softmax in fp32: torch's own matrix product on each block, everything else fused.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.h"
#include "isa.h"
#include "softmax_mean.h"
#include "stable_ops.h"

namespace blipfast {

namespace {

using torch::stable::Tensor;

constexpr int64_t kScores = 1 << 18;  // scores of a block: 1 MiB

Tensor view(const float* data, int64_t rows, int64_t columns) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{columns, 1};
  return torch::stable::from_blob(
      const_cast<float*>(data), {sizes.data(), 2}, {strides.data(), 2},
      torch::stable::Device(torch::headeronly::DeviceType::CPU),
      torch::headeronly::ScalarType::Float);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned handle, so that it is freed
}

BLIPFAST_MULTI_ISA
void widen(const uint16_t* source, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(source[i]);
}

}  // namespace

void stream_plain(const float* rows, int64_t num_rows, const KeyRange& range, float scale,
                  SoftmaxState& state) {
  const int64_t width = range.width;
  const int64_t block = std::clamp<int64_t>(kScores / num_rows, 64, 2048);
  std::vector<float> scores(block * num_rows), fade(num_rows), update(num_rows * width);
  std::vector<float> wide(range.bf16 ? block * width : 0);
  const Tensor queries = torch::stable::transpose(view(rows, num_rows, width), 0, 1);
  const Tensor update_view = view(update.data(), num_rows, width);
  for (int64_t begin = range.begin; begin < range.end; begin += block) {
    const int64_t count = std::min(block, range.end - begin);
    const float* keys = static_cast<const float*>(range.keys) + begin * width;
    if (range.bf16) {
      widen(static_cast<const uint16_t*>(range.keys) + begin * width, count * width, wide.data());
      keys = wide.data();
    }
    const Tensor key_view = view(keys, count, width);
    const Tensor score_view = view(scores.data(), count, num_rows);
    multiply(key_view, queries, score_view);
    softmax_block(scores.data(), count, num_rows, num_rows, scale, state.peak, state.total,
                  fade.data());
    multiply(torch::stable::transpose(score_view, 0, 1), key_view, update_view);
    fade_and_add(state.mean, fade.data(), update.data(), num_rows, width);
  }
}

}  // namespace blipfast
