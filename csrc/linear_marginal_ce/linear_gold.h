// log p(label) of a linear layer followed by a softmax, without the logits in memory, and its backward pass.
//
//   logits[r, v] = hidden[r] . weight[v] + bias[v]             r: the rows that count, v: the vocabulary
//   gold[r]      = logits[r, label[r]] - logsumexp_v logits[r, v]
//   d logits     = grad[r] * (onehot - softmax)                for any upstream grad[r]
//   d hidden[r]  = sum_v d logits[r, v] weight[v];  d weight[v] = sum_r d logits[r, v] hidden[r];  d bias =
//   column sums
//
// The marginal and its responsibilities enter through grad: realm_fast/ops/linear_marginal_ce.py.
//
// Forward: every task multiplies all rows with a slice of the vocabulary; a tile of logits lives in registers
// and ends as a running maximum and sum of exponentials. Backward: the vocabulary goes by in chunks of
// `chunk_vocab` entries. A task recomputes a tile of logits, turns it into d logits, and makes its rows of d
// weight from all the rows at once (so nothing is accumulated across chunks, in any dtype); then, tasks over
// hidden add the chunk to d hidden. Sums run in one fixed order: results depend neither on the number of
// threads nor on chance. Multiplications read float32, float64 or pairs of bfloat16, and always add up in
// float32 (float64).
#pragma once

#include <cstddef>
#include <cstdint>

namespace realm_fast {

struct LinearGold {
  // Inputs. dtype codes as in marginal_lse.h.
  const void* hidden = nullptr;  // [*, H], contiguous
  int hidden_dtype = 0;
  const int64_t* rows = nullptr;    // [R] the rows of hidden that count
  const int32_t* labels = nullptr;  // [R] in [0, V)
  const void* weight = nullptr;     // [V, H], contiguous
  int weight_dtype = 0;
  const void* bias = nullptr;  // [V] in the accumulation type, or null
  int64_t num_rows = 0, vocab = 0, width = 0;

  // Logits of the first keep_vocab (a multiple of kVocabGroup) entries, from forward to backward, which
  // recomputes the others: [panel][v][row of panel], accumulation type; or null. The same values either way.
  void* kept = nullptr;
  int64_t keep_vocab = 0;

  // Forward writes, backward reads: [R], accumulation type.
  void* gold = nullptr;        // forward only
  void* row_max = nullptr;     // lse = row_max + row_logsum, kept apart: their sum would lose the low bits
  void* row_logsum = nullptr;  // of a small difference at a large offset

  // Backward.
  const void* grad = nullptr;  // [R], accumulation type: d loss / d gold
  void* d_hidden = nullptr;    // [*, H] or null; rows that do not count are left alone
  int d_hidden_dtype = 0;
  void* d_weight = nullptr;  // [V, H] or null
  int d_weight_dtype = 0;
  void* d_bias = nullptr;  // [V] in the accumulation type, or null
  bool accumulate =
      false;  // add to d_weight (of the accumulation type) and d_bias: they hold other rows' share
  int64_t chunk_vocab = 0;  // a multiple of kVocabGroup

  void* workspace = nullptr;  // workspace_bytes() bytes, 64-byte aligned
};

// The compute type: what the multiplications read.
enum class Compute : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

constexpr int64_t kVocabGroup = 8;  // chunk_vocab is a multiple of it at every level

constexpr int64_t kSliceVocab = 384;  // forward: vocabulary entries in one running sum

// Where the parts of the workspace lie (byte offsets); sizes depend on the level's tile.
struct LinearGoldLayout {
  int64_t padded_rows, padded_width;  // R and H rounded up to whole vectors
  int64_t units;  // 4-byte (float64: 8-byte) units in a row of operands: H, or H / 2 pairs
  int64_t num_panels, num_column_panels, num_slices;
  int64_t packed_hidden;                           // [panel][unit of H][row]: what logits multiply
  int64_t row_hidden;                              // [column panel][unit of rows][column]: for d weight
  int64_t weight_rows;                             // [column panel][unit of chunk][column]: for d hidden
  int64_t dlogits;                                 // [panel][v in chunk][row]; AMX: [v in chunk][row of all]
  int64_t dlogits_pairs;                           // [panel][pair of v][row], bfloat16 only; AMX: [row][pair]
  int64_t d_hidden;                                // [padded_rows, padded_width], accumulation type
  int64_t label, row_max, row_logsum, grad;        // padded copies, one entry a row
  int64_t has_label;                               // a byte for every group of kVocabGroup vocabulary entries
  int64_t partial_max, partial_sum, partial_gold;  // [slice][row]
  int64_t scratch, scratch_bytes;                  // for each worker
  int64_t total;
};

struct LinearGoldPlan {
  LinearGold args;
  LinearGoldLayout at;
};

// One level's kernels; each call is a task that no other task of the same phase waits for.
struct LinearGoldLevel {
  int64_t lanes, panel_rows;  // panel_rows: rows (and columns of hidden) in a full panel of packed operands
  int64_t pair;               // elements in a unit
  int64_t unit_bytes, acc_bytes;
  void (*pack_panel)(const LinearGoldPlan& plan, int64_t panel, bool backward);
  void (*pack_row_hidden)(const LinearGoldPlan& plan, int64_t begin, int64_t end, int worker);
  void (*forward_slice)(const LinearGoldPlan& plan, int64_t slice, int worker);
  void (*forward_merge)(const LinearGoldPlan& plan, int64_t panel);
  void (*backward_vocab)(const LinearGoldPlan& plan, int64_t chunk, int64_t begin, int64_t end, int worker);
  void (*backward_hidden)(const LinearGoldPlan& plan, int64_t chunk, int64_t panel, int64_t column_panel);
  void (*store_hidden)(const LinearGoldPlan& plan, int64_t row);
};
LinearGoldLevel linear_gold_avx2();
LinearGoldLevel linear_gold_avx512();
LinearGoldLevel linear_gold_avx512bf16();
LinearGoldLevel linear_gold_amx();

// Rows in a panel at the current level: kept logits are of use to a level with the same.
int64_t linear_gold_panel_rows(Compute compute);

// True where multiplications of bfloat16 pairs are native at the current level.
bool linear_gold_has_bf16();

int64_t linear_gold_workspace_bytes(const LinearGold& args, Compute compute, bool backward, int num_threads);
void linear_gold_forward(const LinearGold& args, Compute compute, int num_threads);
void linear_gold_backward(const LinearGold& args, Compute compute, int num_threads);

}  // namespace realm_fast
