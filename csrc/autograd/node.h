// What the backward nodes of the fused modules share.

#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

namespace gradacc {

// A Node is owned by a shared_ptr up to torch 2.12, and by an intrusive_ptr later.
template <typename T, typename Pointer = decltype(torch::autograd::Edge::function),
          typename... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // Found by argument: where a node has no such deleter, this is not instantiated.
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...),
                              [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

// A weak reference to what a node pointer refers to: default-constructed, assigned from a pointer,
// and locked to one, which may be null.
template <typename Pointer>
class WeakPointer {
 public:
  WeakPointer() = default;
  WeakPointer& operator=(const Pointer& pointer) {
    weak_.emplace(pointer);
    return *this;
  }
  Pointer lock() const { return weak_ ? weak_->lock() : Pointer(); }

 private:
  template <typename T>
  static std::weak_ptr<T> weak_of(const std::shared_ptr<T>&);
  template <typename T>
  static c10::weak_intrusive_ptr<T> weak_of(const c10::intrusive_ptr<T>&);

  std::optional<decltype(weak_of(std::declval<Pointer>()))> weak_;
};

// Whether kernels may work on a tensor's memory: no subclass, no transform of torch.func, no
// forward derivative, no tracer.
bool is_plain(const at::Tensor& tensor);
// Whether a fused forward may take this input now.
bool can_fuse(const at::Tensor& input, const at::Tensor& weight);

// A backward node of a fused module. Its gradients in inputs and bias are ordinary ones; that of
// the weight goes straight into its main gradient.
class FusedNode : public torch::autograd::Node {
 public:
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK(false,
                "gradacc_kernels: compiled autograd cannot trace a fused module. Turn it off "
                "(torch._dynamo.config.compiled_autograd = False), or detach the Accumulator.");
  }
};

}  // namespace gradacc
