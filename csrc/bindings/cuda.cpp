// The CUDA backend: device guard, current stream, error codes.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "backend.h"
#include "wgrad.h"
#include "wgrad_choice.h"

namespace gradacc {
namespace {

void check(int code, const char* kernel) {
  TORCH_CHECK(code == 0, "gradacc_kernels: the ", kernel,
              " kernel could not be launched: ", cuda::error_string(code));
}

void accumulate(const std::vector<Accumulation>& items, float scale, const float* inv_scale,
                at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check(cuda::accumulate(items.data(), items.size(), scale, inv_scale,
                         c10::cuda::getCurrentCUDAStream()),
        "accumulate");
}

void sum_of_squares(const std::vector<Squares>& items, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check(cuda::sum_of_squares(items.data(), items.size(), c10::cuda::getCurrentCUDAStream()),
        "sum_of_squares");
}

void scale(const std::vector<Scaling>& items, const float* factor, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check(cuda::scale(items.data(), items.size(), factor, c10::cuda::getCurrentCUDAStream()),
        "scale");
}

void reduce(const std::vector<Slots>& items, float* sums, float* norm, float* found_inf,
            at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check(cuda::reduce(items.data(), items.size(), sums, norm, found_inf,
                     c10::cuda::getCurrentCUDAStream()),
        "reduce");
}

void embedding(const EmbeddingGrad& item, float scale, const float* inv_scale, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  int64_t bytes = 0;
  check(cuda::embedding_workspace(item, &bytes), "embedding");
  const at::Tensor workspace = at::empty({bytes}, at::device(device).dtype(at::kByte));
  check(cuda::embedding(item, scale, inv_scale, workspace.data_ptr(),
                        c10::cuda::getCurrentCUDAStream()),
        "embedding");
}

void prepare(const Factor& factor, float* s, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check(cuda::prepare_factor(factor.scale, factor.inv_scale, s, c10::cuda::getCurrentCUDAStream()),
        "prepare_factor");
}

uint64_t capture_id(at::Device device) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(c10::cuda::getCurrentCUDAStream(device.index()), &status, &id),
        "capture_id");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

}  // namespace

const Backend kCudaBackend = {
    accumulate, sum_of_squares, scale,     reduce, cuda_weight_grad, weight_grad_processors_beside,
    prepare,    capture_id,     embedding,
};

}  // namespace gradacc
