// main = fma(float(grad), scale * inv_scale, main), or main = float(grad) * scale * inv_scale.
//
// Bytes per element with a 16-bit gradient: 10 to add, 6 to store; a slot a chunk besides.
// Deterministic: every element is written by one thread, every slot by one block.

#include "elements.cuh"
#include "launch.cuh"

namespace gradacc::cuda {
namespace {

constexpr int kVecSize = 4;   // a warp's float4 accesses cover 512 contiguous bytes
constexpr int kInFlight = 2;  // vectors whose loads are issued before the first is used
constexpr int kStep = kThreads * kVecSize;
static_assert(kChunkSize % (kStep * kInFlight) == 0);

template <bool kStore, typename grad_t>
__device__ float update(float main, grad_t grad, float scale) {
  return kStore ? stored(to_float(grad), scale) : added(main, to_float(grad), scale);
}

template <typename grad_t>
__device__ bool is_vector_aligned(const float* main, const grad_t* grad) {
  return reinterpret_cast<uintptr_t>(main) % sizeof(Vec<float, kVecSize>) == 0 &&
         reinterpret_cast<uintptr_t>(grad) % sizeof(Vec<grad_t, kVecSize>) == 0;
}

template <bool kStore, typename grad_t>
__device__ void full_chunk(float* main, const grad_t* grad, float scale, SquareSum& sum) {
  auto* main_vec = reinterpret_cast<Vec<float, kVecSize>*>(main) + threadIdx.x;
  const auto* grad_vec = reinterpret_cast<const Vec<grad_t, kVecSize>*>(grad) + threadIdx.x;
#pragma unroll
  for (int base = 0; base < kChunkSize / kVecSize; base += kThreads * kInFlight) {
    Vec<float, kVecSize> m[kInFlight];
    Vec<grad_t, kVecSize> g[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      g[i] = grad_vec[base + i * kThreads];
      if constexpr (!kStore) m[i] = main_vec[base + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) {
        m[i].value[j] = update<kStore>(m[i].value[j], g[i].value[j], scale);
        sum.add(m[i].value[j]);
      }
      main_vec[base + i * kThreads] = m[i];
    }
  }
}

// The last chunk of a tensor, and tensors whose addresses do not allow vectors.
template <bool kStore, typename grad_t>
__device__ void partial_chunk(float* main, const grad_t* grad, int count, float scale,
                              SquareSum& sum) {
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float updated = update<kStore>(kStore ? 0.f : main[i], grad[i], scale);
    main[i] = updated;
    sum.add(updated);
  }
}

template <bool kStore, typename grad_t>
__device__ void chunk(const Accumulation& item, int64_t begin, float scale, SquareSum& sum) {
  float* main = item.main + begin;
  const grad_t* grad = static_cast<const grad_t*>(item.grad) + begin;
  const int64_t left = item.numel - begin;
  if (left >= kChunkSize && is_vector_aligned(main, grad)) {
    full_chunk<kStore>(main, grad, scale, sum);
  } else {
    partial_chunk<kStore>(main, grad, static_cast<int>(left < kChunkSize ? left : kChunkSize),
                          scale, sum);
  }
}

template <bool kStore>
__device__ void chunk(const Accumulation& item, int64_t begin, float scale, SquareSum& sum) {
  switch (item.type) {
    case GradType::kBFloat16:
      return chunk<kStore, __nv_bfloat16>(item, begin, scale, sum);
    case GradType::kFloat16:
      return chunk<kStore, __half>(item, begin, scale, sum);
    case GradType::kFloat32:
      return chunk<kStore, float>(item, begin, scale, sum);
  }
}

template <typename List>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const __grid_constant__ List table, float scale, const float* inv_scale) {
  const int32_t block = blockIdx.x;
  const int index = table.find(block);
  const Accumulation& item = table.items[index];
  const int64_t slot = block - table.first_chunk[index];
  wait_for_former();
  const float s = inv_scale ? scale * *inv_scale : scale;

  SquareSum sum;
  if (item.store) {
    chunk<true>(item, slot * kChunkSize, s, sum);
  } else {
    chunk<false>(item, slot * kChunkSize, s, sum);
  }
  if (item.partials) {
    const float total = block_sum(sum.total());
    if (threadIdx.x == 0) item.partials[slot] = total;
  }
}

}  // namespace

int accumulate(const Accumulation* items, int64_t count, float scale, const float* inv_scale,
               Stream stream) {
  return launch_list(items, count, [&](const auto& table, int32_t chunks) {
    using List = std::decay_t<decltype(table)>;
    return launch_early(accumulate_kernel<List>, {chunks, kThreads}, stream, table, scale,
                        inv_scale);
  });
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace gradacc::cuda
