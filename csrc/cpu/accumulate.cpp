// main = fma(float(grad), scale, main) or float(grad) * scale, on the CPU, with the statistics of
// each chunk written in the same pass over memory: 10 bytes per element to add, 6 to store.
//
// Every instruction set gives the same main gradient, bit for bit; the order in which a chunk's
// squares are added, and so the last bits of its slot, is its own.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRADACC_X86 1
#include <immintrin.h>
#endif

namespace gradacc::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero, exact
  return sign ? -magnitude : magnitude;
}

// What one instruction set offers for one chunk.
struct ChunkKernels {
  float (*accumulate[3])(const Accumulation& item, int64_t begin, int64_t count, float scale);
  float (*squares)(const float* main, int64_t count);
  void (*scale)(float* main, int64_t count, float factor);
};

namespace portable {
#define GRADACC_TARGET
struct Vec {
  static constexpr int kWidth = 8;
  float value[kWidth];

  template <typename T>
  static Vec load(const T* p) {
    Vec v;
    for (int i = 0; i < kWidth; ++i) v.value[i] = to_float(p[i]);
    return v;
  }
  void store(float* p) const { std::copy(value, value + kWidth, p); }
  static Vec broadcast(float x) {
    Vec v;
    std::fill(v.value, v.value + kWidth, x);
    return v;
  }
  static Vec multiply(Vec a, Vec b) {
    for (int i = 0; i < kWidth; ++i) a.value[i] *= b.value[i];
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kWidth; ++i) c.value[i] = std::fma(a.value[i], b.value[i], c.value[i]);
    return c;
  }
  float sum() const {
    float total = 0.f;
    for (int i = 0; i < kWidth; ++i) total += value[i];
    return total;
  }
};
#include "chunk_kernels.inc"
#undef GRADACC_TARGET
}  // namespace portable

#ifdef GRADACC_X86

namespace avx2 {
#define GRADACC_TARGET __attribute__((target("avx2,fma,f16c")))
struct Vec {
  static constexpr int kWidth = 8;
  __m256 value;

  GRADACC_TARGET static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  GRADACC_TARGET static Vec load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  GRADACC_TARGET static Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  GRADACC_TARGET void store(float* p) const { _mm256_storeu_ps(p, value); }
  GRADACC_TARGET static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  GRADACC_TARGET static Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.value, b.value)}; }
  GRADACC_TARGET static Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.value, b.value, c.value)};
  }
  GRADACC_TARGET float sum() const {
    alignas(32) float lanes[kWidth];
    _mm256_store_ps(lanes, value);
    float total = 0.f;
    for (float lane : lanes) total += lane;
    return total;
  }
};
#include "chunk_kernels.inc"
#undef GRADACC_TARGET
}  // namespace avx2

namespace avx512 {
#define GRADACC_TARGET __attribute__((target("avx512f,avx2,fma,f16c")))
struct Vec {
  static constexpr int kWidth = 16;
  __m512 value;

  GRADACC_TARGET static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  GRADACC_TARGET static Vec load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  GRADACC_TARGET static Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  GRADACC_TARGET void store(float* p) const { _mm512_storeu_ps(p, value); }
  GRADACC_TARGET static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  GRADACC_TARGET static Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
  GRADACC_TARGET static Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.value, b.value, c.value)};
  }
  GRADACC_TARGET float sum() const { return _mm512_reduce_add_ps(value); }
};
#include "chunk_kernels.inc"
#undef GRADACC_TARGET
}  // namespace avx512

#endif  // GRADACC_X86

struct Isa {
  const char* name;
  const ChunkKernels* kernels;
  bool supported;
};

// The fastest first.
const Isa* isas(int* count) {
  static const Isa table[] = {
#ifdef GRADACC_X86
      {"avx512", &avx512::kKernels, static_cast<bool>(__builtin_cpu_supports("avx512f"))},
      {"avx2", &avx2::kKernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
      {"portable", &portable::kKernels, true},
  };
  *count = sizeof(table) / sizeof(table[0]);
  return table;
}

const Isa*& current() {
  static const Isa* chosen = [] {
    int count = 0;
    const Isa* table = isas(&count);
    return std::find_if(table, table + count, [](const Isa& isa) { return isa.supported; });
  }();
  return chosen;
}

int64_t chunk_size(int64_t numel, int64_t chunk) {
  return std::min(kChunkSize, numel - chunk * kChunkSize);
}

// What a factor of 0 makes of any gradient.
void add_nothing(const Accumulation& item, int64_t first, int64_t last) {
  if (item.store)
    std::fill(item.main + first * kChunkSize, item.main + std::min(last * kChunkSize, item.numel),
              0.f);
  if (item.partials) sum_of_squares({item.main, item.partials, item.numel}, first, last);
}

}  // namespace

void accumulate(const Accumulation& item, int64_t first, int64_t last, float scale) {
  if (scale == 0.f) return add_nothing(item, first, last);
  const auto kernel = current()->kernels->accumulate[static_cast<int>(item.type)];
  for (int64_t c = first; c < last; ++c) {
    const float sum = kernel(item, c * kChunkSize, chunk_size(item.numel, c), scale);
    if (item.partials) item.partials[c] = sum;
  }
}

void sum_of_squares(const Squares& item, int64_t first, int64_t last) {
  const auto kernel = current()->kernels->squares;
  for (int64_t c = first; c < last; ++c)
    item.partials[c] = kernel(item.main + c * kChunkSize, chunk_size(item.numel, c));
}

void scale(const Scaling& item, int64_t first, int64_t last, float factor) {
  const auto kernel = current()->kernels->scale;
  for (int64_t c = first; c < last; ++c)
    kernel(item.main + c * kChunkSize, chunk_size(item.numel, c), factor);
}

double sum(const Slots& slots) {
  double total = 0.;
  for (int64_t i = 0; i < slots.count; ++i) total += slots.partials[i];
  return total;
}

const char* isa() { return current()->name; }

bool select_isa(const char* name) {
  int count = 0;
  const Isa* table = isas(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(table[i].name, name) == 0 && table[i].supported) {
      current() = &table[i];
      return true;
    }
  }
  return false;
}

}  // namespace gradacc::cpu
