// The hook that takes a parameter's micro-batch gradient from autograd and adds it to the main
// gradient, and the state it works on. Fused modules add to the same main gradients through it.

#pragma once

#include <ATen/ATen.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../bindings/backend.h"
#include "buckets.h"
#include "shared_input.h"
#include "window_cast.h"

namespace gradacc {

// What the backward under way does with the gradient of a parameter.
enum class Demand {
  kNothing,   // it is not asked for, as in torch.autograd.grad with respect to something else
  kMainGrad,  // it is to be added to the main gradient, and nobody looks at it before
  kGradient,  // it has to reach autograd as a tensor
};

// A main gradient to which a fused module adds.
struct MainGrad {
  const at::Tensor& main;
  // Its slots, or null when they do not describe `main` now. Unused when storing.
  float* partials;
  bool are_partials_valid;
  const Factor& factor;
  bool store;
};

// Of the `.grad` of some parameters: the sum of squares of each, the norm of them all, and 1 where
// an element is not finite. Sums and norm are NaN then.
struct Statistics {
  std::vector<int64_t> indices;
  at::Tensor sums;
  at::Tensor norm;
  at::Tensor found_inf;
};

struct Tally {
  int64_t window;      // its number
  int64_t backwards;   // that brought a gradient
  int64_t unweighted;  // of these, those outside of a micro-batch with a weight
};

// Raises where DistributedDataParallel reduces the gradients of a 16-bit parameter, which it cannot
// do in float32.
void check_not_reduced(const at::Tensor& param);

// Pre-hooks on the AccumulateGrad nodes of the parameters of one device. Each consumes the gradient
// and returns none, so that `.grad` is ours alone:
//
//   .grad before               what the hook does
//   none                       main = s * grad, .grad = a view of main
//   the view                   main = fma(grad, s, main)
//   the view, cast by .to()    the view again, then adds: main still holds the float32 sums
//   another tensor             main = .grad, .grad = the view, then adds
//
// with s = scale * inv_scale. A gradient of at least `queue_below` bytes is added when it arrives;
// smaller ones wait for a launch of their own, at `queue_bytes`, when a launch's table is full, and
// at the end of backward.
//
// Autograd sums several uses of a parameter before a hook sees them. 16-bit ones are delivered, and
// so summed, in float32 as soon as a backward has shown that there are several.
//
// The nodes, and with them the parameters, live as long as this object; the hooks hold it weakly.
// All methods may be called without the GIL, and must be: the engine's threads take the mutex first
// and may need the GIL inside.
class GradHooks : public std::enable_shared_from_this<GradHooks> {
 public:
  // main_grads: dense float32, in the layout of their parameters. partials: their slots.
  // owners: empty, or the sharded parameters of which `params` are whole for one forward and
  // backward, as FSDP2 has them. Then somebody takes `.grad` away inside of backward and brings
  // what it has reduced to that of the owner, so that a main gradient lives no longer than `.grad`
  // (`main_grads` is empty), and a window goes on where the owner has a `.grad`.
  GradHooks(std::vector<at::Tensor> params, std::vector<at::Tensor> main_grads,
            std::vector<at::Tensor> partials, double scale, at::Tensor inv_scale,
            int64_t queue_below, int64_t queue_bytes, std::vector<at::Tensor> owners = {});

  // Installs the hook where the node died or was made on a stream other than the current one, and
  // puts views back that Module.to() has cast.
  // False when a parameter's dtype, device, shape or strides are no longer those of construction.
  bool refresh();
  // Ends the hook's work, after adding what the backward that calls it has queued; `.grad` stays as
  // it is. What others have queued goes to stock autograd at their end.
  void remove();
  // Makes a parameter's `.grad` a view of main, with the value that `.grad` had.
  void expose(int64_t index);
  // The view of main that is `.grad`, or will be: always the same tensor, so that its version
  // counter tells of every write through a reference that somebody has kept.
  at::Tensor main_grad(int64_t index);
  // For modules that add to main by themselves. Begins a window of zeros where `.grad` is none.
  void begin(int64_t index);
  // The backward under way has added to main on the current stream, after begin. drops: the
  // gradient that autograd delivers to the parameter in this backward stands for nothing. False
  // when the hook's work has ended.
  bool added(int64_t index, bool drops);
  // Declares the statistics slots stale.
  void invalidate();
  // From now on inv_scale may be another number than 1; false when a graph was captured that would
  // not see it. Until then fused modules leave it out: with a factor that the host knows, kernels
  // are faster.
  bool use_inv_scale();
  // Measures the `.grad` of all parameters, or of some: in one part, or none where none has one.
  // from_slots: reads the slots that describe it, and renews the others.
  std::vector<Statistics> measure(bool from_slots,
                                  const std::optional<std::vector<int64_t>>& indices);
  // .grad = .grad * factor, a device scalar. Nothing is written where it is 1.
  void scale(const at::Tensor& factor);
  // What the parameter's window has summed so far, or none: main, unless `.grad` is another tensor.
  std::optional<at::Tensor> current(int64_t index);
  // How many backwards have added to what the window has summed. It begins where `.grad` is none,
  // and with the first gradient after end_window.
  int64_t micro_batches(int64_t index);
  int64_t most_micro_batches();  // of any parameter
  void end_window();
  // A parameter whose `.grad` is still what a window that has ended left in it, or -1.
  int64_t left_over();
  // What the backwards of the last window were. One begins with a gradient that arrives where no
  // parameter has summed anything.
  Tally tally();
  // Whether the backwards that follow are those of a micro-batch with a weight.
  void weigh(bool is_weighted);
  // Makes the window one that has summed this, or none, in so many micro-batches.
  void load(int64_t index, const std::optional<at::Tensor>& sum, int64_t micro_batches,
            int64_t backwards);

  // Has every backward that had a gradient for us call this at its end.
  void call_at_end(std::function<void()> call);
  // From now on gradients wait, after the backward that brought them has ended, until they are
  // committed or dropped together. A backward that raises leaves none. Not with fused modules.
  void hold();
  std::vector<at::Tensor> held();
  void commit_held();
  void drop_held();

  // For a reduction over ranks of what a window has summed. Backwards that reduce call `launch`
  // with buckets whose main gradients are final, in order, on a stream that has waited for them;
  // `.grad` of their parameters is the view of main then, of zeros where there was none. Between
  // the two, bucket by bucket, main belongs to the reduction. overlaps: whether that may begin
  // before backward has ended.
  void reduce_with(std::vector<int64_t> bucket_of, std::function<void(int64_t, int64_t)> launch,
                   bool overlaps);
  // Whether the backwards from now on reduce: each `every`-th of a window, or none.
  void set_reducing(bool is_reducing, int64_t every);
  // Whether the last backward is one that reduces, and its reduction has not ended.
  bool is_reducing();
  // Whether nothing was added since the window was reduced.
  bool is_reduced();
  // Launches what is left of all buckets.
  void launch_rest();
  // All buckets have been reduced.
  void end_reduction();

  // For fused modules. What the backward under way does with a gradient that it sends along `edge`,
  // which leads to the AccumulateGrad node of a parameter of `hooks`, or of any, where that is
  // null.
  static Demand demand(const torch::autograd::Edge& edge, const GradHooks* hooks);
  // Calls `add` on the main gradient, between adopting and showing `.grad`; add tells whether it
  // has left the slots valid. False, without a call, when the hook's work has ended.
  bool add(int64_t index, c10::function_ref<bool(const MainGrad&)> add);
  // The same beside the rest of backward: on a stream of its own, which waits for the current one
  // now and is waited for at the end of backward. `reads` live until then. Where somebody may read
  // `.grad` earlier, it is `add`.
  bool add_beside(int64_t index, std::vector<at::Tensor> reads,
                  c10::function_ref<bool(const MainGrad&)> add);
  // The parameter as a fused module's forward reads it: itself, or its copy of `dtype`.
  at::Tensor cast(int64_t index, at::ScalarType dtype);
  // An activation as such a forward reads it.
  SharedInput::Reading read(const at::Tensor& activation, at::ScalarType dtype);
  at::Device device() const { return device_; }

 private:
  class Lock;
  class PreHook;
  struct Backward;

  struct Param {
    at::Tensor variable;
    at::Tensor owner;  // or none
    at::Tensor main;   // of no memory, for as long as one with an owner is not written to
    at::Tensor partials;
    at::ScalarType dtype;
    bool is_cast = false;          // whether its gradient comes in float32, of uses in 16 bits
    at::Tensor exposed;            // the view of main that is made `.grad`
    int64_t exposed_version = -1;  // of it, when a gradient was last added
    std::optional<int64_t> statistics_version;
    decltype(torch::autograd::impl::grad_accumulator(at::Tensor())) node;
    std::weak_ptr<Backward> backward;  // the last one that queued its gradient, or added beside
    int64_t batch = -1;                // in whose queue a gradient may be waiting
    bool is_beside = false;            // whether an addition may be under way on beside_
    int64_t micro_batches = 0;         // of the window below
    int64_t window = 0;
    int graph_task = -1;         // the last one that was counted
    int dropped_task = -1;       // the last one whose gradient stands for nothing
    int64_t ended_version = -1;  // of exposed, when end_window left it in `.grad`
    WindowCast cast;
  };

  struct Entry {
    Param* param;
    at::Tensor grad;  // in the layout of main
  };

  // The gradients that one backward has brought.
  struct Held {
    int graph_task;
    std::vector<Entry> entries;
  };

  // A parameter's AccumulateGrad node has run.
  void arrived(int64_t index);
  // Makes main gradients ready to be reduced; returns the stream on which they are.
  std::optional<c10::Stream> prepare(const Buckets::Range& buckets);
  void launch(const Buckets::Range& buckets, const std::optional<c10::Stream>& stream);
  void check_not_launched(const Param& param) const;
  // Returns what is left for AccumulateGrad: nothing, unless the gradient is not for us.
  at::Tensor consume(int64_t index, const at::Tensor& grad);
  void install(int64_t index);
  bool is_dropped(const Param& param);
  bool is_ours(const at::Tensor& grad, const Param& param) const;
  bool was_cast(const at::Tensor& grad, const Param& param) const;
  // Whether the slots of a parameter describe its `.grad`, as far as version counters tell.
  bool are_statistics_valid(const Param& param) const;
  at::Tensor sum_of(const at::Tensor& grad, const Param& param) const;
  bool adopt(Param& param);
  void take_up(Param& param);
  void let_go(Param& param);
  void make_view(Param& param);
  void show(Param& param);
  void describe(Param& param);
  void restore(Param& param);
  bool is_watched(const Param& param) const;
  void settle(Param& param);
  bool is_new_backward();
  void count_backward();
  void begin_reduction();
  void begin_backward();
  bool any_has_begun() const;
  bool has_grad(const Param& param) const;
  bool has_begun(const Param& param) const;
  bool is_left_over(const Param& param) const;
  void follow_uses();
  void count(Param& param, int graph_task, bool store);
  const Factor& factor();
  void write(Param& param, c10::function_ref<bool(const MainGrad&)> add, const Factor& factor);
  void commit(const std::vector<Entry>& entries, int graph_task);
  std::shared_ptr<Backward> backward_under_way();
  void enqueue(Entry entry);
  void flush(Backward& backward);
  void keep(Backward& backward);
  void hand_back(const std::vector<Entry>& entries);
  void finish(Backward& backward);

  const at::Device device_;
  const Backend& backend_;
  const float scale_;
  const at::Tensor inv_scale_;
  const int64_t queue_below_;
  const int64_t queue_bytes_;

  std::mutex mutex_;
  std::atomic<bool> removed_ = false;
  std::vector<Param> params_;
  std::vector<std::weak_ptr<Backward>> backwards_;  // those under way
  std::vector<Accumulation> items_;                 // scratch of commit
  std::vector<at::Tensor> retired_;                 // what `.grad` gave up, until the mutex is free
  int64_t window_ = 0;                              // counts ends of windows
  Tally tally_ = {0, 0, 0};
  bool is_weighted_ = false;
  std::array<int, 8> known_backwards_;  // the last ones
  size_t n_known_ = 0;
  SharedInput shared_input_;
  std::optional<c10::Stream> beside_;  // made at its first use
  Factor factor_;                      // of the backward and stream below
  at::Tensor prepared_;                // its memory
  int factor_task_ = -1;
  std::optional<c10::Stream> factor_stream_;
  bool is_inv_scale_used_ = false;
  bool is_captured_without_ = false;  // a graph without inv_scale
  std::function<void()> at_end_;
  bool is_holding_ = false;
  std::optional<Buckets> buckets_;  // of the reduction
  std::function<void(int64_t, int64_t)> launch_;
  std::weak_ptr<Backward> reducing_backward_;    // its end is that of the reduction
  std::optional<c10::Stream> reduction_stream_;  // made at its first use
  bool overlaps_ = true;
  bool wants_reduction_ = true;
  int64_t reduce_every_ = 1;
  bool is_reducing_ = false;  // the last backward
  bool is_reduced_ = false;   // what was summed
  std::vector<Held> held_;
};

}  // namespace gradacc
