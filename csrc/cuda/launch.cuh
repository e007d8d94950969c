// One launch for many tensors: the list travels as a kernel argument, each block finds its chunk.
//
// A table holds up to kCapacity tensors and the running count of their chunks; block b serves the
// chunk c with first_chunk[i] <= b < first_chunk[i + 1]. The kernel argument space holds 32 KB from
// CUDA 12.1 on (sm_70 and later), 4 KB before. Small lists take a small table, because the driver
// copies the whole argument on every launch.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace gradacc::cuda {

constexpr int kThreads = 128;
constexpr int kWarpSize = 32;

#if CUDART_VERSION >= 12010
constexpr int kMaxCapacity = 640;
#else
constexpr int kMaxCapacity = 80;
#endif
constexpr int kSmallCapacity = 32;

template <typename Item, int kCapacity>
struct Table {
  static constexpr int kItems = kCapacity;
  Item items[kCapacity];
  int32_t first_chunk[kCapacity + 1];
  int32_t count;

  // The tensor that owns a chunk. The array lies in constant memory and the whole block asks for
  // the same entry, so a step of the search is one broadcast.
  __device__ int find(int32_t chunk) const {
    if constexpr (kCapacity == 1) return 0;
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Waits for the kernels before this one, where it was launched by launch_early.
__device__ inline void wait_for_former() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Whether a kernel can have clusters of blocks, and be scheduled while the one before it ends: on
// Hopper and later, as it was compiled for the current device. The kernels of one build are alike.
template <typename Kernel>
bool has_clusters(Kernel* kernel) {
  static thread_local int known_device = -1;
  static thread_local bool is_able = false;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device != known_device) {
    cudaFuncAttributes attributes{};
    const auto error = cudaFuncGetAttributes(&attributes, kernel);
    // Of older PTX the driver makes a kernel for this device in which both are missing.
    is_able =
        error == cudaSuccess && std::min(attributes.ptxVersion, attributes.binaryVersion) >= 90;
    known_device = device;
  }
  return is_able;
}

struct Grid {
  int blocks;
  int threads;
  int cluster = 1;  // blocks of one cluster; more than 1 where it has_clusters()
};

template <typename T>
struct Same {
  using type = T;
};

// Launches a kernel whose blocks may be scheduled while those of the kernel before it end, where it
// has_clusters(): its launch costs no time between the two. It must call wait_for_former before it
// touches memory.
template <typename... Params>
cudaError_t launch_early(void (*kernel)(Params...), const Grid& grid, Stream stream,
                         const typename Same<Params>::type&... params) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !has_clusters(kernel) ? 0 : grid.cluster > 1 ? 2 : 1;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

// Sum over a block of kBlock threads, in a fixed order; valid in thread 0.
template <int kBlock = kThreads, typename T>
__device__ T block_sum(T value) {
  __shared__ T warps[kBlock / kWarpSize];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    value = warps[0];
    for (int w = 1; w < kBlock / kWarpSize; ++w) value += warps[w];
  }
  return value;
}

// Sum of squares of what one thread saw, NaN when some value was not finite: x * 0 is 0 for a
// finite x and NaN otherwise, while an overflowing sum of squares is inf.
struct SquareSum {
  float squares = 0.f;
  float poison = 0.f;
  __device__ void add(float x) {
    squares = fmaf(x, x, squares);
    poison = fmaf(x, 0.f, poison);
  }
  __device__ float total() const { return squares + poison; }
};

// Fills tables of kCapacity with the non-empty items and launches each: launch(table, chunks),
// which returns an error code.
template <int kCapacity, typename Item, typename Launch>
cudaError_t launch_tables(const Item* items, int64_t count, const Launch& launch) {
  constexpr int64_t kMaxChunks = INT32_MAX;
  Table<Item, kCapacity> table;
  for (int64_t next = 0; next < count;) {
    int64_t chunks = 0;
    table.count = 0;
    for (; next < count && table.count < kCapacity; ++next) {
      const int64_t more = num_chunks(items[next].numel);
      if (more == 0) continue;
      if (more > kMaxChunks) return cudaErrorInvalidValue;
      if (chunks + more > kMaxChunks) break;
      table.items[table.count] = items[next];
      table.first_chunk[table.count++] = static_cast<int32_t>(chunks);
      chunks += more;
    }
    table.first_chunk[table.count] = static_cast<int32_t>(chunks);
    if (table.count == 0) continue;
    const cudaError_t error = launch(table, static_cast<int32_t>(chunks));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Item, typename Launch>
cudaError_t launch_list(const Item* items, int64_t count, const Launch& launch) {
  if (count == 1) return launch_tables<1>(items, count, launch);
  if (count <= kSmallCapacity) return launch_tables<kSmallCapacity>(items, count, launch);
  return launch_tables<kMaxCapacity>(items, count, launch);
}

}  // namespace gradacc::cuda
