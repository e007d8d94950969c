#include "wgrad_choice.h"

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "../cuda/wgrad_cutlass.h"
#include "checks.h"
#include "cublaslt.h"

namespace gradacc {
namespace {

using Shape = std::tuple<int64_t, int64_t, int64_t, bool>;

struct Table {
  std::mutex mutex;
  std::map<Shape, int> choices;
  std::optional<int> forced;
};

Table& table() {
  static Table instance;
  return instance;
}

constexpr int kCublasLt = -1;
// The CUTLASS instances of csrc/cuda/wgrad_cutlass.cu, by their numbers.
constexpr int kWide = 0, kSingle = 1;

int parse(const std::string& name) {
  const std::string prefix = "cublaslt:";
  if (name == prefix + "pingpong") return kCublasLt - kCublasLtPingpong;
  if (name.rfind(prefix, 0) == 0) {
    const int rank = std::atoi(name.c_str() + prefix.size());
    if (0 <= rank && rank < kCublasLtAlgorithms) return kCublasLt - rank;
  }
  for (int i = 0; i < cuda::wgrad_cutlass_count(); ++i)
    if (name == cuda::wgrad_cutlass_name(i)) return i;
  TORCH_CHECK_VALUE(false, "gradacc_kernels: no weight gradient kernel has the name ", name);
}

// From sweeps of 40 instances and cuBLASLt's first 8 algorithms over outputs of 1M to 263M elements
// at 64 to 16384 tokens on an H200. Outputs with fewer tiles than the GPU has processors need the
// smaller tiles of cuBLASLt. With many tokens the reads and writes of main are hidden in either,
// and its products are the faster ones, where its kernels know that they add. Large outputs have
// many tokens sooner; so do small ones where nothing is read.
constexpr int64_t kFewElements = int64_t{1} << 21, kSomeElements = int64_t{1} << 23;

int64_t many_tokens(int64_t elements, bool store) {
  constexpr int64_t kLargeElements = int64_t{1} << 25;
  if (elements >= kLargeElements) return store ? 512 : 768;
  return store && elements < kSomeElements ? 512 : 1536;
}

int rule(const WeightGrad& problem, bool is_scale_on_host) {
  const int64_t elements = problem.batch * problem.out_features * problem.in_features;
  if (elements < kFewElements) return kCublasLt;
  if (is_scale_on_host && problem.tokens >= many_tokens(elements, problem.store))
    return kCublasLt - kCublasLtPingpong;
  return elements < kSomeElements && problem.tokens < 1024 ? kSingle : kWide;
}

}  // namespace

int choose_weight_grad(const WeightGrad& problem, bool is_scale_on_host) {
  Table& known = table();
  {
    const std::lock_guard<std::mutex> lock(known.mutex);
    if (known.forced) return *known.forced;
    if (!known.choices.empty()) {
      const auto found = known.choices.find(
          {problem.out_features, problem.in_features, problem.tokens, problem.store});
      if (found != known.choices.end()) return found->second;
    }
  }
  return rule(problem, is_scale_on_host);
}

// From whole micro-batches of models of 0.1B, 1.5B and 8B shapes at 64 to 4096 tokens on an H200.
// With few tokens the rest of backward is a chain of kernels too small to fill the GPU, which half
// of it serves as well, and the weight gradient one that memory bounds, not its processors. Large
// weights need more of them to keep up. With many tokens nothing is left to share.
int weight_grad_processors_beside(int64_t elements, int64_t tokens, at::Device device) {
  constexpr int64_t kFewTokens = 384, kSomeTokens = 1024;
  constexpr int64_t kLargeElements = int64_t{1} << 24;
  if (tokens > kSomeTokens) return 0;
  const int all = at::cuda::getDeviceProperties(device.index())->multiProcessorCount;
  if (tokens > kFewTokens) return all;
  return elements > kLargeElements ? all * 2 / 3 : all / 2;
}

void set_weight_grad_choice(int64_t out_features, int64_t in_features, int64_t tokens, bool store,
                            const std::string& name) {
  const int choice = parse(name);
  Table& known = table();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.choices[{out_features, in_features, tokens, store}] = choice;
}

void clear_weight_grad_choices() {
  Table& known = table();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.choices.clear();
}

void force_weight_grad_choice(const std::string& name) {
  const std::optional<int> choice = name.empty() ? std::nullopt : std::optional(parse(name));
  Table& known = table();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.forced = choice;
}

}  // namespace gradacc
