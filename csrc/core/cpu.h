// Which instruction sets this process may use, and which one it was told to use.
//
// Levels are ordered; a level includes the ones before it, except that bf16 and vnni are siblings on
// top of avx512 (amx includes both). REALM_FAST_CPU=generic|avx2|avx512|avx512bf16|avx512vnni|amx forces a
// level (a level the CPU lacks raises); unset means the best the CPU has.
#pragma once

#include <string>
#include <vector>

namespace realm_fast {

struct CpuFeatures {
  bool avx2 = false;        // AVX2 + FMA + F16C + BMI2
  bool avx512 = false;      // F + BW + DQ + VL + CD
  bool avx512bf16 = false;  // avx512 + BF16
  bool avx512vnni = false;  // avx512 + VNNI
  bool amx = false;         // avx512bf16 + avx512vnni + AMX tiles, with bfloat16 and int8 products
};

// What the CPU and the operating system support, whatever is forced.
CpuFeatures detected_cpu_features();

// What kernels may use now: detected, cut down to the forced level. Throws std::invalid_argument when
// the forced level is unknown or not supported by this CPU.
CpuFeatures cpu_features();

// Forces a level ("" = back to the environment's or the best). Throws std::invalid_argument as above.
void force_cpu_level(const std::string& level);

// Names accepted by force_cpu_level on this CPU, weakest first.
std::vector<std::string> available_cpu_levels();

}  // namespace realm_fast
