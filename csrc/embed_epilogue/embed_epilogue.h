// embed_epilogue: token states of a pack -> stored rows of an index.
//
//   x = pool(hidden[row])                      first token, or mean over the row's tokens
//   x = W x + b                                optional
//   x = LayerNorm(x) * ln_weight + ln_bias     optional
//   x = x / max(|x|, 1e-12)                    optional
//   out[row_ids[row]] = float32(x) | bfloat16(x) | int8(x / scale),  scale = max(max|x| / 127, 2^-100)
//   residual_norm[row_ids[row]] >= |x - stored(x)| and norm[row_ids[row]] >= |stored(x)|, by rounding only
//
// bfloat16 holds no subnormals (vdpbf16ps takes them for 0). kUInt8 is kInt8 plus 128, as VNNI wants it. In
// panels these are the bits that csrc/mips_topk/layout.cpp makes of x.
//
// All sums are float32 in an order that depends on H, D and the row's own tokens alone: neither the number of
// threads nor the other rows of the pack change a bit of a row.
#pragma once

#include <cstdint>

namespace realm_fast {

// Element types, the same numbers as in realm_fast/ops/embed_epilogue.py.
enum class EpilogueType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kUInt8 = 4 };

struct EmbedEpilogue {
  const void* hidden = nullptr;  // [S, H] ragged, or [R, T, H]; the last dimension contiguous
  EpilogueType hidden_type = EpilogueType::kFloat32;
  // Ragged: [R + 1], row r has the tokens offsets[r] <= s < offsets[r + 1]. Padded: [R], row r has
  // offsets[r].
  const int64_t* offsets = nullptr;
  bool ragged = false;
  int64_t num_rows = 0;      // R
  int64_t block_stride = 0;  // elements between rows of a padded `hidden`
  int64_t token_stride = 0;  // elements between tokens
  int64_t hidden_dim = 0;    // H
  int64_t dim = 0;           // D; H without a projection
  bool mean = false;
  const float* weight = nullptr;  // [D, H] contiguous, or null
  const float* bias = nullptr;    // [D] or null
  bool layer_norm = false;
  const float* ln_weight = nullptr;  // [D] or null
  const float* ln_bias = nullptr;    // [D] or null
  float ln_eps = 0;
  bool normalize = false;
  void* out = nullptr;
  EpilogueType out_type = EpilogueType::kFloat32;  // all but kFloat16
  // Where element d of stored row n lies, in elements:
  //   n / panel_rows * out_stride + d / group * panel_rows * group + n % panel_rows * group + d % group
  // panel_rows = group = 1 is row-major. What D does not fill of a last group is set to 0.
  int64_t out_stride = 0;
  int64_t panel_rows = 1;
  int64_t group = 1;
  const int64_t* row_ids = nullptr;  // [R]; all different and within `out`
  float* scale = nullptr;            // kInt8 and kUInt8
  float* residual_norm = nullptr;    // or null
  float* norm = nullptr;             // or null
};

void embed_epilogue_cpu(const EmbedEpilogue& args, int num_threads);

// What is wrong with the offsets or the row ids: the first of these that holds, and where.
enum class EpilogueFault : int {
  kNone = 0,
  kNoTokens = 1,   // block `index` has `value` tokens, fewer than one
  kOutside = 2,    // block `index` has tokens before 0 or from `limit` on; `value` is its last offset
  kNoSuchRow = 3,  // row_ids[index] = value is not in [0, num_out_rows)
  kRowTwice = 4,   // row `value` is named more than once
};
struct EpilogueCheck {
  EpilogueFault fault = EpilogueFault::kNone;
  int64_t index = 0, value = 0;
};
// limit: tokens of a ragged `hidden`, or of a padded row.
EpilogueCheck check_epilogue(const int64_t* offsets, bool ragged, int64_t limit, const int64_t* row_ids,
                             int64_t num_rows, int64_t num_out_rows);

// What a level provides: rows [begin, end), at most kEpilogueTileRows of them.
using EpilogueRows = void (*)(const EmbedEpilogue& args, int64_t begin, int64_t end, float* scratch);
constexpr int64_t kEpilogueTileRows = 16;
EpilogueRows embed_epilogue_avx2();
EpilogueRows embed_epilogue_avx512();

}  // namespace realm_fast
