#include "fused_weight.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <utility>

#include "../bindings/checks.h"
#include "../bindings/layout.h"
#include "node.h"

namespace gradacc {

namespace autograd = torch::autograd;

class ProductBackward : public FusedNode {
 public:
  ProductBackward(std::shared_ptr<FusedWeight> fused, std::shared_ptr<GradHooks> hooks,
                  FusedWeight::Product product, at::ScalarType input_dtype,
                  at::ScalarType bias_dtype)
      : fused_(std::move(fused)),
        hooks_(std::move(hooks)),
        product_(std::move(product)),
        input_dtype_(input_dtype),
        bias_dtype_(bias_dtype) {}

  std::string name() const override { return "FusedWeightBackward"; }

  // input: as it was multiplied, in the dtype of the product. cast: the 16-bit copy of the weight
  // that was multiplied with, if that was not the weight itself.
  void save(const at::Tensor& input, const at::Tensor& cast) {
    input_ = autograd::SavedVariable(input, false);
    if (product_.offsets) offsets_ = autograd::SavedVariable(*product_.offsets, false);
    if (!should_compute_output(kInput)) return;
    version_ = static_cast<int64_t>(fused_->weight_._version());
    if (cast.is_same(fused_->weight_)) {
      // Not the parameter itself, whose memory `.data =` may replace.
      weight_ = autograd::SavedVariable(cast.tensor_data(), false);
    } else {
      cast_ = cast;
    }
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    input_.reset_data();
    offsets_.reset_data();
    weight_.reset_data();
    cast_.reset();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    autograd::variable_list result(3);
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const std::unique_lock<std::mutex> lock(mutex_);
    const at::Tensor input = input_.unpack();
    if (product_.offsets) product_.offsets = offsets_.unpack();
    // With grad mode on, as under create_graph, the gradients are differentiable ones.
    const bool is_tracked = at::GradMode::is_enabled() || !is_plain(dy) || !is_plain(input);
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!is_tracked) below_autograd.emplace();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

    if (task_should_compute_output(kInput))
      result[kInput] = input_gradient(dy, weight(is_tracked), input.sizes(), is_tracked);
    if (task_should_compute_output(kWeight)) {
      const Demand demand = GradHooks::demand(next_edge(kWeight), hooks_.get());
      const bool is_added =
          !is_tracked && !is_watched() && demand == Demand::kMainGrad && add(dy, input);
      if (!is_added && demand != Demand::kNothing) result[kWeight] = weight_gradient(dy, input);
    }
    if (task_should_compute_output(kBias)) {
      // A float32 sum reaches the hook as it is; other readers get the bias's own dtype.
      const bool is_ours = GradHooks::demand(next_edge(kBias), nullptr) == Demand::kMainGrad;
      result[kBias] = is_ours && !is_tracked ? as_rows(dy).sum(0, false, at::kFloat)
                                             : as_rows(dy).sum(0).to(bias_dtype_);
    }
    return result;
  }

 private:
  static constexpr size_t kInput = 0, kWeight = 1, kBias = 2;

  // Hooks on this node see its gradients, and may return others.
  bool is_watched() const { return !post_hooks().empty(); }

  at::Tensor weight(bool is_tracked) const {
    const at::Tensor saved = cast_.defined() ? cast_ : weight_.unpack();
    if (!is_tracked) return saved;
    const at::Tensor& weight = fused_->weight_;
    const bool is_same = cast_.defined() || saved.const_data_ptr() == weight.const_data_ptr();
    TORCH_CHECK(is_same && static_cast<int64_t>(weight._version()) == version_,
                "gradacc_kernels: a weight was modified in place between forward and a backward "
                "with create_graph=True");
    return weight.to(saved.scalar_type());
  }

  // The gradient of the input, in the dtype in which that was given; or nothing, where it has been
  // added to the sum that all readers of the input share.
  at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef sizes,
                            bool is_tracked) const {
    const at::Tensor matrix = fused_->matrix(weight, product_);
    switch (product_.form) {
      case FusedWeight::Form::kLinear: {
        const at::Tensor rows = as_rows(dy);
        if (is_tracked) return rows.mm(matrix).view(sizes).to(input_dtype_);
        auto* shared = dynamic_cast<SharedInputNode*>(next_edge(kInput).function.get());
        if (shared && !shared->is_watched() && !is_watched()) {
          shared->add([&](at::Tensor& sum) { add_product(sum, rows, matrix, sizes); });
          return {};
        }
        at::Tensor alone;
        add_product(alone, rows, matrix, sizes);
        return alone;
      }
      case FusedWeight::Form::kBatched:
        if (!is_tracked && is_wide(dy)) return at::bmm(dy, matrix, at::kFloat);
        return dy.bmm(matrix).to(input_dtype_);
      default:
        return at::_grouped_mm(dy, matrix, product_.offsets).to(input_dtype_);
    }
  }

  // Whether products reach the input's gradient before they are rounded: under autocast, for a
  // float32 input, no 16-bit gradient is written to be cast afterwards.
  bool is_wide(const at::Tensor& dy) const {
    return dy.is_cuda() && input_dtype_ == at::kFloat && dy.scalar_type() != at::kFloat;
  }

  // sum = rows * matrix, + sum where there is one.
  void add_product(at::Tensor& sum, const at::Tensor& rows, const at::Tensor& matrix,
                   at::IntArrayRef sizes) const {
    if (!sum.defined()) {
      sum = (is_wide(rows) ? at::mm(rows, matrix, at::kFloat) : rows.mm(matrix)).view(sizes);
      sum = sum.to(input_dtype_);
      return;
    }
    at::Tensor target = sum.view({rows.size(0), matrix.size(1)});
    if (is_wide(rows)) {
      at::addmm_out(target, target, rows, matrix, at::kFloat);
    } else if (rows.scalar_type() == input_dtype_) {
      target.addmm_(rows, matrix);
    } else {
      target.add_(rows.mm(matrix));
    }
  }

  // The two operands of the weight gradient, left ᵀ right, in the weight's own orientation.
  std::pair<at::Tensor, at::Tensor> operands(const at::Tensor& dy, const at::Tensor& input) const {
    const bool is_linear = product_.form == FusedWeight::Form::kLinear;
    at::Tensor left = is_linear ? as_rows(dy) : dy, right = is_linear ? as_rows(input) : input;
    if (fused_->is_transposed_) std::swap(left, right);
    return {std::move(left), std::move(right)};
  }

  bool add(const at::Tensor& dy, const at::Tensor& input) const {
    const auto [left, right] = operands(dy, input);
    const Backend& backend = *find_backend(hooks_->device());
    const int processors =
        product_.form == FusedWeight::Form::kLinear
            ? backend.processors_beside(fused_->weight_.numel(), left.size(0), hooks_->device())
            : 0;
    const auto write = [&, &left = left, &right = right](const MainGrad& target) {
      if (!product_.expert)
        return backend.weight_grad(target.main, left, right, product_.offsets, target.factor,
                                   target.store, target.partials, processors);
      // The other experts' matrices take part in the window too.
      if (target.store) target.main.zero_();
      backend.weight_grad(target.main.select(0, *product_.expert), left, right, {}, target.factor,
                          false, nullptr, processors);
      return false;
    };
    return processors > 0 ? hooks_->add_beside(fused_->index_, {left, right}, write)
                          : hooks_->add(fused_->index_, write);
  }

  // In the weight's dtype, as stock autograd gives it.
  at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& input) const {
    const auto [left, right] = operands(dy, input);
    at::Tensor grad;
    switch (product_.form) {
      case FusedWeight::Form::kLinear:
        grad = left.t().mm(right);
        break;
      case FusedWeight::Form::kBatched:
        grad = left.transpose(1, 2).bmm(right);
        break;
      default:
        grad = at::_grouped_mm(left.t(), right, product_.offsets);
    }
    grad = grad.to(fused_->weight_.scalar_type());
    if (!product_.expert) return grad;
    return at::select_backward(grad, fused_->weight_.sizes(), 0, *product_.expert);
  }

  const std::shared_ptr<FusedWeight> fused_;
  const std::shared_ptr<GradHooks> hooks_;
  FusedWeight::Product product_;  // whose offsets are those that were saved, during apply
  const at::ScalarType input_dtype_;
  const at::ScalarType bias_dtype_;
  autograd::SavedVariable input_;
  autograd::SavedVariable offsets_;
  autograd::SavedVariable weight_;
  at::Tensor cast_;
  int64_t version_ = -1;
};

FusedWeight::FusedWeight(const std::shared_ptr<GradHooks>& hooks, int64_t index, at::Tensor weight,
                         bool is_transposed)
    : hooks_(hooks), index_(index), weight_(std::move(weight)), is_transposed_(is_transposed) {
  TORCH_CHECK_VALUE(weight_.dim() == 2 || weight_.dim() == 3,
                    "attach: a fused weight must have 2 or 3 dimensions, got ",
                    text(weight_.dim()));
}

at::Tensor FusedWeight::matrix(const at::Tensor& weight, const Product& product) const {
  const at::Tensor matrix = product.expert ? weight.select(0, *product.expert) : weight;
  return is_transposed_ ? matrix.transpose(-2, -1) : matrix;
}

at::Tensor FusedWeight::apply(const Product& product, const at::Tensor& input,
                              const at::Tensor& matrix, const std::optional<at::Tensor>& bias) {
  switch (product.form) {
    case Form::kLinear: {
      // The calls into which stock linear decomposes, for those who look at calls.
      const at::Tensor rows = as_rows(input);
      const at::Tensor output = bias ? at::addmm(*bias, rows, matrix.t()) : rows.mm(matrix.t());
      if (input.dim() == 2) return output;
      auto sizes = input.sizes().vec();
      sizes.back() = matrix.size(0);
      return output.view(sizes);
    }
    case Form::kBatched:
      return input.bmm(matrix.transpose(1, 2));
    default:
      return at::_grouped_mm(input, matrix.transpose(1, 2), product.offsets);
  }
}

std::optional<at::Tensor> FusedWeight::multiply(const at::Tensor& given, Product product,
                                                const std::optional<at::Tensor>& bias) {
  const auto hooks = hooks_.lock();
  if (!hooks || !can_fuse(given, weight_)) return std::nullopt;
  const auto device = weight_.device().type();
  const bool is_autocast = at::autocast::is_autocast_enabled(device);
  const auto dtype = is_autocast ? at::autocast::get_autocast_dtype(device) : weight_.scalar_type();
  if (is_autocast) {
    if (weight_.scalar_type() != dtype && weight_.scalar_type() != at::kFloat) return std::nullopt;
    if (!given.is_floating_point() || given.scalar_type() == at::kDouble) return std::nullopt;
  }
  if (!is_autocast && given.scalar_type() != dtype) return std::nullopt;
  const bool is_linear = product.form == Form::kLinear;  // the others add no input gradients up
  const auto [input, shared] =
      is_linear ? hooks->read(given, dtype) : SharedInput::Reading{given.to(dtype), {}};

  at::Tensor cast, output;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    cast = hooks->cast(index_, dtype);
  }
  decltype(make_node<ProductBackward>(nullptr, nullptr, product, dtype, dtype)) node;
  if (at::GradMode::is_enabled()) {
    node = make_node<ProductBackward>(shared_from_this(), hooks, product, given.scalar_type(),
                                      bias ? bias->scalar_type() : dtype);
    // Past the cast of the input, whose backward is in input_gradient.
    auto edges = autograd::collect_next_edges(given, weight_, bias ? *bias : at::Tensor());
    if (shared) edges[0] = autograd::Edge(shared, 0);
    node->set_next_edges(std::move(edges));
    // Before the product: a checkpoint stops recomputing at the last tensor that is saved.
    node->save(input, cast);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    output = apply(product, input, matrix(cast, product),
                   bias && is_autocast ? std::optional(bias->to(dtype)) : bias);
  }
  if (node) autograd::set_history(output, node);
  return output;
}

std::optional<at::Tensor> FusedWeight::linear(const at::Tensor& input,
                                              const std::optional<at::Tensor>& bias) {
  const int64_t in_features = weight_.size(is_transposed_ ? 0 : 1);
  if (weight_.dim() != 2 || input.dim() < 1 || input.size(-1) != in_features) return std::nullopt;
  return multiply(input, {}, bias);
}

std::optional<at::Tensor> FusedWeight::expert(const at::Tensor& input, int64_t expert,
                                              const std::optional<at::Tensor>& bias) {
  const int64_t in_features = weight_.size(is_transposed_ ? -2 : -1);
  if (weight_.dim() != 3 || input.dim() < 1 || input.size(-1) != in_features ||
      expert < -weight_.size(0) || expert >= weight_.size(0))
    return std::nullopt;
  return multiply(input, {Form::kLinear, expert, std::nullopt}, bias);
}

std::optional<at::Tensor> FusedWeight::batched(const at::Tensor& input) {
  const int64_t in_features = weight_.size(is_transposed_ ? -2 : -1);
  if (weight_.dim() != 3 || input.dim() != 3 || input.size(0) != weight_.size(0) ||
      input.size(2) != in_features)
    return std::nullopt;
  return multiply(input, {Form::kBatched, std::nullopt, std::nullopt}, std::nullopt);
}

std::optional<at::Tensor> FusedWeight::grouped(const at::Tensor& input, const at::Tensor& offsets) {
  const int64_t in_features = weight_.size(is_transposed_ ? -2 : -1);
  if (weight_.dim() != 3 || input.dim() != 2 || input.size(1) != in_features ||
      offsets.scalar_type() != at::kInt || offsets.dim() != 1 ||
      offsets.size(0) != weight_.size(0) || offsets.device() != weight_.device())
    return std::nullopt;
  return multiply(input, {Form::kGrouped, std::nullopt, offsets}, std::nullopt);
}

}  // namespace gradacc
