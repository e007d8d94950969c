// Products with a weight whose gradient goes straight into its main gradient.
//
//   linear    y = x Wᵀ + b                  main += s * dyᵀ x
//   batched   y[e] = x[e] W[e]ᵀ             main[e] += s * dy[e]ᵀ x[e]
//   grouped   y[r] = x[r] W[e]ᵀ, r in e     main[e] += s * sum over r in e of dy[r] x[r]ᵀ
//
// W is [out, in], or [in, out] where `is_transposed`, as in Hugging Face's Conv1D and with bmm.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "hook.h"

namespace gradacc {

class FusedWeight : public std::enable_shared_from_this<FusedWeight> {
 public:
  // index: of the weight among the parameters of hooks.
  FusedWeight(const std::shared_ptr<GradHooks>& hooks, int64_t index, at::Tensor weight,
              bool is_transposed);

  // The product, or none where the ordinary path has to be taken.
  std::optional<at::Tensor> linear(const at::Tensor& input, const std::optional<at::Tensor>& bias);
  std::optional<at::Tensor> batched(const at::Tensor& input);
  // offsets: int32, the end of each group of rows, as torch._grouped_mm takes it.
  std::optional<at::Tensor> grouped(const at::Tensor& input, const at::Tensor& offsets);
  // y = x W[expert]ᵀ + b for one matrix of a batch.
  std::optional<at::Tensor> expert(const at::Tensor& input, int64_t expert,
                                   const std::optional<at::Tensor>& bias);

 private:
  friend class ProductBackward;
  enum class Form { kLinear, kBatched, kGrouped };
  struct Product {
    Form form = Form::kLinear;
    std::optional<int64_t> expert;
    std::optional<at::Tensor> offsets;
  };

  std::optional<at::Tensor> multiply(const at::Tensor& given, Product product,
                                     const std::optional<at::Tensor>& bias);
  // W, or the expert's part of it, as [..., out, in].
  at::Tensor matrix(const at::Tensor& weight, const Product& product) const;
  static at::Tensor apply(const Product& product, const at::Tensor& input, const at::Tensor& matrix,
                          const std::optional<at::Tensor>& bias);

  const std::weak_ptr<GradHooks> hooks_;
  const int64_t index_;
  const at::Tensor weight_;
  const bool is_transposed_;
};

}  // namespace gradacc
