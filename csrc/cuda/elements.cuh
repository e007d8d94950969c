// Gradient elements in registers: vectors of one access, their float32 values, and the new main
// gradient that they make.

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

// Gives `zero` where s is 0, else `other`. Of a ?: the compiler makes a branch around all elements,
// which holds their loads back until s has arrived.
__device__ inline float where_zero(float s, float zero, float other) {
  float result;
  asm("{ .reg .pred p; setp.eq.f32 p, %1, 0f00000000; selp.f32 %0, %2, %3, p; }"
      : "=f"(result)
      : "f"(s), "f"(zero), "f"(other));
  return result;
}

// Where s is 0 the product is not used, for 0 * NaN is NaN.
__device__ inline float added(float main, float grad, float s) {
  return where_zero(s, main, fmaf(grad, s, main));
}
__device__ inline float stored(float grad, float s) { return where_zero(s, 0.f, grad * s); }

}  // namespace gradacc::cuda
