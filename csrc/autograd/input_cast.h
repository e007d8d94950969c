// The 16-bit copy of an activation under autocast, shared by the fused modules that read it: the
// query, key and value projections of a layer take one copy in place of three.
//
// The copy is held weakly: it lives as long as the backward nodes that saved it.

#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Stream.h>
#include <c10/core/UndefinedTensorImpl.h>

#include <cstdint>
#include <optional>

namespace gradacc {

class InputCast {
 public:
  // Differentiable in `input` where grad mode is on. stream: the current one, on which others must
  // not read the copy. capture_id: a copy made inside a graph capture is that graph's.
  at::Tensor get(const at::Tensor& input, at::ScalarType dtype, std::optional<c10::Stream> stream,
                 uint64_t capture_id) {
    const State now{static_cast<int64_t>(input._version()), dtype, at::GradMode::is_enabled(),
                    stream, capture_id};
    if (now == state_ && input_.lock() == input.getIntrusivePtr())
      if (auto known = copy_.lock()) return at::Tensor(std::move(known));
    at::Tensor copy = input.to(dtype);
    state_ = now;
    input_ = Weak(input.getIntrusivePtr());
    copy_ = Weak(copy.getIntrusivePtr());
    return copy;
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  struct State {
    int64_t version = -1;
    at::ScalarType dtype = at::kFloat;
    bool is_tracked = false;
    std::optional<c10::Stream> stream;
    uint64_t capture_id = 0;

    bool operator==(const State& other) const {
      return version == other.version && dtype == other.dtype && is_tracked == other.is_tracked &&
             stream == other.stream && capture_id == other.capture_id;
    }
  };

  State state_;
  Weak input_{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
  Weak copy_{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
};

}  // namespace gradacc
