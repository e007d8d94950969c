// A row-major [O, I] matrix is a column-major [I, O] one, so cuBLASLt computes mainᵀ = Xᵀ dY:
//
//   A = X,  [T, I] row-major: column-major I x T, as it is      m = I
//   B = dY, [T, O] row-major: column-major O x T, transposed    n = O,  k = T
//   C = D = main: column-major I x O                            in place, beta = 0 or 1

#include "cublaslt.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cublasLt.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"

namespace gradacc {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;

void check(cublasStatus_t status, const char* call) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "gradacc_kernels: ", call,
              " failed: ", cublasLtGetStatusString(status));
}

template <typename T, cublasStatus_t (*kDestroy)(T*)>
struct Destroy {
  void operator()(T* descriptor) const { kDestroy(descriptor); }
};
using Operation = std::unique_ptr<cublasLtMatmulDescOpaque_t,
                                  Destroy<cublasLtMatmulDescOpaque_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t,
                               Destroy<cublasLtMatrixLayoutOpaque_t, cublasLtMatrixLayoutDestroy>>;
using Preference =
    std::unique_ptr<cublasLtMatmulPreferenceOpaque_t,
                    Destroy<cublasLtMatmulPreferenceOpaque_t, cublasLtMatmulPreferenceDestroy>>;

cudaDataType_t data_type(GradType type) {
  switch (type) {
    case GradType::kFloat16:
      return CUDA_R_16F;
    case GradType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

Layout make_layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t stride,
                   int64_t batch, int64_t batch_stride) {
  cublasLtMatrixLayout_t layout;
  check(cublasLtMatrixLayoutCreate(&layout, type, rows, columns, std::max(stride, rows)),
        "cublasLtMatrixLayoutCreate");
  Layout owned(layout);
  const auto count = static_cast<int32_t>(batch);
  cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                   sizeof(count));
  cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                   &batch_stride, sizeof(batch_stride));
  return owned;
}

uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>(std::min<uintptr_t>(address & -address, 256));
}

// What an algorithm depends on.
using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int32_t, int32_t, bool, bool, std::array<uint32_t, 3>>;
using Algorithms = std::vector<cublasLtMatmulHeuristicResult_t>;

struct Matmul {
  Operation operation;
  Layout input, grad_output, main;
  Algorithms algorithms;  // as cuBLASLt ranks them
};

struct Cache {
  static constexpr size_t kMaxEntries = 4096;
  std::mutex mutex;
  std::map<Key, std::shared_ptr<const Matmul>> entries;
};

Cache& cache() {
  static Cache instance;
  return instance;
}

// torch's handles come with a workspace of 32 MiB for each stream, which stays; a product here
// takes what its algorithm needs, for as long as it runs. Never destroyed: at exit the driver may
// be gone.
cublasLtHandle_t handle_of(at::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = handles.find(device.index());
  if (found != handles.end()) return found->second;
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  cublasLtHandle_t handle;
  check(cublasLtCreate(&handle), "cublasLtCreate");
  handles.emplace(device.index(), handle);
  return handle;
}

Matmul describe(const WeightGrad& p, bool is_tf32_allowed) {
  const auto type = data_type(p.type);
  const bool is_tf32 = p.type == GradType::kFloat32 && is_tf32_allowed;
  cublasLtMatmulDesc_t operation;
  check(cublasLtMatmulDescCreate(
            &operation, is_tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  Matmul matmul{
      Operation(operation),
      make_layout(type, p.in_features, p.tokens, p.input_stride, p.batch, p.input_batch_stride),
      make_layout(type, p.out_features, p.tokens, p.grad_output_stride, p.batch,
                  p.grad_output_batch_stride),
      make_layout(CUDA_R_32F, p.in_features, p.out_features, p.in_features, p.batch,
                  p.out_features * p.in_features),
      {}};
  const cublasOperation_t transpose = CUBLAS_OP_T;
  cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSB, &transpose,
                                 sizeof(transpose));
  const auto processors = static_cast<int32_t>(p.processors);
  cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, &processors,
                                 sizeof(processors));
  return matmul;
}

Algorithms find_algorithms(const Matmul& matmul, const std::array<uint32_t, 3>& alignments,
                           cublasLtHandle_t handle) {
  cublasLtMatmulPreference_t preference;
  check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const Preference owned(preference);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  // Partial sums of a split reduction stay in float32.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[0]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[1]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[2]);
  Algorithms algorithms(kCublasLtAlgorithms);
  int count = 0;
  check(
      cublasLtMatmulAlgoGetHeuristic(handle, matmul.operation.get(), matmul.input.get(),
                                     matmul.grad_output.get(), matmul.main.get(), matmul.main.get(),
                                     preference, kCublasLtAlgorithms, algorithms.data(), &count),
      "cublasLtMatmulAlgoGetHeuristic");
  TORCH_CHECK(count > 0, "gradacc_kernels: cuBLASLt has no algorithm for this weight gradient");
  algorithms.resize(count);
  return algorithms;
}

// cuBLASLt does not say how an algorithm schedules its warpgroups; its kernels for Hopper with
// tiles too large for the registers of one cooperate, and these two take turns. Where tiles are
// many, the larger one reads less.
size_t find_pingpong(const Algorithms& algorithms, int64_t elements) {
  constexpr int64_t kManyElements = int64_t{1} << 25;
  std::array<uint32_t, 2> tiles{CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_MATMUL_TILE_128x160};
  if (elements >= kManyElements) std::swap(tiles[0], tiles[1]);
  for (const uint32_t wanted : tiles)
    for (size_t rank = 0; rank < algorithms.size(); ++rank) {
      uint32_t tile = CUBLASLT_MATMUL_TILE_UNDEFINED;
      size_t written = 0;
      cublasLtMatmulAlgoConfigGetAttribute(&algorithms[rank].algo, CUBLASLT_ALGO_CONFIG_TILE_ID,
                                           &tile, sizeof(tile), &written);
      if (tile == wanted) return rank;
    }
  return 0;
}

// The description of a product with its algorithms, made once for a key.
std::shared_ptr<const Matmul> find_matmul(const WeightGrad& p, const Key& key,
                                          const std::array<uint32_t, 3>& alignments,
                                          bool is_tf32_allowed, cublasLtHandle_t handle) {
  Cache& known = cache();
  const std::lock_guard<std::mutex> lock(known.mutex);
  const auto found = known.entries.find(key);
  if (found != known.entries.end()) return found->second;
  auto matmul = std::make_shared<Matmul>(describe(p, is_tf32_allowed));
  matmul->algorithms = find_algorithms(*matmul, alignments, handle);
  if (known.entries.size() >= Cache::kMaxEntries) known.entries.clear();
  known.entries.emplace(key, matmul);
  return matmul;
}

}  // namespace

int64_t cublaslt_version() { return static_cast<int64_t>(cublasLtGetVersion()); }

void cublaslt_weight_grad(const WeightGrad& p, float s, int algorithm, at::Device device) {
  const bool is_tf32_allowed = at::globalContext().allowTF32CuBLAS();
  const std::array<uint32_t, 3> alignments{alignment_of(p.input), alignment_of(p.grad_output),
                                           alignment_of(p.main)};
  const Key key{device.index(),
                p.batch,
                p.out_features,
                p.in_features,
                p.tokens,
                p.input_stride,
                p.input_batch_stride,
                p.grad_output_stride,
                p.grad_output_batch_stride,
                static_cast<int32_t>(p.type),
                p.processors,
                p.store,
                is_tf32_allowed,
                alignments};
  const auto handle = handle_of(device);
  const auto matmul = find_matmul(p, key, alignments, is_tf32_allowed, handle);
  const Algorithms& algorithms = matmul->algorithms;
  size_t rank = algorithm == kCublasLtPingpong
                    ? find_pingpong(algorithms, p.batch * p.out_features * p.in_features)
                    : algorithm;
  if (rank >= algorithms.size()) rank = 0;
  const auto& chosen = algorithms[rank];
  const auto workspace = at::empty({static_cast<int64_t>(chosen.workspaceSize)},
                                   at::TensorOptions().dtype(at::kByte).device(device));
  const float beta = p.store ? 0.f : 1.f;
  check(cublasLtMatmul(handle, matmul->operation.get(), &s, p.input, matmul->input.get(),
                       p.grad_output, matmul->grad_output.get(), &beta, p.main, matmul->main.get(),
                       p.main, matmul->main.get(), &chosen.algo, workspace.mutable_data_ptr(),
                       chosen.workspaceSize, at::cuda::getCurrentCUDAStream()),
        "cublasLtMatmul");
}

}  // namespace gradacc
