// The marginal log-likelihood of a mixture over K candidates, and its backward pass.
//
//   token      marginal[b, m] = logsumexp_k(candidate[b, k] + gold[b, k, m])         r [B, K, M]
//   sequence   marginal[b]    = logsumexp_k(candidate[b, k] + sum_m gold[b, k, m])   r [B, K, 1]
//   r = softmax over k (the responsibilities);  d gold = grad * r;  d candidate = sum_m grad * r
//
// Shapes (contiguous): gold [B, K, M], candidate [B, K], mask [B, M] bytes or null, marginal [B, M] or [B].
// dtype of gold, candidate and their gradients: 0 float32, 1 float64, 2 bfloat16, 3 float16; marginal, r and
// grad are float64 for float64, else float32. Edge cases: realm_fast/ops/marginal_lse.py. Source of the edge
// rules and formulas for the CPU and the CUDA code alike: this header.
#pragma once

#include <cstdint>

namespace realm_fast {

struct MarginalLse {
  const void* gold;
  const void* candidate;
  const uint8_t* mask;
  void* marginal;
  void* responsibility;
  int64_t batch, candidates, positions;
  bool sequence;
  int dtype;
};

struct MarginalLseBackward {
  const void* grad;
  const void* responsibility;
  const uint8_t* mask;
  void* d_gold;
  void* d_candidate;
  int64_t batch, candidates, positions;
  bool sequence;
  int dtype;
};

// On the CPU, level chosen at run time; queries are shared among the threads.
void marginal_lse_cpu(const MarginalLse& args, int num_threads);
void marginal_lse_backward_cpu(const MarginalLseBackward& args, int num_threads);

// exp as the kernels of the current level compute it, for the test of its error bound.
void vector_exp(const float* x, float* y, int64_t n);

// One query; the levels. `exp` runs over n floats.
struct MarginalLseLevel {
  void (*forward)(const MarginalLse& args, int64_t query);
  void (*backward)(const MarginalLseBackward& args, int64_t query);
  void (*exp)(const float* x, float* y, int64_t n);
};
MarginalLseLevel marginal_lse_avx2();
MarginalLseLevel marginal_lse_avx512();

// On CUDA; stream is a cudaStream_t. Throws std::runtime_error with CUDA's message.
void marginal_lse_cuda(const MarginalLse& args, void* stream);
void marginal_lse_backward_cuda(const MarginalLseBackward& args, void* stream);

}  // namespace realm_fast
