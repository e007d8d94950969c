// Every check of an argument, and the message it fails with. A check reads metadata only, and all
// checks of a call come before its first write.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"

namespace gradacc {

// Messages are put together from strings alone. Formatting a number through a stream of torch's
// crashes where a compiler has linked a C++ standard library of its own into this extension.
inline std::string text(int64_t number) { return std::to_string(number); }

inline std::string text(double number) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%g", number);
  return buffer;
}

inline std::string text(at::IntArrayRef sizes) {
  std::string result = "[";
  for (size_t d = 0; d < sizes.size(); ++d) result += (d ? ", " : "") + text(sizes[d]);
  return result + "]";
}

inline std::string text(at::ScalarType type) {
  return std::string("torch.").append(c10::getDtypeNames(type).first);
}

inline std::string text(at::Device device) { return device.str(); }

// An argument by its name in Python: "accumulate_: grad", "multi_accumulate_: grads[3]".
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;

  friend std::ostream& operator<<(std::ostream& out, const Argument& a) {
    out << a.op << ": " << a.name;
    if (a.index >= 0) out << '[' << text(a.index) << ']';
    return out;
  }
};

inline const Backend& check_backend(const Argument& what, at::Device device) {
  const Backend* backend = find_backend(device);
  TORCH_CHECK_VALUE(backend, what, " must be on a device that the compiled extension serves, got ",
                    text(device));
  return *backend;
}

inline void check_float32(const Argument& what, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, what, " must be torch.float32, got ",
                   text(tensor.scalar_type()));
}

inline void check_device(const Argument& what, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, what, " must be on ", text(device), ", got ",
                    text(tensor.device()));
}

// Refuses tensors whose memory does not hold their values.
inline void check_plain(const Argument& what, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && !tensor._is_zerotensor(), what,
                    " must be a strided tensor with memory of its own");
  TORCH_CHECK_VALUE(!tensor.is_neg(), what,
                    " must not be a lazily negated view: pass its resolve_neg()");
}

inline void check_strided(const Argument& what, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, what, " must be a strided tensor");
}

// is_dense: the layout that the op can write to, which `expected` describes.
inline void check_main(const Argument& what, const at::Tensor& main, at::Device device,
                       bool is_dense, const char* expected) {
  check_float32(what, main);
  TORCH_CHECK_VALUE(main.layout() == at::kStrided && is_dense, what, " must be ", expected,
                    ", got sizes ", text(main.sizes()),
                    main.layout() == at::kStrided ? " with other strides" : " of a sparse layout");
  check_plain(what, main);
  TORCH_CHECK_VALUE(!main.requires_grad(), what,
                    " must not require grad: pass a detached tensor or its .data");
  check_device(what, main, device);
}

inline void check_main(const Argument& what, const at::Tensor& main, at::Device device) {
  check_main(what, main, device,
             main.layout() == at::kStrided && main.is_non_overlapping_and_dense(),
             "dense in memory, without gaps or overlap");
}

inline void check_contiguous_main(const Argument& what, const at::Tensor& main, at::Device device) {
  check_main(what, main, device, main.layout() == at::kStrided && main.is_contiguous(),
             "contiguous");
}

inline void check_grad(const Argument& what, const at::Tensor& grad, const at::Tensor& main) {
  const auto type = grad.scalar_type();
  TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat, what,
                   " must be torch.float16, torch.bfloat16 or torch.float32, got ", text(type));
  TORCH_CHECK_VALUE(grad.sizes() == main.sizes(), what,
                    " must have the shape of its main gradient, ", text(main.sizes()), ", got ",
                    text(grad.sizes()));
  check_device(what, grad, main.device());
}

inline void check_partials(const Argument& what, const at::Tensor& partials,
                           const at::Tensor& main) {
  check_float32(what, partials);
  TORCH_CHECK_VALUE(partials.dim() == 1 && partials.is_contiguous() &&
                        partials.numel() == num_chunks(main.numel()),
                    what, " must be contiguous of shape [num_chunks(numel)] = [",
                    text(num_chunks(main.numel())), "], got ", text(partials.sizes()));
  check_plain(what, partials);
  check_device(what, partials, main.device());
}

// A device scalar: a float32 tensor of one element.
inline void check_scalar(const Argument& what, const at::Tensor& scalar, at::Device device) {
  check_float32(what, scalar);
  TORCH_CHECK_VALUE(scalar.numel() == 1, what, " must hold one element, got shape ",
                    text(scalar.sizes()));
  check_plain(what, scalar);
  check_device(what, scalar, device);
}

inline float check_scale(const char* op, double scale) {
  const float rounded = static_cast<float>(scale);
  TORCH_CHECK_VALUE(std::isfinite(rounded), op, ": scale must be finite in float32, got ",
                    text(scale));
  return rounded;
}

inline void check_length(const Argument& what, int64_t got, int64_t expected) {
  TORCH_CHECK_VALUE(got == expected, what, " must have one entry per main gradient, ",
                    text(expected), ", got ", text(got));
}

// No element may be written twice in a pass, or written and read at different indices.
class OverlapCheck {
 public:
  OverlapCheck(const Argument& what, const std::vector<at::Tensor>& mains) {
    ranges_.reserve(mains.size());
    for (const auto& main : mains)
      if (main.numel() > 0) ranges_.push_back(range_of(main));
    if (!std::is_sorted(ranges_.begin(), ranges_.end())) std::sort(ranges_.begin(), ranges_.end());
    for (size_t i = 1; i < ranges_.size(); ++i)
      TORCH_CHECK_VALUE(ranges_[i - 1].second <= ranges_[i].first, what,
                        " must not overlap in memory: an element can be updated once a call");
  }

  // A float32 grad may be its main gradient itself, but no other part of one.
  void check_grad(const Argument& what, const at::Tensor& grad, const at::Tensor& main) const {
    if (ranges_.empty() || grad.layout() != at::kStrided || grad.numel() == 0) return;
    const Range range = range_of(grad);
    if (range.second <= ranges_.front().first || range.first >= ranges_.back().second) return;
    if (range == range_of(main)) return;
    check_read(what, grad);
  }

  // Memory that a pass reads while it writes what this is of.
  void check_read(const Argument& what, const at::Tensor& tensor,
                  const char* written = "a main gradient") const {
    if (tensor.numel() == 0) return;
    const Range range = range_of(tensor);
    const auto next = std::upper_bound(
        ranges_.begin(), ranges_.end(), range.first,
        [](uintptr_t address, const Range& other) { return address < other.second; });
    TORCH_CHECK_VALUE(next == ranges_.end() || range.second <= next->first, what,
                      " must not overlap ", written, " in memory: pass a clone");
  }

 private:
  using Range = std::pair<uintptr_t, uintptr_t>;

  static Range range_of(const at::Tensor& tensor) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    return {begin, begin + (last + 1) * tensor.element_size()};
  }

  std::vector<Range> ranges_;
};

// What an op with one main gradient writes, and what it reads meanwhile: they must be apart.
class WrittenMemory {
 public:
  WrittenMemory(const char* op, const at::Tensor& main, const std::optional<at::Tensor>& partials)
      : op_(op),
        main_({op, "main_grad"}, {main}),
        partials_({op, "partials"}, checked(op, partials, main)) {
    if (partials) OverlapCheck({op, "partials"}, {main, *partials});
  }

  void check_read(const char* name, const at::Tensor& tensor) const {
    main_.check_read({op_, name}, tensor);
    partials_.check_read({op_, name}, tensor, "partials");
  }

 private:
  static std::vector<at::Tensor> checked(const char* op, const std::optional<at::Tensor>& partials,
                                         const at::Tensor& main) {
    if (!partials) return {};
    check_partials({op, "partials"}, *partials, main);
    return {*partials};
  }

  const char* op_;
  OverlapCheck main_;
  OverlapCheck partials_;
};

}  // namespace gradacc
