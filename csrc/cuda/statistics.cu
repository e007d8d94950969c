// slot[c] = sum of main^2 over chunk c;  sums[i] = sum of tensor i's slots;  norm = sqrt(sum sums).
//
// The first pass reads 4 bytes per element; the other two read 4 bytes per chunk and per tensor.
// A slot, a sum or a norm is NaN exactly when an element behind it is not finite.
// Deterministic: fixed order everywhere; slots and sums are added in double.

#include "launch.cuh"

namespace gradacc::cuda {
namespace {

constexpr int kVecSize = 4;

template <typename List>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ List table) {
  const int32_t block = blockIdx.x;
  const int index = table.find(block);
  const Squares& item = table.items[index];
  const int64_t slot = block - table.first_chunk[index];
  const float* main = item.main + slot * kChunkSize;
  const int64_t left = item.numel - slot * kChunkSize;

  SquareSum sum;
  if (left >= kChunkSize && reinterpret_cast<uintptr_t>(main) % sizeof(float4) == 0) {
    const auto* vec = reinterpret_cast<const float4*>(main) + threadIdx.x;
    constexpr int kVecs = kChunkSize / kVecSize / kThreads;
    float4 v[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) v[i] = vec[i * kThreads];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      sum.add(v[i].x);
      sum.add(v[i].y);
      sum.add(v[i].z);
      sum.add(v[i].w);
    }
  } else {
    const int count = static_cast<int>(left < kChunkSize ? left : kChunkSize);
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) sum.add(main[i]);
  }
  const float total = block_sum(sum.total());
  if (threadIdx.x == 0) item.partials[slot] = total;
}

constexpr int kMaxSlotLists = kMaxCapacity;
// One block reads all slots of a tensor, so it must have many loads in flight.
constexpr int kReduceThreads = 1024;

struct SlotLists {
  Slots items[kMaxSlotLists];
};

// The sum of count values, in double; valid in thread 0.
__device__ double reduce(const float* values, int64_t count) {
  double sum = 0.;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kReduceThreads) sum += values[i];
  return block_sum<kReduceThreads>(sum);
}

// One block a tensor.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ SlotLists lists, float* sums) {
  const Slots& item = lists.items[blockIdx.x];
  const double sum = reduce(item.partials, item.count);
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kReduceThreads)
    norm_kernel(const float* sums, int64_t count, float* norm, float* found_inf) {
  const double sum = reduce(sums, count);
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(sqrt(sum));
    *found_inf = isnan(sum) ? 1.f : 0.f;
  }
}

}  // namespace

int sum_of_squares(const Squares* items, int64_t count, Stream stream) {
  return launch_list(items, count, [&](const auto& table, int32_t chunks) {
    squares_kernel<<<chunks, kThreads, 0, stream>>>(table);
  });
}

int reduce(const Slots* items, int64_t count, float* sums, Stream stream) {
  for (int64_t begin = 0; begin < count; begin += kMaxSlotLists) {
    SlotLists lists;
    const int n = static_cast<int>(std::min<int64_t>(count - begin, kMaxSlotLists));
    std::copy(items + begin, items + begin + n, lists.items);
    reduce_kernel<<<n, kReduceThreads, 0, stream>>>(lists, sums + begin);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int norm(const float* sums, int64_t count, float* norm, float* found_inf, Stream stream) {
  norm_kernel<<<1, kReduceThreads, 0, stream>>>(sums, count, norm, found_inf);
  return cudaGetLastError();
}

}  // namespace gradacc::cuda
