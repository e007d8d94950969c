#include "shared_input.h"

#include <ATen/core/grad_mode.h>
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

SharedInput::Reading SharedInput::read(const at::Tensor& activation, at::ScalarType dtype,
                                       std::optional<c10::Stream> stream, uint64_t capture_id) {
  const State now{static_cast<int64_t>(activation._version()), dtype, at::GradMode::is_enabled(),
                  stream, capture_id};
  const bool is_known = now == state_ && activation_.lock() == activation.getIntrusivePtr();
  if (!is_known) {
    state_ = now;
    activation_ = weak(activation);
    copy_ = weak(at::Tensor());
    node_ = WeakPointer<SharedInputPointer>();
  }
  Reading reading{activation, node_.lock()};
  if (activation.scalar_type() != dtype) {
    if (auto copy = copy_.lock()) {
      reading.input = at::Tensor(std::move(copy));
    } else {
      reading.input = activation.to(dtype);
      copy_ = weak(reading.input);
    }
  }
  if (now.is_tracked && activation.requires_grad() && !reading.node) {
    reading.node = make_node<SharedInputNode>();
    reading.node->set_next_edges(autograd::collect_next_edges(activation));
    reading.node->add_input_metadata(activation);
    node_ = reading.node;
  }
  return reading;
}

}  // namespace gradacc
