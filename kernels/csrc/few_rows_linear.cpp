#include "few_rows_linear.h"

#include <torch/csrc/stable/ops.h>

#include <array>

#include "few_rows_tiles.h"

namespace blipfast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = kFewRowsTile, kMaxRows = kFewRowsTile * kFewRowsGroups;

void check(const Tensor& rows, const Tensor& weight, const Tensor& bias, bool amx) {
  const auto type = rows.scalar_type();
  const auto good = [type](const Tensor& t, int64_t dim) {
    return t.dim() == dim && t.is_contiguous() && t.scalar_type() == type;
  };
  const int64_t dim = rows.dim();
  STD_TORCH_CHECK((type == ScalarType::BFloat16 || type == ScalarType::Float) &&
                      (dim == 2 || dim == 3) && good(rows, dim) && good(weight, dim) &&
                      good(bias, dim - 1),
                  "few_rows_linear: rows, weight and bias must be contiguous, all bfloat16 or all "
                  "float32, and all of one layer or all of several");
  bool fits = rows.size(-1) == weight.size(-1) && bias.size(-1) == weight.size(-2);
  if (dim == 3) fits = fits && weight.size(0) == rows.size(0) && bias.size(0) == rows.size(0);
  STD_TORCH_CHECK(fits, "few_rows_linear: rows have width ", rows.size(-1), ", the weight is ",
                  weight.size(-2), " x ", weight.size(-1), ", the bias has ", bias.size(-1));
  STD_TORCH_CHECK(rows.size(-2) >= 1 && rows.size(-2) <= kMaxRows && rows.size(-1) % 32 == 0 &&
                      rows.size(-1) > 0,
                  "few_rows_linear: takes 1 to ", kMaxRows, " rows of a width that 32 divides");
  const bool ready = amx ? type == ScalarType::BFloat16 && amx_bf16_ready() : avx512_bf16_ready();
  STD_TORCH_CHECK(ready, "few_rows_linear: this processor has no ", amx ? "AMX" : "AVX-512",
                  " for bfloat16", amx ? ", or the rows are float32" : "");
}

#if BLIPFAST_CLONES

// Rows [first, first + 16) of from (num_rows, units) as columns of to, whose lines are stride apart.
BLIPFAST_AVX512 void pack_group(const uint32_t* from, int64_t num_rows, int64_t units,
                                int64_t first, uint32_t* to, int64_t stride) {
  for (int64_t k = 0; k < units; k += kTile) {
    __m512i lines[kTile];
    for (int64_t r = 0; r < kTile; ++r) {
      lines[r] = first + r < num_rows ? _mm512_loadu_si512(from + (first + r) * units + k)
                                      : _mm512_setzero_si512();
    }
    transpose_16x16(lines);
    for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(to + (k + i) * stride, lines[i]);
  }
}

#else

void pack_group(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*, int64_t) {}

#endif

template <class T>
void run_layers(const Tensor& rows, const Tensor& weight, const Tensor& bias, Tensor& out,
                bool gelu, bool amx) {
  const int64_t layers = rows.dim() == 3 ? rows.size(0) : 1;
  const int64_t num_rows = rows.size(-2), inner = rows.size(-1), size = weight.size(-2);
  const int64_t groups = (num_rows + kTile - 1) / kTile;
  FewRows<T> all{nullptr,
                 static_cast<const T*>(weight.const_data_ptr()),
                 static_cast<const T*>(bias.const_data_ptr()),
                 static_cast<T*>(out.mutable_data_ptr()),
                 num_rows,
                 groups,
                 inner,
                 size,
                 gelu};
  const int64_t units = all.units(), stride = all.stride(), tiles = all.tiles();
  std::vector<uint32_t> packed(layers * units * stride);
  all.rows = packed.data();
  const auto* from = static_cast<const uint32_t*>(rows.const_data_ptr());
  torch::stable::parallel_for(0, layers * groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t layer = n / groups, first = n % groups * kTile;
      uint32_t* to = packed.data() + layer * units * stride + first;
      pack_group(from + layer * num_rows * units, num_rows, units, first, to, stride);
    }
  });
  torch::stable::parallel_for(0, layers * tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin / tiles; n * tiles < end; ++n) {
      const int64_t from_tile = std::max(begin - n * tiles, int64_t{0});
      const int64_t to_tile = std::min(end - n * tiles, tiles);
      if constexpr (sizeof(T) == 2) {
        if (amx) {
          few_rows_amx(all + n, from_tile, to_tile);
          continue;
        }
      }
      few_rows_avx512(all + n, from_tile, to_tile);
    }
  });
}

}  // namespace

Tensor few_rows_linear(Tensor rows, Tensor weight, Tensor bias, bool gelu, bool amx) {
  check(rows, weight, bias, amx);
  const bool several = rows.dim() == 3;
  const std::array<int64_t, 3> shape{several ? rows.size(0) : 1, rows.size(-2), weight.size(-2)};
  Tensor out = torch::stable::new_empty(rows, {shape.data() + !several, 2u + several});
  if (rows.scalar_type() == ScalarType::BFloat16) {
    run_layers<uint16_t>(rows, weight, bias, out, gelu, amx);
  } else {
    run_layers<float>(rows, weight, bias, out, gelu, false);
  }
  return out;
}

}  // namespace blipfast
