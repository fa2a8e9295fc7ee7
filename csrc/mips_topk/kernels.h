// What one CPU level must provide: a scan of panels against groups of queries, and the packing of rows.
//
// This header is included by files compiled for one CPU level each. It must therefore hold no inline
// function and no template with external linkage: the linker keeps one copy of a weak symbol, and it may
// keep the copy that an older CPU cannot run. (tests/native/test_weak_symbols.py reads the objects.)
//
// Panel layout, the same for every level, so that a saved index runs everywhere. Rows are stored in panels of
// 48, step-major inside a panel; a step is 4 bytes of a row:
//     float32   [steps = D]           [48]     one value
//     bfloat16  [steps = ceil(D/2)]   [48][2]  two values
//     int8      [steps = ceil(D/4)]   [48][4]  four values, stored as uint8 = value + 128
// Rows that do not exist (padding, deleted) are NaN; for int8 their scale is NaN. A NaN score never compares
// greater or equal, so that such rows cost no test of their own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realm_fast::mips {

constexpr int kPanelRows = 48;
constexpr int kGroupQueries = 8;  // queries that one pass over a panel serves
constexpr int kStepBytes = 4;     // bytes of a row in a step
constexpr int kTileQueries = 16;  // AMX: queries and steps of one tile of packed queries
constexpr int kTileSteps = 16;

// One run: `num_panels` adjacent panels against groups [first_group, end_group) of packed queries.
struct ScanRun {
  const char* panels;
  int64_t panel_bytes;
  int64_t num_panels;
  int64_t steps;
  const char* queries;             // groups of [steps][width] query steps, one after the other; steps of
                                   // 8 bytes as [steps][2][width] halves; for AMX tiles of two groups,
                                   // [ceil(steps / 16)][16 queries][16 steps], what is missing being 0
  int64_t first_group, end_group;  // queries 8*g .. 8*g+7
  int64_t num_groups;              // in all; only the last one may be narrower than 8
  int last_width;                  // 1, 2, 4 or 8
  const int32_t* query_offset;  // int8: [queries], what the integer sums start from (-128 * sum of the query)
  const float* row_scale;       // int8: [rows], the rows' scales
  char* widened;                // room for a panel twice as wide, where query steps have 8 bytes
  const float* threshold;       // [queries]; accept may raise it while the run goes on
  // Called for a query and a panel when some of the panel's 48 scores are >= the query's threshold.
  void (*accept)(void* context, int64_t query, int64_t panel, uint64_t mask, const float* scores);
  void* context;
};

struct Kernels {
  const char* level;
  void (*scan_float32)(const ScanRun&);
  void (*scan_bfloat16)(const ScanRun&);
  void (*scan_int8)(const ScanRun&);
  int bfloat16_query_step_bytes;  // 4: pairs of bfloat16; 8: the same values as pairs of float32
  int int8_query_step_bytes;      // 4: four int8; 8: the same values as four int16
  // Writes one float32 panel from 48 row pointers; meanwhile prefetches what lies `ahead` floats behind each.
  void (*pack_float32)(const float* const* rows, int64_t dim, int64_t ahead, float* panel);
};

const Kernels& generic_kernels();
#ifdef REALM_FAST_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
void scan_bfloat16_avx512bf16(const ScanRun& run);
void scan_int8_avx512vnni(const ScanRun& run);
// These two take their queries in tiles; first_group is even.
void scan_bfloat16_amx(const ScanRun& run);
void scan_int8_amx(const ScanRun& run);
#endif

}  // namespace realm_fast::mips
