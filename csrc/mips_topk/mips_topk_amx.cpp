// bfloat16 and int8 panels with AMX: one instruction multiplies 16 queries by 16 rows over a tile of steps.
//
// A tile register holds 16 rows of 64 bytes. Queries are the left operand ([queries][steps], packed in tiles
// by the caller), a third of a panel the right one ([steps][rows], which is how panels are stored). Sums
// leave the tiles through memory that stays in the nearest cache, and meet their thresholds in AVX-512
// registers.
//     0, 1, 2   sums of 16 queries with the three thirds of a panel
//     3         queries, 16 steps         4, 7   a third of a panel, 16 steps
//     5         queries, the last steps   6      a third of a panel, the last steps
// The tiles of the last steps are smaller: behind a panel's last step lies the next panel, and zeros in the
// query do not make up for its NaNs.
#include "core/tiles_amx.h"
#include "mips_topk/scan_avx512.inl"

namespace realm_fast::mips {
namespace {

constexpr int64_t kTileBytes = kTileQueries * kTileSteps * kStepBytes;
constexpr int64_t kTileRowBytes = kTileSteps * kStepBytes;
constexpr int64_t kPanelStepBytes = kPanelRows * kStepBytes;
constexpr int64_t kAhead = 8192;  // what one tile of queries fetches ahead; several fetch the next panel

void shape_tiles(int queries, int last_steps) {
  TileShapes shapes;
  for (int sums = 0; sums < kVectors; ++sums) shapes.set(sums, queries, 64);
  shapes.set(3, queries, kTileRowBytes);
  shapes.set(4, kTileSteps, 64);
  shapes.set(7, kTileSteps, 64);
  if (last_steps > 0) {
    shapes.set(5, queries, int64_t{last_steps} * kStepBytes);
    shapes.set(6, last_steps, 64);
  }
  shapes.use();
}

// Tile numbers are part of an instruction: what takes them is a macro.
#define REALM_FAST_ADD_PRODUCT(sums, queries, rows) \
  do {                                              \
    if constexpr (Op::kIsInt8) {                    \
      _tile_dpbsud(sums, queries, rows);            \
    } else {                                        \
      _tile_dpbf16ps(sums, queries, rows);          \
    }                                               \
  } while (0)

// score(): of 16 rows with a query, from their sums.
struct Bfloat16Op {
  static constexpr bool kIsInt8 = false;

  [[gnu::always_inline]] static inline __m512 score(const ScanRun&, int64_t, int64_t, const float* sums) {
    return _mm512_load_ps(sums);
  }
};

struct Int8Op {
  static constexpr bool kIsInt8 = true;

  [[gnu::always_inline]] static inline __m512 score(const ScanRun& run, int64_t query, int64_t row,
                                                    const float* sums) {
    const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums), _mm512_set1_epi32(run.query_offset[query]));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(run.row_scale + row));
  }
};

[[gnu::always_inline]] inline void prefetch_lines(const char* from, int count) {
#pragma GCC unroll 16
  for (int line = 0; line < count; ++line) _mm_prefetch(from + 64 * line, _MM_HINT_T0);
}

// Hands over what passes its threshold, of `width` queries' sums with the 48 rows of a panel.
template <class Op>
[[gnu::always_inline]] inline void select(const ScanRun& run, const float* sums, int64_t query, int width,
                                          int64_t panel) {
  __mmask16 below[kVectors] = {0xffff, 0xffff, 0xffff};  // as in scan_avx512.inl
#pragma GCC unroll 4
  for (int w = 0; w < width; ++w) {
    const __m512 threshold = _mm512_set1_ps(run.threshold[query + w]);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const __m512 score =
          Op::score(run, query + w, panel * kPanelRows + 16 * v, sums + w * kPanelRows + 16 * v);
      below[v] = _mm512_mask_cmp_ps_mask(below[v], score, threshold, _CMP_NGE_UQ);
    }
  }
  const __mmask16 all = _kand_mask16(_kand_mask16(below[0], below[1]), below[2]);
  if (__builtin_expect(!_kortestc_mask16_u8(all, all), 0)) {
    alignas(64) float scores[kTileQueries * kPanelRows];
    for (int w = 0; w < width; ++w) {
      for (int v = 0; v < kVectors; ++v) {
        const int at = w * kPanelRows + 16 * v;
        _mm512_store_ps(scores + at, Op::score(run, query + w, panel * kPanelRows + 16 * v, sums + at));
      }
    }
    hand_over(run, query, width, panel, scores);
  }
}

// As in scan_avx512.inl: panels outside, queries inside, the next panel fetched meanwhile.
template <class Op>
[[gnu::always_inline]] inline void scan_tiles(const ScanRun& run) {
  const bool narrow = run.end_group == run.num_groups && run.last_width < kGroupQueries;
  const int64_t num_queries =
      (run.end_group - run.first_group) * kGroupQueries - (narrow ? kGroupQueries - run.last_width : 0);
  const int64_t query_tiles = (num_queries + kTileQueries - 1) / kTileQueries;
  const int64_t whole = run.steps / kTileSteps;
  const int last_steps = static_cast<int>(run.steps % kTileSteps);
  const int64_t query_tile_bytes = (whole + (last_steps > 0 ? 1 : 0)) * kTileBytes;
  const int64_t first_query = run.first_group * kGroupQueries;
  const char* first = run.queries + first_query / kTileQueries * query_tile_bytes;
  const int64_t share = query_tiles == 1 ? 0 : (run.panel_bytes / 64 + query_tiles - 1) / query_tiles;
  shape_tiles(num_queries < kTileQueries ? static_cast<int>(num_queries) : kTileQueries, last_steps);
  alignas(64) float sums[kTileQueries * kPanelRows];
  for (int64_t panel = 0; panel < run.num_panels; ++panel) {
    const char* data = run.panels + panel * run.panel_bytes;
    const char* ahead = data + run.panel_bytes;  // past the end behind the last one: a prefetch never faults
    for (int64_t tile = 0; tile < query_tiles; ++tile) {
      const char* queries = first + tile * query_tile_bytes;
      const char* rows = data;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int64_t s = 0; s < whole; ++s) {
        const char* fetched = rows + kAhead;
        _tile_loadd(3, queries, kTileRowBytes);
        if (query_tiles == 1) prefetch_lines(fetched, 16);
        _tile_loadd(4, rows, kPanelStepBytes);
        REALM_FAST_ADD_PRODUCT(0, 3, 4);
        if (query_tiles == 1) prefetch_lines(fetched + 1024, 16);
        _tile_loadd(7, rows + 64, kPanelStepBytes);
        REALM_FAST_ADD_PRODUCT(1, 3, 7);
        if (query_tiles == 1) prefetch_lines(fetched + 2048, 16);
        _tile_loadd(4, rows + 128, kPanelStepBytes);
        REALM_FAST_ADD_PRODUCT(2, 3, 4);
        queries += kTileBytes;
        rows += kTileSteps * kPanelStepBytes;
      }
      if (last_steps > 0) {
        _tile_loadd(5, queries, kTileRowBytes);
        _tile_loadd(6, rows, kPanelStepBytes);
        REALM_FAST_ADD_PRODUCT(0, 5, 6);
        _tile_loadd(6, rows + 64, kPanelStepBytes);
        REALM_FAST_ADD_PRODUCT(1, 5, 6);
        _tile_loadd(6, rows + 128, kPanelStepBytes);
        REALM_FAST_ADD_PRODUCT(2, 5, 6);
      }
      for (int64_t line = 0; line < share; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
      ahead += 64 * share;
      _tile_stored(0, sums, kPanelStepBytes);
      _tile_stored(1, sums + 16, kPanelStepBytes);
      _tile_stored(2, sums + 32, kPanelStepBytes);
      const int64_t left = num_queries - tile * kTileQueries;
      select<Op>(run, sums, first_query + tile * kTileQueries,
                 left < kTileQueries ? static_cast<int>(left) : kTileQueries, panel);
    }
  }
  _tile_release();
}

}  // namespace

void scan_bfloat16_amx(const ScanRun& run) { scan_tiles<Bfloat16Op>(run); }
void scan_int8_amx(const ScanRun& run) { scan_tiles<Int8Op>(run); }

}  // namespace realm_fast::mips
