// Streaming softmax on AMX tiles for bf16 rows and keys. Both products are taken transposed:
//   scores^T (keys x rows)  = keys (keys x width) . rows^T       keys are read where they lie
//   mean^T   (width x rows) += keys^T (width x keys) . weights   weights in bf16, sums in fp32
// A tile is 16 lines of 64 bytes; the right-hand factor holds pairs of bf16 along the summed axis.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "isa.h"
#include "softmax_mean.h"

#if BLIPFAST_CLONES
#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>
#endif

namespace blipfast {

int64_t amx_padded_rows(int64_t num_rows) { return (num_rows + 31) / 32 * 32; }
int64_t amx_padded_width(int64_t width) { return (width + 31) / 32 * 32; }

#if BLIPFAST_CLONES

namespace {

constexpr int64_t kBlock = 256;  // keys at a time: scores, weights and keys^T stay in L2

bool ask_for_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (isa_level() < 4 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 24) & 1u, bf16 = (d >> 22) & 1u;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// keys (kBlock, width) bf16 -> tiles [width / 16][kBlock / 32] of 16 x 16 dwords: line d, key pairs.
BLIPFAST_AMX void transpose_keys(const uint16_t* keys, int64_t width, uint32_t* out) {
  for (int64_t d = 0; d < width; d += 16) {
    for (int64_t k = 0; k < kBlock; k += 32) {
      __m512i v[16];
      for (int p = 0; p < 16; ++p) {
        const uint16_t* line = keys + (k + 2 * p) * width + d;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)line));
        const __m512i high =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(line + width)));
        v[p] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      transpose_16x16(v);
      uint32_t* tile = out + ((d / 16) * (kBlock / 32) + k / 32) * 256;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 16 * i, v[i]);
    }
  }
}

// scores (kBlock x stride) = keys (kBlock x width) . packed rows (width / 2 x stride).
BLIPFAST_AMX void score_product(const uint16_t* keys, int64_t width, const uint32_t* packed,
                                int64_t stride, float* scores) {
  for (int64_t r = 0; r < stride; r += 32) {
    for (int64_t k = 0; k < kBlock; k += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t d = 0; d < width; d += 32) {
        _tile_loadd(4, keys + k * width + d, width * 2);
        _tile_loadd(5, keys + (k + 16) * width + d, width * 2);
        _tile_loadd(6, packed + (d / 2) * stride + r, stride * 4);
        _tile_loadd(7, packed + (d / 2) * stride + r + 16, stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* out = scores + k * stride + r;
      _tile_stored(0, out, stride * 4);
      _tile_stored(1, out + 16, stride * 4);
      _tile_stored(2, out + 16 * stride, stride * 4);
      _tile_stored(3, out + 16 * stride + 16, stride * 4);
    }
  }
}

// mean (width x stride) += keys^T tiles . weights (kBlock / 2 x stride).
BLIPFAST_AMX void mean_product(const uint32_t* tiles, int64_t width, const uint32_t* weights,
                               int64_t stride, float* mean) {
  constexpr int64_t kSteps = kBlock / 32;
  for (int64_t r = 0; r < stride; r += 32) {
    for (int64_t d = 0; d < width; d += 32) {
      float* out = mean + d * stride + r;
      _tile_loadd(0, out, stride * 4);
      _tile_loadd(1, out + 16, stride * 4);
      _tile_loadd(2, out + 16 * stride, stride * 4);
      _tile_loadd(3, out + 16 * stride + 16, stride * 4);
      for (int64_t step = 0; step < kSteps; ++step) {
        _tile_loadd(4, tiles + ((d / 16) * kSteps + step) * 256, 64);
        _tile_loadd(5, tiles + ((d / 16 + 1) * kSteps + step) * 256, 64);
        _tile_loadd(6, weights + step * 16 * stride + r, stride * 4);
        _tile_loadd(7, weights + step * 16 * stride + r + 16, stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out, stride * 4);
      _tile_stored(1, out + 16, stride * 4);
      _tile_stored(2, out + 16 * stride, stride * 4);
      _tile_stored(3, out + 16 * stride + 16, stride * 4);
    }
  }
}

BLIPFAST_AMX void fade_columns(float* mean, const float* fade, int64_t width, int64_t stride) {
  bool changed = false;
  for (int64_t r = 0; r < stride; ++r) changed |= fade[r] != 1.0f;
  if (!changed) return;
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t r = 0; r < stride; ++r) mean[d * stride + r] *= fade[r];
  }
}

BLIPFAST_AMX void stream_amx_impl(const uint32_t* packed, int64_t num_rows, const KeyRange& range,
                                  float scale, SoftmaxState& state) {
  const int64_t stride = amx_padded_rows(num_rows), width = amx_padded_width(range.width);
  Aligned<float> scores(kBlock * stride), fade(stride);
  Aligned<uint32_t> weights(kBlock / 2 * stride), tiles(kBlock / 2 * width);
  Aligned<uint16_t> copy(kBlock * width);
  const uint16_t* all = static_cast<const uint16_t*>(range.keys);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const int64_t count = std::min(kBlock, range.end - begin);
    const uint16_t* keys = all + begin * range.width;
    if (count < kBlock || width != range.width) {
      std::memset(copy.data, 0, kBlock * width * 2);
      for (int64_t k = 0; k < count; ++k) {
        std::memcpy(copy.data + k * width, keys + k * range.width, range.width * 2);
      }
      std::memset(weights.data, 0, kBlock / 2 * stride * 4);
      keys = copy.data;
    }
    score_product(keys, width, packed, stride, scores.data);
    softmax_block_bf16(scores.data, count, stride, stride, scale, state.peak, state.total,
                       fade.data, weights.data);
    transpose_keys(keys, width, tiles.data);
    fade_columns(state.mean, fade.data, width, stride);
    mean_product(tiles.data, width, weights.data, stride, state.mean);
  }
  _tile_release();
}

}  // namespace

bool amx_bf16_ready() {
  static const bool ready = ask_for_amx();
  return ready;
}

void stream_amx(const uint32_t* packed_rows, int64_t num_rows, const KeyRange& range, float scale,
                SoftmaxState& state) {
  stream_amx_impl(packed_rows, num_rows, range, scale, state);
}

#else

bool amx_bf16_ready() { return false; }
void stream_amx(const uint32_t*, int64_t, const KeyRange&, float, SoftmaxState&) {}

#endif

void amx_pack_rows(const uint16_t* rows, int64_t num_rows, int64_t width, uint32_t* packed) {
  const int64_t stride = amx_padded_rows(num_rows);
  std::fill_n(packed, stride * amx_padded_width(width) / 2, 0u);
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t d = 0; d < width; ++d) {
      packed[(d / 2) * stride + r] |= static_cast<uint32_t>(rows[r * width + d]) << (16 * (d % 2));
    }
  }
}

}  // namespace blipfast
