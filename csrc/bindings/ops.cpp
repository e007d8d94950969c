#include "ops.h"

#include <ATen/ATen.h>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace gradacc {
namespace {

// Makes a raw write visible to autograd, as an in-place op of torch's own would be.
void bump_versions(const std::vector<at::Tensor>& tensors) {
  for (const auto& tensor : tensors) tensor.unsafeGetTensorImpl()->bump_version();
}

float* data_of(const at::Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

void accumulate(const char* op, bool is_list, const std::vector<at::Tensor>& mains,
                const std::vector<at::Tensor>& grads, double scale,
                const std::optional<at::Tensor>& inv_scale, const std::vector<bool>& stores,
                const std::vector<at::Tensor>& partials) {
  const Argument main_arg{op, is_list ? "main_grads" : "main_grad"};
  const Argument grad_arg{op, is_list ? "grads" : "grad"};
  const float rounded_scale = check_scale(op, scale);
  check_length(grad_arg, grads.size(), mains.size());
  if (!stores.empty()) check_length({op, "stores"}, stores.size(), mains.size());
  if (!partials.empty()) check_length({op, "partials"}, partials.size(), mains.size());
  if (mains.empty()) return;

  const auto device = mains[0].device();
  const Backend& backend = check_backend(main_arg, device);
  if (inv_scale) check_scalar({op, "inv_scale"}, *inv_scale, device);
  for (size_t i = 0; i < mains.size(); ++i) {
    const int64_t index = is_list ? static_cast<int64_t>(i) : -1;
    check_main({op, main_arg.name, index}, mains[i], device);
    check_grad({op, grad_arg.name, index}, grads[i], mains[i]);
    if (!partials.empty()) check_partials({op, "partials", index}, partials[i], mains[i]);
  }
  const OverlapCheck overlap(main_arg, mains);
  if (inv_scale) overlap.check_read({op, "inv_scale"}, *inv_scale);
  if (!partials.empty()) {
    std::vector<at::Tensor> written = mains;
    written.insert(written.end(), partials.begin(), partials.end());
    OverlapCheck({op, "partials"}, written);
  }
  for (size_t i = 0; i < mains.size(); ++i)
    overlap.check_grad({op, grad_arg.name, is_list ? static_cast<int64_t>(i) : -1}, grads[i],
                       mains[i]);

  std::vector<at::Tensor> laid_out;  // keeps copies alive until the kernels are launched
  std::vector<Accumulation> items;
  laid_out.reserve(mains.size());
  items.reserve(mains.size());
  for (size_t i = 0; i < mains.size(); ++i) {
    laid_out.push_back(in_layout_of(grads[i], mains[i]));
    const at::Tensor& grad = laid_out.back();
    items.push_back({data_of(mains[i]), grad.data_ptr(),
                     partials.empty() ? nullptr : data_of(partials[i]), mains[i].numel(),
                     grad_type(grad), !stores.empty() && stores[i]});
  }
  bump_versions(mains);
  bump_versions(partials);
  backend.accumulate(items, rounded_scale, inv_scale ? data_of(*inv_scale) : nullptr, device);
}

}  // namespace

void accumulate_(const at::Tensor& main_grad, const at::Tensor& grad, double scale,
                 const std::optional<at::Tensor>& inv_scale, bool store,
                 const std::optional<at::Tensor>& partials) {
  std::vector<at::Tensor> slots;
  if (partials) slots.push_back(*partials);
  accumulate("accumulate_", false, {main_grad}, {grad}, scale, inv_scale, {store}, slots);
}

void multi_accumulate_(const std::vector<at::Tensor>& main_grads,
                       const std::vector<at::Tensor>& grads, double scale,
                       const std::optional<at::Tensor>& inv_scale, const std::vector<bool>& stores,
                       const std::vector<at::Tensor>& partials) {
  accumulate("multi_accumulate_", true, main_grads, grads, scale, inv_scale, stores, partials);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grad_stats(const std::vector<at::Tensor>& tensors,
                                                          bool are_partials) {
  const char* op = "grad_stats";
  const char* name = are_partials ? "partials" : "main_grads";
  TORCH_CHECK_VALUE(!tensors.empty(), op, ": ", name, " must hold at least one tensor, got none");
  const auto device = tensors[0].device();
  const Backend& backend = check_backend({op, name}, device);
  int64_t total_chunks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_main({op, name, static_cast<int64_t>(i)}, tensors[i], device);
    total_chunks += num_chunks(tensors[i].numel());
  }

  std::vector<Slots> slots;
  slots.reserve(tensors.size());
  at::Tensor scratch;
  if (are_partials) {
    for (const auto& partials : tensors) slots.push_back({data_of(partials), partials.numel()});
  } else {
    scratch = at::empty({total_chunks}, tensors[0].options());
    std::vector<Squares> squares;
    squares.reserve(tensors.size());
    float* next = data_of(scratch);
    for (const auto& main : tensors) {
      squares.push_back({data_of(main), next, main.numel()});
      slots.push_back({next, num_chunks(main.numel())});
      next += num_chunks(main.numel());
    }
    backend.sum_of_squares(squares, device);
  }
  const auto options = tensors[0].options();
  auto sums = at::empty({static_cast<int64_t>(tensors.size())}, options);
  auto norm = at::empty({}, options);
  auto found_inf = at::empty({}, options);
  backend.reduce(slots, data_of(sums), data_of(norm), data_of(found_inf), device);
  return {sums, norm, found_inf};
}

void scale_(const std::vector<at::Tensor>& main_grads, const at::Tensor& factor) {
  const char* op = "scale_";
  if (main_grads.empty()) return;
  const auto device = main_grads[0].device();
  const Backend& backend = check_backend({op, "main_grads"}, device);
  check_scalar({op, "factor"}, factor, device);
  std::vector<Scaling> items;
  items.reserve(main_grads.size());
  for (size_t i = 0; i < main_grads.size(); ++i) {
    check_main({op, "main_grads", static_cast<int64_t>(i)}, main_grads[i], device);
    items.push_back({data_of(main_grads[i]), main_grads[i].numel()});
  }
  OverlapCheck({op, "main_grads"}, main_grads).check_read({op, "factor"}, factor);
  bump_versions(main_grads);
  backend.scale(items, data_of(factor), device);
}

}  // namespace gradacc
