// Exact top-k inner-product search on a GPU: the host contract. The kernels' design is in
// docs/ops/mips_topk.md and docs/adr/0005-cuda-mips-topk.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realm_fast {

enum class ScanDtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// Which matrix instructions a bf16 or f16 scan uses: mma.sync of any GPU, or Hopper's wgmma, which needs
// compute capability 9.0, D <= 128, rows at multiples of 16 bytes and fewer than 2^31 blocks, and pays above
// 128 queries. kAuto takes wgmma where it can be had and pays.
enum class ScanKernel : int { kAuto = 0, kMma = 1, kWgmma = 2 };

constexpr int kMaxCudaK = 2048;

// All pointers are device pointers. Strides are in elements; the last dimension is contiguous.
struct MipsTopkCuda {
  ScanDtype dtype = ScanDtype::kFloat32;  // of `blocks`, and of `queries` unless `originals` is given
  const void* queries = nullptr;          // [B, D]; float32 when `originals` is given
  const void* blocks = nullptr;           // [N, D]
  int64_t num_queries = 0;
  int64_t num_blocks = 0;  // < 2^32 - 1
  int dim = 0;
  int64_t query_stride = 0;
  int64_t block_stride = 0;
  int k = 0;                             // 0..kMaxCudaK
  const int64_t* exclude_ids = nullptr;  // [B, exclude_width], entries outside [0, N) mean nothing
  int exclude_width = 0;

  // Certified scan (bf16 or int8 codes, float32 answers): given `originals`, `blocks` holds codes x~ with
  // x = scale * code (scale 1 for bf16), and every block whose score could reach the top k, judged by
  // |<q,x> - <q~,x~>| <= |q~| |x - x~| + |q - q~| |x| + rounding, is scored again in float32. The answer is
  // that of the float32 scan, bit for bit.
  const float* originals = nullptr;  // [N, D]
  int64_t original_stride = 0;
  const float* block_scale = nullptr;     // [N], int8 only
  const float* block_residual = nullptr;  // [N] |x - x~|, rounded up
  const float* block_norm = nullptr;      // [N] |x|, rounded up
  const float* block_bounds = nullptr;    // [2] the largest block_residual and the largest block_norm

  ScanKernel kernel = ScanKernel::kAuto;

  // How many blocks give the first thresholds, at most 8192; 0: chosen here. Any gives the same answer.
  int64_t num_seeds = 0;

  float* scores = nullptr;  // [B, k]
  int64_t* ids = nullptr;   // [B, k]
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  void* stream = nullptr;  // cudaStream_t
};

// Bytes of workspace this call needs on the current device. Throws std::invalid_argument when the call
// itself is impossible (k or N too large, compute capability below 8.0).
size_t mips_topk_cuda_workspace(const MipsTopkCuda& call);

// Enqueues the search on call.stream of the current device; never waits for the device, so that it can be
// captured into a graph. The workspace must stay untouched until the stream has passed it.
void mips_topk_cuda(const MipsTopkCuda& call);

}  // namespace realm_fast
