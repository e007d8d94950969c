// The CPU backend: spreads the chunks of a list of tensors over torch's threads.

#include <ATen/Parallel.h>

#include <cmath>

#include "backend.h"

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

}  // namespace

const Backend kCpuBackend = {accumulate, sum_of_squares, scale, reduce};

}  // namespace gradacc
