#include "core/cpu.h"

#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>
#ifdef REALM_FAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace realm_fast {
namespace {

std::mutex mutex;
std::optional<std::string> forced;  // set by force_cpu_level; otherwise the environment decides

CpuFeatures features_of(const std::string& level) {
  CpuFeatures f;
  if (level == "generic") return f;
  f.avx2 = true;
  if (level == "avx2") return f;
  f.avx512 = true;
  if (level == "avx512") return f;
  if (level == "avx512bf16") {
    f.avx512bf16 = true;
    return f;
  }
  if (level == "avx512vnni") {
    f.avx512vnni = true;
    return f;
  }
  if (level == "amx") {
    f.avx512bf16 = f.avx512vnni = f.amx = true;
    return f;
  }
  throw std::invalid_argument(
      "REALM_FAST_CPU: expected generic, avx2, avx512, avx512bf16, avx512vnni or amx, got '" + level + "'");
}

bool supported(const CpuFeatures& wanted, const CpuFeatures& have) {
  return (!wanted.avx2 || have.avx2) && (!wanted.avx512 || have.avx512) &&
         (!wanted.avx512bf16 || have.avx512bf16) && (!wanted.avx512vnni || have.avx512vnni) &&
         (!wanted.amx || have.amx);
}

// AMX is not in __builtin_cpu_supports of GCC 12. Beside the CPU's word (leaf 7: bfloat16, tiles, int8) it
// takes the system's: registers saved (XGETBV: tile configuration, tile data), and on Linux, where tile data
// is too large to be given to every process, a request, which holds for all threads of the process. It is
// refused where a signal stack is too small for the registers.
bool amx_is_available() {
#if defined(REALM_FAST_X86) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & bit_OSXSAVE) == 0) return false;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
  if ((edx & kNeeded) != kNeeded) return false;
  unsigned saved = 0, high = 0;
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 1u << 17 | 1u << 18;
  if ((saved & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures resolve(const std::string& level) {
  const CpuFeatures wanted = features_of(level);
  if (!supported(wanted, detected_cpu_features())) {
    std::string have;
    for (const auto& name : available_cpu_levels()) have += (have.empty() ? "" : ", ") + name;
    throw std::invalid_argument("REALM_FAST_CPU: this machine does not support '" + level +
                                "'; it supports " + have);
  }
  return wanted;
}

}  // namespace

CpuFeatures detected_cpu_features() {
  static const CpuFeatures features = [] {
    CpuFeatures f;
#ifdef REALM_FAST_X86
    // __builtin_cpu_supports also checks that the operating system saves the registers (XGETBV).
    __builtin_cpu_init();
    f.avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512cd");
    f.avx512bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    f.avx512vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.amx = f.avx512bf16 && f.avx512vnni && amx_is_available();
#ifdef REALM_FAST_EMULATED_AVX512  // tests/native/emulated_avx512.h, emulated_amx.h
    f.avx512 = f.avx512bf16 = f.avx512vnni = f.amx = f.avx2;
#endif
#endif
    return f;
  }();
  return features;
}

CpuFeatures cpu_features() {
  const std::lock_guard lock(mutex);
  if (forced) return resolve(*forced);
  const char* environment = std::getenv("REALM_FAST_CPU");
  if (environment != nullptr && *environment != '\0') return resolve(environment);
  return detected_cpu_features();
}

void force_cpu_level(const std::string& level) {
  if (!level.empty()) resolve(level);  // throws before anything changes
  const std::lock_guard lock(mutex);
  if (level.empty()) {
    forced.reset();
  } else {
    forced = level;
  }
}

std::vector<std::string> available_cpu_levels() {
  std::vector<std::string> names;
  for (const char* name : {"generic", "avx2", "avx512", "avx512bf16", "avx512vnni", "amx"}) {
    if (supported(features_of(name), detected_cpu_features())) names.emplace_back(name);
  }
  return names;
}

}  // namespace realm_fast
