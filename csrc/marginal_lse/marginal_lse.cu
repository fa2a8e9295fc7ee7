// The CUDA kernels of the marginal log-likelihood. Tensors are small: one launch each way, no workspace.
#include "marginal_lse/marginal_lse.h"

#include "core/cuda/launch.h"
#include "core/cuda/numeric.cuh"

namespace realm_fast {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Arithmetic in A: float, or double for double inputs.
template <class A, class T>
__device__ __forceinline__ A widen(T x) {
  return static_cast<A>(to_float(x));
}
template <>
__device__ __forceinline__ double widen<double, double>(double x) {
  return x;
}
// What a mixture's running maximum and sum of exponentials come to: its log, and the factor that turns
// exp(x - max) into a responsibility (0 where nothing is possible, NaN after a NaN or +inf).
template <class A>
__device__ __forceinline__ void finish(A max, A sum, bool has_nan, A& marginal, A& scale) {
  const A infinity = static_cast<A>(INFINITY), nan = static_cast<A>(NAN);
  if (has_nan) {
    marginal = scale = nan;
  } else if (sum == 0) {
    marginal = -infinity;
    scale = 0;
  } else if (max == infinity) {
    marginal = infinity;
    scale = nan;
  } else {
    marginal = max + logarithm(sum);
    scale = 1 / sum;
  }
}

// One thread a position: neighbouring threads read neighbouring positions of a candidate.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 8) forward_token(MarginalLse a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.batch * a.positions) return;
  const int64_t b = at / a.positions, m = at % a.positions;
  const T* gold = static_cast<const T*>(a.gold) + b * a.candidates * a.positions + m;
  const T* candidate = static_cast<const T*>(a.candidate) + b * a.candidates;
  A* r = static_cast<A*>(a.responsibility) + b * a.candidates * a.positions + m;
  A marginal = 0, scale = 0, max = static_cast<A>(-1e38);  // finite: -inf - max is never NaN
  const bool active = a.mask == nullptr || a.mask[at] != 0;
  if (active) {
    A sum = 0;
    bool has_nan = false;
    for (int64_t k = 0; k < a.candidates; ++k) {
      const A prior = widen<A>(candidate[k]);
      if (prior == -static_cast<A>(INFINITY)) continue;  // an absent slot: its gold is never looked at
      const A x = prior + widen<A>(gold[k * a.positions]);
      has_nan |= x != x;
      if (x > max) {
        sum *= exponential(max - x);
        max = x;
      }
      sum += exponential(x - max);
    }
    finish(max, sum, has_nan, marginal, scale);
  }
  static_cast<A*>(a.marginal)[at] = marginal;
  for (int64_t k = 0; k < a.candidates; ++k) {
    const A prior = widen<A>(candidate[k]);
    A value = 0;
    if (active && prior != -static_cast<A>(INFINITY)) {
      value = exponential(prior + widen<A>(gold[k * a.positions]) - max) * scale;
    }
    r[k * a.positions] = value;
  }
}

// candidate + the sum of gold over the positions that count; all lanes return the sum. In double: sums
// over a span are large, and their differences decide the responsibilities.
template <class T, class A>
__device__ __forceinline__ double log_joint(const MarginalLse& a, int64_t b, int64_t k) {
  const double prior =
      static_cast<double>(widen<A>(static_cast<const T*>(a.candidate)[b * a.candidates + k]));
  if (prior == -static_cast<double>(INFINITY)) return prior;
  const T* gold = static_cast<const T*>(a.gold) + (b * a.candidates + k) * a.positions;
  double sum = 0;
  for (int64_t m = threadIdx.x; m < a.positions; m += kWarp) {
    if (a.mask == nullptr || a.mask[b * a.positions + m] != 0) sum += static_cast<double>(widen<A>(gold[m]));
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return prior + sum;
}

// One warp a query.
template <class T, class A>
__global__ void __launch_bounds__(kWarp, 1) forward_sequence(MarginalLse a) {
  const int64_t b = blockIdx.x;
  A* r = static_cast<A*>(a.responsibility) + b * a.candidates;
  int any = a.mask == nullptr && a.positions > 0;
  if (a.mask != nullptr) {
    for (int64_t m = threadIdx.x; m < a.positions; m += kWarp) any |= a.mask[b * a.positions + m] != 0;
  }
  const bool active = __ballot_sync(kAllLanes, any) != 0;
  double max = -1e308, sum = 0, marginal = 0, scale = 0;
  bool has_nan = false;
  if (active) {
    for (int64_t k = 0; k < a.candidates; ++k) {
      const double x = log_joint<T, A>(a, b, k);
      has_nan |= x != x;
      if (x > max) {
        sum *= exp(max - x);
        max = x;
      }
      sum += x == -static_cast<double>(INFINITY) ? 0.0 : exp(x - max);
    }
    finish(max, sum, has_nan, marginal, scale);
  }
  if (threadIdx.x == 0) static_cast<A*>(a.marginal)[b] = static_cast<A>(marginal);
  for (int64_t k = 0; k < a.candidates; ++k) {
    const bool absent =
        widen<A>(static_cast<const T*>(a.candidate)[b * a.candidates + k]) == -static_cast<A>(INFINITY);
    double value = 0;
    if (active && !absent) value = exp(log_joint<T, A>(a, b, k) - max) * scale;
    if (threadIdx.x == 0) r[k] = static_cast<A>(value);
  }
}

// One warp a candidate: lanes over the positions, one sum in a fixed order.
template <class T, class A>
__global__ void __launch_bounds__(kWarp) backward(MarginalLseBackward a) {
  const int64_t row = blockIdx.x, b = row / a.candidates;
  T* d_gold = static_cast<T*>(a.d_gold) + row * a.positions;
  const A* r = static_cast<const A*>(a.responsibility);
  const A* grad = static_cast<const A*>(a.grad);
  A sum = 0;
  if (a.sequence) {
    // Masked and absent stay 0 under any upstream gradient, so 0 * inf must not be formed.
    sum = r[row] == 0 ? 0 : grad[b] * r[row];
    for (int64_t m = threadIdx.x; m < a.positions; m += kWarp) {
      const bool active = a.mask == nullptr || a.mask[b * a.positions + m] != 0;
      d_gold[m] = narrow<T>(active ? sum : static_cast<A>(0));
    }
  } else {
    for (int64_t m = threadIdx.x; m < a.positions; m += kWarp) {
      const A share = r[row * a.positions + m];
      const A d = share == 0 ? 0 : grad[b * a.positions + m] * share;
      d_gold[m] = narrow<T>(d);
      sum += d;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (threadIdx.x == 0) static_cast<T*>(a.d_candidate)[row] = narrow<T>(sum);
}

template <class T, class A>
void run_forward(const MarginalLse& a, cudaStream_t stream) {
  if (a.sequence) {
    const auto kernel = forward_sequence<T, A>;
    REALM_FAST_LAUNCH(kernel, grid_size(a.batch, "marginal_lse"), kWarp, 0, stream, a);
  } else {
    const int64_t blocks = (a.batch * a.positions + kThreads - 1) / kThreads;
    const auto kernel = forward_token<T, A>;
    REALM_FAST_LAUNCH(kernel, grid_size(blocks, "marginal_lse"), kThreads, 0, stream, a);
  }
  check_launch("marginal_lse");
}

template <class T, class A>
void run_backward(const MarginalLseBackward& a, cudaStream_t stream) {
  const auto kernel = backward<T, A>;
  const unsigned rows = grid_size(a.batch * a.candidates, "marginal_lse_backward");
  REALM_FAST_LAUNCH(kernel, rows, kWarp, 0, stream, a);
  check_launch("marginal_lse_backward");
}

// Calls run with the element type and the accumulator of a dtype code (realm_fast/ops/marginal_lse.py).
template <class Run>
void with_types(int dtype, Run run) {
  switch (dtype) {
    case 0:
      return run.template operator()<float, float>();
    case 1:
      return run.template operator()<double, double>();
    case 2:
      return run.template operator()<bf16, float>();
    default:
      return run.template operator()<f16, float>();
  }
}

}  // namespace
}  // namespace cuda

void marginal_lse_cuda(const MarginalLse& args, void* stream) {
  if (args.batch == 0 || (!args.sequence && args.positions == 0)) return;
  cuda::with_types(args.dtype, [&]<class T, class A>() {
    cuda::run_forward<T, A>(args, static_cast<cudaStream_t>(stream));
  });
}

void marginal_lse_backward_cuda(const MarginalLseBackward& args, void* stream) {
  if (args.batch == 0) return;
  cuda::with_types(args.dtype, [&]<class T, class A>() {
    cuda::run_backward<T, A>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace realm_fast
