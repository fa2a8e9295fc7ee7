// The generic level, the choice of the level, and the order in which the tasks run.
#include "linear_marginal_ce/linear_gold.h"

#include <algorithm>
#include <cstring>

#include "core/cpu.h"
#include "core/parallel.h"
#include "linear_marginal_ce/linear_gold_kernel.h"

namespace realm_fast {
namespace {

LinearGoldLevel choose_level(Compute compute) {
  if (compute == Compute::kFloat64) return linear_gold_level<ComputeF64>();
#ifdef REALM_FAST_X86
  const CpuFeatures cpu = cpu_features();
  if (compute == Compute::kBFloat16 && cpu.amx) return linear_gold_amx();
  if (compute == Compute::kBFloat16 && cpu.avx512bf16) return linear_gold_avx512bf16();
  if (cpu.avx512) return linear_gold_avx512();
  if (cpu.avx2) return linear_gold_avx2();
#endif
  return linear_gold_level<ComputeF32>();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

LinearGoldLayout layout_of(const LinearGold& a, const LinearGoldLevel& level, bool backward,
                           int num_workers) {
  LinearGoldLayout at{};
  at.padded_rows = ceil_div(a.num_rows, level.lanes) * level.lanes;
  at.padded_width = ceil_div(a.width, level.lanes) * level.lanes;
  at.units = ceil_div(a.width, level.pair);
  at.num_panels = ceil_div(at.padded_rows, level.panel_rows);
  at.num_column_panels = ceil_div(at.padded_width, level.panel_rows);
  at.num_slices = ceil_div(a.vocab, kSliceVocab);
  int64_t offset = 0;
  const auto take = [&offset](int64_t bytes) {
    const int64_t begin = offset;
    offset += ceil_div(bytes, 64) * 64;
    return begin;
  };
  at.packed_hidden = take(at.padded_rows * at.units * level.unit_bytes);
  at.label = take(at.padded_rows * 4);
  at.has_label = take(ceil_div(a.vocab, kVocabGroup));
  // Room for 12 groups of 8 weight rows that need converting (forward_slice, backward_vocab).
  at.scratch_bytes = ceil_div(12 * kVocabGroup * at.units * level.unit_bytes, 64) * 64;
  at.scratch = take(num_workers * at.scratch_bytes);
  if (!backward) {
    at.partial_max = take(at.num_slices * at.padded_rows * level.acc_bytes);
    at.partial_sum = take(at.num_slices * at.padded_rows * level.acc_bytes);
    at.partial_gold = take(at.padded_rows * level.acc_bytes);
  } else {
    at.row_max = take(at.padded_rows * level.acc_bytes);
    at.row_logsum = take(at.padded_rows * level.acc_bytes);
    at.grad = take(at.padded_rows * level.acc_bytes);
    const int64_t chunk_units = a.chunk_vocab * at.padded_rows / level.pair;
    at.dlogits = take(chunk_units * level.unit_bytes);
    if (a.d_weight != nullptr) {
      at.row_hidden = take(at.padded_rows / level.pair * at.padded_width * level.unit_bytes);
    }
    if (a.d_hidden != nullptr) {
      at.weight_rows = take(a.chunk_vocab / level.pair * at.padded_width * level.unit_bytes);
      at.d_hidden = take(at.padded_rows * at.padded_width * level.acc_bytes);
    }
    if (level.pair == 2) at.dlogits_pairs = take(chunk_units * level.unit_bytes);
  }
  at.total = offset;
  return at;
}

void mark_labels(const LinearGoldPlan& plan) {
  uint8_t* has_label = part<uint8_t>(plan, plan.at.has_label);
  std::memset(has_label, 0, static_cast<size_t>(ceil_div(plan.args.vocab, kVocabGroup)));
  for (int64_t r = 0; r < plan.args.num_rows; ++r) has_label[plan.args.labels[r] / kVocabGroup] = 1;
}

}  // namespace

int64_t linear_gold_panel_rows(Compute compute) { return choose_level(compute).panel_rows; }

bool linear_gold_has_bf16() { return choose_level(Compute::kBFloat16).pair == 2; }

int64_t linear_gold_workspace_bytes(const LinearGold& args, Compute compute, bool backward, int num_threads) {
  return layout_of(args, choose_level(compute), backward, num_threads).total;
}

void linear_gold_forward(const LinearGold& args, Compute compute, int num_threads) {
  const LinearGoldLevel level = choose_level(compute);
  const LinearGoldPlan plan{args, layout_of(args, level, false, num_threads)};
  mark_labels(plan);
  parallel_for(plan.at.num_panels, num_threads,
               [&](int64_t panel, int) { level.pack_panel(plan, panel, false); });
  parallel_for(plan.at.num_slices, num_threads,
               [&](int64_t slice, int worker) { level.forward_slice(plan, slice, worker); });
  parallel_for(plan.at.num_panels, num_threads,
               [&](int64_t panel, int) { level.forward_merge(plan, panel); });
}

void linear_gold_backward(const LinearGold& args, Compute compute, int num_threads) {
  const LinearGoldLevel level = choose_level(compute);
  const LinearGoldPlan plan{args, layout_of(args, level, true, num_threads)};
  mark_labels(plan);
  parallel_for(plan.at.num_panels, num_threads,
               [&](int64_t panel, int) { level.pack_panel(plan, panel, true); });
  if (args.d_weight != nullptr) {
    const int64_t units = plan.at.padded_rows / level.pair, step = 16;
    parallel_for(ceil_div(units, step), num_threads, [&](int64_t task, int worker) {
      level.pack_row_hidden(plan, task * step, std::min(units, (task + 1) * step), worker);
    });
  }
  for (int64_t chunk = 0; chunk < args.vocab; chunk += args.chunk_vocab) {
    const int64_t end = std::min(args.vocab, chunk + args.chunk_vocab);
    // Larger tasks read the hidden rows less often, smaller ones keep the threads together at the chunk's
    // end.
    const int64_t step = end - chunk >= 16 * 96 * num_threads ? 96 : 48;
    parallel_for(ceil_div(end - chunk, step), num_threads, [&](int64_t task, int worker) {
      const int64_t begin = chunk + task * step;
      level.backward_vocab(plan, chunk, begin, std::min(end, begin + step), worker);
    });
    if (args.d_hidden == nullptr) continue;
    parallel_for(plan.at.num_panels * plan.at.num_column_panels, num_threads, [&](int64_t task, int) {
      level.backward_hidden(plan, chunk, task % plan.at.num_panels, task / plan.at.num_panels);
    });
  }
  if (args.d_hidden != nullptr) {
    const int64_t step = 16;
    parallel_for(ceil_div(args.num_rows, step), num_threads, [&](int64_t task, int) {
      for (int64_t row = task * step; row < std::min(args.num_rows, (task + 1) * step); ++row) {
        level.store_hidden(plan, row);
      }
    });
  }
}

}  // namespace realm_fast
