// What fused products that read the same activation share, as the query, key and value projections
// of a layer do: its 16-bit copy under autocast, and the sum of its gradient.
//
//   x.grad = sum over the products of dy W        each product adds its part: sum = dy W + sum
//
// Autograd alone would have each product write a gradient of its own, and add those in passes over
// memory, rounded to the dtype of the activation.

#pragma once

#include <ATen/ATen.h>
#include <c10/core/Stream.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "node.h"

namespace gradacc {

// Takes the gradients that products have in their input, and hands on the sum. A product adds to it
// by `add`, and then sends no gradient along its edge; one that has to send a tensor may.
class SharedInputNode : public FusedNode {
 public:
  std::string name() const override { return "FusedInputBackward"; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;

  // Whether somebody looks at the gradients that arrive here, as torch.autograd.grad may.
  bool is_watched();
  // Calls `add` on the sum of the backward under way, which is undefined at first.
  void add(c10::function_ref<void(at::Tensor& sum)> add);

 private:
  // Of each backward under way, whose callback owns it: one that raises drops it.
  std::map<int, std::weak_ptr<at::Tensor>> sums_;
};

using SharedInputPointer = decltype(make_node<SharedInputNode>());

// The last activation that was read. Held weakly: all of it lives as long as the backward nodes of
// its readers.
//
// Only activations that autograd has recorded are shared: like everything that autograd saves, they
// must not be written to unseen, by a kernel or a collective that moves no version counter, while
// data that nobody differentiates may be. And nothing is shared under a dispatch mode: selective
// checkpoints expect the same calls when they recompute.
class SharedInput {
 public:
  struct Reading {
    at::Tensor input;         // in the dtype of the product, differentiable in the activation
    SharedInputPointer node;  // null where nothing is shared
  };
  // What a reading depends on.
  struct Key {
    // stream: the current one, on which others must not read the copy. capture_id: what is made
    // inside a graph capture is that graph's.
    Key(const at::Tensor& activation, at::ScalarType dtype, std::optional<c10::Stream> stream,
        uint64_t capture_id);

    int64_t version;
    const torch::autograd::Node* producer;
    at::ScalarType dtype;
    std::optional<c10::Stream> stream;
    uint64_t capture_id;

    bool operator==(const Key& other) const {
      return version == other.version && producer == other.producer && dtype == other.dtype &&
             stream == other.stream && capture_id == other.capture_id;
    }
  };

  static bool can_share(const at::Tensor& activation);
  // A reading for the first reader; casts, so Python may run inside.
  static Reading make(const at::Tensor& activation, at::ScalarType dtype);
  // The reading that an earlier reader made, while somebody holds it.
  std::optional<Reading> find(const at::Tensor& activation, const Key& key) const;
  void keep(const at::Tensor& activation, const Key& key, const Reading& reading);

 private:
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  static WeakTensor weak(const at::Tensor& tensor) { return WeakTensor(tensor.getIntrusivePtr()); }

  std::optional<Key> key_;
  WeakTensor activation_ = weak(at::Tensor());
  WeakTensor input_ = weak(at::Tensor());
  WeakPointer<SharedInputPointer> node_;
};

}  // namespace gradacc
