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

  wait_for_former();
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
constexpr int64_t kShortListSlots = 32;  // of each tensor
// One block reads all slots of a tensor, so it must have many loads in flight.
constexpr int kReduceThreads = 1024;

struct SlotLists {
  Slots items[kMaxSlotLists];
};

// What one of `threads` threads has of the sum of count values, in double. Those between the first
// and the last aligned address are read as vectors.
__device__ double part_of_sum(const float* values, int64_t count, int thread, int threads) {
  constexpr int kFloats = sizeof(float4) / sizeof(float);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(values) / sizeof(float) % kFloats;
  const int64_t before = min(count, (kFloats - misaligned) % kFloats);
  const auto* vecs = reinterpret_cast<const float4*>(values + before);
  const int64_t n_vecs = (count - before) / kFloats;
  const int64_t after = before + n_vecs * kFloats;
  double sum = 0.;
  if (thread < before) sum += values[thread];
#pragma unroll 8
  for (int64_t i = thread; i < n_vecs; i += threads) {
    const float4 v = vecs[i];
    sum += static_cast<double>(v.x) + v.y + (static_cast<double>(v.z) + v.w);
  }
  if (thread < count - after) sum += values[after + thread];
  return sum;
}

// The sum of count values, in double; valid in thread 0.
__device__ double reduce(const float* values, int64_t count) {
  return block_sum<kReduceThreads>(part_of_sum(values, count, threadIdx.x, kReduceThreads));
}

__device__ void write_norm(double sum, float* norm, float* found_inf) {
  *norm = static_cast<float>(sqrt(sum));
  *found_inf = isnan(sum) ? 1.f : 0.f;
}

// One block a tensor.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ SlotLists lists, float* sums) {
  const Slots& item = lists.items[blockIdx.x];
  wait_for_former();
  const double sum = reduce(item.partials, item.count);
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<float>(sum);
}

// One block for all tensors of a short list, kGroup threads for each in turn, and the norm with
// them.
__global__ void __launch_bounds__(kReduceThreads)
    short_list_kernel(const __grid_constant__ SlotLists lists, int count, float* sums, float* norm,
                      float* found_inf) {
  constexpr int kGroup = 8;
  const int lane = threadIdx.x % kGroup;
  wait_for_former();
  double total = 0.;
  for (int i = threadIdx.x / kGroup; i - threadIdx.x / kGroup < count;
       i += kReduceThreads / kGroup) {
    const bool is_one = i < count;  // all threads of a warp take part in the shuffles
    double sum =
        is_one ? part_of_sum(lists.items[i].partials, lists.items[i].count, lane, kGroup) : 0.;
    for (int offset = kGroup / 2; offset > 0; offset /= 2)
      sum += __shfl_down_sync(0xffffffffu, sum, offset, kGroup);
    if (is_one && lane == 0) {
      sums[i] = static_cast<float>(sum);
      total += sums[i];
    }
  }
  total = block_sum<kReduceThreads>(total);
  if (threadIdx.x == 0) write_norm(total, norm, found_inf);
}

__global__ void __launch_bounds__(kReduceThreads)
    norm_kernel(const float* sums, int64_t count, float* norm, float* found_inf) {
  wait_for_former();
  const double sum = reduce(sums, count);
  if (threadIdx.x == 0) write_norm(sum, norm, found_inf);
}

}  // namespace

int sum_of_squares(const Squares* items, int64_t count, Stream stream) {
  return launch_list(items, count, [&](const auto& table, int32_t chunks) {
    using List = std::decay_t<decltype(table)>;
    return launch_early(squares_kernel<List>, chunks, kThreads, stream, table);
  });
}

int reduce(const Slots* items, int64_t count, float* sums, float* norm, float* found_inf,
           Stream stream) {
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, items[i].count);
  const bool is_short = count <= kMaxSlotLists && longest <= kShortListSlots;
  for (int64_t begin = 0; begin < count; begin += kMaxSlotLists) {
    SlotLists lists;
    const int n = static_cast<int>(std::min<int64_t>(count - begin, kMaxSlotLists));
    std::copy(items + begin, items + begin + n, lists.items);
    const cudaError_t error =
        is_short ? launch_early(short_list_kernel, 1, kReduceThreads, stream, lists, n, sums, norm,
                                found_inf)
                 : launch_early(reduce_kernel, n, kReduceThreads, stream, lists, sums + begin);
    if (error != cudaSuccess) return error;
  }
  if (is_short && count > 0) return cudaSuccess;
  return launch_early(norm_kernel, 1, kReduceThreads, stream, sums, count, norm, found_inf);
}

}  // namespace gradacc::cuda
