// AMX tiles on a CPU without them, in plain C++, after Intel's description of each instruction. Included
// after emulated_avx512.h; it proves shapes, strides and layouts. Rounding follows the description; denormals
// are kept where AMX takes them for zero, which the stored bfloat16 never are.
#pragma once

#include <cstdint>
#include <cstring>

#define __AMX_BF16__ 1  // the sources take their AMX branches

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud

namespace {
namespace emulated_amx {

struct Tile {
  int rows, row_bytes;
  char data[16][64];
};

// A trap stands where the processor would fault.
inline void require(bool holds) {
  if (!holds) __builtin_trap();
}

struct State {
  bool configured;
  Tile tiles[8];

  Tile& operator[](int tile) {
    require(configured && tiles[tile].rows > 0 && tiles[tile].row_bytes > 0);
    return tiles[tile];
  }
};
thread_local State state;

inline void load_config(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, 64);
  require(bytes[0] == 1);
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0);
  for (int i = 32; i < 48; ++i) require(bytes[i] == 0);
  for (int i = 56; i < 64; ++i) require(bytes[i] == 0);
  state = State{true, {}};
  for (int t = 0; t < 8; ++t) {
    state.tiles[t].row_bytes = bytes[16 + 2 * t] + 256 * bytes[17 + 2 * t];
    state.tiles[t].rows = bytes[48 + t];
    require(state.tiles[t].rows <= 16 && state.tiles[t].row_bytes <= 64);
    require((state.tiles[t].rows == 0) == (state.tiles[t].row_bytes == 0));
  }
}

inline void release() { state = State{}; }

inline void zero(int tile) { std::memset(state[tile].data, 0, sizeof state[tile].data); }

inline void load(int tile, const void* base, int64_t stride) {
  Tile& to = state[tile];
  zero(tile);
  for (int r = 0; r < to.rows; ++r) {
    std::memcpy(to.data[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(to.row_bytes));
  }
}

inline void store(int tile, void* base, int64_t stride) {
  const Tile& from = state[tile];
  for (int r = 0; r < from.rows; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, from.data[r], static_cast<size_t>(from.row_bytes));
  }
}

template <class T>
T at(const Tile& tile, int row, int i) {
  T value;
  std::memcpy(&value, tile.data[row] + i * static_cast<int>(sizeof(T)), sizeof(T));
  return value;
}

inline float widened(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <class Sum, class Element>
void add_product(int sums, int left, int right, Element element) {
  Tile& to = state[sums];
  const Tile &a = state[left], &b = state[right];
  require(sums != left && sums != right && left != right);
  require(to.rows == a.rows && to.row_bytes % 4 == 0 && to.row_bytes == b.row_bytes &&
          a.row_bytes == 4 * b.rows);
  for (int m = 0; m < a.rows; ++m) {
    for (int n = 0; n < b.row_bytes / 4; ++n) {
      const Sum sum = element(at<Sum>(to, m, n), a, b, m, n);
      std::memcpy(to.data[m] + 4 * n, &sum, 4);
    }
  }
}

inline void dpbf16ps(int sums, int left, int right) {
  add_product<float>(sums, left, right, [](float sum, const Tile& a, const Tile& b, int m, int n) {
    float even = 0, odd = 0;
    for (int k = 0; k < b.rows; ++k) {
      even = __builtin_fmaf(widened(at<uint16_t>(a, m, 2 * k)), widened(at<uint16_t>(b, k, 2 * n)), even);
      odd =
          __builtin_fmaf(widened(at<uint16_t>(a, m, 2 * k + 1)), widened(at<uint16_t>(b, k, 2 * n + 1)), odd);
    }
    return sum + (even + odd);
  });
}

inline void dpbsud(int sums, int left, int right) {
  add_product<int32_t>(sums, left, right, [](int32_t sum, const Tile& a, const Tile& b, int m, int n) {
    for (int k = 0; k < b.rows; ++k) {
      for (int i = 0; i < 4; ++i) sum += at<int8_t>(a, m, 4 * k + i) * at<uint8_t>(b, k, 4 * n + i);
    }
    return sum;
  });
}

}  // namespace emulated_amx
}  // namespace

#define _tile_loadconfig(config) emulated_amx::load_config(config)
#define _tile_release() emulated_amx::release()
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, base, stride) emulated_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_amx::store(tile, base, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_amx::dpbf16ps(sums, left, right)
#define _tile_dpbsud(sums, left, right) emulated_amx::dpbsud(sums, left, right)
