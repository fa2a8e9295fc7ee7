// The scan on Hopper's own instructions, for many queries: rows come by the bulk copy engine, products are a
// warpgroup's (wgmma), which read shared memory by themselves. What follows a score is scan.cuh's, to the
// letter: filter, queue, row buffers, certificate.
//
// The queries of a chunk stay in shared memory beside a ring of whole tiles. A step is one group of queries
// (64 rows for each of the two warpgroups) against one tile of blocks; a thread's scores belong to two rows.
// A round is four steps in a line: each warpgroup has two sets of accumulators and starts a step's products
// before it waits for those of the step before, so that the matrix units have work while scores are compared
// and queued. What thread blocks must do together (handing the queue on, giving a stage away, taking
// thresholds over) happens once a round, when the next round's first products are under way. Products are
// never under way across the end of the loop's body: the compiler would put a wait after each of them.
#pragma once

#include "core/cuda/hopper.cuh"
#include "mips_topk/scan_variants.cuh"

namespace realm_fast::cuda {

static_assert(kWgmmaGroupRows == 2 * kWgmmaRows);
static_assert(kTileBlocks == kWgmmaColumns && kSlabBytes == kSwizzleRowBytes && kScanThreads == 256);

struct WgmmaShape {
  static constexpr int kThreadRows = 2;
  static constexpr int kThreadColumns = kWgmmaColumns / 4;

  __device__ static __forceinline__ int row(int r) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return warp * 16 + r * 8 + lane / 4;
  }
  __device__ static __forceinline__ int column(int c) {
    return c / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c % 2;
  }
};

template <class T, int kSlabs>
__global__ void __launch_bounds__(kScanThreads, 1)
    scan_wgmma(const __grid_constant__ ScanArguments a, const __grid_constant__ TensorMap query_map,
               const __grid_constant__ TensorMap block_map) {
  using S = WgmmaShape;
  constexpr int kSlabElements = kSlabBytes / static_cast<int>(sizeof(T));
  REALM_FAST_SWIZZLED_SHARED(memory);
  const int tid = static_cast<int>(threadIdx.x);
  unsigned char* const resident = memory;          // [slabs, chunk_rows, kSlabBytes]
  unsigned char* const ring = memory + a.ring_at;  // [stages, slabs, kTileBlocks, kSlabBytes]
  Flushing& state = *reinterpret_cast<Flushing*>(memory + a.state_at);
  float* const entry = reinterpret_cast<float*>(memory + a.entry_at);             // [chunk_rows]
  uint64_t* const arrived = reinterpret_cast<uint64_t*>(memory + a.barriers_at);  // [stages]
  uint64_t* const queries_arrived = arrived + a.stages;

  const auto [first_row, num_rows, begin_tile, end_tile] = share_of(a);
  // The same in the last chunk, whose rows may be few: the stages are counted for it.
  const int num_groups = a.chunk_rows / kWgmmaGroupRows;
  if (begin_tile == end_tile) return;
  const auto block_of = [&a](int tile) { return a.first + static_cast<int64_t>(tile) * kTileBlocks; };

  // By one thread: the next tile into the stage that it has to itself.
  int fetched = begin_tile, into = 0;
  const auto fetch = [&] {
    unsigned char* to = ring + into * a.stage_bytes;
    mbarrier_expect(arrived + into, a.stage_bytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      tma_load(to + slab * kTileBlocks * kSlabBytes, block_map, slab * kSlabElements,
               static_cast<int>(block_of(fetched)), arrived + into);
    }
    into = into + 1 == a.stages ? 0 : into + 1;
  };
  if (tid == 0) {
#pragma unroll 1
    for (int i = 0; i <= a.stages; ++i) mbarrier_init(arrived + i, 1);
    fence_proxy_async();
    mbarrier_expect(queries_arrived, kSlabs * num_groups * kWgmmaGroupRows * kSlabBytes);
#pragma unroll 1
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll 1
      for (int row = 0; row < num_groups * kWgmmaGroupRows; row += kWgmmaGroupRows) {
        tma_load(resident + (slab * a.chunk_rows + row) * kSlabBytes, query_map, slab * kSlabElements,
                 first_row + row, queries_arrived);
      }
    }
#pragma unroll 1
    for (; fetched < min(begin_tile + a.stages, end_tile); ++fetched) fetch();
    state.count = state.num_to_compact = 0;
  }
  if (a.dense == nullptr) {
#pragma unroll 1
    for (int row = num_rows + tid; row < a.chunk_rows; row += kScanThreads) entry[row] = INFINITY;
    take_over_thresholds<T>(a, entry, first_row, num_rows, block_of(begin_tile));
  }
  __syncthreads();
  mbarrier_wait(queries_arrived, 0);

  struct Place {
    int tile, group, stage;
    uint32_t parity;
  };
  const auto advance = [&](Place& at) {
    if (++at.group < num_groups) return;
    at.group = 0;
    ++at.tile;
    if (++at.stage < a.stages) return;
    at.stage = 0;
    at.parity ^= 1;
  };
  const auto start_products = [&](float (&acc)[kWgmmaValues], const Place& at) {
    if (at.group == 0) mbarrier_wait(arrived + at.stage, at.parity);
    const int row = at.group * kWgmmaGroupRows + tid / 128 * kWgmmaRows;
    uint64_t q = wgmma_operand(resident + row * kSlabBytes);
    uint64_t b = wgmma_operand(ring + at.stage * a.stage_bytes);
    wgmma_fence();
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < kSlabBytes / kWgmmaStepBytes; ++i) {
        wgmma<T>(acc, q + depth_step(i), b + depth_step(i), slab + i > 0);
      }
      q += static_cast<uint64_t>(a.chunk_rows * kSlabBytes) >> 4;
      b += static_cast<uint64_t>(kTileBlocks * kSlabBytes) >> 4;
    }
    wgmma_commit();
  };

  Place next{begin_tile, 0, 0, 0};
  // Starts the products of the step at `next` and moves on. Past the end of the range the last step's are
  // made once more and not looked at, so that there is one way through a round.
  const auto start = [&](float (&acc)[kWgmmaValues]) -> Place {
    const Place at = next;
    start_products(acc, at);
    advance(next);
    if (next.tile >= end_tile) next = {end_tile, at.group, at.stage, at.parity};
    return at;
  };
  bool hand_on = false, past_the_end = false;
  const auto filter = [&](const float (&acc)[kWgmmaValues], const Place& at) {
    if (at.tile == end_tile) return;
    const int64_t block = block_of(at.tile);
    const Step step{at.group * kWgmmaGroupRows, first_row, num_rows,
                    static_cast<int>(min(a.last - block, static_cast<int64_t>(kTileBlocks))), block};
    const auto value = [&](int r, int c) -> float { return acc[c / 2 * 4 + r * 2 + c % 2]; };
    if (a.dense != nullptr) {
      write_all<S>(a, step, value);
    } else if (any_reaches<S>(entry, step.group_row, value)) {
      queue_survivors<T, S>(a, state, entry, step, value, hand_on);
    }
  };

  float even[kWgmmaValues], odd[kWgmmaValues];
#pragma unroll
  for (int i = 0; i < kWgmmaValues; ++i) even[i] = odd[i] = 0;
#pragma unroll 1
  for (int round = 0; !past_the_end; ++round) {
    const Place first = start(even);
    past_the_end = first.tile == end_tile;
    // Both warpgroups are done with the round before, and so with every tile before this step's.
    hand_on = __syncthreads_or(hand_on || past_the_end) != 0 && a.dense == nullptr;
    if (tid == 0) {
#pragma unroll 1
      for (; fetched < min(first.tile + a.stages, end_tile); ++fetched) fetch();
    }
    if (hand_on) {
      flush<T>(a, state, entry, first_row, num_rows, block_of(first.tile));
      hand_on = false;
    } else if (a.dense == nullptr && refreshes_after(round)) {
      take_over_thresholds<T>(a, entry, first_row, num_rows, block_of(first.tile));
      __syncthreads();
    }
    const Place second = start(odd);
    wgmma_wait<1>(even);
    filter(even, first);
    const Place third = start(even);
    wgmma_wait<1>(odd);
    filter(odd, second);
    const Place fourth = start(odd);
    wgmma_wait<1>(even);
    filter(even, third);
    wgmma_wait<0>(odd);
    filter(odd, fourth);
  }
}

inline void set_wgmma_layout(ScanPlan& a) {
  const int groups = a.chunk_rows / kWgmmaGroupRows;
  // A round's tiles are given away when the first step after it is under way.
  a.stages = (kWgmmaRoundSteps + groups - 1) / groups + 1;
  a.stage_bytes = a.num_slabs * kTileBlocks * kSlabBytes;
  a.ring_at = a.num_slabs * a.chunk_rows * kSlabBytes;
  a.state_at = a.ring_at + a.stages * a.stage_bytes;
  a.entry_at = a.state_at + static_cast<int>(sizeof(Flushing));
  a.barriers_at = a.entry_at + a.chunk_rows * static_cast<int>(sizeof(float));
  a.shared_bytes = a.barriers_at + (a.stages + 1) * static_cast<int>(sizeof(uint64_t));
  a.queue_entries = kWgmmaQueue;
}

}  // namespace realm_fast::cuda
