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
#include <optional>
#include <utility>

namespace gradacc {

// Counts the optimizer steps of the process, as far as torch's global step hook sees them.
inline std::atomic<uint64_t>& optimizer_steps() {
  static std::atomic<uint64_t> steps{0};
  return steps;
}

class WindowCast {
 public:
  // What a copy depends on besides `.grad`.
  struct Key {
    Key(const at::Tensor& weight, at::ScalarType dtype, uint64_t capture_id)
        : impl(weight.unsafeGetTensorImpl()),
          data(weight.const_data_ptr()),
          version(static_cast<int64_t>(weight._version())),
          optimizer_steps(gradacc::optimizer_steps().load(std::memory_order_relaxed)),
          dtype(dtype),
          capture_id(capture_id) {}

    const void* impl;
    const void* data;
    int64_t version;
    uint64_t optimizer_steps;
    at::ScalarType dtype;
    uint64_t capture_id;

    bool operator==(const Key& other) const {
      return impl == other.impl && data == other.data && version == other.version &&
             optimizer_steps == other.optimizer_steps && dtype == other.dtype &&
             capture_id == other.capture_id;
    }
  };

  static at::Tensor make(const at::Tensor& weight, at::ScalarType dtype) {
    const at::NoGradGuard no_grad;
    return weight.to(dtype);
  }
  // The copy, or an undefined tensor where it has to be made anew. grad: `.grad` as it is.
  // our_version: its version counter after we last wrote to it, or -1 when it is not the tensor
  // that we made `.grad`.
  at::Tensor find(const Key& key, const at::Tensor& grad, int64_t our_version) {
    const bool is_window_open =
        grad.defined() && static_cast<int64_t>(grad._version()) == our_version;
    if (!is_window_open || !(key_ == key)) copy_.reset();  // its memory can serve the new one
    return copy_;
  }
  void keep(const Key& key, at::Tensor copy) {
    key_ = key;
    copy_ = std::move(copy);
  }

 private:
  std::optional<Key> key_;
  at::Tensor copy_;
};

}  // namespace gradacc
