// The machine's own limits, measured: what every benchmark is held against.
#pragma once

#include <cstdint>

namespace realm_fast::roofline {

enum class Kind { float32, bfloat16, int8 };

// One level's loops of independent multiply-adds in registers, with the instruction its kernels use; they
// return something that depends on the result. One iteration is `operations_per_iteration` operations
// (a multiply-add counts two).
struct Loop {
  float (*run)(int64_t iterations);
  int64_t operations_per_iteration;
};

Loop generic_loop(Kind kind);  // run == nullptr: this level has no instruction for the kind
#ifdef REALM_FAST_X86
Loop avx2_loop(Kind kind);
Loop avx512_loop(Kind kind);
Loop avx512bf16_loop();
Loop avx512vnni_loop();
Loop amx_loop(Kind kind);
// Reads `bytes` (a multiple of 512) and returns something that depends on them.
float read_avx2(const char* data, int64_t bytes);
float read_avx512(const char* data, int64_t bytes);
#endif
float read_generic(const char* data, int64_t bytes);

// What the present CPU level (cpu.h) reaches on `threads` threads: operations a second over about `seconds`.
double peak_operations_per_second(Kind kind, int threads, double seconds);

// Bytes a second that `threads` threads read from a buffer far larger than the caches (`buffer_bytes`), best
// of `repeats` passes.
double read_bytes_per_second(int threads, int64_t buffer_bytes, int repeats);

}  // namespace realm_fast::roofline
