#include "wgrad_choice.h"

#include <ATen/core/Tensor.h>

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
  if (name.rfind(prefix, 0) == 0) {
    const int rank = std::atoi(name.c_str() + prefix.size());
    if (0 <= rank && rank < kCublasLtAlgorithms) return kCublasLt - rank;
  }
  for (int i = 0; i < cuda::wgrad_cutlass_count(); ++i)
    if (name == cuda::wgrad_cutlass_name(i)) return i;
  TORCH_CHECK_VALUE(false, "gradacc_kernels: no weight gradient kernel has the name ", name);
}

// From a sweep of 36 instances over outputs of 1M to 263M elements at 128 to 16384 tokens on an
// H200. Outputs with fewer tiles than the GPU has processors need a split of the sum over tokens,
// which cuBLASLt has; at many tokens the reads and writes of main are hidden in either.
int rule(const WeightGrad& problem) {
  constexpr int64_t kFewElements = int64_t{1} << 21, kSomeElements = int64_t{1} << 23;
  constexpr int64_t kManyTokens = 3072;
  const int64_t elements = problem.batch * problem.out_features * problem.in_features;
  if (elements < kFewElements || problem.tokens >= kManyTokens) return kCublasLt;
  return elements < kSomeElements ? kSingle : kWide;
}

}  // namespace

int choose_weight_grad(const WeightGrad& problem) {
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
  return rule(problem);
}

void set_weight_grad_choice(int64_t out_features, int64_t in_features, int64_t tokens, bool store,
                            const std::string& name) {
  const int choice = parse(name);
  Table& known = table();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.choices[{out_features, in_features, tokens, store}] = choice;
}

void force_weight_grad_choice(const std::string& name) {
  const std::optional<int> choice = name.empty() ? std::nullopt : std::optional(parse(name));
  Table& known = table();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.forced = choice;
}

}  // namespace gradacc
