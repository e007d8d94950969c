// Brings a gradient into the memory order of its main gradient, whatever layout it arrives in.

#pragma once

#include <ATen/ATen.h>

#include "../kernels.h"

namespace gradacc {

inline GradType grad_type(const at::Tensor& grad) {
  switch (grad.scalar_type()) {
    case at::kHalf:
      return GradType::kFloat16;
    case at::kBFloat16:
      return GradType::kBFloat16;
    default:
      return GradType::kFloat32;
  }
}

// Strides of dimensions of size 1 say nothing about memory.
inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// [..., n] as [tokens, n].
inline at::Tensor as_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const auto leading = tensor.sizes().slice(0, tensor.dim() - 1);
  return tensor.reshape({c10::multiply_integers(leading), tensor.size(-1)});
}

// The tensor itself where memory holds its values, with rows that are contiguous; else a copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  const bool has_rows = tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
  if (has_rows && !tensor.is_neg() && !tensor._is_zerotensor()) return tensor;
  return at::empty(tensor.sizes(), tensor.options()).copy_(tensor);
}

// `grad` with its elements where main's are: itself when it has that layout, else a copy of it. A
// sparse gradient becomes float32 before its duplicate indices are summed, so that nothing is
// rounded to 16 bits.
inline at::Tensor in_layout_of(const at::Tensor& grad, const at::Tensor& main) {
  if (grad.layout() != at::kStrided) return in_layout_of(grad.to(at::kFloat).to_dense(), main);
  const bool is_plain = !grad.is_neg() && !grad._is_zerotensor();
  if (grad.numel() == 0 || (same_layout(grad, main) && is_plain)) return grad;
  return at::empty_strided(main.sizes(), main.strides(), grad.options()).copy_(grad);
}

}  // namespace gradacc
