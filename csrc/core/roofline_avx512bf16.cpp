#include "core/intrinsics_avx512.h"
#include "core/roofline.h"

namespace realm_fast::roofline {
namespace {

constexpr int kChains = 24;

float dot_loop(int64_t iterations) {
  __m512 sum[kChains];
  volatile int source = 0x30803080;
  const __m512bh x = (__m512bh)_mm512_set1_epi32(source);
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_castsi512_ps(_mm512_set1_epi32(source));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], x, x);
  }
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) total = _mm512_add_ps(total, sum[c]);
  return _mm512_cvtss_f32(total);
}

}  // namespace

Loop avx512bf16_loop() { return {dot_loop, static_cast<int64_t>(kChains) * 32 * 2}; }

}  // namespace realm_fast::roofline
