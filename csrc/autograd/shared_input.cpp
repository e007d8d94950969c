#include "shared_input.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <iterator>

namespace gradacc {

namespace autograd = torch::autograd;

autograd::variable_list SharedInputNode::apply(autograd::variable_list&& grads) {
  at::Tensor sum;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sums_.find(autograd::get_current_graph_task_id());
    if (found != sums_.end()) {
      if (const auto own = found->second.lock()) sum = std::move(*own);
      sums_.erase(found);
    }
  }
  if (!sum.defined()) return {std::move(grads[0])};
  return {grads[0].defined() ? grads[0] + sum : std::move(sum)};
}

bool SharedInputNode::is_watched() {
  if (!pre_hooks().empty() || !tensor_pre_hooks().empty()) return true;
  const auto* exec_info = autograd::get_current_graph_task_exec_info();
  if (!exec_info || exec_info->empty()) return false;
  const auto found = exec_info->find(this);
  return found != exec_info->end() && found->second.captures_;
}

void SharedInputNode::add(c10::function_ref<void(at::Tensor& sum)> add) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::weak_ptr<at::Tensor>& known = sums_[autograd::get_current_graph_task_id()];
  auto sum = known.lock();
  if (!sum) {
    sum = std::make_shared<at::Tensor>();
    known = sum;
    autograd::Engine::get_default_engine().queue_callback([sum] {});
    for (auto entry = sums_.begin(); entry != sums_.end();)
      entry = entry->second.expired() ? sums_.erase(entry) : std::next(entry);
  }
  add(*sum);
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
