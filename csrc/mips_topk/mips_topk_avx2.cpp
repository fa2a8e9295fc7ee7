// The AVX2 + FMA scan: a register tile of 24 rows (3 vectors) by 4 broadcast queries; half a panel by half a
// group. For one or two queries 48 rows, a whole panel. float32 sums are the same fused chains as in AVX-512,
// so both levels return the same bits.
#include <immintrin.h>

#include "mips_topk/kernels.h"

namespace realm_fast::mips {
namespace {

constexpr int kPanelVectors = kPanelRows / 8;

[[gnu::always_inline]] inline float float_at(const char* p) {
  float value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

[[gnu::always_inline]] inline int int_at(const char* p) {
  int value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

struct Float32Op {
  static constexpr int kQueryStepBytes = 4;
  static constexpr int kTileSteps = 1;
  static constexpr int kMaxWidth = 4;  // queries in a tile: 12 accumulators of 16 registers
  static constexpr int kMaxAccumulators = 12;
  struct Acc {
    __m256 value;
  };
  [[gnu::always_inline]] static inline Acc start() { return {_mm256_setzero_ps()}; }
  static const char* widen(const ScanRun&, const char* panel) { return panel; }

  template <int W, int kStride, int V>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][V], const char* panel, const char* queries) {
    __m256 rows[V];
#pragma GCC unroll 6
    for (int v = 0; v < V; ++v) rows[v] = _mm256_loadu_ps((const float*)(panel + 32 * v));
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const __m256 query = _mm256_set1_ps(float_at(queries + 4 * w));
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) {
        acc[w][v].value = _mm256_fmadd_ps(rows[v], query, acc[w][v].value);
      }
    }
  }

  [[gnu::always_inline]] static inline __m256 finish(const ScanRun&, int64_t, int64_t, const Acc& acc) {
    return acc.value;
  }
};

// Widens a panel of bfloat16 pairs to two steps of float32: from then on it is a float32 panel, bit for bit
// the same chains, and many queries share the conversion.
struct WidenedBfloat16Op : Float32Op {
  static constexpr int kQueryStepBytes = 8;
  static constexpr int kTileSteps = 2;  // steps of a tile in a step of the panel

  static const char* widen(const ScanRun& run, const char* panel) {
    const __m256i high = _mm256_set1_epi32(-65536);
    char* out = run.widened;
    for (int64_t s = 0; s < run.steps; ++s) {
      for (int byte = 0; byte < kPanelRows * kStepBytes; byte += 32) {
        const __m256i pair = _mm256_loadu_si256((const __m256i*)(panel + byte));
        _mm256_storeu_si256((__m256i*)(out + byte), _mm256_slli_epi32(pair, 16));
        _mm256_storeu_si256((__m256i*)(out + kPanelRows * kStepBytes + byte), _mm256_and_si256(pair, high));
      }
      panel += kPanelRows * kStepBytes;
      out += 2 * kPanelRows * kStepBytes;
    }
    return run.widened;
  }
};

// Converts on the way: for so few queries that writing a widened panel costs more.
struct Bfloat16Op {
  static constexpr int kQueryStepBytes = 8;
  static constexpr int kTileSteps = 1;
  static constexpr int kMaxWidth = 2;
  static constexpr int kMaxAccumulators = 6;
  using Acc = Float32Op::Acc;
  [[gnu::always_inline]] static inline Acc start() { return {_mm256_setzero_ps()}; }
  static const char* widen(const ScanRun&, const char* panel) { return panel; }

  template <int W, int kStride, int V>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][V], const char* panel, const char* queries) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256 rows[V];
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) {
        const __m256i pair = _mm256_loadu_si256((const __m256i*)(panel + 32 * v));
        rows[v] = _mm256_castsi256_ps(half == 0 ? _mm256_slli_epi32(pair, 16)
                                                : _mm256_and_si256(pair, _mm256_set1_epi32(-65536)));
      }
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        const __m256 query = _mm256_set1_ps(float_at(queries + 4 * (kStride * half + w)));
#pragma GCC unroll 6
        for (int v = 0; v < V; ++v) {
          acc[w][v].value = _mm256_fmadd_ps(rows[v], query, acc[w][v].value);
        }
      }
    }
  }

  [[gnu::always_inline]] static inline __m256 finish(const ScanRun&, int64_t, int64_t, const Acc& acc) {
    return acc.value;
  }
};

// Shuffles quads of uint8 to pairs of int16: the first two bytes of every quad, or the last two.
[[gnu::always_inline]] inline __m256i int8_half(int half) {
  const char z = -1;  // a zero byte
  const char i = (char)(2 * half);
  return _mm256_broadcastsi128_si256(
      _mm_setr_epi8(i, z, i + 1, z, i + 4, z, i + 5, z, i + 8, z, i + 9, z, i + 12, z, i + 13, z));
}

// uint8 rows and int16 queries through vpmaddwd (vpmaddubsw would saturate), the rows widened to int16 once
// for all queries, as two steps of pairs. Integers: exact in any order.
struct WidenedInt8Op {
  static constexpr int kQueryStepBytes = 8;
  static constexpr int kTileSteps = 2;
  static constexpr int kMaxWidth = 4;
  static constexpr int kMaxAccumulators = 3;
  struct Acc {
    __m256i value;
  };
  [[gnu::always_inline]] static inline Acc start() { return {_mm256_setzero_si256()}; }

  static const char* widen(const ScanRun& run, const char* panel) {
    char* out = run.widened;
    for (int64_t s = 0; s < run.steps; ++s) {
      for (int byte = 0; byte < kPanelRows * kStepBytes; byte += 32) {
        const __m256i quads = _mm256_loadu_si256((const __m256i*)(panel + byte));
        const __m256i low = _mm256_shuffle_epi8(quads, int8_half(0));
        const __m256i high = _mm256_shuffle_epi8(quads, int8_half(1));
        _mm256_storeu_si256((__m256i*)(out + byte), low);
        _mm256_storeu_si256((__m256i*)(out + kPanelRows * kStepBytes + byte), high);
      }
      panel += kPanelRows * kStepBytes;
      out += 2 * kPanelRows * kStepBytes;
    }
    return run.widened;
  }

  template <int W, int kStride, int V>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][V], const char* panel, const char* queries) {
    static_assert(V == 3);
    // 12 accumulators, two vectors of rows, a query and a product fill the registers; the third vector comes
    // from the cache each time. As assembly: left to itself, GCC 12 keeps many products and spills
    // accumulators.
    const __m256i rows[2] = {_mm256_loadu_si256((const __m256i*)panel),
                             _mm256_loadu_si256((const __m256i*)(panel + 32))};
    const __m256i_u& third = *(const __m256i_u*)(panel + 64);
    __m256i product;
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const __m256i query = _mm256_set1_epi32(int_at(queries + 4 * w));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc[w][v].value), "=&x"(product)
            : "x"(rows[v]), "x"(query));
      }
      asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc[w][2].value), "=&x"(product)
          : "m"(third), "x"(query));
    }
  }

  [[gnu::always_inline]] static inline __m256 finish(const ScanRun& run, int64_t query, int64_t row,
                                                     const Acc& acc) {
    const __m256i total = _mm256_add_epi32(acc.value, _mm256_set1_epi32(run.query_offset[query]));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_loadu_ps(run.row_scale + row));
  }
};

// Widens on the way: for so few queries that writing a widened panel costs more.
struct Int8Op {
  static constexpr int kQueryStepBytes = 8;
  static constexpr int kTileSteps = 1;
  static constexpr int kMaxWidth = 2;
  static constexpr int kMaxAccumulators = 6;
  using Acc = WidenedInt8Op::Acc;
  [[gnu::always_inline]] static inline Acc start() { return {_mm256_setzero_si256()}; }
  static const char* widen(const ScanRun&, const char* panel) { return panel; }
  template <int W, int kStride, int V>
  [[gnu::always_inline]] static inline void step(Acc (&acc)[W][V], const char* panel, const char* queries) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) {
        const __m256i row =
            _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)(panel + 32 * v)), int8_half(half));
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) {
          const __m256i query = _mm256_set1_epi32(int_at(queries + 4 * (kStride * half + w)));
          acc[w][v].value = _mm256_add_epi32(acc[w][v].value, _mm256_madd_epi16(row, query));
        }
      }
    }
  }
  [[gnu::always_inline]] static inline __m256 finish(const ScanRun& run, int64_t query, int64_t row,
                                                     const Acc& acc) {
    return WidenedInt8Op::finish(run, query, row, acc);
  }
};

[[gnu::noinline]] void hand_over(const ScanRun& run, int64_t query, int width, int64_t panel, int first_row,
                                 int vectors, const float* scores) {
  for (int w = 0; w < width; ++w) {
    const __m256 threshold = _mm256_set1_ps(run.threshold[query + w]);
    uint64_t mask = 0;
    for (int v = 0; v < vectors; ++v) {
      const __m256 part = _mm256_load_ps(scores + w * kPanelRows + first_row + 8 * v);
      mask |= (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(part, threshold, _CMP_GE_OQ)) << (first_row + 8 * v);
    }
    if (mask != 0) run.accept(run.context, query + w, panel, mask, scores + w * kPanelRows);
  }
}

// The shape of tiles for a group of kWidth queries. One or two queries take whole panels: half a panel's rows
// at a time would leave every third cache line for later, a pattern that memory serves at two thirds of its
// rate.
template <class Op, int kWidth>
struct Shape {
  static constexpr int kQueries = kWidth < Op::kMaxWidth ? kWidth : Op::kMaxWidth;
  static constexpr int kVectors =
      kQueries * kPanelVectors <= Op::kMaxAccumulators ? kPanelVectors : kPanelVectors / 2;
  static constexpr int kPasses = kPanelVectors / kVectors * (kWidth / kQueries);  // over a panel
  // Cache lines fetched ahead in a step. A single pass reads memory as fast as the hardware's own prefetcher
  // brings it; over several, the next panel comes while this one is multiplied.
  static constexpr int kFetched = kPasses == 1 ? 0 : (3 / Op::kTileSteps + kPasses - 1) / kPasses;
};

template <class Op>
[[gnu::always_inline]] inline int passes_of(int width) {
  return width == 1   ? Shape<Op, 1>::kPasses
         : width == 2 ? Shape<Op, 2>::kPasses
         : width == 4 ? Shape<Op, 4>::kPasses
                      : Shape<Op, 8>::kPasses;
}

// What is fetched meanwhile: a prefetch never faults, so the last panel may look past the end.
struct Ahead {
  const char* from;
  int64_t stride;  // bytes a step
};

template <class Op, int kWidth>
[[gnu::always_inline]] inline void tile(const ScanRun& run, const char* panel_data, const char* queries,
                                        int64_t query, int64_t panel, int first_row, Ahead& ahead) {
  constexpr int W = Shape<Op, kWidth>::kQueries;
  constexpr int V = Shape<Op, kWidth>::kVectors;
  typename Op::Acc acc[W][V];
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) {
#pragma GCC unroll 6
    for (int v = 0; v < V; ++v) acc[w][v] = Op::start();
  }
  const char* rows = panel_data + first_row * kStepBytes;
  const int64_t steps = run.steps * Op::kTileSteps;
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 3
    for (int line = 0; line < Shape<Op, kWidth>::kFetched; ++line) {
      _mm_prefetch(ahead.from + 64 * line, _MM_HINT_T0);
    }
    ahead.from += ahead.stride;
    Op::template step<W, kWidth, V>(acc, rows, queries);
    rows += kPanelRows * kStepBytes;
    queries += kWidth * Op::kQueryStepBytes / Op::kTileSteps;
  }
  __m256 scores[W][V];
  __m256 passed = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) {
    const __m256 threshold = _mm256_set1_ps(run.threshold[query + w]);
#pragma GCC unroll 6
    for (int v = 0; v < V; ++v) {
      scores[w][v] = Op::finish(run, query + w, panel * kPanelRows + first_row + 8 * v, acc[w][v]);
      passed = _mm256_or_ps(passed, _mm256_cmp_ps(scores[w][v], threshold, _CMP_GE_OQ));
    }
  }
  if (__builtin_expect(_mm256_movemask_ps(passed) != 0, 0)) {
    alignas(32) float buffer[W * kPanelRows];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) {
        _mm256_store_ps(buffer + w * kPanelRows + first_row + 8 * v, scores[w][v]);
      }
    }
    hand_over(run, query, W, panel, first_row, V, buffer);
  }
}

template <class Op, int kWidth>
[[gnu::always_inline]] inline void whole_panel(const ScanRun& run, const char* data, const char* queries,
                                               int64_t query, int64_t panel, Ahead& ahead) {
  for (int first_row = 0; first_row < kPanelRows; first_row += 8 * Shape<Op, kWidth>::kVectors) {
    for (int w = 0; w < kWidth; w += Shape<Op, kWidth>::kQueries) {
      tile<Op, kWidth>(run, data, queries + 4 * w, query + w, panel, first_row, ahead);
    }
  }
}

[[gnu::always_inline]] inline int group_width(const ScanRun& run, int64_t group) {
  return group + 1 == run.num_groups ? run.last_width : kGroupQueries;
}

template <class Op>
[[gnu::always_inline]] inline void scan(const ScanRun& run) {
  const int64_t group_bytes = run.steps * kGroupQueries * Op::kQueryStepBytes;
  int64_t steps = 0;  // of all tiles of a panel; over them the next panel is fetched
  for (int64_t group = run.first_group; group < run.end_group; ++group) {
    steps += passes_of<Op>(group_width(run, group)) * run.steps * Op::kTileSteps;
  }
  const int64_t stride = steps > 0 ? (run.panel_bytes + steps - 1) / steps : 0;
  for (int64_t panel = 0; panel < run.num_panels; ++panel) {
    const char* stored = run.panels + panel * run.panel_bytes;
    const char* data = Op::widen(run, stored);
    Ahead ahead{stored + run.panel_bytes, stride};
    for (int64_t group = run.first_group; group < run.end_group; ++group) {
      const char* queries = run.queries + group * group_bytes;
      const int64_t query = group * kGroupQueries;
      switch (group_width(run, group)) {
        case 1:
          whole_panel<Op, 1>(run, data, queries, query, panel, ahead);
          break;
        case 2:
          whole_panel<Op, 2>(run, data, queries, query, panel, ahead);
          break;
        case 4:
          whole_panel<Op, 4>(run, data, queries, query, panel, ahead);
          break;
        default:
          whole_panel<Op, 8>(run, data, queries, query, panel, ahead);
      }
    }
  }
}

void scan_float32(const ScanRun& run) { scan<Float32Op>(run); }
void scan_bfloat16(const ScanRun& run) {
  if (run.num_groups == 1 && run.last_width <= Bfloat16Op::kMaxWidth) {
    scan<Bfloat16Op>(run);
  } else {
    scan<WidenedBfloat16Op>(run);
  }
}
void scan_int8(const ScanRun& run) {
  if (run.num_groups == 1 && run.last_width <= Int8Op::kMaxWidth) {
    scan<Int8Op>(run);
  } else {
    scan<WidenedInt8Op>(run);
  }
}

[[gnu::always_inline]] inline void transpose_8x8(const float* const* rows, int64_t column, int64_t ahead,
                                                 float* out) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm256_loadu_ps(rows[i] + column);
    if (ahead != 0) _mm_prefetch((const char*)(rows[i] + column + ahead), _MM_HINT_T0);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * kPanelRows, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * kPanelRows, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}

void pack_float32(const float* const* rows, int64_t dim, int64_t ahead, float* panel) {
  for (int r = 0; r < kPanelRows; r += 8) {
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) transpose_8x8(rows + r, d, ahead, panel + d * kPanelRows + r);
    for (; d < dim; ++d) {
      for (int i = 0; i < 8; ++i) panel[d * kPanelRows + r + i] = rows[r + i][d];
    }
  }
}

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = {
      .level = "avx2",
      .scan_float32 = scan_float32,
      .scan_bfloat16 = scan_bfloat16,
      .scan_int8 = scan_int8,
      .bfloat16_query_step_bytes = 8,
      .int8_query_step_bytes = 8,
      .pack_float32 = pack_float32,
  };
  return kernels;
}

}  // namespace realm_fast::mips
