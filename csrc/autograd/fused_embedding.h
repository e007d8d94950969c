// Embedding lookups whose gradient goes straight into the main gradient, row by row.
//
//   y[t] = W[index[t]]            main[v] += s * sum over {t: index[t] = v} of dy[t]

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "hook.h"

namespace gradacc {

class FusedEmbedding : public std::enable_shared_from_this<FusedEmbedding> {
 public:
  // index: of the weight among the parameters of hooks. padding_index: -1 for none. is_sparse: what
  // the gradient is where it has to reach autograd as a tensor.
  FusedEmbedding(const std::shared_ptr<GradHooks>& hooks, int64_t index, at::Tensor weight,
                 int64_t padding_index, bool is_sparse);

  // The rows, or none where the ordinary path has to be taken.
  std::optional<at::Tensor> lookup(const at::Tensor& indices);

 private:
  friend class LookupBackward;

  const std::weak_ptr<GradHooks> hooks_;
  const int64_t index_;
  const at::Tensor weight_;
  const int64_t padding_index_;
  const bool is_sparse_;
};

}  // namespace gradacc
