// The AVX-512 scan: a register tile of 48 rows (3 vectors) by up to 8 broadcast queries. Included by the
// files of each AVX-512 level; everything is in an unnamed namespace (see kernels.h).
//
// An Op names how a step (4 bytes of each of 48 rows) is multiplied into the accumulators:
//     Acc                        accumulator vector
//     kQueryStepBytes            bytes of one query in a step
//     start(run, query)          what accumulators begin with
//     step<W>(acc, panel, query) one step
//     finish(run, row, acc)      16 float scores from an accumulator of rows row .. row + 15

#include "core/intrinsics_avx512.h"
#include "mips_topk/kernels.h"

namespace realm_fast::mips {
namespace {

constexpr int kVectors = 3;  // of 16 rows in a panel

// Rare: some score of the tile passed its query's threshold. Kept out of line so that the hot loop keeps its
// registers.
[[gnu::noinline]] void hand_over(const ScanRun& run, int64_t query, int width, int64_t panel,
                                 const float* scores) {
  for (int w = 0; w < width; ++w) {
    const float* row_scores = scores + w * kPanelRows;
    const __m512 threshold = _mm512_set1_ps(run.threshold[query + w]);
    uint64_t mask = 0;
    for (int v = 0; v < kVectors; ++v) {
      const uint64_t part =
          _cvtmask16_u32(_mm512_cmp_ps_mask(_mm512_load_ps(row_scores + 16 * v), threshold, _CMP_GE_OQ));
      mask |= part << (16 * v);
    }
    if (mask != 0) run.accept(run.context, query + w, panel, mask, row_scores);
  }
}

template <class Op, int W, int kPrefetch>
[[gnu::always_inline]] inline void tile(const ScanRun& run, const char* panel_data, const char* queries,
                                        int64_t query, int64_t panel, const char* ahead, int64_t ahead_step) {
  typename Op::Acc acc[W][kVectors];
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[w][v] = Op::start(run, query + w);
  }
  const int64_t steps = run.steps;
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kPrefetch == 1) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += ahead_step;
    } else if constexpr (kPrefetch == 3) {
      _mm_prefetch(panel_data + ahead_step, _MM_HINT_T0);
      _mm_prefetch(panel_data + ahead_step + 64, _MM_HINT_T0);
      _mm_prefetch(panel_data + ahead_step + 128, _MM_HINT_T0);
    }
    Op::template step<W>(acc, panel_data, queries);
    panel_data += kPanelRows * kStepBytes;
    queries += W * Op::kQueryStepBytes;
  }
  __m512 scores[W][kVectors];
  // Chained masks: a bit stays set while no score of its lane reached the threshold. NGE is also true for
  // NaN, so that NaN rows never pass.
  __mmask16 below[kVectors] = {0xffff, 0xffff, 0xffff};
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) {
    const __m512 threshold = _mm512_set1_ps(run.threshold[query + w]);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      scores[w][v] = Op::finish(run, panel * kPanelRows + 16 * v, acc[w][v]);
      below[v] = _mm512_mask_cmp_ps_mask(below[v], scores[w][v], threshold, _CMP_NGE_UQ);
    }
  }
  const __mmask16 all = _kand_mask16(_kand_mask16(below[0], below[1]), below[2]);
  if (__builtin_expect(!_kortestc_mask16_u8(all, all), 0)) {
    alignas(64) float buffer[W * kPanelRows];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) _mm512_store_ps(buffer + w * kPanelRows + 16 * v, scores[w][v]);
    }
    hand_over(run, query, W, panel, buffer);
  }
}

// Panels outside, groups inside: a panel comes from memory once and stays in the nearest cache while every
// group passes over it; meanwhile the next panel is prefetched, spread over the groups.
template <class Op>
[[gnu::always_inline]] inline void scan(const ScanRun& run) {
  const int64_t group_bytes = run.steps * kGroupQueries * Op::kQueryStepBytes;
  const int64_t groups = run.end_group - run.first_group;
  const bool narrow = run.end_group == run.num_groups && run.last_width < kGroupQueries;
  const int64_t full_end = narrow ? run.end_group - 1 : run.end_group;
  const int64_t share = run.steps > 0 ? (run.panel_bytes + groups * run.steps - 1) / (groups * run.steps) : 0;
  for (int64_t panel = 0; panel < run.num_panels; ++panel) {
    const char* data = run.panels + panel * run.panel_bytes;
    if (groups == 1) {
      const char* queries = run.queries + run.first_group * group_bytes;
      const int64_t query = run.first_group * kGroupQueries;
      constexpr int64_t kAhead = 4096;
      switch (narrow ? run.last_width : kGroupQueries) {
        case 1:
          tile<Op, 1, 3>(run, data, queries, query, panel, nullptr, kAhead);
          break;
        case 2:
          tile<Op, 2, 3>(run, data, queries, query, panel, nullptr, kAhead);
          break;
        case 4:
          tile<Op, 4, 3>(run, data, queries, query, panel, nullptr, kAhead);
          break;
        default:
          tile<Op, 8, 3>(run, data, queries, query, panel, nullptr, kAhead);
      }
      continue;
    }
    // The last panel of a run prefetches past its end: harmless, a prefetch never faults.
    const char* ahead = data + run.panel_bytes;
    for (int64_t group = run.first_group; group < full_end; ++group) {
      tile<Op, 8, 1>(run, data, run.queries + group * group_bytes, group * kGroupQueries, panel, ahead,
                     share);
      ahead += share * run.steps;
    }
    if (narrow) {
      const char* queries = run.queries + full_end * group_bytes;
      const int64_t query = full_end * kGroupQueries;
      if (run.last_width == 1) {
        tile<Op, 1, 1>(run, data, queries, query, panel, ahead, share);
      } else if (run.last_width == 2) {
        tile<Op, 2, 1>(run, data, queries, query, panel, ahead, share);
      } else {
        tile<Op, 4, 1>(run, data, queries, query, panel, ahead, share);
      }
    }
  }
}

[[gnu::always_inline]] inline float float_at(const char* p) {
  float value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

[[gnu::always_inline]] inline int32_t int_at(const char* p) {
  int32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace
}  // namespace realm_fast::mips
