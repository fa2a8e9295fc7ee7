#include "core/cuda_versions.h"

#include <cuda_runtime_api.h>

namespace realm_fast {

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace realm_fast
