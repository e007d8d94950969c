// How often a backward uses a parameter. Autograd sums the uses before the AccumulateGrad node
// runs, in the dtype in which it delivers them.

#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace gradacc {

// Of each of these leaves in the graph of the backward under way: 0 for a node that it does not
// reach, or null. Edges count that this backward may not take, as those towards other inputs of
// torch.autograd.grad.
std::vector<int64_t> count_uses(const std::vector<const torch::autograd::Node*>& leaves);

// The dtype to which the engine casts what it delivers to a leaf; none: it comes as it is.
void deliver_in(torch::autograd::Node& leaf, std::optional<at::ScalarType> dtype);

}  // namespace gradacc
