// The host side of the CUDA search: checks, plan, launches.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/cuda/launch.h"
#include "mips_topk/mips_topk_cuda.h"
#include "mips_topk/scan_variants.cuh"

namespace realm_fast {
namespace cuda {
namespace {

constexpr int64_t kMaxPassQueries = 2048;  // more are searched in several passes over one workspace
constexpr int64_t kMaxSeeds = 8192;        // whose scores select_seeds keeps in shared memory
constexpr int kPrepareThreads = 128;

// One block a row: from the dense scores of the first `n` blocks, the k best into the row's buffer, and the
// first threshold. Scores are read once, into shared memory; excluded blocks are struck out there.
__global__ void __launch_bounds__(kSelectThreads)
    select_seeds(Rows rows, const float* dense, int64_t dense_stride, int n, const int64_t* exclude_ids,
                 int exclude_width) {
  REALM_FAST_SHARED(SelectScratch, scratch, 1);
  REALM_FAST_DYNAMIC_SHARED(memory);
  SelectScratch& s = *scratch;
  float* scores = reinterpret_cast<float*>(memory);  // [n]
  const int tid = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x);
  const float* from = dense + row * dense_stride;
  for (int i = tid; i < n; i += kSelectThreads) scores[i] = from[i];
  if (tid == 0) s.cursor = 0;
  __syncthreads();
  for (int i = tid; i < exclude_width; i += kSelectThreads) {
    const int64_t id = exclude_ids[static_cast<int64_t>(row) * exclude_width + i];
    // Atomic: the same block may be named twice.
    if (id >= 0 && id < n) {
      atomicExch(reinterpret_cast<unsigned*>(scores + id), __float_as_uint(-INFINITY));
    }
  }
  __syncthreads();
  const auto key = [&](int i) {
    const float score = scores[i];
    return score > -INFINITY ? make_key(score, i) : uint64_t{0};  // NaN compares false
  };
  const uint64_t bound = select_bound(key, n, rows.k, s);
  uint64_t* to = rows.buffer(row, 0);
  for (int i = tid; i < n; i += kSelectThreads) {
    const uint64_t candidate = key(i);
    if (candidate >= bound) to[atomicAdd(&s.cursor, 1u)] = candidate;
  }
  __syncthreads();
  if (tid == 0) {
    rows.counts[row] = s.cursor;
    rows.thresholds[row] = s.cursor == static_cast<uint32_t>(rows.k) ? bound : 0;
  }
}

// One block a row: sorts the row's buffer (bitonic, in shared memory) and writes the first k.
__global__ void __launch_bounds__(kSelectThreads) finish_rows(Rows rows, float* scores, int64_t* ids) {
  REALM_FAST_DYNAMIC_SHARED(memory);
  uint64_t* keys = reinterpret_cast<uint64_t*>(memory);  // [capacity]
  const int tid = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x);
  const uint64_t* from = rows.buffer(row, rows.counts[row] >> 32);
  for (int i = tid; i < rows.capacity; i += kSelectThreads) keys[i] = from[i];
  for (int size = 2; size <= rows.capacity; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = tid; i < rows.capacity / 2; i += kSelectThreads) {
        const int low = 2 * i - (i & (step - 1));
        const int high = low + step;
        const uint64_t a = keys[low];
        const uint64_t b = keys[high];
        const bool descending = (low & size) == 0;
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
  for (int i = tid; i < rows.k; i += kSelectThreads) {
    const uint64_t key = keys[i];
    scores[static_cast<int64_t>(row) * rows.k + i] = key != 0 ? key_score(key) : -INFINITY;
    ids[static_cast<int64_t>(row) * rows.k + i] = key != 0 ? key_block(key) : -1;
  }
}

template <class Code>
__device__ __forceinline__ float quantised(float value, float scale, Code* code) {
  if constexpr (sizeof(Code) == 1) {
    const int rounded = min(max(__float2int_rn(value / scale), -127), 127);
    *code = static_cast<Code>(rounded);
    return static_cast<float>(rounded) * scale;
  } else {
    *code = from_float<Code>(value);
    return to_float(*code);
  }
}

// One warp a query: the codes the scan multiplies, and the factors of its certificate.
template <class Code>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_queries(const float* queries, int64_t query_stride, int num_queries, int dim, Code* codes,
                    int64_t code_stride, float* query_scale, float* error_residual, float* error_norm) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * (kPrepareThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= num_queries) return;
  const float* q = queries + row * query_stride;
  Code* code = codes + row * code_stride;
  float largest = 0;
  bool finite = true;
  for (int i = lane; i < dim; i += 32) {
    largest = fmaxf(largest, fabsf(q[i]));
    finite = finite && fabsf(q[i]) <= FLT_MAX;
  }
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  finite = __all_sync(0xffffffffu, finite) != 0;
  const float scale = sizeof(Code) == 1 && finite && largest > 0 ? largest / 127.0f : 1.0f;
  float norm = 0, code_norm = 0, residual = 0;
  for (int i = lane; i < dim; i += 32) {
    const float value = finite ? q[i] : 0.0f;
    const float approximate = quantised(value, scale, code + i);
    norm = __fmaf_rn(value, value, norm);
    code_norm = __fmaf_rn(approximate, approximate, code_norm);
    residual = __fmaf_rn(value - approximate, value - approximate, residual);
  }
  for (int step = 16; step > 0; step /= 2) {
    norm += __shfl_xor_sync(0xffffffffu, norm, step);
    code_norm += __shfl_xor_sync(0xffffffffu, code_norm, step);
    residual += __shfl_xor_sync(0xffffffffu, residual, step);
  }
  if (lane == 0) {
    // Rounding: of the norms here, of the scan's sums and of the float32 scores that are compared (each at
    // most dim roundings of 2^-24; tensor cores align before adding, hence the factor two).
    const float slack = (2.0f * static_cast<float>(dim) + 32.0f) * 1.2e-7f;
    norm = sqrtf(norm) * (1.0f + slack);
    code_norm = sqrtf(code_norm) * (1.0f + slack);
    residual = sqrtf(residual) * (1.0f + slack);
    query_scale[row] = scale;
    error_residual[row] = finite ? code_norm * (1.0f + slack) : INFINITY;
    error_norm[row] = finite ? residual + slack * (norm + code_norm) : INFINITY;
  }
}

struct Plan {
  const ScanVariant* variant;
  ScanPlan shape;
  int blocks_per_multiprocessor;
};

const ScanVariant* variants_of(ScanDtype dtype) {
  switch (dtype) {
    case ScanDtype::kFloat32:
      return scan_variants_f32();
    case ScanDtype::kBFloat16:
      return scan_variants_bf16();
    case ScanDtype::kFloat16:
      return scan_variants_f16();
    case ScanDtype::kInt8:
      return scan_variants_int8();
  }
  throw std::invalid_argument("mips_topk: unknown dtype");
}

int element_bytes(ScanDtype dtype) {
  return dtype == ScanDtype::kFloat32 ? 4 : dtype == ScanDtype::kInt8 ? 1 : 2;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

bool is_aligned(const void* p, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, "mips_topk") +
         device_attribute(cudaDevAttrComputeCapabilityMinor, "mips_topk");
}

// What keeps this call from the wgmma scan; nullptr: nothing.
const char* wgmma_obstacle(const MipsTopkCuda& call) {
  const int64_t size = element_bytes(call.dtype);
  const auto usable = [&](const void* rows, int64_t stride) {
    return is_aligned(rows, stride * size) && stride >= call.dim;
  };
  if (compute_capability() != 90) return "it needs compute capability 9.0";
  if (call.dtype != ScanDtype::kBFloat16 && call.dtype != ScanDtype::kFloat16) {
    return "it takes bfloat16 and float16";
  }
  if (call.dim < 1 || call.dim * size > kWgmmaMaxSlabs * kSlabBytes) return "it takes D from 1 to 128";
  if (call.num_blocks >= int64_t{1} << 31) return "it takes fewer than 2^31 blocks";
  if (!usable(call.blocks, call.block_stride) ||
      (call.originals == nullptr && !usable(call.queries, call.query_stride))) {
    return "its rows must not overlap and start at multiples of 16 bytes";
  }
  return nullptr;
}

// Above this many queries a tile's products take longer on mma.sync than its bytes take to come.
constexpr int64_t kWgmmaPaysAbove = 128;

bool takes_wgmma(const MipsTopkCuda& call) {
  if (call.kernel == ScanKernel::kMma) return false;
  if (call.kernel == ScanKernel::kAuto && call.num_queries <= kWgmmaPaysAbove) return false;
  const char* obstacle = wgmma_obstacle(call);
  if (obstacle != nullptr && call.kernel == ScanKernel::kWgmma) {
    throw std::invalid_argument(std::string("mips_topk: the wgmma scan cannot be used: ") + obstacle);
  }
  return obstacle == nullptr;
}

size_t shared_limit() {
  return static_cast<size_t>(
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "mips_topk: shared memory per block"));
}
int slabs_of(int row_bytes) { return std::max((row_bytes + kSlabBytes - 1) / kSlabBytes, 1); }

// As many rows a chunk as fit, the chunks even.
Plan make_wgmma_plan(ScanDtype dtype, int64_t num_queries, int dim) {
  ScanPlan shape{};
  shape.row_bytes = dim * element_bytes(dtype);
  shape.num_slabs = slabs_of(shape.row_bytes);
  shape.resident = 1;
  const ScanVariant* variant = scan_variants_wgmma(dtype) + shape.num_slabs - 1;
  const auto fits = [&](int64_t rows) {
    shape.chunk_rows = static_cast<int>(rows);
    variant->set_layout(shape);
    return static_cast<size_t>(shape.shared_bytes) <= shared_limit();
  };
  int64_t rows = std::min<int64_t>(round_up(num_queries, variant->rows), kMaxChunkRows);
  while (rows > variant->rows && !fits(rows)) rows -= variant->rows;
  shape.num_chunks = static_cast<int>((num_queries + rows - 1) / rows);
  if (!fits(round_up((num_queries + shape.num_chunks - 1) / shape.num_chunks, variant->rows))) {
    throw std::invalid_argument("mips_topk: this GPU has too little shared memory per thread block");
  }
  return {variant, shape, variant->blocks_per_multiprocessor(0)};
}

// How the queries and the ring share the shared memory: first as many query rows as fit beside a ring deep
// enough, so that the index is fetched as few times as can be; queries that do not fit at all ride in the
// ring.
Plan make_plan(ScanDtype dtype, int64_t num_queries, int dim) {
  const ScanVariant* variants = variants_of(dtype);
  const ScanVariant* variant = num_queries <= variants[0].rows ? &variants[0] : &variants[1];
  const size_t limit = shared_limit();
  const auto per_multiprocessor = static_cast<size_t>(
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, "mips_topk: shared memory"));
  ScanPlan shape{};
  shape.row_bytes = dim * element_bytes(dtype);
  shape.num_slabs = slabs_of(shape.row_bytes);
  const auto shared_bytes = [&](int stages) {
    shape.stages = stages;
    variant->set_layout(shape);
    return static_cast<size_t>(shape.shared_bytes);
  };
  const auto chosen = [&] {
    Plan plan{variant, shape, 0};
    plan.shape.num_chunks = static_cast<int>((num_queries + shape.chunk_rows - 1) / shape.chunk_rows);
    plan.blocks_per_multiprocessor =
        std::clamp(variant->blocks_per_multiprocessor(static_cast<size_t>(shape.shared_bytes)), 1, 2);
    return plan;
  };
  // A ring of three or four stages: four, unless only three let a second thread block in.
  const auto pick_ring = [&] {
    const auto together = [&](size_t bytes) {
      return bytes <= limit ? std::min<size_t>(per_multiprocessor / (bytes + 1024), 2) : 0;
    };
    const int stages = together(shared_bytes(4)) >= together(shared_bytes(3)) ? 4 : 3;
    return shared_bytes(stages) <= limit;
  };
  shape.resident = 1;
  const int64_t most_groups =
      std::min<int64_t>((num_queries + variant->rows - 1) / variant->rows, kMaxChunkRows / variant->rows);
  for (int64_t groups = most_groups; groups > 1; --groups) {
    shape.chunk_rows = static_cast<int>(groups * variant->rows);
    if (shared_bytes(std::max(4, shape.num_slabs + 1)) <= limit) return chosen();  // a tile and a slab more
  }
  shape.chunk_rows = variant->rows;
  if (pick_ring()) return chosen();
  shape.resident = 0;
  shape.chunk_rows = static_cast<int>(most_groups * variant->rows);
  if (pick_ring()) return chosen();
  throw std::invalid_argument("mips_topk: this GPU has too little shared memory per thread block (" +
                              std::to_string(limit) + " bytes)");
}

int num_multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount, "mips_topk: multiprocessors");
}

// Every thread block's queue: so many a multiprocessor, and one for every chunk of queries even where those
// are more.
int64_t queue_bytes(int64_t num_queries, bool wgmma) {
  const int64_t entries = wgmma ? kWgmmaQueue : kQueue;
  const int64_t least_rows = wgmma ? kWgmmaGroupRows : 16;
  const int64_t thread_blocks =
      std::max<int64_t>((wgmma ? 1 : 2) * num_multiprocessors(), (num_queries + least_rows - 1) / least_rows);
  return thread_blocks * entries * static_cast<int64_t>(kQueueEntryBytes);
}

struct Workspace {
  int64_t pass_queries, seeds, capacity;
  size_t thresholds, counts, candidates, dense, queues, codes, query_scale, error_residual, error_norm, bytes;
  int64_t code_stride;
};

Workspace lay_out(const MipsTopkCuda& call) {
  Workspace w{};
  w.pass_queries = std::min(call.num_queries, kMaxPassQueries);
  // Enough blocks for a first threshold: the rest of the scan then passes on about k / seeds of what it sees.
  const int64_t seeds = call.num_seeds > 0 ? round_up(call.num_seeds, kTileBlocks) : kMaxSeeds;
  w.seeds = std::min(call.num_blocks, seeds);
  // A row's threshold moves when its buffer is full: a small buffer lets fewer through, and each that a
  // certified scan lets through costs a read of its original.
  w.capacity = 32;
  while (w.capacity < 2 * static_cast<int64_t>(call.k)) w.capacity *= 2;
  size_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const size_t here = at;
    at += static_cast<size_t>(round_up(bytes, 256));
    return here;
  };
  w.thresholds = take(w.pass_queries * 8);
  w.counts = take(w.pass_queries * 8);
  w.candidates = take(w.pass_queries * 2 * w.capacity * 8);
  w.dense = take(w.pass_queries * w.seeds * 4);
  w.queues = take(w.seeds < call.num_blocks ? queue_bytes(w.pass_queries, takes_wgmma(call)) : 0);
  if (call.originals != nullptr) {
    w.code_stride = round_up(call.dim, 16);
    w.codes = take(w.pass_queries * w.code_stride * element_bytes(call.dtype));
    w.query_scale = take(w.pass_queries * 4);
    w.error_residual = take(w.pass_queries * 4);
    w.error_norm = take(w.pass_queries * 4);
  }
  w.bytes = at;
  return w;
}

void check_call(const MipsTopkCuda& call) {
  const auto fail = [](const std::string& text) { throw std::invalid_argument("mips_topk: " + text); };
  if (call.k < 0 || call.k > kMaxCudaK) {
    fail("k: the CUDA kernels take 0.." + std::to_string(kMaxCudaK) + ", got " + std::to_string(call.k));
  }
  if (call.num_queries < 0 || call.num_blocks < 0 || call.dim < 0) fail("a negative size");
  if (call.num_blocks >= (int64_t{1} << 32) - 1) fail("blocks: the CUDA kernels take fewer than 2^32 - 1");
  if (call.num_seeds > kMaxSeeds) fail("num_seeds: at most " + std::to_string(kMaxSeeds));
  if (call.dim > (1 << 18)) fail("D: the CUDA kernels take at most 2^18");
  if (call.originals != nullptr && call.dtype != ScanDtype::kInt8 && call.dtype != ScanDtype::kBFloat16) {
    fail("a certified scan reads bfloat16 or int8 codes");
  }
  if (call.originals == nullptr && call.dtype == ScanDtype::kInt8) fail("an int8 scan needs the originals");
  if (const int capability = compute_capability(); capability < 80) {
    fail("the CUDA kernels need compute capability 8.0 or newer, this GPU has " +
         std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
}

struct Matrix {
  const void* data;
  int64_t stride;  // elements
};

void run_scan(ScanDtype dtype, bool wgmma, Matrix queries, Matrix blocks, ScanArguments a, int num_queries,
              int dim, int64_t first, int64_t last, cudaStream_t stream) {
  if (first >= last) return;
  const Plan plan = (wgmma ? make_wgmma_plan : make_plan)(dtype, num_queries, dim);
  const int size = element_bytes(dtype);
  static_cast<ScanPlan&>(a) = plan.shape;
  a.num_queries = num_queries;
  a.first = first;
  a.last = last;
  a.queries = static_cast<const unsigned char*>(queries.data);
  a.blocks = static_cast<const unsigned char*>(blocks.data);
  a.query_stride = queries.stride * size;
  a.block_stride = blocks.stride * size;
  a.aligned = is_aligned(queries.data, a.query_stride) && is_aligned(blocks.data, a.block_stride);
  const int64_t tiles = (last - first + kTileBlocks - 1) / kTileBlocks;
  const int64_t thread_blocks = static_cast<int64_t>(num_multiprocessors()) * plan.blocks_per_multiprocessor;
  a.ranges = static_cast<int>(std::min(tiles, std::max<int64_t>(thread_blocks / a.num_chunks, 1)));
  plan.variant->launch(a, a.ranges * a.num_chunks, stream);
}

}  // namespace
}  // namespace cuda

size_t mips_topk_cuda_workspace(const MipsTopkCuda& call) {
  cuda::check_call(call);
  return cuda::lay_out(call).bytes;
}

void mips_topk_cuda(const MipsTopkCuda& call) {
  using namespace cuda;
  check_call(call);
  if (call.num_queries == 0 || call.k == 0) return;
  const Workspace w = lay_out(call);
  if (call.workspace_bytes < w.bytes || reinterpret_cast<uintptr_t>(call.workspace) % 256 != 0) {
    throw std::invalid_argument("mips_topk: workspace: needs " + std::to_string(w.bytes) +
                                " bytes at a multiple of 256, got " + std::to_string(call.workspace_bytes));
  }
  const auto stream = static_cast<cudaStream_t>(call.stream);
  auto* workspace = static_cast<unsigned char*>(call.workspace);
  const auto at = [workspace](size_t offset) { return static_cast<void*>(workspace + offset); };
  const bool certified = call.originals != nullptr;
  const bool wgmma = takes_wgmma(call);
  const int query_bytes = certified ? 4 : element_bytes(call.dtype);

  for (int64_t begin = 0; begin < call.num_queries; begin += w.pass_queries) {
    const int num_queries = static_cast<int>(std::min(w.pass_queries, call.num_queries - begin));
    ScanArguments a{};
    a.rows = {static_cast<uint64_t*>(at(w.thresholds)), static_cast<uint64_t*>(at(w.counts)),
              static_cast<uint64_t*>(at(w.candidates)), static_cast<int>(w.capacity), call.k};
    a.queues = workspace + w.queues;
    a.exclude_ids = call.exclude_ids == nullptr ? nullptr : call.exclude_ids + begin * call.exclude_width;
    a.exclude_width = call.exclude_ids == nullptr ? 0 : call.exclude_width;
    const Matrix queries{
        static_cast<const unsigned char*>(call.queries) + begin * call.query_stride * query_bytes,
        call.query_stride};
    check(cudaMemsetAsync(workspace, 0, w.dense, stream), "mips_topk: clearing the workspace");

    // 1. The first blocks, all scores: the rows' first candidates and thresholds.
    ScanArguments seed = a;
    seed.dense = static_cast<float*>(at(w.dense));
    seed.dense_stride = w.seeds;
    const Matrix exact_blocks =
        certified ? Matrix{call.originals, call.original_stride} : Matrix{call.blocks, call.block_stride};
    run_scan(certified ? ScanDtype::kFloat32 : call.dtype, wgmma && !certified, queries, exact_blocks, seed,
             num_queries, call.dim, 0, w.seeds, stream);
    REALM_FAST_LAUNCH(select_seeds, num_queries, kSelectThreads, static_cast<size_t>(w.seeds) * sizeof(float),
                      stream, a.rows, seed.dense, w.seeds, static_cast<int>(w.seeds), a.exclude_ids,
                      a.exclude_width);
    check_launch("mips_topk: select_seeds");

    // 2. The rest, filtered.
    if (w.seeds < call.num_blocks) {
      Matrix scanned = queries;
      if (certified) {
        a.exact_queries = static_cast<const float*>(queries.data);
        a.exact_query_stride = queries.stride;
        a.originals = call.originals;
        a.original_stride = call.original_stride;
        a.dim = call.dim;
        auto* query_scale = static_cast<float*>(at(w.query_scale));
        auto* error_residual = static_cast<float*>(at(w.error_residual));
        auto* error_norm = static_cast<float*>(at(w.error_norm));
        a.query_scale = query_scale;
        a.error_residual = error_residual;
        a.error_norm = error_norm;
        a.block_scale = call.block_scale;
        a.block_residual = call.block_residual;
        a.block_norm = call.block_norm;
        a.block_bounds = call.block_bounds;
        scanned = {at(w.codes), w.code_stride};
        const int grid = (num_queries + kPrepareThreads / 32 - 1) / (kPrepareThreads / 32);
        if (call.dtype == ScanDtype::kInt8) {
          if (reinterpret_cast<uintptr_t>(call.block_scale) % 16 != 0) {
            throw std::invalid_argument("mips_topk: block_scale must start at a multiple of 16 bytes");
          }
          REALM_FAST_LAUNCH(prepare_queries<int8_t>, grid, kPrepareThreads, 0, stream, a.exact_queries,
                            a.exact_query_stride, num_queries, call.dim, static_cast<int8_t*>(at(w.codes)),
                            w.code_stride, query_scale, error_residual, error_norm);
        } else {
          REALM_FAST_LAUNCH(prepare_queries<bf16>, grid, kPrepareThreads, 0, stream, a.exact_queries,
                            a.exact_query_stride, num_queries, call.dim, static_cast<bf16*>(at(w.codes)),
                            w.code_stride, query_scale, error_residual, error_norm);
        }
        check_launch("mips_topk: prepare_queries");
      }
      run_scan(call.dtype, wgmma, scanned, {call.blocks, call.block_stride}, a, num_queries, call.dim,
               w.seeds, call.num_blocks, stream);
    }

    // 3. The row buffers, sorted.
    const size_t sort_bytes = static_cast<size_t>(w.capacity) * sizeof(uint64_t);
    REALM_FAST_LAUNCH(finish_rows, num_queries, kSelectThreads, sort_bytes, stream, a.rows,
                      call.scores + begin * call.k, call.ids + begin * call.k);
    check_launch("mips_topk: finish_rows");
  }
}

}  // namespace realm_fast
