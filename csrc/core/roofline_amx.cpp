#include "core/roofline.h"
#include "core/tiles_amx.h"

namespace realm_fast::roofline {
namespace {

constexpr int kChains = 6;

// Six tiles of sums, one of each operand: all zero, for which a product takes as long as for others.
void shape_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, 64);
  shapes.use();
}

float result_of_tile_0() {
  alignas(64) float sums[16 * 16];
  _tile_stored(0, sums, 64);
  _tile_release();
  return sums[0];
}

float bfloat16_loop(int64_t iterations) {
  shape_tiles();
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  return result_of_tile_0();
}

float int8_loop(int64_t iterations) {
  shape_tiles();
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbsud(0, 6, 7);
    _tile_dpbsud(1, 6, 7);
    _tile_dpbsud(2, 6, 7);
    _tile_dpbsud(3, 6, 7);
    _tile_dpbsud(4, 6, 7);
    _tile_dpbsud(5, 6, 7);
  }
  return result_of_tile_0();
}

}  // namespace

Loop amx_loop(Kind kind) {
  constexpr int64_t kScores = int64_t{kChains} * 16 * 16;
  if (kind == Kind::bfloat16) return {bfloat16_loop, kScores * 32 * 2};
  if (kind == Kind::int8) return {int8_loop, kScores * 64 * 2};
  return {nullptr, 0};
}

}  // namespace realm_fast::roofline
