// The generic level, and the choice of the level and of the threads.
#include "embed_epilogue/embed_epilogue.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/cpu.h"
#include "core/parallel.h"
#include "embed_epilogue/embed_epilogue_kernel.h"

namespace realm_fast {
namespace {

// Below this much work (a multiply-add counts one, a float read eight) waking a thread costs more than it
// does.
constexpr int64_t kWorkPerThread = 2'000'000;

EpilogueRows current_level() {
#ifdef REALM_FAST_X86
  const CpuFeatures cpu = cpu_features();
  if (cpu.avx512) return embed_epilogue_avx512();
  if (cpu.avx2) return embed_epilogue_avx2();
#endif
  return run_rows;
}

int64_t work(const EmbedEpilogue& a) {
  int64_t tokens = a.num_rows;
  if (a.mean) {
    tokens = a.ragged ? a.offsets[a.num_rows] - a.offsets[0] : 0;
    for (int64_t row = 0; !a.ragged && row < a.num_rows; ++row) tokens += a.offsets[row];
  }
  return tokens * a.hidden_dim * 8 + (a.weight != nullptr ? a.num_rows * a.dim * a.hidden_dim : 0);
}

}  // namespace

EpilogueCheck check_epilogue(const int64_t* offsets, bool ragged, int64_t limit, const int64_t* row_ids,
                             int64_t num_rows, int64_t num_out_rows) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t begin = ragged ? offsets[i] : 0, end = ragged ? offsets[i + 1] : offsets[i];
    if (begin < 0 || begin > limit || end > limit)
      return {EpilogueFault::kOutside, i, begin < 0 ? begin : end};
    if (end <= begin) return {EpilogueFault::kNoTokens, i, end - begin};
  }
  bool ascending = true;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (row_ids[i] < 0 || row_ids[i] >= num_out_rows) return {EpilogueFault::kNoSuchRow, i, row_ids[i]};
    ascending = ascending && (i == 0 || row_ids[i - 1] < row_ids[i]);
  }
  if (ascending) return {};
  std::vector<int64_t> sorted(row_ids, row_ids + num_rows);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) return {EpilogueFault::kRowTwice, 0, *twice};
  return {};
}

void embed_epilogue_cpu(const EmbedEpilogue& args, int num_threads) {
  if (args.num_rows == 0) return;
  const EpilogueRows rows = current_level();
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, 1 + work(args) / kWorkPerThread));
  // Several tasks a thread, so that rows of unlike length even out.
  const int64_t share = (args.num_rows + 4 * threads - 1) / (4 * threads);
  const int64_t tile = threads == 1 ? kEpilogueTileRows : std::clamp<int64_t>(share, 1, kEpilogueTileRows);
  const int64_t tasks = (args.num_rows + tile - 1) / tile;
  // Pooled rows, projected rows, and one row as it is stored.
  const int64_t floats = kEpilogueTileRows * (padded(args.hidden_dim) + padded(args.dim)) + padded(args.dim);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(floats * threads));
  parallel_for(tasks, threads, [&](int64_t task, int worker) {
    const int64_t begin = task * tile;
    rows(args, begin, std::min(begin + tile, args.num_rows), scratch.get() + worker * floats);
  });
}

}  // namespace realm_fast
