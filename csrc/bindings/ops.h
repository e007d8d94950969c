// The ops over tensors, for every device that has a Backend. Arguments and results as in
// gradacc_kernels/ops.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace gradacc {

void accumulate_(const at::Tensor& main_grad, const at::Tensor& grad, double scale,
                 const std::optional<at::Tensor>& inv_scale, bool store,
                 const std::optional<at::Tensor>& partials);

// stores and partials may be empty: add everywhere, no statistics.
void multi_accumulate_(const std::vector<at::Tensor>& main_grads,
                       const std::vector<at::Tensor>& grads, double scale,
                       const std::optional<at::Tensor>& inv_scale, const std::vector<bool>& stores,
                       const std::vector<at::Tensor>& partials);

std::tuple<at::Tensor, at::Tensor, at::Tensor> grad_stats(const std::vector<at::Tensor>& tensors,
                                                          bool are_partials);

void scale_(const std::vector<at::Tensor>& main_grads, const at::Tensor& factor);

}  // namespace gradacc
