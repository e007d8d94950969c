#include "embedding.h"

#include <ATen/ATen.h>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace gradacc {
namespace {

void check_embedding(const char* op, const at::Tensor& main, const at::Tensor& grad_output,
                     const at::Tensor& indices, std::optional<int64_t> padding_idx,
                     const std::optional<at::Tensor>& inv_scale,
                     const std::optional<at::Tensor>& partials) {
  const auto device = main.device();
  const Argument main_arg{op, "main_grad"}, grad_arg{op, "grad_output"}, indices_arg{op, "indices"};
  check_contiguous_main(main_arg, main, device);
  TORCH_CHECK_VALUE(main.dim() == 2, main_arg, " must have 2 dimensions, got shape ",
                    text(main.sizes()));
  if (inv_scale) check_scalar({op, "inv_scale"}, *inv_scale, device);

  const auto index_type = indices.scalar_type();
  TORCH_CHECK_TYPE(index_type == at::kInt || index_type == at::kLong, indices_arg,
                   " must be torch.int32 or torch.int64, got ", text(index_type));
  check_strided(indices_arg, indices);
  check_device(indices_arg, indices, device);

  const auto type = grad_output.scalar_type();
  TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat, grad_arg,
                   " must be torch.float16, torch.bfloat16 or torch.float32, got ", text(type));
  check_strided(grad_arg, grad_output);
  auto expected = indices.sizes().vec();
  expected.push_back(main.size(1));
  TORCH_CHECK_VALUE(grad_output.sizes() == expected, grad_arg, " must have shape ",
                    text(at::IntArrayRef(expected)), ", got ", text(grad_output.sizes()));
  check_device(grad_arg, grad_output, device);

  const int64_t rows = main.size(0);
  TORCH_CHECK_VALUE(!padding_idx || (-rows <= *padding_idx && *padding_idx < rows), op,
                    ": padding_idx must lie in [", text(-rows), ", ", text(rows), "), got ",
                    text(padding_idx.value_or(0)));

  WrittenMemory written(op, main, partials);
  if (inv_scale) written.check_read("inv_scale", *inv_scale);
  written.check_read("grad_output", grad_output);
  written.check_read("indices", indices);
}

}  // namespace

void embedding_accumulate_(const at::Tensor& main_grad, const at::Tensor& grad_output,
                           const at::Tensor& indices, std::optional<int64_t> padding_idx,
                           double scale, const std::optional<at::Tensor>& inv_scale, bool store,
                           const std::optional<at::Tensor>& partials) {
  const char* op = "embedding_accumulate_";
  const float rounded_scale = check_scale(op, scale);
  check_backend({op, "main_grad"}, main_grad.device());
  check_embedding(op, main_grad, grad_output, indices, padding_idx, inv_scale, partials);

  int64_t padding_index = padding_idx.value_or(-1);
  if (padding_idx && padding_index < 0) padding_index += main_grad.size(0);
  const int64_t tokens = indices.numel();
  embedding(main_grad, grad_output.reshape({tokens, main_grad.size(1)}), indices.reshape({tokens}),
            padding_index, rounded_scale,
            inv_scale ? static_cast<const float*>(inv_scale->const_data_ptr()) : nullptr, store,
            partials ? static_cast<float*>(partials->data_ptr()) : nullptr);
  // After the last thing that may raise.
  main_grad.unsafeGetTensorImpl()->bump_version();
  if (partials) partials->unsafeGetTensorImpl()->bump_version();
}

void embedding(const at::Tensor& main, const at::Tensor& grad_output, const at::Tensor& indices,
               int64_t padding_index, float scale, const float* inv_scale, bool store,
               float* partials) {
  const at::Tensor rows = with_contiguous_rows(grad_output);
  const at::Tensor tokens = with_contiguous_rows(indices);
  EmbeddingGrad item;
  item.main = static_cast<float*>(main.data_ptr());
  item.grad_output = rows.const_data_ptr();
  item.indices = tokens.const_data_ptr();
  item.partials = partials;
  item.rows = main.size(0);
  item.columns = main.size(1);
  item.tokens = tokens.size(0);
  item.grad_output_stride = rows.stride(0);
  item.padding_index = padding_index;
  item.type = grad_type(rows);
  item.has_int64_indices = tokens.scalar_type() == at::kLong;
  item.store = store;
  check_backend({"embedding_accumulate_", "main_grad"}, main.device())
      .embedding(item, scale, inv_scale, main.device());
}

}  // namespace gradacc
