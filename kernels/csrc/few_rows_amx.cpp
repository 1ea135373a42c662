#include "amx.h"
#include "few_rows_tiles.h"

namespace blipfast {

#if BLIPFAST_CLONES

BLIPFAST_AMX void few_rows_amx(const FewRows<uint16_t>& layer, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kFewRowsTile;
  const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) float sums[kFewRowsGroups][kTile * kTile];
  const int64_t stride = layer.stride();
  std::vector<uint16_t> copy;
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint16_t* weight = tile_weights(layer, tile, copy);
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
    for (int64_t g = 0; g < layer.groups; ++g) finish_tile(sums[g], layer, g, tile);
  }
  _tile_release();
}

#else

void few_rows_amx(const FewRows<uint16_t>&, int64_t, int64_t) {}

#endif

}  // namespace blipfast
