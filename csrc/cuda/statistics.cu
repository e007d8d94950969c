// slot[c] = sum of main^2 over chunk c;  sums[i] = sum of tensor i's slots;  norm = sqrt(sum sums).
//
// The first pass reads 4 bytes per element; the other two read 4 bytes per chunk and per tensor.
// A slot, a sum or a norm is NaN exactly when an element behind it is not finite.
// Deterministic: fixed order everywhere; slots and sums are added in double.

#include <cooperative_groups.h>

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
constexpr int kReduceThreads = 1024;  // of a block that serves several tensors
constexpr int kLongThreads = 256;     // of one that serves one, or a part of one
constexpr int kMaxCluster = 8;        // blocks; the portable size
constexpr int kFloats = sizeof(float4) / sizeof(float);
constexpr int kInFlight = 8;  // vectors whose loads are issued before the first is used

// What so many threads have in flight.
constexpr int64_t slots_at_once(int threads) { return int64_t{threads} * kInFlight * kFloats; }

struct SlotLists {
  Slots items[kMaxSlotLists];
};

// What one of `threads` threads has of the sum of count values, in double. Those between the first
// and the last aligned address are read as vectors.
__device__ double part_of_sum(const float* values, int64_t count, int thread, int threads) {
  const int64_t misaligned = reinterpret_cast<uintptr_t>(values) / sizeof(float) % kFloats;
  const int64_t before = min(count, (kFloats - misaligned) % kFloats);
  const auto* vecs = reinterpret_cast<const float4*>(values + before);
  const int64_t n_vecs = (count - before) / kFloats;
  const int64_t after = before + n_vecs * kFloats;
  double sum = 0.;
  if (thread < before) sum += values[thread];
  if (thread < count - after) sum += values[after + thread];
  for (int64_t begin = thread; begin < n_vecs; begin += kInFlight * threads) {
    float4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t index = begin + i * threads;
      v[i] = index < n_vecs ? vecs[index] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      sum += static_cast<double>(v[i].x) + v[i].y + (static_cast<double>(v[i].z) + v[i].w);
  }
  return sum;
}

__device__ void write_norm(double sum, float* norm, float* found_inf) {
  *norm = static_cast<float>(sqrt(sum));
  *found_inf = isnan(sum) ? 1.f : 0.f;
}

__device__ int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

// Sum over a cluster of what thread 0 of each block has; valid in that of its first block.
__device__ double cluster_sum(double value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ double blocks[kMaxCluster];
  const auto cluster = cooperative_groups::this_cluster();
  if (cluster.num_blocks() == 1) return value;
  cluster.sync();  // the first block has begun
  if (threadIdx.x == 0) *cluster.map_shared_rank(&blocks[cluster.block_rank()], 0) = value;
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) {
    value = blocks[0];
    for (unsigned b = 1; b < cluster.num_blocks(); ++b) value += blocks[b];
  }
#endif
  return value;
}

// kGroup threads of a warp for each tensor, in turn. With `norm` the grid is one block or cluster.
template <int kGroup>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_short_kernel(const __grid_constant__ SlotLists lists, int count, float* sums,
                        float* norm, float* found_inf) {
  constexpr int kGroups = kReduceThreads / kGroup;  // of a block
  const int lane = threadIdx.x % kGroup;
  wait_for_former();
  double total = 0.;
  // All threads of a warp take part in each round, because the shuffles need them.
  for (int round = blockIdx.x * kGroups; round < count; round += gridDim.x * kGroups) {
    const int i = round + threadIdx.x / kGroup;
    double sum =
        i < count ? part_of_sum(lists.items[i].partials, lists.items[i].count, lane, kGroup) : 0.;
    for (int offset = kGroup / 2; offset > 0; offset /= 2)
      sum += __shfl_down_sync(0xffffffffu, sum, offset, kGroup);
    if (i < count && lane == 0) {
      sums[i] = static_cast<float>(sum);
      total += sums[i];
    }
  }
  if (!norm) return;
  total = cluster_sum(block_sum<kReduceThreads>(total));
  if (blockIdx.x == 0 && threadIdx.x == 0) write_norm(total, norm, found_inf);
}

// A cluster for each tensor. With `norm` there is only one.
__global__ void __launch_bounds__(kLongThreads)
    reduce_long_kernel(const __grid_constant__ SlotLists lists, float* sums, float* norm,
                       float* found_inf) {
  const int blocks = cluster_size();
  const int i = blockIdx.x / blocks;
  const int rank = blockIdx.x % blocks;
  wait_for_former();
  const double part = part_of_sum(lists.items[i].partials, lists.items[i].count,
                                  rank * kLongThreads + threadIdx.x, blocks * kLongThreads);
  const double sum = cluster_sum(block_sum<kLongThreads>(part));
  if (rank > 0 || threadIdx.x > 0) return;
  sums[i] = static_cast<float>(sum);
  if (norm) write_norm(sums[i], norm, found_inf);
}

__global__ void __launch_bounds__(kReduceThreads, 1)
    norm_kernel(const float* sums, int64_t count, float* norm, float* found_inf) {
  wait_for_former();
  const double sum =
      block_sum<kReduceThreads>(part_of_sum(sums, count, threadIdx.x, kReduceThreads));
  if (threadIdx.x == 0) write_norm(sum, norm, found_inf);
}

// A power of two of blocks for each tensor, of which the longest gives each two rounds of loads.
int blocks_of_tensor(int64_t slots) {
  int blocks = 1;
  while (has_clusters(reduce_long_kernel) && blocks < kMaxCluster &&
         slots > 2 * blocks * slots_at_once(kLongThreads))
    blocks *= 2;
  return blocks;
}

}  // namespace

int sum_of_squares(const Squares* items, int64_t count, Stream stream) {
  return launch_list(items, count, [&](const auto& table, int32_t chunks) {
    using List = std::decay_t<decltype(table)>;
    return launch_early(squares_kernel<List>, {chunks, kThreads}, stream, table);
  });
}

int reduce(const Slots* items, int64_t count, float* sums, float* norm, float* found_inf,
           Stream stream) {
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, items[i].count);
  const bool is_short = longest <= slots_at_once(kWarpSize);
  const int group = longest <= slots_at_once(8) ? 8 : kWarpSize;
  const int cluster = blocks_of_tensor(longest);
  const auto blocks_of = [&](int64_t n) {
    return static_cast<int>((n * group - 1) / kReduceThreads + 1);
  };
  // Whether one block, or one cluster, serves all tensors: it computes the norm as well. 8 threads
  // a tensor are a block's work.
  const bool is_one = count > 0 && count <= kMaxSlotLists &&
                      (is_short ? group == 8 || has_clusters(reduce_long_kernel) : count == 1);
  for (int64_t begin = 0; begin < count; begin += kMaxSlotLists) {
    SlotLists lists;
    const int n = static_cast<int>(std::min<int64_t>(count - begin, kMaxSlotLists));
    std::copy(items + begin, items + begin + n, lists.items);
    float* const norm_here = is_one ? norm : nullptr;
    cudaError_t error;
    if (is_short) {
      const int most = group == 8 ? 1 : kMaxCluster;
      const int blocks = is_one ? std::min(blocks_of(n), most) : blocks_of(n);
      error = launch_early(group == 8 ? reduce_short_kernel<8> : reduce_short_kernel<kWarpSize>,
                           {blocks, kReduceThreads, is_one ? blocks : 1}, stream, lists, n,
                           sums + begin, norm_here, found_inf);
    } else {
      error = launch_early(reduce_long_kernel, {n * cluster, kLongThreads, cluster}, stream, lists,
                           sums + begin, norm_here, found_inf);
    }
    if (error != cudaSuccess) return error;
  }
  if (is_one) return cudaSuccess;
  return launch_early(norm_kernel, {1, kReduceThreads}, stream, sums, count, norm, found_inf);
}

}  // namespace gradacc::cuda
