// Weight gradients on Hopper's tensor cores, summed into fp32 in the epilogue (CUTLASS 3):
//
//   main[b, o, i] = fma(sum over t of grad_output[b, t, o] * input[b, t, i], s, main[b, o, i])
//   main[b, o, i] = (the same sum) * s                                          when storing
//
// Moves 8 B (store: 4 B) an element of main, and the operands once for every row or column of tiles
// that a cluster shares. The old tile is fetched while the tensor cores multiply, so that at few
// tokens the kernel is a copy and at many a matrix product.
// Every output tile is owned by one CTA that adds up its tokens in a fixed order: the same inputs
// give the same bits on every run.

#pragma once

#ifndef NDEBUG  // a device assert between two wgmma makes ptxas serialise them
#define NDEBUG
#endif

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_epilogue.hpp>
#include <cutlass/epilogue/collective/sm90_epilogue_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp>

#include "../kernels.h"
#include "elements.cuh"
#include "launch.cuh"

namespace gradacc::cuda::wgrad {

using cute::Int;
using cute::Shape;
using cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks;
using cutlass::epilogue::fusion::EmptyProducerLoadCallbacks;

// What the epilogue does with an accumulated tile, as an epilogue visitor: scale, add the old main
// gradient, and sum the squares of what is written.
//
// Each warp of a tile owns the slot tile * warps + warp, and zeroes those that lie a multiple of
// (all tiles * warps) behind it, so every slot is written exactly once.
//
// Elements beyond the edge of main need no mask. Their operands are zeros that TMA filled in, so
// they are zero, unless s or a value in the same row or column is not finite: but then so is an
// element of main in that row or column, and the poison is due.
struct MainGradFusion {
  struct SharedStorage {};
  struct Arguments {
    const float* inv_scale;
    float* partials;
    int64_t num_slots;
    float scale;
    bool store;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments,
                                                  void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  const Params* params;
  float factor;

  CUTLASS_HOST_DEVICE MainGradFusion(const Params& p, const SharedStorage&)
      : params(&p), factor(p.inv_scale == nullptr ? p.scale : p.scale * *p.inv_scale) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return !params->store; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return !params->store; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return EmptyProducerLoadCallbacks{};
  }

  // One thread's view of one tile.
  template <class OldTile, int kWarps>
  struct TileCallbacks : EmptyConsumerStoreCallbacks {
    const OldTile& old_tile;  // this thread's part of main's current subtile
    const Params* params;
    float factor;
    int64_t tile;   // or -1: a tile beyond the edge, which a cluster rounds the grid up to
    int64_t tiles;  // of the whole problem
    int warp;
    // Two chains each, because one warp's chain of dependent additions would be as long as the
    // rest.
    SquareSum sums[2];

    CUTLASS_DEVICE TileCallbacks(const OldTile& old_tile, const Params* params, float factor,
                                 int64_t tile, int64_t tiles, int warp)
        : old_tile(old_tile),
          params(params),
          factor(factor),
          tile(tile),
          tiles(tiles),
          warp(warp) {}

    template <int kFragment>
    CUTLASS_DEVICE cutlass::Array<float, kFragment> visit(
        const cutlass::Array<float, kFragment>& sum, int epi_v, int, int) {
      cutlass::Array<float, kFragment> result;
      if (params->store) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kFragment; ++i) result[i] = stored(sum[i], factor);
      } else {
        const cutlass::Array<float, kFragment> old =
            cute::recast<cutlass::Array<float, kFragment>>(old_tile)(epi_v);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kFragment; ++i) result[i] = added(old[i], sum[i], factor);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFragment; ++i) sums[i % 2].add(result[i]);
      return result;
    }

    CUTLASS_DEVICE void end() {
      if (params->partials == nullptr || tile < 0) return;
      float total = sums[0].total() + sums[1].total();
      CUTLASS_PRAGMA_UNROLL
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        total += __shfl_xor_sync(0xffffffffu, total, offset);
      const int lane = threadIdx.x % kWarpSize;
      const int64_t stride = tiles * kWarps;
      int64_t slot = tile * kWarps + warp + lane * stride;
      float value = lane == 0 ? total : 0.f;
      for (; slot < params->num_slots; slot += kWarpSize * stride) {
        params->partials[slot] = value;
        value = 0.f;
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto [m, n, k, l] = args.tile_coord_mnkl;
    const auto [M, N, K, L] = args.problem_shape_mnkl;
    const int tiles_m = cute::ceil_div(int(M), cute::size<0>(args.tile_shape_mnk));
    const int tiles_n = cute::ceil_div(int(N), cute::size<1>(args.tile_shape_mnk));
    const bool inside = int(m) < tiles_m && int(n) < tiles_n;
    const int64_t tile = inside ? (int64_t(l) * tiles_n + int(n)) * tiles_m + int(m) : -1;
    using OldTile = cute::remove_cvref_t<decltype(args.tCrC)>;
    constexpr int kWarps = decltype(cute::size(args.tiled_mma))::value / kWarpSize;
    return TileCallbacks<OldTile, kWarps>(args.tCrC, params, factor, tile,
                                          int64_t(int(L)) * tiles_n * tiles_m,
                                          args.thread_idx / kWarpSize);
  }
};

// One instance: two warpgroups take turns, one multiplies while the other is in its epilogue.
// kOldStages subtiles of kSubtileN columns of the old tile may be in shared memory at a time, where
// the new ones replace them; kStores of those may be on their way out.
template <class Element_, int kTileM, int kTileN, int kTileK, int kClusterM, int kClusterN,
          int kStages, int kSubtileN, int kOldStages, int kStores>
struct Config {
  using Element = Element_;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Tile = Shape<Int<kTileM>, Int<kTileN>, Int<kTileK>>;
  using Cluster = Shape<Int<kClusterM>, Int<kClusterN>, Int<1>>;
  static constexpr int kMmaThreads = 128;
  using Subtile = Shape<Int<64>, Int<kSubtileN>>;
  // main: [O, I, batch], row-major
  using MainStride = cute::Stride<int64_t, Int<1>, int64_t>;

  using MainAtom = cute::conditional_t<kSubtileN % 32 == 0, cute::GMMA::Layout_K_SW128_Atom<float>,
                                       cute::GMMA::Layout_K_SW64_Atom<float>>;
  using MainCopy = cute::AutoVectorizingCopyWithAssumedAlignment<128>;
  using Epilogue = cutlass::epilogue::collective::CollectiveEpilogue<
      cutlass::epilogue::Sm90TmaWarpSpecialized<kOldStages, kStores,
                                                cute::size(Subtile{}) / kMmaThreads,
                                                /*ReuseSmemC=*/true, /*DelayTmaStore=*/false>,
      Tile, Subtile, float, MainStride, float, MainStride, MainGradFusion, cute::SM90_TMA_LOAD,
      MainAtom, MainCopy, cute::SM90_TMA_STORE, MainAtom, MainCopy,
      cute::Copy_Atom<cute::SM90_U32x4_STSM_N, cutlass::half_t>, void>;

  // grad_output is the left operand, transposed: both operands have their tokens outermost, and
  // their rows lie along the 128 bytes of a swizzle atom.
  using OperandStride = cute::Stride<Int<1>, int64_t, int64_t>;
  using OperandAtom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
  using TiledMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, Tile, cute::GMMA::Major::MN,
                                 cute::GMMA::Major::MN>(),
      cute::Layout<Shape<Int<1>, Int<1>, Int<1>>>{}));
  // A tile of grad_output is shared by the CTAs of a cluster's row, one of input by its column.
  template <int kSharers>
  using OperandCopy =
      cute::conditional_t<kSharers == 1, cute::SM90_TMA_LOAD, cute::SM90_TMA_LOAD_MULTICAST>;
  using Mainloop = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<kStages, Cluster, Schedule>, Tile, Element,
      OperandStride, Element, OperandStride, TiledMma, OperandCopy<kClusterN>, OperandAtom, void,
      cute::identity, OperandCopy<kClusterM>, OperandAtom, void, cute::identity>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
};

template <class Config>
__global__ void __launch_bounds__(Config::Kernel::MaxThreadsPerBlock, 1)
    wgrad_kernel(const __grid_constant__ typename Config::Kernel::Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char smem[];
  typename Config::Kernel kernel;
  kernel(params, smem);
#endif
}

// The order in which the tiles are visited, for reuse in L2.
struct Raster {
  int swizzle;          // tiles that are walked together: 1, 2, 4 or 8
  bool along_features;  // along in_features first, else along out_features
};

template <class Config>
constexpr int64_t slots_needed(const WeightGrad& problem) {
  constexpr int64_t m = cute::get<0>(typename Config::Tile{}),
                    n = cute::get<1>(typename Config::Tile{});
  return (problem.out_features + m - 1) / m * ((problem.in_features + n - 1) / n) * problem.batch *
         (Config::kMmaThreads / kWarpSize);
}

// Co-resident CTAs of an instance on the current device, in `sms`, and the largest number of its
// clusters; asked once a device.
template <class Config>
cudaError_t capacity(int* sms, int* clusters) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int64_t> cache[kMaxDevices];
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  int64_t known = cache[device].load(std::memory_order_relaxed);
  if (known == 0) {
    const auto kernel = reinterpret_cast<const void*>(&wgrad_kernel<Config>);
    constexpr int kSmem = Config::Kernel::SharedStorageSize;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
    if (error) return error;
    int count = 0, active = 0;
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error) return error;
    using Cluster = typename Config::Cluster;
    constexpr unsigned m = cute::get<0>(Cluster{}), n = cute::get<1>(Cluster{});
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {m, n, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(m, n, 1);
    config.blockDim = Config::Kernel::get_block_shape();
    config.dynamicSmemBytes = kSmem;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&active, kernel, &config);
    if (error) return error;
    if (active == 0) return cudaErrorInvalidConfiguration;
    known = (int64_t(count) << 32) | active;
    cache[device].store(known, std::memory_order_relaxed);
  }
  *sms = static_cast<int>(known >> 32);
  *clusters = static_cast<int>(known & 0xffffffff);
  return cudaSuccess;
}

template <class Config>
cudaError_t launch(const WeightGrad& problem, float scale, const float* inv_scale, Raster raster,
                   cudaStream_t stream) {
  using Kernel = typename Config::Kernel;
  using Element = typename Config::Element;
  const int64_t slots =
      problem.partials == nullptr
          ? 0
          : num_chunks(problem.batch * problem.out_features * problem.in_features);
  if (problem.partials != nullptr && slots_needed<Config>(problem) > slots)
    return cudaErrorInvalidValue;

  int sms = 0, clusters = 0;
  if (cudaError_t error = capacity<Config>(&sms, &clusters)) return error;
  constexpr int kClusterSize = cute::size(typename Config::Cluster{});
  if (problem.processors > 0) {
    sms = std::clamp(problem.processors, kClusterSize, sms);
    clusters = std::min(clusters, sms / kClusterSize);
  }

  // A dimension of extent one must not carry a stride that TMA would refuse.
  const auto batch_stride = [&](int64_t stride) { return problem.batch > 1 ? stride : 0; };
  const typename Config::MainStride main_stride{
      problem.in_features, {}, batch_stride(problem.out_features * problem.in_features)};
  typename Kernel::Arguments arguments{};
  arguments.problem_shape = {int(problem.out_features), int(problem.in_features),
                             int(problem.tokens), int(problem.batch)};
  arguments.mainloop.ptr_A = static_cast<const Element*>(problem.grad_output);
  arguments.mainloop.dA = {
      {}, problem.grad_output_stride, batch_stride(problem.grad_output_batch_stride)};
  arguments.mainloop.ptr_B = static_cast<const Element*>(problem.input);
  arguments.mainloop.dB = {{}, problem.input_stride, batch_stride(problem.input_batch_stride)};
  arguments.epilogue.thread = {inv_scale, problem.partials, slots, scale, problem.store};
  arguments.epilogue.ptr_C = problem.main;
  arguments.epilogue.dC = main_stride;
  arguments.epilogue.ptr_D = problem.main;
  arguments.epilogue.dD = main_stride;
  arguments.hw_info.sm_count = sms;
  arguments.hw_info.max_active_clusters = clusters;
  using Order = typename Kernel::TileScheduler::RasterOrderOptions;
  arguments.scheduler.max_swizzle_size = raster.swizzle;
  arguments.scheduler.raster_order = raster.along_features ? Order::AlongN : Order::AlongM;
  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);

  using Cluster = typename Config::Cluster;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cute::get<0>(Cluster{})), unsigned(cute::get<1>(Cluster{})),
                              1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = kClusterSize == 1 ? 0 : 1;
  return cudaLaunchKernelEx(&config, wgrad_kernel<Config>, params);
}

}  // namespace gradacc::cuda::wgrad
