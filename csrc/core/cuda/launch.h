// Host side of every launch: errors with words, and what the device can do.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef REALM_FAST_SIMT
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace realm_fast::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clear it: the next call must not report this one's failure
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) message += " (the NVIDIA driver is older than this build needs)";
  if (error == cudaErrorNoKernelImageForDevice) {
    message += " (this build has no code for this GPU; see realm_fast.build_info()['cuda_archs'])";
  }
  throw std::runtime_error(message);
}

// Errors of the launch itself; errors inside a kernel show at the caller's next synchronisation.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// So many thread blocks along x: a number that CUDA does not take is refused, not cut to 32 bits.
inline unsigned grid_size(int64_t blocks, const char* kernel) {
  if (blocks < 1 || blocks > INT32_MAX) {
    throw std::invalid_argument(std::string(kernel) + ": " + std::to_string(blocks) +
                                " thread blocks; a launch takes 1 to 2^31 - 1");
  }
  return static_cast<unsigned>(blocks);
}

inline int device_attribute(cudaDeviceAttr attribute, const char* what) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

}  // namespace realm_fast::cuda
