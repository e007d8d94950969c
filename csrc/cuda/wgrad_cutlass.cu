// The instances of the weight-gradient kernel of wgrad_cutlass.cuh that are compiled in, and which
// of them can take a problem.

#include "wgrad_cutlass.h"

#if __has_include(<cutlass/cutlass.h>)

#include <climits>

#include "wgrad_cutlass.cuh"

namespace gradacc::cuda {
namespace {

using namespace wgrad;

// The widest share of the operands between CTAs that still hides the epilogue behind the other
// consumer's products, with the next old tile on its way as a whole.
template <class Element>
using Wide = Config<Element, 128, 128, 64, 2, 1, 5, 64, 4, 2>;
// The same without clusters, which leave processors idle where there are few tiles.
template <class Element>
using Single = Config<Element, 128, 128, 64, 1, 1, 5, 32, 8, 2>;

struct Variant {
  const char* name;
  cudaError_t (*launch_half)(const WeightGrad&, float, const float*, Raster, cudaStream_t);
  cudaError_t (*launch_bfloat16)(const WeightGrad&, float, const float*, Raster, cudaStream_t);
  int64_t (*slots_needed)(const WeightGrad&);
};

template <template <class> class Chosen>
constexpr Variant variant(const char* name) {
  return {name, launch<Chosen<cutlass::half_t>>, launch<Chosen<cutlass::bfloat16_t>>,
          slots_needed<Chosen<cutlass::half_t>>};
}

constexpr Variant kVariants[] = {
    variant<Wide>("wide"),
    variant<Single>("single"),
};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

// Tells by its static shared memory whether the code that the driver would load for the current
// device was compiled for sm_90a: that needs neither a launch nor a synchronisation.
__global__ void architecture_probe() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ volatile int marker[kWarpSize];
  marker[threadIdx.x % kWarpSize] = 0;
#endif
}

bool device_has_wgmma() {
  constexpr int kMaxDevices = 64;
  enum : int8_t { kUnknown, kYes, kNo };
  static std::atomic<int8_t> cache[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  int8_t known = cache[device].load(std::memory_order_relaxed);
  if (known == kUnknown) {
    int major = 0;
    cudaFuncAttributes attributes = {};
    const bool asked =
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaFuncGetAttributes(&attributes, architecture_probe) == cudaSuccess;
    if (!asked) cudaGetLastError();  // no code for this device: not the caller's error
    known = asked && major == 9 && attributes.sharedSizeBytes > 0 ? kYes : kNo;
    cache[device].store(known, std::memory_order_relaxed);
  }
  return known == kYes;
}

// What a TMA descriptor can address: rows that start on 16 bytes and do not overlap.
bool addressable(const void* data, int64_t row, int64_t stride, int64_t batch, int64_t batch_stride,
                 int64_t element_size) {
  constexpr int64_t kMaxStride = int64_t(1) << 40;
  const auto aligned = [&](int64_t s) {
    return s >= row && s * element_size % 16 == 0 && s * element_size < kMaxStride;
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && aligned(stride) &&
         (batch == 1 || aligned(batch_stride));
}

}  // namespace

int wgrad_cutlass_count() { return kVariantCount; }

const char* wgrad_cutlass_name(int variant) { return kVariants[variant].name; }

bool wgrad_cutlass_takes(int variant, const WeightGrad& p) {
  const bool sized = p.batch > 0 && p.out_features > 0 && p.in_features > 0 && p.tokens > 0 &&
                     p.batch <= INT_MAX && p.out_features <= INT_MAX && p.in_features <= INT_MAX &&
                     p.tokens <= INT_MAX;
  if (!sized || p.type == GradType::kFloat32) return false;
  const bool reachable =
      addressable(p.main, p.in_features, p.in_features, p.batch, p.out_features * p.in_features,
                  4) &&
      addressable(p.grad_output, p.out_features, p.grad_output_stride, p.batch,
                  p.grad_output_batch_stride, 2) &&
      addressable(p.input, p.in_features, p.input_stride, p.batch, p.input_batch_stride, 2);
  if (!reachable) return false;
  // The tile scheduler counts in 32 bits; its tiles are larger than a chunk.
  const int64_t chunks = num_chunks(p.batch * p.out_features * p.in_features);
  const int64_t slots = kVariants[variant].slots_needed(p);
  if (slots > INT_MAX || (p.partials != nullptr && slots > chunks)) return false;
  return device_has_wgmma();
}

int wgrad_cutlass(int variant, const WeightGrad& problem, float scale, const float* inv_scale,
                  Stream stream) {
  const Variant& chosen = kVariants[variant];
  const auto launch =
      problem.type == GradType::kFloat16 ? chosen.launch_half : chosen.launch_bfloat16;
  // Along the shorter side first: the tiles in flight then share the most operand rows in L2.
  const Raster raster{1, problem.in_features <= problem.out_features};
  return launch(problem, scale, inv_scale, raster, stream);
}

}  // namespace gradacc::cuda

#else  // no CUTLASS headers

#include <cuda_runtime.h>

namespace gradacc::cuda {

int wgrad_cutlass_count() { return 0; }

const char* wgrad_cutlass_name(int) { return ""; }

bool wgrad_cutlass_takes(int, const WeightGrad&) { return false; }

int wgrad_cutlass(int, const WeightGrad&, float, const float*, Stream) {
  return cudaErrorNotSupported;
}

}  // namespace gradacc::cuda

#endif
