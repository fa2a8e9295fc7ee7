// What the host needs of one instantiation of the scan. Each element type is compiled in a file of its own.
#pragma once

#include "core/cuda/launch.h"
#include "mips_topk/mips_topk_cuda.h"
#include "mips_topk/scan.cuh"

namespace realm_fast::cuda {

struct ScanVariant {
  int rows;  // queries a group
  void (*set_layout)(ScanPlan&);
  int (*blocks_per_multiprocessor)(size_t shared_bytes);
  void (*launch)(const ScanArguments&, int blocks, cudaStream_t);
};

template <class T, int kRows>
void allow_shared(size_t shared_bytes) {
  check(cudaFuncSetAttribute(scan<T, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "mips_topk: shared memory of the scan");
}
template <class T, int kRows>
int scan_blocks_per_multiprocessor(size_t shared_bytes) {
  allow_shared<T, kRows>(shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scan<T, kRows>, kScanThreads, shared_bytes),
        "mips_topk: occupancy of the scan");
  return blocks;
}
template <class T, int kRows>
void launch_scan(const ScanArguments& a, int blocks, cudaStream_t stream) {
  const auto shared_bytes = static_cast<size_t>(a.shared_bytes);
  allow_shared<T, kRows>(shared_bytes);
  REALM_FAST_LAUNCH((scan<T, kRows>), blocks, kScanThreads, shared_bytes, stream, a);
  check_launch("mips_topk: scan");
}
template <class T, int kRows>
constexpr ScanVariant scan_variant() {
  return {kRows, &set_layout<T, kRows>, &scan_blocks_per_multiprocessor<T, kRows>, &launch_scan<T, kRows>};
}

// Two each: for few queries and for many.
const ScanVariant* scan_variants_f32();
const ScanVariant* scan_variants_bf16();
const ScanVariant* scan_variants_f16();
const ScanVariant* scan_variants_int8();

// scan_wgmma.cuh's, for sm_90a alone: bf16 or f16, rows of at most kWgmmaMaxSlabs slabs; by slabs, from one.
constexpr int kWgmmaMaxSlabs = 2;
constexpr int kWgmmaGroupRows = 128;  // queries a step, half of them each warpgroup
constexpr int kWgmmaRoundSteps = 4;   // steps between two times that the queue may be handed on
constexpr int kWgmmaQueue = kFlushAt + kWgmmaRoundSteps * kWgmmaGroupRows * kTileBlocks;
const ScanVariant* scan_variants_wgmma(ScanDtype dtype);

}  // namespace realm_fast::cuda
