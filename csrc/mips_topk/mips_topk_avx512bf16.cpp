// bfloat16 panels with vdpbf16ps: two products a lane and instruction.
#include "mips_topk/scan_avx512.inl"

namespace realm_fast::mips {
namespace {

struct Bfloat16Op {
  using Acc = __m512;
  static constexpr int kQueryStepBytes = 4;

  [[gnu::always_inline]] static inline Acc start(const ScanRun&, int64_t) { return _mm512_setzero_ps(); }

  template <int W>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][kVectors], const char* panel,
                                                 const char* queries) {
    const __m512bh rows[kVectors] = {(__m512bh)_mm512_loadu_si512(panel),
                                     (__m512bh)_mm512_loadu_si512(panel + 64),
                                     (__m512bh)_mm512_loadu_si512(panel + 128)};
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const __m512bh query = (__m512bh)_mm512_set1_epi32(int_at(queries + 4 * w));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[w][v] = _mm512_dpbf16_ps(acc[w][v], rows[v], query);
    }
  }

  [[gnu::always_inline]] static inline __m512 finish(const ScanRun&, int64_t, Acc acc) { return acc; }
};

}  // namespace

void scan_bfloat16_avx512bf16(const ScanRun& run) { scan<Bfloat16Op>(run); }

}  // namespace realm_fast::mips
