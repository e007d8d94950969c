#include "shared_input.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

namespace gradacc {

namespace autograd = torch::autograd;

autograd::variable_list SharedInputNode::apply(autograd::variable_list&& grads) {
  at::Tensor sum;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sums_.find(autograd::get_current_graph_task_id());
    if (found != sums_.end()) {
      sum = std::move(found->second);
      sums_.erase(found);
    }
  }
  if (!sum.defined()) return {std::move(grads[0])};
  return {grads[0].defined() ? grads[0] + sum : std::move(sum)};
}

void SharedInputNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  sums_.clear();
}

void SharedInputNode::add(c10::function_ref<void(at::Tensor& sum)> add) {
  const std::lock_guard<std::mutex> lock(mutex_);
  add(sums_[autograd::get_current_graph_task_id()]);
}

SharedInput::Key::Key(const at::Tensor& activation, at::ScalarType dtype,
                      std::optional<c10::Stream> stream, uint64_t capture_id)
    : version(static_cast<int64_t>(activation._version())),
      producer(activation.grad_fn().get()),
      dtype(dtype),
      stream(stream),
      capture_id(capture_id) {}

bool SharedInput::can_share(const at::Tensor& activation) {
  return at::GradMode::is_enabled() && activation.requires_grad() && !activation.is_leaf() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

SharedInput::Reading SharedInput::make(const at::Tensor& activation, at::ScalarType dtype) {
  Reading reading{activation.to(dtype), make_node<SharedInputNode>()};
  reading.node->set_next_edges(autograd::collect_next_edges(activation));
  reading.node->add_input_metadata(activation);
  return reading;
}

std::optional<SharedInput::Reading> SharedInput::find(const at::Tensor& activation,
                                                      const Key& key) const {
  if (!(key_ == key) || activation_.lock() != activation.getIntrusivePtr()) return std::nullopt;
  auto input = input_.lock();
  auto node = node_.lock();
  if (!input || !node) return std::nullopt;
  return Reading{at::Tensor(std::move(input)), std::move(node)};
}

void SharedInput::keep(const at::Tensor& activation, const Key& key, const Reading& reading) {
  key_ = key;
  activation_ = weak(activation);
  input_ = weak(reading.input);
  node_ = reading.node;
}

}  // namespace gradacc
