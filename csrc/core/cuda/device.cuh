// What kernels share: the few PTX instructions they use, wrapped once, and the words that hide whether a
// source is compiled by nvcc or by the host compiler.
//
// Under nvcc the wrappers are inline PTX. With REALM_FAST_SIMT defined the same sources are compiled as
// plain C++ and run on the CPU by the harness in tests/simt, which brings the emulation of every wrapper
// (and of threadIdx, __syncthreads, shuffles, atomics and so on). A kernel therefore
//   - declares shared memory with REALM_FAST_SHARED / REALM_FAST_DYNAMIC_SHARED,
//   - is launched with REALM_FAST_LAUNCH,
//   - uses PTX only through this header (and hopper.cuh, for what only sm_90a has).
#pragma once

#include <cstdint>

#ifdef REALM_FAST_SIMT

#include "simt.h"

#define REALM_FAST_SHARED(type, name, count) \
  type* const name = static_cast<type*>(::simt::static_shared(__FILE__, __LINE__, sizeof(type) * (count)))
#define REALM_FAST_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()
#define REALM_FAST_SWIZZLED_SHARED(name) REALM_FAST_DYNAMIC_SHARED(name)
#define REALM_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                               \
  ((void)(stream), ::simt::launch(#kernel, ::simt::dim3_of(grid), ::simt::dim3_of(block), shared_bytes, \
                                  [=] { (kernel)(__VA_ARGS__); }))

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define REALM_FAST_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define REALM_FAST_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// At a multiple of 1024 bytes; an array of its own name, because one name has one alignment.
#define REALM_FAST_SWIZZLED_SHARED(name)                      \
  extern __shared__ __align__(1024) unsigned char swizzled[]; \
  unsigned char* const name = swizzled
#define REALM_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

#endif

namespace realm_fast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// Floats as unsigned integers of the same order; every finite or infinite float maps above 0.
__host__ __device__ __forceinline__ uint32_t ordered_bits(uint32_t bits) {
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}
__host__ __device__ __forceinline__ uint32_t unordered_bits(uint32_t ordered) {
  return (ordered & 0x80000000u) ? (ordered & 0x7fffffffu) : ~ordered;
}

#ifdef REALM_FAST_SIMT

using ::simt::cp_async16;
using ::simt::cp_async_commit;
using ::simt::cp_async_wait;
using ::simt::ldmatrix_x4;
using ::simt::load_relaxed;
using ::simt::mma_m16n8k16;
using ::simt::mma_m16n8k32;
using ::simt::pause_briefly;
using ::simt::prefetch_l2;
using ::simt::store_relaxed;

#else

// Copies 16 bytes from global to shared memory without passing registers: the first `bytes` (0..16) from
// src, zeros for the rest. Both addresses must be multiples of 16.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, int bytes) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(dst));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(src), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `kPending` of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned); r[i] receives elements (lane / 4, 2 * (lane % 4) .. + 1) of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// d[16x8] += a[16x16] * b[16x8]; with g = lane / 4 and t = lane % 4:
//   a[0]: row g,     columns 2t, 2t+1     a[1]: row g + 8, the same columns
//   a[2]: row g,     columns 2t+8, 2t+9   a[3]: row g + 8, the same columns
//   b[0]: rows 2t, 2t+1 of column g       b[1]: rows 2t+8, 2t+9 of column g
//   d[0], d[1]: row g, columns 2t, 2t+1   d[2], d[3]: row g + 8, the same columns
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16x8] += a[16x32] * b[32x8] on signed bytes; the fragments hold the bytes 4t..4t+3 and 16+4t..16+4t+3
// where the 16-bit product holds elements 2t, 2t+1 and 2t+8, 2t+9.
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Loads and stores that other thread blocks see whole and that no L1 cache answers.
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];\n" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;\n" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p));
}
// For loops that wait for another thread block.
__device__ __forceinline__ void pause_briefly() { __nanosleep(64); }

#endif

}  // namespace realm_fast::cuda
