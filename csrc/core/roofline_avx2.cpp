#include <immintrin.h>

#include "core/roofline.h"

namespace realm_fast::roofline {
namespace {

constexpr int kChains = 12;

float fma_loop(int64_t iterations) {
  __m256 sum[kChains];
  volatile float source = 1e-9f;
  const __m256 x = _mm256_set1_ps(source);
  for (__m256& s : sum) s = _mm256_set1_ps(source);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm256_fmadd_ps(x, x, sum[c]);
  }
  __m256 total = _mm256_setzero_ps();
  for (const __m256 s : sum) total = _mm256_add_ps(total, s);
  return _mm256_cvtss_f32(total);
}

float madd_loop(int64_t iterations) {
  __m256i sum[kChains];
  volatile int source = 0x00010001;
  const __m256i x = _mm256_set1_epi32(source);
#pragma GCC unroll 12  // all of them, or GCC keeps the sums in memory and measures that
  for (int c = 0; c < kChains; ++c) sum[c] = _mm256_set1_epi32(source);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      __m256i products;  // as assembly: the compiler would multiply once, outside the loop
      asm volatile("vpmaddwd %2, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum[c]), "=&x"(products) : "x"(x));
    }
  }
  __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) total = _mm256_add_epi32(total, sum[c]);
  return static_cast<float>(_mm256_extract_epi32(total, 0));
}

}  // namespace

Loop avx2_loop(Kind kind) {
  if (kind == Kind::float32) return {fma_loop, kChains * 8 * 2};
  if (kind == Kind::bfloat16) return {fma_loop, kChains * 8 * 2};  // decoded, then multiplied as float32
  return {madd_loop, kChains * 16 * 2};
}

float read_avx2(const char* data, int64_t bytes) {
  __m256i sum[4] = {};
  for (int64_t i = 0; i < bytes; i += 128) {
    for (int c = 0; c < 4; ++c) {
      sum[c] = _mm256_xor_si256(sum[c], _mm256_loadu_si256((const __m256i*)(data + i + 32 * c)));
    }
  }
  const __m256i total = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<float>(_mm256_extract_epi32(total, 0));
}

}  // namespace realm_fast::roofline
