#include "hook.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/utils/torch_dispatch_mode.h>

#include <algorithm>
#include <deque>
#include <iterator>
#include <string_view>
#include <typeinfo>
#include <unordered_set>
#include <utility>

#include "../bindings/checks.h"
#include "../bindings/layout.h"
#include "../bindings/ops.h"
#include "uses.h"

namespace gradacc {

namespace autograd = torch::autograd;

// What additions beside backward read may take so much memory, the largest of them left aside;
// backward waits before it is more.
constexpr int64_t kBesideBytes = int64_t{64} << 20;

class GradHooks::PreHook : public autograd::FunctionPreHook {
 public:
  PreHook(std::weak_ptr<GradHooks> hooks, int64_t index)
      : hooks_(std::move(hooks)), index_(index) {}

  autograd::variable_list operator()(const autograd::variable_list& grads) override {
    const auto hooks = hooks_.lock();
    if (!hooks) return grads;
    autograd::variable_list left{hooks->consume(index_, grads.at(0))};
    if (hooks->buckets_) hooks->arrived(index_);
    return left;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK(false,
                "gradacc_kernels: compiled autograd cannot trace the gradient hook. Turn it off "
                "(torch._dynamo.config.compiled_autograd = False), or detach the Accumulator.");
  }

  bool belongs_to(const GradHooks* hooks) const { return hooks_.lock().get() == hooks; }

  // Whether the hook adds gradients, for `hooks` if it is not null.
  bool is_active(const GradHooks* hooks) const {
    const auto alive = hooks_.lock();
    return alive && !alive->removed_ && (!hooks || alive.get() == hooks);
  }

 private:
  std::weak_ptr<GradHooks> hooks_;
  int64_t index_;
};

// Holds the mutex; lets tensors that `.grad` gave up die after its release, for a Python finaliser
// of theirs may call us. So may the handler of a dispatch mode: none sees what happens meanwhile.
class GradHooks::Lock {
 public:
  explicit Lock(GradHooks& hooks) : hooks_(hooks), lock_(hooks.mutex_) {
    if (c10::impl::TorchDispatchModeTLS::any_modes_set()) no_modes_.emplace();
  }
  ~Lock() {
    const auto retired = std::exchange(hooks_.retired_, {});
    lock_.unlock();
  }

 private:
  GradHooks& hooks_;
  std::unique_lock<std::mutex> lock_;
  std::optional<torch::torch_dispatch_mode::StashTorchDispatchStackGuard> no_modes_;
};

// Of so many gradients that wait, a launch's table is full. Launched then, they are still in the
// processor's cache.
constexpr size_t kQueueLength = 640;

namespace {

// What is launched on `second` from now on starts when `first` has done what it was given.
void order(const c10::Stream& first, const c10::Stream& second) {
  if (first == second) return;
  c10::Event event(first.device_type());
  event.record(first);
  event.block(second);
}

}  // namespace

// What one backward has under way. The engine's callback owns it, so a backward that raises drops
// the gradients that still wait, and leaves their `.grad` as it was.
struct GradHooks::Backward {
  // An addition beside backward: what it reads must not be freed before it has ended.
  struct Addition {
    std::vector<at::Tensor> reads;
    int64_t bytes;
    c10::Stream stream;  // that of backward, in whose order `reads` are freed
    c10::Event done;
  };

  int graph_task;
  // Small gradients that wait for a common launch.
  std::optional<c10::Stream> stream;  // on which they were queued, and are added
  std::vector<Entry> entries;
  int64_t bytes = 0;
  int64_t batch = 0;  // counts the launches
  std::deque<Addition> beside;

  ~Backward() {
    std::vector<at::Tensor> retired;
    while (!beside.empty()) wait_for_oldest(retired);
  }

  // Has backward's stream wait for the oldest addition; what that reads goes to `retired`.
  void wait_for_oldest(std::vector<at::Tensor>& retired) {
    Addition& oldest = beside.front();
    oldest.done.block(oldest.stream);
    std::move(oldest.reads.begin(), oldest.reads.end(), std::back_inserter(retired));
    beside.pop_front();
  }

  // What the additions read, but for the largest: that of a language model's head would make
  // backward wait for it at once.
  int64_t beside_bytes() const {
    int64_t sum = 0, largest = 0;
    for (const Addition& addition : beside) {
      sum += addition.bytes;
      largest = std::max(largest, addition.bytes);
    }
    return sum - largest;
  }
};

namespace {

// Whether a hook is one of Python's that was removed: its holder stays, with an empty dict.
bool is_removed(const autograd::FunctionPreHook& hook) {
  // By name, because torch does not export what dynamic_cast to these classes needs.
  const auto is = [&](const char* name) {
    return std::string_view(typeid(hook).name()).find(name) != std::string_view::npos;
  };
  PyObject* dict = nullptr;
  if (is("23PyFunctionTensorPreHookE")) {
    dict = static_cast<const autograd::PyFunctionTensorPreHook&>(hook).dict;
  } else if (is("17PyFunctionPreHookE")) {
    dict = static_cast<const autograd::PyFunctionPreHook&>(hook).dict;
  }
  if (!dict) return false;
  const pybind11::gil_scoped_acquire gil;
  return PyDict_Size(dict) == 0;
}

// Whether a parameter is of 16 bits, and its gradients of what dtype we like: attach has seen to
// that, unless the user had asked for a grad_dtype.
bool is_half(const at::Tensor& param) {
  const auto* meta = autograd::impl::get_autograd_meta(param);
  return c10::isReducedFloatingType(param.scalar_type()) && meta &&
         meta->allow_grad_dtype_mismatch_;
}

// Whether one of the hooks is the reducer of DistributedDataParallel.
bool is_reduced(const autograd::Node& leaf) {
  return std::any_of(leaf.post_hooks().begin(), leaf.post_hooks().end(), [](const auto& hook) {
    return std::string_view(typeid(*hook).name()).find("LambdaPostHook") != std::string_view::npos;
  });
}

// Whether kernels take a `.grad`, into which the user may have put anything, as it is.
bool is_main(const at::Tensor& grad) {
  return grad.scalar_type() == at::kFloat && grad.layout() == at::kStrided &&
         grad.is_non_overlapping_and_dense() && !grad.is_neg() && !grad._is_zerotensor() &&
         !grad.requires_grad();
}

// The values of a `.grad` as kernels take them.
at::Tensor as_main(const at::Tensor& grad) {
  if (is_main(grad)) return grad;
  const at::Tensor values = grad.layout() == at::kStrided ? grad : grad.to_dense();
  return at::empty(grad.sizes(), grad.options().layout(at::kStrided).dtype(at::kFloat))
      .copy_(values);
}

std::optional<c10::Stream> current_stream(at::Device device) {
  if (device.is_cpu()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace

void check_not_reduced(const at::Tensor& param) {
  if (!c10::isReducedFloatingType(param.scalar_type())) return;
  const auto leaf = autograd::impl::try_get_grad_accumulator(param);
  TORCH_CHECK(!leaf || !is_reduced(*leaf), "gradacc_kernels: a ", text(param.scalar_type()),
              " parameter of shape ", text(param.sizes()),
              " is under DistributedDataParallel, which cannot reduce a float32 gradient of it. "
              "Leave DistributedDataParallel out: attach(model, "
              "process_group=torch.distributed.group.WORLD) reduces float32 gradients by itself, "
              "once a window with Accumulator.no_sync(); or train float32 parameters under "
              "autocast.");
}

GradHooks::GradHooks(std::vector<at::Tensor> params, std::vector<at::Tensor> main_grads,
                     std::vector<at::Tensor> partials, double scale, at::Tensor inv_scale,
                     int64_t queue_below, int64_t queue_bytes, std::vector<at::Tensor> owners)
    : device_(inv_scale.device()),
      backend_(check_backend({"attach", "parameters"}, inv_scale.device())),
      scale_(check_scale("attach", scale)),
      inv_scale_(std::move(inv_scale)),
      queue_below_(queue_below),
      queue_bytes_(queue_bytes) {
  check_scalar({"attach", "inv_scale"}, inv_scale_, device_);
  if (!owners.empty()) {
    check_length({"attach", "owners"}, owners.size(), params.size());
    for (const at::Tensor& param : params)
      main_grads.push_back(at::empty(param.sizes(), at::device(at::kMeta).dtype(at::kFloat)));
  }
  check_length({"attach", "main_grads"}, main_grads.size(), params.size());
  check_length({"attach", "partials"}, partials.size(), params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    if (owners.empty()) check_main({"attach", "main_grads", index}, main_grads[i], device_);
    check_partials({"attach", "partials", index}, partials[i], params[i]);
    Param param;
    if (!owners.empty()) param.owner = std::move(owners[i]);
    param.dtype = params[i].scalar_type();
    param.variable = std::move(params[i]);
    param.main = std::move(main_grads[i]);
    param.partials = std::move(partials[i]);
    params_.push_back(std::move(param));
  }
  known_backwards_.fill(-1);
}

void GradHooks::install(int64_t index) {
  Param& param = params_[index];
  param.node = autograd::impl::grad_accumulator(param.variable);
  if (!param.node) return;  // frozen
  if (param.is_cast) deliver_in(*param.node, at::kFloat);
  for (const auto& hook : param.node->pre_hooks()) {
    const auto* ours = dynamic_cast<const PreHook*>(hook.get());
    if (ours && ours->belongs_to(this)) return;
  }
  param.node->add_pre_hook(std::make_unique<PreHook>(weak_from_this(), index));
}

bool GradHooks::refresh() {
  const Lock lock(*this);
  if (removed_) return true;
  const auto stream = current_stream(device_);
  for (const Param& param : params_) check_not_reduced(param.variable);
  for (size_t i = 0; i < params_.size(); ++i) {
    Param& param = params_[i];
    const at::Tensor& variable = param.variable;
    if (variable.scalar_type() != param.dtype || variable.device() != device_ ||
        variable.sizes() != param.main.sizes() ||
        (variable.numel() > 0 && !same_layout(variable, param.main) &&
         variable.is_non_overlapping_and_dense()))
      return false;
    const at::Tensor& grad = variable.mutable_grad();
    if (grad.defined() && grad.scalar_type() != param.main.scalar_type() &&
        grad.is_same(param.exposed))
      restore(param);
    if (autograd::impl::try_get_grad_accumulator(variable) != param.node || !param.node) {
      install(i);
    } else if (stream && param.node->stream() != stream && param.node.use_count() == 1 &&
               param.node->post_hooks().empty() && param.node->pre_hooks().size() == 1) {
      // Nobody else knows this node, so a new one, of the current stream, can take its place.
      param.node = nullptr;
      install(i);
    }
  }
  return true;
}

// The PreHooks stay on their nodes, where the engine may be running them, and let gradients pass.
void GradHooks::remove() {
  const Lock lock(*this);
  for (const auto& weak : backwards_) {
    const auto backward = weak.lock();
    // Not another's: the engine may still hold one that has raised.
    if (backward && backward->graph_task == autograd::get_current_graph_task_id())
      finish(*backward);
  }
  if (beside_) order(*beside_, *current_stream(device_));
  removed_ = true;
  for (Param& param : params_) param.node = nullptr;
}

void GradHooks::expose(int64_t index) {
  const Lock lock(*this);
  restore(params_.at(index));
}

at::Tensor GradHooks::main_grad(int64_t index) {
  const Lock lock(*this);
  Param& param = params_.at(index);
  make_view(param);
  return param.exposed;
}

// Brings `.grad` back into main, and main back into `.grad`.
void GradHooks::restore(Param& param) {
  adopt(param);
  show(param);
  param.statistics_version.reset();
  let_go(param);
}

void GradHooks::begin(int64_t index) {
  const Lock lock(*this);
  Param& param = params_.at(index);
  if (param.variable.mutable_grad().defined()) return;
  const at::NoGradGuard no_grad;
  param.main.zero_();
  param.micro_batches = 0;
  restore(param);
}

bool GradHooks::added(int64_t index, bool drops) {
  if (!add(index, [](const MainGrad&) { return false; })) return false;
  const Lock lock(*this);
  if (drops) params_[index].dropped_task = autograd::get_current_graph_task_id();
  return true;
}

bool GradHooks::is_dropped(const Param& param) {
  const Lock lock(*this);
  return param.dropped_task >= 0 && param.dropped_task == autograd::get_current_graph_task_id();
}

void GradHooks::invalidate() {
  const Lock lock(*this);
  for (Param& param : params_) param.statistics_version.reset();
}

bool GradHooks::use_inv_scale() {
  const Lock lock(*this);
  if (is_captured_without_) return false;
  is_inv_scale_used_ = true;
  factor_task_ = -1;
  return true;
}

bool GradHooks::are_statistics_valid(const Param& param) const {
  const at::Tensor& grad = param.variable.mutable_grad();
  return grad.defined() && grad.is_same(param.exposed) && is_ours(grad, param) &&
         param.statistics_version == static_cast<int64_t>(grad._version());
}

std::vector<Statistics> GradHooks::measure(bool from_slots,
                                           const std::optional<std::vector<int64_t>>& indices) {
  const Lock lock(*this);
  const at::NoGradGuard no_grad;
  Statistics statistics;
  std::vector<Squares> squares;  // to be computed: into slots, or into scratch
  std::vector<Slots> slots;
  std::vector<at::Tensor> alive;
  // What a graph being captured would write is not written now.
  const bool renews = from_slots && backend_.capture_id(device_) == 0;
  const auto visit = [&](int64_t index) {
    Param& param = params_.at(index);
    const at::Tensor& grad = param.variable.mutable_grad();
    if (!grad.defined()) return;
    statistics.indices.push_back(index);
    const int64_t numel = param.main.numel();
    auto* partials = static_cast<float*>(param.partials.data_ptr());
    const bool is_view = grad.is_same(param.exposed) && is_ours(grad, param);
    if (from_slots && are_statistics_valid(param)) {
      slots.push_back({partials, num_chunks(numel)});
      return;
    }
    if (renews && is_view) {
      describe(param);
    } else {
      alive.push_back(at::empty({num_chunks(numel)}, param.partials.options()));
      partials = static_cast<float*>(alive.back().data_ptr());
    }
    const at::Tensor values = as_main(grad);
    squares.push_back({static_cast<float*>(values.data_ptr()), partials, numel});
    slots.push_back({partials, num_chunks(numel)});
    if (!values.is_same(grad)) alive.push_back(values);
  };
  if (indices) {
    for (const int64_t index : *indices) visit(index);
  } else {
    for (size_t i = 0; i < params_.size(); ++i) visit(static_cast<int64_t>(i));
  }
  if (slots.empty()) return {};
  const auto options = inv_scale_.options();
  statistics.sums = at::empty({static_cast<int64_t>(slots.size())}, options);
  statistics.norm = at::empty({}, options);
  statistics.found_inf = at::empty({}, options);
  if (!squares.empty()) backend_.sum_of_squares(squares, device_);
  backend_.reduce(slots, static_cast<float*>(statistics.sums.data_ptr()),
                  static_cast<float*>(statistics.norm.data_ptr()),
                  static_cast<float*>(statistics.found_inf.data_ptr()), device_);
  return {std::move(statistics)};
}

void GradHooks::scale(const at::Tensor& factor) {
  const Lock lock(*this);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> mains;
  std::vector<Param*> left_over;
  for (Param& param : params_) {
    const at::Tensor& grad = param.variable.mutable_grad();
    if (!grad.defined()) continue;
    if (is_left_over(param)) left_over.push_back(&param);
    if (is_main(grad)) {
      mains.push_back(grad);
    } else {
      grad.mul_(factor);
    }
  }
  gradacc::scale_(mains, factor.to(at::kFloat));
  for (Param* param : left_over)
    param->ended_version = static_cast<int64_t>(param->variable.mutable_grad()._version());
}

std::optional<at::Tensor> GradHooks::current(int64_t index) {
  const Lock lock(*this);
  const Param& param = params_.at(index);
  const at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined()) return std::nullopt;
  return sum_of(grad, param);
}

int64_t GradHooks::micro_batches(int64_t index) {
  const Lock lock(*this);
  const Param& param = params_.at(index);
  return has_begun(param) ? param.micro_batches : 0;
}

int64_t GradHooks::most_micro_batches() {
  const Lock lock(*this);
  int64_t most = 0;
  for (const Param& param : params_)
    if (has_begun(param)) most = std::max(most, param.micro_batches);
  return most;
}

void GradHooks::end_window() {
  const Lock lock(*this);
  const int64_t ended = window_++;
  for (Param& param : params_) {
    param.statistics_version.reset();  // a fused step may have written
    if (param.window != ended) continue;
    const at::Tensor& grad = param.variable.mutable_grad();
    const bool is_view = grad.defined() && grad.is_same(param.exposed);
    param.ended_version = is_view ? static_cast<int64_t>(grad._version()) : -1;
  }
}

int64_t GradHooks::left_over() {
  const Lock lock(*this);
  for (size_t i = 0; i < params_.size(); ++i)
    if (is_left_over(params_[i])) return static_cast<int64_t>(i);
  return -1;
}

bool GradHooks::is_left_over(const Param& param) const {
  const at::Tensor& grad = param.variable.mutable_grad();
  return param.window != window_ && grad.defined() && grad.is_same(param.exposed) &&
         param.ended_version == static_cast<int64_t>(grad._version());
}

Tally GradHooks::tally() {
  const Lock lock(*this);
  return tally_;
}

void GradHooks::weigh(bool is_weighted) {
  const Lock lock(*this);
  is_weighted_ = is_weighted;
}

void GradHooks::call_at_end(std::function<void()> call) {
  const Lock lock(*this);
  at_end_ = std::move(call);
}

void GradHooks::hold() {
  const Lock lock(*this);
  is_holding_ = true;
}

std::vector<at::Tensor> GradHooks::held() {
  const Lock lock(*this);
  std::vector<at::Tensor> grads;
  for (const Held& held : held_)
    for (const Entry& entry : held.entries) grads.push_back(entry.grad);
  return grads;
}

void GradHooks::reduce_with(std::vector<int64_t> bucket_of,
                            std::function<void(int64_t, int64_t)> launch, bool overlaps) {
  check_length({"attach", "buckets"}, bucket_of.size(), params_.size());
  const Lock lock(*this);
  buckets_.emplace(std::move(bucket_of));
  launch_ = std::move(launch);
  overlaps_ = overlaps;
}

void GradHooks::set_reducing(bool is_reducing, int64_t every) {
  const Lock lock(*this);
  wants_reduction_ = is_reducing;
  reduce_every_ = every;
}

bool GradHooks::is_reducing() {
  const Lock lock(*this);
  return is_reducing_;
}

bool GradHooks::is_reduced() {
  const Lock lock(*this);
  return is_reduced_;
}

// A backward inside of one that reduces, as a reentrant checkpoint's, is a part of it.
void GradHooks::begin_reduction() {
  if (!buckets_ || !reducing_backward_.expired()) return;
  TORCH_CHECK(!buckets_->has_begun(),
              "gradacc_kernels: an earlier backward has begun to reduce its gradients over the "
              "ranks, and it did not end, or a micro_batch() has several backwards, of which all "
              "but the last one have to run inside of no_sync(). What the ranks hold differs: "
              "restart the processes from a checkpoint");
  is_reduced_ = false;
  is_reducing_ = wants_reduction_ && tally_.backwards % reduce_every_ == 0;
}

// A gradient that comes later than the last one of its parameter.
void GradHooks::check_not_launched(const Param& param) const {
  TORCH_CHECK(!buckets_ || !buckets_->is_handed_out(&param - params_.data()),
              "gradacc_kernels: a parameter of shape ", text(param.main.sizes()),
              " got another gradient in a backward that was already reducing it over the ranks, as "
              "where several reentrant checkpoints share it, or a micro_batch() has several "
              "backwards: use checkpoint(use_reentrant=False), or run all backwards but the last "
              "one inside of no_sync()");
}

void GradHooks::arrived(int64_t index) {
  Buckets::Range ready;
  std::optional<c10::Stream> stream;
  {
    const Lock lock(*this);
    // What somebody may write to after us is reduced at the end.
    if (removed_ || !is_reducing_ || !overlaps_ || is_watched(params_[index])) return;
    ready = buckets_->arrived(index);
    stream = prepare(ready);
  }
  launch(ready, stream);
}

void GradHooks::launch_rest() {
  Buckets::Range rest;
  std::optional<c10::Stream> stream;
  {
    const Lock lock(*this);
    if (!buckets_) return;
    if (!any_has_begun()) tally_ = {tally_.window + 1, 0, 0};
    rest = buckets_->rest();
    stream = prepare(rest);
  }
  launch(rest, stream);
}

std::optional<c10::Stream> GradHooks::prepare(const Buckets::Range& buckets) {
  const auto here = current_stream(device_);
  if (buckets.first == buckets.last) return here;
  const at::NoGradGuard no_grad;
  if (here && !reduction_stream_)
    reduction_stream_ =
        c10::impl::VirtualGuardImpl(device_.type()).getStreamFromGlobalPool(device_);
  bool is_beside = false;
  for (int64_t bucket = buckets.first; bucket < buckets.last; ++bucket) {
    for (const int64_t index : buckets_->params_of(bucket)) {
      Param& param = params_[index];
      const auto backward = param.backward.lock();
      if (backward && backward->batch == param.batch) flush(*backward);
      is_beside = is_beside || param.is_beside;
      if (!adopt(param)) {  // the other ranks may have a gradient of it
        param.main.zero_();
        count(param, -1, true);
      }
      if (param.variable.requires_grad()) show(param);
      param.statistics_version.reset();
    }
  }
  if (here) order(*here, *reduction_stream_);
  if (is_beside) order(*beside_, *reduction_stream_);
  return reduction_stream_;
}

// Without the mutex, for it calls Python.
void GradHooks::launch(const Buckets::Range& buckets, const std::optional<c10::Stream>& stream) {
  if (buckets.first == buckets.last) return;
  const c10::OptionalStreamGuard guard(stream);
  launch_(buckets.first, buckets.last);
}

void GradHooks::end_reduction() {
  const Lock lock(*this);
  if (!buckets_) return;
  buckets_->reset();
  is_reducing_ = false;
  is_reduced_ = true;
  for (Param& param : params_) {
    if (param.variable.mutable_grad().defined()) show(param);
    param.statistics_version.reset();
  }
}

// A launch adds once to a parameter: a second gradient of one, as of two reentrant checkpoints that
// share it, starts another.
void GradHooks::commit_held() {
  const Lock lock(*this);
  const auto all = std::exchange(held_, {});
  for (const Held& held : all) {
    if (removed_) {
      hand_back(held.entries);
      continue;
    }
    count_backward();
    std::vector<Entry> batch;
    std::unordered_set<Param*> params;
    for (const Entry& entry : held.entries) {
      if (!params.insert(entry.param).second) {
        commit(std::exchange(batch, {}), held.graph_task);
        params = {entry.param};
      }
      batch.push_back(entry);
    }
    commit(batch, held.graph_task);
  }
}

void GradHooks::drop_held() {
  const Lock lock(*this);
  for (const Held& held : std::exchange(held_, {}))
    for (const Entry& entry : held.entries) retired_.push_back(entry.grad);
}

void GradHooks::load(int64_t index, const std::optional<at::Tensor>& sum, int64_t micro_batches,
                     int64_t backwards) {
  const Lock lock(*this);
  Param& param = params_.at(index);
  if (sum) {
    const at::NoGradGuard no_grad;
    param.main.copy_(*sum);
    show(param);
  } else {
    retired_.push_back(std::exchange(param.variable.mutable_grad(), {}));
  }
  tally_ = {tally_.window + 1, backwards, 0};
  param.statistics_version.reset();
  param.micro_batches = micro_batches;
  param.window = window_;
  param.graph_task = -1;
}

// By address, not by identity: Module.to() writes another tensor into the `.grad` object.
bool GradHooks::is_ours(const at::Tensor& grad, const Param& param) const {
  return grad.layout() == at::kStrided && grad.scalar_type() == param.main.scalar_type() &&
         grad.device() == device_ && grad.sizes() == param.main.sizes() &&
         same_layout(grad, param.main) && grad.const_data_ptr() == param.main.const_data_ptr();
}

// Module.to(dtype) cast our view in place, and nobody wrote to it since a gradient was added: the
// sums in main are the exact ones.
bool GradHooks::was_cast(const at::Tensor& grad, const Param& param) const {
  return grad.is_same(param.exposed) && grad.scalar_type() != param.main.scalar_type() &&
         static_cast<int64_t>(grad._version()) == param.exposed_version;
}

// What `.grad` stands for: main, or its own values. Where our view was cast and written to, before
// or after, elements that the cast has only rounded are those of main.
at::Tensor GradHooks::sum_of(const at::Tensor& grad, const Param& param) const {
  if (is_ours(grad, param) || was_cast(grad, param)) return param.main;
  if (grad.layout() != at::kStrided) return grad.to_dense();
  if (!grad.is_same(param.exposed) || grad.scalar_type() == param.main.scalar_type() ||
      grad.device() != device_ || grad.sizes() != param.main.sizes())
    return grad;
  const at::NoGradGuard no_grad;
  const at::Tensor is_rounded = param.main.to(grad.scalar_type()).eq(grad).logical_and_(grad.ne(0));
  return at::where(is_rounded, param.main, grad.to(param.main.scalar_type()));
}

// Brings into main what `.grad` holds; false when there is none, so that main must be stored to.
bool GradHooks::adopt(Param& param) {
  if (param.owner.defined()) take_up(param);
  const at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined()) return false;
  const at::Tensor value = sum_of(grad, param);
  if (value.is_same(param.main)) return true;
  const at::NoGradGuard no_grad;
  param.main.copy_(value.is_alias_of(param.main) ? value.clone() : value);
  return true;
}

// Gives main memory: that of `.grad`, or new one.
void GradHooks::take_up(Param& param) {
  const at::Tensor& grad = param.variable.mutable_grad();
  const bool is_kept = grad.defined() && is_main(grad) && same_layout(grad, param.main);
  param.main =
      is_kept ? grad.variable_data()
              : at::empty_strided(param.main.sizes(), param.main.strides(), inv_scale_.options());
}

// Leaves the memory of main to `.grad` alone.
void GradHooks::let_go(Param& param) {
  if (!param.owner.defined()) return;
  param.main = at::empty_strided(param.main.sizes(), param.main.strides(),
                                 at::device(at::kMeta).dtype(at::kFloat));
  param.exposed.reset();
}

// A tensor of its own, with a version counter of its own, which others may have cast or drawn into
// a graph since.
void GradHooks::make_view(Param& param) {
  if (param.exposed.defined() && is_ours(param.exposed, param) && !param.exposed.requires_grad())
    return;
  retired_.push_back(std::exchange(param.exposed, param.main.variable_data()));
}

// Makes `.grad` the view of main, which was written to.
void GradHooks::show(Param& param) {
  at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined() || !is_ours(grad, param)) {
    make_view(param);
    retired_.push_back(std::exchange(grad, param.exposed));
  }
  grad.unsafeGetTensorImpl()->bump_version();
  param.exposed_version = static_cast<int64_t>(grad._version());
}

// The slots were written with main.
void GradHooks::describe(Param& param) {
  param.statistics_version.reset();
  const at::Tensor& grad = param.variable.mutable_grad();
  if (grad.is_same(param.exposed)) param.statistics_version = static_cast<int64_t>(grad._version());
}

void GradHooks::commit(const std::vector<Entry>& entries, int graph_task) {
  items_.clear();
  for (const Entry& entry : entries) {
    Param& param = *entry.param;
    const bool store = !adopt(param);
    count(param, graph_task, store);
    items_.push_back({static_cast<float*>(param.main.data_ptr()), entry.grad.const_data_ptr(),
                      static_cast<float*>(param.partials.data_ptr()), param.main.numel(),
                      grad_type(entry.grad), store});
  }
  backend_.accumulate(items_, scale_, static_cast<const float*>(inv_scale_.const_data_ptr()),
                      device_);
  for (const Entry& entry : entries) {
    Param& param = *entry.param;
    show(param);
    describe(param);
    let_go(param);
  }
}

at::Tensor GradHooks::consume(int64_t index, const at::Tensor& grad) {
  if (!grad.defined() || grad.key_set().has(c10::DispatchKey::Python)) return grad;
  Param& param = params_[index];
  if (!param.variable.requires_grad()) return grad;  // frozen since forward: AccumulateGrad skips
  if (is_dropped(param)) return {};
  TORCH_CHECK(grad.sizes() == param.main.sizes() && grad.device() == device_,
              "gradacc_kernels: a parameter attached with shape ", text(param.main.sizes()), " on ",
              text(device_), " received a gradient of shape ", text(grad.sizes()), " on ",
              text(grad.device()),
              ". Call Accumulator.refresh() after moving parameters; detach and attach again after "
              "reshaping them.");
  // With grad mode on (create_graph) only stock accumulation keeps `.grad` differentiable.
  if (at::GradMode::is_enabled()) {
    {
      const Lock lock(*this);
      if (removed_) return grad;
      TORCH_CHECK(
          !is_holding_,
          "gradacc_kernels: with nonfinite='skip_micro_batch' gradients wait until backward "
          "has ended, and those of create_graph=True cannot: attach with "
          "nonfinite='skip_window'.");
      TORCH_CHECK(!buckets_,
                  "gradacc_kernels: gradients of create_graph=True are added by autograd, after "
                  "the reduction over ranks has seen them last: attach without process_group.");
      is_new_backward();
      count(param, autograd::get_current_graph_task_id(), !param.variable.grad().defined());
    }
    return grad * (inv_scale_ * scale_);
  }
  TORCH_CHECK(!grad.is_complex(), "gradacc_kernels: cannot accumulate a complex gradient");
  const auto type = grad.scalar_type();
  const bool is_supported = type == at::kHalf || type == at::kBFloat16 || type == at::kFloat;
  Entry entry{&param, in_layout_of(is_supported ? grad : grad.to(at::kFloat), param.main)};
  // Whoever else has it, as a function of the user's that returns one buffer each time, may write
  // to it as soon as this returns.
  const bool is_shared = entry.grad.is_same(grad) && grad.use_count() > 2;

  const Lock lock(*this);
  if (removed_) return grad;
  check_not_reduced(param.variable);
  begin_backward();
  check_not_launched(param);
  if (is_holding_) {
    TORCH_CHECK(!is_watched(param) && autograd::get_current_graph_task_id() >= 0,
                "gradacc_kernels: with nonfinite='skip_micro_batch' gradients are added after "
                "backward, but a hook of others reads the .grad of a parameter of shape ",
                text(param.main.sizes()),
                " inside of it: remove that hook, or attach with "
                "nonfinite='skip_window'.");
    if (is_shared) entry.grad = entry.grad.clone();
    enqueue(std::move(entry));
    return {};
  }
  settle(param);
  if (static_cast<int64_t>(entry.grad.nbytes()) < queue_below_ && !is_shared &&
      !is_watched(param) && autograd::get_current_graph_task_id() >= 0) {
    enqueue(std::move(entry));
  } else {
    commit({std::move(entry)}, autograd::get_current_graph_task_id());
  }
  return {};
}

// Whether this is the first gradient that a backward has for us. With `steps`, ranks reduce every
// so many of them; one inside of another is a part of it.
bool GradHooks::is_new_backward() {
  const int graph_task = autograd::get_current_graph_task_id();
  const auto end = known_backwards_.end();
  if (std::find(known_backwards_.begin(), end, graph_task) != end) return false;
  known_backwards_[n_known_++ % known_backwards_.size()] = graph_task;
  const bool is_inner = buckets_ && !reducing_backward_.expired();
  if (!is_holding_ && !is_inner) count_backward();
  return true;
}

// When its gradients are about to be added.
void GradHooks::count_backward() {
  if (!any_has_begun()) tally_ = {tally_.window + 1, 0, 0};
  ++tally_.backwards;
  begin_reduction();
  if (!is_weighted_) ++tally_.unweighted;
}

bool GradHooks::any_has_begun() const {
  return std::any_of(params_.begin(), params_.end(),
                     [&](const Param& param) { return has_begun(param); });
}

// Whether the window has summed a gradient of it.
bool GradHooks::has_begun(const Param& param) const {
  return param.window == window_ && param.micro_batches > 0 && has_grad(param);
}

// Whether there is a sum: here, or reduced.
bool GradHooks::has_grad(const Param& param) const {
  return param.variable.grad().defined() || (param.owner.defined() && param.owner.grad().defined());
}

// Before the first gradient that a backward has for us is added, and most others are delivered.
void GradHooks::begin_backward() {
  const bool is_new = is_new_backward();
  if (is_new) follow_uses();
  if (!at_end_) return;
  const auto backward = backward_under_way();
  if (is_new && buckets_ && reducing_backward_.expired()) reducing_backward_ = backward;
}

void GradHooks::follow_uses() {
  std::vector<Param*> halves;
  std::vector<const autograd::Node*> leaves;
  for (Param& param : params_) {
    if (!param.node || !is_half(param.variable)) continue;
    halves.push_back(&param);
    leaves.push_back(param.node.get());
  }
  if (halves.empty()) return;
  const auto uses = count_uses(leaves);
  for (size_t i = 0; i < halves.size(); ++i) {
    if (uses[i] == 0) continue;
    Param& param = *halves[i];
    param.is_cast = uses[i] > 1;
    deliver_in(*param.node, param.is_cast ? std::optional(at::kFloat) : std::nullopt);
  }
}

// One micro-batch more, unless this backward has been counted.
void GradHooks::count(Param& param, int graph_task, bool store) {
  if ((store && !has_grad(param)) || param.window != window_) {
    param.window = window_;
    param.micro_batches = 0;
  } else if (graph_task >= 0 && graph_task == param.graph_task) {
    return;
  }
  ++param.micro_batches;
  param.graph_task = graph_task;
}

// Whether others read `.grad` as soon as our hook has returned.
bool GradHooks::is_watched(const Param& param) const {
  return param.owner.defined() || !param.node || !param.node->post_hooks().empty() ||
         autograd::impl::post_acc_grad_hooks(param.variable) != nullptr;
}

// Earlier additions to this main gradient go first: one of them may be the one that stores.
void GradHooks::settle(Param& param) {
  const auto backward = param.backward.lock();
  if (!backward) return;
  if (backward->batch == param.batch) flush(*backward);
  if (param.is_beside) order(*beside_, *current_stream(device_));
  param.is_beside = false;
}

std::shared_ptr<GradHooks::Backward> GradHooks::backward_under_way() {
  const int graph_task = autograd::get_current_graph_task_id();
  backwards_.erase(std::remove_if(backwards_.begin(), backwards_.end(),
                                  [](const auto& weak) { return weak.expired(); }),
                   backwards_.end());
  for (const auto& weak : backwards_) {
    auto candidate = weak.lock();
    if (candidate && candidate->graph_task == graph_task) return candidate;
  }
  auto backward = std::make_shared<Backward>();
  backward->graph_task = graph_task;
  backwards_.push_back(backward);
  // The engine's thread drops the callback when `backward()` may have returned already: what it
  // holds, the parameters among it, goes with its call.
  autograd::Engine::get_default_engine().queue_callback(
      [self = shared_from_this(), backward]() mutable {
        const auto hooks = std::move(self);
        const auto finished = std::move(backward);
        std::function<void()> at_end;
        {
          const Lock lock(*hooks);
          hooks->finish(*finished);
          const auto outer = hooks->reducing_backward_.lock();
          if (!outer || outer == finished) at_end = hooks->at_end_;
          if (outer == finished) hooks->reducing_backward_.reset();
        }
        if (at_end) at_end();
      });
  return backward;
}

// Its last additions are launched, and the current stream waits for all of them.
void GradHooks::finish(Backward& backward) {
  if (is_holding_) return keep(backward);
  flush(backward);
  if (backward.beside.empty()) return;
  order(*beside_, *current_stream(device_));
  while (!backward.beside.empty()) backward.wait_for_oldest(retired_);
}

// The stream of the caller has waited for those on which the gradients were made.
void GradHooks::keep(Backward& backward) {
  const auto stream = current_stream(device_);
  if (stream)
    for (const Entry& entry : backward.entries) entry.grad.record_stream(*stream);
  if (!backward.entries.empty())
    held_.push_back({backward.graph_task, std::exchange(backward.entries, {})});
}

void GradHooks::enqueue(Entry entry) {
  const auto backward = backward_under_way();
  if (is_holding_) {
    backward->entries.push_back(std::move(entry));
    return;
  }
  const auto stream = current_stream(device_);
  if (backward->stream != stream) flush(*backward);
  backward->stream = stream;
  entry.param->backward = backward;
  entry.param->batch = backward->batch;
  backward->bytes += static_cast<int64_t>(entry.grad.nbytes());
  backward->entries.push_back(std::move(entry));
  if (backward->bytes >= queue_bytes_ || backward->entries.size() == kQueueLength) flush(*backward);
}

// On the stream on which the gradients were queued, so that they need no record_stream; the stream
// of the caller then waits for it.
void GradHooks::flush(Backward& backward) {
  if (backward.entries.empty()) return;
  const auto entries = std::exchange(backward.entries, {});
  backward.bytes = 0;
  ++backward.batch;
  const auto add = [&] { removed_ ? hand_back(entries) : commit(entries, backward.graph_task); };
  const auto caller = current_stream(device_);
  if (backward.stream == caller) return add();
  {
    const c10::StreamGuard guard(*backward.stream);
    add();
  }
  order(*backward.stream, *caller);
}

// Gradients that were queued when another backward, or another thread, ended the hook's work: as
// stock accumulation adds them.
void GradHooks::hand_back(const std::vector<Entry>& entries) {
  const at::NoGradGuard no_grad;
  for (const Entry& entry : entries) {
    const at::Tensor& variable = entry.param->variable;
    at::Tensor& grad = variable.mutable_grad();
    const at::Tensor value = entry.grad.to(at::kFloat) * (inv_scale_ * scale_);
    at::Tensor sum =
        grad.defined() ? grad + value.to(grad.options()) : value.to(variable.options());
    retired_.push_back(std::exchange(grad, std::move(sum)));
  }
}

Demand GradHooks::demand(const autograd::Edge& edge, const GradHooks* hooks) {
  autograd::Node* node = edge.function.get();
  if (!node) return Demand::kNothing;
  // Empty: backward() without inputs, which accumulates into every leaf.
  const auto* exec_info = autograd::get_current_graph_task_exec_info();
  if (exec_info && !exec_info->empty()) {
    const auto found = exec_info->find(node);
    if (found == exec_info->end() || !found->second.should_execute()) return Demand::kNothing;
    if (found->second.captures_) return Demand::kGradient;
  }
  // Anomaly mode looks for NaN in what a node returns.
  if (autograd::AnomalyMode::is_enabled()) return Demand::kGradient;
  // Hooks of others see the gradient before it is added; without ours nobody would add it.
  for (const auto& hook : node->tensor_pre_hooks())
    if (!is_removed(*hook)) return Demand::kGradient;
  bool is_ours = false;
  for (const auto& hook : node->pre_hooks()) {
    if (const auto* ours = dynamic_cast<const PreHook*>(hook.get())) {
      is_ours = is_ours || ours->is_active(hooks);
    } else if (!is_removed(*hook)) {
      return Demand::kGradient;
    }
  }
  return is_ours ? Demand::kMainGrad : Demand::kGradient;
}

// On the parameter's own stream, if its node has another one than the caller's, all accumulation
// is ordered by events: what comes before, and what the end of backward waits for.
bool GradHooks::add(int64_t index, c10::function_ref<bool(const MainGrad&)> add) {
  Param& param = params_.at(index);
  const Lock lock(*this);
  if (removed_) return false;
  if (!param.variable.requires_grad()) return true;  // frozen since forward, as in consume
  begin_backward();
  check_not_launched(param);
  settle(param);
  const auto here = current_stream(device_);
  const auto home = here && param.node ? param.node->stream() : here;
  if (home) order(*home, *here);
  write(param, add, factor());
  if (home) order(*here, *home);
  return true;
}

bool GradHooks::add_beside(int64_t index, std::vector<at::Tensor> reads,
                           c10::function_ref<bool(const MainGrad&)> add) {
  Param& param = params_.at(index);
  {
    const Lock lock(*this);
    const auto here = current_stream(device_);
    const at::Tensor& grad = param.variable.mutable_grad();
    // Another tensor in `.grad` would be freed before the other stream has read it.
    const bool is_alone = here && !is_watched(param) && param.node->stream() == here &&
                          autograd::get_current_graph_task_id() >= 0 &&
                          (!grad.defined() || is_ours(grad, param) || was_cast(grad, param));
    if (!removed_ && is_alone && param.variable.requires_grad()) {
      if (!beside_)
        beside_ = c10::impl::VirtualGuardImpl(device_.type()).getStreamFromGlobalPool(device_);
      const auto backward = backward_under_way();
      begin_backward();
      check_not_launched(param);
      if (param.backward.lock() != backward || !param.is_beside) settle(param);
      const Factor& prepared = factor();
      order(*here, *beside_);
      {
        const c10::StreamGuard guard(*beside_);
        write(param, add, prepared);
      }
      param.backward = backward;
      param.is_beside = true;
      if (prepared.inv_scale) reads.push_back(prepared_);
      int64_t bytes = 0;
      for (const at::Tensor& tensor : reads) bytes += static_cast<int64_t>(tensor.nbytes());
      c10::Event done(device_.type());
      done.record(*beside_);
      backward->beside.push_back({std::move(reads), bytes, *here, std::move(done)});
      while (backward->beside_bytes() > kBesideBytes) backward->wait_for_oldest(retired_);
      return true;
    }
  }
  return this->add(index, add);
}

void GradHooks::write(Param& param, c10::function_ref<bool(const MainGrad&)> add,
                      const Factor& factor) {
  const bool store = !adopt(param);
  count(param, autograd::get_current_graph_task_id(), store);
  const bool has_statistics = add({param.main, static_cast<float*>(param.partials.data_ptr()),
                                   store || are_statistics_valid(param), factor, store});
  show(param);
  param.statistics_version.reset();
  if (has_statistics) describe(param);
  let_go(param);
}

// Prepared once a backward: inv_scale may have changed since the last one.
const Factor& GradHooks::factor() {
  if (!is_inv_scale_used_) {
    is_captured_without_ = is_captured_without_ || backend_.capture_id(device_) != 0;
    factor_ = {scale_, nullptr};
    return factor_;
  }
  const int task = autograd::get_current_graph_task_id();
  const auto stream = current_stream(device_);
  if (task < 0 || task != factor_task_ || stream != factor_stream_) {
    // New memory, for a graph capture's belongs to the graph.
    prepared_ = at::empty({}, inv_scale_.options());
    auto* s = static_cast<float*>(prepared_.data_ptr());
    backend_.prepare({scale_, static_cast<const float*>(inv_scale_.const_data_ptr())}, s, device_);
    factor_ = {1.f, s};
    factor_task_ = task;
    factor_stream_ = stream;
  }
  return factor_;
}

// Casts run without the mutex, for a dispatch mode may call Python from inside, and that call us.
at::Tensor GradHooks::cast(int64_t index, at::ScalarType dtype) {
  Param& param = params_.at(index);
  if (param.variable.scalar_type() == dtype) return param.variable;
  // A copy would outlive the memory of a whole parameter, of which only shards are kept.
  if (param.owner.defined()) return WindowCast::make(param.variable, dtype);
  const auto capture_id = backend_.capture_id(device_);
  const WindowCast::Key key(param.variable, dtype, capture_id);
  {
    const Lock lock(*this);
    const at::Tensor& grad = param.variable.mutable_grad();
    const int64_t our_version = grad.is_same(param.exposed) ? param.exposed_version : -1;
    const at::Tensor known = param.cast.find(key, grad, our_version);
    if (known.defined()) return known;
  }
  const at::Tensor copy = WindowCast::make(param.variable, dtype);
  const Lock lock(*this);
  param.cast.keep(key, copy);
  return copy;
}

SharedInput::Reading GradHooks::read(const at::Tensor& activation, at::ScalarType dtype) {
  if (!SharedInput::can_share(activation)) return {activation.to(dtype), {}};
  const SharedInput::Key key(activation, dtype, current_stream(device_),
                             backend_.capture_id(device_));
  {
    const Lock lock(*this);
    if (auto known = shared_input_.find(activation, key)) return *std::move(known);
  }
  const auto reading = SharedInput::make(activation, dtype);
  const Lock lock(*this);
  shared_input_.keep(activation, key, reading);
  return reading;
}

}  // namespace gradacc
