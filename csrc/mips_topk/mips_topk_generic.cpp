// The scan in portable C++, for CPUs without AVX2 and as the readable statement of what the others compute.
// Each float score is one chain of multiply, round, add, round in the order of the dimensions.
#include <cstring>

#include "mips_topk/kernels.h"

namespace realm_fast::mips {
namespace {

constexpr int kTileRows = 16;  // a tile of 16 rows by up to 2 queries stays in 16 registers of 4 floats

struct Float32Op {
  static constexpr int kQueryStepBytes = 4;
  using Sum = float;
  static float start(const ScanRun&, int64_t) { return 0.0f; }
  static void step(float (&sum)[kTileRows], const char* rows, const char* query, int) {
    float q, x[kTileRows];
    std::memcpy(&q, query, sizeof q);
    std::memcpy(x, rows, sizeof x);
    for (int i = 0; i < kTileRows; ++i) sum[i] += x[i] * q;
  }
  static float finish(const ScanRun&, int64_t, float sum) { return sum; }
};

struct Bfloat16Op {
  static constexpr int kQueryStepBytes = 8;
  using Sum = float;
  static float start(const ScanRun&, int64_t) { return 0.0f; }
  static void step(float (&sum)[kTileRows], const char* rows, const char* query, int width) {
    float q[2], x[kTileRows];
    uint32_t pairs[kTileRows], bits[kTileRows];
    std::memcpy(q, query, sizeof *q);
    std::memcpy(q + 1, query + 4 * width, sizeof *q);
    std::memcpy(pairs, rows, sizeof pairs);
    for (int i = 0; i < kTileRows; ++i) bits[i] = pairs[i] << 16;
    std::memcpy(x, bits, sizeof x);
    for (int i = 0; i < kTileRows; ++i) sum[i] += x[i] * q[0];
    for (int i = 0; i < kTileRows; ++i) bits[i] = pairs[i] & 0xffff0000u;
    std::memcpy(x, bits, sizeof x);
    for (int i = 0; i < kTileRows; ++i) sum[i] += x[i] * q[1];
  }
  static float finish(const ScanRun&, int64_t, float sum) { return sum; }
};

struct Int8Op {
  static constexpr int kQueryStepBytes = 8;
  using Sum = int32_t;
  static int32_t start(const ScanRun& run, int64_t query) { return run.query_offset[query]; }
  static void step(int32_t (&sum)[kTileRows], const char* rows, const char* query, int width) {
    int16_t q[4];
    uint8_t x[4 * kTileRows];
    std::memcpy(q, query, 2 * sizeof *q);
    std::memcpy(q + 2, query + 4 * width, 2 * sizeof *q);
    std::memcpy(x, rows, sizeof x);
    for (int i = 0; i < kTileRows; ++i) {
      for (int j = 0; j < 4; ++j) sum[i] += static_cast<int32_t>(x[4 * i + j]) * q[j];
    }
  }
  static float finish(const ScanRun& run, int64_t row, int32_t sum) {
    return static_cast<float>(sum) * run.row_scale[row];
  }
};

template <class Op>
void scan(const ScanRun& run) {
  const int64_t group_bytes = run.steps * kGroupQueries * Op::kQueryStepBytes;
  for (int64_t panel = 0; panel < run.num_panels; ++panel) {
    const char* data = run.panels + panel * run.panel_bytes;
    for (int64_t group = run.first_group; group < run.end_group; ++group) {
      const int width = group + 1 == run.num_groups ? run.last_width : kGroupQueries;
      for (int w = 0; w < width; ++w) {
        const int64_t query = group * kGroupQueries + w;
        float scores[kPanelRows];
        for (int first = 0; first < kPanelRows; first += kTileRows) {
          typename Op::Sum sum[kTileRows];
          for (int i = 0; i < kTileRows; ++i) sum[i] = Op::start(run, query);
          const char* rows = data + first * kStepBytes;
          const char* values = run.queries + group * group_bytes + 4 * w;
          for (int64_t s = 0; s < run.steps; ++s) {
            Op::step(sum, rows, values, width);
            rows += kPanelRows * kStepBytes;
            values += width * Op::kQueryStepBytes;
          }
          for (int i = 0; i < kTileRows; ++i) {
            scores[first + i] = Op::finish(run, panel * kPanelRows + first + i, sum[i]);
          }
        }
        uint64_t mask = 0;
        for (int i = 0; i < kPanelRows; ++i) {
          mask |= static_cast<uint64_t>(scores[i] >= run.threshold[query]) << i;
        }
        if (mask != 0) run.accept(run.context, query, panel, mask, scores);
      }
    }
  }
}

void pack_float32(const float* const* rows, int64_t dim, int64_t, float* panel) {
  constexpr int64_t kColumns = 16;  // a cache line of each row at a time
  for (int64_t first = 0; first < dim; first += kColumns) {
    const int64_t end = first + kColumns < dim ? first + kColumns : dim;
    for (int64_t d = first; d < end; ++d) {
      for (int i = 0; i < kPanelRows; ++i) panel[d * kPanelRows + i] = rows[i][d];
    }
  }
}

}  // namespace

const Kernels& generic_kernels() {
  static constexpr Kernels kernels = {
      .level = "generic",
      .scan_float32 = scan<Float32Op>,
      .scan_bfloat16 = scan<Bfloat16Op>,
      .scan_int8 = scan<Int8Op>,
      .bfloat16_query_step_bytes = 8,
      .int8_query_step_bytes = 8,
      .pack_float32 = pack_float32,
  };
  return kernels;
}

}  // namespace realm_fast::mips
