// The scan: scores of every block with every query, filtered as they are made.
//
// A thread block owns a contiguous range of blocks of the corpus, cut into tiles of kTileBlocks, and a chunk
// of queries, cut into groups of kRows. Rows travel as slabs of 128 bytes through a ring of cp.async stages.
// Queries stay in shared memory when they fit ("resident": every tile is fetched once for all groups),
// otherwise their slabs ride along with the tile's. Scores never leave the registers unless they reach their
// row's threshold; those go to a queue in shared memory, and from there, when it fills or the range ends, to
// the row buffers that all thread blocks share (select.cuh), which raise the threshold.
#pragma once

#include <cfloat>

#include "core/cuda/device.cuh"
#include "mips_topk/select.cuh"

namespace realm_fast::cuda {

constexpr int kScanThreads = kSelectThreads;
constexpr int kTileBlocks = 128;
constexpr int kSlabBytes = 128;
constexpr int kFlushAt = 128;  // survivors a thread block holds back before it hands them on
constexpr int kMaxRows = 128;  // of a group
constexpr int kQueue = kFlushAt + kMaxRows * kTileBlocks;  // all scores of a step may be survivors
constexpr int kRefreshTiles = 64;  // how often thresholds of other thread blocks are taken over
constexpr int kMaxChunkRows = 512;
// A thread block's queue in global memory: keys, then rows.
constexpr size_t kQueueEntryBytes = sizeof(uint64_t) + sizeof(uint16_t);

// What the host decides from the shapes alone.
struct ScanPlan {
  int row_bytes;
  int num_slabs;
  int chunk_rows, num_chunks;
  int stages;
  int resident;  // queries stay in shared memory
  // Shared memory, in bytes (set_layout): resident queries, the ring, block scales (int8: one row a tile in
  // the ring), what a flush needs, the rows' entry scores, the barriers of copies (wgmma).
  int stage_bytes, ring_at, scales_at, state_at, entry_at, barriers_at, shared_bytes;
  int queue_entries;  // of a thread block
};

struct ScanArguments : ScanPlan {
  const unsigned char* queries;
  const unsigned char* blocks;
  int64_t query_stride, block_stride;  // bytes
  int num_queries;
  int ranges;
  int64_t first, last;  // this launch scans blocks [first, last)
  int aligned;          // every row starts at a multiple of 16 bytes: cp.async may be used
  Rows rows;
  unsigned char* queues;  // [thread blocks, queue_entries * kQueueEntryBytes]
  float*
      dense;  // if given, write all scores to dense[query * dense_stride + block - first] and filter nothing
  int64_t dense_stride;
  const int64_t* exclude_ids;
  int exclude_width;
  // the certificate; originals == nullptr: none
  const float* exact_queries;
  int64_t exact_query_stride;
  const float* originals;
  int64_t original_stride;
  int dim;
  const float* query_scale;     // [B] int8: s_q
  const float* error_residual;  // [B] the factor of |x - x~|
  const float* error_norm;      // [B] the factor of |x|
  const float* block_scale;     // [N] int8: s_x
  const float* block_residual;  // [N]
  const float* block_norm;      // [N]
  const float* block_bounds;    // [2]
};

template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;
template <class T>
constexpr bool kIsInt8 = sizeof(T) == 1;

template <class T, int kRows>
struct Shape {
  // Tensor cores: 2 x 4 warps, each 16 * kM rows by 32 blocks. FMA: 8 warps side by side, each all rows
  // by 16.
  static constexpr int kM = kIsFloat<T> ? kRows / 8 : kRows / 32;
  static constexpr int kN = 4;
  static constexpr int kThreadRows = kIsFloat<T> ? kM : 2 * kM;
  static constexpr int kThreadColumns = kIsFloat<T> ? kN : 2 * kN;

  __device__ static __forceinline__ int row(int r) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kIsFloat<T>) return r * 8 + (lane & 7);
    return warp / 4 * (kRows / 2) + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  __device__ static __forceinline__ int column(int c) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kIsFloat<T>) return warp * 16 + c * 4 + (lane >> 3);
    return warp % 4 * 32 + c / 2 * 8 + lane % 4 * 2 + c % 2;
  }
};

template <class T, int kRows>
struct Accumulators {
  using S = Shape<T, kRows>;
  using Value = std::conditional_t<kIsInt8<T>, int32_t, float>;
  static constexpr int kInner = kIsFloat<T> ? 1 : 4;
  Value v[S::kM][S::kN][kInner];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < S::kM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kN; ++n) {
#pragma unroll
        for (int i = 0; i < kInner; ++i) v[m][n][i] = 0;
      }
    }
  }
  __device__ __forceinline__ Value at(int r, int c) const {
    if constexpr (kIsFloat<T>) return v[r][c][0];
    return v[r / 2][c / 2][r % 2 * 2 + c % 2];
  }
};

// Where 16-byte chunk `chunk` of row `row` of a slab lies: chunks are permuted within a row so that the eight
// rows that ldmatrix (or eight lanes) read together fall into different banks.
__device__ __forceinline__ int slab_offset(int row, int chunk) {
  return row * kSlabBytes + ((chunk ^ (row & 7)) << 4);
}

// Fetches one slab of kCount rows, zero beyond row_bytes and beyond row_limit.
template <class T, int kCount>
__device__ __forceinline__ void fetch_slab(unsigned char* dst, const unsigned char* base, int64_t stride,
                                           int64_t first_row, int64_t row_limit, int slab, int row_bytes,
                                           bool aligned) {
  const int chunk = static_cast<int>(threadIdx.x) & 7, row = static_cast<int>(threadIdx.x) >> 3;
  const int offset = slab * kSlabBytes + chunk * 16;
  const int row_left = min(max(row_bytes - offset, 0), 16);
  const int64_t rows_left = row_limit - first_row;
  const unsigned char* src = base + (first_row + row) * stride + offset;
  unsigned char* to = dst + slab_offset(row, chunk);  // 32 rows further on the permutation is the same
  constexpr int kStep = kScanThreads / 8;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      if (kCount % kStep == 0 || row < kCount - i) {
        const int bytes = row + i < rows_left ? row_left : 0;
        cp_async16(to + i * kSlabBytes, bytes > 0 ? src + i * stride : base, bytes);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kCount && row < kCount - i; i += kStep) {
    const int bytes = row + i < rows_left ? row_left : 0;
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 16; j += static_cast<int>(sizeof(T))) {
      if (j >= bytes) continue;
      const unsigned char* p = src + i * stride + j;
      uint32_t element;
      if constexpr (sizeof(T) == 4) {
        element = *reinterpret_cast<const uint32_t*>(p);
      } else if constexpr (sizeof(T) == 2) {
        element = *reinterpret_cast<const uint16_t*>(p);
      } else {
        element = *p;
      }
      words[j / 4] |= element << (8 * (j % 4));
    }
    *reinterpret_cast<uint4*>(to + i * kSlabBytes) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Adds one slab's products: a holds the group's rows, b the tile's blocks.
template <class T, int kRows>
__device__ __forceinline__ void multiply_slab(Accumulators<T, kRows>& acc, const unsigned char* a,
                                              const unsigned char* b) {
  using S = Shape<T, kRows>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kIsFloat<T>) {
    // Each score is one chain of fused multiply-adds in the order of the dimensions, whatever the grid.
    // slab_offset(row, chunk), with what is common to a thread's rows taken out.
    const unsigned char* a_rows = a + S::row(0) * kSlabBytes;
    const unsigned char* b_rows = b + S::column(0) * kSlabBytes;
    const int a_swizzle = (S::row(0) & 7) << 4, b_swizzle = (S::column(0) & 7) << 4;
    [[maybe_unused]] constexpr int kChunks = kRows > 16 ? 1 : 2;  // unrolled
#pragma unroll kChunks
    for (int chunk = 0; chunk < 8; ++chunk) {
      float4 x[S::kN];
#pragma unroll
      for (int n = 0; n < S::kN; ++n) {
        x[n] = *reinterpret_cast<const float4*>(b_rows + n * 4 * kSlabBytes +
                                                ((chunk << 4) ^ (n % 2 * 64) ^ b_swizzle));
      }
#pragma unroll
      for (int m = 0; m < S::kM; ++m) {
        const float4 q =
            *reinterpret_cast<const float4*>(a_rows + m * 8 * kSlabBytes + ((chunk << 4) ^ a_swizzle));
#pragma unroll
        for (int n = 0; n < S::kN; ++n) {
          float sum = acc.v[m][n][0];
          sum = __fmaf_rn(q.x, x[n].x, sum);
          sum = __fmaf_rn(q.y, x[n].y, sum);
          sum = __fmaf_rn(q.z, x[n].z, sum);
          sum = __fmaf_rn(q.w, x[n].w, sum);
          acc.v[m][n][0] = sum;
        }
      }
    }
  } else {
    const int a_row = warp / 4 * (kRows / 2) + (lane & 15);
    const int b_row = warp % 4 * 32 + (lane & 7) + ((lane >> 4) << 3);
    const unsigned char* a_rows = a + a_row * kSlabBytes;
    const unsigned char* b_rows = b + b_row * kSlabBytes;
    const int a_swizzle = ((lane >> 4) ^ (a_row & 7)) << 4;
    const int b_swizzle = (((lane >> 3) & 1) ^ (b_row & 7)) << 4;
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 32 bytes of depth each
      uint32_t fa[S::kM][4], fb[S::kN / 2][4];
#pragma unroll
      for (int m = 0; m < S::kM; ++m) {
        ldmatrix_x4(fa[m], a_rows + m * 16 * kSlabBytes + (a_swizzle ^ (step << 5)));
      }
#pragma unroll
      for (int n = 0; n < S::kN / 2; ++n) {
        ldmatrix_x4(fb[n], b_rows + n * 16 * kSlabBytes + (b_swizzle ^ (step << 5)));
      }
#pragma unroll
      for (int m = 0; m < S::kM; ++m) {
#pragma unroll
        for (int n = 0; n < S::kN; ++n) {
          if constexpr (kIsInt8<T>) {
            mma_m16n8k32(acc.v[m][n], fa[m], fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]);
          } else {
            mma_m16n8k16<T>(acc.v[m][n], fa[m], fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
    }
  }
}

struct Flushing {
  uint16_t to_compact[kMaxChunkRows];
  uint32_t count, num_to_compact;  // entries of the queue, of to_compact
  SelectScratch scratch;
};
struct Queue {
  uint64_t* keys;  // [queue_entries]
  uint16_t* rows;  // [queue_entries] within the chunk; kTaken when dealt with

  __device__ __forceinline__ explicit Queue(const ScanArguments& a)
      : keys(reinterpret_cast<uint64_t*>(a.queues + blockIdx.x * (a.queue_entries * kQueueEntryBytes))),
        rows(reinterpret_cast<uint16_t*>(keys + a.queue_entries)) {}
};
// Whether thresholds are taken over after the n-th tile of a range.
__device__ __forceinline__ bool refreshes_after(int n) { return n < 4 || n % kRefreshTiles == 0; }

constexpr uint16_t kTaken = 0xffff;
constexpr uint16_t kScored = 0x8000;  // the key holds the float32 score already

__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending >= 3) {
    cp_async_wait<3>();
  } else if (pending == 2) {
    cp_async_wait<2>();
  } else if (pending == 1) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

// The float32 score, summed as the float32 scan sums it.
__device__ __forceinline__ float exact_score(const ScanArguments& a, int row, int64_t block) {
  const float* q = a.exact_queries + static_cast<int64_t>(row) * a.exact_query_stride;
  const float* x = a.originals + block * a.original_stride;
  float sum = 0;
  // All lines of the row are asked for at once; what follows then finds them in the caches.
#pragma unroll 1
  for (int i = 0; i < a.dim; i += 32) prefetch_l2(x + i);
#pragma unroll 2
  for (int i = 0; i < a.dim; ++i) sum = __fmaf_rn(q[i], x[i], sum);
  return sum;
}

// What a score must reach to be worth a place in the queue, given the row's threshold key. Blocks from
// `next_block` on are still to come: a tie with a candidate of a lower id than theirs cannot win.
template <class T>
__device__ __forceinline__ float entry_score(const ScanArguments& a, int row, uint64_t threshold,
                                             int64_t next_block) {
  if (threshold == 0) return -FLT_MAX;  // everything but -inf and NaN
  uint32_t ordered = static_cast<uint32_t>(threshold >> 32);
  if (a.originals == nullptr) {
    if (next_block > key_block(threshold))
      ++ordered;  // the next float; NaN, which nothing reaches, after +inf
    return __uint_as_float(unordered_bits(ordered));
  }
  const float error = a.error_residual[row] * a.block_bounds[0] + a.error_norm[row] * a.block_bounds[1];
  float reach = __uint_as_float(unordered_bits(ordered)) - error;
  if constexpr (kIsInt8<T>) reach /= a.query_scale[row];
  reach -= 1e-6f * fabsf(reach);               // the bound holds whichever way these few operations round
  return reach > -FLT_MAX ? reach : -FLT_MAX;  // without a bound (NaN, infinity) everything must be looked at
}

// By all threads: the rows' entry scores from the thresholds as they now stand.
template <class T>
__device__ __forceinline__ void take_over_thresholds(const ScanArguments& a, float* entry, int first_row,
                                                     int num_rows, int64_t next_block) {
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x); row < num_rows; row += kScanThreads) {
    entry[row] =
        entry_score<T>(a, first_row + row, load_relaxed(a.rows.thresholds + first_row + row), next_block);
  }
}

// By all threads: hands the queue on to the row buffers, then takes over the rows' thresholds.
template <class T>
__device__ __forceinline__ void flush(const ScanArguments& a, Flushing& state, float* entry, int first_row,
                                      int num_rows, int64_t next_block) {
  const int tid = static_cast<int>(threadIdx.x);
  const Queue queue(a);
  const int count = static_cast<int>(state.count);
  for (;;) {
    bool again = false;
#pragma unroll 1
    for (int i = tid; i < count; i += kScanThreads) {
      const uint16_t entry_row = queue.rows[i];
      if (entry_row == kTaken) continue;
      const int local_row = entry_row & ~kScored;
      const int row = first_row + local_row;
      uint64_t key = queue.keys[i];
      const uint64_t threshold = load_relaxed(a.rows.thresholds + row);
      bool wanted = key > threshold;
      if (a.originals != nullptr && !(entry_row & kScored)) {
        const int64_t block = key_block(key);
        const float error =
            a.error_residual[row] * a.block_residual[block] + a.error_norm[row] * a.block_norm[block];
        float bound = key_score(key) + error;
        bound = bound <= FLT_MAX ? bound + 1e-6f * fabsf(bound) : INFINITY;
        wanted = make_key(bound, block) > threshold;
        if (wanted) {
          const float score = exact_score(a, row, block);
          key = make_key(score, block);
          wanted = score > -INFINITY && key > threshold;
          queue.keys[i] = key;
          queue.rows[i] = static_cast<uint16_t>(local_row | kScored);
        }
      }
#pragma unroll 1
      for (int j = 0; wanted && j < a.exclude_width; ++j) {
        wanted = a.exclude_ids[static_cast<int64_t>(row) * a.exclude_width + j] != key_block(key);
      }
      Append outcome = Append::kDone;
      if (wanted) outcome = append(a.rows, row, key);
      if (outcome == Append::kDone) {
        queue.rows[i] = kTaken;
        continue;
      }
      again = true;
      if (outcome == Append::kMustCompact) {
        state.to_compact[atomicAdd(&state.num_to_compact, 1u)] = static_cast<uint16_t>(local_row);
      }
    }
    again = __syncthreads_or(again) != 0;
    const int num_to_compact = static_cast<int>(state.num_to_compact);
#pragma unroll 1
    for (int i = 0; i < num_to_compact; ++i) compact(a.rows, first_row + state.to_compact[i], state.scratch);
    if (!again) break;
    __syncthreads();
    if (tid == 0) state.num_to_compact = 0;
    if (num_to_compact == 0) pause_briefly();  // another thread block compacts
    __syncthreads();
  }
  if (tid == 0) state.count = 0;
  take_over_thresholds<T>(a, entry, first_row, num_rows, next_block);
  __syncthreads();
}

// A thread block's chunk of queries and range of tiles. Neighbouring thread blocks share a range and differ
// in the chunk, so that the L2 cache serves all but one.
struct Share {
  int first_row, num_rows, begin_tile, end_tile;
};
__device__ __forceinline__ Share share_of(const ScanArguments& a) {
  const int range = static_cast<int>(blockIdx.x) / a.num_chunks;
  const int first_row = static_cast<int>(blockIdx.x) % a.num_chunks * a.chunk_rows;
  const int64_t all_tiles = (a.last - a.first + kTileBlocks - 1) / kTileBlocks;
  return {first_row, min(a.num_queries - first_row, a.chunk_rows),
          static_cast<int>(all_tiles * range / a.ranges),
          static_cast<int>(all_tiles * (range + 1) / a.ranges)};
}

// One group's scores of one tile.
struct Step {
  int group_row;  // the group's first row within the chunk
  int first_row;  // the chunk's
  int num_rows;   // of the chunk
  int tile_columns;
  int64_t first_block;
};

// A thread's scores are value(r, c), of row S::row(r) and column S::column(c). All of them, to a.dense.
template <class S, class Value>
__device__ __forceinline__ void write_all(const ScanArguments& a, const Step& step, const Value& value) {
#pragma unroll
  for (int r = 0; r < S::kThreadRows; ++r) {
    const int row = step.group_row + S::row(r);
    float* to = a.dense + (step.first_row + row) * a.dense_stride + (step.first_block - a.first);
#pragma unroll
    for (int c = 0; c < S::kThreadColumns; ++c) {
      if (row < step.num_rows && S::column(c) < step.tile_columns) to[S::column(c)] = value(r, c);
    }
  }
}

// Whether any reaches its row's entry score; padding may.
template <class S, class Value>
__device__ __forceinline__ bool any_reaches(const float* entry, int group_row, const Value& value) {
  bool survivors = false;
#pragma unroll
  for (int r = 0; r < S::kThreadRows; ++r) {
    float best = value(r, 0);
#pragma unroll
    for (int c = 1; c < S::kThreadColumns; ++c) best = fmaxf(best, value(r, c));
    survivors = survivors || best >= entry[group_row + S::row(r)];
  }
  return survivors;
}

// Puts those that do into the queue; sets hand_on when the queue is full enough to be handed on.
template <class T, class S, class Value>
__device__ __forceinline__ void queue_survivors(const ScanArguments& a, Flushing& state, const float* entry,
                                                const Step& step, const Value& value, bool& hand_on) {
  uint64_t hits = 0;
#pragma unroll
  for (int r = 0; r < S::kThreadRows; ++r) {
    const float least = entry[step.group_row + S::row(r)];
#pragma unroll
    for (int c = 0; c < S::kThreadColumns; ++c) {
      if (value(r, c) >= least && S::column(c) < step.tile_columns) {
        hits |= uint64_t{1} << (r * S::kThreadColumns + c);
      }
    }
  }
  const Queue queue(a);
#pragma unroll 1
  while (hits != 0) {
    const int hit = __ffsll(static_cast<long long>(hits)) - 1;
    hits &= hits - 1;
    float score = 0;
#pragma unroll
    for (int i = 0; i < S::kThreadRows * S::kThreadColumns; ++i) {  // registers have no addresses
      if (i == hit) score = value(i / S::kThreadColumns, i % S::kThreadColumns);
    }
    const int row = step.group_row + S::row(hit / S::kThreadColumns);
    if constexpr (kIsInt8<T>) score *= a.query_scale[step.first_row + row];
    const uint32_t place = atomicAdd(&state.count, 1u);
    queue.keys[place] = make_key(score, step.first_block + S::column(hit % S::kThreadColumns));
    queue.rows[place] = static_cast<uint16_t>(row);
    hand_on = hand_on || place + 1 >= kFlushAt;
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kScanThreads, 2) scan(const __grid_constant__ ScanArguments a) {
  using S = Shape<T, kRows>;
  REALM_FAST_DYNAMIC_SHARED(memory);
  const int tid = static_cast<int>(threadIdx.x);

  const int tile_bytes = kTileBlocks * kSlabBytes;
  unsigned char* const resident = memory;
  unsigned char* const ring = memory + a.ring_at;
  float* const scales = reinterpret_cast<float*>(memory + a.scales_at);  // [stages + 1, kTileBlocks]
  Flushing& state = *reinterpret_cast<Flushing*>(memory + a.state_at);
  float* const entry = reinterpret_cast<float*>(memory + a.entry_at);  // [chunk_rows]

  const auto [first_row, num_rows, begin_tile, end_tile] = share_of(a);
  const int num_groups = (num_rows + kRows - 1) / kRows;
  if (begin_tile == end_tile) return;
  const auto block_of = [&a](int tile) { return a.first + static_cast<int64_t>(tile) * kTileBlocks; };

  // What the ring fetches next.
  int fetch_tile = begin_tile, fetch_group = 0, fetch_slab_index = 0;
  const auto fetch = [&](int into) {
    if (fetch_tile < end_tile) {
      unsigned char* stage = ring + into * a.stage_bytes;
      const int64_t block = block_of(fetch_tile);
      fetch_slab<T, kTileBlocks>(stage, a.blocks, a.block_stride, block, a.last, fetch_slab_index,
                                 a.row_bytes, a.aligned);
      if (!a.resident) {
        fetch_slab<T, kRows>(stage + tile_bytes, a.queries, a.query_stride, first_row + fetch_group * kRows,
                             first_row + num_rows, fetch_slab_index, a.row_bytes, a.aligned);
      }
      if constexpr (kIsInt8<T>) {
        if (fetch_slab_index == 0 && fetch_group == 0 && tid < kTileBlocks / 4) {
          const int64_t left = a.last - block - 4 * tid;
          const int bytes = left >= 4 ? 16 : left > 0 ? static_cast<int>(left) * 4 : 0;
          cp_async16(scales + fetch_tile % (a.stages + 1) * kTileBlocks + 4 * tid,
                     bytes > 0 ? a.block_scale + block + 4 * tid : a.block_scale, bytes);
        }
      }
      if (++fetch_slab_index == a.num_slabs) {
        fetch_slab_index = 0;
        if (a.resident || ++fetch_group == num_groups) {
          fetch_group = 0;
          ++fetch_tile;
        }
      }
    }
    cp_async_commit();  // an empty group past the end keeps the count of groups simple
  };

  if (a.resident) {
#pragma unroll 1
    for (int slab = 0; slab < a.num_slabs; ++slab) {
#pragma unroll 1
      for (int row = 0; row < a.chunk_rows; row += kRows) {
        fetch_slab<T, kRows>(resident + (slab * a.chunk_rows + row) * kSlabBytes, a.queries, a.query_stride,
                             first_row + row, first_row + num_rows, slab, a.row_bytes, a.aligned);
      }
    }
  }
#pragma unroll 1
  for (int i = 0; i < a.stages - 1; ++i) fetch(i);
  if (tid == 0) state.count = state.num_to_compact = 0;
  if (a.dense == nullptr) {
#pragma unroll 1
    for (int row = num_rows + tid; row < a.chunk_rows; row += kScanThreads) entry[row] = INFINITY;
    take_over_thresholds<T>(a, entry, first_row, num_rows, block_of(begin_tile));
  }

  // With several resident groups a tile's slabs stay in the ring until the last group has used them: the
  // first group waits for them, the last one fetches on.
  const bool tile_stays = a.resident && num_groups > 1;
  const auto wait_for_slab = [&](int slab) { wait_for_copies(a.stages - 2 - (tile_stays ? slab : 0)); };
  int tile_stage = 0;  // of the tile's first slab
  Accumulators<T, kRows> acc;
  wait_for_slab(0);
  __syncthreads();

#pragma unroll 1
  for (int tile = begin_tile; tile < end_tile; ++tile) {
    const int tile_columns =
        static_cast<int>(min(a.last - block_of(tile), static_cast<int64_t>(kTileBlocks)));
#pragma unroll 1
    for (int group = 0; group < num_groups; ++group) {
      const int group_row = group * kRows;
      acc.clear();
      int stage = tile_stage;
#pragma unroll 1
      for (int slab = 0; slab < a.num_slabs; ++slab) {
        if (slab > 0 && (group == 0 || !tile_stays)) {
          wait_for_slab(slab);
          __syncthreads();
        } else if (slab > 0 && group == num_groups - 1) {
          __syncthreads();  // before the stage of the slab before is given away
        }
        if (!tile_stays || group == num_groups - 1) fetch(stage == 0 ? a.stages - 1 : stage - 1);
        const unsigned char* b = ring + stage * a.stage_bytes;
        const unsigned char* q =
            a.resident ? resident + (slab * a.chunk_rows + group_row) * kSlabBytes : b + tile_bytes;
        multiply_slab<T, kRows>(acc, q, b);
        stage = stage + 1 == a.stages ? 0 : stage + 1;
      }
      if (!tile_stays || group == num_groups - 1) tile_stage = stage;

      const float* tile_scales = scales + tile % (a.stages + 1) * kTileBlocks;
      const auto value = [&](int r, int c) -> float {
        if constexpr (kIsInt8<T>) return static_cast<float>(acc.at(r, c)) * tile_scales[S::column(c)];
        return acc.at(r, c);
      };
      const Step step{group_row, first_row, num_rows, tile_columns, block_of(tile)};
      bool survivors = false;
      if (a.dense != nullptr) {
        write_all<S>(a, step, value);
      } else {
        survivors = any_reaches<S>(entry, group_row, value);
      }
      // Into the queue. The barrier is also the one the next slab needs, so that it costs nothing when there
      // is nothing to hand on.
      bool hand_on = a.dense == nullptr && tile + 1 == end_tile && group == num_groups - 1;
      if (survivors) queue_survivors<T, S>(a, state, entry, step, value, hand_on);
      if (!tile_stays || group == num_groups - 1) wait_for_slab(0);
      if (__syncthreads_or(hand_on)) flush<T>(a, state, entry, first_row, num_rows, block_of(tile));
    }
    if (a.dense == nullptr && refreshes_after(tile - begin_tile)) {
      // Take over what other thread blocks have raised. All are past the last barrier, so nobody reads.
      take_over_thresholds<T>(a, entry, first_row, num_rows, block_of(tile + 1));
      __syncthreads();
    }
  }
}

template <class T, int kRows>
void set_layout(ScanPlan& a) {
  a.stage_bytes = (kTileBlocks + (a.resident ? 0 : kRows)) * kSlabBytes;
  a.ring_at = a.resident ? a.num_slabs * a.chunk_rows * kSlabBytes : 0;
  a.scales_at = a.ring_at + a.stages * a.stage_bytes;
  a.state_at =
      a.scales_at + (kIsInt8<T> ? (a.stages + 1) * kTileBlocks * static_cast<int>(sizeof(float)) : 0);
  a.entry_at = a.state_at + static_cast<int>(sizeof(Flushing));
  a.shared_bytes = a.entry_at + a.chunk_rows * static_cast<int>(sizeof(float));
  a.queue_entries = kQueue;
}

}  // namespace realm_fast::cuda
