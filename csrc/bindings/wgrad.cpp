#include "wgrad.h"

#include <ATen/ATen.h>

#include "checks.h"
#include "layout.h"

namespace gradacc {
namespace {

void check_operand(const Argument& what, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat, what,
                   " must be torch.float16, torch.bfloat16 or torch.float32, got ", text(type));
}

// "[..., 5]", "[2, tokens, 5]" or "[tokens, 5]".
std::string expected_shape(const at::Tensor& main, int64_t width, bool is_grouped) {
  if (main.dim() == 2) return "[..., " + text(width) + "]";
  if (is_grouped) return "[tokens, " + text(width) + "]";
  return "[" + text(main.size(0)) + ", tokens, " + text(width) + "]";
}

void check_wgrad(const at::Tensor& main, const at::Tensor& grad_output, const at::Tensor& input,
                 const std::optional<at::Tensor>& inv_scale,
                 const std::optional<at::Tensor>& partials,
                 const std::optional<at::Tensor>& offsets) {
  const char* op = "wgrad_accumulate_";
  const auto device = main.device();
  const Argument main_arg{op, "main_grad"}, grad_arg{op, "grad_output"}, input_arg{op, "input"},
      offsets_arg{op, "offsets"};
  check_contiguous_main(main_arg, main, device);
  TORCH_CHECK_VALUE(!offsets || main.dim() == 3, main_arg,
                    " must have 3 dimensions where offsets are given, got shape ",
                    text(main.sizes()));
  TORCH_CHECK_VALUE(main.dim() == 2 || main.dim() == 3, main_arg,
                    " must have 2 or 3 dimensions, got shape ", text(main.sizes()));
  if (inv_scale) check_scalar({op, "inv_scale"}, *inv_scale, device);

  check_operand(grad_arg, grad_output);
  check_strided(grad_arg, grad_output);
  const int64_t out_features = main.size(-2);
  bool fits = grad_output.dim() >= 1 && grad_output.size(-1) == out_features;
  if (main.dim() == 3) fits = fits && grad_output.dim() == (offsets ? 2 : 3);
  if (main.dim() == 3 && !offsets) fits = fits && grad_output.size(0) == main.size(0);
  TORCH_CHECK_VALUE(fits, grad_arg, " must have shape ",
                    expected_shape(main, out_features, offsets.has_value()), ", got ",
                    text(grad_output.sizes()));
  check_device(grad_arg, grad_output, device);

  check_operand(input_arg, input);
  TORCH_CHECK_TYPE(input.scalar_type() == grad_output.scalar_type(), input_arg,
                   " must have the dtype of grad_output, ", text(grad_output.scalar_type()),
                   ", got ", text(input.scalar_type()));
  check_strided(input_arg, input);
  auto expected = grad_output.sizes().vec();
  expected.back() = main.size(-1);
  TORCH_CHECK_VALUE(input.sizes() == expected, input_arg, " must have shape ",
                    text(at::IntArrayRef(expected)), ", got ", text(input.sizes()));
  check_device(input_arg, input, device);

  if (offsets) {
    TORCH_CHECK_TYPE(offsets->scalar_type() == at::kInt, offsets_arg, " must be torch.int32, got ",
                     text(offsets->scalar_type()));
    TORCH_CHECK_VALUE(
        offsets->dim() == 1 && offsets->size(0) == main.size(0) && offsets->is_contiguous(),
        offsets_arg, " must be contiguous of shape [", text(main.size(0)), "], got ",
        text(offsets->sizes()));
    check_plain(offsets_arg, *offsets);
    check_device(offsets_arg, *offsets, device);
  }
  WrittenMemory written(op, main, partials);
  if (inv_scale) written.check_read("inv_scale", *inv_scale);
  written.check_read("grad_output", grad_output);
  written.check_read("input", input);
  if (offsets) written.check_read("offsets", *offsets);
}

}  // namespace

void wgrad_accumulate_(const at::Tensor& main_grad, const at::Tensor& grad_output,
                       const at::Tensor& input, double scale,
                       const std::optional<at::Tensor>& inv_scale, bool store,
                       const std::optional<at::Tensor>& partials,
                       const std::optional<at::Tensor>& offsets) {
  const char* op = "wgrad_accumulate_";
  const float rounded_scale = check_scale(op, scale);
  const Backend& backend = check_backend({op, "main_grad"}, main_grad.device());
  check_wgrad(main_grad, grad_output, input, inv_scale, partials, offsets);

  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // operands may require grad
  // Of a batch or of groups the op takes no other shapes than the kernels do.
  const bool is_plain = main_grad.dim() == 2;
  const Factor factor{rounded_scale,
                      inv_scale ? static_cast<const float*>(inv_scale->const_data_ptr()) : nullptr};
  main_grad.unsafeGetTensorImpl()->bump_version();
  if (partials) partials->unsafeGetTensorImpl()->bump_version();
  float* slots = partials ? static_cast<float*>(partials->data_ptr()) : nullptr;
  const bool has_partials =
      backend.weight_grad(main_grad, is_plain ? as_rows(grad_output) : grad_output,
                          is_plain ? as_rows(input) : input, offsets, factor, store, slots,
                          /*processors=*/0);
  if (slots && !has_partials)
    backend.sum_of_squares(
        {{static_cast<const float*>(main_grad.const_data_ptr()), slots, main_grad.numel()}},
        main_grad.device());
}

// One BLAS call in float32, on float32 copies of 16-bit operands.
bool cpu_weight_grad(const at::Tensor& main, const at::Tensor& grad_output, const at::Tensor& input,
                     const std::optional<at::Tensor>& offsets, const Factor& factor, bool store,
                     float*, int) {
  const double s = factor.inv_scale ? factor.scale * *factor.inv_scale : factor.scale;
  at::Tensor out = main;
  if (s == 0) {
    if (store) out.zero_();
    return false;
  }
  const auto left = grad_output.to(at::kFloat), right = input.to(at::kFloat);
  const auto add = [&](at::Tensor target, const at::Tensor& a, const at::Tensor& b) {
    at::addmm_out(target, target, a.t(), b, store ? 0 : 1, s);
  };
  if (main.dim() == 2) {
    add(out, left, right);
  } else if (!offsets) {
    at::baddbmm_out(out, out, left.transpose(1, 2), right, store ? 0 : 1, s);
  } else {
    const int64_t tokens = left.size(0);
    const auto* ends = static_cast<const int32_t*>(offsets->const_data_ptr());
    int64_t begin = 0;
    for (int64_t e = 0; e < main.size(0); ++e) {
      const int64_t end = std::clamp<int64_t>(ends[e], 0, tokens);
      const int64_t count = std::max<int64_t>(end - begin, 0);
      add(main.select(0, e), left.narrow(0, count ? begin : 0, count),
          right.narrow(0, count ? begin : 0, count));
      begin = end;
    }
  }
  return false;
}

}  // namespace gradacc
