// Host side of every launch: errors with words, and what the device can do.
#pragma once

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

inline int device_attribute(cudaDeviceAttr attribute, const char* what) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

}  // namespace realm_fast::cuda
