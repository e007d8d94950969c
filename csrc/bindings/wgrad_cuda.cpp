// The weight gradient on CUDA: which kernel computes it, and the call.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

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

// A factor that only the device knows may be 0, and cuBLASLt does not say what it makes of a NaN
// then. So it gets none: it stores the product, in pieces that stay in L2, for our kernel to add.
void by_product(const WeightGrad& p, const Factor& factor, int algorithm, at::Device device) {
  constexpr int64_t kMaxElements = int64_t{1} << 23;
  constexpr int64_t kTileRows = 128;  // pieces of whole tiles, as aligned as the whole
  const int64_t rows = std::min(
      p.out_features, std::max(kMaxElements / p.in_features / kTileRows, int64_t{1}) * kTileRows);
  const int64_t batches =
      std::clamp<int64_t>(kMaxElements / (p.out_features * p.in_features), 1, p.batch);
  const int64_t element_size = p.type == GradType::kFloat32 ? 4 : 2;
  const auto product =
      at::empty({batches * rows * p.in_features}, at::device(device).dtype(at::kFloat));
  for (int64_t b = 0; b < p.batch; b += batches)
    for (int64_t o = 0; o < p.out_features; o += rows) {
      WeightGrad piece = p;
      piece.main = static_cast<float*>(product.data_ptr());
      piece.grad_output = static_cast<const char*>(p.grad_output) +
                          (b * p.grad_output_batch_stride + o) * element_size;
      piece.input = static_cast<const char*>(p.input) + b * p.input_batch_stride * element_size;
      piece.batch = std::min(batches, p.batch - b);
      piece.out_features = std::min(rows, p.out_features - o);
      piece.store = true;
      cublaslt_weight_grad(piece, 1.f, algorithm, device);
      kCudaBackend.accumulate(
          {{p.main + (b * p.out_features + o) * p.in_features, piece.main, nullptr,
            piece.batch * piece.out_features * p.in_features, GradType::kFloat32, p.store}},
          factor.scale, factor.inv_scale, device);
    }
}

}  // namespace

bool cuda_weight_grad(const at::Tensor& main, const at::Tensor& grad_output,
                      const at::Tensor& input, const std::optional<at::Tensor>& offsets,
                      const Factor& factor, bool store, float* partials, int processors) {
  if (main.numel() == 0) return false;
  const c10::cuda::CUDAGuard guard(main.device());
  if (!factor.inv_scale && factor.scale == 0.f) {
    if (store) at::Tensor(main).zero_();
    return false;
  }
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
  const int algorithm = choice < 0 ? -1 - choice : 0;
  if (factor.inv_scale) {
    by_product(problem, factor, algorithm, main.device());
  } else {
    cublaslt_weight_grad(problem, factor.scale, algorithm, main.device());
  }
  return false;
}

}  // namespace gradacc
