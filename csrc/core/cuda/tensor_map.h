// Host side of tma_load: describes a matrix in global memory to the copy engine. The one function needed of
// the driver is looked up when it is first wanted, so that nothing of the driver is linked and the module
// imports where there is none.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.h"

namespace realm_fast::cuda {

// Boxes of kSwizzleRowBytes by `box_rows` of rows of `row_bytes` bytes, `stride` bytes apart; base and stride
// must be multiples of 16.
template <class T>
TensorMap tensor_map(const void* base, int64_t row_bytes, int64_t rows, int64_t stride, int box_rows) {
#ifdef REALM_FAST_SIMT
  return ::simt::tensor_map(base, sizeof(T), row_bytes, rows, stride, box_rows);
#else
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the NVIDIA driver is older than tensor maps (CUDA 12.0)");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(row_bytes) / sizeof(T), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {kSwizzleRowBytes / sizeof(T), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = encode(
      &map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for " +
                             std::to_string(rows) + " rows of " + std::to_string(row_bytes) + " bytes, " +
                             std::to_string(stride) + " bytes apart");
  }
  return map;
#endif
}

}  // namespace realm_fast::cuda
