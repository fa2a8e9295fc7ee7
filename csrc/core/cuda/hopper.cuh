// What only Hopper (sm_90a) has, wrapped as device.cuh wraps the rest: barriers in shared memory that count
// bytes, bulk copies of boxes of a matrix, and matrix products of a whole warpgroup (four warps) that read
// shared memory by themselves. Only sources named *_sm90a.cu include this.
#pragma once

#include "core/cuda/device.cuh"

#ifndef REALM_FAST_SIMT
#include <cuda.h>  // CUtensorMap; nothing of the driver is linked
#endif

namespace realm_fast::cuda {

// A warpgroup's product is 64 rows by 128 columns and, a step, 32 bytes deep.
constexpr int kWgmmaRows = 64;
constexpr int kWgmmaColumns = 128;
constexpr int kWgmmaValues = kWgmmaRows * kWgmmaColumns / 128;  // a thread
constexpr int kWgmmaStepBytes = 32;
// Operands lie in rows of 128 bytes whose 16-byte chunks are permuted by the row's number modulo 8, which
// is how a box with 128-byte swizzling lands at a multiple of 1024 bytes.
constexpr int kSwizzleRowBytes = 128;
constexpr int kSwizzleAlignment = 8 * kSwizzleRowBytes;

#ifdef REALM_FAST_SIMT

using ::simt::fence_proxy_async;
using ::simt::mbarrier_expect;
using ::simt::mbarrier_init;
using ::simt::mbarrier_wait;
using ::simt::shared_address;
using ::simt::TensorMap;
using ::simt::tma_load;
using ::simt::wgmma;
using ::simt::wgmma_commit;
using ::simt::wgmma_fence;
using ::simt::wgmma_wait;

#else

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A phase of the barrier ends when `count` arrivals were made and all bytes expected have come.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// Arrives, and makes the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity (the first phase has parity 0).
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes this thread's accesses to shared memory, barrier initialisation included, known to what the copy
// engine and the matrix units do after it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Starts copying the map's box at (column, row) to shared memory, zeros where it reaches past the matrix;
// the box's bytes, all of them, are reported to the barrier as they land.
__device__ __forceinline__ void tma_load(void* dst, const TensorMap& map, int column, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];\n" ::"r"(shared_address(dst)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Orders this warpgroup's own accesses to accumulators before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

#define REALM_FAST_8(c, d, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define REALM_FAST_64(c, d)                                                                     \
  REALM_FAST_8(c, d, 0), REALM_FAST_8(c, d, 8), REALM_FAST_8(c, d, 16), REALM_FAST_8(c, d, 24), \
      REALM_FAST_8(c, d, 32), REALM_FAST_8(c, d, 40), REALM_FAST_8(c, d, 48), REALM_FAST_8(c, d, 56)
#define REALM_FAST_64_REGISTERS                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"    \
  "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// Waits until at most kPending committed groups are under way. d, whose group is thereby done, is named so
// that the compiler reads it no earlier.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(float (&d)[kWgmmaValues]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;\n" : REALM_FAST_64("+f", d) : "n"(kPending) : "memory");
}

// d[64x128] = (accumulate ? d : 0) + a[64x16] * b[128x16]^T, asynchronously; a and b are descriptors
// (wgmma_operand). Of a warpgroup's warp w, with g = lane / 4 and t = lane % 4:
//   d[4j], d[4j+1]: row 16w + g, columns 8j + 2t, 8j + 2t + 1     d[4j+2], d[4j+3]: row 16w + g + 8
template <class T>
__device__ __forceinline__ void wgmma(float (&d)[kWgmmaValues], uint64_t a, uint64_t b, bool accumulate);
#define REALM_FAST_WGMMA(type, name)                                                             \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma<type>(float (&d)[kWgmmaValues], uint64_t a, uint64_t b,  \
                                              bool accumulate) {                                 \
    asm volatile(                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " " REALM_FAST_64_REGISTERS \
        ", %64, %65, p, 1, 1, 0, 0;\n}\n"                                                        \
        : REALM_FAST_64("+f", d)                                                                 \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
  }
REALM_FAST_WGMMA(bf16, "bf16")
REALM_FAST_WGMMA(f16, "f16")
#undef REALM_FAST_WGMMA
#undef REALM_FAST_64_REGISTERS
#undef REALM_FAST_64
#undef REALM_FAST_8

#endif

// The descriptor of an operand whose first row starts at `rows`: the start, the distance of groups of eight
// rows, 128-byte swizzling; the other distance has no meaning here. Adding depth_step(n) moves it n products
// along the rows, of which the chunks' permutation, a function of the address, knows nothing.
__device__ __forceinline__ uint64_t wgmma_operand(const void* rows) {
  constexpr uint64_t kRowGroups = kSwizzleAlignment >> 4, kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address(rows) & 0x3ffff) >> 4) | (uint64_t{1} << 16) |
         (kRowGroups << 32) | (kSwizzle128 << 62);
}
__device__ __forceinline__ constexpr uint64_t depth_step(int n) {
  return static_cast<uint64_t>(n * kWgmmaStepBytes) >> 4;
}

}  // namespace realm_fast::cuda
