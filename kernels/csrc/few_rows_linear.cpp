#include "few_rows_linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "amx.h"
#include "bf16.h"
#include "gelu.h"
#include "isa.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 16, kMaxRows = 64, kGroups = kMaxRows / kTile;

// One layer, or one of several side by side.
struct Layer {
  const uint32_t* rows;  // packed: pairs along K, (K / 2, 16 * groups)
  const uint16_t* weight;
  const uint16_t* bias;
  uint16_t* out;
  int64_t num_rows, groups, inner, size;
  bool gelu;

  int64_t tiles() const { return (size + kTile - 1) / kTile; }
  Layer operator+(int64_t n) const {
    Layer other = *this;
    other.rows += n * inner / 2 * groups * kTile;
    other.weight += n * size * inner;
    other.bias += n * size;
    other.out += n * num_rows * size;
    return other;
  }
};

void check(const Tensor& rows, const Tensor& weight, const Tensor& bias) {
  const auto good = [](const Tensor& t, int64_t dim) {
    return t.dim() == dim && t.is_contiguous() && t.scalar_type() == ScalarType::BFloat16;
  };
  const int64_t dim = rows.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && good(rows, dim) && good(weight, dim) &&
                      good(bias, dim - 1),
                  "few_rows_linear: rows, weight and bias must be contiguous bfloat16, and all of "
                  "one layer or all of several");
  bool fits = rows.size(-1) == weight.size(-1) && bias.size(-1) == weight.size(-2);
  if (dim == 3) fits = fits && weight.size(0) == rows.size(0) && bias.size(0) == rows.size(0);
  STD_TORCH_CHECK(fits, "few_rows_linear: rows have width ", rows.size(-1), ", the weight is ",
                  weight.size(-2), " x ", weight.size(-1), ", the bias has ", bias.size(-1));
  STD_TORCH_CHECK(rows.size(-2) >= 1 && rows.size(-2) <= kMaxRows && rows.size(-1) % 32 == 0 &&
                      rows.size(-1) > 0,
                  "few_rows_linear: takes 1 to ", kMaxRows, " rows of a width that 32 divides");
  STD_TORCH_CHECK(amx_bf16_ready(), "few_rows_linear: this processor has no AMX for bfloat16");
}

#if BLIPFAST_CLONES

// Sums (16 outputs x 16 rows) of a tile become outputs [first, first + count) of a group's rows.
BLIPFAST_AMX void finish(const float* sums, const Layer& layer, int64_t group, int64_t first,
                         int64_t count) {
  __m512i lines[kTile];
  for (int64_t i = 0; i < kTile; ++i) lines[i] = _mm512_load_si512(sums + i * kTile);
  transpose_16x16(lines);
  float bias[kTile] = {};
  for (int64_t j = 0; j < count; ++j) bias[j] = bf16_to_float(layer.bias[first + j]);
  const int64_t rows = std::min(kTile, layer.num_rows - group * kTile);
  for (int64_t r = 0; r < rows; ++r) {
    alignas(64) float values[kTile];
    uint16_t results[kTile];
    _mm512_store_si512(values, lines[r]);
#pragma omp simd
    for (int64_t j = 0; j < kTile; ++j) values[j] += bias[j];
    if (layer.gelu) {
#pragma omp simd
      for (int64_t j = 0; j < kTile; ++j) values[j] = gelu(values[j]).value;
    }
#pragma omp simd
    for (int64_t j = 0; j < kTile; ++j) results[j] = float_to_bf16(values[j]);
    std::memcpy(layer.out + (group * kTile + r) * layer.size + first, results, count * 2);
  }
}

// Outputs of tiles [begin, end) of 16 weight rows each.
BLIPFAST_AMX void run_tiles(const Layer& layer, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) float sums[kGroups][kTile * kTile];
  const int64_t stride = layer.groups * kTile;
  std::vector<uint16_t> last;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTile, count = std::min(kTile, layer.size - first);
    const uint16_t* weight = layer.weight + first * layer.inner;
    if (count < kTile) {  // a tile's load reads 16 lines, whatever there is
      last.assign(kTile * layer.inner, 0);
      std::copy_n(weight, count * layer.inner, last.data());
      weight = last.data();
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < layer.inner; k += 32) {
      const uint32_t* rows = layer.rows + (k / 2) * stride;
      _tile_loadd(4, weight + k, layer.inner * 2);
      _tile_loadd(5, rows, stride * 4);
      _tile_dpbf16ps(0, 4, 5);
      if (layer.groups > 1) {
        _tile_loadd(6, rows + kTile, stride * 4);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (layer.groups > 2) {
        _tile_loadd(7, rows + 2 * kTile, stride * 4);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (layer.groups > 3) {
        _tile_loadd(5, rows + 3 * kTile, stride * 4);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, sums[0], kTile * 4);
    _tile_stored(1, sums[1], kTile * 4);
    _tile_stored(2, sums[2], kTile * 4);
    _tile_stored(3, sums[3], kTile * 4);
    for (int64_t g = 0; g < layer.groups; ++g) finish(sums[g], layer, g, first, count);
  }
  _tile_release();
}

#else

void run_tiles(const Layer&, int64_t, int64_t) {}

#endif

}  // namespace

Tensor few_rows_linear(Tensor rows, Tensor weight, Tensor bias, bool gelu) {
  check(rows, weight, bias);
  const bool several = rows.dim() == 3;
  const int64_t layers = several ? rows.size(0) : 1;
  const int64_t num_rows = rows.size(-2), inner = rows.size(-1), size = weight.size(-2);
  const int64_t groups = (num_rows + kTile - 1) / kTile, stride = groups * kTile;
  const std::array<int64_t, 3> shape{layers, num_rows, size};
  Tensor out = torch::stable::new_empty(rows, {shape.data() + !several, 2u + several});
  std::vector<uint32_t> packed(layers * inner / 2 * stride, 0u);
  const auto* from = static_cast<const uint16_t*>(rows.const_data_ptr());
  for (int64_t r = 0; r < layers * num_rows; ++r) {
    uint32_t* to = packed.data() + r / num_rows * inner / 2 * stride + r % num_rows;
    for (int64_t k = 0; k < inner; k += 2) {
      std::memcpy(to + (k / 2) * stride, from + r * inner + k, 4);
    }
  }
  const Layer first{packed.data(),
                    static_cast<const uint16_t*>(weight.const_data_ptr()),
                    static_cast<const uint16_t*>(bias.const_data_ptr()),
                    static_cast<uint16_t*>(out.mutable_data_ptr()),
                    num_rows,
                    groups,
                    inner,
                    size,
                    gelu};
  const int64_t tiles = first.tiles();
  torch::stable::parallel_for(0, layers * tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin / tiles; n * tiles < end; ++n) {
      run_tiles(first + n, std::max(begin - n * tiles, int64_t{0}), std::min(end - n * tiles, tiles));
    }
  });
  return out;
}

}  // namespace blipfast
