// float32 panels, bfloat16 panels without vdpbf16ps, and packing, for AVX-512 F/BW/DQ/VL.
#include "mips_topk/scan_avx512.inl"

namespace realm_fast::mips {
namespace {

// Each score is one chain of fused multiply-adds in the order of the dimensions: the same bits whatever the
// tile, the group width or the thread.
struct Float32Op {
  using Acc = __m512;
  static constexpr int kQueryStepBytes = 4;

  [[gnu::always_inline]] static inline Acc start(const ScanRun&, int64_t) { return _mm512_setzero_ps(); }

  template <int W>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][kVectors], const char* panel,
                                                 const char* queries) {
    const __m512 rows[kVectors] = {_mm512_loadu_ps(panel), _mm512_loadu_ps(panel + 64),
                                   _mm512_loadu_ps(panel + 128)};
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const __m512 query = _mm512_set1_ps(float_at(queries + 4 * w));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[w][v] = _mm512_fmadd_ps(rows[v], query, acc[w][v]);
    }
  }

  [[gnu::always_inline]] static inline __m512 finish(const ScanRun&, int64_t, Acc acc) { return acc; }
};

// A bfloat16 is the upper half of a float32: a shift and a mask decode a pair.
struct DecodeBfloat16Op {
  using Acc = __m512;
  static constexpr int kQueryStepBytes = 8;

  [[gnu::always_inline]] static inline Acc start(const ScanRun&, int64_t) { return _mm512_setzero_ps(); }

  template <int W>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][kVectors], const char* panel,
                                                 const char* queries) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 rows[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        const __m512i pair = _mm512_loadu_si512(panel + 64 * v);
        rows[v] = _mm512_castsi512_ps(half == 0 ? _mm512_slli_epi32(pair, 16)
                                                : _mm512_and_si512(pair, _mm512_set1_epi32(-65536)));
      }
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) {
        const __m512 query = _mm512_set1_ps(float_at(queries + 4 * (W * half + w)));
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) acc[w][v] = _mm512_fmadd_ps(rows[v], query, acc[w][v]);
      }
    }
  }

  [[gnu::always_inline]] static inline __m512 finish(const ScanRun&, int64_t, Acc acc) { return acc; }
};

void scan_float32(const ScanRun& run) { scan<Float32Op>(run); }
void scan_bfloat16(const ScanRun& run) { scan<DecodeBfloat16Op>(run); }

// 16 rows of 16 floats, transposed in registers.
[[gnu::always_inline]] inline void transpose_16x16(const float* const* rows, int64_t column, int64_t ahead,
                                                   float* out) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_ps(rows[i] + column);
    if (ahead != 0) _mm_prefetch((const char*)(rows[i] + column + ahead), _MM_HINT_T0);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d p0 = _mm512_castps_pd(b[4 * i]), p1 = _mm512_castps_pd(b[4 * i + 1]);
    const __m512d p2 = _mm512_castps_pd(b[4 * i + 2]), p3 = _mm512_castps_pd(b[4 * i + 3]);
    a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p0, p2));
    a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p0, p2));
    a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(p1, p3));
    a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(p1, p3));
  }
  // a[4*i + c] holds, in 128-bit lane l, column 4*l + c of rows 4*i .. 4*i + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 lo01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44);
    const __m512 hi01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
    const __m512 lo23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
    const __m512 hi23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_ps(out + (c)*kPanelRows, _mm512_shuffle_f32x4(lo01, lo23, 0x88));
    _mm512_storeu_ps(out + (4 + c) * kPanelRows, _mm512_shuffle_f32x4(lo01, lo23, 0xdd));
    _mm512_storeu_ps(out + (8 + c) * kPanelRows, _mm512_shuffle_f32x4(hi01, hi23, 0x88));
    _mm512_storeu_ps(out + (12 + c) * kPanelRows, _mm512_shuffle_f32x4(hi01, hi23, 0xdd));
  }
}

void pack_float32(const float* const* rows, int64_t dim, int64_t ahead, float* panel) {
  for (int r = 0; r < kPanelRows; r += 16) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) transpose_16x16(rows + r, d, ahead, panel + d * kPanelRows + r);
    for (; d < dim; ++d) {
      for (int i = 0; i < 16; ++i) panel[d * kPanelRows + r + i] = rows[r + i][d];
    }
  }
}

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = {
      .level = "avx512",
      .scan_float32 = scan_float32,
      .scan_bfloat16 = scan_bfloat16,
      .scan_int8 = nullptr,  // needs VNNI; without it the AVX2 kernel serves
      .bfloat16_query_step_bytes = 8,
      .int8_query_step_bytes = 8,
      .pack_float32 = pack_float32,
  };
  return kernels;
}

}  // namespace realm_fast::mips
