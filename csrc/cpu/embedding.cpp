// main[v] = fma(sum of grad_output[t] over {t: indices[t] == v}, s, main[v]), or sum * s.
//
// Sums are made by cpu::accumulate with a factor of 1: fma(x, 1, sum) is sum + x, rounded once. So
// they are vectorised as it is, and have the same bits with every instruction set.

#include <algorithm>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace gradacc::cpu {
namespace {

// Columns of a unit: few enough to share a row among threads, enough to read memory in long pieces.
constexpr int64_t kUnitColumns = 256;
static_assert(kUnitColumns <= kChunkSize);

int64_t index_at(const EmbeddingGrad& item, int64_t token) {
  return item.has_int64_indices ? static_cast<const int64_t*>(item.indices)[token]
                                : static_cast<const int32_t*>(item.indices)[token];
}

int64_t units_of_row(const EmbeddingGrad& item) {
  return (item.columns + kUnitColumns - 1) / kUnitColumns;
}

// At most one chunk of elements.
void update(float* main, const void* grad, int64_t count, GradType type, bool store, float scale) {
  cpu::accumulate(Accumulation{main, grad, nullptr, count, type, store}, 0, 1, scale);
}

// `count` columns from `column` on of one run.
void add_run(const EmbeddingGrad& item, const EmbeddingOrder& order, const EmbeddingRun& run,
             int64_t column, int64_t count, float scale) {
  const int64_t item_size = item.type == GradType::kFloat32 ? 4 : 2;
  const auto grad = [&](int64_t i) {
    const int64_t offset = order.order[i] * item.grad_output_stride + column;
    return static_cast<const char*>(item.grad_output) + offset * item_size;
  };
  float* main = item.main + run.row * item.columns + column;
  if (run.end - run.begin == 1)
    return update(main, grad(run.begin), count, item.type, item.store, scale);

  float total[kUnitColumns], piece[kUnitColumns];
  for (int64_t begin = run.begin; begin < run.end; begin += kPieceTokens) {
    float* sum = begin == run.begin ? total : piece;
    const int64_t end = std::min(begin + kPieceTokens, run.end);
    for (int64_t i = begin; i < end; ++i)
      update(sum, grad(i), count, item.type, /*store=*/i == begin, 1.f);
    if (sum == piece) update(total, piece, count, GradType::kFloat32, /*store=*/false, 1.f);
  }
  update(main, total, count, GradType::kFloat32, item.store, scale);
}

}  // namespace

std::optional<int64_t> find_out_of_range(const EmbeddingGrad& item) {
  for (int64_t token = 0; token < item.tokens; ++token) {
    const int64_t index = index_at(item, token);
    if (index < 0 || index >= item.rows) return index;
  }
  return std::nullopt;
}

int64_t group_tokens(const EmbeddingGrad& item, int64_t* order, EmbeddingRun* runs) {
  std::vector<std::pair<int64_t, int64_t>> keys;  // (row, token)
  keys.reserve(item.tokens);
  for (int64_t token = 0; token < item.tokens; ++token) {
    const int64_t row = index_at(item, token);
    if (row != item.padding_index) keys.emplace_back(row, token);
  }
  std::sort(keys.begin(), keys.end());
  int64_t count = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(keys.size()); ++i) {
    const auto [row, token] = keys[i];
    if (count == 0 || runs[count - 1].row != row) runs[count++] = {row, i, i};
    runs[count - 1].end = i + 1;
    order[i] = token;
  }
  return count;
}

int64_t embedding_units(const EmbeddingGrad& item, const EmbeddingOrder& order) {
  return order.count * units_of_row(item);
}

// Units are ordered by columns, then by rows, so that a row with most of the tokens is shared among
// threads that take a range of units each.
void embedding(const EmbeddingGrad& item, const EmbeddingOrder& order, int64_t first, int64_t last,
               float scale) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t column = unit / order.count * kUnitColumns;
    add_run(item, order, order.runs[unit % order.count], column,
            std::min(kUnitColumns, item.columns - column), scale);
  }
}

// The first looked-up row with an element in a chunk owns its slot.
void embedding_squares(const EmbeddingGrad& item, const EmbeddingOrder& order, int64_t first,
                       int64_t last) {
  if (item.columns == 0) return;
  const Squares squares{item.main, item.partials, item.rows * item.columns};
  const auto last_chunk = [&](int64_t run) {
    return ((order.runs[run].row + 1) * item.columns - 1) / kChunkSize;
  };
  for (int64_t run = first; run < last; ++run) {
    int64_t chunk = order.runs[run].row * item.columns / kChunkSize;
    if (run > 0 && last_chunk(run - 1) == chunk) ++chunk;
    sum_of_squares(squares, chunk, last_chunk(run) + 1);
  }
}

}  // namespace gradacc::cpu
