// The kernels, written once over a compute type and compiled once for each CPU level.
//
// One product runs through all three multiplications: a tile of kRows x (vectors * lanes) accumulators in
// registers; a step loads the vectors of one packed row of the right operand and broadcasts one unit from
// each of kRows rows of the left one, which needs no packing since units lie side by side along the summed
// dimension. With AMX the same tile is made of tile registers, 16 units a step, and the left operand must lie
// in rows everywhere: the layouts of d logits differ (linear_gold.h).
#pragma once

#include "core/simd.h"
#if defined(__AMX_BF16__)
#include "core/tiles_amx.h"
#endif
#include "linear_marginal_ce/linear_gold.h"

namespace realm_fast {
namespace {

#define REALM_FAST_UNROLL _Pragma("GCC unroll 8")
// A function of its own keeps the accumulators in registers: inlined into the loops over tiles, GCC spills
// them.
#define REALM_FAST_APART __attribute__((noinline))

// float32 accumulators; a unit is one float.
struct ComputeF32 {
  using V = F32;
  using acc = float;
  using elem = float;  // what operands are stored as
  using unit = float;
  static constexpr int pair = 1, dtype = kFloat32;
#if defined(__AVX512F__)
  static constexpr int rows = 8, vectors = 3;
#else
  static constexpr int rows = 4, vectors = 3;  // 16 registers: 12 accumulators, 3 loads, 1 broadcast
#endif
  static REALM_FAST_INLINE V::vec load(const unit* p) { return V::load(p); }
  static REALM_FAST_INLINE V::vec broadcast(const unit* p) { return V::set(*p); }
  static REALM_FAST_INLINE V::vec add_product(V::vec a, V::vec b, V::vec c) { return V::fma(a, b, c); }
};

// float64, to check gradients with.
struct ComputeF64 {
  using V = F64;
  using acc = double;
  using elem = double;
  using unit = double;
  static constexpr int pair = 1, dtype = kFloat64, rows = 2, vectors = 3;
  static REALM_FAST_INLINE V::vec load(const unit* p) { return V::load(p); }
  static REALM_FAST_INLINE V::vec broadcast(const unit* p) { return V::set(*p); }
  static REALM_FAST_INLINE V::vec add_product(V::vec a, V::vec b, V::vec c) { return V::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// bfloat16 pairs into float32 accumulators; a unit is a pair along the summed dimension.
struct ComputeBF16 {
  using V = F32;
  using acc = float;
  using elem = uint16_t;
  using unit = uint32_t;
  static constexpr int pair = 2, dtype = kBFloat16, rows = 8, vectors = 3;
  static REALM_FAST_INLINE V::vec load(const unit* p) {
    V::vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static REALM_FAST_INLINE V::vec broadcast(const unit* p) {
    return (V::vec)_mm512_set1_epi32(static_cast<int>(*p));
  }
  static REALM_FAST_INLINE V::vec add_product(V::vec a, V::vec b, V::vec c) {
    return (V::vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

#if defined(__AMX_BF16__)
// The same with AMX.
struct ComputeTiles : ComputeBF16 {};
#endif

template <class C>
constexpr bool kInTiles = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool kInTiles<ComputeTiles> = true;
#endif

template <class T>
REALM_FAST_INLINE T* part(const LinearGoldPlan& plan, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(plan.args.workspace) + offset);
}

REALM_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
REALM_FAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
REALM_FAST_INLINE int64_t element_bytes(int dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// ---- elements in and out ----

// dst[0, n) = src[begin, begin + n), converted to the compute type.
template <class C>
void load_elements(typename C::elem* dst, const void* src, int dtype, int64_t begin, int64_t n) {
  using E = typename C::elem;
  if (dtype == C::dtype) {
    memcpy(dst, static_cast<const E*>(src) + begin, static_cast<size_t>(n) * sizeof(E));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(src) + begin;
  const float* single = static_cast<const float*>(src) + begin;
  if constexpr (C::pair == 2) {
    if (dtype == kFloat32) {
      for (int64_t i = 0; i < n; ++i) dst[i] = float_to_bf16(single[i]);
    } else if (dtype == kFloat16) {
      for (int64_t i = 0; i < n; ++i) dst[i] = float_to_bf16(f16_to_float(half[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = float_to_bf16(static_cast<float>(read(src, dtype, begin + i)));
    }
  } else {
    if (dtype == kBFloat16) {
      for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_float(half[i]);
    } else if (dtype == kFloat16) {
      for (int64_t i = 0; i < n; ++i) dst[i] = f16_to_float(half[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<E>(read(src, dtype, begin + i));
    }
  }
}

template <class T>
void store_elements(void* dst, int dtype, int64_t begin, const T* src, int64_t n) {
  if (dtype == kBFloat16) {
    uint16_t* out = static_cast<uint16_t*>(dst) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(static_cast<float>(src[i]));
  } else if (dtype == kFloat16) {
    uint16_t* out = static_cast<uint16_t*>(dst) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_f16(static_cast<float>(src[i]));
  } else if (dtype == kFloat32) {
    float* out = static_cast<float*>(dst) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(src[i]);
  } else {
    double* out = static_cast<double*>(dst) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(src[i]);
  }
}

// ---- the product ----

template <class C, int NV>
struct Tile {
  typename C::V::vec v[C::rows][NV];
};

// Tile registers 0 to 2: sums; 3: rows of the left operand; 4 to 6: the right operand.
template <class C>
REALM_FAST_INLINE void begin_task() {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<C>) {
    TileShapes shapes;
    for (int sums = 0; sums < 3; ++sums) shapes.set(sums, C::rows, 64);
    shapes.set(3, C::rows, 64);
    for (int right = 4; right < 7; ++right) shapes.set(right, 16, 64);
    shapes.use();
  }
#endif
}

template <class C>
REALM_FAST_INLINE void end_task() {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<C>) _tile_release();
#endif
}

#if defined(__AMX_BF16__)
// Tiles 0 .. NV - 1 += 16 steps. left: rows `row` units apart.
template <int NV>
REALM_FAST_INLINE void add_tile_product(const uint32_t* left, int64_t row, const uint32_t* right) {
  _tile_loadd(3, left, row * 4);
  _tile_loadd(4, right, NV * 64);
  _tile_dpbf16ps(0, 3, 4);
  if constexpr (NV > 1) {
    _tile_loadd(5, right + 16, NV * 64);
    _tile_dpbf16ps(1, 3, 5);
  }
  if constexpr (NV > 2) {
    _tile_loadd(6, right + 32, NV * 64);
    _tile_dpbf16ps(2, 3, 6);
  }
}

template <class C, int NV>
REALM_FAST_INLINE void multiply_tiles(Tile<C, NV>& tile, const uint32_t* left, int64_t row,
                                      const uint32_t* right, int64_t k) {
  constexpr int64_t kSteps = 16, kWidth = NV * 16;
  asm volatile("" : : : "memory");  // GCC 12 does not know that loads of tiles read what was stored before
  _tile_zero(0);
  if constexpr (NV > 1) _tile_zero(1);
  if constexpr (NV > 2) _tile_zero(2);
  int64_t i = 0;
  for (; i + kSteps <= k; i += kSteps) add_tile_product<NV>(left + i, row, right + i * kWidth);
  if (i < k) {  // behind the last step lies something else: zeros take its place
    const size_t rest = static_cast<size_t>(k - i);
    alignas(64) uint32_t last_left[C::rows * kSteps] = {}, last_right[kSteps * kWidth] = {};
    for (int r = 0; r < C::rows; ++r) memcpy(last_left + r * kSteps, left + r * row + i, rest * 4);
    memcpy(last_right, right + i * kWidth, rest * kWidth * 4);
    asm volatile("" : : "r"(last_left), "r"(last_right) : "memory");
    add_tile_product<NV>(last_left, kSteps, last_right);
  }
  alignas(64) float sums[C::rows * kWidth];
  _tile_stored(0, sums, kWidth * 4);
  if constexpr (NV > 1) _tile_stored(1, sums + 16, kWidth * 4);
  if constexpr (NV > 2) _tile_stored(2, sums + 32, kWidth * 4);
  REALM_FAST_UNROLL
  for (int r = 0; r < C::rows; ++r) {
    REALM_FAST_UNROLL
    for (int j = 0; j < NV; ++j) tile.v[r][j] += C::V::load(sums + r * kWidth + j * 16);
  }
}
#endif

// tile += left [rows x k] * right [k x NV vectors]. left: rows `row` units apart, steps `step` units apart
// (with AMX: 1). right: packed, NV vectors a step.
template <class C, int NV>
REALM_FAST_INLINE void multiply(Tile<C, NV>& tile, const typename C::unit* left, int64_t row, int64_t step,
                                const typename C::unit* right, int64_t k) {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<C>) {
    multiply_tiles<C, NV>(tile, left, row, right, k);
    return;
  }
#endif
  constexpr int lanes = C::V::lanes;
  const typename C::unit* left3 = left + 3 * row;  // three pointers reach eight rows with scaled addressing
  const typename C::unit* left6 = left + 6 * row;
  for (int64_t i = 0; i < k; ++i) {
    typename C::V::vec b[NV];
    REALM_FAST_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = C::load(right + j * lanes);
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) {
      const auto a =
          C::broadcast(r < 3 ? left + r * row : (r < 6 ? left3 + (r - 3) * row : left6 + (r - 6) * row));
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) tile.v[r][j] = C::add_product(a, b[j], tile.v[r][j]);
    }
    left += step;
    left3 += step;
    left6 += step;
    right += NV * lanes;
  }
}

template <class C, int NV>
REALM_FAST_INLINE void clear(Tile<C, NV>& tile) {
  REALM_FAST_UNROLL
  for (int r = 0; r < C::rows; ++r) {
    REALM_FAST_UNROLL
    for (int j = 0; j < NV; ++j) tile.v[r][j] = typename C::V::vec{};
  }
}

// ---- packing ----

template <class C>
constexpr int64_t kPanel = int64_t{C::vectors} * C::V::lanes;

template <class C>
REALM_FAST_INLINE int64_t panel_width(int64_t padded, int64_t panel) {
  return smaller(kPanel<C>, padded - panel * kPanel<C>);
}

// Hidden rows of one panel, transposed: [unit of H][row]. Also the padded copies of what goes with a row.
template <class C>
void pack_panel(const LinearGoldPlan& plan, int64_t panel, bool backward) {
  using E = typename C::elem;
  using T = typename C::acc;
  const LinearGold& a = plan.args;
  const int64_t width = panel_width<C>(plan.at.padded_rows, panel), first = panel * kPanel<C>;
  E* packed = part<E>(plan, plan.at.packed_hidden) + first * plan.at.units * C::pair;
  int32_t* label = part<int32_t>(plan, plan.at.label);
  T* row_max = part<T>(plan, plan.at.row_max);
  T* row_logsum = part<T>(plan, plan.at.row_logsum);
  T* grad = part<T>(plan, plan.at.grad);
  constexpr int64_t kStrip = 256;  // elements of a row at a time
  for (int64_t r = 0; r < width; ++r) {
    const int64_t row = first + r;
    const bool real = row < a.num_rows;
    label[row] = real ? a.labels[row] : -1;
    if (backward) {
      // A padding row has a maximum so high that its softmax is 0.
      row_max[row] = real ? static_cast<const T*>(a.row_max)[row] : static_cast<T>(3e38);
      row_logsum[row] = real ? static_cast<const T*>(a.row_logsum)[row] : 0;
      grad[row] = real ? static_cast<const T*>(a.grad)[row] : 0;
    }
    for (int64_t h0 = 0; h0 < plan.at.units * C::pair; h0 += kStrip) {
      E strip[kStrip] = {};
      const int64_t n = smaller(kStrip, a.width - h0);
      if (real && n > 0) load_elements<C>(strip, a.hidden, a.hidden_dtype, a.rows[row] * a.width + h0, n);
      const int64_t units = smaller(kStrip / C::pair, plan.at.units - h0 / C::pair);
      for (int64_t u = 0; u < units; ++u) {
        memcpy(packed + ((h0 / C::pair + u) * width + r) * C::pair, strip + u * C::pair, sizeof(E) * C::pair);
      }
    }
  }
}

// Two rows (one, if a unit is one element) of `width` elements into [column panel][unit][column] at
// `unit_index` of `units`. Columns beyond width become 0.
template <class C>
void pack_unit_row(typename C::elem* packed, const typename C::elem* row0, const typename C::elem* row1,
                   int64_t width, int64_t padded_width, int64_t unit_index, int64_t units) {
  using E = typename C::elem;
  for (int64_t h0 = 0; h0 < padded_width; h0 += kPanel<C>) {
    const int64_t columns = smaller(kPanel<C>, padded_width - h0), n = smaller(columns, width - h0);
    E* out = packed + (h0 * units + unit_index * columns) * C::pair;
    if constexpr (C::pair == 1) {
      (void)row1;
      memcpy(out, row0 + h0, static_cast<size_t>(n) * sizeof(E));
      for (int64_t c = n; c < columns; ++c) out[c] = 0;
    } else {
      const E *left = row0 + h0, *right = row1 + h0;
      for (int64_t c = 0; c < n; ++c) {
        const uint32_t both = static_cast<uint32_t>(left[c]) | (static_cast<uint32_t>(right[c]) << 16);
        memcpy(out + 2 * c, &both, 4);
      }
      for (int64_t c = 2 * n; c < 2 * columns; ++c) out[c] = 0;
    }
  }
}

// Units [begin, end) of rows of hidden, for d weight.
template <class C>
void pack_row_hidden(const LinearGoldPlan& plan, int64_t begin, int64_t end, int worker) {
  using E = typename C::elem;
  const LinearGold& a = plan.args;
  E* row[2];
  row[0] = part<E>(plan, plan.at.scratch + worker * plan.at.scratch_bytes);
  row[1] = row[0] + plan.at.units * C::pair;
  for (int64_t u = begin; u < end; ++u) {
    for (int i = 0; i < C::pair; ++i) {
      const int64_t r = u * C::pair + i;
      if (r < a.num_rows) {
        load_elements<C>(row[i], a.hidden, a.hidden_dtype, a.rows[r] * a.width, a.width);
      } else {
        memset(row[i], 0, static_cast<size_t>(a.width) * sizeof(E));
      }
    }
    pack_unit_row<C>(part<E>(plan, plan.at.row_hidden), row[0], row[1], a.width, plan.at.padded_width, u,
                     plan.at.padded_rows / C::pair);
  }
}

// C::rows rows of weight from v on, as the left operand: in place where the storage is what the product
// reads, else converted (and rows beyond V zeroed) into scratch. Bias beside them; -inf beyond V.
template <class C>
struct VocabRows {
  const typename C::unit* left;
  int64_t row_units;
  typename C::acc bias[C::rows];

  REALM_FAST_INLINE void load(const LinearGoldPlan& plan, int64_t v, typename C::elem* scratch) {
    using E = typename C::elem;
    using T = typename C::acc;
    const LinearGold& a = plan.args;
    for (int r = 0; r < C::rows; ++r) {
      bias[r] = v + r >= a.vocab ? -static_cast<T>(__builtin_inf())
                                 : (a.bias == nullptr ? 0 : static_cast<const T*>(a.bias)[v + r]);
    }
    if (a.weight_dtype == C::dtype && v + C::rows <= a.vocab && a.width % C::pair == 0) {
      left = reinterpret_cast<const typename C::unit*>(static_cast<const E*>(a.weight) + v * a.width);
      row_units = a.width / C::pair;
      return;
    }
    row_units = plan.at.units;
    for (int r = 0; r < C::rows; ++r) {
      E* row = scratch + r * row_units * C::pair;
      const int64_t n = v + r < a.vocab ? a.width : 0;
      if (n > 0) load_elements<C>(row, a.weight, a.weight_dtype, (v + r) * a.width, n);
      for (int64_t h = n; h < row_units * C::pair; ++h) row[h] = 0;
    }
    left = reinterpret_cast<const typename C::unit*>(scratch);
  }
};

// Spreads the fetching of the next block of weights over the tiles of this one: n bytes from `next` on are
// due in `tiles` shares, of which this is number `tile`.
REALM_FAST_INLINE void prefetch_share(const void* next, int64_t bytes, int64_t tile, int64_t tiles) {
  const char* base = static_cast<const char*>(next);
  for (int64_t at = bytes * tile / tiles / 64 * 64, end = bytes * (tile + 1) / tiles; at < end; at += 64) {
    __builtin_prefetch(base + at, 0, 2);
  }
}

template <class C, int NV>
REALM_FAST_INLINE void logits_tile(const LinearGoldPlan& plan, const VocabRows<C>& rows, int64_t panel,
                                   Tile<C, NV>& tile) {
  const auto* packed =
      part<typename C::unit>(plan, plan.at.packed_hidden) + panel * kPanel<C> * plan.at.units;
  clear(tile);
  multiply<C, NV>(tile, rows.left, rows.row_units, 1, packed, plan.at.units);
  REALM_FAST_UNROLL
  for (int r = 0; r < C::rows; ++r) {
    REALM_FAST_UNROLL
    for (int j = 0; j < NV; ++j) tile.v[r][j] += rows.bias[r];
  }
}

// Where the kept logits of this tile lie; null if they are not kept.
template <class C>
REALM_FAST_INLINE typename C::acc* kept_tile(const LinearGoldPlan& plan, int64_t v, int64_t panel,
                                             int64_t width) {
  const LinearGold& a = plan.args;
  if (v >= a.keep_vocab) return nullptr;
  return static_cast<typename C::acc*>(a.kept) + panel * kPanel<C> * a.keep_vocab + v * width;
}

// ---- forward ----

// Running maximum, sum of exponentials and true-class logit of the rows of one panel, after one more tile.
// The maximum moves only when a logit exceeds it by kSlack: exp(kSlack) is far from overflow, and most tiles
// then cost no rescaling.
template <class C, int NV>
REALM_FAST_INLINE void accumulate(const LinearGoldPlan& plan, const Tile<C, NV>& tile, int64_t v,
                                  int64_t first, typename C::acc* max, typename C::acc* sum,
                                  typename C::acc* gold) {
  using V = typename C::V;
  using vec = typename V::vec;
  constexpr typename C::acc kSlack = 16;
  REALM_FAST_UNROLL
  for (int j = 0; j < NV; ++j) {
    vec m = V::load(max + j * V::lanes), s = V::load(sum + j * V::lanes);
    vec top = tile.v[0][j];
    REALM_FAST_UNROLL
    for (int r = 1; r < C::rows; ++r) top = V::max(tile.v[r][j], top);
    if (V::any_greater(top, m + kSlack)) {
      const vec raised = V::max(top, m);
      s = s * V::exp(m - raised);
      m = raised;
      V::store(max + j * V::lanes, m);
    }
    vec added = V::exp(tile.v[0][j] - m);  // summed apart: one rounding a tile at the size of the whole sum
    REALM_FAST_UNROLL
    for (int r = 1; r < C::rows; ++r) added += V::exp(tile.v[r][j] - m);
    V::store(sum + j * V::lanes, s + added);
  }
  const uint8_t* has_label = part<uint8_t>(plan, plan.at.has_label);
  if (has_label[v / kVocabGroup] == 0) return;
  const int32_t* label = part<int32_t>(plan, plan.at.label) + first;
  REALM_FAST_UNROLL
  for (int j = 0; j < NV; ++j) {
    vec g = vec{};
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) {
      g = V::where_equal(label + j * V::lanes, static_cast<int32_t>(v + r), tile.v[r][j], g);
    }
    // Only the rows whose label is here are written: other slices write their neighbours at the same time,
    // and a store of the whole vector would undo theirs.
    for (int i = 0; i < V::lanes; ++i) {
      const int64_t entry = label[j * V::lanes + i] - v;
      if (entry >= 0 && entry < C::rows) gold[j * V::lanes + i] = g[i];
    }
  }
}

template <class C, int NV>
REALM_FAST_APART void forward_panel(const LinearGoldPlan& plan, const VocabRows<C>& rows, int64_t v,
                                    int64_t panel, int64_t slice) {
  using T = typename C::acc;
  const int64_t first = panel * kPanel<C>, at = slice * plan.at.padded_rows + first;
  Tile<C, NV> tile;
  logits_tile<C, NV>(plan, rows, panel, tile);
  if (T* kept = kept_tile<C>(plan, v, panel, NV * C::V::lanes)) {
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) {
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) C::V::store(kept + (r * NV + j) * C::V::lanes, tile.v[r][j]);
    }
  }
  accumulate<C, NV>(plan, tile, v, first, part<T>(plan, plan.at.partial_max) + at,
                    part<T>(plan, plan.at.partial_sum) + at, part<T>(plan, plan.at.partial_gold) + first);
}

template <class C>
void forward_slice(const LinearGoldPlan& plan, int64_t slice, int worker) {
  using T = typename C::acc;
  const int64_t rows = plan.at.padded_rows;
  T* max = part<T>(plan, plan.at.partial_max) + slice * rows;
  T* sum = part<T>(plan, plan.at.partial_sum) + slice * rows;
  for (int64_t r = 0; r < rows; ++r) {
    max[r] = static_cast<T>(-1e38);  // finite, so that -inf - max is never NaN
    sum[r] = 0;
  }
  auto* scratch = part<typename C::elem>(plan, plan.at.scratch + worker * plan.at.scratch_bytes);
  const int64_t end = smaller((slice + 1) * kSliceVocab, plan.args.vocab);
  begin_task<C>();
  // Weight rows of a block stay in the second-level cache while every panel of hidden passes over them.
  constexpr int64_t kGroups = 12;
  for (int64_t v0 = slice * kSliceVocab; v0 < end; v0 += kGroups * C::rows) {
    VocabRows<C> group[kGroups];
    int64_t groups = 0;
    for (int64_t v = v0; v < smaller(v0 + kGroups * C::rows, end); v += C::rows, ++groups) {
      group[groups].load(plan, v, scratch + groups * C::rows * plan.at.units * C::pair);
    }
    const int64_t next_v = v0 + kGroups * C::rows,
                  row_bytes = plan.args.width * element_bytes(plan.args.weight_dtype);
    const void* next = static_cast<const char*>(plan.args.weight) + next_v * row_bytes;
    const int64_t next_bytes = larger(0, smaller(kGroups * C::rows, plan.args.vocab - next_v)) * row_bytes;
    for (int64_t panel = 0; panel < plan.at.num_panels; ++panel) {
      const int64_t vectors = panel_width<C>(rows, panel) / C::V::lanes;
      for (int64_t g = 0; g < groups; ++g) {
        prefetch_share(next, next_bytes, panel * groups + g, plan.at.num_panels * groups);
        const int64_t v = v0 + g * C::rows;
        if (vectors == 3) {
          forward_panel<C, 3>(plan, group[g], v, panel, slice);
        } else if (vectors == 2) {
          forward_panel<C, 2>(plan, group[g], v, panel, slice);
        } else {
          forward_panel<C, 1>(plan, group[g], v, panel, slice);
        }
      }
    }
  }
  end_task<C>();
}

// The slices' sums become one; lse = max + log(sum).
template <class C>
void forward_merge(const LinearGoldPlan& plan, int64_t panel) {
  using V = typename C::V;
  using T = typename C::acc;
  using vec = typename V::vec;
  const LinearGold& a = plan.args;
  const int64_t first = panel * kPanel<C>, width = panel_width<C>(plan.at.padded_rows, panel);
  const T* max = part<T>(plan, plan.at.partial_max);
  const T* sum = part<T>(plan, plan.at.partial_sum);
  const T* gold = part<T>(plan, plan.at.partial_gold);
  for (int64_t r0 = first; r0 < first + width; r0 += V::lanes) {
    vec top = V::set(static_cast<T>(-1e38)), total = vec{};
    for (int64_t s = 0; s < plan.at.num_slices; ++s)
      top = V::max(V::load(max + s * plan.at.padded_rows + r0), top);
    for (int64_t s = 0; s < plan.at.num_slices; ++s) {
      const int64_t at = s * plan.at.padded_rows + r0;
      total += V::load(sum + at) * V::exp(V::load(max + at) - top);
    }
    for (int i = 0; i < V::lanes && r0 + i < a.num_rows; ++i) {
      const T logsum = static_cast<T>(::log(static_cast<double>(total[i])));
      static_cast<T*>(a.row_max)[r0 + i] = top[i];
      static_cast<T*>(a.row_logsum)[r0 + i] = logsum;
      static_cast<T*>(a.gold)[r0 + i] = (gold[r0 + i] - top[i]) - logsum;
    }
  }
}

// ---- backward ----

#if defined(__AMX_BF16__)
// Column i of four vectors to out + i * row.
REALM_FAST_INLINE void store_transposed(uint32_t* out, int64_t row, const __m512i (&v)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
  // columns[i] holds columns i, 4 + i, 8 + i, 12 + i.
  const __m512i columns[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                              _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  REALM_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m128i parts[4] = {
        _mm512_extracti32x4_epi32(columns[i], 0), _mm512_extracti32x4_epi32(columns[i], 1),
        _mm512_extracti32x4_epi32(columns[i], 2), _mm512_extracti32x4_epi32(columns[i], 3)};
    REALM_FAST_UNROLL
    for (int p = 0; p < 4; ++p) memcpy(out + (4 * p + i) * row, &parts[p], 16);
  }
}

// A tile of d logits, rounded, word by word for d weight and row by row for d hidden.
template <class C, int NV>
REALM_FAST_INLINE void store_rows_and_columns(const LinearGoldPlan& plan, const Tile<C, NV>& tile,
                                              int64_t panel, int64_t chunk_v) {
  const int64_t first = panel * kPanel<C>, row = plan.at.padded_rows, row_pairs = plan.args.chunk_vocab / 2;
  uint16_t* out = part<uint16_t>(plan, plan.at.dlogits) + chunk_v * row + first;
  uint32_t* pairs = part<uint32_t>(plan, plan.at.dlogits_pairs) + first * row_pairs + chunk_v / 2;
  REALM_FAST_UNROLL
  for (int j = 0; j < NV; ++j) {
    __m512i both[C::rows / 2];
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; r += 2) {
      const __m256i even = (__m256i)_mm512_cvtneps_pbh((__m512)tile.v[r][j]);
      const __m256i odd = (__m256i)_mm512_cvtneps_pbh((__m512)tile.v[r + 1][j]);
      memcpy(out + r * row + j * 16, &even, 32);
      memcpy(out + (r + 1) * row + j * 16, &odd, 32);
      both[r / 2] =
          _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    store_transposed(pairs + j * 16 * row_pairs, row_pairs, both);
  }
}
#endif

// Stores a tile of d logits as the left operand of both products.
template <class C, int NV>
REALM_FAST_INLINE void store_dlogits(const LinearGoldPlan& plan, const Tile<C, NV>& tile, int64_t panel,
                                     int64_t chunk_v) {
  using V = typename C::V;
  constexpr int64_t width = NV * V::lanes;
  const int64_t base = panel * kPanel<C> * plan.args.chunk_vocab;
  if constexpr (C::pair == 1) {
    auto* out = part<typename C::acc>(plan, plan.at.dlogits) + base + chunk_v * width;
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) {
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) V::store(out + r * width + j * V::lanes, tile.v[r][j]);
    }
  } else {
#if defined(__AMX_BF16__)
    if constexpr (kInTiles<C>) {
      store_rows_and_columns<C, NV>(plan, tile, panel, chunk_v);
      return;
    }
#endif
#if defined(__AVX512BF16__)
    uint16_t* out = part<uint16_t>(plan, plan.at.dlogits) + base + chunk_v * width;
    uint32_t* pairs = part<uint32_t>(plan, plan.at.dlogits_pairs) + base / 2 + chunk_v / 2 * width;
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; r += 2) {
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) {
        const __m256i even = (__m256i)_mm512_cvtneps_pbh((__m512)tile.v[r][j]);
        const __m256i odd = (__m256i)_mm512_cvtneps_pbh((__m512)tile.v[r + 1][j]);
        memcpy(out + r * width + j * V::lanes, &even, 32);
        memcpy(out + (r + 1) * width + j * V::lanes, &odd, 32);
        const __m512i both =
            _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        memcpy(pairs + r / 2 * width + j * V::lanes, &both, 64);
      }
    }
#endif
  }
}

// Turns a tile of logits, kept or recomputed, into d logits; adds to the column sums.
template <class C, int NV>
REALM_FAST_APART void dlogits_panel(const LinearGoldPlan& plan, const VocabRows<C>& rows, int64_t v,
                                    int64_t chunk_v, int64_t panel, typename C::V::vec* column_sums) {
  using V = typename C::V;
  using T = typename C::acc;
  using vec = typename V::vec;
  const int64_t first = panel * kPanel<C>;
  Tile<C, NV> tile;
  if (const T* kept = kept_tile<C>(plan, v, panel, NV * V::lanes)) {
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) {
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) tile.v[r][j] = V::load(kept + (r * NV + j) * V::lanes);
    }
  } else {
    logits_tile<C, NV>(plan, rows, panel, tile);
  }
  const T* row_max = part<T>(plan, plan.at.row_max) + first;
  const T* row_logsum = part<T>(plan, plan.at.row_logsum) + first;
  const T* grad = part<T>(plan, plan.at.grad) + first;
  const bool labelled = part<uint8_t>(plan, plan.at.has_label)[v / kVocabGroup] != 0;
  const int32_t* label = part<int32_t>(plan, plan.at.label) + first;
  REALM_FAST_UNROLL
  for (int j = 0; j < NV; ++j) {
    const vec max = V::load(row_max + j * V::lanes), logsum = V::load(row_logsum + j * V::lanes);
    const vec g = V::load(grad + j * V::lanes);
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) tile.v[r][j] = V::exp((tile.v[r][j] - max) - logsum);
    if (labelled) {
      // softmax - onehot before the multiplication and any rounding: 1 - p must not cancel in half precision.
      REALM_FAST_UNROLL
      for (int r = 0; r < C::rows; ++r) {
        const vec p = tile.v[r][j];
        tile.v[r][j] = V::where_equal(label + j * V::lanes, static_cast<int32_t>(v + r), p - 1, p);
      }
    }
    REALM_FAST_UNROLL
    for (int r = 0; r < C::rows; ++r) {
      tile.v[r][j] = tile.v[r][j] * -g;
      column_sums[r] += tile.v[r][j];
    }
  }
  store_dlogits<C, NV>(plan, tile, panel, chunk_v);
}

// d weight of C::rows vocabulary entries, NV vectors of columns: over all rows of hidden.
template <class C, int NV>
REALM_FAST_APART void d_weight_tile(const LinearGoldPlan& plan, int64_t v, int64_t chunk_v, int64_t column) {
  using V = typename C::V;
  const LinearGold& a = plan.args;
  constexpr int lanes = V::lanes;
  Tile<C, NV> tile;
  clear(tile);
  const auto* right =
      part<typename C::unit>(plan, plan.at.row_hidden) + column * (plan.at.padded_rows / C::pair);
  const auto* dlogits = part<typename C::unit>(plan, plan.at.dlogits);
  if constexpr (kInTiles<C>) {
    const int64_t units = plan.at.padded_rows / C::pair;
    multiply<C, NV>(tile, dlogits + chunk_v * units, units, 1, right, units);
  } else {
    for (int64_t panel = 0; panel < plan.at.num_panels; ++panel) {
      const int64_t width = panel_width<C>(plan.at.padded_rows, panel) / C::pair;
      const auto* left = dlogits + panel * kPanel<C> / C::pair * a.chunk_vocab + chunk_v * width;
      multiply<C, NV>(tile, left, width, 1, right + panel * (kPanel<C> / C::pair) * NV * lanes, width);
    }
  }
  const int64_t columns = smaller(NV * lanes, a.width - column);
  REALM_FAST_UNROLL
  for (int r = 0; r < C::rows; ++r) {
    if (v + r >= a.vocab) break;
    const int64_t at = (v + r) * a.width + column;
    if (sizeof(typename C::acc) == 4 && a.d_weight_dtype == kFloat32 && columns == NV * lanes) {
      auto* to = static_cast<typename C::acc*>(a.d_weight) + at;
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) {
        V::store(to + j * lanes, a.accumulate ? V::load(to + j * lanes) + tile.v[r][j] : tile.v[r][j]);
      }
    } else {
      typename C::acc values[NV * lanes];
      REALM_FAST_UNROLL
      for (int j = 0; j < NV; ++j) V::store(values + j * lanes, tile.v[r][j]);
      for (int64_t c = 0; a.accumulate && c < columns; ++c) {
        values[c] += static_cast<typename C::acc>(read(a.d_weight, a.d_weight_dtype, at + c));
      }
      store_elements(a.d_weight, a.d_weight_dtype, at, values, columns);
    }
  }
}

// Vocabulary entries [begin, end) of the chunk that starts at `chunk`.
template <class C>
void backward_vocab(const LinearGoldPlan& plan, int64_t chunk, int64_t begin, int64_t end, int worker) {
  using E = typename C::elem;
  using T = typename C::acc;
  using V = typename C::V;
  const LinearGold& a = plan.args;
  E* scratch = part<E>(plan, plan.at.scratch + worker * plan.at.scratch_bytes);
  const int64_t group_units = C::rows * plan.at.units * C::pair;
  begin_task<C>();
  // Groups of rows small enough for their weights to stay in the second-level cache.
  constexpr int64_t kGroups = 12;
  for (int64_t v0 = begin; v0 < end; v0 += kGroups * C::rows) {
    const int64_t v1 = smaller(v0 + kGroups * C::rows, end);
    VocabRows<C> group[kGroups];
    typename V::vec column_sums[kGroups][C::rows] = {};
    int64_t groups = 0;
    for (int64_t v = v0; v < v1; v += C::rows, ++groups) {
      group[groups].load(plan, v, scratch + groups * group_units);
      if (a.d_hidden == nullptr) continue;
      const auto* rows = reinterpret_cast<const E*>(group[groups].left);
      const int64_t row_elems = group[groups].row_units * C::pair;
      for (int r = 0; r < C::rows; r += C::pair) {
        pack_unit_row<C>(part<E>(plan, plan.at.weight_rows), rows + r * row_elems, rows + (r + 1) * row_elems,
                         a.width, plan.at.padded_width, (v + r - chunk) / C::pair, a.chunk_vocab / C::pair);
      }
    }
    const int64_t next_v = v0 + kGroups * C::rows,
                  row_bytes = plan.args.width * element_bytes(plan.args.weight_dtype);
    const void* next = static_cast<const char*>(plan.args.weight) + next_v * row_bytes;
    const int64_t next_rows = larger(0, smaller(kGroups * C::rows, plan.args.vocab - next_v)),
                  next_bytes = next_rows * row_bytes;
    // Kept logits leave too little work here to hide the fetching behind: it goes along with d weight then.
    const bool fetch_later = v0 < a.keep_vocab && a.d_weight != nullptr;
    for (int64_t panel = 0; panel < plan.at.num_panels; ++panel) {
      const int64_t vectors = panel_width<C>(plan.at.padded_rows, panel) / V::lanes;
      for (int64_t g = 0; g < groups; ++g) {
        if (!fetch_later) prefetch_share(next, next_bytes, panel * groups + g, plan.at.num_panels * groups);
        const int64_t v = v0 + g * C::rows;
        if (vectors == 3) {
          dlogits_panel<C, 3>(plan, group[g], v, v - chunk, panel, column_sums[g]);
        } else if (vectors == 2) {
          dlogits_panel<C, 2>(plan, group[g], v, v - chunk, panel, column_sums[g]);
        } else {
          dlogits_panel<C, 1>(plan, group[g], v, v - chunk, panel, column_sums[g]);
        }
      }
    }
    if (a.d_bias != nullptr) {
      for (int64_t v = v0; v < smaller(v1, a.vocab); ++v) {
        const auto sums = column_sums[(v - v0) / C::rows][(v - v0) % C::rows];
        T total = 0;
        for (int i = 0; i < V::lanes; ++i) total += sums[i];
        T* to = static_cast<T*>(a.d_bias) + v;
        *to = a.accumulate ? *to + total : total;
      }
    }
    if (a.d_weight == nullptr) continue;
    const int64_t next_grad_bytes = a.accumulate ? next_rows * a.width * element_bytes(a.d_weight_dtype) : 0;
    const void* next_grad =
        static_cast<const char*>(a.d_weight) + next_v * a.width * element_bytes(a.d_weight_dtype);
    const int64_t tiles = plan.at.num_column_panels * groups;
    int64_t tile = 0;
    for (int64_t column = 0; column < plan.at.padded_width; column += kPanel<C>) {
      const int64_t vectors = smaller(kPanel<C>, plan.at.padded_width - column) / V::lanes;
      for (int64_t v = v0; v < v1; v += C::rows, ++tile) {
        if (fetch_later) prefetch_share(next, next_bytes, tile, tiles);
        prefetch_share(next_grad, next_grad_bytes, tile, tiles);
        if (vectors == 3) {
          d_weight_tile<C, 3>(plan, v, v - chunk, column);
        } else if (vectors == 2) {
          d_weight_tile<C, 2>(plan, v, v - chunk, column);
        } else {
          d_weight_tile<C, 1>(plan, v, v - chunk, column);
        }
      }
    }
  }
  end_task<C>();
}

// d hidden of the rows of one panel and the columns of one column panel += the chunk's share.
template <class C, int NV>
void d_hidden_tiles(const LinearGoldPlan& plan, int64_t chunk, int64_t panel, int64_t column) {
  using V = typename C::V;
  const LinearGold& a = plan.args;
  const int64_t width = panel_width<C>(plan.at.padded_rows, panel), first = panel * kPanel<C>;
  const int64_t in_chunk =
      smaller(a.chunk_vocab, (a.vocab - chunk + C::rows - 1) / C::rows * C::rows) / C::pair;
  const auto* right = part<typename C::unit>(plan, plan.at.weight_rows) + column * (a.chunk_vocab / C::pair);
  const auto* left = part<typename C::unit>(plan, C::pair == 1 ? plan.at.dlogits : plan.at.dlogits_pairs) +
                     first * (a.chunk_vocab / C::pair);
  // Units from one row, and from one step, to the next.
  const int64_t row = kInTiles<C> ? a.chunk_vocab / C::pair : 1, step = kInTiles<C> ? 1 : width;
  auto* out = part<typename C::acc>(plan, plan.at.d_hidden) + first * plan.at.padded_width + column;
  // A fresh sum every kBlock steps: one running sum over the vocabulary would lose the many small terms,
  // which are of one softmax, beside the few large ones.
  constexpr int64_t kBlock = 192;
  for (int64_t k = 0; k < in_chunk; k += kBlock) {
    for (int64_t r0 = 0; r0 < width; r0 += C::rows) {
      Tile<C, NV> tile;
      clear(tile);
      multiply<C, NV>(tile, left + k * step + r0 * row, row, step, right + k * NV * V::lanes,
                      smaller(kBlock, in_chunk - k));
      REALM_FAST_UNROLL
      for (int r = 0; r < C::rows; ++r) {
        REALM_FAST_UNROLL
        for (int j = 0; j < NV; ++j) {
          auto* to = out + (r0 + r) * plan.at.padded_width + j * V::lanes;
          V::store(to, chunk + k == 0 ? tile.v[r][j] : V::load(to) + tile.v[r][j]);
        }
      }
    }
  }
}

template <class C>
void backward_hidden(const LinearGoldPlan& plan, int64_t chunk, int64_t panel, int64_t column_panel) {
  const int64_t column = column_panel * kPanel<C>;
  const int64_t vectors = smaller(kPanel<C>, plan.at.padded_width - column) / C::V::lanes;
  begin_task<C>();
  if (vectors == 3) {
    d_hidden_tiles<C, 3>(plan, chunk, panel, column);
  } else if (vectors == 2) {
    d_hidden_tiles<C, 2>(plan, chunk, panel, column);
  } else {
    d_hidden_tiles<C, 1>(plan, chunk, panel, column);
  }
  end_task<C>();
}

template <class C>
void store_hidden(const LinearGoldPlan& plan, int64_t row) {
  const LinearGold& a = plan.args;
  store_elements(a.d_hidden, a.d_hidden_dtype, a.rows[row] * a.width,
                 part<typename C::acc>(plan, plan.at.d_hidden) + row * plan.at.padded_width, a.width);
}

template <class C>
LinearGoldLevel linear_gold_level() {
  static_assert(kVocabGroup % C::rows == 0 && kSliceVocab % kVocabGroup == 0);
  static_assert(C::V::lanes % C::rows == 0 && C::V::lanes % C::pair == 0 && C::rows % C::pair == 0);
  return {C::V::lanes,
          kPanel<C>,
          C::pair,
          int64_t{sizeof(typename C::unit)},
          int64_t{sizeof(typename C::acc)},
          pack_panel<C>,
          pack_row_hidden<C>,
          forward_slice<C>,
          forward_merge<C>,
          backward_vocab<C>,
          backward_hidden<C>,
          store_hidden<C>};
}

}  // namespace
}  // namespace realm_fast
