#include "core/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core/cpu.h"
#include "core/parallel.h"

namespace realm_fast::roofline {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

float add_and_multiply(int64_t iterations) {
  constexpr int kChains = 32;
  float sum[kChains];
  volatile float source = 1e-9f;  // read anew for every chain: equal chains would be computed once
  for (float& s : sum) s = source;
  const float x = source;
  for (int64_t i = 0; i < iterations; ++i) {
    for (float& s : sum) s += s * x + x;
  }
  float total = 0;
  for (const float s : sum) total += s;
  return total;
}

Loop choose_loop(Kind kind) {
  const CpuFeatures features = cpu_features();
#ifdef REALM_FAST_X86
  if (features.amx && amx_loop(kind).run != nullptr) return amx_loop(kind);
  if (kind == Kind::bfloat16 && features.avx512bf16) return avx512bf16_loop();
  if (kind == Kind::int8 && features.avx512vnni) return avx512vnni_loop();
  if (features.avx512 && avx512_loop(kind).run != nullptr) return avx512_loop(kind);
  if (features.avx2 && avx2_loop(kind).run != nullptr) return avx2_loop(kind);
#endif
  (void)features;
  return generic_loop(kind);
}

std::atomic<float> sink;  // keeps results alive

}  // namespace

Loop generic_loop(Kind kind) {
  if (kind != Kind::float32) return {nullptr, 0};
  return {add_and_multiply, 32 * 3};
}

float read_generic(const char* data, int64_t bytes) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    sum ^= word;
  }
  return static_cast<float>(sum);
}

double peak_operations_per_second(Kind kind, int threads, double seconds) {
  const Loop loop = choose_loop(kind);
  if (loop.run == nullptr) return 0;
  constexpr int64_t kIterations = 20000;
  std::atomic<int64_t> done{0};
  const auto begin = Clock::now();
  parallel_for(threads, threads, [&](int64_t, int) {
    while (seconds_since(begin) < seconds) {
      sink.store(loop.run(kIterations), std::memory_order_relaxed);
      done.fetch_add(kIterations, std::memory_order_relaxed);
    }
  });
  return static_cast<double>(done.load() * loop.operations_per_iteration) / seconds_since(begin);
}

double read_bytes_per_second(int threads, int64_t buffer_bytes, int repeats) {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t pieces = std::max<int64_t>(buffer_bytes / kPiece, threads);
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  const std::unique_ptr<char, Free> buffer(static_cast<char*>(std::aligned_alloc(1 << 21, pieces * kPiece)));
  if (buffer == nullptr) throw std::bad_alloc();
#ifdef __linux__
  madvise(buffer.get(), static_cast<size_t>(pieces * kPiece), MADV_HUGEPAGE);
#endif
  float (*read)(const char*, int64_t) = read_generic;
#ifdef REALM_FAST_X86
  const CpuFeatures features = cpu_features();
  if (features.avx2) read = read_avx2;
  if (features.avx512) read = read_avx512;
#endif
  parallel_for(pieces, threads, [&](int64_t i, int) { std::memset(buffer.get() + i * kPiece, 1, kPiece); });
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto begin = Clock::now();
    parallel_for(pieces, threads, [&](int64_t i, int) {
      sink.store(read(buffer.get() + i * kPiece, kPiece), std::memory_order_relaxed);
    });
    best = std::max(best, static_cast<double>(pieces * kPiece) / seconds_since(begin));
  }
  return best;
}

}  // namespace realm_fast::roofline
