// The shapes of AMX's tile registers: up to 16 rows of up to 64 bytes. Internal linkage throughout: see
// simd.h.
//
// Permission to use tiles is asked for once (cpu.cpp). A task gives its tiles their shapes and calls
// _tile_release() at its end, so that the system need not save them; what throws in between leaves them as
// they are, which harms nobody, as the next task gives its own.
#pragma once

#include <cstdint>

#include "core/intrinsics_avx512.h"

namespace realm_fast {
namespace {

struct TileShapes {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;

  void set(int tile, int64_t rows, int64_t row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  }

  // All tiles are zero then.
  void use() const {
    asm volatile("" : : "r"(&config) : "memory");  // GCC 12 tells its optimiser of 8 bytes that this reads
    _tile_loadconfig(&config);
  }
};

}  // namespace
}  // namespace realm_fast
