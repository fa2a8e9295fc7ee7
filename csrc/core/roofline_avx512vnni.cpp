#include "core/intrinsics_avx512.h"
#include "core/roofline.h"

namespace realm_fast::roofline {
namespace {

constexpr int kChains = 24;

float dot_loop(int64_t iterations) {
  __m512i sum[kChains];
  volatile int source = 0x01010101;
  const __m512i x = _mm512_set1_epi32(source);
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_set1_epi32(source);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbusd_epi32(sum[c], x, x);
  }
  __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) total = _mm512_add_epi32(total, sum[c]);
  return static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(total)));
}

}  // namespace

Loop avx512vnni_loop() { return {dot_loop, static_cast<int64_t>(kChains) * 64 * 2}; }

}  // namespace realm_fast::roofline
