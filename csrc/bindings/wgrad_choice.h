// Which kernel computes a weight gradient: by a rule on its shape, or by a table that the user has
// measured (python -m gradacc_kernels tune) and that is read once. Nothing is timed here, so the
// same shapes take the same kernels, and give the same bits, on each run.
//
// A choice is the number of a CUTLASS instance, or -1 - rank of a cuBLASLt algorithm, or -1 -
// kCublasLtPingpong.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "../kernels.h"

namespace gradacc {

// is_scale_on_host: whether the factor is a number of the host's, not one in device memory.
int choose_weight_grad(const WeightGrad& problem, bool is_scale_on_host);
// Overrides the rule for one shape: the name of a CUTLASS instance, "cublaslt:<rank>" or
// "cublaslt:pingpong".
void set_weight_grad_choice(int64_t out_features, int64_t in_features, int64_t tokens, bool store,
                            const std::string& name);
void clear_weight_grad_choices();
// Backend::processors_beside.
int weight_grad_processors_beside(int64_t elements, int64_t tokens, at::Device device);
// Overrides rule and table for all shapes, for benchmarks; "" ends that.
void force_weight_grad_choice(const std::string& name);

}  // namespace gradacc
