// Gradient elements in registers: vectors of one access, and their float32 values.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace gradacc::cuda {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T value[kSize];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

}  // namespace gradacc::cuda
