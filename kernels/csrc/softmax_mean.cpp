// Splits the keys over workers and joins what they found. The splits depend on the number of keys
// alone, so that results do not change with the number of threads.
#include "softmax_mean.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "isa.h"
#include "stable_ops.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowTile = 512;    // bounds the memory of the partial results
constexpr int64_t kMaxSplits = 16;   // workers at most
constexpr int64_t kMinSplit = 1024;  // keys that are worth a worker

void check(const Tensor& rows, const Tensor& keys, const Tensor& temperature) {
  const auto good = [](const Tensor& t) {
    return t.dim() == 2 && t.is_contiguous() &&
           (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16);
  };
  STD_TORCH_CHECK(good(rows) && good(keys),
                  "softmax_mean: rows and keys must be contiguous matrices, float32 or bfloat16");
  STD_TORCH_CHECK(rows.size(1) == keys.size(1), "softmax_mean: rows have width ", rows.size(1),
                  ", keys ", keys.size(1));
  STD_TORCH_CHECK(keys.size(0) > 0, "softmax_mean: there are no keys");
  STD_TORCH_CHECK(temperature.numel() == 1 && temperature.scalar_type() == ScalarType::Float,
                  "softmax_mean: temperature must be one float32 element");
}

Tensor negative(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::neg", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The partial results of every split, and their join.
class Partials {
 public:
  Partials(int64_t splits, int64_t rows, int64_t width, bool transposed)
      : splits_(splits), rows_(rows), width_(width), transposed_(transposed),
        peak_(splits * rows, std::numeric_limits<float>::lowest()),
        total_(splits * rows, 0.0f), mean_(splits * rows * width, 0.0f) {}

  SoftmaxState at(int64_t split) {
    return {peak_.data() + split * rows_, total_.data() + split * rows_,
            mean_.data() + split * rows_ * width_, transposed_ ? 1 : width_,
            transposed_ ? rows_ : 1};
  }

  void join(int64_t row, int64_t width, float scale, float* lse, float* mean) {
    float top = std::numeric_limits<float>::lowest(), total = 0.0f;
    for (int64_t s = 0; s < splits_; ++s) top = std::max(top, at(s).peak[row]);
    std::fill_n(mean, width, 0.0f);
    for (int64_t s = 0; s < splits_; ++s) {
      const SoftmaxState part = at(s);
      const float weight = std::exp((part.peak[row] - top) * scale);
      total += weight * part.total[row];
      const float* from = part.mean + row * part.row_stride;
      for (int64_t d = 0; d < width; ++d) mean[d] += weight * from[d * part.width_stride];
    }
    for (int64_t d = 0; d < width; ++d) mean[d] /= total;
    *lse = top * scale + std::log(total);
  }

 private:
  int64_t splits_, rows_, width_;
  bool transposed_;
  std::vector<float> peak_, total_, mean_;
};

enum class Path { kPlain, kAvx512, kAmx };

Path choose(const Tensor& rows, const Tensor& keys, bool amx, bool avx512) {
  if (rows.scalar_type() != keys.scalar_type()) return Path::kPlain;
  const bool bf16 = keys.scalar_type() == ScalarType::BFloat16;
  if (amx && bf16 && amx_bf16_ready()) return Path::kAmx;
  const bool able = isa_level() == 4 && (!bf16 || avx512_bf16_ready());
  return avx512 && able && keys.size(1) % 32 == 0 ? Path::kAvx512 : Path::kPlain;
}

struct Problem {
  const Tensor& rows;
  const Tensor& keys;
  float scale;
  Path path;
};

// Rows [first, first + count) against all keys.
void run_rows(const Problem& problem, int64_t first, int64_t count, float* lse, float* mean) {
  const int64_t width = problem.keys.size(1), num_keys = problem.keys.size(0);
  const int64_t splits = std::clamp<int64_t>(num_keys / kMinSplit, 1, kMaxSplits);
  const int64_t share = (num_keys + splits - 1) / splits;
  const bool bf16 = problem.keys.scalar_type() == ScalarType::BFloat16;
  const bool amx = problem.path == Path::kAmx;
  const int64_t padded_rows = amx ? amx_padded_rows(count) : count;
  const int64_t padded_width = amx ? amx_padded_width(width) : width;
  Partials partials(splits, padded_rows, padded_width, amx);
  std::vector<uint32_t> packed(amx ? padded_rows * padded_width / 2 : 0);
  if (amx) {
    const auto* from = static_cast<const uint16_t*>(problem.rows.const_data_ptr());
    amx_pack_rows(from + first * width, count, width, packed.data());
  }
  torch::stable::parallel_for(0, splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const KeyRange range{problem.keys.const_data_ptr(), bf16, s * share,
                           std::min((s + 1) * share, num_keys), width};
      SoftmaxState state = partials.at(s);
      if (amx) {
        stream_amx(packed.data(), count, range, problem.scale, state);
        continue;
      }
      const int64_t bytes = problem.rows.element_size() * first * width;
      const auto* from = static_cast<const char*>(problem.rows.const_data_ptr()) + bytes;
      if (problem.path == Path::kAvx512) {
        stream_avx512(from, count, range, problem.scale, state);
      } else {
        stream_plain(reinterpret_cast<const float*>(from), count, range, problem.scale, state);
      }
    }
  });
  torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      partials.join(r, width, problem.scale, lse + first + r, mean + (first + r) * width);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> softmax_mean(Tensor rows, Tensor keys, Tensor temperature, bool amx,
                                        bool avx512) {
  check(rows, keys, temperature);
  const Path path = choose(rows, keys, amx, avx512);
  if (path == Path::kPlain && rows.scalar_type() != ScalarType::Float) {
    rows = torch::stable::to(rows, ScalarType::Float);
  }
  const int64_t count = rows.size(0), width = rows.size(1);
  const std::array<int64_t, 1> lse_size{count};
  const std::array<int64_t, 2> mean_size{count, width};
  Tensor lse = torch::stable::new_empty(rows, {lse_size.data(), 1}, ScalarType::Float);
  Tensor mean = torch::stable::new_empty(rows, {mean_size.data(), 2}, ScalarType::Float);
  float scale = 1.0f / *static_cast<const float*>(temperature.const_data_ptr());
  if (scale < 0.0f) {  // the largest score must be the largest after scaling too
    rows = negative(rows);
    scale = -scale;
  }
  const Problem problem{rows, keys, scale, path};
  for (int64_t first = 0; first < count; first += kRowTile) {
    run_rows(problem, first, std::min(kRowTile, count - first),
             static_cast<float*>(lse.mutable_data_ptr()),
             static_cast<float*>(mean.mutable_data_ptr()));
  }
  return {lse, mean};
}

}  // namespace blipfast
