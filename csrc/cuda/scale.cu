// main *= factor, with factor a device scalar; nothing is read or written when it is 1.
//
// Bytes per element: 8. Deterministic: every element is written by one thread.

#include "launch.cuh"

namespace gradacc::cuda {
namespace {

// A persistent grid: when there is nothing to scale, a launch costs a few microseconds whatever
// the size of the list.
constexpr int kBlocksPerProcessor = 16;

template <typename List>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ List table, int32_t chunks, const float* factor) {
  wait_for_former();
  const float f = *factor;
  if (f == 1.f) return;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int index = table.find(static_cast<int32_t>(chunk));
    const Scaling& item = table.items[index];
    const int64_t begin = (chunk - table.first_chunk[index]) * kChunkSize;
    float* main = item.main + begin;
    const int64_t left = item.numel - begin;
    if (left >= kChunkSize && reinterpret_cast<uintptr_t>(main) % sizeof(float4) == 0) {
      auto* vec = reinterpret_cast<float4*>(main) + threadIdx.x;
      constexpr int kVecs = kChunkSize / 4 / kThreads;
      float4 v[kVecs];
#pragma unroll
      for (int i = 0; i < kVecs; ++i) v[i] = vec[i * kThreads];
#pragma unroll
      for (int i = 0; i < kVecs; ++i)
        vec[i * kThreads] = make_float4(v[i].x * f, v[i].y * f, v[i].z * f, v[i].w * f);
    } else {
      const int count = static_cast<int>(left < kChunkSize ? left : kChunkSize);
#pragma unroll 4
      for (int i = threadIdx.x; i < count; i += kThreads) main[i] *= f;
    }
  }
}

__global__ void prepare_kernel(float scale, const float* inv_scale, float* s) {
  *s = inv_scale ? scale * *inv_scale : scale;
}

}  // namespace

int scale(const Scaling* items, int64_t count, const float* factor, Stream stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return launch_list(items, count, [&](const auto& table, int32_t chunks) {
    const int blocks = std::min(chunks, processors * kBlocksPerProcessor);
    using List = std::decay_t<decltype(table)>;
    return launch_early(scale_kernel<List>, {blocks, kThreads}, stream, table, chunks, factor);
  });
}

int prepare_factor(float scale, const float* inv_scale, float* s, Stream stream) {
  prepare_kernel<<<1, 1, 0, stream>>>(scale, inv_scale, s);
  return cudaGetLastError();
}

}  // namespace gradacc::cuda
