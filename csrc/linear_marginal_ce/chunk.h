// The work on one chunk of logits between two products (CUDA; the products are cuBLAS's).
//
//   lse update   row_max, row_sum, gold of [R] rows take in logits [R, n] of vocabulary entries
//   begin..begin+n d logits     out = grad * (onehot - softmax), softmax = exp((logit - row_max) -
//   row_logsum)
//
// logits are float32 (float64 for float64), contiguous; out may be the logits themselves where the dtypes are
// equal. row_max starts at -1e38, row_sum at 0; gold is written when its label's chunk comes by. Sums run in
// one fixed order.
#pragma once

#include <cstdint>

namespace realm_fast {

struct ChunkLse {
  const void* logits;
  const int64_t* labels;  // [R] in [0, V)
  void* row_max;
  void* row_sum;
  void* gold;
  int64_t rows, columns, begin;
  int dtype;  // of all of them: 0 float32, 1 float64
};

struct ChunkDlogits {
  const void* logits;
  const int64_t* labels;
  const void* row_max;
  const void* row_logsum;
  const void* grad;
  void* out;
  int64_t rows, columns, begin;
  int dtype;      // of logits, row_max, row_logsum, grad
  int out_dtype;  // 0 float32, 1 float64, 2 bfloat16, 3 float16
};

// stream is a cudaStream_t. They throw std::runtime_error with CUDA's message.
void chunk_lse_update_cuda(const ChunkLse& args, void* stream);
void chunk_dlogits_cuda(const ChunkDlogits& args, void* stream);

}  // namespace realm_fast
