#include "core/intrinsics_avx512.h"
#include "core/roofline.h"

namespace realm_fast::roofline {
namespace {

constexpr int kChains = 24;

float fma_loop(int64_t iterations) {
  __m512 sum[kChains];
  volatile float source = 1e-9f;
  const __m512 x = _mm512_set1_ps(source);
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_set1_ps(source);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_fmadd_ps(x, x, sum[c]);
  }
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) total = _mm512_add_ps(total, sum[c]);
  return _mm512_cvtss_f32(total);
}

}  // namespace

Loop avx512_loop(Kind kind) {
  if (kind == Kind::int8) return {nullptr, 0};                // without VNNI the AVX2 loop serves
  return {fma_loop, static_cast<int64_t>(kChains) * 16 * 2};  // bfloat16: decoded, then multiplied as float32
}

float read_avx512(const char* data, int64_t bytes) {
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                    _mm512_setzero_si512()};
  for (int64_t i = 0; i < bytes; i += 256) {
    for (int c = 0; c < 4; ++c) sum[c] = _mm512_xor_si512(sum[c], _mm512_loadu_si512(data + i + 64 * c));
  }
  const __m512i total = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  return static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(total)));
}

}  // namespace realm_fast::roofline
