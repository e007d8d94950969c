// The torch-free kernel API: raw pointers, sizes and a stream.
//
// One formula everywhere, with s = scale * inv_scale rounded once to float32:
//
//   add:    main = fma(float(grad), s, main)
//   store:  main = float(grad) * s
//
// A tensor is cut into chunks of kChunkSize elements. Each chunk owns one slot of `partials`, which
// every pass overwrites with the sum of squares of the chunk's new main gradient, or with NaN when
// one of its elements is not finite. A sum of finite squares that overflows is inf, never NaN.
// Nothing is added atomically, so the same inputs give the same bits on every run.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace gradacc {

constexpr int64_t kChunkSize = 1024;

constexpr int64_t num_chunks(int64_t numel) { return (numel + kChunkSize - 1) / kChunkSize; }

enum class GradType : int32_t { kFloat32, kFloat16, kBFloat16 };

// One tensor of an accumulation pass.
struct Accumulation {
  float* main;       // [numel], read (add only) and written
  const void* grad;  // [numel] of `type`, in the memory order of main
  float* partials;   // [num_chunks(numel)], written; may be null
  int64_t numel;
  GradType type;
  bool store;
};

// One tensor of a statistics pass.
struct Squares {
  const float* main;  // [numel]
  float* partials;    // [num_chunks(numel)], written
  int64_t numel;
};

// One tensor of a scaling pass: main *= factor.
struct Scaling {
  float* main;  // [numel]
  int64_t numel;
};

// The slots of one tensor.
struct Slots {
  const float* partials;  // [count]
  int64_t count;
};

// The CPU kernels work on the chunks [first, last) of one tensor, so that the caller can spread a
// list of tensors over its own threads.
namespace cpu {

void accumulate(const Accumulation& item, int64_t first, int64_t last, float scale);
void sum_of_squares(const Squares& item, int64_t first, int64_t last);
void scale(const Scaling& item, int64_t first, int64_t last, float factor);

// Sum of the slots, in double: NaN when any slot is NaN.
double sum(const Slots& slots);

// The instruction set in use: "avx512", "avx2" or "portable".
const char* isa();
// Chooses one by name; false, and no change, when this CPU or this build does not have it.
bool select_isa(const char* name);

}  // namespace cpu

// The CUDA launchers put a whole list into as few launches as kernel arguments allow, on `stream`
// of the current device, without allocating or synchronising. Each returns a cudaError_t.
namespace cuda {

using Stream = CUstream_st*;

// inv_scale: a device scalar, or null for 1.
int accumulate(const Accumulation* items, int64_t count, float scale, const float* inv_scale,
               Stream stream);
int sum_of_squares(const Squares* items, int64_t count, Stream stream);
// factor: a device scalar. No memory is touched when it is 1.
int scale(const Scaling* items, int64_t count, const float* factor, Stream stream);
// sums[i] = sum of items[i]'s slots.
int reduce(const Slots* items, int64_t count, float* sums, Stream stream);
// norm = sqrt(sum of sums[0..count)); found_inf = 1 when that is NaN, else 0.
int norm(const float* sums, int64_t count, float* norm, float* found_inf, Stream stream);

const char* error_string(int code);

}  // namespace cuda

}  // namespace gradacc
