// main[v] = fma(sum of grad_output[t] over {t: indices[t] == v}, s, main[v]), or sum * s.
//
//   order       sorts the keys (row, token): a row's tokens are now a run, in token order
//   pieces      sums up to kPieceTokens tokens of a run; a run of one piece goes to main at once
//   long runs   adds the pieces of each other run, in order, and updates main
//   statistics  renews the slots of the chunks with an element of a looked-up row
//
// Bytes: the gradient once, 8 per element of a looked-up row (statistics: 4 more, mostly from L2);
// storing writes all of main with zeros first. The number of looked-up rows is known to the device
// alone: blocks that find no work leave.
// Deterministic: every element is written by one thread, every slot by one warp, in a fixed order.

// An index out of range fails an assertion, as in PyTorch, whatever the build's flags.
#undef NDEBUG
#include <cassert>
#include <cub/device/device_radix_sort.cuh>

#include "elements.cuh"
#include "launch.cuh"

namespace gradacc::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kMaxGridY = 65535;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bits that hold the numbers up to `largest`.
int bits_of(int64_t largest) {
  int bits = 0;
  for (; largest > 0; largest /= 2) ++bits;
  return bits;
}

// The tokens sorted by row, then by position; those of padding_index last, as of row `rows`.
struct Order {
  const uint64_t* keys;  // [tokens]: row << token_bits | token
  int64_t tokens;
  int64_t rows;
  int token_bits;

  __device__ int64_t row_of_key(uint64_t key) const {
    return static_cast<int64_t>(key >> token_bits);
  }
  __device__ int64_t token_of_key(uint64_t key) const {
    return static_cast<int64_t>(key & ((uint64_t{1} << token_bits) - 1));
  }
  __device__ int64_t row(int64_t i) const { return row_of_key(keys[i]); }
  __device__ bool is_looked_up(int64_t row) const { return row < rows; }
  __device__ bool starts_run(int64_t i) const {
    const int64_t before = row(i > 0 ? i - 1 : 0);  // loaded whatever i is, along with row(i)
    return before != row(i) || i == 0;
  }

  // The first i in [low, high) whose row is not below `bound`; high when there is none.
  __device__ int64_t find(int64_t low, int64_t high, int64_t bound) const {
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (row(middle) < bound) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Where the run of position i begins.
  __device__ int64_t run_begin(int64_t i) const {
    const int64_t before = i - kPieceTokens;
    if (before >= 0 && row(before) == row(i)) return find(0, before, row(i));
    return find(before >= 0 ? before + 1 : 0, i, row(i));
  }
};

template <typename index_t>
__device__ int64_t row_of(const EmbeddingGrad& item, int64_t token) {
  const int64_t row = static_cast<const index_t*>(item.indices)[token];
  assert(row >= 0 && row < item.rows && "embedding_accumulate_: indices must lie in range");
  return row == item.padding_index ? item.rows : row;
}

__device__ uint64_t make_key(int64_t row, int64_t token, int token_bits) {
  return static_cast<uint64_t>(row) << token_bits | static_cast<uint64_t>(token);
}

// For few tokens one launch sorts: each token counts the keys below its own. A block serves a
// warp's width of tokens, and its warps share the keys among them.
constexpr int64_t kMaxRankedTokens = 8192;
constexpr int kRankBlock = 512;
constexpr int kRankWarps = kRankBlock / kWarpSize;
// Keys fit 31 bits, so that the sign of a difference tells which is larger in two instructions.
constexpr uint32_t kNoKey = INT32_MAX;  // beyond every key
constexpr int64_t kMaxRankedRows = kNoKey - 1;

__device__ uint32_t is_below(uint32_t key, uint32_t bound) { return (key - bound) >> 31; }

// How many of keys[begin..end) lie below `bound`; begin and end are multiples of the warp's size.
__device__ uint32_t count_below(const uint32_t* keys, int begin, int end, uint32_t bound) {
  const auto* vec = reinterpret_cast<const uint4*>(keys);
  uint32_t count = 0;
#pragma unroll 8
  for (int i = begin / 4; i < end / 4; ++i) {
    const uint4 v = vec[i];  // the same for all lanes
    count += is_below(v.x, bound);
    count += is_below(v.y, bound);
    count += is_below(v.z, bound);
    count += is_below(v.w, bound);
  }
  return count;
}

template <typename index_t>
__global__ void __launch_bounds__(kRankBlock)
    rank_kernel(const EmbeddingGrad item, int token_bits, uint64_t* ordered) {
  __shared__ uint4 storage[kMaxRankedTokens / 4];
  __shared__ uint32_t counts[kRankWarps][kWarpSize];
  auto* keys = reinterpret_cast<uint32_t*>(storage);
  const int tokens = static_cast<int>(item.tokens);
  const int groups = (tokens + kWarpSize - 1) / kWarpSize;
#pragma unroll 4
  for (int i = threadIdx.x; i < groups * kWarpSize; i += kRankBlock)
    keys[i] = i < tokens ? static_cast<uint32_t>(row_of<index_t>(item, i)) : kNoKey;
  __syncthreads();

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int own = blockIdx.x * kWarpSize;  // the first of the block's tokens
  const int begin = groups * warp / kRankWarps * kWarpSize;
  const int end = groups * (warp + 1) / kRankWarps * kWarpSize;
  const uint32_t key = keys[own + lane];
  // Of equal keys, those of earlier tokens count.
  uint32_t count = count_below(keys, begin, min(end, own), key + 1);
  count += count_below(keys, max(begin, own + kWarpSize), end, key);
  if (begin <= own && own < end) {
    for (int i = 0; i < kWarpSize; ++i) count += is_below(keys[own + i], key + (i < lane ? 1 : 0));
  }
  counts[warp][lane] = count;
  __syncthreads();
  if (warp > 0 || own + lane >= tokens) return;
  uint32_t rank = 0;
  for (int w = 0; w < kRankWarps; ++w) rank += counts[w][lane];
  ordered[rank] = make_key(key, own + lane, token_bits);
}

template <typename index_t>
__global__ void __launch_bounds__(kBlock)
    key_kernel(const EmbeddingGrad item, int token_bits, uint64_t* keys) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (token < item.tokens) keys[token] = make_key(row_of<index_t>(item, token), token, token_bits);
}

__device__ void store(float* to, const Vec<float, 1>& x) { *to = x.value[0]; }
// One access of 16 bytes, where the compiler would make four of an assignment.
__device__ void store(float* to, const Vec<float, 4>& x) {
  __stwb(reinterpret_cast<float4*>(to),
         make_float4(x.value[0], x.value[1], x.value[2], x.value[3]));
}

// What the kernels after the sort share.
struct Pass {
  EmbeddingGrad item;
  Order order;
  float* pieces;  // sums of the pieces of long runs; see piece_slot
  float scale;
  const float* inv_scale;

  // Windows of kPieceTokens positions, which find what lies beyond a run's first piece.
  __device__ int64_t windows() const {
    return order.tokens > kPieceTokens ? ceil_div(order.tokens, kPieceTokens) : 0;
  }

  __device__ float factor() const { return inv_scale ? scale * *inv_scale : scale; }

  __device__ float update(float main, float sum, float s) const {
    const float product = stored(sum, s), total = added(main, sum, s);
    return item.store ? product : total;
  }
};

// Where the sum of a long run's piece lies, in rows of `pieces`. No two share one: a window holds
// the begin of at most one later piece, for those of a run are a window apart and another run's
// would need a first piece before it; and of at most one run that outgrows the window.
__host__ __device__ constexpr int64_t piece_slot(int64_t begin, bool is_first) {
  return begin / kPieceTokens * 2 + (is_first ? 1 : 0);
}

struct Piece {
  int64_t begin;  // -1: there is none
  int64_t row;
  bool is_first;  // of its run
};

// Unit windows() + i looks for a run that begins at position i; unit w < windows(), for a later
// piece that begins in window w. They come first, for their blocks have the most to do.
__device__ Piece find_piece(const Pass& pass, int64_t unit) {
  const Order& order = pass.order;
  const Piece none = {-1, 0, false};
  const int64_t windows = pass.windows();
  if (unit >= windows) {
    const int64_t begin = unit - windows;
    if (begin >= order.tokens) return none;
    const int64_t row = order.row(begin);
    return order.starts_run(begin) && order.is_looked_up(row) ? Piece{begin, row, true} : none;
  }
  const int64_t edge = unit * kPieceTokens;
  const int64_t row = order.row(edge);
  if (!order.is_looked_up(row) || order.starts_run(edge)) return none;
  const int64_t since = (edge - order.run_begin(edge)) % kPieceTokens;
  const int64_t begin = since == 0 ? edge : edge + kPieceTokens - since;
  return begin < order.tokens && order.row(begin) == row ? Piece{begin, row, false} : none;
}

// The threads of a block as lanes that share a unit's columns: a power of two of them, up to
// kBlock.
struct Lanes {
  int64_t unit;
  int lane;
  int count;

  __device__ explicit Lanes(int bits)
      : unit(static_cast<int64_t>(blockIdx.x) * (kBlock >> bits) + (threadIdx.x >> bits)),
        lane(threadIdx.x & ((1 << bits) - 1)),
        count(1 << bits) {}
};

constexpr int kTokensInFlight = 4;
static_assert(kPieceTokens % kTokensInFlight == 0);

template <int kVecSize, typename grad_t>
__global__ void __launch_bounds__(kBlock)
    piece_kernel(const __grid_constant__ Pass pass, int lane_bits) {
  using GradVec = Vec<grad_t, kVecSize>;
  using MainVec = Vec<float, kVecSize>;
  const Lanes lanes(lane_bits);
  const EmbeddingGrad& item = pass.item;
  const Order& order = pass.order;
  const Piece piece = find_piece(pass, lanes.unit);
  if (piece.begin < 0) return;
  const float s = pass.factor();
  // The piece's keys and, where there is one, the key after them.
  const uint64_t* keys = order.keys + piece.begin;
  const int num_keys = static_cast<int>(min(order.tokens - piece.begin, kPieceTokens + 1));
  float* main_row = item.main + piece.row * item.columns;
  float* piece_row = pass.pieces + piece_slot(piece.begin, piece.is_first) * item.columns;
  const int64_t step = static_cast<int64_t>(lanes.count) * kVecSize;
  for (int64_t base = blockIdx.y * step; base < item.columns; base += gridDim.y * step) {
    const int64_t column = base + lanes.lane * kVecSize;
    if (column >= item.columns) continue;
    MainVec main = {};
    // On its way while the tokens are read.
    if (piece.is_first && !item.store) main = *reinterpret_cast<const MainVec*>(main_row + column);
    MainVec sum;
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) sum.value[j] = -0.f;  // -0 + x is x, also for x = -0
    bool goes_on = true;
    for (int i = 0; i < kPieceTokens && goes_on; i += kTokensInFlight) {
      uint64_t key[kTokensInFlight];
      bool is_ours[kTokensInFlight];
      GradVec grad[kTokensInFlight];
#pragma unroll
      for (int k = 0; k < kTokensInFlight; ++k) key[k] = keys[min(i + k, num_keys - 1)];
#pragma unroll
      for (int k = 0; k < kTokensInFlight; ++k) {
        is_ours[k] = i + k < num_keys && order.row_of_key(key[k]) == piece.row;
        const auto* source = static_cast<const grad_t*>(item.grad_output) +
                             order.token_of_key(key[k]) * item.grad_output_stride;
        if (is_ours[k]) grad[k] = *reinterpret_cast<const GradVec*>(source + column);
      }
#pragma unroll
      for (int k = 0; k < kTokensInFlight; ++k) {
#pragma unroll
        for (int j = 0; j < kVecSize; ++j)
          if (is_ours[k]) sum.value[j] += to_float(grad[k].value[j]);
      }
      goes_on = is_ours[kTokensInFlight - 1];
    }
    const bool is_long = !piece.is_first || (goes_on && num_keys > kPieceTokens &&
                                             order.row_of_key(keys[kPieceTokens]) == piece.row);
    if (is_long) {
      store(piece_row + column, sum);
    } else {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j)
        main.value[j] = pass.update(main.value[j], sum.value[j], s);
      store(main_row + column, main);
    }
  }
}

// One unit a window; the first window whose begin lies in a run serves it. A run of more tokens
// than a window has covers the begin of one.
template <int kVecSize>
__global__ void __launch_bounds__(kBlock)
    long_run_kernel(const __grid_constant__ Pass pass, int lane_bits) {
  using MainVec = Vec<float, kVecSize>;
  const Lanes lanes(lane_bits);
  const EmbeddingGrad& item = pass.item;
  const Order& order = pass.order;
  const int64_t edge = lanes.unit * kPieceTokens;
  if (edge >= order.tokens) return;
  const int64_t row = order.row(edge);
  if (!order.is_looked_up(row)) return;
  if (edge > 0 && order.row(edge - kPieceTokens) == row) return;
  const int64_t begin = order.run_begin(edge);
  const int64_t second = begin + kPieceTokens;
  if (second >= order.tokens || order.row(second) != row) return;
  const int64_t end = order.find(second + 1, order.tokens, row + 1);
  const int64_t pieces = ceil_div(end - begin, kPieceTokens);
  const float s = pass.factor();

  const int64_t step = static_cast<int64_t>(lanes.count) * kVecSize;
  for (int64_t base = blockIdx.y * step; base < item.columns; base += gridDim.y * step) {
    const int64_t column = base + lanes.lane * kVecSize;
    if (column >= item.columns) continue;
    float* target = item.main + row * item.columns + column;
    const auto piece_sum = [&](int64_t i) {
      const int64_t slot = piece_slot(begin + i * kPieceTokens, i == 0);
      return *reinterpret_cast<const MainVec*>(pass.pieces + slot * item.columns + column);
    };
    MainVec main = {};
    if (!item.store) main = *reinterpret_cast<const MainVec*>(target);
    MainVec sum = piece_sum(0);
#pragma unroll 8
    for (int64_t i = 1; i < pieces; ++i) {
      const MainVec piece = piece_sum(i);
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) sum.value[j] += piece.value[j];
    }
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) main.value[j] = pass.update(main.value[j], sum.value[j], s);
    store(target, main);
  }
}

__device__ float warp_sum(float value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// A warp for each position; where a run begins, it serves the chunks that its row is the first of
// the looked-up rows to have an element in.
__global__ void __launch_bounds__(kBlock)
    touched_squares_kernel(const __grid_constant__ EmbeddingGrad item,
                           const __grid_constant__ Order order) {
  const int64_t position =
      static_cast<int64_t>(blockIdx.x) * (kBlock / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (position >= order.tokens) return;
  const int64_t row = order.row(position);
  if (!order.starts_run(position) || !order.is_looked_up(row)) return;
  const auto last_chunk = [&](int64_t r) { return ((r + 1) * item.columns - 1) / kChunkSize; };
  int64_t first = row * item.columns / kChunkSize;
  if (position > 0 && last_chunk(order.row(position - 1)) == first) ++first;

  for (int64_t chunk = first + blockIdx.y; chunk <= last_chunk(row); chunk += gridDim.y) {
    const float* main = item.main + chunk * kChunkSize;
    const int64_t left = item.rows * item.columns - chunk * kChunkSize;
    SquareSum sum;
    if (left >= kChunkSize && reinterpret_cast<uintptr_t>(main) % sizeof(float4) == 0) {
      const auto* vec = reinterpret_cast<const float4*>(main) + lane;
      constexpr int kVecs = kChunkSize / 4 / kWarpSize;
      float4 v[kVecs];
#pragma unroll
      for (int i = 0; i < kVecs; ++i) v[i] = vec[i * kWarpSize];
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        sum.add(v[i].x);
        sum.add(v[i].y);
        sum.add(v[i].z);
        sum.add(v[i].w);
      }
    } else {
      const int count = static_cast<int>(left < kChunkSize ? left : kChunkSize);
#pragma unroll 4
      for (int i = lane; i < count; i += kWarpSize) sum.add(main[i]);
    }
    const float total = warp_sum(sum.total());
    if (lane == 0) item.partials[chunk] = total;
  }
}

// The scratch memory: offsets in bytes.
struct Workspace {
  int64_t keys = 0;
  int64_t other_keys = 0;  // of the radix sort, as is `sort`
  int64_t sort = 0;
  size_t sort_bytes = 0;
  int64_t pieces = 0;
  int64_t bytes = 0;

  int64_t reserve(int64_t size) {
    const int64_t begin = bytes;
    bytes += ceil_div(size, 256) * 256;
    return begin;
  }
};

bool is_ranked(const EmbeddingGrad& item) {
  return item.tokens <= kMaxRankedTokens && item.rows <= kMaxRankedRows;
}

// The order of the rows, that of padding included; tokens are in order already.
cudaError_t radix_sort(const EmbeddingGrad& item, cub::DoubleBuffer<uint64_t>& keys, void* scratch,
                       size_t& scratch_bytes, Stream stream) {
  const int token_bits = bits_of(item.tokens - 1);
  return cub::DeviceRadixSort::SortKeys(scratch, scratch_bytes, keys,
                                        static_cast<int32_t>(item.tokens), token_bits,
                                        token_bits + bits_of(item.rows), stream);
}

cudaError_t lay_out(const EmbeddingGrad& item, Workspace* space) {
  if (item.tokens > INT32_MAX - kBlock || bits_of(item.tokens - 1) + bits_of(item.rows) > 64)
    return cudaErrorInvalidValue;
  const int64_t keys = item.tokens * static_cast<int64_t>(sizeof(uint64_t));
  space->keys = space->reserve(keys);
  if (!is_ranked(item)) {
    cub::DoubleBuffer<uint64_t> none;
    const cudaError_t error = radix_sort(item, none, nullptr, space->sort_bytes, nullptr);
    if (error != cudaSuccess) return error;
    space->other_keys = space->reserve(keys);
    space->sort = space->reserve(static_cast<int64_t>(space->sort_bytes));
  }
  if (item.tokens > kPieceTokens) {
    const int64_t rows = piece_slot(item.tokens - 1, true) + 1;
    space->pieces = space->reserve(rows * item.columns * static_cast<int64_t>(sizeof(float)));
  }
  return cudaSuccess;
}

// Sorts by index, in `workspace`.
template <typename index_t>
cudaError_t sort_tokens(const EmbeddingGrad& item, char* workspace, Workspace& space, Order* order,
                        Stream stream) {
  const int token_bits = bits_of(item.tokens - 1);
  auto* keys = reinterpret_cast<uint64_t*>(workspace + space.keys);
  *order = {keys, item.tokens, item.rows, token_bits};
  if (is_ranked(item)) {
    const auto blocks = static_cast<unsigned>(ceil_div(item.tokens, kWarpSize));
    rank_kernel<index_t><<<blocks, kRankBlock, 0, stream>>>(item, token_bits, keys);
    return cudaGetLastError();
  }
  const auto blocks = static_cast<unsigned>(ceil_div(item.tokens, kBlock));
  key_kernel<index_t><<<blocks, kBlock, 0, stream>>>(item, token_bits, keys);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  cub::DoubleBuffer<uint64_t> buffers(keys,
                                      reinterpret_cast<uint64_t*>(workspace + space.other_keys));
  error = radix_sort(item, buffers, workspace + space.sort, space.sort_bytes, stream);
  order->keys = buffers.Current();
  return error;
}

// Launches kernel(grid, lane_bits) over units of work that cover `columns` with vectors.
template <typename Launch>
cudaError_t launch_units(int64_t units, int64_t columns, int64_t columns_per_lane,
                         const Launch& launch) {
  const int lane_bits =
      std::min(bits_of(ceil_div(columns, columns_per_lane) - 1), bits_of(kBlock - 1));
  const int64_t blocks = ceil_div(units, kBlock >> lane_bits);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t slices = ceil_div(columns, columns_per_lane << lane_bits);
  launch(dim3(static_cast<unsigned>(blocks),
              static_cast<unsigned>(std::min<int64_t>(slices, kMaxGridY))),
         lane_bits);
  return cudaGetLastError();
}

template <int kVecSize, typename grad_t>
cudaError_t add_rows(const Pass& pass, Stream stream) {
  const int64_t tokens = pass.item.tokens;
  const int64_t windows = tokens > kPieceTokens ? ceil_div(tokens, kPieceTokens) : 0;
  const cudaError_t error =
      launch_units(windows + tokens, pass.item.columns, kVecSize, [&](dim3 grid, int lane_bits) {
        piece_kernel<kVecSize, grad_t><<<grid, kBlock, 0, stream>>>(pass, lane_bits);
      });
  if (error != cudaSuccess || windows == 0) return error;
  return launch_units(windows, pass.item.columns, kVecSize, [&](dim3 grid, int lane_bits) {
    long_run_kernel<kVecSize><<<grid, kBlock, 0, stream>>>(pass, lane_bits);
  });
}

template <typename grad_t>
cudaError_t add_rows(const Pass& pass, Stream stream) {
  constexpr int kVecSize = 4;
  const EmbeddingGrad& item = pass.item;
  const bool is_aligned =
      reinterpret_cast<uintptr_t>(item.main) % sizeof(Vec<float, kVecSize>) == 0 &&
      reinterpret_cast<uintptr_t>(item.grad_output) % sizeof(Vec<grad_t, kVecSize>) == 0 &&
      item.columns % kVecSize == 0 && item.grad_output_stride % kVecSize == 0;
  return is_aligned ? add_rows<kVecSize, grad_t>(pass, stream) : add_rows<1, grad_t>(pass, stream);
}

cudaError_t add_rows(const Pass& pass, Stream stream) {
  switch (pass.item.type) {
    case GradType::kBFloat16:
      return add_rows<__nv_bfloat16>(pass, stream);
    case GradType::kFloat16:
      return add_rows<__half>(pass, stream);
    case GradType::kFloat32:
      return add_rows<float>(pass, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t renew_slots(const EmbeddingGrad& item, const Order& order, Stream stream) {
  const int64_t chunks = std::min<int64_t>(num_chunks(item.columns), kMaxGridY);
  const dim3 grid(static_cast<unsigned>(ceil_div(item.tokens, kBlock / kWarpSize)),
                  static_cast<unsigned>(chunks));
  touched_squares_kernel<<<grid, kBlock, 0, stream>>>(item, order);
  return cudaGetLastError();
}

cudaError_t clear(const EmbeddingGrad& item, Stream stream) {
  const int64_t numel = item.rows * item.columns;
  if (numel == 0) return cudaSuccess;
  const cudaError_t error = cudaMemsetAsync(item.main, 0, numel * sizeof(float), stream);
  if (error != cudaSuccess || !item.partials) return error;
  return cudaMemsetAsync(item.partials, 0, num_chunks(numel) * sizeof(float), stream);
}

}  // namespace

int embedding_workspace(const EmbeddingGrad& item, int64_t* bytes) {
  Workspace space;
  const cudaError_t error = item.tokens == 0 ? cudaSuccess : lay_out(item, &space);
  *bytes = space.bytes;
  return error;
}

int embedding(const EmbeddingGrad& item, float scale, const float* inv_scale, void* workspace,
              Stream stream) {
  Workspace space;
  cudaError_t error = item.tokens == 0 ? cudaSuccess : lay_out(item, &space);
  if (error == cudaSuccess && item.store) error = clear(item, stream);
  if (error != cudaSuccess || item.tokens == 0) return error;
  auto* memory = static_cast<char*>(workspace);
  Pass pass{item, {}, reinterpret_cast<float*>(memory + space.pieces), scale, inv_scale};
  error = item.has_int64_indices ? sort_tokens<int64_t>(item, memory, space, &pass.order, stream)
                                 : sort_tokens<int32_t>(item, memory, space, &pass.order, stream);
  if (error != cudaSuccess || item.rows * item.columns == 0) return error;
  error = add_rows(pass, stream);
  if (error != cudaSuccess || !item.partials) return error;
  return renew_slots(item, pass.order, stream);
}

}  // namespace gradacc::cuda
