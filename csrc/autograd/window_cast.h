// The 16-bit copy of a float32 weight under autocast, made once an accumulation window.
//
// Autocast casts a weight in every forward. Between two optimizer steps its value does not change,
// so one copy serves all micro-batches. It is made anew
//
//   where `.grad` is none, as at the start of a window, or was written to by somebody else, as by
//   zero_grad(set_to_none=False): what a fused optimizer or a write through `.data` did to the
//   weight moves no version counter;
//   where the weight's version counter or address moved;
//   after a step of any torch optimizer (optimizer_steps);
//   inside a graph capture, where a copy made outside would go stale unseen, and after it.

#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <atomic>
#include <cstdint>

namespace gradacc {

// Counts the optimizer steps of the process, as far as torch's global step hook sees them.
inline std::atomic<uint64_t>& optimizer_steps() {
  static std::atomic<uint64_t> steps{0};
  return steps;
}

class WindowCast {
 public:
  // grad: `.grad` as it is. our_version: its version counter after we last wrote to it, or -1 when
  // it is not the tensor that we made `.grad`.
  at::Tensor get(const at::Tensor& weight, const at::Tensor& grad, int64_t our_version,
                 at::ScalarType dtype, uint64_t capture_id) {
    const State now{weight.unsafeGetTensorImpl(), weight.const_data_ptr(),
                    static_cast<int64_t>(weight._version()),
                    optimizer_steps().load(std::memory_order_relaxed), capture_id};
    const bool is_window_open =
        grad.defined() && static_cast<int64_t>(grad._version()) == our_version;
    if (!copy_.defined() || copy_.scalar_type() != dtype || !is_window_open ||
        !now.same_weight(state_)) {
      copy_.reset();  // its memory can serve the new one
      const at::NoGradGuard no_grad;
      copy_ = weight.to(dtype);
    }
    state_ = now;
    return copy_;
  }

  void reset() { copy_.reset(); }

 private:
  struct State {
    const void* impl = nullptr;
    const void* data = nullptr;
    int64_t version = -1;
    uint64_t optimizer_steps = 0;
    uint64_t capture_id = 0;

    bool same_weight(const State& other) const {
      return impl == other.impl && data == other.data && version == other.version &&
             optimizer_steps == other.optimizer_steps && capture_id == other.capture_id;
    }
  };

  at::Tensor copy_;
  State state_;
};

}  // namespace gradacc
