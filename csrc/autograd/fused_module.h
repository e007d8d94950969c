// What a fused module's forward calls: the product or lookup with the module's own parameters, as
// long as the module still holds those objects (torch.func.functional_call, parametrisations and
// plain assignment put others in their place).

#pragma once

#include <torch/extension.h>

#include <memory>
#include <optional>
#include <utility>

#include "../bindings/parameter_watch.h"
#include "fused_embedding.h"
#include "fused_weight.h"

namespace gradacc {

class FusedLinear {
 public:
  FusedLinear(ParameterWatch watch, std::shared_ptr<FusedWeight> weight,
              std::optional<at::Tensor> bias)
      : watch_(std::move(watch)), weight_(std::move(weight)), bias_(std::move(bias)) {}

  std::optional<at::Tensor> operator()(const at::Tensor& input) const {
    if (watch_.is_changed()) return std::nullopt;
    const py::gil_scoped_release no_gil;
    return weight_->linear(input, bias_);
  }

 private:
  ParameterWatch watch_;
  std::shared_ptr<FusedWeight> weight_;
  std::optional<at::Tensor> bias_;
};

class FusedLookup {
 public:
  FusedLookup(ParameterWatch watch, std::shared_ptr<FusedEmbedding> embedding)
      : watch_(std::move(watch)), embedding_(std::move(embedding)) {}

  std::optional<at::Tensor> operator()(const at::Tensor& indices) const {
    if (watch_.is_changed()) return std::nullopt;
    const py::gil_scoped_release no_gil;
    return embedding_->lookup(indices);
  }

 private:
  ParameterWatch watch_;
  std::shared_ptr<FusedEmbedding> embedding_;
};

}  // namespace gradacc
