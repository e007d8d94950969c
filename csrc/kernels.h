// The torch-free kernel API: raw pointers, sizes and a stream.
//
// One formula everywhere, with s = scale * inv_scale rounded once to float32:
//
//   add:    main = fma(float(grad), s, main)
//   store:  main = float(grad) * s
//
// Where s is 0 the gradient is not used, whatever it holds: adding leaves main's bits, storing
// writes +0.
//
// A tensor is cut into chunks of kChunkSize elements. Each chunk owns one slot of `partials`, which
// every pass overwrites with the sum of squares of the chunk's new main gradient, or with NaN when
// one of its elements is not finite. A sum of finite squares that overflows is inf, never NaN.
// Nothing is added atomically, so the same inputs give the same bits on every run.

#pragma once

#include <cstdint>
#include <optional>

struct CUstream_st;

namespace gradacc {

constexpr int64_t kChunkSize = 1024;

constexpr int64_t num_chunks(int64_t numel) { return (numel + kChunkSize - 1) / kChunkSize; }

enum class GradType : int32_t { kFloat32, kFloat16, kBFloat16 };

// One tensor of an accumulation pass.
struct Accumulation {
  float* main;       // [numel], read (add only) and written
  const void* grad;  // [numel] of `type`, in the memory order of main
  float* partials;   // [num_chunks(numel)], written; may be null
  int64_t numel;
  GradType type;
  bool store;
};

// One tensor of a statistics pass.
struct Squares {
  const float* main;  // [numel]
  float* partials;    // [num_chunks(numel)], written
  int64_t numel;
};

// One tensor of a scaling pass: main *= factor.
struct Scaling {
  float* main;  // [numel]
  int64_t numel;
};

// The slots of one tensor.
struct Slots {
  const float* partials;  // [count]
  int64_t count;
};

// One weight gradient, or a batch of them, added to its main gradient as it is computed:
//
//   main[b, o, i] (+)= s * sum over t of grad_output[b, t, o] * input[b, t, i]
//
// Its slots hold the sum of squares of the new main gradient together: which slot holds which part
// is the kernel's choice, and it zeroes those that it does not need.
struct WeightGrad {
  float* main;              // [batch, out_features, in_features], contiguous
  const void* grad_output;  // [batch, tokens, out_features] of `type`
  const void* input;        // [batch, tokens, in_features] of `type`
  float* partials;          // [num_chunks(batch * out_features * in_features)]; may be null
  int64_t batch;
  int64_t out_features;
  int64_t in_features;
  int64_t tokens;
  int64_t grad_output_stride;        // elements between tokens; a token's row is contiguous
  int64_t grad_output_batch_stride;  // elements between batches
  int64_t input_stride;
  int64_t input_batch_stride;
  GradType type;
  bool store;
  int processors;  // of the GPU's that may be kept busy, or 0 for all
};

// The tokens of one row are summed in pieces of this many, then the pieces, each in order.
constexpr int64_t kPieceTokens = 64;

// The gradient of an embedding, added to the rows of its main gradient that were looked up:
//
//   main[v, c] (+)= s * sum over {t: indices[t] == v} of grad_output[t, c]
//
// with the sum in float32 and in token order. Tokens of padding_index add nothing and look no row
// up. Storing makes rows that nobody looked up 0. The slots are those of an accumulation; when
// adding, those of chunks without an element of a looked-up row keep what they hold.
struct EmbeddingGrad {
  float* main;              // [rows, columns], contiguous
  const void* grad_output;  // [tokens, columns] of `type`
  const void* indices;      // [tokens] of int64_t or int32_t
  float* partials;          // [num_chunks(rows * columns)]; may be null
  int64_t rows;
  int64_t columns;
  int64_t tokens;
  int64_t grad_output_stride;  // elements between tokens; a token's row is contiguous
  int64_t padding_index;       // -1 for none
  GradType type;
  bool has_int64_indices;
  bool store;
};

// The tokens of a looked-up row: order[begin], ..., order[end - 1] of an EmbeddingOrder.
struct EmbeddingRun {
  int64_t row;
  int64_t begin;
  int64_t end;
};

// The tokens sorted by their rows, in token order within a row, without those of padding_index.
struct EmbeddingOrder {
  const int64_t* order;      // [<= tokens]
  const EmbeddingRun* runs;  // [count], by ascending rows
  int64_t count;
};

// The CPU kernels work on the chunks [first, last) of one tensor, so that the caller can spread a
// list of tensors over its own threads.
namespace cpu {

void accumulate(const Accumulation& item, int64_t first, int64_t last, float scale);
void sum_of_squares(const Squares& item, int64_t first, int64_t last);
void scale(const Scaling& item, int64_t first, int64_t last, float factor);

// The first index, in token order, that is out of range.
std::optional<int64_t> find_out_of_range(const EmbeddingGrad& item);
// Fills order[tokens] and runs[tokens]; returns the number of runs.
int64_t group_tokens(const EmbeddingGrad& item, int64_t* order, EmbeddingRun* runs);
// One unit of work is some columns of one run.
int64_t embedding_units(const EmbeddingGrad& item, const EmbeddingOrder& order);
// Adds, or stores, the units [first, last).
void embedding(const EmbeddingGrad& item, const EmbeddingOrder& order, int64_t first, int64_t last,
               float scale);
// Renews the slots that the runs [first, last) own; needs all of main to be up to date.
void embedding_squares(const EmbeddingGrad& item, const EmbeddingOrder& order, int64_t first,
                       int64_t last);

// Sum of the slots, in double: NaN when any slot is NaN.
double sum(const Slots& slots);

// The instruction set in use: "avx512", "avx2" or "portable".
const char* isa();
// Chooses one by name; false, and no change, when this CPU or this build does not have it.
bool select_isa(const char* name);

}  // namespace cpu

// The CUDA launchers put a whole list into as few launches as kernel arguments allow, on `stream`
// of the current device, without allocating or synchronising. Each returns a cudaError_t.
namespace cuda {

using Stream = CUstream_st*;

// inv_scale: a device scalar, or null for 1.
int accumulate(const Accumulation* items, int64_t count, float scale, const float* inv_scale,
               Stream stream);
int sum_of_squares(const Squares* items, int64_t count, Stream stream);
// factor: a device scalar. No memory is touched when it is 1.
int scale(const Scaling* items, int64_t count, const float* factor, Stream stream);
// *s = scale * inv_scale; inv_scale may be null.
int prepare_factor(float scale, const float* inv_scale, float* s, Stream stream);
// sums[i] = sum of items[i]'s slots; norm = sqrt(sum of sums); found_inf = 1 when that is NaN, else
// 0.
int reduce(const Slots* items, int64_t count, float* sums, float* norm, float* found_inf,
           Stream stream);

// The bytes of scratch memory that embedding needs.
int embedding_workspace(const EmbeddingGrad& item, int64_t* bytes);
// workspace: aligned to 256 bytes. An index out of range traps on the device.
int embedding(const EmbeddingGrad& item, float scale, const float* inv_scale, void* workspace,
              Stream stream);

const char* error_string(int code);

}  // namespace cuda

}  // namespace gradacc
