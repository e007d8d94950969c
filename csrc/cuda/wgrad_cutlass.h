// The weight-gradient instances for Hopper (sm_90a), chosen by number, so that a caller can try
// them against each other. A build without the CUTLASS headers or without code for sm_90a has none
// that takes a problem.

#pragma once

#include "../kernels.h"

namespace gradacc::cuda {

// How many instances were compiled in.
int wgrad_cutlass_count();

const char* wgrad_cutlass_name(int variant);

// Whether an instance can compute this on the current device: one token at least; rows, pointers
// and batches on 16-byte boundaries; and, where slots are asked for, enough of them.
bool wgrad_cutlass_takes(int variant, const WeightGrad& problem);

// Computes what wgrad_cutlass_takes allows. Neither allocates nor synchronises; a cudaError_t.
int wgrad_cutlass(int variant, const WeightGrad& problem, float scale, const float* inv_scale,
                  Stream stream);

}  // namespace gradacc::cuda
