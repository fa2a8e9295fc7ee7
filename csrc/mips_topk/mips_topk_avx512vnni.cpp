// int8 panels with vpdpbusd: four products a lane and instruction, exact in int32.
#include "mips_topk/scan_avx512.inl"

namespace realm_fast::mips {
namespace {

struct Int8Op {
  using Acc = __m512i;
  static constexpr int kQueryStepBytes = 4;

  [[gnu::always_inline]] static inline Acc start(const ScanRun& run, int64_t query) {
    return _mm512_set1_epi32(run.query_offset[query]);
  }

  template <int W>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][kVectors], const char* panel,
                                                 const char* queries) {
    const __m512i rows[kVectors] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64),
                                    _mm512_loadu_si512(panel + 128)};
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const __m512i query = _mm512_set1_epi32(int_at(queries + 4 * w));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        // As assembly: from the intrinsic, GCC 12 copies and spills accumulators in this loop (half the
        // speed).
#ifdef __AVX512VNNI__
        asm("vpdpbusd %2, %1, %0" : "+v"(acc[w][v]) : "v"(rows[v]), "v"(query));
#else  // tests/native/emulated_avx512.h
        acc[w][v] = _mm512_dpbusd_epi32(acc[w][v], rows[v], query);
#endif
      }
    }
  }

  [[gnu::always_inline]] static inline __m512 finish(const ScanRun& run, int64_t row, Acc acc) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(run.row_scale + row));
  }
};

}  // namespace

void scan_int8_avx512vnni(const ScanRun& run) { scan<Int8Op>(run); }

}  // namespace realm_fast::mips
