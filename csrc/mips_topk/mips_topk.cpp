// The search around the kernels: packing queries, handing out panels, keeping candidates, merging.
//
// Every worker keeps a reservoir per query. A reservoir holds the best rows it has seen, plus those since its
// last compaction; a compaction keeps the k best and raises the query's threshold, which all workers share.
// The threshold never exceeds the k-th best key seen by anyone, so that no result can be lost, whatever the
// order in which workers take panels: the outcome is the same for every number of threads.
//
// For large k that accepts k (1 + ln(N / k)) rows, most of them early and in vain. There the threshold may
// also be a guess from a sample of the panels, which are scanned first. A guess is checked at the end: if the
// k-th result does not reach it, the query is scanned again without. So it decides the time taken, never the
// answer.
#include "mips_topk/mips_topk.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#ifdef REALM_FAST_X86
#include <xmmintrin.h>
#endif

#include "core/cpu.h"
#include "core/parallel.h"
#include "mips_topk/kernels.h"

namespace realm_fast::mips {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // thresholds start here: > -inf passes
constexpr int64_t kQueriesPerPass = 1024;
constexpr int64_t kReservoirBytes = int64_t{1} << 29;  // all workers together
constexpr int64_t kCandidateBudget = 2048;
constexpr double kUnit = 0x1p-24;  // half the distance from 1 to the next float32

// Flush-to-zero and rounding modes are per thread: what the caller's thread has set must not decide the bits.
class DefaultFloatEnvironment {
#ifdef REALM_FAST_X86
 public:
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  unsigned saved_;
#else
 public:
  DefaultFloatEnvironment() {}
#endif
};

template <class T>
struct Aligned {
  T* data = nullptr;
  explicit Aligned(int64_t count) {
    const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data), 0, bytes);
  }
  Aligned(Aligned&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  Aligned& operator=(Aligned&&) = delete;
  ~Aligned() { std::free(data); }
};

// (score, key) as one integer: greater is better, so that equal scores fall to the lower key. No score below
// the lowest finite one is ever packed, hence no packed value is 0.
uint64_t pack_result(float score, uint32_t key) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 and 0 are equal: one representation
  const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(ordered) << 32) | static_cast<uint32_t>(~key);
}
float score_of(uint64_t packed) {
  const uint32_t ordered = static_cast<uint32_t>(packed >> 32);
  return std::bit_cast<float>(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}
uint32_t key_of(uint64_t packed) { return ~static_cast<uint32_t>(packed); }

// Moves the k largest values to the front, in any order, and returns the least of them. 1 <= k <= count. What
// std::nth_element does, without its mispredicted branches: the values that come here are in random order.
template <class T>
T select_largest(T* values, int64_t count, int64_t k) {
  int64_t begin = 0, end = count;
  for (int round = 0; end - begin > 32; ++round) {
    if (round == 64) break;  // an unlucky order; the sort below is right for any
    // The pivot: the median of three, well apart.
    const T a = values[begin], b = values[begin + (end - begin) / 2], c = values[end - 1];
    const T pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t greater = begin;
    for (int64_t i = begin; i < end; ++i) {
      const T value = values[i];
      values[i] = values[greater];
      values[greater] = value;
      greater += value > pivot;
    }
    if (k <= greater) {
      end = greater;
      if (end == begin) break;  // cannot be: k > begin
      continue;
    }
    // Those equal to the pivot follow.
    int64_t equal = greater;
    for (int64_t i = greater; i < end; ++i) {
      const T value = values[i];
      values[i] = values[equal];
      values[equal] = value;
      equal += value == pivot;
    }
    if (k <= equal) return pivot;
    begin = equal;
  }
  std::sort(values + begin, values + end, std::greater<>());
  return values[k - 1];
}

// Raises `shared` to at least `value`; returns what it then holds.
template <class T>
T raise_to(std::atomic<T>& shared, T value) {
  T seen = shared.load(std::memory_order_relaxed);
  while (seen < value) {
    if (shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) return value;
  }
  return seen;
}

struct KernelSet {
  const Kernels* base;
  void (*scan[3])(const ScanRun&);  // by Dtype
  int query_step_bytes[3];
  bool query_tiles[3];  // queries are packed in tiles (see ScanRun::queries)
};

KernelSet choose_kernels() {
  const CpuFeatures features = cpu_features();
  const Kernels* base = &generic_kernels();
  const Kernels* int8 = base;
#ifdef REALM_FAST_X86
  if (features.avx2) base = int8 = &avx2_kernels();
  if (features.avx512) base = &avx512_kernels();
#endif
  KernelSet set{base,
                {base->scan_float32, base->scan_bfloat16, int8->scan_int8},
                {kStepBytes, base->bfloat16_query_step_bytes, int8->int8_query_step_bytes},
                {false, false, false}};
#ifdef REALM_FAST_X86
  if (features.avx512bf16) {
    set.scan[1] = scan_bfloat16_avx512bf16;
    set.query_step_bytes[1] = 4;
  }
  if (features.avx512vnni) {
    set.scan[2] = scan_int8_avx512vnni;
    set.query_step_bytes[2] = 4;
  }
  if (features.amx) {
    set.scan[1] = scan_bfloat16_amx;
    set.scan[2] = scan_int8_amx;
    set.query_tiles[1] = set.query_tiles[2] = true;
  }
#endif
  (void)features;
  return set;
}

// The width the kernel uses for the last `rest` queries; what is added is a dummy that no score reaches.
int tail_width(int64_t rest) {
  return rest == 0 || rest > 4 ? kGroupQueries : rest == 3 ? 4 : static_cast<int>(rest);
}

// How far a scan's score may be from the float32 answer: residual_norm * a + norm * b + c (see
// docs/ops/mips_topk.md).
struct ErrorBound {
  float a, b, c;
  float scale;     // the kernel's scores times this are scores
  bool certified;  // false: the query must be answered in float32
};

struct PackedQueries {
  Aligned<char> data;
  Aligned<int32_t> offset;
  std::vector<ErrorBound> bound;
  int64_t num_queries, padded, num_groups;
  int last_width;
};

double gamma(double roundings) { return roundings * kUnit / (1 - roundings * kUnit); }

PackedQueries pack_queries(Dtype dtype, const KernelSet& kernels, const float* queries, int64_t num_queries,
                           int64_t dim) {
  const int64_t steps = steps_of(dtype, dim);
  const int step_bytes = kernels.query_step_bytes[static_cast<int>(dtype)];
  const int64_t num_groups = (num_queries + kGroupQueries - 1) / kGroupQueries;
  const int last_width = tail_width(num_queries % kGroupQueries);
  const int64_t padded = num_groups * kGroupQueries;
  const bool in_tiles = kernels.query_tiles[static_cast<int>(dtype)];
  const int64_t step_tiles = (steps + kTileSteps - 1) / kTileSteps;
  const int64_t packed_steps =
      in_tiles ? (num_queries + kTileQueries - 1) / kTileQueries * kTileQueries * step_tiles * kTileSteps
               : padded * steps;
  PackedQueries packed{Aligned<char>(packed_steps * step_bytes),
                       Aligned<int32_t>(padded),
                       {},
                       num_queries,
                       padded,
                       num_groups,
                       last_width};
  packed.bound.assign(padded, {0, 0, 0, 1, true});
  std::vector<uint16_t> bfloat16(dim);
  std::vector<int16_t> integers(dim);
  // Four int8 to a step; or four int16, as fine as sums in 32 bits allow: |offset| and |sum| stay below 2^31.
  const int limit =
      step_bytes == 4 ? 127 : static_cast<int>(std::min<int64_t>(32767, 0x7fffffff / (128 * dim)));
  for (int64_t q = 0; q < num_queries; ++q) {
    const int64_t group = q / kGroupQueries;
    const int64_t width = group + 1 == num_groups ? last_width : kGroupQueries;
    // A step of 4 bytes is whole; one of 8 comes as two halves, each for all queries of the group.
    char* out = packed.data.data + group * steps * kGroupQueries * step_bytes + (q % kGroupQueries) * 4;
    const int64_t stride = width * step_bytes;
    const int64_t half_stride = width * 4;
    char* tile_row = packed.data.data + (q / kTileQueries * step_tiles * kTileQueries + q % kTileQueries) *
                                            kTileSteps * kStepBytes;
    const auto step_at = [&](int64_t step) {  // where steps are whole
      return in_tiles
                 ? tile_row + (step / kTileSteps * kTileQueries * kTileSteps + step % kTileSteps) * kStepBytes
                 : out + step * stride;
    };
    const float* values = queries + q * dim;
    if (dtype == Dtype::float32) {
      for (int64_t d = 0; d < dim; ++d) std::memcpy(out + d * stride, values + d, sizeof(float));
      continue;
    }
    double norm = 0;
    for (int64_t d = 0; d < dim; ++d) norm += static_cast<double>(values[d]) * values[d];
    ErrorBound& bound = packed.bound[q];
    if (!(norm < 1e60)) {  // not finite, or so large that float32 products could overflow
      bound.certified = false;
      continue;
    }
    QuantisedQuery quantised;
    double scan_error;
    if (dtype == Dtype::bfloat16) {
      quantised = quantise_bfloat16(values, dim, bfloat16.data());
      for (int64_t d = 0; d < dim; ++d) {
        if (step_bytes == 4) {
          std::memcpy(step_at(d / 2) + (d % 2) * 2, &bfloat16[d], 2);
        } else {
          const uint32_t bits = static_cast<uint32_t>(bfloat16[d]) << 16;
          std::memcpy(out + d * half_stride, &bits, 4);
        }
      }
      scan_error = gamma(2.0 * static_cast<double>(dim) + 6);
    } else {
      quantised = quantise_integers(values, dim, limit, integers.data());
      int32_t sum = 0;
      for (int64_t d = 0; d < dim; ++d) {
        sum += integers[d];
        if (step_bytes == 4) {
          const auto value = static_cast<int8_t>(integers[d]);
          std::memcpy(step_at(d / 4) + d % 4, &value, 1);
        } else {
          std::memcpy(out + (d / 2) * half_stride + (d % 2) * 2, &integers[d], 2);
        }
      }
      packed.offset.data[q] = -128 * sum;
      scan_error = gamma(6);
    }
    // |s32 - s| <= |q| r + |q - q~| n + answer_error |q| (n + r) + scan_error |q~| n + underflow
    const double answer_error = gamma(static_cast<double>(dim) + 3);
    const double quantised_norm = quantised.norm + quantised.residual;
    constexpr double kInflate = 1 + 0x1p-18;  // the bound itself is evaluated in float32
    bound.scale = quantised.scale;
    bound.a = static_cast<float>(kInflate * quantised.norm * (1 + answer_error));
    bound.b = static_cast<float>(kInflate * (quantised.residual + answer_error * quantised.norm +
                                             (scan_error + 4 * kUnit) * quantised_norm));
    bound.c = static_cast<float>((4.0 * static_cast<double>(dim) + 64) * 0x1p-126);
  }
  return packed;
}

float to_float(RowType type, const void* data, int64_t i) {
  if (type == RowType::bfloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
  }
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 makes normal and subnormal halves alike.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

// Makes float32 panels out of rows, 48 at a time.
class RowPacker {
 public:
  RowPacker(const Kernels& kernels, int64_t dim)
      : kernels_(kernels),
        dim_(dim),
        panel_(dim * kPanelRows),
        nan_(dim, std::numeric_limits<float>::quiet_NaN()) {}

  const float* pack(const RowMatrix& matrix, int64_t first_row) {
    const float* rows[kPanelRows];
    for (int i = 0; i < kPanelRows; ++i) {
      const int64_t row = first_row + i;
      if (row >= matrix.num_rows) {
        rows[i] = nan_.data();
      } else if (matrix.type == RowType::float32) {
        rows[i] = static_cast<const float*>(matrix.data) + row * matrix.row_stride;
      } else {
        if (converted_.empty()) converted_.resize(kPanelRows * dim_);
        float* out = converted_.data() + i * dim_;
        for (int64_t d = 0; d < dim_; ++d)
          out[d] = to_float(matrix.type, matrix.data, row * matrix.row_stride + d);
        rows[i] = out;
      }
    }
    return pack(rows, matrix.type == RowType::float32 ? kPanelRows * matrix.row_stride : 0);
  }

  // Missing rows are null.
  const float* pack(const float* (&rows)[kPanelRows], int64_t ahead = 0) {
    for (const float*& row : rows) row = row == nullptr ? nan_.data() : row;
    kernels_.pack_float32(rows, dim_, ahead, panel_.data);
    return panel_.data;
  }

 private:
  const Kernels& kernels_;
  int64_t dim_;
  Aligned<float> panel_;
  std::vector<float> nan_, converted_;
};

// Where rows come from: panels, or plain float32 rows that are packed on the way.
struct Stretch {
  const Slab* slab = nullptr;
  const RowMatrix* matrix = nullptr;
  int64_t first_row = 0;  // in the segment
  int64_t num_rows = 0;
  int64_t slab_row = 0;  // where it begins in the slab or matrix; a multiple of 48
};

struct Task {
  int32_t stretch;
  int64_t first_panel, num_panels;  // in the slab or matrix
  int64_t first_group, end_group;
};

int64_t reservoir_capacity(int64_t keep) { return 2 * keep + 32; }

struct Candidate {  // of a certified scan
  float lower, upper;
  uint32_t key, row;

  float estimate() const { return lower + (upper - lower) / 2; }
};

// One pass: one block of queries over one segment of rows.
struct Pass {
  const Search& search;
  const IndexSearch* index;  // null: a plain search over rows
  const KernelSet& kernels;
  Dtype dtype;
  bool certify;
  int64_t first_query, num_queries;  // of search.queries
  const PackedQueries& packed;
  std::vector<Stretch> stretches;
  std::vector<std::vector<uint32_t>> excluded;    // sorted keys of this segment, by query; empty: none at all
  int64_t segment_row;                            // the segment's first row
  std::unique_ptr<std::atomic<uint64_t>[]> best;  // packed: a lower bound of the k-th result
  std::unique_ptr<std::atomic<float>[]> certain;  // certified: a lower bound of the k-th score
  std::unique_ptr<std::atomic<bool>[]> overflowed;  // certified: the query must fall back
  std::unique_ptr<std::atomic<bool>[]> misguessed;  // the query must be scanned again without guesses
  std::vector<uint64_t> guess;                      // packed: a result below it is none; 0: proven
  std::atomic<bool> out_of_memory{false};
  int64_t budget;
  // Of the stage: how many a reservoir keeps, and whether thresholds are guesses.
  int64_t keep = 0;
  bool guessing = false;

  int64_t capacity() const { return reservoir_capacity(keep); }

  const uint32_t* key_of_row() const { return index != nullptr ? index->key_of_row : nullptr; }
};

bool is_excluded(const Pass& pass, int64_t query, uint32_t key) {
  return !pass.excluded.empty() &&
         std::binary_search(pass.excluded[query].begin(), pass.excluded[query].end(), key);
}

struct Worker {
  explicit Worker(Pass& p)
      : pass(p),
        threshold(p.packed.padded),
        best(p.certify ? 0 : p.packed.padded, 0),
        results(p.certify ? 0 : p.num_queries),
        certain(p.certify ? p.packed.padded : 0, -kInfinity),
        candidates(p.certify ? p.num_queries : 0) {}

  Pass& pass;
  Aligned<float> threshold;
  std::vector<uint64_t> best;
  std::vector<std::vector<uint64_t>> results;
  std::vector<float> certain;
  std::vector<std::vector<Candidate>> candidates;
  std::vector<float> scratch;
  std::unique_ptr<Aligned<char>> widened;
  std::unique_ptr<RowPacker> packer;
  const Slab* slab = nullptr;
  int64_t run_row = 0;       // the segment row of the run's first panel
  int64_t run_slab_row = 0;  // its row in the slab
  float bounds[2] = {0, 0};  // the task's largest residual norm and norm

  // The least score that can still matter once rows before `row` are done.
  void set_threshold(int64_t query, int64_t row) {
    const uint64_t packed = best[query];
    if (packed == 0) {
      threshold.data[query] = kLowest;
      return;
    }
    const float score = score_of(packed);
    const float scale = pass.packed.bound[query].scale;
    if (scale != 1.0f) {  // the kernel compares before scaling: leave room for the rounding
      const float least = score / scale;
      threshold.data[query] = least - std::abs(least) * 0x1p-20f - std::numeric_limits<float>::min();
      return;
    }
    // Where keys are rows, a later row must do better than a tie.
    const bool ties_lose = pass.key_of_row() == nullptr && row > key_of(packed);
    threshold.data[query] = ties_lose ? std::nextafter(score, kInfinity) : score;
  }

  void compact(int64_t query, int64_t next_row) {
    std::vector<uint64_t>& kept = results[query];
    const uint64_t value = select_largest(kept.data(), static_cast<int64_t>(kept.size()), pass.keep);
    kept.resize(pass.keep);
    best[query] = raise_to(pass.best[query], value);
    set_threshold(query, next_row);
  }

  void accept(int64_t query, int64_t panel, uint64_t mask, const float* scores) {
    const int64_t panel_row = run_row + panel * kPanelRows;
    const uint32_t* keys = pass.key_of_row();
    std::vector<uint64_t>& kept = results[query];
    const float scale = pass.packed.bound[query].scale;
    for (; mask != 0; mask &= mask - 1) {
      const int lane = std::countr_zero(mask);
      const int64_t row = panel_row + lane;
      const uint32_t key = keys != nullptr ? keys[row] : static_cast<uint32_t>(row);
      const uint64_t result = pack_result(scores[lane] * scale, key);
      if (result <= best[query] || is_excluded(pass, query, key)) continue;
      kept.push_back(result);
      if (static_cast<int64_t>(kept.size()) >= pass.capacity()) compact(query, panel_row + kPanelRows);
    }
  }

  // The kernel's scores below this cannot reach the certain k-th score, whatever their error.
  void set_certified_threshold(int64_t query) {
    const ErrorBound& bound = pass.packed.bound[query];
    if (pass.overflowed[query].load(std::memory_order_relaxed)) {
      threshold.data[query] = kInfinity;
      return;
    }
    if (certain[query] == -kInfinity) {
      threshold.data[query] = kLowest;
      return;
    }
    const double error =
        static_cast<double>(bound.a) * bounds[0] + static_cast<double>(bound.b) * bounds[1] + bound.c;
    const double least = (certain[query] - error * (1 + 0x1p-18)) / bound.scale;
    const double rounded_down = least - std::abs(least) * 0x1p-20 - 0x1p-120 / bound.scale;
    threshold.data[query] =
        rounded_down > kLowest ? std::nextafter(static_cast<float>(rounded_down), -kInfinity) : kLowest;
  }

  // Drops what can no longer be a result; a query with too many left gives up.
  void compact_certified(int64_t query) {
    std::vector<Candidate>& kept = candidates[query];
    scratch.resize(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) scratch[i] = pass.guessing ? kept[i].estimate() : kept[i].lower;
    const float kth = select_largest(scratch.data(), static_cast<int64_t>(scratch.size()), pass.keep);
    certain[query] = raise_to(pass.certain[query], kth);
    const float least = certain[query];
    std::erase_if(kept, [least](const Candidate& c) { return c.upper < least; });
    if (static_cast<int64_t>(kept.size()) > pass.budget) {
      pass.overflowed[query].store(true, std::memory_order_relaxed);
      kept = {};
    }
    set_certified_threshold(query);
  }

  void accept_certified(int64_t query, int64_t panel, uint64_t mask, const float* scores) {
    if (pass.overflowed[query].load(std::memory_order_relaxed)) return;
    const int64_t panel_row = run_row + panel * kPanelRows;
    const int64_t slab_row = run_slab_row + panel * kPanelRows;
    const uint32_t* keys = pass.key_of_row();
    const ErrorBound& bound = pass.packed.bound[query];
    std::vector<Candidate>& kept = candidates[query];
    for (; mask != 0; mask &= mask - 1) {
      const int lane = std::countr_zero(mask);
      const int64_t row = panel_row + lane;
      const uint32_t key = keys != nullptr ? keys[row] : static_cast<uint32_t>(row);
      const float score = scores[lane] * bound.scale;
      const float error =
          bound.a * slab->residual_norm[slab_row + lane] + bound.b * slab->norm[slab_row + lane] + bound.c;
      const float upper = score + error;
      if (upper < certain[query] || is_excluded(pass, query, key)) continue;
      kept.push_back({score - error, upper, key, static_cast<uint32_t>(row)});
      // Twice what the last compaction left, at least: amortised, a candidate is compacted a few times.
      if (static_cast<int64_t>(kept.size()) >= pass.capacity() && kept.size() == kept.capacity()) {
        compact_certified(query);
        if (pass.overflowed[query].load(std::memory_order_relaxed)) return;
        kept.reserve(std::max<size_t>(2 * kept.size(), pass.capacity()));
      }
    }
  }

  static void accept_thunk(void* worker, int64_t query, int64_t panel, uint64_t mask, const float* scores) {
    static_cast<Worker*>(worker)->accept(query, panel, mask, scores);
  }
  static void accept_certified_thunk(void* worker, int64_t query, int64_t panel, uint64_t mask,
                                     const float* scores) {
    static_cast<Worker*>(worker)->accept_certified(query, panel, mask, scores);
  }

  void run(const Task& task) {
    const Stretch& stretch = pass.stretches[task.stretch];
    const int64_t steps = steps_of(pass.dtype, pass.search.dim);
    const int64_t panel_bytes = steps * kPanelRows * kStepBytes;
    run_slab_row = task.first_panel * kPanelRows;
    run_row = stretch.first_row + run_slab_row - stretch.slab_row;
    slab = stretch.slab;
    if (pass.certify) {
      bounds[0] = bounds[1] = 0;
      for (int64_t p = task.first_panel; p < task.first_panel + task.num_panels; ++p) {
        bounds[0] = std::max(bounds[0], slab->panel_bounds[2 * p]);
        bounds[1] = std::max(bounds[1], slab->panel_bounds[2 * p + 1]);
      }
      if (task.end_group - task.first_group > 2) {  // with many queries most panels have a candidate
        for (int64_t row = run_slab_row; row < run_slab_row + task.num_panels * kPanelRows; row += 16) {
          __builtin_prefetch(slab->residual_norm + row, 0, 2);
          __builtin_prefetch(slab->norm + row, 0, 2);
        }
      }
    }
    const int64_t first_query = task.first_group * kGroupQueries;
    const int64_t end_query = task.end_group * kGroupQueries;
    for (int64_t q = first_query; q < end_query; ++q) {
      if (q >= pass.num_queries || (!pass.certify && !pass.packed.bound[q].certified)) {
        threshold.data[q] = kInfinity;
      } else if (pass.certify) {
        const ErrorBound& bound = pass.packed.bound[q];
        if (!(bound.a * bounds[0] + bound.b * bounds[1] < 1e37f) ||
            !(static_cast<double>(bound.a) * (bounds[1] + static_cast<double>(bounds[0])) < 1e37)) {
          pass.overflowed[q].store(true, std::memory_order_relaxed);  // float32 scores could overflow
        }
        certain[q] = pass.certain[q].load(std::memory_order_relaxed);
        set_certified_threshold(q);
      } else {
        best[q] = pass.best[q].load(std::memory_order_relaxed);
        set_threshold(q, run_row);
      }
    }
    ScanRun scan{
        .panels = nullptr,
        .panel_bytes = panel_bytes,
        .num_panels = task.num_panels,
        .steps = steps,
        .queries = pass.packed.data.data,
        .first_group = task.first_group,
        .end_group = task.end_group,
        .num_groups = pass.packed.num_groups,
        .last_width = pass.packed.last_width,
        .query_offset = pass.packed.offset.data,
        .row_scale = nullptr,
        .widened = nullptr,
        .threshold = threshold.data,
        .accept = pass.certify ? accept_certified_thunk : accept_thunk,
        .context = this,
    };
    const auto kernel = pass.kernels.scan[static_cast<int>(pass.dtype)];
    if (slab != nullptr) {
      if (pass.kernels.query_step_bytes[static_cast<int>(pass.dtype)] != kStepBytes) {
        if (widened == nullptr) widened = std::make_unique<Aligned<char>>(2 * panel_bytes);
        scan.widened = widened->data;
      }
      scan.panels = static_cast<const char*>(slab->panels) + task.first_panel * panel_bytes;
      if (slab->scale != nullptr) scan.row_scale = slab->scale + run_slab_row;
      kernel(scan);
      return;
    }
    if (packer == nullptr) packer = std::make_unique<RowPacker>(*pass.kernels.base, pass.search.dim);
    scan.num_panels = 1;
    for (int64_t p = 0; p < task.num_panels; ++p) {
      scan.panels = reinterpret_cast<const char*>(packer->pack(*stretch.matrix, run_slab_row));
      kernel(scan);
      run_row += kPanelRows;
      run_slab_row += kPanelRows;
    }
  }
};

// What is scanned together, and how many rows a query keeps at least; the last stage holds most of the
// panels.
struct Stage {
  std::vector<Task> tasks;
  int64_t keep;
};

// How many rows of a sample to keep, so that the least of them is hardly ever above the k-th result of all:
// the number of results that a random sample of this share holds, and over four standard deviations more.
int64_t sample_keep(int64_t k, double share) {
  const double expected = static_cast<double>(k) * share;
  return static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 8);
}

std::vector<Stage> make_stages(const Pass& pass) {
  const int64_t panel_bytes = steps_of(pass.dtype, pass.search.dim) * kPanelRows * kStepBytes;
  const int64_t threads = std::max(pass.search.num_threads, 1);
  int64_t total_panels = 0;
  for (const Stretch& s : pass.stretches) total_panels += (s.num_rows + kPanelRows - 1) / kPanelRows;
  // Few queries: long runs, which memory likes. Many: short ones, so that what a run touches stays in the
  // cache.
  const int64_t longest = pass.packed.num_groups > 2
                              ? 32
                              : std::max<int64_t>(16, (int64_t{1} << 20) / std::max<int64_t>(panel_bytes, 1));
  const int64_t chunk = std::clamp<int64_t>(total_panels / (threads * 8), 1, longest);
  // Few panels and many queries: split the queries too.
  const int64_t chunks = (total_panels + chunk - 1) / chunk;
  const int64_t groups = pass.packed.num_groups;
  const int64_t parts =
      threads == 1 ? 1 : std::clamp<int64_t>(threads * 4 / std::max<int64_t>(chunks, 1), 1, (groups + 3) / 4);
  int64_t part_groups = (groups + parts - 1) / parts;
  if (pass.kernels.query_tiles[static_cast<int>(pass.dtype)]) part_groups = (part_groups + 1) / 2 * 2;
  // Samples: the first panel of every eighth run, then that of the other runs. Whole runs would not do: where
  // similar rows stand together, they would be sampled together.
  const bool sample = pass.search.guess && parts == 1 && chunk >= 4 && chunks >= 64;
  constexpr int kStages = 3;
  std::vector<Task> tasks[kStages];
  int64_t run = 0;
  for (size_t s = 0; s < pass.stretches.size(); ++s) {
    const Stretch& stretch = pass.stretches[s];
    const int64_t first = stretch.slab_row / kPanelRows;
    const int64_t end = first + (stretch.num_rows + kPanelRows - 1) / kPanelRows;
    for (int64_t p = first; p < end; p += chunk, ++run) {
      const int64_t count = std::min(chunk, end - p);
      const int64_t sampled = sample ? 1 : 0;
      for (int64_t g = 0; g < groups; g += part_groups) {
        const int64_t end_group = std::min(g + part_groups, groups);
        const auto stretch_index = static_cast<int32_t>(s);
        if (sample) tasks[run % 8 == 0 ? 0 : 1].push_back({stretch_index, p, 1, g, end_group});
        if (count > sampled) {
          tasks[kStages - 1].push_back({stretch_index, p + sampled, count - sampled, g, end_group});
        }
      }
    }
  }
  const int64_t k = pass.search.k;
  std::vector<Stage> stages;
  std::vector<Task> pending;
  int64_t panels = 0;
  for (int stage = 0; stage < kStages; ++stage) {
    pending.insert(pending.end(), tasks[stage].begin(), tasks[stage].end());
    for (const Task& task : tasks[stage]) panels += task.num_panels;
    if (stage + 1 == kStages) {
      stages.push_back({std::move(pending), std::min(k, total_panels * kPanelRows)});
      break;
    }
    if (pending.empty()) continue;
    const int64_t keep = sample_keep(k, static_cast<double>(panels) / static_cast<double>(total_panels));
    if (keep < k / 4 * 3 && keep < panels / 2) {
      stages.push_back({std::move(pending), keep});
      pending = {};
    }
  }
  return stages;
}

// Float32 scores of single rows, by the scan's own kernel: the same bits.
class Rescorer {
 public:
  Rescorer(const KernelSet& kernels, int64_t dim)
      : kernels_(kernels), dim_(dim), packer_(*kernels.base, dim) {}

  // scores[i] of rows[i] (at most 48); rows that do not score above -inf keep -inf.
  void score(const float* query, const float* (&rows)[kPanelRows], float (&scores)[kPanelRows]) {
    for (float& score : scores) score = -kInfinity;
    threshold_ = kLowest;
    const ScanRun scan{
        .panels = reinterpret_cast<const char*>(packer_.pack(rows)),
        .panel_bytes = dim_ * kPanelRows * kStepBytes,
        .num_panels = 1,
        .steps = dim_,
        .queries = reinterpret_cast<const char*>(query),  // a group of one query is the query itself
        .first_group = 0,
        .end_group = 1,
        .num_groups = 1,
        .last_width = 1,
        .query_offset = nullptr,
        .row_scale = nullptr,
        .widened = nullptr,
        .threshold = &threshold_,
        .accept =
            [](void* out, int64_t, int64_t, uint64_t mask, const float* found) {
              for (; mask != 0; mask &= mask - 1) {
                const int lane = std::countr_zero(mask);
                static_cast<float*>(out)[lane] = found[lane];
              }
            },
        .context = scores,
    };
    kernels_.scan[0](scan);
  }

 private:
  const KernelSet& kernels_;
  int64_t dim_;
  RowPacker packer_;
  float threshold_ = kLowest;
};

const float* original_row(const std::vector<Stretch>& stretches, int64_t segment_row, int64_t dim) {
  for (const Stretch& s : stretches) {
    if (segment_row >= s.first_row && segment_row < s.first_row + s.num_rows) {
      return s.slab->originals + (s.slab_row + segment_row - s.first_row) * dim;
    }
  }
  return nullptr;
}

// The results of one query of one pass, best first.
void write_results(const Pass& pass, std::vector<uint64_t>& results, float* scores, int64_t* keys) {
  const int64_t k = pass.search.k;
  const int64_t found = std::min<int64_t>(k, static_cast<int64_t>(results.size()));
  if (found < static_cast<int64_t>(results.size())) {
    if (found > 0) select_largest(results.data(), static_cast<int64_t>(results.size()), found);
  }
  std::sort(results.begin(), results.begin() + found, std::greater<>());
  for (int64_t j = 0; j < found; ++j) {
    scores[j] = score_of(results[j]);
    keys[j] = pass.segment_row + key_of(results[j]);
  }
  std::fill(scores + found, scores + k, -kInfinity);
  std::fill(keys + found, keys + k, int64_t{-1});
}

// Merges b into a; both best first, a's rows before b's.
void merge_results(int64_t k, float* a_scores, int64_t* a_keys, const float* b_scores,
                   const int64_t* b_keys) {
  std::vector<float> scores(a_scores, a_scores + k);
  std::vector<int64_t> keys(a_keys, a_keys + k);
  for (int64_t i = 0, j = 0, out = 0; out < k; ++out) {
    const bool from_a = scores[i] >= b_scores[j];
    a_scores[out] = from_a ? scores[i] : b_scores[j];
    a_keys[out] = from_a ? keys[i] : b_keys[j];
    ++(from_a ? i : j);
  }
}

struct Driver {
  const Search& search;
  const IndexSearch* index = nullptr;    // null: a search over plain rows
  std::vector<RowMatrix> matrices = {};  // instead of the index's slabs
  SearchStats stats = {};
  KernelSet kernels = choose_kernels();
  std::vector<int64_t> fallen = {};   // queries to answer by a scan of the originals
  std::vector<int64_t> repeats = {};  // queries to scan again without guesses

  bool certified() const {
    return matrices.empty() && index != nullptr && index->dtype != Dtype::float32 && index->exact;
  }

  // Stretches of at most max_segment_rows rows in all, by segment.
  std::vector<std::vector<Stretch>> segments() const {
    std::vector<std::vector<Stretch>> result(1);
    const int64_t limit = std::max<int64_t>(search.max_segment_rows / kPanelRows, 1) * kPanelRows;
    int64_t used = 0;
    const auto add = [&](const Slab* slab, const RowMatrix* rows, int64_t num_rows) {
      for (int64_t done = 0; done < num_rows;) {
        if (limit - used < kPanelRows) {
          result.emplace_back();
          used = 0;
        }
        const int64_t take = std::min(num_rows - done, (limit - used) / kPanelRows * kPanelRows);
        result.back().push_back({slab, rows, used, take, done});
        done += take;
        // A segment's rows are numbered without gaps over slabs: padding takes no number.
        used += take;
      }
    };
    for (const RowMatrix& matrix : matrices) add(nullptr, &matrix, matrix.num_rows);
    if (matrices.empty() && index != nullptr) {
      for (const Slab& slab : index->slabs) add(&slab, nullptr, slab.num_rows);
    }
    return result;
  }

  std::vector<std::vector<uint32_t>> excluded_keys(int64_t first_query, int64_t count, int64_t segment_row,
                                                   int64_t segment_rows) const {
    if (search.num_excluded == 0) return {};
    std::vector<std::vector<uint32_t>> result(count);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t* keys = search.excluded + (first_query + q) * search.num_excluded;
      for (int64_t e = 0; e < search.num_excluded; ++e) {
        const int64_t key = keys[e] - segment_row;
        if (keys[e] >= 0 && key >= 0 && key < segment_rows) result[q].push_back(static_cast<uint32_t>(key));
      }
      std::sort(result[q].begin(), result[q].end());
    }
    return result;
  }

  bool run() {
    const DefaultFloatEnvironment environment;
    // Padding is told from rows by its NaN, which takes a column.
    if (search.dim < 1) throw std::invalid_argument("dim: expected at least 1");
    if (search.num_queries == 0 || search.k == 0) return true;
    std::fill(search.scores, search.scores + search.num_queries * search.k, -kInfinity);
    std::fill(search.keys, search.keys + search.num_queries * search.k, int64_t{-1});
    const std::vector<std::vector<Stretch>> parts = segments();
    if (index != nullptr && index->key_of_row != nullptr && parts.size() > 1) {
      throw std::invalid_argument("an index of so many rows needs its ids in ascending order");
    }
    int64_t total_rows = 0;
    for (const auto& part : parts) {
      for (const Stretch& s : part) total_rows += s.num_rows;
    }
    if (certified() && search.k >= std::max<int64_t>(total_rows / 4, 1)) return scan_originals_for_all();
    const int64_t threads = std::max(search.num_threads, 1);
    const int64_t capacity = reservoir_capacity(std::min(search.k, total_rows));
    const int64_t bytes_per_query =
        capacity * (certified() ? int64_t{sizeof(Candidate)} : int64_t{8}) * threads;
    const int64_t block = std::clamp<int64_t>(
        kReservoirBytes / bytes_per_query / kGroupQueries * kGroupQueries, kGroupQueries, kQueriesPerPass);
    for (int64_t q = 0; q < search.num_queries; q += block) {
      if (!search_block(parts, q, std::min(block, search.num_queries - q))) return false;
    }
    return (fallen.empty() || scan_originals(fallen)) && (repeats.empty() || repeat(repeats));
  }

  bool search_block(const std::vector<std::vector<Stretch>>& parts, int64_t first, int64_t count) {
    const Dtype dtype = index != nullptr && matrices.empty() ? index->dtype : Dtype::float32;
    const PackedQueries packed =
        pack_queries(dtype, kernels, search.queries + first * search.dim, count, search.dim);
    std::vector<bool> has_fallen(count, false), was_misguessed(count, false);
    int64_t segment_row = 0;
    for (size_t part = 0; part < parts.size(); ++part) {
      int64_t rows = 0;
      for (const Stretch& s : parts[part]) rows += s.num_rows;
      Pass pass{.search = search,
                .index = index,
                .kernels = kernels,
                .dtype = dtype,
                .certify = certified(),
                .first_query = first,
                .num_queries = count,
                .packed = packed,
                .stretches = parts[part],
                .excluded = excluded_keys(first, count, segment_row, rows),
                .segment_row = segment_row,
                .best = std::make_unique<std::atomic<uint64_t>[]>(packed.padded),
                .certain = std::make_unique<std::atomic<float>[]>(packed.padded),
                .overflowed = std::make_unique<std::atomic<bool>[]>(packed.padded),
                .misguessed = std::make_unique<std::atomic<bool>[]>(packed.padded),
                .guess = std::vector<uint64_t>(packed.padded, 0),
                .budget = index != nullptr && index->max_candidates > 0
                              ? std::max(index->max_candidates, search.k)
                              : std::max(kCandidateBudget, 16 * search.k)};
      for (int64_t q = 0; q < packed.padded; ++q) {
        pass.certain[q].store(-kInfinity, std::memory_order_relaxed);
        pass.overflowed[q].store(has_fallen_or_uncertified(pass, q, has_fallen), std::memory_order_relaxed);
      }
      if (!scan(pass, part > 0)) return false;
      for (int64_t q = 0; q < count; ++q) {
        has_fallen[q] = has_fallen[q] || (pass.certify && pass.overflowed[q].load());
        was_misguessed[q] = was_misguessed[q] || pass.misguessed[q].load();
      }
      segment_row += rows;
    }
    for (int64_t q = 0; q < count; ++q) {
      if (has_fallen[q]) {
        fallen.push_back(first + q);
      } else if (was_misguessed[q]) {
        repeats.push_back(first + q);
      }
    }
    return true;
  }

  static bool has_fallen_or_uncertified(const Pass& pass, int64_t q, const std::vector<bool>& has_fallen) {
    return q < pass.num_queries && (has_fallen[q] || !pass.packed.bound[q].certified);
  }

  bool scan(Pass& pass, bool merge) {
    const std::vector<Stage> stages = make_stages(pass);
    const int threads = static_cast<int>(std::clamp<int64_t>(static_cast<int64_t>(stages.back().tasks.size()),
                                                             1, std::max(search.num_threads, 1)));
    std::vector<std::unique_ptr<Worker>> workers(threads);
    for (auto& worker : workers) worker = std::make_unique<Worker>(pass);
    for (const Stage& stage : stages) {
      pass.keep = stage.keep;
      pass.guessing = &stage != &stages.back();
      if (!for_all(pass, static_cast<int64_t>(stage.tasks.size()), threads,
                   [&](int64_t task, int worker) { workers[worker]->run(stage.tasks[task]); })) {
        return false;
      }
      if (pass.guessing && !for_queries(pass, threads, [&](int64_t q) { guess(pass, workers, q); }))
        return false;
    }
    std::atomic<int64_t> rescored{0};
    if (!for_queries(pass, threads, [&](int64_t q) {
          rescored.fetch_add(finish_query(pass, workers, q, merge), std::memory_order_relaxed);
        })) {
      return false;
    }
    stats.rescored += rescored.load();
    return true;
  }

  // False when poll stopped it.
  template <class Body>
  bool for_all(Pass& pass, int64_t num_tasks, int threads, const Body& body) {
    const bool completed = parallel_for(
        num_tasks, threads,
        [&](int64_t task, int worker) {
          if (pass.out_of_memory.load(std::memory_order_relaxed)) return;
          const DefaultFloatEnvironment environment;
          try {
            body(task, worker);
          } catch (const std::bad_alloc&) {
            pass.out_of_memory.store(true, std::memory_order_relaxed);
          }
        },
        search.poll);
    if (pass.out_of_memory.load()) throw std::bad_alloc();
    return completed;
  }

  template <class Body>
  bool for_queries(Pass& pass, int threads, const Body& body) {
    constexpr int64_t kQueriesPerTask = 4;
    return for_all(pass, (pass.num_queries + kQueriesPerTask - 1) / kQueriesPerTask, threads,
                   [&](int64_t task, int) {
                     const int64_t end = std::min((task + 1) * kQueriesPerTask, pass.num_queries);
                     for (int64_t q = task * kQueriesPerTask; q < end; ++q) body(q);
                   });
  }

  // Raises a query's threshold to what its best rows so far, `keep` of them in different panels, suggest.
  // Similar rows often stand together; counted one by one, a panel of them would promise as many in every
  // panel.
  void guess(Pass& pass, const std::vector<std::unique_ptr<Worker>>& workers, int64_t query) {
    std::vector<std::pair<uint32_t, uint64_t>> found;  // panel, packed
    for (const auto& worker : workers) {
      if (pass.certify) {
        for (const Candidate& c : worker->candidates[query]) {
          found.emplace_back(c.row / kPanelRows, pack_result(c.estimate(), c.key));
        }
      } else {
        for (const uint64_t result : worker->results[query]) {
          found.emplace_back(key_of(result) / kPanelRows, result);
        }
      }
    }
    std::sort(found.begin(), found.end(), std::greater<>());
    std::vector<uint64_t> best;  // of each panel
    for (size_t i = 0; i < found.size(); ++i) {
      if (i == 0 || found[i].first != found[i - 1].first) best.push_back(found[i].second);
    }
    if (static_cast<int64_t>(best.size()) >= pass.keep) {
      const uint64_t value = select_largest(best.data(), static_cast<int64_t>(best.size()), pass.keep);
      if (pass.certify) {
        raise_to(pass.certain[query], score_of(value));
      } else {
        raise_to(pass.best[query], value);
      }
    }
    // Compactions in the stage have guessed as well.
    const float certain = pass.certify ? pass.certain[query].load() : -kInfinity;
    pass.guess[query] = !pass.certify          ? pass.best[query].load()
                        : certain > -kInfinity ? pack_result(certain, ~0u)
                                               : 0;
  }

  // Merges the workers' reservoirs of a query into its results; returns how many rows were re-scored.
  int64_t finish_query(Pass& pass, std::vector<std::unique_ptr<Worker>>& workers, int64_t query, bool merge) {
    std::vector<uint64_t> results;
    int64_t rescored = 0;
    if (pass.certify) {
      if (pass.overflowed[query].load(std::memory_order_relaxed)) return 0;
      rescored = rescore(pass, workers, query, results);
    } else {
      for (const auto& worker : workers) {
        results.insert(results.end(), worker->results[query].begin(), worker->results[query].end());
      }
    }
    const int64_t out = (pass.first_query + query) * search.k;
    if (pass.guess[query] != 0) {
      const int64_t found = static_cast<int64_t>(results.size());
      if (found < search.k || select_largest(results.data(), found, search.k) < pass.guess[query]) {
        pass.misguessed[query].store(true, std::memory_order_relaxed);
        return rescored;
      }
    }
    if (!merge) {
      write_results(pass, results, search.scores + out, search.keys + out);
    } else {
      std::vector<float> scores(search.k);
      std::vector<int64_t> keys(search.k);
      write_results(pass, results, scores.data(), keys.data());
      merge_results(search.k, search.scores + out, search.keys + out, scores.data(), keys.data());
    }
    return rescored;
  }

  int64_t rescore(Pass& pass, std::vector<std::unique_ptr<Worker>>& workers, int64_t query,
                  std::vector<uint64_t>& results) {
    std::vector<Candidate> candidates;
    for (const auto& worker : workers) {
      std::vector<Candidate>& from = worker->candidates[query];
      candidates.insert(candidates.end(), from.begin(), from.end());
      from = {};
    }
    if (static_cast<int64_t>(candidates.size()) > search.k) {
      std::vector<float> lower(candidates.size());
      for (size_t i = 0; i < candidates.size(); ++i) lower[i] = candidates[i].lower;
      const float least = select_largest(lower.data(), static_cast<int64_t>(lower.size()), search.k);
      std::erase_if(candidates, [least](const Candidate& c) { return c.upper < least; });
    }
    int64_t segment_rows = 0;
    for (const Stretch& s : pass.stretches) segment_rows += s.num_rows;
    for (const int64_t irregular : index->irregular_rows) {
      const int64_t row = irregular - pass.segment_row;
      if (row < 0 || row >= segment_rows) continue;
      const uint32_t key = index->key_of_row != nullptr ? index->key_of_row[row] : static_cast<uint32_t>(row);
      if (!is_excluded(pass, query, key))
        candidates.push_back({kInfinity, kInfinity, key, static_cast<uint32_t>(row)});
    }
    // First as many as there are results, those most certain to be good: what they turn out to be worth then
    // rules out many of the others.
    const int64_t count = static_cast<int64_t>(candidates.size());
    const int64_t first = std::min(search.k, count);
    std::nth_element(candidates.begin(), candidates.begin() + first, candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
    score_originals(pass, query, candidates.data(), candidates.data() + first, results);
    std::vector<Candidate> rest(candidates.begin() + first, candidates.end());
    if (static_cast<int64_t>(results.size()) >= search.k) {
      std::vector<uint64_t> scored = results;
      const float least =
          score_of(select_largest(scored.data(), static_cast<int64_t>(scored.size()), search.k));
      std::erase_if(rest, [least](const Candidate& c) { return c.upper < least; });
    }
    score_originals(pass, query, rest.data(), rest.data() + rest.size(), results);
    return first + static_cast<int64_t>(rest.size());
  }

  // Appends the float32 results of candidates, which it sorts by row.
  void score_originals(const Pass& pass, int64_t query, Candidate* begin, Candidate* end,
                       std::vector<uint64_t>& results) {
    Rescorer rescorer(kernels, search.dim);
    const float* values = search.queries + (pass.first_query + query) * search.dim;
    std::sort(begin, end, [](const Candidate& a, const Candidate& b) { return a.row < b.row; });
    // Candidates lie anywhere in memory: fetch a batch of rows while the one before is scored.
    const auto batch_end = [end](const Candidate* from) {
      return from + std::min<int64_t>(kPanelRows, end - from);
    };
    const auto prefetch = [&](const Candidate* from) {
      for (const Candidate* c = from; c != batch_end(from); ++c) {
        const char* row = reinterpret_cast<const char*>(original_row(pass.stretches, c->row, search.dim));
        for (int64_t byte = 0; byte < search.dim * int64_t{sizeof(float)}; byte += 64)
          __builtin_prefetch(row + byte);
      }
    };
    prefetch(begin);
    for (const Candidate* batch = begin; batch != end; batch = batch_end(batch)) {
      prefetch(batch_end(batch));
      const float* rows[kPanelRows] = {};
      for (const Candidate* c = batch; c != batch_end(batch); ++c) {
        rows[c - batch] = original_row(pass.stretches, c->row, search.dim);
      }
      float scores[kPanelRows];
      rescorer.score(values, rows, scores);
      for (const Candidate* c = batch; c != batch_end(batch); ++c) {
        if (scores[c - batch] > -kInfinity) results.push_back(pack_result(scores[c - batch], c->key));
      }
    }
  }

  bool scan_originals_for_all() {
    std::vector<int64_t> all(search.num_queries);
    for (int64_t q = 0; q < search.num_queries; ++q) all[q] = q;
    return scan_originals(all);
  }

  // Answers the named queries by a float32 scan of the original rows.
  bool scan_originals(const std::vector<int64_t>& which) {
    IndexSearch plain;
    plain.key_of_row = index->key_of_row;
    std::vector<RowMatrix> rows;
    for (const Slab& slab : index->slabs)
      rows.push_back({slab.originals, slab.num_rows, search.dim, RowType::float32});
    stats.fell_back += static_cast<int64_t>(which.size());
    return search_again(which, &plain, rows, search.guess);
  }

  // Answers the named queries without guesses.
  bool repeat(const std::vector<int64_t>& which) {
    stats.repeated += static_cast<int64_t>(which.size());
    return search_again(which, index, matrices, false);
  }

  bool search_again(const std::vector<int64_t>& which, const IndexSearch* what,
                    const std::vector<RowMatrix>& rows, bool guess) {
    const int64_t count = static_cast<int64_t>(which.size());
    std::vector<float> queries(count * search.dim), scores(count * search.k);
    std::vector<int64_t> excluded(count * search.num_excluded), keys(count * search.k);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(search.queries + which[i] * search.dim, search.dim, queries.data() + i * search.dim);
      std::copy_n(search.excluded + which[i] * search.num_excluded, search.num_excluded,
                  excluded.data() + i * search.num_excluded);
    }
    Search again = search;
    again.queries = queries.data();
    again.num_queries = count;
    again.excluded = excluded.data();
    again.scores = scores.data();
    again.keys = keys.data();
    again.guess = guess;
    Driver driver{.search = again, .index = what, .matrices = rows};
    if (!driver.run()) return false;
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(scores.data() + i * search.k, search.k, search.scores + which[i] * search.k);
      std::copy_n(keys.data() + i * search.k, search.k, search.keys + which[i] * search.k);
    }
    stats.rescored += driver.stats.rescored;
    stats.fell_back += driver.stats.fell_back;
    stats.repeated += driver.stats.repeated;
    return true;
  }
};

}  // namespace

bool topk_rows(const Search& search, const RowMatrix& blocks) {
  Driver driver{.search = search, .matrices = {blocks}};
  return driver.run();
}

bool topk_index(const Search& search, const IndexSearch& index, SearchStats& stats) {
  Driver driver{.search = search, .index = &index};
  const bool completed = driver.run();
  stats = driver.stats;
  return completed;
}

}  // namespace realm_fast::mips
