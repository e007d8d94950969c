// What a device offers to the ops and to the autograd hook: its kernels over lists of tensors.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../kernels.h"

namespace gradacc {

// The factor s = scale * inv_scale of a gradient.
struct Factor {
  float scale = 1.f;
  const float* inv_scale = nullptr;  // device scalar, or null for 1
};

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
  // main (+)= s * grad_outputᵀ input, of the shapes of wgrad_accumulate_ (gradacc_kernels/ops.py).
  // partials may be null. processors: how many of the device's to keep busy at the most; 0 for all.
  // Returns whether partials were written.
  bool (*weight_grad)(const at::Tensor& main, const at::Tensor& grad_output,
                      const at::Tensor& input, const std::optional<at::Tensor>& offsets,
                      const Factor& factor, bool store, float* partials, int processors);
  // How many processors a weight gradient of so many elements should take beside the rest of
  // backward; 0: it should take its turn.
  int (*processors_beside)(int64_t elements, int64_t tokens, at::Device device);
  // *s = scale * inv_scale.
  void (*prepare)(const Factor& factor, float* s, at::Device device);
  // Identifies the graph capture that the current stream is in; 0 outside of one.
  uint64_t (*capture_id)(at::Device device);
  // Raises where an index is out of range, before anything is written; a GPU traps instead.
  void (*embedding)(const EmbeddingGrad& item, float scale, const float* inv_scale,
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
