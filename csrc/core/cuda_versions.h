// CUDA versions as CUDA writes them: 1000 * major + 10 * minor.
#pragma once

namespace realm_fast {

int cuda_runtime_version();  // linked into this build
int cuda_driver_version();   // the newest that the installed driver can run; 0 without a driver

}  // namespace realm_fast
