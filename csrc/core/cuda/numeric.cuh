// Arithmetic that is written once for float and double.
#pragma once

#include <math.h>

#include "core/cuda/device.cuh"

namespace realm_fast::cuda {

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// A result in the type it is stored in: float to any, double to double.
template <class T, class A>
__device__ __forceinline__ T narrow(A x) {
  return from_float<T>(x);
}
template <>
__device__ __forceinline__ double narrow<double, double>(double x) {
  return x;
}

}  // namespace realm_fast::cuda
