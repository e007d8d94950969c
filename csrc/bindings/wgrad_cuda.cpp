// The weight gradient on CUDA: which kernel computes it, and the call.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/wgrad_cutlass.h"
#include "cublaslt.h"
#include "layout.h"
#include "wgrad.h"
#include "wgrad_choice.h"

namespace gradacc {
namespace {

// As a library for matrices takes it: rows that are contiguous and do not overlap.
at::Tensor as_matrix(const at::Tensor& tensor) {
  if (tensor.size(-2) > 1 && tensor.stride(-2) < tensor.size(-1))
    return at::empty(tensor.sizes(), tensor.options()).copy_(tensor);
  return with_contiguous_rows(tensor);
}

int64_t row_stride(const at::Tensor& tensor) {
  return tensor.size(-2) <= 1 ? tensor.size(-1) : tensor.stride(-2);
}

// Groups of a length that only the device knows are Triton's.
void grouped(const at::Tensor& main, const at::Tensor& grad_output, const at::Tensor& input,
             const at::Tensor& offsets, const Factor& factor, bool store) {
  using Op = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                  const std::optional<at::Tensor>&, bool, const std::optional<at::Tensor>&,
                  const std::optional<at::Tensor>&, c10::string_view);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gradacc_kernels::wgrad_accumulate_", "")
                             .typed<Op>();
  std::optional<at::Tensor> inv_scale;
  if (factor.inv_scale)
    inv_scale = at::from_blob(const_cast<float*>(factor.inv_scale), {},
                              main.options().requires_grad(false));
  op.call(main, grad_output, input, factor.scale, inv_scale, store, std::nullopt, offsets,
          "triton");
}

}  // namespace

bool cuda_weight_grad(const at::Tensor& main, const at::Tensor& grad_output,
                      const at::Tensor& input, const std::optional<at::Tensor>& offsets,
                      const Factor& factor, bool store, float* partials, int processors) {
  if (main.numel() == 0) return false;
  const c10::cuda::CUDAGuard guard(main.device());
  if (offsets) {
    grouped(main, grad_output, input, *offsets, factor, store);
    return false;
  }
  const at::Tensor left = as_matrix(grad_output), right = as_matrix(input);
  WeightGrad problem;
  problem.main = static_cast<float*>(main.data_ptr());
  problem.grad_output = left.const_data_ptr();
  problem.input = right.const_data_ptr();
  problem.partials = partials;
  problem.batch = main.dim() == 3 ? main.size(0) : 1;
  problem.out_features = main.size(-2);
  problem.in_features = main.size(-1);
  problem.tokens = left.size(-2);
  problem.grad_output_stride = row_stride(left);
  problem.grad_output_batch_stride = left.dim() == 3 ? left.stride(0) : 0;
  problem.input_stride = row_stride(right);
  problem.input_batch_stride = right.dim() == 3 ? right.stride(0) : 0;
  problem.type = grad_type(left);
  problem.store = store;
  problem.processors = processors;
  if (problem.tokens == 0) {
    if (store) at::Tensor(main).zero_();
    return false;
  }

  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int choice = choose_weight_grad(problem, !factor.inv_scale);
  if (0 <= choice && choice < cuda::wgrad_cutlass_count() &&
      cuda::wgrad_cutlass_takes(choice, problem)) {
    const int code = cuda::wgrad_cutlass(choice, problem, factor.scale, factor.inv_scale, stream);
    TORCH_CHECK(code == 0, "gradacc_kernels: the weight gradient kernel could not be launched: ",
                cuda::error_string(code));
    return partials != nullptr;
  }
  const int rank = choice < 0 ? -1 - choice : 0;
  if (!factor.inv_scale) {
    const float scalars[] = {factor.scale, 0.f, 1.f};
    cublaslt_weight_grad(problem, scalars, /*are_on_host=*/true, rank, main.device());
    return false;
  }
  at::Tensor prepared;
  const float* scalars = factor.scalars;
  if (!scalars) {
    prepared = at::empty({3}, main.options());
    scalars = static_cast<const float*>(prepared.const_data_ptr());
    kCudaBackend.prepare(factor, static_cast<float*>(prepared.data_ptr()), main.device());
  }
  cublaslt_weight_grad(problem, scalars, /*are_on_host=*/false, rank, main.device());
  return false;
}

}  // namespace gradacc
