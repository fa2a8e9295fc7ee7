// Vectors of the level this file is compiled for, and the arithmetic that the kernels share.
//
// Everything here has internal linkage and uses no std template: code compiled for a higher level must never
// be what the linker keeps for a lower one.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#pragma GCC diagnostic push
// GCC 12's own header reads _mm512_undefined_ps() on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace realm_fast {
namespace {

#define REALM_FAST_INLINE inline __attribute__((always_inline))

// Float vectors of the level: 16 lanes with AVX-512, 8 with AVX2, else 4.
struct F32 {
  using scalar = float;
#if defined(__AVX512F__)
  static constexpr int lanes = 16;
#elif defined(__AVX2__)
  static constexpr int lanes = 8;
#else
  static constexpr int lanes = 4;
#endif
  typedef float vec __attribute__((vector_size(lanes * 4), may_alias));
  typedef int32_t ivec __attribute__((vector_size(lanes * 4), may_alias));

  static REALM_FAST_INLINE vec load(const float* p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static REALM_FAST_INLINE void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
  static REALM_FAST_INLINE vec set(float x) { return x - vec{}; }

  static REALM_FAST_INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
  }
  // The larger; where one is NaN, b.
  static REALM_FAST_INLINE vec max(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
  }
  static REALM_FAST_INLINE bool any_greater(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
    const ivec greater = a > b;
    int32_t any = 0;
    for (int i = 0; i < lanes; ++i) any |= greater[i];
    return any != 0;
#endif
  }

  // keys holds `lanes` integers: where keys[i] == key, the first, elsewhere the second.
  static REALM_FAST_INLINE vec where_equal(const int32_t* keys, int32_t key, vec yes, vec no) {
    ivec k;
    memcpy(&k, keys, sizeof k);
    return k == key ? yes : no;
  }

  // exp(x), relative error below 2^-22.5 (1.4 units in the last place; tests/ops/test_marginal_lse.py walks
  // the floats); 0 below -87.3 (no subnormal results), +inf above 88.7, NaN for NaN. x = n ln 2 + r, |r| <=
  // ln 2 / 2; the polynomial for e^r is Cephes' expf (Moshier, netlib.org/cephes).
  static REALM_FAST_INLINE vec exp(vec x) {
    const vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec n = fma(x, set(1.44269504088896341f), magic) - magic;
    vec r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    vec p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    vec y = fma(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
    // scalef saturates by itself, except that it also makes subnormals, which the other levels do not.
    y = (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
    const __mmask16 tiny = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3365448f), _CMP_LT_OQ);
    y = (vec)_mm512_mask_mov_ps((__m512)y, tiny, _mm512_setzero_ps());
    // Far above the range n * ln 2 is inexact enough to turn r into nonsense; so is inf - inf.
    const __mmask16 huge = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(88.7228394f), _CMP_GT_OQ);
    return (vec)_mm512_mask_mov_ps((__m512)y, huge, _mm512_set1_ps(__builtin_inff()));
#else
    // In two steps, since 2^128 is no float.
    const ivec e = __builtin_convertvector(
        x < -87.3365448f ? vec{} : (x > 88.7228394f ? vec{} : (n == n ? n : vec{})), ivec);
    const ivec half = e >> 1;
    y = y * (vec)((half + 127) << 23) * (vec)((e - half + 127) << 23);
    y = x < -87.3365448f ? vec{} : y;
    return x > 88.7228394f ? set(__builtin_inff()) : y;
#endif
  }
};

// Doubles, for checks of gradients: two lanes, the exponential of libm.
struct F64 {
  using scalar = double;
  static constexpr int lanes = 2;
  typedef double vec __attribute__((vector_size(16), may_alias));
  typedef int64_t ivec __attribute__((vector_size(16), may_alias));
  static REALM_FAST_INLINE vec load(const double* p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static REALM_FAST_INLINE void store(double* p, vec v) { memcpy(p, &v, sizeof v); }
  static REALM_FAST_INLINE vec set(double x) { return x - vec{}; }
  static REALM_FAST_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
  static REALM_FAST_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
  static REALM_FAST_INLINE bool any_greater(vec a, vec b) { return a[0] > b[0] || a[1] > b[1]; }
  static REALM_FAST_INLINE vec where_equal(const int32_t* keys, int32_t key, vec yes, vec no) {
    return vec{keys[0] == key ? yes[0] : no[0], keys[1] == key ? yes[1] : no[1]};
  }
  static REALM_FAST_INLINE vec exp(vec x) { return vec{::exp(x[0]), ::exp(x[1])}; }
};

// bfloat16 and float16, as bits.
REALM_FAST_INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
REALM_FAST_INLINE uint16_t float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);     // stay a NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
REALM_FAST_INLINE float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
  float value;
  uint32_t wide;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    memcpy(&wide, &value, 4);
    wide |= sign;
  } else if (exponent == 31) {
    wide = sign | 0x7f800000 | (mantissa << 13);
  } else {
    wide = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  memcpy(&value, &wide, 4);
  return value;
}
REALM_FAST_INLINE uint16_t float_to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more: infinity
  if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves mantissa * 2^-24 in the low bits, rounded to even
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | (bits >> 13));
}

// How a tensor's elements are stored. Python's codes: realm_fast/ops/marginal_lse.py.
enum : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

REALM_FAST_INLINE double read(const void* base, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return static_cast<const float*>(base)[i];
    case kFloat64:
      return static_cast<const double*>(base)[i];
    case kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(base)[i]);
    default:
      return f16_to_float(static_cast<const uint16_t*>(base)[i]);
  }
}
REALM_FAST_INLINE void write(void* base, int dtype, int64_t i, double value) {
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(base)[i] = static_cast<float>(value);
      break;
    case kFloat64:
      static_cast<double*>(base)[i] = value;
      break;
    case kBFloat16:
      static_cast<uint16_t*>(base)[i] = float_to_bf16(static_cast<float>(value));
      break;
    default:
      static_cast<uint16_t*>(base)[i] = float_to_f16(static_cast<float>(value));
      break;
  }
}

}  // namespace
}  // namespace realm_fast
