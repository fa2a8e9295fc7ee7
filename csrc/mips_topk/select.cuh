// Selection: keys, the k-th largest of many, the row buffers that all thread blocks share.
//
// A candidate is one 64-bit key: the score's ordered bits above, the complement of the block's id below. Keys
// are distinct, the larger key is the better candidate, and among equal scores the lower id wins; 0 is empty.
//
// Each row (query) has a count word (epoch << 32 | entries) and two buffers of `capacity` keys, of which
// buffer epoch % 2 is in use. Appending takes a place with one atomicAdd and stores the key there. Who draws
// place `capacity` exactly compacts: waits until every place is filled, moves the k best into the other
// buffer, empties this one, publishes the k-th best as the row's threshold and only then the new count.
// Others who draw a place past the end try again later. Nobody waits while holding anything, so blocks cannot
// wait for one another in a circle.
#pragma once

#include "core/cuda/device.cuh"

namespace realm_fast::cuda {

constexpr int kSelectThreads = 256;

// Adding +0 turns -0 into +0: the two are one score, and the lower id must win.
__device__ __forceinline__ uint64_t make_key(float score, int64_t block) {
  const uint32_t ordered = ordered_bits(__float_as_uint(score + 0.0f));
  return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(block));
}
__device__ __forceinline__ float key_score(uint64_t key) {
  return __uint_as_float(unordered_bits(static_cast<uint32_t>(key >> 32)));
}
__device__ __forceinline__ int64_t key_block(uint64_t key) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key));
}

struct SelectScratch {
  uint32_t histogram[256];
  uint32_t digit, need, in_bin, cursor;
};

// A bound such that exactly min(k, number of non-empty keys) of key(0..n-1) are >= it, found digit by digit
// from the top, by all kSelectThreads threads. `key` must give the same values in every pass.
template <class Key>
__device__ __forceinline__ uint64_t select_bound(Key key, int n, int k, SelectScratch& s) {
  const int tid = static_cast<int>(threadIdx.x);
  uint64_t prefix = 0;  // the digits found so far
  uint32_t need = static_cast<uint32_t>(k);
#pragma unroll 1
  for (int shift = 56; shift >= 0; shift -= 8) {
#pragma unroll 1
    for (int i = tid; i < 256; i += kSelectThreads) s.histogram[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < n; i += kSelectThreads) {
      const uint64_t candidate = key(i);
      if (candidate != 0 && (shift == 56 || (candidate >> (shift + 8)) == prefix)) {
        atomicAdd(&s.histogram[(candidate >> shift) & 255], 1u);
      }
    }
    __syncthreads();
    if (tid < 32) {
      // Lane l looks at the eight digits 255 - 8l and below.
      uint32_t sum = 0;
#pragma unroll 1
      for (int j = 0; j < 8; ++j) sum += s.histogram[255 - 8 * tid - j];
      uint32_t before = sum;
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, before, step);
        if (tid >= step) before += other;
      }
      const uint32_t total = __shfl_sync(0xffffffffu, before, 31);
      before -= sum;
      if (total < need) {
        if (tid == 0) s.digit = 256;  // fewer than k: take all
      } else if (before < need && need <= before + sum) {
#pragma unroll 1
        for (int j = 0; j < 8; ++j) {
          const uint32_t here = s.histogram[255 - 8 * tid - j];
          if (need <= before + here) {
            s.digit = static_cast<uint32_t>(255 - 8 * tid - j);
            s.need = need - before;
            s.in_bin = here;
            break;
          }
          before += here;
        }
      }
    }
    __syncthreads();
    if (s.digit == 256) return 1;
    prefix = (prefix << 8) | s.digit;
    need = s.need;
    if (s.in_bin == need) return (prefix << shift) > 0 ? prefix << shift : 1;
  }
  return prefix;
}

struct Rows {
  uint64_t* thresholds;  // [B] a key that k candidates reach; 0 = none yet
  uint64_t* counts;      // [B] epoch << 32 | entries
  uint64_t* candidates;  // [B, 2, capacity]
  int capacity;          // a power of two > k
  int k;

  __device__ __forceinline__ uint64_t* buffer(int row, uint64_t epoch) const {
    return candidates +
           (2 * row + static_cast<int>(epoch & 1)) * capacity;  // a pass has few rows: 32 bits do
  }
};

enum class Append { kDone, kMustCompact, kTryAgain };

__device__ __forceinline__ Append append(const Rows& rows, int row, uint64_t key) {
  const uint64_t old = atomicAdd(reinterpret_cast<unsigned long long*>(rows.counts + row), 1ull);
  const uint32_t place = static_cast<uint32_t>(old);
  if (place < static_cast<uint32_t>(rows.capacity)) {
    __threadfence();  // after the count that emptied this buffer
    store_relaxed(rows.buffer(row, old >> 32) + place, key);
    return Append::kDone;
  }
  return place == static_cast<uint32_t>(rows.capacity) ? Append::kMustCompact : Append::kTryAgain;
}

// By all threads of one block, the one that drew the place past the end.
__device__ __forceinline__ void compact(const Rows& rows, int row, SelectScratch& s) {
  const int tid = static_cast<int>(threadIdx.x);
  const uint64_t epoch = load_relaxed(rows.counts + row) >> 32;
  uint64_t* from = rows.buffer(row, epoch);
  uint64_t* to = rows.buffer(row, epoch + 1);
#pragma unroll 1
  for (int i = tid; i < rows.capacity; i += kSelectThreads) {
    while (load_relaxed(from + i) == 0) pause_briefly();  // its owner has the place and is about to store
  }
  if (tid == 0) s.cursor = 0;
  const uint64_t bound =
      select_bound([&](int i) { return load_relaxed(from + i); }, rows.capacity, rows.k, s);
#pragma unroll 1
  for (int i = tid; i < rows.capacity; i += kSelectThreads) {
    const uint64_t key = load_relaxed(from + i);
    if (key >= bound) store_relaxed(to + atomicAdd(&s.cursor, 1u), key);
    store_relaxed(from + i, uint64_t{0});
  }
  __threadfence();
  __syncthreads();
  if (tid == 0) {
    store_relaxed(rows.thresholds + row, bound);
    __threadfence();
    atomicExch(reinterpret_cast<unsigned long long*>(rows.counts + row),
               static_cast<unsigned long long>(((epoch + 1) << 32) | static_cast<uint32_t>(rows.k)));
  }
}

}  // namespace realm_fast::cuda
