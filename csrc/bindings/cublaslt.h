// Weight gradients by cuBLASLt, for every device, dtype and alignment.

#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels.h"

namespace gradacc {

// How many of cuBLASLt's algorithms for a shape are at choice, from the one that it ranks first on.
constexpr int kCublasLtAlgorithms = 8;
// In place of a rank: the first algorithm whose warpgroups take turns, so that one reads and writes
// main while the other multiplies.
constexpr int kCublasLtPingpong = kCublasLtAlgorithms;

int64_t cublaslt_version();

// main (+)= s * grad_outputᵀ input on the current stream, without statistics; s is not 0, for of
// that cuBLASLt does not say whether it makes NaN of NaN. A number of the host's: then its kernels
// know whether they add, and are up to a fifth faster. `algorithm` is cuBLASLt's rank; the first
// one where it has fewer.
void cublaslt_weight_grad(const WeightGrad& problem, float s, int algorithm, at::Device device);

}  // namespace gradacc
