#include "fused_embedding.h"

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <utility>

#include "../bindings/embedding.h"
#include "node.h"

namespace gradacc {

namespace autograd = torch::autograd;

class LookupBackward : public FusedNode {
 public:
  LookupBackward(std::shared_ptr<FusedEmbedding> fused, std::shared_ptr<GradHooks> hooks,
                 const at::Tensor& indices)
      : fused_(std::move(fused)), hooks_(std::move(hooks)), indices_(indices, false) {}

  std::string name() const override { return "FusedEmbeddingBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    indices_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    const at::Tensor& dy = grads[0];
    if (!dy.defined() || !task_should_compute_output(0)) return {at::Tensor()};
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor indices = indices_.unpack();
    const Demand demand = GradHooks::demand(next_edge(0), hooks_.get());
    if (demand == Demand::kNothing) return {at::Tensor()};
    // Hooks on this node see its gradient, and may return another.
    const bool is_watched = !post_hooks().empty();
    if (demand == Demand::kMainGrad && !is_watched && !at::GradMode::is_enabled() && is_plain(dy) &&
        is_plain(indices) && add(dy, indices))
      return {at::Tensor()};
    const at::Tensor grad =
        at::embedding_backward(dy, indices, fused_->weight_.size(0), fused_->padding_index_,
                               /*scale_grad_by_freq=*/false, fused_->is_sparse_);
    return {grad.to(fused_->weight_.scalar_type())};
  }

 private:
  bool add(const at::Tensor& dy, const at::Tensor& indices) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor rows = dy.reshape({indices.numel(), dy.size(-1)});
    const at::Tensor flat = indices.reshape({indices.numel()});
    return hooks_->add(fused_->index_, [&](const MainGrad& target) {
      embedding(target.main, rows, flat, fused_->padding_index_, target.factor.scale,
                target.factor.inv_scale, target.store,
                target.are_partials_valid ? target.partials : nullptr);
      return target.are_partials_valid;
    });
  }

  const std::shared_ptr<FusedEmbedding> fused_;
  const std::shared_ptr<GradHooks> hooks_;
  autograd::SavedVariable indices_;
};

FusedEmbedding::FusedEmbedding(const std::shared_ptr<GradHooks>& hooks, int64_t index,
                               at::Tensor weight, int64_t padding_index, bool is_sparse)
    : hooks_(hooks),
      index_(index),
      weight_(std::move(weight)),
      padding_index_(padding_index),
      is_sparse_(is_sparse) {}

std::optional<at::Tensor> FusedEmbedding::lookup(const at::Tensor& indices) {
  const auto hooks = hooks_.lock();
  const auto type = indices.scalar_type();
  if (!hooks || (type != at::kLong && type != at::kInt) || !can_fuse(indices, weight_))
    return std::nullopt;
  at::Tensor output;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = at::embedding(weight_, indices, padding_index_, false, is_sparse_);
  }
  if (!at::GradMode::is_enabled()) return output;
  auto node = make_node<LookupBackward>(shared_from_this(), hooks, indices);
  node->set_next_edges(autograd::collect_next_edges(weight_));
  autograd::set_history(output, node);
  return output;
}

}  // namespace gradacc
