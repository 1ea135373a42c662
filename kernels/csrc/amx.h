// What kernels on AMX tiles share: the shape of a tile, aligned memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "avx512.h"

#if BLIPFAST_CLONES
#define BLIPFAST_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace blipfast {

// Eight tiles of 16 lines of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <class T>
struct Aligned {
  explicit Aligned(int64_t count)
      : data(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data), 0, count * sizeof(T));
  }
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* data;
};

}  // namespace blipfast
#endif
