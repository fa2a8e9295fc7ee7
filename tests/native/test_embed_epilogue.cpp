// embed_epilogue under the sanitizers: every buffer is exactly as large as it must be, at every CPU level.
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "embed_epilogue/embed_epilogue.h"

using namespace realm_fast;

namespace {

// Exact allocations: one element past the end is the sanitizer's to find.
template <class T>
std::unique_ptr<T[]> exactly(int64_t count, double start) {
  auto values = std::make_unique<T[]>(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(start + 0.01 * static_cast<double>(i % 97));
  return values;
}

void run(EpilogueType hidden_type, EpilogueType out_type, bool mean, bool project, bool ragged, int64_t rows,
         int64_t hidden_dim, int64_t dim, int64_t panel_rows, int64_t group, int threads) {
  const int64_t tokens = 19, width = project ? dim : hidden_dim;
  std::vector<int64_t> offsets;
  if (ragged) {
    offsets.push_back(0);
    for (int64_t r = 0; r < rows; ++r) offsets.push_back(offsets.back() + 1 + r * 7 % tokens);
  } else {
    for (int64_t r = 0; r < rows; ++r) offsets.push_back(1 + r * 7 % tokens);
  }
  const int64_t all_tokens = ragged ? offsets.back() : rows * tokens;
  const auto floats = exactly<float>(all_tokens * hidden_dim, 0.5);
  const auto halves = exactly<uint16_t>(all_tokens * hidden_dim, 0x3c00);
  const auto weight = exactly<float>(dim * hidden_dim, -0.3);
  const auto bias = exactly<float>(width, 0.1), ln_weight = exactly<float>(width, 0.9),
             ln_bias = exactly<float>(width, -0.2);
  const int64_t index_rows = (rows + 5 + panel_rows - 1) / panel_rows * panel_rows;
  const int64_t groups = (width + group - 1) / group;
  const int64_t size = out_type == EpilogueType::kFloat32 ? 4 : out_type == EpilogueType::kBFloat16 ? 2 : 1;
  const auto out = exactly<uint8_t>(index_rows * groups * group * size, 0);
  const auto scale = exactly<float>(index_rows, 0), residual = exactly<float>(index_rows, 0),
             norm = exactly<float>(index_rows, 0);
  std::vector<int64_t> row_ids(static_cast<size_t>(rows));
  std::iota(row_ids.rbegin(), row_ids.rend(), 5);

  EmbedEpilogue a;
  a.hidden = hidden_type == EpilogueType::kFloat32 ? static_cast<const void*>(floats.get()) : halves.get();
  a.hidden_type = hidden_type;
  a.offsets = offsets.data();
  a.ragged = ragged;
  a.num_rows = rows;
  a.block_stride = tokens * hidden_dim;
  a.token_stride = hidden_dim;
  a.hidden_dim = hidden_dim;
  a.dim = width;
  a.mean = mean;
  a.weight = project ? weight.get() : nullptr;
  a.bias = project ? bias.get() : nullptr;
  a.layer_norm = true;
  a.ln_weight = ln_weight.get();
  a.ln_bias = ln_bias.get();
  a.ln_eps = 1e-3f;
  a.normalize = true;
  a.out = out.get();
  a.out_type = out_type;
  a.out_stride = panel_rows * groups * group;
  a.panel_rows = panel_rows;
  a.group = group;
  a.row_ids = row_ids.data();
  a.scale = scale.get();
  a.residual_norm = residual.get();
  a.norm = norm.get();
  CHECK(check_epilogue(a.offsets, ragged, ragged ? all_tokens : tokens, a.row_ids, rows, index_rows).fault ==
        EpilogueFault::kNone);
  embed_epilogue_cpu(a, threads);
  for (const int64_t row : row_ids) CHECK(std::isfinite(residual[row]) && norm[row] < 1.01f);
}

}  // namespace

TEST(embed_epilogue_stays_inside_its_buffers) {
  const EpilogueType stored[] = {EpilogueType::kFloat32, EpilogueType::kBFloat16, EpilogueType::kInt8,
                                 EpilogueType::kUInt8};
  for (const auto& level : available_cpu_levels()) {
    force_cpu_level(level);
    for (const auto hidden : {EpilogueType::kFloat32, EpilogueType::kBFloat16, EpilogueType::kFloat16}) {
      for (int i = 0; i < 32; ++i) {
        const int64_t hidden_dims[] = {1, 16, 33, 70};
        const int64_t dims[] = {3, 16, 21, 37};
        const bool panels = (i & 8) != 0;
        run(hidden, stored[i & 3], (i & 1) != 0, (i & 2) != 0, (i & 4) != 0, i % 5 * 9,
            hidden_dims[i / 8 & 3], dims[i / 4 & 3], panels ? 48 : 1, panels ? 1 + i % 5 : 1, 1 + i % 3);
      }
    }
  }
  force_cpu_level("");
}

TEST(embed_epilogue_threads_share_nothing) {
  for (int i = 0; i < 20; ++i) {
    run(EpilogueType::kFloat32, EpilogueType::kUInt8, true, true, true, 120, 264, 100, 48, 4, 4);
  }
}

TEST(embed_epilogue_check_names_the_fault) {
  const int64_t good[] = {0, 2, 5}, empty[] = {0, 2, 2}, outside[] = {0, 2, 6}, below[] = {-1, 2, 5};
  const int64_t rows[] = {1, 0}, twice[] = {1, 1}, beyond[] = {0, 9};
  CHECK(check_epilogue(good, true, 5, rows, 2, 9).fault == EpilogueFault::kNone);
  CHECK(check_epilogue(empty, true, 5, rows, 2, 9).fault == EpilogueFault::kNoTokens);
  CHECK(check_epilogue(outside, true, 5, rows, 2, 9).fault == EpilogueFault::kOutside);
  CHECK(check_epilogue(below, true, 5, rows, 2, 9).fault == EpilogueFault::kOutside);
  CHECK(check_epilogue(good, true, 5, twice, 2, 9).fault == EpilogueFault::kRowTwice);
  CHECK(check_epilogue(good, true, 5, beyond, 2, 9).fault == EpilogueFault::kNoSuchRow);
  CHECK(check_epilogue(good, true, 5, rows, 0, 9).fault == EpilogueFault::kNone);
}
