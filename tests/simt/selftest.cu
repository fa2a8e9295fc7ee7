// Small kernels for the harness' own tests: right in every respect, unless a fault is planted in them by name.
// Compiled only by the harness.
#include <string_view>

#include "core/cuda/device.cuh"
#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.h"

namespace selftest {

using namespace realm_fast::cuda;

std::string_view fault;
bool planted(std::string_view name) { return fault == name; }

// Sums `count` floats a block: cp.async into shared memory, warp shuffles, one value a warp through shared
// memory, an atomic for the grid's total.
__global__ void __launch_bounds__(128) block_sums(const float* x, int64_t count, float* sums, float* total) {
  REALM_FAST_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);  // [512]
  REALM_FAST_SHARED(float, partial, 4);
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 512 + 4 * tid;
  const int64_t left = count + planted("off by one") - first;
  const int bytes = left >= 4 ? 16 : left > 0 ? static_cast<int>(left) * 4 : 0;
  cp_async16(tile + 4 * tid, bytes > 0 ? x + first : x, bytes);
  cp_async_commit();
  if (!planted("no wait")) cp_async_wait<0>();
  if (!planted("no barrier")) __syncthreads();
  // Read what other threads brought.
  float sum = 0;
  for (int i = tid; i < 512; i += 128) sum += tile[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (tid % 32 == 0) partial[tid / 32] = sum;
  if (planted("divergent barrier")) {
    if (tid < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (planted("missed barrier")) {
    if (tid < 64) __syncthreads();
    if (tid >= 64) (void)__shfl_sync(0xffffffffu, sum, 0);
    if (tid == 3) (void)__ballot_sync(0xffffffffu, 1);  // the warp's other lanes never come
  } else {
    __syncthreads();
  }
  if (tid == 0) {
    float all = 0;
    for (int i = 0; i < 4; ++i) all += planted("past the end") && i == 3 ? tile[512] : partial[i];
    sums[blockIdx.x] = all;
    atomicAdd(total, all);
  }
}

// One warp: d = a @ b.T by ldmatrix and mma, a [16, 16], b [8, 16], d [16, 8].
template <class T>
__global__ void __launch_bounds__(32) product(const T* a, const T* b, float* d) {
  REALM_FAST_SHARED(T, sa, 16 * 16);
  REALM_FAST_SHARED(T, sb, 16 * 16);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    sa[i] = a[i];
    sb[i] = i < 128 ? b[i] : from_float<T>(0.0f);
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, sa + (lane % 16) * 16 + (lane / 16) * 8);
  ldmatrix_x4(fb, sb + (lane % 8 + lane / 16 * 8) * 16 + (lane / 8 % 2) * 8);
  float acc[4] = {0, 0, 0, 0};
  mma_m16n8k16<T>(acc, fa, fb[0], fb[1]);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = acc[i];
}

__global__ void __launch_bounds__(32) product_s8(const int8_t* a, const int8_t* b, int32_t* d) {
  REALM_FAST_SHARED(int8_t, sa, 16 * 32);
  REALM_FAST_SHARED(int8_t, sb, 16 * 32);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 4 * lane; i < 512; i += 128) {
    *reinterpret_cast<uint32_t*>(sa + i) = *reinterpret_cast<const uint32_t*>(a + i);
    *reinterpret_cast<uint32_t*>(sb + i) = i < 256 ? *reinterpret_cast<const uint32_t*>(b + i) : 0u;
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, sa + (lane % 16) * 32 + (lane / 16) * 16);
  ldmatrix_x4(fb, sb + (lane % 8 + lane / 16 * 8) * 32 + (lane / 8 % 2) * 16);
  int32_t acc[4] = {0, 0, 0, 0};
  mma_m16n8k32(acc, fa, fb[0], fb[1]);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = acc[i];
}

// One warpgroup: d = a @ b.T by wgmma, a [64, 64] stored by the threads themselves, b [128, 64] by a bulk
// copy, d [64, 128].
template <class T>
__global__ void __launch_bounds__(128) warpgroup_product(const T* a, TensorMap b_map, float* d) {
  REALM_FAST_SWIZZLED_SHARED(memory);
  unsigned char* const sa = memory;
  unsigned char* const sb = memory + 64 * kSwizzleRowBytes;
  uint64_t* const arrived = reinterpret_cast<uint64_t*>(sb + 128 * kSwizzleRowBytes);
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < 64 * 8; i += 128) {  // 16 bytes each
    const int row = i / 8, chunk = i % 8;
    *reinterpret_cast<uint4*>(sa + row * kSwizzleRowBytes + ((chunk ^ (row & 7)) << 4)) =
        *reinterpret_cast<const uint4*>(a + row * 64 + chunk * 8);
  }
  if (tid == 0) mbarrier_init(arrived, 1);
  if (tid == 0 || !planted("no proxy fence")) fence_proxy_async();
  __syncthreads();
  if (tid == 0) {
    mbarrier_expect(arrived, 128 * kSwizzleRowBytes);
    tma_load(sb, b_map, 0, 0, arrived);
  }
  if (tid == 0 || !planted("one waits")) mbarrier_wait(arrived, 0);  // and nothing tells the others
  float acc[kWgmmaValues] = {};
  if (!planted("no order fence")) wgmma_fence();
  for (int i = 0; i < 4; ++i) {
    wgmma<T>(acc, wgmma_operand(sa) + depth_step(i), wgmma_operand(sb) + depth_step(i), i > 0);
  }
  wgmma_commit();
  if (planted("touch")) acc[5] = 0;
  const bool overwrite = planted("overwrite");
  if (overwrite && tid == 0) {
    mbarrier_expect(arrived, 128 * kSwizzleRowBytes);
    tma_load(sb, b_map, 0, 0, arrived);
  }
  wgmma_wait<0>(acc);
  if (overwrite) mbarrier_wait(arrived, 1);
  for (int i = 0; i < kWgmmaValues; ++i) {
    const int row = tid / 32 * 16 + tid % 32 / 4 + i / 2 % 2 * 8;
    d[row * 128 + i / 4 * 8 + tid % 4 * 2 + i % 2] = acc[i];
  }
}

// Blocks that wait for one another: a lock in global memory around a counter that is not atomic.
__global__ void __launch_bounds__(64) locked_count(uint32_t* lock, uint32_t* value, int rounds) {
  if (threadIdx.x == 0) {
    const bool locks = !planted("no lock");
    for (int i = 0; i < rounds; ++i) {
      while (locks && atomicCAS(lock, 0u, 1u) != 0u) pause_briefly();
      __threadfence();
      const uint32_t old = load_relaxed(value);
      atomicExch(value, old + 1);
      __threadfence();
      if (locks) atomicExch(lock, 0u);
    }
  }
}

}  // namespace selftest

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {
float element(int i) { return static_cast<float>((i * 7919) % 31 - 15); }

template <class T>
double product_error() {
  std::vector<double> want(128, 0.0);
  auto* a = static_cast<T*>(simt::device_alloc(256 * sizeof(T), true));
  auto* b = static_cast<T*>(simt::device_alloc(128 * sizeof(T), true));
  auto* d = static_cast<float*>(simt::device_alloc(128 * 4, false));
  for (int i = 0; i < 256; ++i) a[i] = T(element(i));
  for (int i = 0; i < 128; ++i) b[i] = T(element(i + 1000));
  REALM_FAST_LAUNCH(selftest::product<T>, 1, 32, 0, nullptr, a, b, d);
  double worst = 0;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += double(float(a[m * 16 + k])) * double(float(b[n * 16 + k]));
      worst = std::max(worst, std::abs(sum - d[m * 8 + n]));
    }
  }
  return worst;
}

template <class T>
double warpgroup_product_error() {
  auto* a = static_cast<T*>(simt::device_alloc(64 * 64 * sizeof(T), true));
  auto* b = static_cast<T*>(simt::device_alloc(128 * 64 * sizeof(T), true));
  auto* d = static_cast<float*>(simt::device_alloc(64 * 128 * 4, false));
  for (int i = 0; i < 64 * 64; ++i) a[i] = T(element(i));
  for (int i = 0; i < 128 * 64; ++i) b[i] = T(element(i + 1000));
  const auto map = simt::tensor_map(b, sizeof(T), 64 * sizeof(T), 128, 64 * sizeof(T), 128);
  REALM_FAST_LAUNCH(selftest::warpgroup_product<T>, 1, 128, (64 + 128) * 128 + 8, nullptr, a, map, d);
  double worst = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 128; ++n) {
      double sum = 0;
      for (int k = 0; k < 64; ++k) sum += double(float(a[m * 64 + k])) * double(float(b[n * 64 + k]));
      const double error = std::abs(sum - d[m * 128 + n]);
      worst = error <= worst ? worst : error < 1e30 ? error : 1e30;  // NaN too
    }
  }
  return worst;
}

double product_s8_error() {
  auto* a = static_cast<int8_t*>(simt::device_alloc(512, true));
  auto* b = static_cast<int8_t*>(simt::device_alloc(256, true));
  auto* d = static_cast<int32_t*>(simt::device_alloc(128 * 4, false));
  for (int i = 0; i < 512; ++i) a[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  for (int i = 0; i < 256; ++i) b[i] = static_cast<int8_t>(i * 91 % 255 - 127);
  REALM_FAST_LAUNCH(selftest::product_s8, 1, 32, 0, nullptr, a, b, d);
  double worst = 0;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[m * 32 + k] * b[n * 32 + k];
      worst = std::max(worst, std::abs(double(sum) - d[m * 8 + n]));
    }
  }
  return worst;
}
}  // namespace

// selftest CASE ORDER SEED FAULT ("" for none): prints {"error": worst absolute error, "report": ...}
int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const std::string name = argv[1], order = argv[2];
  simt::config().order = order == "ascending"    ? simt::Order::kAscending
                         : order == "descending" ? simt::Order::kDescending
                                                 : simt::Order::kRandom;
  simt::config().seed = std::strtoull(argv[3], nullptr, 10);
  selftest::fault = argv[4];
  simt::config().yield_share = order == "random" ? 0.05 : 0.0;
  double error = 0;
  if (name == "sums") {
    constexpr int64_t kCount = 512 * 5 - 3;  // the last block's last copy is cut short
    auto* x = static_cast<float*>(simt::device_alloc(kCount * 4, true));
    auto* sums = static_cast<float*>(simt::device_alloc(5 * 4, false));
    auto* total = static_cast<float*>(simt::device_alloc(4, true));
    *total = 0;
    double want = 0;
    for (int i = 0; i < kCount; ++i) want += x[i] = element(i);
    REALM_FAST_LAUNCH(selftest::block_sums, 5, 128, 512 * 4, nullptr, x, kCount, sums, total);
    error = std::abs(want - *total);
    if (error != error) error = 1e30;
  } else if (name == "bf16") {
    error = product_error<__nv_bfloat16>();
  } else if (name == "f16") {
    error = product_error<__half>();
  } else if (name == "s8") {
    error = product_s8_error();
  } else if (name == "warpgroup bf16") {
    error = warpgroup_product_error<__nv_bfloat16>();
  } else if (name == "warpgroup f16") {
    error = warpgroup_product_error<__half>();
  } else if (name == "bf16_swapped_fragment") {
    simt::config().swap_fragments = true;
    error = product_error<__nv_bfloat16>();
  } else if (name == "bf16_swapped_matrix") {
    simt::config().swap_matrices = true;
    error = product_error<__nv_bfloat16>();
  } else if (name == "lock") {
    simt::config().resident_blocks = 4;
    auto* words = static_cast<uint32_t*>(simt::device_alloc(8, true));
    words[0] = words[1] = 0;
    REALM_FAST_LAUNCH(selftest::locked_count, 8, 64, 0, nullptr, words, words + 1, 50);
    error = std::abs(400.0 - words[1]);
  } else if (name == "too many thread blocks") {
    for (const int64_t blocks : {int64_t{0}, int64_t{1} << 31, (int64_t{1} << 32) + 5}) {
      try {
        error += realm_fast::cuda::grid_size(blocks, "kernel");
      } catch (const std::invalid_argument&) {
      }
    }
    error += realm_fast::cuda::grid_size(INT32_MAX, "kernel") - INT32_MAX;
  } else {
    return 2;
  }
  std::printf("{\"error\": %.9g, \"report\": %s}\n", error, simt::report_json().c_str());
  return 0;
}
