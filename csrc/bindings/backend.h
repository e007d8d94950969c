// What a device offers to the ops and to the autograd hook: its kernels over lists of tensors.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../kernels.h"

namespace gradacc {

// Pointers are memory of `device`; a CUDA backend launches on the device's current stream and
// returns at once. inv_scale may be null.
struct Backend {
  void (*accumulate)(const std::vector<Accumulation>& items, float scale, const float* inv_scale,
                     at::Device device);
  void (*sum_of_squares)(const std::vector<Squares>& items, at::Device device);
  void (*scale)(const std::vector<Scaling>& items, const float* factor, at::Device device);
  // sums[i] = sum of items[i]'s slots; norm[0] = sqrt(sum sums); found_inf[0] = isnan(norm[0]).
  void (*reduce)(const std::vector<Slots>& items, float* sums, float* norm, float* found_inf,
                 at::Device device);
};

extern const Backend kCpuBackend;
#ifdef GRADACC_WITH_CUDA
extern const Backend kCudaBackend;
#endif

// The backend of a device, or null when this build has none.
inline const Backend* find_backend(at::Device device) {
  if (device.is_cpu()) return &kCpuBackend;
#ifdef GRADACC_WITH_CUDA
  if (device.is_cuda()) return &kCudaBackend;
#endif
  return nullptr;
}

}  // namespace gradacc
