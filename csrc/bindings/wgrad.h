// The weight-gradient op: main (+)= s * grad_outputᵀ input. Arguments as in gradacc_kernels/ops.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "backend.h"

namespace gradacc {

void wgrad_accumulate_(const at::Tensor& main_grad, const at::Tensor& grad_output,
                       const at::Tensor& input, double scale,
                       const std::optional<at::Tensor>& inv_scale, bool store,
                       const std::optional<at::Tensor>& partials,
                       const std::optional<at::Tensor>& offsets);

// Backend::weight_grad of each device.
bool cpu_weight_grad(const at::Tensor& main, const at::Tensor& grad_output, const at::Tensor& input,
                     const std::optional<at::Tensor>& offsets, const Factor& factor, bool store,
                     float* partials, int processors);
bool cuda_weight_grad(const at::Tensor& main, const at::Tensor& grad_output,
                      const at::Tensor& input, const std::optional<at::Tensor>& offsets,
                      const Factor& factor, bool store, float* partials, int processors);

}  // namespace gradacc
