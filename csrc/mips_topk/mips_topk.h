// Exact top-k maximum inner-product search on the CPU.
//
//     scores[b][j], keys[b][j] = the j-th largest <queries[b], row n> over n, ties to the lower key
//
// A row is a result when its score is greater than -inf: NaN and -inf are never returned. Where fewer than k
// remain, the rest is -inf and -1. Scores are float32: one chain over the dimensions, in their order, fused
// (AVX2, AVX-512) or multiply-then-add (generic), so that the bits depend on the level alone and not on
// threads, on the batch a query came in, or on where its row is stored.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace realm_fast::mips {

enum class Dtype { float32, bfloat16, int8 };
enum class RowType { float32, bfloat16, float16 };

// A stretch of rows: panels (kernels.h) and, for the low precisions, what the certificate needs.
struct Slab {
  int64_t num_rows = 0;  // rows in use; panels are padded to 48
  const void* panels = nullptr;
  const float* scale = nullptr;          // int8: [padded rows]; NaN for rows that do not exist
  const float* residual_norm = nullptr;  // [padded rows] >= |row - stored row|
  const float* norm = nullptr;           // [padded rows] >= |stored row|
  const float* panel_bounds = nullptr;   // [panels][2]: the largest residual_norm and norm of a panel
  const float* originals = nullptr;      // [num_rows][dim] float32, what exact answers are computed from
};

// Rows one after the other, as a tensor has them.
struct RowMatrix {
  const void* data = nullptr;
  int64_t num_rows = 0;
  int64_t row_stride = 0;  // elements
  RowType type = RowType::float32;
};

struct Search {
  int64_t dim = 0;                 // at least 1
  const float* queries = nullptr;  // [num_queries][dim], contiguous
  int64_t num_queries = 0;
  int64_t k = 0;
  const int64_t* excluded = nullptr;  // [num_queries][num_excluded] keys; -1: none
  int64_t num_excluded = 0;
  int num_threads = 1;
  std::function<bool()> poll;                   // called now and then by the calling thread; false stops
  int64_t max_segment_rows = int64_t{1} << 31;  // rows that one pass addresses with 32 bits; tests lower it
  bool guess = true;                            // thresholds from samples, where that pays
  float* scores = nullptr;                      // out [num_queries][k]
  int64_t* keys = nullptr;                      // out [num_queries][k]
};

// What a low-precision index adds.
struct IndexSearch {
  Dtype dtype = Dtype::float32;
  std::vector<Slab> slabs;
  const uint32_t* key_of_row = nullptr;  // the rank of a row's id, where rows are not in the order of ids
  std::vector<int64_t> irregular_rows;   // rows that only float32 can hold (NaN, Inf, huge): always re-scored
  bool exact = true;                     // low precision: certify, and answer in float32
  int64_t max_candidates = 0;            // per query and thread, beyond which a query falls back; 0: default
};

struct SearchStats {
  int64_t rescored = 0;   // rows scored again in float32
  int64_t fell_back = 0;  // queries answered by a float32 scan of the originals
  int64_t repeated = 0;   // queries scanned again because what a sample promised did not hold
};

// Both return false when poll stopped them; the output is then undefined. Throw std::bad_alloc, and
// std::invalid_argument for what cannot be represented.
bool topk_rows(const Search& search, const RowMatrix& blocks);
bool topk_index(const Search& search, const IndexSearch& index, SearchStats& stats);

// --- Building panels (layout.cpp) ---

struct MutableSlab {
  int64_t capacity_rows = 0;  // a multiple of 48
  void* panels = nullptr;
  float* scale = nullptr;
  float* residual_norm = nullptr;
  float* norm = nullptr;
  float* panel_bounds = nullptr;
};

int64_t steps_of(Dtype dtype, int64_t dim);

// Marks rows [first, capacity) as not existing.
void clear_rows(Dtype dtype, int64_t dim, const MutableSlab& slab, const int64_t* rows, int64_t num_rows);

// Writes values[i] (stride in elements) to row rows[i] (rows == nullptr: first_row + i). irregular[i] is set
// where only float32 can hold the row; low precisions then store it as a row that does not exist.
void store_rows(Dtype dtype, int64_t dim, const MutableSlab& slab, const int64_t* rows, int64_t first_row,
                int64_t num_rows, const float* values, int64_t stride, uint8_t* irregular, int num_threads);

// Reads rows back from float32 panels.
void load_rows(int64_t dim, const float* panels, const int64_t* rows, int64_t num_rows, float* values);

// --- Shared by the two files ---

struct QuantisedQuery {
  float scale;            // integers: value = scale * integer
  double norm, residual;  // |q|, |q - quantised q|
};
QuantisedQuery quantise_bfloat16(const float* values, int64_t dim, uint16_t* out);
// To integers of at most `limit`, which must be below 2^22. For int8_t and int16_t.
template <class Integer>
QuantisedQuery quantise_integers(const float* values, int64_t dim, int limit, Integer* out);

}  // namespace realm_fast::mips
