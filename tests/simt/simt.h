// Runs CUDA kernels on the CPU: every thread of a block is a fiber, warps and blocks are scheduled in a
// chosen order, and what a GPU would leave to chance is checked.
//
//   order      lanes ascending, descending, or drawn at random at every point where a thread may yield;
//              several blocks are resident at once, so that they can wait for one another
//   collectives  shuffles, votes, ldmatrix and mma complete when every lane named in the mask has arrived at
//              the same one; a lane that never arrives is reported, as is a barrier some threads miss
//   memory     device memory lives in guarded allocations; shared memory is poisoned before each block;
//              reads of bytes never written, accesses outside an allocation and conflicting accesses to
//              shared memory between two barriers are reported (builds with hooks), or the address and
//              undefined-behaviour sanitizers watch (builds with those)
//   cp.async   the copy lands when it is waited for, or at a random moment before; until then the
//              destination holds poison
//   Hopper     boxes of a matrix (tma_load) land when their barrier is waited for, or at a random moment
//              before; products of a warpgroup (wgmma) read shared memory when they are waited for, or at a
//              random moment before, and until then their accumulators hold poison. Reported: operands
//              overwritten or read too early, accumulators touched or left under way, missing fences
//   counts     bytes of global memory read and written, per launch (builds with hooks)
//   faults     on request: barriers at one source line are dropped, fragments swapped, copies shifted or
//              cut, so that tests can show that each would be caught
//
// Builds "with hooks" compile the kernels with -fsanitize=thread and supply the functions that this calls on
// every load and store (simt.cpp); no thread sanitizer is linked.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>

// ---- the words of CUDA C++ -------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  template <class X>
  dim3(X x_) : x(static_cast<unsigned>(x_)) {}  // NOLINT: dim3 grid = 5 is CUDA's idiom
  dim3(unsigned x_, unsigned y_, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((u >> 16) | 0x40u)
                                           : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(std::bit_cast<uint16_t>(static_cast<_Float16>(x))) {}
  operator float() const { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __float2half(float x) { return __half(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }

inline float __uint_as_float(uint32_t u) { return std::bit_cast<float>(u); }
inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline float __int_as_float(int32_t u) { return std::bit_cast<float>(u); }
inline int32_t __float_as_int(float f) { return std::bit_cast<int32_t>(f); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }
template <class A, class B>
constexpr auto min(A a, B b) -> std::common_type_t<A, B> {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <class A, class B>
constexpr auto max(A a, B b) -> std::common_type_t<A, B> {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

// ---- the runtime API, as much of it as launches need ------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

// ---- the machine ------------------------------------------------------------------------------------------

namespace simt {

enum class Order { kAscending, kDescending, kRandom };

struct Config {
  Order order = Order::kAscending;
  uint64_t seed = 1;
  int resident_blocks = 2;   // blocks that run interleaved
  double yield_share = 0.0;  // random order: chance that a thread yields at a load, store or atomic
  int multiprocessors = 4;   // what the emulated device reports
  int shared_bytes_per_block = 227 * 1024;
  int compute_capability = 90;
  // Faults, for the tests that show they are caught. Line numbers are the source's; 0 = none.
  int drop_barrier_line = 0;      // __syncthreads*/__syncwarp at this line do nothing ...
  std::string drop_barrier_file;  // ... if the name of the source ends so
  bool swap_fragments = false;    // mma: a[1] and a[2] change places
  bool swap_matrices = false;     // ldmatrix: matrices 1 and 2 change places
  int shift_copy_bytes = 0;       // cp.async reads this many bytes further on
  bool skip_copy_wait = false;    // cp_async_wait returns at once
  bool flip_parity = false;       // mbarrier_wait waits for the other phase
  bool skip_wgmma_wait = false;
  bool skip_wgmma_fence = false;
  bool skip_proxy_fence = false;
  bool swap_accumulators = false;  // wgmma: the two rows of a thread change places
  int cuda_error = 0;              // what asking for the device's attributes answers
};

struct Counts {
  uint64_t global_bytes_read = 0;
  uint64_t global_bytes_written = 0;
  uint64_t copy_bytes = 0;  // the part of global_bytes_read that cp.async and tma_load moved
  uint64_t atomics = 0;
  uint64_t barriers = 0;  // barriers completed, over all blocks
  uint64_t mma = 0;       // warp-level matrix products
  uint64_t wgmma = 0;     // a warp's share of a warpgroup's, 16 rows of 64
};

Config& config();
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);
inline dim3 dim3_of(dim3 d) { return d; }

// Device memory: guarded, registered; `initialized` false = reading before writing is an error.
void* device_alloc(size_t bytes, bool initialized);
void device_free(void* p);
const Counts& last_counts();  // of the latest launch
std::string report_json();    // launches with their counts, and the errors found
int error_count();
void report_error(const char* kind, const std::string& detail);  // each kind and place is kept once

// The emulation's own services.
uint3 thread_index();
uint3 block_index();
dim3 block_extent();
dim3 grid_extent();
void* static_shared(const char* file, int line, size_t bytes);
unsigned char* dynamic_shared();
int barrier(const char* file, int line, int predicate, int kind);  // kind: 0 plain, 1 or, 2 and, 3 count
void warp_barrier(const char* file, int line, unsigned mask);
void maybe_yield();  // random order only
void yield_now();    // in any order: for loops that wait
bool in_kernel();
int lane_index();
// Completes when every lane of `mask` has called it with the same kind and line; combine then runs once
// with the lanes' argument pointers (nullptr for lanes outside the mask).
using Combine = void (*)(void* const* arguments, unsigned mask);
void collective(int kind, int line, unsigned mask, void* argument, Combine combine);
void copy_async(void* dst, const void* src, int bytes);
void copy_commit();
void copy_wait(int pending);
void note_read(const void* p, size_t bytes);  // what a hook would note, for accesses made by the emulation
void note_write(const void* p, size_t bytes);
void note_relaxed_read(const void* p, size_t bytes);
void note_relaxed_write(const void* p, size_t bytes);
void note_atomic(const void* p, size_t bytes);
void note_mma();

inline void cp_async16(void* dst, const void* src, int bytes) { copy_async(dst, src, bytes); }
inline void cp_async_commit() { copy_commit(); }
template <int kPending>
void cp_async_wait() {
  copy_wait(kPending);
}
inline void prefetch_l2(const void*) {}
inline void pause_briefly() { yield_now(); }

void ldmatrix_x4_raw(uint32_t* r, const void* row, int line);
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  ldmatrix_x4_raw(r, row, line);
}
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int line);
void mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int line);
void mma_s8(int32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, int line);
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  int line = __builtin_LINE()) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    mma_bf16(d, a, b0, b1, line);
  } else {
    static_assert(std::is_same_v<T, __half>);
    mma_f16(d, a, b0, b1, line);
  }
}
inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         int line = __builtin_LINE()) {
  mma_s8(d, a, b0, b1, line);
}

// ---- what only Hopper has (core/cuda/hopper.cuh) ----

// A matrix in global memory and the box that one tma_load copies, 128 bytes wide, its 16-byte chunks
// permuted.
struct TensorMap {
  const unsigned char* base;
  int64_t row_bytes, rows, stride;
  int element_bytes, box_rows;
};
TensorMap tensor_map(const void* base, int element_bytes, int64_t row_bytes, int64_t rows, int64_t stride,
                     int box_rows);
uint32_t shared_address(const void* p);
void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_expect(uint64_t* barrier, int bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void fence_proxy_async();
void tma_load(void* dst, const TensorMap& map, int column, int row, uint64_t* barrier);
void wgmma_fence(int line = __builtin_LINE());
void wgmma_commit(int line = __builtin_LINE());
void wgmma_retire(int pending, float* d, int line);
template <int kPending>
void wgmma_wait(float (&d)[64], int line = __builtin_LINE()) {
  wgmma_retire(kPending, d, line);
}
void wgmma_start(float* d, uint64_t a, uint64_t b, bool accumulate, bool is_bf16, int line);
template <class T>
void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate, int line = __builtin_LINE()) {
  wgmma_start(d, a, b, accumulate, std::is_same_v<T, __nv_bfloat16>, line);
}

// The harness' own accesses to kernel memory must not be seen as the kernel's: relaxed loads and atomics go
// through these (defined in simt.cpp, which is compiled without hooks).
uint64_t raw_load(const void* p, size_t bytes);
void raw_store(void* p, uint64_t value, size_t bytes);

template <class T>
T load_relaxed(const T* p) {
  maybe_yield();
  note_relaxed_read(p, sizeof(T));
  const uint64_t raw = raw_load(p, sizeof(T));
  T value;
  std::memcpy(&value, &raw, sizeof(T));
  return value;
}
template <class T>
void store_relaxed(T* p, T value) {
  maybe_yield();
  note_relaxed_write(p, sizeof(T));
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  raw_store(p, raw, sizeof(T));
}
template <class T, class F>
T atomic_update(T* p, F update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  maybe_yield();
  note_atomic(p, sizeof(T));
  uint64_t raw = raw_load(p, sizeof(T));
  T old;
  std::memcpy(&old, &raw, sizeof(T));
  const T updated = update(old);
  raw = 0;
  std::memcpy(&raw, &updated, sizeof(T));
  raw_store(p, raw, sizeof(T));
  return old;
}

template <class T>
struct ShuffleArgument {
  T value;
  int source;
  int width;
  T result;
};
enum CollectiveKind {
  kShuffle = 1,
  kBallot,
  kReduce,
  kMatch,
  kLdmatrix,
  kMma,
  kWarpBarrier,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait
};

template <class T>
void combine_shuffle(void* const* arguments, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    auto* mine = static_cast<ShuffleArgument<T>*>(arguments[lane]);
    const int source = mine->source;
    if (source >= 0 && source < 32 && (mask >> source & 1u)) {
      mine->result = static_cast<ShuffleArgument<T>*>(arguments[source])->value;
    } else {
      report_error("shuffle", "a lane reads from a lane outside the mask");
      mine->result = mine->value;
    }
  }
}
template <class T>
T shuffle(unsigned mask, T value, int source, int line) {
  ShuffleArgument<T> argument{value, source, 32, value};
  collective(kShuffle, line, mask, &argument, &combine_shuffle<T>);
  return argument.result;
}

struct BallotArgument {
  bool predicate;
  unsigned result;
};
unsigned ballot(unsigned mask, bool predicate, int line);

template <class T>
struct ReduceArgument {
  T value;
  int operation;  // 0 add, 1 min, 2 max, 3 or, 4 and
  T result;
};
template <class T>
void combine_reduce(void* const* arguments, unsigned mask) {
  bool first = true;
  T total{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const auto* a = static_cast<ReduceArgument<T>*>(arguments[lane]);
    if (first) {
      total = a->value;
    } else {
      switch (a->operation) {
        case 0:
          total = total + a->value;
          break;
        case 1:
          total = a->value < total ? a->value : total;
          break;
        case 2:
          total = total < a->value ? a->value : total;
          break;
        case 3:
          total = total | a->value;
          break;
        default:
          total = total & a->value;
          break;
      }
    }
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) static_cast<ReduceArgument<T>*>(arguments[lane])->result = total;
  }
}
template <class T>
T reduce(unsigned mask, T value, int operation, int line) {
  ReduceArgument<T> argument{value, operation, value};
  collective(kReduce, line, mask, &argument, &combine_reduce<T>);
  return argument.result;
}

template <class T>
struct MatchArgument {
  T value;
  unsigned result;
};
template <class T>
void combine_match(void* const* arguments, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    auto* mine = static_cast<MatchArgument<T>*>(arguments[lane]);
    mine->result = 0;
    for (int other = 0; other < 32; ++other) {
      if ((mask >> other & 1u) && static_cast<MatchArgument<T>*>(arguments[other])->value == mine->value) {
        mine->result |= 1u << other;
      }
    }
  }
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_extent())
#define gridDim (::simt::grid_extent())
constexpr int warpSize = 32;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::barrier(file, line, 0, 0);
}
inline int __syncthreads_or(int p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::barrier(file, line, p, 1);
}
inline int __syncthreads_and(int p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::barrier(file, line, p, 2);
}
inline int __syncthreads_count(int p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::barrier(file, line, p, 3);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  simt::warp_barrier(file, line, mask);
}
inline void __threadfence() { simt::maybe_yield(); }
inline void __threadfence_block() { simt::maybe_yield(); }
inline void __nanosleep(unsigned) { simt::yield_now(); }
inline unsigned __activemask() { return 0xffffffffu; }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::lane_index();
  return simt::shuffle(mask, v, (lane & ~(width - 1)) + (source & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::lane_index();
  const int source = lane ^ lane_mask;
  // A source in a later segment gives the lane's own value, as on the device.
  return simt::shuffle(mask, v, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::lane_index();
  const int source = lane + static_cast<int>(delta);
  return simt::shuffle(mask, v, (lane & (width - 1)) + static_cast<int>(delta) < width ? source : lane, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::lane_index();
  const int source = lane - static_cast<int>(delta);
  return simt::shuffle(mask, v, (lane & (width - 1)) >= static_cast<int>(delta) ? source : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return simt::ballot(mask, p != 0, line);
}
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return simt::ballot(mask, p != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return simt::ballot(mask, p != 0, line) == mask;
}
template <class T>
T __reduce_add_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return simt::reduce(mask, v, 0, line);
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return simt::reduce(mask, v, 1, line);
}
template <class T>
T __reduce_max_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return simt::reduce(mask, v, 2, line);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) {
  return simt::reduce(mask, v, 3, line);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) {
  return simt::reduce(mask, v, 4, line);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  simt::MatchArgument<T> argument{v, 0};
  simt::collective(simt::kMatch, line, mask, &argument, &simt::combine_match<T>);
  return argument.result;
}

template <class T, class V>
T atomicAdd(T* p, V v) {
  return simt::atomic_update(p, [&](T old) { return static_cast<T>(old + static_cast<T>(v)); });
}
template <class T, class V>
T atomicMax(T* p, V v) {
  return simt::atomic_update(p, [&](T old) { return old < static_cast<T>(v) ? static_cast<T>(v) : old; });
}
template <class T, class V>
T atomicMin(T* p, V v) {
  return simt::atomic_update(p, [&](T old) { return static_cast<T>(v) < old ? static_cast<T>(v) : old; });
}
template <class T, class V>
T atomicOr(T* p, V v) {
  return simt::atomic_update(p, [&](T old) { return static_cast<T>(old | static_cast<T>(v)); });
}
template <class T, class V>
T atomicExch(T* p, V v) {
  return simt::atomic_update(p, [&](T) { return static_cast<T>(v); });
}
template <class T, class C, class V>
T atomicCAS(T* p, C expected, V v) {
  return simt::atomic_update(
      p, [&](T old) { return old == static_cast<T>(expected) ? static_cast<T>(v) : old; });
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
