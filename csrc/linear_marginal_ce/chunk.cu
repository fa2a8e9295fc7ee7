// One read of the logits for the log-sum-exp, one read and one write for their gradient; 16 bytes a load.
#include "linear_marginal_ce/chunk.h"

#include <cstring>

#include "core/cuda/launch.h"
#include "core/cuda/numeric.cuh"

namespace realm_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// kCount elements that are loaded or stored as one 16-byte (or shorter, for half outputs) access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};
// One store of the pack's width. The intrinsic says so: of plain assignments ptxas gets one in four in
// pieces.
template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const Pack<T, kCount>& pack) {
  using Bits = std::conditional_t<sizeof(pack) == 16, uint4, uint2>;
  if constexpr (sizeof(pack) == sizeof(Bits)) {
    Bits bits;
    memcpy(&bits, &pack, sizeof bits);
    __stcg(reinterpret_cast<Bits*>(to), bits);
  } else {
    static_assert(kCount == 1);
    *to = pack.v[0];
  }
}
template <class A>
constexpr int kPack = 16 / static_cast<int>(sizeof(A));

template <class A>
struct RunningSum {
  A max = static_cast<A>(-1e38);  // finite: -inf - max is never NaN
  A sum = 0;                      // a NaN logit, or +inf, makes it NaN

  __device__ __forceinline__ void raise(A to) {
    if (to > max) {
      sum *= exponential(max - to);
      max = to;
    }
  }
  __device__ __forceinline__ void add(A x) {
    raise(x);
    sum += exponential(x - max);
  }
  __device__ __forceinline__ void add(const RunningSum& other) {
    raise(other.max);
    sum += other.sum * exponential(other.max - max);
  }
};

// One block a row. kWide: rows are a multiple of 16 bytes long and aligned.
template <class A, bool kWide>
__global__ void __launch_bounds__(kThreads) lse_update(ChunkLse a) {
  constexpr int n = kPack<A>;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  const A* logits = static_cast<const A*>(a.logits) + row * a.columns;
  RunningSum<A> running;
  if constexpr (kWide) {
    const auto* packs = reinterpret_cast<const Pack<A, n>*>(logits);
    for (int64_t i = tid; i < a.columns / n; i += kThreads) {
      const Pack<A, n> pack = packs[i];
      A top = pack.v[0];
#pragma unroll
      for (int j = 1; j < n; ++j) top = pack.v[j] > top ? pack.v[j] : top;
      running.raise(top);
#pragma unroll
      for (int j = 0; j < n; ++j) running.sum += exponential(pack.v[j] - running.max);
    }
  } else {
    for (int64_t i = tid; i < a.columns; i += kThreads) running.add(logits[i]);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    RunningSum<A> other;
    other.max = __shfl_xor_sync(kAllLanes, running.max, step);
    other.sum = __shfl_xor_sync(kAllLanes, running.sum, step);
    running.add(other);
  }
  REALM_FAST_SHARED(A, warp_max, kThreads / kWarp);
  REALM_FAST_SHARED(A, warp_sum, kThreads / kWarp);
  if (tid % kWarp == 0) {
    warp_max[tid / kWarp] = running.max;
    warp_sum[tid / kWarp] = running.sum;
  }
  __syncthreads();
  if (tid != 0) return;
  A* row_max = static_cast<A*>(a.row_max) + row;
  A* row_sum = static_cast<A*>(a.row_sum) + row;
  RunningSum<A> total;
  total.max = *row_max;
  total.sum = *row_sum;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    RunningSum<A> part;
    part.max = warp_max[w];
    part.sum = warp_sum[w];
    total.add(part);
  }
  *row_max = total.max;
  *row_sum = total.sum;
  const int64_t label = a.labels[row] - a.begin;
  if (label >= 0 && label < a.columns) static_cast<A*>(a.gold)[row] = logits[label];
}

constexpr int kPacksPerThread = 4;  // share a thread's reads of what belongs to the row

// A block takes kThreads * kPacksPerThread packs of one row. softmax - onehot is formed before any rounding
// to half precision.
template <class A, class O, bool kWide>
__global__ void __launch_bounds__(kThreads) dlogits(ChunkDlogits a) {
  constexpr int n = kWide ? kPack<A> : 1;
  const int64_t row = blockIdx.y;
  const A max = static_cast<const A*>(a.row_max)[row];
  const A logsum = static_cast<const A*>(a.row_logsum)[row];
  const A grad = static_cast<const A*>(a.grad)[row];
  const int64_t label = a.labels[row] - a.begin;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kPacksPerThread * kThreads + threadIdx.x) * n;
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int64_t column = first + int64_t{i} * kThreads * n;
    if (column >= a.columns) return;
    const int64_t at = row * a.columns + column;
    const Pack<A, n> in = *reinterpret_cast<const Pack<A, n>*>(static_cast<const A*>(a.logits) + at);
    Pack<O, n> out;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A p = exponential((in.v[j] - max) - logsum);
      if (column + j == label) p -= 1;
      out.v[j] = narrow<O>(p * -grad);
    }
    store(static_cast<O*>(a.out) + at, out);
  }
}

bool is_wide(const void* p, int64_t columns, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && columns * bytes % 16 == 0;
}

template <class A>
void run_lse(const ChunkLse& a, cudaStream_t stream) {
  const auto kernel = is_wide(a.logits, a.columns, sizeof(A)) ? lse_update<A, true> : lse_update<A, false>;
  REALM_FAST_LAUNCH(kernel, grid_size(a.rows, "chunk_lse_update"), kThreads, 0, stream, a);
  check_launch("chunk_lse_update");
}

template <class A, class O>
void run_dlogits(const ChunkDlogits& all, cudaStream_t stream) {
  constexpr int64_t kMaxRows = 65535;  // of gridDim.y
  for (int64_t first = 0; first < all.rows; first += kMaxRows) {
    ChunkDlogits a = all;
    a.rows = all.rows - first < kMaxRows ? all.rows - first : kMaxRows;
    a.logits = static_cast<const A*>(all.logits) + first * all.columns;
    a.out = static_cast<O*>(all.out) + first * all.columns;
    a.labels = all.labels + first;
    a.row_max = static_cast<const A*>(all.row_max) + first;
    a.row_logsum = static_cast<const A*>(all.row_logsum) + first;
    a.grad = static_cast<const A*>(all.grad) + first;
    const bool wide = is_wide(a.logits, a.columns, sizeof(A)) && is_wide(a.out, a.columns, sizeof(A));
    const int64_t per_block = int64_t{kThreads} * kPacksPerThread * (wide ? kPack<A> : 1);
    const dim3 grid(grid_size((a.columns + per_block - 1) / per_block, "chunk_dlogits"),
                    static_cast<unsigned>(a.rows));
    const auto kernel = wide ? dlogits<A, O, true> : dlogits<A, O, false>;
    REALM_FAST_LAUNCH(kernel, grid, kThreads, 0, stream, a);
    check_launch("chunk_dlogits");
  }
}

}  // namespace
}  // namespace cuda

void chunk_lse_update_cuda(const ChunkLse& args, void* stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.dtype == 1) {
    cuda::run_lse<double>(args, on);
  } else {
    cuda::run_lse<float>(args, on);
  }
}

void chunk_dlogits_cuda(const ChunkDlogits& args, void* stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.out_dtype) {
    case 0:
      cuda::run_dlogits<float, float>(args, on);
      break;
    case 1:
      cuda::run_dlogits<double, double>(args, on);
      break;
    case 2:
      cuda::run_dlogits<float, cuda::bf16>(args, on);
      break;
    default:
      cuda::run_dlogits<float, cuda::f16>(args, on);
      break;
  }
}

}  // namespace realm_fast
