// The CPU backend: spreads the chunks of a list of tensors over torch's threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "backend.h"
#include "checks.h"
#include "wgrad.h"

namespace gradacc {
namespace {

// Chunks a thread takes at the least: about 10 microseconds of memory traffic.
constexpr int64_t kGrain = (1 << 15) / kChunkSize;

// Calls run(item, first, last) on disjoint ranges of chunks that cover the list.
template <typename Item, typename Run>
void for_each_chunk(const std::vector<Item>& items, const Run& run) {
  std::vector<int64_t> begin{0};
  begin.reserve(items.size() + 1);
  for (const auto& item : items) begin.push_back(begin.back() + num_chunks(item.numel));
  at::parallel_for(0, begin.back(), kGrain, [&](int64_t first, int64_t last) {
    size_t i = std::upper_bound(begin.begin(), begin.end(), first) - begin.begin() - 1;
    for (; first < last; ++i) {
      const int64_t stop = std::min(last, begin[i + 1]);
      if (first < stop) run(items[i], first - begin[i], stop - begin[i]);
      first = stop;
    }
  });
}

void accumulate(const std::vector<Accumulation>& items, float scale, const float* inv_scale,
                at::Device) {
  const float s = inv_scale ? scale * *inv_scale : scale;
  for_each_chunk(items, [s](const Accumulation& item, int64_t first, int64_t last) {
    cpu::accumulate(item, first, last, s);
  });
}

void sum_of_squares(const std::vector<Squares>& items, at::Device) {
  for_each_chunk(items, cpu::sum_of_squares);
}

void scale(const std::vector<Scaling>& items, const float* factor, at::Device) {
  const float f = *factor;
  if (f == 1.f) return;
  for_each_chunk(items, [f](const Scaling& item, int64_t first, int64_t last) {
    cpu::scale(item, first, last, f);
  });
}

void reduce(const std::vector<Slots>& items, float* sums, float* norm, float* found_inf,
            at::Device) {
  double total = 0.;
  for (size_t i = 0; i < items.size(); ++i) {
    sums[i] = static_cast<float>(cpu::sum(items[i]));
    total += sums[i];
  }
  *norm = static_cast<float>(std::sqrt(total));
  *found_inf = std::isnan(total) ? 1.f : 0.f;
}

void prepare(const Factor& factor, float* s, at::Device) {
  *s = factor.inv_scale ? factor.scale * *factor.inv_scale : factor.scale;
}

void embedding(const EmbeddingGrad& item, float scale, const float* inv_scale, at::Device) {
  if (const auto index = cpu::find_out_of_range(item))
    TORCH_CHECK_VALUE(false, "embedding_accumulate_: indices must lie in [0, ", text(item.rows),
                      "), got ", text(*index));
  const float s = inv_scale ? scale * *inv_scale : scale;
  std::vector<int64_t> tokens(item.tokens);
  std::vector<EmbeddingRun> runs(item.tokens);
  const int64_t count = cpu::group_tokens(item, tokens.data(), runs.data());
  const EmbeddingOrder order{tokens.data(), runs.data(), count};
  const auto clear = [](float* values, int64_t numel) {
    at::parallel_for(0, numel, kGrain * kChunkSize, [=](int64_t first, int64_t last) {
      std::fill(values + first, values + last, 0.f);
    });
  };
  const int64_t numel = item.rows * item.columns;
  if (item.store) clear(item.main, numel);
  if (item.store && item.partials) clear(item.partials, num_chunks(numel));
  const int64_t units = cpu::embedding_units(item, order);
  if (units == 0) return;
  const int64_t reads_per_unit = item.tokens * item.columns / units;
  at::parallel_for(
      0, units, std::max<int64_t>(kGrain * kChunkSize / reads_per_unit, 1),
      [&](int64_t first, int64_t last) { cpu::embedding(item, order, first, last, s); });
  if (!item.partials) return;
  at::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    cpu::embedding_squares(item, order, first, last);
  });
}

}  // namespace

const Backend kCpuBackend = {
    accumulate,      sum_of_squares,
    scale,           reduce,
    cpu_weight_grad, [](int64_t, int64_t, at::Device) { return 0; },
    prepare,         [](at::Device) { return uint64_t{0}; },
    embedding,
};

}  // namespace gradacc
