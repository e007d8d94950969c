// The gradient of an embedding, row by row: main[index[t]] (+)= s * grad_output[t].

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace gradacc {

// Arguments as in gradacc_kernels/ops.py.
void embedding_accumulate_(const at::Tensor& main_grad, const at::Tensor& grad_output,
                           const at::Tensor& indices, std::optional<int64_t> padding_idx,
                           double scale, const std::optional<at::Tensor>& inv_scale, bool store,
                           const std::optional<at::Tensor>& partials);

// The same without its checks, for callers that have made them; an index out of range is still
// refused, as Backend::embedding says. main: [rows, columns], contiguous; grad_output:
// [tokens, columns], of any strides; indices: [tokens]; padding_index: -1 for none; partials:
// main's slots, or null. No version counter moves.
void embedding(const at::Tensor& main, const at::Tensor& grad_output, const at::Tensor& indices,
               int64_t padding_index, float scale, const float* inv_scale, bool store,
               float* partials);

}  // namespace gradacc
