#include "uses.h"

#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/graph_task.h>

namespace gradacc {

using torch::autograd::Node;

std::vector<int64_t> count_uses(const std::vector<const Node*>& leaves) {
  std::vector<int64_t> uses(leaves.size(), 0);
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (!nodes) return uses;
  ska::flat_hash_map<const Node*, size_t> indices;
  indices.reserve(leaves.size());
  for (size_t i = 0; i < leaves.size(); ++i)
    if (leaves[i]) indices.emplace(leaves[i], i);
  for (const Node* node : *nodes) {
    for (const auto& edge : node->next_edges()) {
      const auto found = indices.find(edge.function.get());
      if (found != indices.end()) ++uses[found->second];
    }
  }
  return uses;
}

void deliver_in(Node& leaf, std::optional<at::ScalarType> dtype) {
  if (leaf.input_metadata(0).grad_dtype() != dtype)
    leaf.mutable_input_metadata(0).set_grad_dtype(dtype);
}

}  // namespace gradacc
