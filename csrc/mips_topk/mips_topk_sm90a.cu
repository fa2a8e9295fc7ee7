// The scan for many queries on Hopper. This file is compiled for sm_90a alone and called on nothing else.
#include "core/cuda/tensor_map.h"
#include "mips_topk/scan_variants.cuh"
#include "mips_topk/scan_wgmma.cuh"

namespace realm_fast::cuda {
namespace {

template <class T, int kSlabs>
int wgmma_blocks_per_multiprocessor(size_t) {
  return 1;  // registers for no more
}

template <class T, int kSlabs>
void launch_wgmma(const ScanArguments& a, int blocks, cudaStream_t stream) {
  const TensorMap query_map =
      tensor_map<T>(a.queries, a.row_bytes, a.num_queries, a.query_stride, kWgmmaGroupRows);
  const TensorMap block_map = tensor_map<T>(a.blocks, a.row_bytes, a.last, a.block_stride, kTileBlocks);
  check(cudaFuncSetAttribute(scan_wgmma<T, kSlabs>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             a.shared_bytes),
        "mips_topk: shared memory of the scan");
  REALM_FAST_LAUNCH((scan_wgmma<T, kSlabs>), blocks, kScanThreads, static_cast<size_t>(a.shared_bytes),
                    stream, a, query_map, block_map);
  check_launch("mips_topk: scan_wgmma");
}

template <class T, int kSlabs>
constexpr ScanVariant wgmma_variant() {
  return {kWgmmaGroupRows, &set_wgmma_layout, &wgmma_blocks_per_multiprocessor<T, kSlabs>,
          &launch_wgmma<T, kSlabs>};
}

}  // namespace

// By the number of slabs, from one.
const ScanVariant* scan_variants_wgmma(ScanDtype dtype) {
  static_assert(kWgmmaMaxSlabs == 2);
  static constexpr ScanVariant of_bf16[] = {wgmma_variant<bf16, 1>(), wgmma_variant<bf16, 2>()};
  static constexpr ScanVariant of_f16[] = {wgmma_variant<f16, 1>(), wgmma_variant<f16, 2>()};
  return dtype == ScanDtype::kBFloat16 ? of_bf16 : of_f16;
}

}  // namespace realm_fast::cuda
