#include "node.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace gradacc {

bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kTransforms{DispatchKey::Python,
                                            DispatchKey::FuncTorchBatched,
                                            DispatchKey::Batched,
                                            DispatchKey::NestedTensor,
                                            DispatchKey::BatchedNestedTensor,
                                            DispatchKey::FuncTorchGradWrapper,
                                            DispatchKey::Functionalize};
  return tensor.layout() == at::kStrided && !tensor.key_set().has_any(kTransforms);
}

namespace {

// Inside torch.func.grad, vmap and the like, also where the input itself is not transformed.
bool is_transforming() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

}  // namespace

bool can_fuse(const at::Tensor& input, const at::Tensor& weight) {
  return is_plain(input) && !is_transforming() && input.device() == weight.device() &&
         weight.requires_grad() && !c10::InferenceMode::is_enabled() &&
         !torch::jit::tracer::isTracing() && !torch::autograd::isFwGradDefined(input) &&
         !torch::autograd::isFwGradDefined(weight);
}

}  // namespace gradacc
