// AVX-512 on a CPU without it: SIMDe's portable versions of the intrinsics (Debian: libsimde-dev), and here
// those that it lacks. Included, with REALM_FAST_EMULATED_AVX512, before the sources of the AVX-512 levels,
// which are then compiled for AVX2: what runs is their own code, with the instructions replaced one by one.
// It proves the algorithms (layouts, indices, masks), not what a compiler makes of them for AVX-512, and bits
// only where the order of operations is fixed: SIMDe's dpbf16 keeps denormals and rounds in its own order.
#pragma once

#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#ifdef __AVX512F__
#error "this file is for compilers told to make no AVX-512 code"
#endif
// From here on the sources take their AVX-512 branches.
#define __AVX512F__ 1
#ifdef EMULATED_AVX512BF16
#define __AVX512BF16__ 1
#endif

// GCC declares these without AVX-512 too, but cannot compile them: macros take their places.
namespace emulated {

template <class To, class From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline __mmask16 mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int predicate) {
  __mmask16 result = 0;
  for (int i = 0; i < 16; ++i) {
    bool holds = false;
    switch (predicate) {
      case _CMP_GE_OQ:
        holds = a[i] >= b[i];
        break;
      case _CMP_NGE_UQ:
        holds = !(a[i] >= b[i]);
        break;
      case _CMP_GT_OQ:
        holds = a[i] > b[i];
        break;
      case _CMP_LT_OQ:
        holds = a[i] < b[i];
        break;
      default:
        __builtin_trap();  // add it
    }
    if (holds) result = (__mmask16)(result | 1 << i);
  }
  return (__mmask16)(result & mask);
}

inline __m512 shuffle_f32x4(__m512 a, __m512 b, int lanes) {
  __m512 result;
  for (int i = 0; i < 16; ++i) {
    const int from = 4 * (lanes >> i / 4 * 2 & 3) + i % 4;
    result[i] = i < 8 ? a[from] : b[from];
  }
  return result;
}

inline float reduce_add_ps(__m512 a) {  // in the order of GCC's: halves upon halves
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  }
  return a[0];
}

inline __m512i cvtepu16_epi32(__m256i a) {
  uint16_t from[16];
  uint32_t to[16];
  __builtin_memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  return cast<__m512i>(to);
}

inline __m512 cvtepi32_ps(__m512i a) {
  int32_t from[16];
  __m512 to;
  __builtin_memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = (float)from[i];
  return to;
}

inline __m512 cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return cast<__m512>(halves);
}

// To nearest, ties to even; denormals become zeros, as vcvtneps2bf16 has it.
inline __m256bh cvtneps_pbh(__m512 a) {
  uint32_t bits[16];
  uint16_t to[16];
  __builtin_memcpy(bits, &a, sizeof bits);
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      to[i] = (uint16_t)(bits[i] >> 16 | 0x40);
    } else if (magnitude < 0x00800000) {
      to[i] = (uint16_t)(bits[i] >> 16 & 0x8000);
    } else {
      to[i] = (uint16_t)((bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
    }
  }
  return cast<__m256bh>(to);
}

}  // namespace emulated

#undef _cvtmask16_u32
#undef _kand_mask16
#undef _kortestc_mask16_u8
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_shuffle_f32x4
#undef _mm512_reduce_add_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtss_f32
#undef _mm512_cvtepi32_ps
#define _cvtmask16_u32(a) ((unsigned)(a))
#define _kand_mask16(a, b) ((__mmask16)((a) & (b)))
#define _kortestc_mask16_u8(a, b) ((unsigned char)((__mmask16)((a) | (b)) == 0xffff))
#define _mm512_mask_cmp_ps_mask(mask, a, b, predicate) emulated::mask_cmp_ps_mask(mask, a, b, predicate)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::mask_cmp_ps_mask(0xffff, a, b, predicate)
#define _mm512_shuffle_f32x4(a, b, lanes) emulated::shuffle_f32x4(a, b, lanes)
#define _mm512_reduce_add_ps(a) emulated::reduce_add_ps(a)
#define _mm512_cvtepu16_epi32(a) emulated::cvtepu16_epi32(a)
#define _mm512_cvtph_ps(a) emulated::cvtph_ps(a)
#define _mm512_cvtneps_pbh(a) emulated::cvtneps_pbh(a)
#define _mm512_cvtss_f32(a) ((a)[0])
#define _mm512_cvtepi32_ps(a) emulated::cvtepi32_ps(a)
